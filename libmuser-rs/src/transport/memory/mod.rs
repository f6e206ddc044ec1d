// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The in-process transport: a client without a kernel, for tests and for a VMM that embeds.
//!
//! [`pair`] makes a device's two sides. A [`MemoryTransport`] goes to the server; the [`Host`] is
//! where clients [open](Host::open) the device, from any thread. What clients see is what they see
//! of a VFIO device of `muser.ko`: the same errors and short counts, shared memory served without
//! the server, a [reset](crate::Reset::Close) when the last client closes, requests kept for the
//! next server when one goes away.
//!
//! ```
//! use std::thread;
//! use libmuser::transport::memory;
//! use libmuser::{Bar, Device, Ended, PciBuilder, Server};
//!
//! struct Null;
//! impl Device for Null {}
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
//! let (transport, host) = memory::pair()?;
//! let mut server = Server::new(model, transport, |_| Ok(Null))?;
//! let serving = thread::spawn(move || server.run());
//!
//! let client = host.open()?;
//! let mut word = [0; 2];
//! client.read(7, 0, &mut word)?;
//! assert_eq!(word, [0x34, 0x12]);
//!
//! host.remove();
//! assert_eq!(serving.join().unwrap()?, Ended::Removed);
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{AttachOptions, Attachment, Description, Reply, Request, Take, Transport};
use crate::error::{Error, Result};

mod client;
mod dma;
mod queue;

pub use super::client_memory::ClientMemory;
pub use super::irqs::{IrqAction, IrqData};
pub use client::Client;

use queue::Queue;

/// Makes a device which has a side for a server and a side for clients.
///
/// # Errors
///
/// The process has no file descriptors left.
pub fn pair() -> Result<(MemoryTransport, Host)> {
    let host = Host::new()?;
    Ok((host.transport(), host))
}

/// A device in this process: where clients open it, and servers attach. A handle: clone it.
///
/// The device is removed when the last handle and the last client are gone.
#[derive(Clone, Debug)]
pub struct Host {
    queue: Arc<Removal>,
}

impl Host {
    /// A new device, not described yet.
    ///
    /// # Errors
    ///
    /// The process has no file descriptors left.
    pub fn new() -> Result<Self> {
        Ok(Self {
            queue: Arc::new(Removal(Arc::new(Queue::new()?))),
        })
    }

    /// A side for a server. There may be several, of which one can be attached at a time.
    #[must_use]
    pub fn transport(&self) -> MemoryTransport {
        MemoryTransport {
            queue: Arc::clone(&self.queue.0),
            attachment: None,
        }
    }

    /// Opens the device.
    ///
    /// # Errors
    ///
    /// `ENXIO`: no server has described it yet. `ENODEV`: it was removed.
    pub fn open(&self) -> std::io::Result<Client> {
        Client::open(Arc::clone(&self.queue))
    }

    /// Removes the device: its server ends, and clients get `ENODEV`.
    pub fn remove(&self) {
        self.queue.0.remove();
    }

    /// Says whether a write to a [doorbell](crate::Bar::doorbells) is over before the server hears
    /// of it, as over `muser.ko`, or is an ordinary write, as over a transport without doorbells.
    /// It is over before otherwise.
    pub fn set_posted_doorbells(&self, posted: bool) {
        self.queue.0.set_posted_doorbells(posted);
    }

    /// Sets how long a request waits while no server is attached; then it fails with `ETIMEDOUT`.
    /// 5 seconds otherwise, as the attribute `reattach_timeout_ms` of a device of `muser.ko`.
    pub fn set_reattach_timeout(&self, timeout: Duration) {
        self.queue.0.set_reattach_timeout(timeout);
    }

    /// Sets how long a client that unmaps memory which the device has used waits for the server;
    /// then the memory goes. 1 second otherwise, as the attribute `unmap_timeout_ms` of a device of
    /// `muser.ko`.
    pub fn set_unmap_timeout(&self, timeout: Duration) {
        self.queue.0.set_unmap_timeout(timeout);
    }
}

/// Removes the device when it is dropped, with the last host and client.
#[derive(Debug)]
struct Removal(Arc<Queue>);

impl Drop for Removal {
    fn drop(&mut self) {
        self.0.remove();
    }
}

/// The server's side of a device in this process.
#[derive(Debug)]
pub struct MemoryTransport {
    queue: Arc<Queue>,
    attachment: Option<u64>,
}

impl Transport for MemoryTransport {
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Attachment> {
        let attached = self.queue.attach(description, options)?;
        self.attachment = Some(attached.id);
        Ok(Attachment {
            state: Some(attached.state),
            recovered: attached.id > 1,
            ..Attachment::new(self.queue.irqs(), attached.memory, self.queue.dma())
        })
    }

    fn turn(
        &self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        let Some(attachment) = self.attachment else {
            return Err(Error::io("serving a device", nix::errno::Errno::ENOTCONN));
        };
        if let Some(reply) = reply {
            self.queue.reply(attachment, reply, data)?;
        }
        self.queue.take(attachment, take, data)
    }

    fn detach(&self) {
        if let Some(attachment) = self.attachment {
            self.queue.detach(attachment);
        }
    }
}

impl AsFd for MemoryTransport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.detach();
    }
}
