// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves a device: takes requests from a transport, dispatches them, replies.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{Bus, Device};
use crate::dma::Dma;
use crate::error::{Error, Result};
use crate::irq::{Interrupts, Shared};
use crate::model::PciModel;
use crate::transport::{Reply, Request, Take, Transport};

mod dispatch;

use dispatch::Failures;

/// Why a server ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// The device was removed.
    Removed,
    /// Its [`Stop`] handle was used.
    Stopped,
}

/// Serves a device to the clients of a transport.
///
/// Every way to run it is the same loop: [`run`](Self::run) until the end,
/// [`run_until`](Self::run_until) somebody stops it, or in the caller's own loop, which waits for
/// the file descriptor ([`AsFd`]) to become readable, by `epoll` for instance, and calls
/// [`process`](Self::process).
///
/// # Threads
///
/// A server can be moved to another thread, if the device can. It calls the device in the thread
/// that runs it, one call at a time.
pub struct Server<D> {
    transport: Box<dyn Transport>,
    model: PciModel,
    shared: Arc<Shared>,
    device: D,
    /// Data of the request at hand, then of its reply.
    data: Vec<u8>,
    /// What the device panicked with: it is not called again.
    panicked: Option<String>,
    failures: Failures,
}

impl<D: Device> Server<D> {
    /// Attaches to the transport, and makes the device with what it can reach.
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`]: somebody else serves the device, or it was described differently
    /// before. Else, whatever `device` returns.
    pub fn new(
        model: PciModel,
        mut transport: impl Transport + 'static,
        device: impl FnOnce(&Bus) -> Result<D>,
    ) -> Result<Self> {
        let attachment = transport.attach(model.description())?;
        let shared = Arc::new(Shared::new(model.function(), attachment.trigger));
        shared.settle(model.description())?;
        let interrupts = Interrupts::new(Arc::clone(&shared), model.vectors(), model.is_express());
        let dma = Dma::new(attachment.dma, shared.gate());
        let device = device(&Bus::new(interrupts, attachment.memory, dma))?;
        let transport = Box::new(transport);
        Ok(Self {
            transport,
            model,
            shared,
            device,
            data: Vec::new(),
            panicked: None,
            failures: Failures::default(),
        })
    }

    /// Serves until the device is removed.
    ///
    /// # Errors
    ///
    /// [`Error::is_panicked`]: the device's code did. Else, the transport failed.
    pub fn run(&mut self) -> Result<Ended> {
        self.serve(Take::Wait, |_| Ok(false))
    }

    /// Serves until the device is removed or the server is stopped.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn run_until(&mut self, stop: &Stop) -> Result<Ended> {
        self.serve(Take::Ready, |server| server.wait_or_stop(stop))
    }

    /// Serves one request if there is one, without waiting; tells whether there was.
    ///
    /// # Errors
    ///
    /// [`Error::is_removed`]: there will be no more. Else as [`run`](Self::run).
    pub fn process(&mut self) -> Result<bool> {
        self.check_panicked()?;
        let Some(request) = self.turn(None, Take::Ready)? else {
            return Ok(false);
        };
        let reply = self.dispatch(request);
        self.turn(Some(reply), Take::Nothing)?;
        self.check_panicked().map(|()| true)
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The one loop: replies, takes the next request, dispatches it. With nothing to take, `idle`
    /// waits, or says that the server is to stop.
    fn serve(&mut self, take: Take, mut idle: impl FnMut(&Self) -> Result<bool>) -> Result<Ended> {
        let mut reply = None;
        loop {
            let take = if self.panicked.is_some() {
                Take::Nothing
            } else {
                take
            };
            let request = match self.turn(reply.take(), take) {
                Ok(request) => request,
                Err(error) if error.is_removed() => return Ok(Ended::Removed),
                Err(error) => return Err(error),
            };
            self.check_panicked()?;
            match request {
                Some(request) => reply = Some(self.dispatch(request)),
                None if idle(self)? => return Ok(Ended::Stopped),
                None => {}
            }
        }
    }

    fn turn(&mut self, reply: Option<Reply>, take: Take) -> Result<Option<Request>> {
        self.transport.turn(reply, take, &mut self.data)
    }

    fn wait_or_stop(&self, stop: &Stop) -> Result<bool> {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [
            readable(self.transport.as_fd()),
            readable(stop.event.as_fd()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Number::EINTR) => Ok(fds[1].any() == Some(true)),
            Err(errno) => Err(Error::io("waiting for requests", errno)),
        }
    }

    fn check_panicked(&self) -> Result<()> {
        self.panicked
            .clone()
            .map_or(Ok(()), |message| Err(Error::panicked(message)))
    }
}

impl<D> AsFd for Server<D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

impl<D> fmt::Debug for Server<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("transport", &self.transport)
            .finish_non_exhaustive()
    }
}

/// Stops a server from another thread. A handle: clone it.
#[derive(Clone, Debug)]
pub struct Stop {
    event: Arc<EventFd>,
}

impl Stop {
    /// A handle that stops nothing yet.
    ///
    /// # Errors
    ///
    /// The process has no file descriptors left.
    pub fn new() -> Result<Self> {
        let event =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| Error::io("making an eventfd", errno))?;
        Ok(Self {
            event: Arc::new(event),
        })
    }

    /// Stops the servers that [run until](Server::run_until) this handle is used, now and later,
    /// after the request that each is at.
    pub fn stop(&self) {
        // A full counter is readable just as well.
        let _ = self.event.write(1);
    }
}
