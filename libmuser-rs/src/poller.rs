// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves many devices from one thread.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno as Number;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::device::{Device, SharedDevice};
use crate::error::{Error, Result};
use crate::server::{Ended, Server, SharedServer, Stop};

/// Serves many devices from one thread, each by its [`Server`], whatever its kind and transport.
///
/// One thread [runs](Self::run_until) it. Servers can be added and removed at any time, from any
/// thread; a handle: clone it. Each server that has something to do gets its turn, for a bounded
/// number of requests; so one busy device can slow the others down, but not keep them waiting for
/// ever. A device whose call takes long, or which is [quiesced](crate::Bus::quiesce) while a request
/// is there, makes all of them wait: it should have a thread of its own.
///
/// # Examples
///
/// ```
/// use libmuser::transport::memory;
/// use libmuser::{Bar, Device, PciBuilder, Poller, Server, Stop};
///
/// struct Null;
/// impl Device for Null {}
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
/// let (poller, stop) = (Poller::new()?, Stop::new()?);
/// let mut hosts = Vec::new();
/// for _ in 0..10 {
///     let (transport, host) = memory::pair()?;
///     poller.add(Server::new(model.clone(), transport, |_| Ok(Null))?)?;
///     hosts.push(host);
/// }
/// let (serving, stopped) = (poller.clone(), stop.clone());
/// let thread = std::thread::spawn(move || {
///     serving.run_until(&stopped, |member, ended| println!("{member:?} has ended: {ended:?}"))
/// });
///
/// for host in &hosts {
///     host.open()?.read(0, 0, &mut [0; 4])?;
/// }
/// stop.stop();
/// thread.join().unwrap()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Poller {
    inner: Arc<Inner>,
}

struct Inner {
    epoll: Epoll,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    servers: BTreeMap<Member, Arc<Slot>>,
    /// How many there were so far.
    count: u64,
}

/// A server, as long as it is not removed.
type Slot = Mutex<Option<Box<dyn Served>>>;

/// Names a server in its [`Poller`]; no two that a poller ever has have the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(u64);

/// What a [`Poller`] can serve: a server of either kind. The library implements it, and nobody else
/// can.
pub trait Served: sealed::Sealed + AsFd + Send {
    /// Serves one request if there is one, without waiting; tells whether there was.
    ///
    /// # Errors
    ///
    /// There will be no more: see [`Server::process`].
    fn process(&mut self) -> Result<bool>;
}

impl<D: Device + Send> Served for Server<D> {
    fn process(&mut self) -> Result<bool> {
        Self::process(self)
    }
}

impl<S: SharedDevice> Served for SharedServer<S> {
    fn process(&mut self) -> Result<bool> {
        Self::process(self)
    }
}

mod sealed {
    /// Keeps a trait's implementations in the library.
    pub trait Sealed {}

    impl<D> Sealed for super::Server<D> {}
    impl<S> Sealed for super::SharedServer<S> {}
}

/// Stands for the handle that stops the run.
const STOP: u64 = 0;
/// Requests that one server is given before the next has its turn.
const TURN: usize = 32;

impl Poller {
    /// A poller with no servers.
    ///
    /// # Errors
    ///
    /// The process has no file descriptors left.
    pub fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| Error::io("making an epoll instance", errno))?;
        let members = Mutex::default();
        Ok(Self {
            inner: Arc::new(Inner { epoll, members }),
        })
    }

    /// Adds a server, which is served from now on.
    ///
    /// # Errors
    ///
    /// The system has too many descriptors in epoll instances already.
    pub fn add(&self, server: impl Served + 'static) -> Result<Member> {
        let mut members = self.lock();
        members.count += 1;
        let member = Member(members.count);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, member.0);
        self.inner.epoll.add(&server, event).map_err(failed)?;
        let slot: Slot = Mutex::new(Some(Box::new(server)));
        members.servers.insert(member, Arc::new(slot));
        Ok(member)
    }

    /// Removes a server and drops it, which detaches it from its device, after the request that it
    /// is at. Tells whether it was there. Not for the device's own calls, which would wait for
    /// themselves.
    pub fn remove(&self, member: Member) -> bool {
        let Some(slot) = self.lock().servers.remove(&member) else {
            return false;
        };
        // Whoever else has the slot just now finds nothing in it afterwards.
        let server = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(server) = &server {
            // It is in the epoll instance, so this can't fail.
            let _ = self.inner.epoll.delete(server);
        }
        server.is_some()
    }

    /// How many servers there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().servers.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Serves until `stop` is used. A server whose device is removed or handed over, or that fails,
    /// is taken out, and `ended` hears of it; the others go on.
    ///
    /// # Errors
    ///
    /// epoll failed.
    pub fn run_until(
        &self,
        stop: &Stop,
        mut ended: impl FnMut(Member, Result<Ended>),
    ) -> Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, STOP);
        self.inner.epoll.add(stop, event).map_err(failed)?;
        let run = self.run(&mut ended);
        self.inner.epoll.delete(stop).map_err(failed)?;
        run
    }

    fn run(&self, ended: &mut dyn FnMut(Member, Result<Ended>)) -> Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.inner.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Number::EINTR) => 0,
                Err(errno) => return Err(failed(errno)),
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return Ok(());
                }
                self.give_turn(Member(event.data()), ended);
            }
        }
    }

    fn give_turn(&self, member: Member, ended: &mut dyn FnMut(Member, Result<Ended>)) {
        // It may have been removed since the event.
        let Some(slot) = self.lock().servers.get(&member).cloned() else {
            return;
        };
        let error = {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(server) = slot.as_mut() else {
                return;
            };
            let mut turns = (0..TURN).map(|_| server.process());
            turns.find_map(|turn| match turn {
                Ok(true) => None,
                Ok(false) => Some(None),
                Err(error) => Some(Some(error)),
            })
        };
        if let Some(Some(error)) = error {
            self.remove(member);
            let end = match error {
                error if error.is_removed() => Ok(Ended::Removed),
                error if error.is_handed_over() => Ok(Ended::HandedOver),
                error => Err(error),
            };
            ended(member, end);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        let members = self.inner.members.lock();
        members.unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner")
            .field("epoll", &self.epoll)
            .finish_non_exhaustive()
    }
}

fn failed(errno: Number) -> Error {
    Error::io("waiting for many devices", errno)
}
