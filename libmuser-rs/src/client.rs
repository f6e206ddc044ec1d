// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of the vfio-user protocol: any server's device, over a UNIX socket.
//!
//! It is for userspace drivers and for VMMs, and knows nothing of this library's own server. What it
//! offers is what a VFIO device file does: [regions](Client::read), [mappings](Client::map),
//! [interrupts](Client::set_irqs), [memory for the device](Client::dma_map),
//! [reset](Client::reset).
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use libmuser::client::{ClientMemory, Options};
//! use libmuser::transport::SocketTransport;
//! use libmuser::{Access, Bar, Device, Dma, DmaAccess, PciBuilder, Result, Server};
//!
//! /// Adds one to the number whose IOVA is written to it.
//! struct Adder(Dma);
//!
//! impl Device for Adder {
//!     fn write(&mut self, _access: Access, iova: u64) -> Result<()> {
//!         let number: u64 = self.0.read_obj(iova)?;
//!         self.0.write_obj(iova, number + 1)
//!     }
//! }
//!
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! // A server in this process. One that listens is connected to with `Client::connect`.
//! let (ours, theirs) = UnixStream::pair()?;
//! let transport = SocketTransport::from_fd(theirs.into())?;
//! let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
//! let mut server = Server::new(model, transport, |bus| Ok(Adder(bus.dma())))?;
//! let serving = std::thread::spawn(move || server.run());
//!
//! let device = Options::new().open(ours.into())?;
//! // The vendor is in configuration space, and so is what allows the device to use memory.
//! let mut vendor = [0; 2];
//! device.read(7, 0, &mut vendor)?;
//! assert_eq!(vendor, [0x34, 0x12]);
//! device.write(7, 4, &6_u16.to_le_bytes())?;
//!
//! // A page for the device, with a number in it.
//! let memory = ClientMemory::new(4096)?;
//! memory.write(8, &41_u64.to_le_bytes())?;
//! device.dma_map(0x1_0000, &memory, 0..4096, DmaAccess::ReadWrite)?;
//! device.write(0, 0, &0x1_0008_u64.to_le_bytes())?;
//! let mut number = [0; 8];
//! memory.read(8, &mut number)?;
//! assert_eq!(u64::from_le_bytes(number), 42);
//!
//! drop(device);
//! serving.join().unwrap()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Threads
//!
//! Any number of threads can use a client at the same time. Each waits for its own reply only, and
//! the server may answer in any order. A client needs no thread of its own, with one exception: when
//! memory is mapped of which the server has no descriptor, the server reads and writes it by asking,
//! at any time. Whoever waits for a reply answers it. When nobody does, a thread that is started with
//! the first such mapping does, unless [`Options::serving_thread`] says that there is none: then wait
//! for [the client's descriptor](Client::as_fd) to become readable, and call [`Client::serve`].
//!
//! # What goes wrong
//!
//! | [`Error`] | because | the connection |
//! |---|---|---|
//! | any errno | the server answered with it | goes on |
//! | [`is_timed_out`](Error::is_timed_out) | no answer came in [time](Options::timeout) | goes on; the answer is ignored if it comes |
//! | [`is_protocol`](Error::is_protocol) | a message that no server following the protocol sends | goes on if a single reply is wrong; is closed if nobody can say any more what belongs to what |
//! | [`is_disconnected`](Error::is_disconnected) | the server has gone | is closed |
//!
//! The server is not trusted: whatever it sends, no call panics, waits for longer than its deadline,
//! or keeps more than the limits of [`Options`]. With a mapped area it shares memory that it can change
//! at any time, and shrink: what is gone reads as zeroes.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::region::RegionInfo;
use crate::transport::{Description, IrqInfo};
use crate::vfio_user::wire;

mod access;
mod connection;
mod description;
mod dma;
mod failure;
mod features;
mod io_fds;
mod irqs;
mod lent;
mod negotiation;

pub use crate::transport::memory::ClientMemory;
pub use crate::transport::memory::{IrqAction, IrqData};
pub use access::RegionWrite;
pub use io_fds::IoEventFd;

use connection::Connection;
use description::Layout;
use negotiation::Agreement;

/// How a client connects, and what it takes from its server.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use libmuser::client::Options;
///
/// # fn main() -> libmuser::Result<()> {
/// let device = Options::new()
///     .timeout(Duration::from_secs(1))
///     .twin_socket(false)
///     .connect("/run/counter.sock")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    timeout: Duration,
    twin_socket: bool,
    max_data: usize,
    max_descriptors: usize,
    serving_thread: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

impl Options {
    /// 10 seconds for each answer, a twin socket if the server has one, 1 MiB of data and 64
    /// descriptors in a message, and a thread that serves if it takes one.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            twin_socket: true,
            max_data: wire::DEFAULT_DATA,
            max_descriptors: 64,
            serving_thread: true,
        }
    }

    /// How long a call waits for the server: to accept, to receive, to answer. Opening a device is
    /// one call in this.
    #[must_use]
    pub const fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Whether the server may ask over a second socket of its own.
    #[must_use]
    pub const fn twin_socket(self, twin_socket: bool) -> Self {
        Self {
            twin_socket,
            ..self
        }
    }

    /// The most bytes of data that are in one message, from 1 to 2^30; others become the nearest of
    /// these. What is longer goes in several messages.
    #[must_use]
    pub const fn max_data(self, bytes: usize) -> Self {
        const MOST: usize = 1 << 30;
        let max_data = match bytes {
            0 => 1,
            1..=MOST => bytes,
            _ => MOST,
        };
        Self { max_data, ..self }
    }

    /// The most descriptors that are taken with one message; what is beyond 253, the kernel does not
    /// carry.
    #[must_use]
    pub const fn max_descriptors(self, count: usize) -> Self {
        let max_descriptors = if count > wire::MAX_FDS {
            wire::MAX_FDS
        } else {
            count
        };
        Self {
            max_descriptors,
            ..self
        }
    }

    /// Whether a thread may be started to answer the server when no call is waiting.
    #[must_use]
    pub const fn serving_thread(self, serving_thread: bool) -> Self {
        Self {
            serving_thread,
            ..self
        }
    }

    /// Connects to the server that listens at a path.
    ///
    /// # Errors
    ///
    /// Nobody listens there, or what comes is no server that this client can talk to.
    pub fn connect(&self, path: impl AsRef<Path>) -> Result<Client> {
        let deadline = Instant::now().checked_add(self.timeout);
        let socket = negotiation::connect_to(path.as_ref(), self.timeout)?;
        self.open_until(socket, deadline)
    }

    /// Makes a client of a socket that is connected to a server, to which nothing was said yet.
    ///
    /// # Errors
    ///
    /// It is no connected UNIX stream socket, or as for [`connect`](Self::connect).
    pub fn open(&self, socket: OwnedFd) -> Result<Client> {
        self.open_until(socket, Instant::now().checked_add(self.timeout))
    }

    fn open_until(&self, socket: OwnedFd, deadline: Option<Instant>) -> Result<Client> {
        let (mut connection, agreement) = negotiation::negotiate(socket, self, deadline)?;
        let layout = description::ask(&connection)?;
        connection.opened();
        Ok(Client {
            connection: Arc::new(connection),
            agreement,
            layout,
            serving: Mutex::new(None),
            may_serve: self.serving_thread,
        })
    }
}

/// A client that has the device of a server open.
///
/// Regions and interrupts have the indexes of `<linux/vfio.h>`. When it is dropped the connection is
/// closed, and the server takes all memory for gone.
pub struct Client {
    connection: Arc<Connection>,
    agreement: Agreement,
    layout: Layout,
    serving: Mutex<Option<JoinHandle<()>>>,
    may_serve: bool,
}

impl Client {
    /// Connects to the server that listens at a path, with the usual [`Options`].
    ///
    /// # Errors
    ///
    /// As [`Options::connect`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Options::new().connect(path)
    }

    /// The device's regions and interrupts. Of the areas of a region, those are there which can be
    /// [mapped](Self::map).
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.layout.description
    }

    /// A region's size and flags; `None` if the device does not have it.
    #[must_use]
    pub fn region(&self, index: u32) -> Option<&RegionInfo> {
        self.description().region(index)
    }

    /// An interrupt's vectors and flags; `None` if the device does not have it.
    #[must_use]
    pub fn irq(&self, index: u32) -> Option<&IrqInfo> {
        self.description().irq(index)
    }

    /// Whether the device can be [reset](Self::reset).
    #[must_use]
    pub fn can_reset(&self) -> bool {
        self.layout.can_reset
    }

    /// Whether it is a PCI device.
    #[must_use]
    pub fn is_pci(&self) -> bool {
        self.layout.is_pci
    }

    /// The version that both sides speak: major and minor.
    #[must_use]
    pub fn version(&self) -> (u16, u16) {
        (wire::MAJOR, self.agreement.minor)
    }

    /// Bytes of data in one message: what is longer goes in several.
    #[must_use]
    pub fn max_data(&self) -> usize {
        self.agreement.data
    }

    /// Whether the server has a second socket for what it asks.
    #[must_use]
    pub fn has_twin_socket(&self) -> bool {
        self.agreement.server.has_twin_socket()
    }

    /// Whether the server takes several [writes](Self::write_multi) in one message.
    #[must_use]
    pub fn has_write_multi(&self) -> bool {
        self.agreement.server.writes_multiple()
    }

    /// Resets the device. The server may take its time; what is in it after that is what it is after
    /// power-on.
    ///
    /// # Errors
    ///
    /// What the device returned.
    pub fn reset(&self) -> Result<()> {
        let answer = self.connection.call(wire::Command::DeviceReset, &[], &[])?;
        self.finish(wire::Command::DeviceReset, answer)
    }

    /// Answers what the server has asked until now, without waiting.
    ///
    /// # Errors
    ///
    /// The connection is at its end.
    pub fn serve(&self) -> Result<()> {
        self.connection.serve()
    }

    /// Takes a reply without a payload.
    fn finish(&self, command: wire::Command, answer: connection::Answer) -> Result<()> {
        let came = answer.body.len();
        self.connection.done(answer);
        if came > 0 {
            let what = format!("no payload was expected, and {came} bytes came");
            return Err(failure::wrong(command, what));
        }
        Ok(())
    }

    /// Has somebody answer the server when no call is waiting.
    fn have_served(&self) -> Result<()> {
        if !self.may_serve {
            return Ok(());
        }
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        if serving.is_none() {
            let connection = Arc::clone(&self.connection);
            let thread = std::thread::Builder::new().name("vfio-user client".into());
            let thread = thread.spawn(move || connection.serve_on());
            *serving = Some(thread.map_err(|error| Error::io("starting a thread", error))?);
        }
        Ok(())
    }
}

/// Readable when the server has asked for something, takes more of the answer, or has gone. Replies make it readable too, so
/// it may be for nothing when other threads use the client.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.events()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("description", self.description())
            .field("agreement", &self.agreement)
            .finish_non_exhaustive()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.connection.end();
        let serving = self
            .serving
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let this = std::thread::current().id();
        // The last handle may be one that memory of the user's has, which is just being served.
        if let Some(thread) = serving.take().filter(|thread| thread.thread().id() != this) {
            // If it panicked it has said so.
            let _ = thread.join();
        }
    }
}
