// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What carries a client's requests to a server: one trait, and what implements it.
//!
//! | transport  | the client is                                   | needs          |
//! |------------|--------------------------------------------------|----------------|
//! | [`kernel`] | any user of VFIO: a VMM, a userspace driver      | `muser.ko`     |
//! | [`memory`] | in the same process: a test, a VMM that embeds   | nothing        |
//!
//! A transport knows regions, interrupts and bytes. It knows nothing of PCI or of the device: the
//! [`Server`](crate::Server) does.

use std::fmt::Debug;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::{Errno, Result};
use crate::memory::SharedMemory;
use crate::region::RegionInfo;

pub(crate) mod dma;
pub mod kernel;
pub mod memory;

pub use dma::{Acquired, DirtyLog, DmaAccess, GuestMemory, IovaRange, Piece, RemoteMemory};

pub use kernel::KernelTransport;
pub use memory::MemoryTransport;

/// What a client is told about an interrupt index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// The index in `<linux/vfio.h>` (`VFIO_PCI_*_IRQ_INDEX`).
    pub index: u32,
    /// Vectors.
    pub count: u32,
    /// Whether single vectors can be masked (`VFIO_IRQ_INFO_MASKABLE`).
    pub maskable: bool,
    /// Whether it is a level, which masks itself when it fires (`VFIO_IRQ_INFO_AUTOMASKED`).
    pub automasked: bool,
    /// Whether the number of vectors can't grow while enabled (`VFIO_IRQ_INFO_NORESIZE`).
    pub noresize: bool,
}

impl IrqInfo {
    pub(crate) const fn new(index: u32, count: u32) -> Self {
        Self {
            index,
            count,
            maskable: false,
            automasked: false,
            noresize: false,
        }
    }
}

/// What a transport must know of a device, and its clients get to see.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Description {
    /// Regions, by ascending index.
    pub regions: Vec<RegionInfo>,
    /// Interrupt indexes, ascending.
    pub irqs: Vec<IrqInfo>,
}

impl Description {
    /// The region with this index.
    #[must_use]
    pub fn region(&self, index: u32) -> Option<&RegionInfo> {
        self.regions.iter().find(|region| region.index == index)
    }

    /// The interrupt index `index`.
    #[must_use]
    pub fn irq(&self, index: u32) -> Option<&IrqInfo> {
        self.irqs.iter().find(|irq| irq.index == index)
    }
}

/// Memory of one mappable area, as [`Transport::attach`] returns it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AreaMemory {
    /// The region's index.
    pub region: u32,
    /// The area's offset in the region.
    pub offset: u64,
    /// Its memory.
    pub memory: SharedMemory,
}

impl AreaMemory {
    /// The memory of the area at `offset` of `region`.
    pub(crate) const fn new(region: u32, offset: u64, memory: SharedMemory) -> Self {
        Self {
            region,
            offset,
            memory,
        }
    }
}

/// What a device gets by being attached.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Attachment {
    /// Fires its interrupts.
    pub trigger: Arc<dyn Trigger>,
    /// The memory of each mappable area.
    pub memory: Vec<AreaMemory>,
    /// The client's memory.
    pub dma: Arc<dyn GuestMemory>,
}

impl Attachment {
    /// An attachment with this trigger, and memory for each mappable area of the description.
    pub(crate) const fn new(
        trigger: Arc<dyn Trigger>,
        memory: Vec<AreaMemory>,
        dma: Arc<dyn GuestMemory>,
    ) -> Self {
        Self {
            trigger,
            memory,
            dma,
        }
    }
}

/// Names a request towards the transport that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Read this many bytes; they are the reply's data.
    Read {
        /// The region's index.
        region: u32,
        /// Bytes from the region's start.
        offset: u64,
        /// Bytes to read.
        count: usize,
    },
    /// Write the request's data.
    Write {
        /// The region's index.
        region: u32,
        /// Bytes from the region's start.
        offset: u64,
    },
    /// Return to the state after power-on.
    Reset {
        /// Because the last client closed the device, rather than for its wish.
        close: bool,
    },
    /// Let go of memory that the client unmaps, of which the device has used some. With the reply
    /// it goes.
    Unmap {
        /// First IOVA.
        iova: u64,
        /// Bytes.
        length: u64,
    },
    /// Something that this version of the library does not know.
    Unknown,
}

/// A request, of which the data is in the buffer given to [`Transport::turn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request {
    /// What to reply to.
    pub token: Token,
    /// What it asks for.
    pub operation: Operation,
    /// Whether a process took it before and went away without a reply.
    pub replay: bool,
}

impl Request {
    /// A request taken for the first time.
    pub(crate) const fn new(token: Token, operation: Operation) -> Self {
        Self {
            token,
            operation,
            replay: false,
        }
    }
}

/// The answer to a request. That of a read has its data in the buffer given to
/// [`Transport::turn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request.
    pub token: Token,
    /// Done, or the errno that the client gets.
    pub result: Result<(), Errno>,
}

/// Whether a turn takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// No: it only replies.
    Nothing,
    /// If there is one.
    Ready,
    /// Yes; it waits for one.
    Wait,
}

/// Carries requests from clients to a server, and replies back.
///
/// The library implements it, and nobody else can, so that it can grow.
///
/// The file descriptor is readable when [`turn`](Self::turn) with [`Take::Ready`] would find a
/// request, or the device was removed.
pub trait Transport: sealed::Sealed + AsFd + Debug + Send {
    /// Becomes the one that serves the device, which is described at the same time.
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`](crate::Error::is_refused): the device has a server, or was described
    /// differently before. The message says what differs or what is wrong.
    fn attach(&mut self, description: &Description) -> Result<Attachment>;

    /// Replies to a request, if one is given, and takes the next, if wanted: both at once, so that
    /// a transport can do it in one system call.
    ///
    /// `data` holds the data of the reply on entry, and that of the request taken on return.
    ///
    /// # Errors
    ///
    /// [`Error::is_removed`](crate::Error::is_removed) at the end of the device. Any error means
    /// that no more requests can be had.
    fn turn(
        &mut self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>>;
}

/// Fires interrupts, from any thread. The library implements it, and nobody else can.
pub trait Trigger: sealed::Sealed + Debug + Send + Sync {
    /// Fires a vector; that of a level goes up.
    ///
    /// # Errors
    ///
    /// The transport can't reach the client any more, or there is no such vector.
    fn raise(&self, index: u32, vector: u32) -> Result<()>;

    /// Lowers the level of a vector.
    ///
    /// # Errors
    ///
    /// As [`raise`](Self::raise), and if the index is not a level.
    fn lower(&self, index: u32, vector: u32) -> Result<()>;

    /// How many vectors of an index the client has given an eventfd.
    fn eventfds(&self, index: u32) -> u32;
}

mod sealed {
    /// Keeps a trait's implementations in the library.
    pub trait Sealed {}

    impl Sealed for super::KernelTransport {}
    impl Sealed for super::MemoryTransport {}
    impl Sealed for super::kernel::Node {}
    impl Sealed for super::memory::Irqs {}
}
