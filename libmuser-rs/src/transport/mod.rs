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

use std::fmt::{self, Debug};
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::{Errno, Result};
use crate::memory::SharedMemory;
use crate::region::{Area, AreaKind, IoEvent, RegionInfo};

pub(crate) mod client_memory;
mod difference;
pub(crate) mod dma;
mod irqs;
pub mod kernel;
pub mod memory;
pub mod socket;

pub use dma::{Acquired, DirtyLog, DmaAccess, GuestMemory, IovaRange, Piece, RemoteMemory};

pub(crate) use difference::Difference;
pub use kernel::KernelTransport;
pub use memory::MemoryTransport;
pub use socket::{ListenOptions, SocketTransport};

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
    /// Writes that may come by eventfd. A transport without them has ordinary writes instead, so
    /// they are no part of what a device [stays](AttachOptions::standby).
    pub io_events: Vec<IoEvent>,
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

/// Memory of one area, as [`Transport::attach`] returns it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AreaMemory {
    /// The region's index.
    pub region: u32,
    /// The area's offset in the region.
    pub offset: u64,
    /// What the area is.
    pub kind: AreaKind,
    /// Its memory.
    pub memory: SharedMemory,
}

impl AreaMemory {
    /// The memory of an area of `region`.
    pub(crate) const fn new(region: u32, area: &Area, memory: SharedMemory) -> Self {
        Self {
            region,
            offset: area.offset,
            kind: area.kind,
            memory,
        }
    }
}

/// How a server attaches.
///
/// # Examples
///
/// ```
/// use libmuser::transport::AttachOptions;
///
/// let options = AttachOptions::new().standby(true);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttachOptions {
    /// Whether to wait, while another server serves the device, until it hands it over.
    pub standby: bool,
    /// Threads that will serve, so requests that are taken and not answered at one time; 0: one.
    pub threads: usize,
    /// Bytes of memory which outlive the server; the [`Server`](crate::Server) sets it.
    pub state_size: usize,
    /// How the server waits for requests.
    pub wait: Wait,
    /// What the server makes of that memory: a server with another tag than the first one that is
    /// not 0 is refused. The [`Server`](crate::Server) sets it.
    pub state_tag: u64,
}

impl AttachOptions {
    /// Attaches for one thread, if nobody else serves the device.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            standby: false,
            threads: 0,
            wait: Wait::Block,
            state_size: 0,
            state_tag: 0,
        }
    }

    /// Says whether to wait, while another server serves the device, until that one hands it over
    /// ([`Ended::HandedOver`](crate::Ended::HandedOver)) or is gone. Otherwise that is an error
    /// ([`Error::is_busy`](crate::Error::is_busy)).
    ///
    /// A server that describes the device differently, or keeps its [state](crate::State) in another
    /// way, is refused before the other one hears of it. The device's constructor runs after the
    /// take-over, when nobody else serves the device any more: what can fail (opening files,
    /// parsing a configuration) belongs before the server.
    #[must_use]
    pub const fn standby(self, standby: bool) -> Self {
        Self { standby, ..self }
    }

    /// Says how many threads will serve.
    #[must_use]
    pub const fn threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Says how the server's run loops wait for requests.
    #[must_use]
    pub const fn wait(self, wait: Wait) -> Self {
        Self { wait, ..self }
    }
}

/// How a server that [runs](crate::Server::run) waits for a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// It sleeps until there is one, at no cost.
    #[default]
    Block,
    /// It looks for one all the time, which saves the time to wake it up, and keeps a processor
    /// busy. Of several threads one looks; the others sleep until they are needed.
    Poll,
}

/// Why a server is refused whose [tag](AttachOptions::state_tag) is not that of the device.
pub(crate) const STATE_DIFFERS: &str = "its state was left by a program that keeps another number of bytes or \
    another configuration space, or was built with another version of libmuser; remove it and create \
    it again";

/// What a device gets by being attached.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Attachment {
    /// Fires its interrupts.
    pub trigger: Arc<dyn Trigger>,
    /// The memory of each area.
    pub memory: Vec<AreaMemory>,
    /// The client's memory.
    pub dma: Arc<dyn GuestMemory>,
    /// Memory that outlives the server: what an earlier one left there, at first zeroes. As many
    /// bytes as were asked for, or more.
    pub state: Option<SharedMemory>,
    /// Whether the device was served before.
    pub recovered: bool,
}

impl Attachment {
    /// An attachment with this trigger, memory for each area of the description, and the client's.
    pub(crate) const fn new(
        trigger: Arc<dyn Trigger>,
        memory: Vec<AreaMemory>,
        dma: Arc<dyn GuestMemory>,
    ) -> Self {
        Self {
            trigger,
            memory,
            dma,
            state: None,
            recovered: false,
        }
    }
}

/// Names a request of a device: no two requests in a device's life have the same, but a replay has
/// that of the request which it replays.
///
/// # Invariants
///
/// Of requests that are in flight at one time, the places differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl RequestId {
    /// What is not a request has this id.
    pub(crate) const NONE: Self = Self(0);
    /// Places are below this (`muser_slot.id` in the ABI: the low 16 bits are below 512).
    pub(crate) const PLACES: usize = 512;

    pub(crate) const fn new(number: u64) -> Self {
        Self(number)
    }

    pub(crate) const fn number(self) -> u64 {
        self.0
    }

    /// The place in the queue, which no other request has meanwhile.
    pub(crate) const fn place(self) -> usize {
        (self.0 & 0xffff) as usize
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Names a request towards the transport that it came from, which finds in it what it needs for the
/// reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    request: RequestId,
    slot: u32,
    /// Whether the reply has data.
    reads: bool,
}

impl Token {
    pub(crate) const fn new(request: RequestId, slot: u32, reads: bool) -> Self {
        Self {
            request,
            slot,
            reads,
        }
    }

    /// The request.
    #[must_use]
    pub const fn request(&self) -> RequestId {
        self.request
    }
}

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
    /// A client has rung, or may have: nobody waits for the reply.
    Doorbell {
        /// The region's index.
        region: u32,
        /// Where the doorbell's area starts.
        offset: u64,
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
///
/// Any number of threads may take turns at the same time, each with a buffer of its own.
pub trait Transport: sealed::Sealed + AsFd + Debug + Send + Sync {
    /// Becomes the one that serves the device, which is described at the same time.
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`](crate::Error::is_refused): the device has a server, or was described
    /// differently before. The message says what differs or what is wrong.
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Attachment>;

    /// Replies to a request, if one is given, and takes the next, if wanted: both at once, so that
    /// a transport can do it in one system call.
    ///
    /// `data` holds the data of the reply on entry, and that of the request taken on return.
    ///
    /// # Errors
    ///
    /// [`Error::is_removed`](crate::Error::is_removed) at the end of the device, and
    /// [`Error::is_handed_over`](crate::Error::is_handed_over) when a successor waits: nothing was
    /// taken then, and what was taken before can still be replied to. Any other error means that no
    /// more requests can be had.
    fn turn(&self, reply: Option<Reply>, take: Take, data: &mut Vec<u8>)
        -> Result<Option<Request>>;

    /// Ends the attachment: what was taken and not replied to is for the next server. It can't
    /// attach again.
    fn detach(&self);
}

/// A transport of a kind that is chosen when the program runs.
impl Transport for Box<dyn Transport> {
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Attachment> {
        (**self).attach(description, options)
    }

    fn turn(
        &self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        (**self).turn(reply, take, data)
    }

    fn detach(&self) {
        (**self).detach();
    }
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

    impl Sealed for Box<dyn super::Transport> {}
    impl Sealed for super::KernelTransport {}
    impl Sealed for super::MemoryTransport {}
    impl Sealed for super::SocketTransport {}
    impl Sealed for super::kernel::Node {}
    impl Sealed for super::irqs::Irqs {}
}
