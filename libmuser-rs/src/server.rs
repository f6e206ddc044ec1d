// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves a device: takes requests from a transport, dispatches them, replies.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::device::{Bus, Device, SharedDevice};
use crate::error::{Error, Result};
use crate::model::PciModel;
use crate::transport::{AttachOptions, Take, Transport};

mod core;
mod dispatch;
pub(crate) mod gate;
mod run;
mod stop;

pub use gate::Quiesced;
pub use stop::{Moment, Stop};

use self::core::Core;
use dispatch::Worker;
use run::Run;

/// Why a server ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// The device was removed.
    Removed,
    /// Its [`Stop`] handle was used.
    Stopped,
    /// Another server, which waited in [standby](AttachOptions::standby), has the device now.
    HandedOver,
    /// It was to die at a certain [moment](Stop::die_at).
    Abandoned,
}

/// Serves a [`Device`] to the clients of a transport.
///
/// Every way to run it is the same loop: [`run`](Self::run) until the end,
/// [`run_until`](Self::run_until) somebody stops it, in a [`Poller`](crate::Poller) together with
/// others, or in the caller's own loop, which waits for the file descriptor ([`AsFd`]) to become
/// readable, by `epoll` for instance, and calls [`process`](Self::process).
///
/// # Threads
///
/// A server can be moved to another thread, if the device can. It calls the device in the thread
/// that runs it, one call at a time. To serve a device with several threads, see [`SharedServer`].
pub struct Server<D> {
    core: Core,
    device: D,
    /// Data of the request at hand, then of its reply.
    data: Vec<u8>,
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
        transport: impl Transport + 'static,
        device: impl FnOnce(&Bus) -> Result<D>,
    ) -> Result<Self> {
        Self::attach(model, transport, &AttachOptions::new(), device)
    }

    /// Attaches in another way, and makes the device.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn attach(
        model: PciModel,
        transport: impl Transport + 'static,
        options: &AttachOptions,
        device: impl FnOnce(&Bus) -> Result<D>,
    ) -> Result<Self> {
        let core = Core::attach(model, transport, options)?;
        let device = device(&core.bus)?;
        let data = Vec::new();
        Ok(Self { core, device, data })
    }

    /// Serves until the device is removed or handed over.
    ///
    /// # Errors
    ///
    /// [`Error::is_panicked`]: the device's code did. Else, the transport failed.
    pub fn run(&mut self) -> Result<Ended> {
        self.serve(None)
    }

    /// Serves until the device is removed or handed over, or the server is stopped.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn run_until(&mut self, stop: &Stop) -> Result<Ended> {
        self.serve(Some(stop))
    }

    fn serve(&mut self, stop: Option<&Stop>) -> Result<Ended> {
        let run = Run::new(&self.core, stop, 1)?;
        let worker = &mut Worker::new(&self.core, &mut self.device, &mut self.data);
        self.core.over(run.serve(worker))
    }

    /// Serves one request if there is one, without waiting; tells whether there was.
    ///
    /// # Errors
    ///
    /// [`Error::is_removed`], [`Error::is_handed_over`]: there will be no more. Else as
    /// [`run`](Self::run).
    pub fn process(&mut self) -> Result<bool> {
        self.core.process(&mut self.device, &mut self.data)
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What the device can reach.
    pub fn bus(&self) -> Bus {
        self.core.bus.clone()
    }
}

/// Serves a [`SharedDevice`] to the clients of a transport, with any number of threads.
///
/// # Order
///
/// - A client's thread waits for each of its accesses: it sees their effects in the order in which
///   it makes them. Accesses of different client threads run at the same time, in any order.
/// - A write to a doorbell is not waited for: its value can be seen at once, by the client and by the
///   device, but the call of [`SharedDevice::doorbell`] may come after that for an access which the
///   client made later. Several rings may make one call.
/// - An access of many bytes is cut ([`Access`](crate::Access)); its parts are made one after
///   another, by one thread.
/// - A reset runs alone, whoever caused it: the accesses before it have ended, and those after it
///   wait until it has. So does a write to configuration space, which may be the cause of one.
/// - [`SharedDevice::dma_unmapped`] runs alone as well: no access uses the memory that goes, and none
///   begins meanwhile.
/// - [`Bus::quiesce`] keeps all of it out.
/// - A removal, a [`Stop`] and a hand-over let the accesses end that are in the device.
///
/// # Panics
///
/// A panic in one thread ends all, each after the request that it is at.
pub struct SharedServer<S> {
    core: Core,
    device: Arc<S>,
    threads: usize,
    data: Vec<u8>,
}

impl<S: SharedDevice> SharedServer<S> {
    /// Attaches to the transport for so many threads, and makes the device with what it can reach.
    ///
    /// # Errors
    ///
    /// As [`Server::new`].
    pub fn new(
        model: PciModel,
        transport: impl Transport + 'static,
        threads: usize,
        device: impl FnOnce(&Bus) -> Result<S>,
    ) -> Result<Self> {
        let options = AttachOptions::new().threads(threads);
        Self::attach(model, transport, &options, device)
    }

    /// Attaches in another way, and makes the device.
    ///
    /// # Errors
    ///
    /// As [`Server::new`].
    pub fn attach(
        model: PciModel,
        transport: impl Transport + 'static,
        options: &AttachOptions,
        device: impl FnOnce(&Bus) -> Result<S>,
    ) -> Result<Self> {
        let core = Core::attach(model, transport, options)?;
        let device = Arc::new(device(&core.bus)?);
        Ok(Self {
            core,
            device,
            threads: options.threads.max(1),
            data: Vec::new(),
        })
    }

    /// Serves until the device is removed or handed over.
    ///
    /// # Errors
    ///
    /// As [`Server::run`].
    pub fn run(&mut self) -> Result<Ended> {
        self.serve(None)
    }

    /// Serves until the device is removed or handed over, or the server is stopped.
    ///
    /// # Errors
    ///
    /// As [`Server::run`].
    pub fn run_until(&mut self, stop: &Stop) -> Result<Ended> {
        self.serve(Some(stop))
    }

    fn serve(&mut self, stop: Option<&Stop>) -> Result<Ended> {
        let run = &Run::new(&self.core, stop, self.threads)?;
        let serve = || {
            let mut device = &*self.device;
            run.serve(&mut Worker::new(&self.core, &mut device, &mut Vec::new()))
        };
        let ended = std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads).map(|_| scope.spawn(serve)).collect();
            let own = serve();
            let panicked = || Err(Error::panicked("a thread of the server".into()));
            let others = others
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| panicked()));
            others.fold(own, first_reason)
        });
        self.core.over(ended)
    }

    /// Serves one request if there is one, without waiting; tells whether there was.
    ///
    /// # Errors
    ///
    /// As [`Server::process`].
    pub fn process(&mut self) -> Result<bool> {
        let mut device = &*self.device;
        self.core.process(&mut device, &mut self.data)
    }

    /// The device.
    pub fn device(&self) -> &Arc<S> {
        &self.device
    }

    /// What the device can reach.
    pub fn bus(&self) -> Bus {
        self.core.bus.clone()
    }
}

impl Core {
    fn process<D: Device>(&self, device: &mut D, data: &mut Vec<u8>) -> Result<bool> {
        self.check_panicked()?;
        let mut worker = Worker::new(self, device, data);
        let request = worker.turn(None, Take::Ready);
        let Some(request) = request.inspect_err(|error| self.detach_after(error))? else {
            return Ok(false);
        };
        let reply = worker.dispatch(request);
        worker.turn(Some(reply), Take::Nothing)?;
        self.check_panicked().map(|()| true)
    }

    fn detach_after(&self, error: &Error) {
        if error.is_handed_over() {
            self.detach();
        }
    }

    /// The run is over; a successor waits for the attachment to be over as well.
    fn over(&self, ended: Result<Ended>) -> Result<Ended> {
        if matches!(ended, Ok(Ended::HandedOver)) {
            self.detach();
        }
        ended
    }
}

/// Of the ends of two threads, the one that is the reason of the other.
fn first_reason(one: Result<Ended>, other: Result<Ended>) -> Result<Ended> {
    match (one, other) {
        (Ok(Ended::Stopped), other) => other,
        (Err(error), _) | (_, Err(error)) => Err(error),
        (one, _) => one,
    }
}

impl<D> AsFd for Server<D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.transport.as_fd()
    }
}

impl<S> AsFd for SharedServer<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.transport.as_fd()
    }
}

impl<D> fmt::Debug for Server<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("core", &self.core)
            .finish_non_exhaustive()
    }
}

impl<S> fmt::Debug for SharedServer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedServer")
            .field("core", &self.core)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}
