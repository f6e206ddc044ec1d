// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vfio-user transport: clients over a UNIX socket, without root and without a module.
//!
//! A [`SocketTransport`] serves one client after the other, as the specification
//! (`docs/interop/vfio-user.rst` of QEMU) has it. What a client need not ask the device for is
//! answered here: versions, regions, interrupts, mappings. `VFIO-USER.md` beside the library has the
//! list of commands and capabilities.
//!
//! ```no_run
//! use libmuser::transport::SocketTransport;
//! use libmuser::{Bar, Device, PciBuilder, Server};
//!
//! struct Null;
//! impl Device for Null {}
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
//! let transport = SocketTransport::listen("/run/null.sock".as_ref(), Default::default())?;
//! let mut server = Server::new(model, transport, |_| Ok(Null))?;
//! server.run()?;
//! # Ok(())
//! # }
//! ```
//!
//! # The path of a command
//!
//! `door` lets a client in; `session` makes messages of its bytes; `commands` answers or makes
//! a request of a message; `flight` is what the device does of it meanwhile, and replies. `hub`
//! joins them, with the rules of their order.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use super::{AttachOptions, Attachment, Description, Reply, Request, Take, Transport};
use crate::error::{Error, Result};
use crate::memory::SharedMemory;
use crate::sys::Mapping;

mod access;
mod areas;
mod commands;
pub(crate) mod door;
mod events;
mod features;
mod flight;
mod guests;
mod hub;
mod infos;
mod interrupts;
mod io_events;
mod keeper;
mod link;
mod mappings;
mod remote;
mod session;

pub use door::ListenOptions;

use door::{Door, Given, Listener, Single};
use hub::{Hub, Served};
use keeper::{Keeper, Nobody};
use link::Link;
use session::Framing;

/// Serves clients over a UNIX socket.
#[derive(Debug)]
pub struct SocketTransport {
    hub: Arc<Hub>,
}

impl SocketTransport {
    /// Makes a socket file, and serves who connects to it, one client after the other. The file is
    /// removed at the end.
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`]: another process listens there, or something else is there. Else, the
    /// file can't be made.
    pub fn listen(path: &Path, options: ListenOptions) -> Result<Self> {
        let listener = Listener::new(path, options)?;
        Self::new(Box::new(listener), Box::new(Nobody), Framing::Plain)
    }

    /// Serves by a socket that somebody else has made: who connects to it, if it listens; else the
    /// client at its other end, and when that has gone the device is
    /// [removed](Error::is_removed). At the other end may be a
    /// [supervisor](crate::supervise::Supervisor).
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`]: it is not such a socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let door: Box<dyn Door> = match Given::of(&fd)? {
            Given::Listening => Box::new(Listener::from_fd(fd)?),
            Given::Connected => Box::new(Single::new(fd)?),
            Given::Supervised => {
                let link = Link::new(fd);
                return Self::new(Box::new(link.clone()), Box::new(link), Framing::Numbered);
            }
        };
        Self::new(door, Box::new(Nobody), Framing::Plain)
    }

    /// Serves whoever comes through a door, whose messages are framed in that way; `keeper` has what
    /// outlives this server.
    pub(crate) fn new(
        door: Box<dyn Door>,
        keeper: Box<dyn Keeper>,
        framing: Framing,
    ) -> Result<Self> {
        let hub = Hub::new(door, keeper, framing)?;
        Ok(Self { hub })
    }
}

impl Transport for SocketTransport {
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Attachment> {
        let mut hub = self.hub.lock();
        let kept = hub.keeper.attach(description, options)?;
        let areas = areas::Areas::new(description, kept.areas, &*hub.keeper)?;
        let memory = areas.memory().to_vec();
        if let Some(state) = kept.state.as_ref().filter(|_| !kept.recovered) {
            let files: Vec<_> = areas.files().collect();
            hub.keeper.made(state.as_fd(), &files)?;
        }
        let outlives = match kept.state {
            Some(file) => {
                let failed = |errno| Error::io("mapping the state", errno);
                let mapping = Mapping::new(file.as_fd(), 0, options.state_size, true);
                Some(SharedMemory::new(mapping.map_err(failed)?))
            }
            None => None,
        };
        hub.irqs.describe(description);
        hub.served = Some(Served {
            description: description.clone(),
            areas,
        });
        let trigger = Arc::clone(&hub.irqs);
        let dma = Arc::clone(&hub.dma);
        if kept.closing {
            hub.take_over_close();
        }
        if let Some((stream, count)) = kept.session {
            hub.take_over(&self.hub, stream, count)?;
        }
        hub.update(&self.hub)?;
        Ok(Attachment {
            state: outlives,
            recovered: kept.recovered,
            ..Attachment::new(trigger, memory, dma)
        })
    }

    fn turn(
        &self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        self.hub.turn(reply, take, data)
    }

    fn detach(&self) {
        self.hub.detach();
    }
}

impl AsFd for SocketTransport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.hub.as_fd()
    }
}

impl Drop for SocketTransport {
    fn drop(&mut self) {
        self.detach();
    }
}
