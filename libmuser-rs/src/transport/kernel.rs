// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel transport: `/dev/muser/UUID` of `muser.ko`.
//!
//! Requests and replies lie in slots of memory that the kernel and this process share; one
//! `MUSER_NEXT` replies to a request and takes the next. `muser_uapi` documents all of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use muser_uapi::*;
use nix::errno::Errno as Number;
use vm_memory::Bytes;

use super::{
    AreaMemory, Attachment, Description, Operation, Reply, Request, Take, Token, Transport, Trigger,
};
use crate::error::{Error, Result};
use crate::memory::SharedMemory;
use crate::region::Region;
use crate::sys::{self, Mapping};

mod dma;
mod fault;
mod slots;
mod uuid;

pub use uuid::Uuid;

use dma::ClientDma;
use slots::Slots;

/// Serves the device of a node of `muser.ko`.
#[derive(Debug)]
pub struct KernelTransport {
    node: Arc<File>,
    slots: Option<Slots>,
    /// The slot of the request taken last, for a reply to go with the next turn.
    taken: Option<Taken>,
}

#[derive(Clone, Copy, Debug)]
struct Taken {
    slot: u32,
    id: u64,
    reads: bool,
}

impl KernelTransport {
    /// Opens `/dev/muser/UUID`.
    ///
    /// # Errors
    ///
    /// There is no such device, or it belongs to somebody else.
    pub fn open(uuid: &Uuid) -> Result<Self> {
        Self::open_node(Path::new("/dev/muser").join(uuid.to_string()))
    }

    /// Opens the node at this path.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_node(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let node = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| {
                let hint = match error.kind() {
                    io::ErrorKind::NotFound => {
                        " (is muser.ko loaded, and was the UUID written to `create`?)"
                    }
                    io::ErrorKind::PermissionDenied => {
                        " (the node belongs to who created the device)"
                    }
                    _ => "",
                };
                Error::io(format!("opening {}{hint}", path.display()), error)
            })?;
        Ok(Self {
            node: Arc::new(node),
            slots: None,
            taken: None,
        })
    }

    fn reply(&mut self, reply: Option<Reply>, data: &[u8]) -> Result<Option<u32>> {
        let Some(reply) = reply else { return Ok(None) };
        let taken = self.taken.take().filter(|taken| taken.id == reply.token.0);
        let (Some(taken), Some(slots)) = (taken, &self.slots) else {
            return Err(Error::io("replying to a request not taken", Number::ENOMSG));
        };
        let data = if taken.reads && reply.result.is_ok() {
            data
        } else {
            &[]
        };
        let result = reply.result.map_or_else(|errno| -errno.number(), |()| 0);
        slots.put(taken, result, data)?;
        Ok(Some(taken.slot))
    }
}

impl Transport for KernelTransport {
    fn attach(&mut self, description: &Description) -> Result<Attachment> {
        let (regions, areas, irqs) = encode(description);
        let mut attach = muser_attach {
            size: size_of_u32::<muser_attach>(),
            version: MUSER_ABI_VERSION,
            bus: MUSER_BUS_PCI,
            ..muser_attach::default()
        };
        sys::attach(self.node.as_fd(), &mut attach, &regions, &areas, &irqs).map_err(|errno| {
            if errno == Number::ENODEV {
                return Error::removed();
            }
            let message = fault::sentence(&attach, description, errno);
            Error::refused(errno as i32, message)
        })?;
        self.slots = Some(Slots::map(self.node.as_fd(), &attach)?);
        let trigger = Arc::new(Node::map(Arc::clone(&self.node))?);
        let memory = map_areas(self.node.as_fd(), description)?;
        let dma = Arc::new(ClientDma::new(Arc::clone(&trigger)));
        Ok(Attachment::new(trigger, memory, dma))
    }

    fn turn(
        &mut self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        let reply = self.reply(reply, data)?;
        let mut next = muser_next {
            size: size_of_u32::<muser_next>(),
            flags: match take {
                Take::Nothing => 0,
                Take::Ready => MUSER_NEXT_TAKE | MUSER_NEXT_NONBLOCK,
                Take::Wait => MUSER_NEXT_TAKE,
            },
            ..muser_next::default()
        };
        if let Some(slot) = reply {
            next.slot = slot;
            next.flags |= MUSER_NEXT_REPLY;
        }
        while next.flags & (MUSER_NEXT_REPLY | MUSER_NEXT_TAKE) != 0 {
            let replying = next.flags & MUSER_NEXT_REPLY != 0;
            match sys::next(self.node.as_fd(), &mut next) {
                Ok(()) if take == Take::Nothing => return Ok(None),
                Ok(()) => return self.request(next.slot, data).map(Some),
                // The reply, if accepted, was taken out of the flags: it goes out once.
                Err(Number::EINTR) => {}
                Err(Number::EAGAIN) => return Ok(None),
                Err(Number::ENODEV) => return Err(Error::removed()),
                // The client is gone; nobody misses the reply, and the request has ended.
                Err(Number::ECANCELED | Number::ENOENT) if replying => {
                    log::debug!("a client did not wait for its reply");
                    next.flags &= !MUSER_NEXT_REPLY;
                    next.slot = 0;
                }
                Err(errno) => return Err(Error::io("MUSER_NEXT", errno)),
            }
        }
        Ok(None)
    }
}

impl KernelTransport {
    fn request(&mut self, slot: u32, data: &mut Vec<u8>) -> Result<Request> {
        let Some(slots) = &self.slots else {
            return Err(Error::io(
                "taking a request before the attachment",
                Number::ENOTCONN,
            ));
        };
        let head = slots.head(slot)?;
        let count = head.count.min(MUSER_SLOT_DATA) as usize;
        let operation = match head.kind {
            MUSER_REQUEST_READ => Operation::Read {
                region: head.region,
                offset: head.offset,
                count,
            },
            MUSER_REQUEST_WRITE => {
                data.resize(count, 0);
                slots.data(slot, data)?;
                Operation::Write {
                    region: head.region,
                    offset: head.offset,
                }
            }
            MUSER_REQUEST_RESET => Operation::Reset {
                close: head.flags & MUSER_REQUEST_CLOSE != 0,
            },
            MUSER_REQUEST_UNMAP => Operation::Unmap {
                iova: head.offset,
                length: head.length,
            },
            _ => Operation::Unknown,
        };
        self.taken = Some(Taken {
            slot,
            id: head.id,
            reads: head.kind == MUSER_REQUEST_READ,
        });
        let replay = head.flags & MUSER_REQUEST_REPLAY != 0;
        Ok(Request {
            replay,
            ..Request::new(Token(head.id), operation)
        })
    }
}

/// The attachment ends here, whatever handles to interrupts and memory the device has given away.
impl Drop for KernelTransport {
    fn drop(&mut self) {
        if self.slots.is_none() {
            return;
        }
        match sys::detach(self.node.as_fd()) {
            Ok(()) | Err(Number::ENODEV) => {}
            Err(errno) => log::warn!("detaching from the device: {errno}"),
        }
    }
}

impl AsFd for KernelTransport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.node.as_fd()
    }
}

/// The node as what fires interrupts, with the page that tells what the client has enabled.
#[derive(Debug)]
pub(super) struct Node {
    file: Arc<File>,
    status: Mapping,
}

impl Node {
    fn map(file: Arc<File>) -> Result<Self> {
        let page = to_usize(sys::page_size());
        let status = Mapping::new(file.as_fd(), MUSER_MMAP_STATUS, page, false)
            .map_err(|errno| Error::io("mapping the status page", errno))?;
        Ok(Self { file, status })
    }

    /// Changes whenever memory of the client that was acquired has gone away.
    fn dma_generation(&self) -> u64 {
        let offset = std::mem::offset_of!(muser_status, dma_generation);
        // The page is mapped and the offset aligned: there is no error to be had.
        self.status
            .slice()
            .load(offset, Ordering::Acquire)
            .unwrap_or(0)
    }

    fn trigger(&self, flags: u32, index: u32, vector: u32) -> Result<()> {
        let mut trigger = muser_trigger {
            size: size_of_u32::<muser_trigger>(),
            flags,
            index,
            start: vector,
            vectors: 1,
            ..muser_trigger::default()
        };
        loop {
            return match sys::trigger(self.file.as_fd(), &mut trigger) {
                Ok(()) => Ok(()),
                Err(Number::EINTR) => continue,
                Err(Number::ENODEV) => Err(Error::removed()),
                Err(errno) => Err(Error::io(
                    format!("interrupt index {index} vector {vector}"),
                    errno,
                )),
            };
        }
    }
}

impl Trigger for Node {
    fn raise(&self, index: u32, vector: u32) -> Result<()> {
        self.trigger(0, index, vector)
    }

    fn lower(&self, index: u32, vector: u32) -> Result<()> {
        self.trigger(MUSER_TRIGGER_LOWER, index, vector)
    }

    fn eventfds(&self, index: u32) -> u32 {
        let first = std::mem::offset_of!(muser_status, irq_enabled);
        let offset = first + index.min(MUSER_MAX_IRQ_INDEXES - 1) as usize * size_of::<u32>();
        // The page is mapped and the offset aligned: there is no error to be had.
        self.status
            .slice()
            .load::<u32>(offset, Ordering::Acquire)
            .unwrap_or(0)
    }
}

fn map_areas(node: BorrowedFd<'_>, description: &Description) -> Result<Vec<AreaMemory>> {
    let regions = description.regions.iter();
    let areas = regions.flat_map(|region| region.areas.iter().map(move |area| (region, area)));
    let memory = areas.map(|(region, area)| {
        let start = u64::from(region.index) << MUSER_MMAP_REGION_SHIFT;
        let offset = MUSER_MMAP_REGIONS + start + area.offset;
        let mapping = Mapping::new(node, offset, to_usize(area.size), true).map_err(|errno| {
            let name = region_name(region.index);
            Error::io(
                format!("mapping {:#x}..{:#x} of {name}", area.offset, area.end()),
                errno,
            )
        })?;
        Ok(AreaMemory::new(
            region.index,
            area.offset,
            SharedMemory::new(mapping),
        ))
    });
    memory.collect()
}

fn encode(description: &Description) -> (Vec<muser_region>, Vec<muser_area>, Vec<muser_irq>) {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let regions = description.regions.iter().map(|region| muser_region {
        index: region.index,
        flags: flag(region.readable, MUSER_REGION_READ) | flag(region.writable, MUSER_REGION_WRITE),
        size: region.size,
        num_areas: u32::try_from(region.areas.len()).unwrap_or(u32::MAX),
        reserved: 0,
    });
    let areas = description
        .regions
        .iter()
        .flat_map(|region| &region.areas)
        .map(|area| {
            let flags = match area.kind {
                crate::region::AreaKind::Mappable => MUSER_AREA_MMAP,
            };
            muser_area {
                offset: area.offset,
                size: area.size,
                flags,
                reserved: 0,
            }
        });
    let irqs = description.irqs.iter().map(|irq| muser_irq {
        index: irq.index,
        flags: MUSER_IRQ_EVENTFD
            | flag(irq.maskable, MUSER_IRQ_MASKABLE)
            | flag(irq.automasked, MUSER_IRQ_AUTOMASKED)
            | flag(irq.noresize, MUSER_IRQ_NORESIZE),
        count: irq.count,
        reserved: 0,
    });
    (regions.collect(), areas.collect(), irqs.collect())
}

fn region_name(index: u32) -> String {
    Region::from_index(index).map_or_else(|| format!("region {index}"), |region| region.to_string())
}

fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, Msix, PciBuilder, Pin};

    #[test]
    fn description_is_encoded_as_the_abi_has_it() {
        let model = PciBuilder::new(1, 2)
            .interrupt_pin(Pin::A)
            .bar(0, Bar::memory32(0x4000).mappable(0..0x1000))
            .bar(1, Bar::memory32(0x4000).mappable(0x2000..0x4000))
            .rom([1])
            .msix(Msix::new(3).table(0, 0x1000).pba(0, 0x2000))
            .build()
            .unwrap();

        let (regions, areas, irqs) = encode(model.description());

        let region = |region: &muser_region| (region.index, region.flags, region.num_areas);
        let regions: Vec<_> = regions.iter().map(region).collect();
        assert_eq!(regions, [(0, 3, 1), (1, 3, 1), (6, 1, 0), (7, 3, 0)]);
        let areas: Vec<_> = areas
            .iter()
            .map(|area| (area.offset, area.size, area.flags))
            .collect();
        assert_eq!(areas, [(0, 0x1000, 1), (0x2000, 0x2000, 1)]);
        let irqs: Vec<_> = irqs
            .iter()
            .map(|irq| (irq.index, irq.flags, irq.count))
            .collect();
        assert_eq!(irqs, [(0, 0b0111, 1), (2, 0b0011, 3), (4, 0b0001, 1)]);
    }

    #[test]
    fn missing_node_says_what_to_look_for() {
        let uuid = "00000000-0000-0000-0000-000000000000".parse().unwrap();

        let error = KernelTransport::open(&uuid).unwrap_err();

        assert_eq!(error.errno().number(), libc::ENOENT);
        assert!(error.to_string().contains("muser.ko"), "{error}");
    }
}
