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
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use vm_memory::Bytes;

use super::difference::region_name;
use super::{
    AreaMemory, AttachOptions, Attachment, Description, Operation, Reply, Request, RequestId, Take,
    Token, Transport, Trigger,
};
use crate::error::{Error, Result};
use crate::memory::SharedMemory;
use crate::region::AreaKind;
use crate::sys::{self, Mapping};

mod dma;
mod doorbells;
mod fault;
mod slots;
mod uuid;

pub use uuid::Uuid;

use dma::ClientDma;
use doorbells::Doorbells;
use slots::Slots;

/// Serves the device of a node of `muser.ko`.
#[derive(Debug)]
pub struct KernelTransport {
    node: Arc<File>,
    slots: Option<Slots>,
    doorbells: Option<Doorbells>,
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
            doorbells: None,
        })
    }

    fn slots(&self) -> Result<&Slots> {
        let missing = || Error::io("serving before the attachment", Number::ENOTCONN);
        self.slots.as_ref().ok_or_else(missing)
    }

    /// Puts a reply into its slot.
    fn reply(&self, reply: Reply, data: &[u8]) -> Result<u32> {
        let data = if reply.token.reads && reply.result.is_ok() {
            data
        } else {
            &[]
        };
        let result = reply.result.map_or_else(|errno| -errno.number(), |()| 0);
        self.slots()?.put(reply.token.slot, result, data)?;
        Ok(reply.token.slot)
    }
}

impl Transport for KernelTransport {
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Attachment> {
        let (regions, areas, irqs) = encode(description);
        let mut attach = muser_attach {
            size: size_of_u32::<muser_attach>(),
            version: MUSER_ABI_VERSION,
            bus: MUSER_BUS_PCI,
            slots: slots_for(options.threads),
            flags: if options.standby {
                MUSER_ATTACH_STANDBY
            } else {
                0
            },
            state_size: u32::try_from(options.state_size).unwrap_or(u32::MAX),
            state_tag: options.state_tag,
            ..muser_attach::default()
        };
        let attached = loop {
            match sys::attach(self.node.as_fd(), &mut attach, &regions, &areas, &irqs) {
                // A signal came, which ended the wait and not the process.
                Err(Number::EINTR) => {}
                other => break other,
            }
        };
        attached.map_err(|errno| {
            if errno == Number::ENODEV {
                return Error::removed();
            }
            let message = fault::sentence(&attach, description, errno);
            Error::refused(errno as i32, message)
        })?;
        self.slots = Some(Slots::map(self.node.as_fd(), &attach)?);
        self.doorbells = Doorbells::join(self.node.as_fd(), description)?;
        let trigger = Arc::new(Node::map(Arc::clone(&self.node))?);
        let memory = map_areas(self.node.as_fd(), description)?;
        let state = map_state(self.node.as_fd(), attach.state_size as usize)?;
        let dma = Arc::new(ClientDma::new(Arc::clone(&trigger)));
        Ok(Attachment {
            state,
            recovered: attach.recovered & MUSER_RECOVERED_SERVED != 0,
            ..Attachment::new(trigger, memory, dma)
        })
    }

    fn turn(
        &self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        let ring = |reply: &Reply| reply.token.request() == RequestId::NONE;
        let mut reply = reply
            .filter(|reply| !ring(reply))
            .map(|reply| self.reply(reply, data))
            .transpose()?;
        let Some(doorbells) = &self.doorbells else {
            return self.exchange(reply, take, data);
        };
        let rung = |operation| Request::new(Token::new(RequestId::NONE, 0, false), operation);
        if take != Take::Nothing && doorbells.go_first() {
            if let Some(operation) = doorbells.take() {
                self.exchange(reply, Take::Nothing, data)?;
                return Ok(Some(rung(operation)));
            }
        }
        let ready = if take == Take::Nothing {
            take
        } else {
            Take::Ready
        };
        loop {
            let request = self.exchange(reply.take(), ready, data)?;
            if request.is_some() || take == Take::Nothing {
                return Ok(request);
            }
            if let Some(operation) = doorbells.take() {
                return Ok(Some(rung(operation)));
            }
            if take == Take::Ready {
                return Ok(None);
            }
            let mut fds = [PollFd::new(doorbells.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Number::EINTR) => {}
                Err(errno) => return Err(Error::io("waiting for requests", errno)),
            }
        }
    }

    fn detach(&self) {
        if self.slots.is_none() {
            return;
        }
        match sys::detach(self.node.as_fd()) {
            // It may be done already.
            Ok(()) | Err(Number::ENODEV | Number::ENOTCONN) => {}
            Err(errno) => log::warn!("detaching from the device: {errno}"),
        }
    }
}

impl KernelTransport {
    /// `MUSER_NEXT`: replies with a slot, and takes the next request.
    fn exchange(
        &self,
        reply: Option<u32>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
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
                Err(Number::ESHUTDOWN) => return Err(Error::handed_over()),
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

    fn request(&self, slot: u32, data: &mut Vec<u8>) -> Result<Request> {
        let slots = self.slots()?;
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
        let reads = head.kind == MUSER_REQUEST_READ;
        let token = Token::new(RequestId::new(head.id), slot, reads);
        let replay = head.flags & MUSER_REQUEST_REPLAY != 0;
        Ok(Request {
            replay,
            ..Request::new(token, operation)
        })
    }
}

/// The attachment ends here, whatever handles to interrupts and memory the device has given away.
impl Drop for KernelTransport {
    fn drop(&mut self) {
        self.detach();
    }
}

impl AsFd for KernelTransport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.doorbells {
            Some(doorbells) => doorbells.as_fd(),
            None => self.node.as_fd(),
        }
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

/// The state, of which there may be more than was asked for.
fn map_state(node: BorrowedFd<'_>, size: usize) -> Result<Option<SharedMemory>> {
    if size == 0 {
        return Ok(None);
    }
    let whole = size.next_multiple_of(to_usize(sys::page_size()));
    let mapping = Mapping::new(node, MUSER_MMAP_STATE, whole, true)
        .map_err(|errno| Error::io("mapping the state", errno))?;
    Ok(Some(SharedMemory::part(mapping, 0, size)))
}

fn map_areas(node: BorrowedFd<'_>, description: &Description) -> Result<Vec<AreaMemory>> {
    let regions = description.regions.iter();
    let areas = regions.flat_map(|region| region.areas.iter().map(move |area| (region, area)));
    let memory = areas.map(|(region, area)| {
        let start = u64::from(region.index) << MUSER_MMAP_REGION_SHIFT;
        // A doorbell is a part of the pages in which it lies.
        let page = area.offset & !(sys::page_size() - 1);
        let inside = to_usize(area.offset - page);
        let whole = to_usize(area.end().next_multiple_of(sys::page_size()) - page);
        let offset = MUSER_MMAP_REGIONS + start + page;
        let mapping = Mapping::new(node, offset, whole, true).map_err(|errno| {
            let name = region_name(region.index);
            Error::io(
                format!("mapping {:#x}..{:#x} of {name}", area.offset, area.end()),
                errno,
            )
        })?;
        let memory = SharedMemory::part(mapping, inside, to_usize(area.size));
        Ok(AreaMemory::new(region.index, area, memory))
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
                AreaKind::Mappable => MUSER_AREA_MMAP,
                AreaKind::Doorbell => MUSER_AREA_DOORBELL,
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

/// A slot for each thread, and one more, so that none waits for another's reply to be accepted.
fn slots_for(threads: usize) -> u32 {
    let slots = u32::try_from(threads.saturating_add(1)).unwrap_or(u32::MAX);
    slots.clamp(MUSER_DEFAULT_SLOTS, MUSER_MAX_SLOTS)
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
