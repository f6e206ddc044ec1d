// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device process on the bare ABI of `/dev/muser/UUID`, without libmuser: so that the tests can
//! do what the library never would.

mod dma;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use muser_uapi::*;
use zerocopy::IntoBytes;

use crate::check::errno_name;
use crate::mdev::Mdev;
use crate::sys::{self, Mapping};
use crate::vfio;

pub use dma::{Pinning, Unmap};

/// What a device process says when it attaches. Every field can be set wrong.
#[derive(Clone, Debug)]
pub struct Description {
    /// `muser_attach.version`.
    pub version: u32,
    /// `muser_attach.flags`.
    pub flags: u32,
    /// `muser_attach.bus`.
    pub bus: u32,
    /// `muser_attach.slots`.
    pub slots: u32,
    /// `muser_attach.state_size`.
    pub state_size: u32,
    /// `muser_attach.state_tag`.
    pub state_tag: u64,
    /// Regions.
    pub regions: Vec<muser_region>,
    /// Areas of all regions.
    pub areas: Vec<muser_area>,
    /// Interrupt indexes.
    pub irqs: Vec<muser_irq>,
}

/// Region of [`Description::pci`] which the process serves as a whole: 64 KiB.
pub const TRAPPED: u32 = 0;
/// Offset and size of a doorbell of [`Description::with_doorbells`], the first of all areas.
pub const BELL: (u64, u64) = (0x8010, 8);
/// As [`BELL`], the second of all areas.
pub const NEXT_BELL: (u64, u64) = (0x8018, 4);
/// As [`BELL`], the third of all areas.
pub const FAR_BELL: (u64, u64) = (0x9ffc, 8);
/// Region of [`Description::pci`] with a mappable area in the middle: 16 KiB, of which
/// [`MIXED_AREA`] is device memory.
pub const MIXED: u32 = 1;
/// Offset and size of the mappable area of [`MIXED`].
pub const MIXED_AREA: (u64, u64) = (4096, 8192);
/// Region of [`Description::pci`] which is device memory as a whole: 64 KiB.
pub const MEMORY: u32 = 2;
/// Region of [`Description::pci`] without write access: 4 KiB.
pub const READ_ONLY: u32 = 3;
/// Region of [`Description::pci`] without read access: 4 KiB.
pub const WRITE_ONLY: u32 = 4;
/// Region that [`Description::pci`] does not describe.
pub const ABSENT: u32 = 5;
/// PCI config space: 256 bytes.
pub const CONFIG: u32 = 7;

/// Interrupt index of [`Description::pci`]: one level-triggered line.
pub const INTX: u32 = 0;
/// Interrupt index of [`Description::pci`]: 8 vectors that can't be masked.
pub const MSI: u32 = 1;
/// Interrupt index of [`Description::pci`]: 128 maskable vectors.
pub const MSIX: u32 = 2;
/// Interrupt index of [`Description::pci`]: the error notification.
pub const ERR: u32 = 3;
/// Interrupt index of [`Description::pci`]: the request to release the device.
pub const REQ: u32 = 4;

/// A region without areas.
pub fn region(index: u32, size: u64) -> muser_region {
    let flags = MUSER_REGION_READ | MUSER_REGION_WRITE;
    muser_region {
        index,
        flags,
        size,
        ..Default::default()
    }
}

/// A mappable area.
pub fn area(offset: u64, size: u64) -> muser_area {
    muser_area {
        offset,
        size,
        flags: MUSER_AREA_MMAP,
        ..Default::default()
    }
}

/// A doorbell.
pub fn doorbell(offset: u64, size: u64) -> muser_area {
    muser_area {
        flags: MUSER_AREA_DOORBELL,
        ..area(offset, size)
    }
}

/// An interrupt index.
pub fn irq(index: u32, count: u32, flags: u32) -> muser_irq {
    muser_irq {
        index,
        flags: flags | MUSER_IRQ_EVENTFD,
        count,
        ..Default::default()
    }
}

impl Description {
    /// The least that is a PCI device: config space.
    pub fn minimal() -> Self {
        Self {
            version: MUSER_ABI_VERSION,
            flags: 0,
            bus: MUSER_BUS_PCI,
            slots: 0,
            state_size: 0,
            state_tag: 0,
            regions: vec![region(CONFIG, 256)],
            areas: Vec::new(),
            irqs: Vec::new(),
        }
    }

    /// The device that most tests use: a region of each kind, an interrupt index of each kind.
    pub fn pci() -> Self {
        Self {
            regions: vec![
                region(TRAPPED, 64 << 10),
                muser_region {
                    num_areas: 1,
                    ..region(MIXED, 16 << 10)
                },
                muser_region {
                    num_areas: 1,
                    ..region(MEMORY, 64 << 10)
                },
                muser_region {
                    flags: MUSER_REGION_READ,
                    ..region(READ_ONLY, 4096)
                },
                muser_region {
                    flags: MUSER_REGION_WRITE,
                    ..region(WRITE_ONLY, 4096)
                },
                region(CONFIG, 256),
            ],
            areas: vec![area(MIXED_AREA.0, MIXED_AREA.1), area(0, 64 << 10)],
            irqs: vec![
                irq(INTX, 1, MUSER_IRQ_MASKABLE | MUSER_IRQ_AUTOMASKED),
                irq(MSI, 8, MUSER_IRQ_NORESIZE),
                irq(MSIX, 128, MUSER_IRQ_MASKABLE),
                irq(ERR, 1, 0),
                irq(REQ, 1, 0),
            ],
            ..Self::minimal()
        }
    }

    /// [`Description::pci`] with doorbells in [`TRAPPED`]: [`BELL`] and [`NEXT_BELL`] side by side,
    /// and [`FAR_BELL`], which lies across a page's edge.
    pub fn with_doorbells() -> Self {
        let mut description = Self::pci();
        let bells = [BELL, NEXT_BELL, FAR_BELL].map(|(offset, size)| doorbell(offset, size));
        description.regions[0].num_areas = 3;
        description.areas.splice(0..0, bells);
        description
    }

    /// A platform device with one region.
    pub fn platform() -> Self {
        Self {
            bus: MUSER_BUS_PLATFORM,
            regions: vec![region(0, 4096)],
            irqs: vec![irq(0, 1, 0)],
            ..Self::minimal()
        }
    }

    /// The argument of the ioctl, which points into `self`: it is good as long as that is.
    pub fn argument(&self) -> muser_attach {
        muser_attach {
            size: size_of::<muser_attach>() as u32,
            version: self.version,
            flags: self.flags,
            bus: self.bus,
            slots: self.slots,
            state_size: self.state_size,
            state_tag: self.state_tag,
            num_regions: self.regions.len() as u32,
            num_areas: self.areas.len() as u32,
            num_irqs: self.irqs.len() as u32,
            regions: self.regions.as_ptr().addr() as u64,
            areas: self.areas.as_ptr().addr() as u64,
            irqs: self.irqs.as_ptr().addr() as u64,
            ..Default::default()
        }
    }
}

/// Why the module refused a description.
#[derive(Debug)]
pub struct Refusal {
    /// Of the ioctl.
    pub errno: i32,
    /// `MUSER_FAULT_*`.
    pub fault: u32,
    /// Which element.
    pub fault_index: u32,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            errno,
            fault,
            fault_index,
        } = self;
        write!(
            f,
            "attach refused with {}, fault {fault} at {fault_index}",
            errno_name(*errno)
        )
    }
}

impl std::error::Error for Refusal {}

/// An open file of a device's node.
#[derive(Debug)]
pub struct Node(File);

impl Node {
    /// Opens `/dev/muser/UUID`.
    ///
    /// # Errors
    ///
    /// The errno of open(2).
    pub fn open(mdev: &Mdev) -> io::Result<Self> {
        vfio::open_rw(mdev.node()).map(Self)
    }

    /// `MUSER_ATTACH`, with what the module wrote.
    ///
    /// # Errors
    ///
    /// The module's refusal.
    pub fn attach_raw(&self, description: &Description) -> Result<muser_attach, Refusal> {
        let mut attach = description.argument();
        match sys::ioctl(self, MUSER_ATTACH, &mut attach) {
            Ok(_) => Ok(attach),
            Err(error) => Err(Refusal {
                errno: crate::check::errno_of(&error),
                fault: attach.fault,
                fault_index: attach.fault_index,
            }),
        }
    }

    /// Attaches, and maps the slots.
    ///
    /// # Errors
    ///
    /// The module's refusal, or the errno of mmap(2).
    pub fn attach(self, description: &Description) -> anyhow::Result<Server> {
        let attach = self.attach_raw(description)?;
        Ok(Server::attached(self, &attach)?)
    }

    /// `MUSER_QUERY`, without the arrays.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn query(&self) -> io::Result<muser_query> {
        let mut query = muser_query {
            size: size_of::<muser_query>() as u32,
            ..Default::default()
        };
        sys::ioctl(self, MUSER_QUERY, &mut query)?;
        Ok(query)
    }

    /// `MUSER_QUERY` of the interrupt index at a place of the description.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl; `NotFound` if there is no such place.
    pub fn irq_state(&self, place: usize) -> io::Result<muser_irq_state> {
        let mut states = vec![muser_irq_state::default(); MUSER_MAX_IRQ_INDEXES as usize];
        let mut query = muser_query {
            size: size_of::<muser_query>() as u32,
            num_irqs: MUSER_MAX_IRQ_INDEXES,
            irqs: states.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        sys::ioctl(self, MUSER_QUERY, &mut query)?;
        states.truncate(query.num_irqs as usize);
        states
            .get(place)
            .copied()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// `MUSER_NEXT`, with what the module wrote.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn next(&self, next: &mut muser_next) -> io::Result<()> {
        sys::ioctl(self, MUSER_NEXT, next).map(drop)
    }

    /// `MUSER_DETACH`.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn detach(&self) -> io::Result<()> {
        sys::ioctl_value(self, MUSER_DETACH, 0).map(drop)
    }

    /// `MUSER_TRIGGER`; the vectors that were signalled.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn trigger(&self, flags: u32, index: u32, start: u32, vectors: u64) -> io::Result<u64> {
        let size = size_of::<muser_trigger>() as u32;
        let mut trigger = muser_trigger {
            size,
            flags,
            index,
            start,
            vectors,
            signalled: 0,
        };
        sys::ioctl(self, MUSER_TRIGGER, &mut trigger)?;
        Ok(trigger.signalled)
    }

    /// `MUSER_DOORBELL`.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn doorbell(&self, area: u32, fd: i32) -> io::Result<()> {
        let mut doorbell = muser_doorbell {
            size: size_of::<muser_doorbell>() as u32,
            flags: 0,
            area,
            fd,
        };
        sys::ioctl(self, MUSER_DOORBELL, &mut doorbell).map(drop)
    }

    /// Maps part of a region, for reading and writing.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn map(&self, region: u32, offset: u64, len: usize) -> io::Result<Mapping> {
        let start = MUSER_MMAP_REGIONS + (u64::from(region) << MUSER_MMAP_REGION_SHIFT);
        Mapping::shared(self, start + offset, len)
    }

    /// Maps part of the state, for reading and writing.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn map_state(&self, offset: u64, len: usize) -> io::Result<Mapping> {
        Mapping::shared(self, MUSER_MMAP_STATE + offset, len)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A request as the process finds it in its slot.
#[derive(Clone, Debug)]
pub struct Request {
    /// The slot.
    pub slot: u32,
    /// The slot's head.
    pub head: muser_slot,
    /// The data of a write.
    pub data: Vec<u8>,
}

/// An attached process.
#[derive(Debug)]
pub struct Server {
    node: Node,
    slots: Mapping,
    stride: usize,
    count: u32,
}

impl Server {
    /// Opens the node and attaches.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn attach(mdev: &Mdev, description: &Description) -> anyhow::Result<Self> {
        Node::open(mdev)?.attach(description)
    }

    /// Maps the slots of an attachment that [`Node::attach_raw`] made.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn attached(node: Node, attach: &muser_attach) -> io::Result<Self> {
        let stride = attach.slot_stride as usize;
        let len = stride * attach.slots as usize;
        let slots = Mapping::shared(&node, MUSER_MMAP_SLOTS, len.next_multiple_of(sys::PAGE))?;
        Ok(Self {
            node,
            slots,
            stride,
            count: attach.slots,
        })
    }

    /// The node's file.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.count
    }

    /// Takes a request, and waits for one unless `flags` says not to.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn take_with(&self, flags: u32) -> io::Result<Request> {
        let mut next = muser_next {
            size: size_of::<muser_next>() as u32,
            flags: MUSER_NEXT_TAKE | flags,
            ..Default::default()
        };
        self.node.next(&mut next)?;
        Ok(self.request(next.slot))
    }

    /// Takes a request if one is there.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl: `EAGAIN` if none is there.
    pub fn try_take(&self) -> io::Result<Request> {
        self.take_with(MUSER_NEXT_NONBLOCK)
    }

    /// Waits for a request, and takes it.
    ///
    /// # Errors
    ///
    /// `TimedOut` if none comes in [`crate::time::patience`], else the errno of the ioctl.
    pub fn take(&self) -> io::Result<Request> {
        self.take_within(crate::time::patience())
    }

    /// Waits for a request that long, and takes it.
    ///
    /// # Errors
    ///
    /// `TimedOut` if none comes, else the errno of the ioctl.
    pub fn take_within(&self, time: Duration) -> io::Result<Request> {
        let events = sys::poll(&self.node, libc::POLLIN, time)?;
        if events == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no request came"));
        }
        self.try_take()
    }

    /// What is in a slot.
    ///
    /// # Panics
    ///
    /// When the module hands out a slot that does not exist, or more data than a slot has.
    pub fn request(&self, slot: u32) -> Request {
        assert!(
            slot < self.count,
            "the module handed out slot {slot} of {}",
            self.count
        );
        let at = slot as usize * self.stride;
        let head: muser_slot = self.slots.read(at);
        assert!(
            head.count <= MUSER_SLOT_DATA,
            "{head:?} has more data than a slot"
        );
        let data = if head.kind == MUSER_REQUEST_WRITE {
            self.slots
                .read_bytes(at + size_of::<muser_slot>(), head.count as usize)
        } else {
            Vec::new()
        };
        Request { slot, head, data }
    }

    /// Replies with data to a read.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn reply_data(&self, slot: u32, data: &[u8]) -> io::Result<()> {
        let at = slot as usize * self.stride + size_of::<muser_slot>();
        self.slots.write_bytes(at, data);
        self.reply(slot, 0)
    }

    /// Replies with a result: 0 or a negated errno.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn reply(&self, slot: u32, result: i32) -> io::Result<()> {
        self.set_result(slot, result);
        self.send_reply(slot)
    }

    /// Writes the result of a slot, without the reply.
    pub fn set_result(&self, slot: u32, result: i32) {
        let at = slot as usize * self.stride + std::mem::offset_of!(muser_slot, result);
        self.slots.write(at, result);
    }

    /// Writes the id of a slot: a wrong one.
    pub fn set_id(&self, slot: u32, id: u64) {
        self.slots.write(slot as usize * self.stride, id);
    }

    /// Writes the data of a slot, without the reply.
    pub fn set_data(&self, slot: u32, data: &[u8]) {
        let at = slot as usize * self.stride + size_of::<muser_slot>();
        self.slots.write_bytes(at, data);
    }

    /// Fills the whole of a slot's head with garbage.
    pub fn scribble(&self, slot: u32) {
        let garbage = muser_slot {
            id: u64::MAX,
            kind: u32::MAX,
            flags: u32::MAX,
            offset: u64::MAX,
            region: u32::MAX,
            count: u32::MAX,
            result: i32::MIN,
            state: u32::MAX,
            length: u64::MAX,
            reserved: [u64::MAX; 2],
        };
        self.slots
            .write_bytes(slot as usize * self.stride, garbage.as_bytes());
    }

    /// Sends the reply that is in a slot.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn send_reply(&self, slot: u32) -> io::Result<()> {
        let mut next = muser_next {
            size: size_of::<muser_next>() as u32,
            flags: MUSER_NEXT_REPLY,
            slot,
            ..Default::default()
        };
        self.node.next(&mut next)
    }

    /// Fires vectors; those that were signalled.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn trigger(&self, index: u32, start: u32, vectors: u64) -> io::Result<u64> {
        self.node.trigger(0, index, start, vectors)
    }

    /// Lowers lines.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn lower(&self, index: u32, start: u32, vectors: u64) -> io::Result<u64> {
        self.node
            .trigger(MUSER_TRIGGER_LOWER, index, start, vectors)
    }

    /// Maps the status page.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn status(&self) -> io::Result<Mapping> {
        let flags = libc::MAP_SHARED;
        Mapping::new(
            &self.node,
            MUSER_MMAP_STATUS,
            sys::PAGE,
            libc::PROT_READ,
            flags,
        )
    }
}
