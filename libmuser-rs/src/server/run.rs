// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one loop, which any number of threads run: reply, take the next request, dispatch it.
//!
//! Of the threads that find nothing to take, one waits for the transport (the leader) and the others
//! wait to be the next leader. So a request wakes one thread, and who has taken it makes another
//! the leader before it gets to work.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::core::Core;
use super::dispatch::Worker;
use super::stop::{Moment, Stop};
use super::Ended;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::transport::{Request, Take, Wait};

/// How often a thread that polls looks before it lets others have its processor.
const LOOKS: u32 = 32;

/// One run of a server, by one thread or by several.
#[derive(Debug)]
pub(super) struct Run<'a> {
    core: &'a Core,
    /// The handle of who may stop it.
    stop: Option<&'a Stop>,
    /// What wakes the leader when another thread ends the run.
    wake: Option<Stop>,
    leader: Mutex<()>,
    over: AtomicBool,
    abandoned: AtomicBool,
}

impl<'a> Run<'a> {
    pub(super) fn new(core: &'a Core, stop: Option<&'a Stop>, threads: usize) -> Result<Self> {
        let wake = (threads > 1).then(Stop::new).transpose()?;
        Ok(Self {
            core,
            stop,
            wake,
            leader: Mutex::new(()),
            over: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        })
    }

    /// Serves in this thread, until the run is over for all.
    pub(super) fn serve<D: Device + ?Sized>(&self, worker: &mut Worker<'_, D>) -> Result<Ended> {
        let ended = self.take_turns(worker);
        self.end();
        if self.is_abandoned() {
            // What fails after a death is nobody's concern.
            return Ok(Ended::Abandoned);
        }
        ended
    }

    fn take_turns<D: Device + ?Sized>(&self, worker: &mut Worker<'_, D>) -> Result<Ended> {
        let mut reply = None;
        self.core.check_panicked()?;
        loop {
            // Who finds work without end never comes to wait, and hears of it here.
            if self.stop.is_some_and(Stop::is_used) {
                self.end();
            }
            let take = if self.is_over() || self.core.check_panicked().is_err() {
                Take::Nothing
            } else if self.core.wait == Wait::Block && self.stop.is_none() && self.wake.is_none() {
                Take::Wait
            } else {
                Take::Ready
            };
            let request = match worker.turn(reply.take(), take) {
                Ok(None) if take != Take::Nothing => self.lead(worker),
                other => other,
            };
            self.core.check_panicked()?;
            match request {
                Ok(Some(request)) if self.dies_at(Moment::Taken) => {
                    log::debug!("{request:?} is abandoned");
                    return Ok(Ended::Abandoned);
                }
                Ok(Some(request)) => reply = Some(worker.dispatch(request)),
                Ok(None) if self.is_over() => return Ok(Ended::Stopped),
                Ok(None) => {}
                Err(error) if error.is_removed() => return Ok(Ended::Removed),
                Err(error) if error.is_handed_over() => return Ok(Ended::HandedOver),
                Err(error) => return Err(error),
            }
            if reply.is_some() && self.dies_at(Moment::Replying) {
                return Ok(Ended::Abandoned);
            }
        }
    }

    /// Waits for a request as the leader, and takes it.
    fn lead<D: Device + ?Sized>(&self, worker: &mut Worker<'_, D>) -> Result<Option<Request>> {
        let _leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        match self.core.wait {
            Wait::Block => {
                if self.is_over() {
                    return Ok(None);
                }
                if self.is_stopped()? {
                    self.end();
                    return Ok(None);
                }
                worker.turn(None, Take::Ready)
            }
            Wait::Poll => self.poll(worker),
        }
    }

    /// Looks for a request until there is one, or the run is over.
    fn poll<D: Device + ?Sized>(&self, worker: &mut Worker<'_, D>) -> Result<Option<Request>> {
        loop {
            for _ in 0..LOOKS {
                if self.stop.is_some_and(Stop::is_used) {
                    self.end();
                }
                if self.is_over() || self.core.check_panicked().is_err() {
                    return Ok(None);
                }
                if let Some(request) = worker.turn(None, Take::Ready)? {
                    return Ok(Some(request));
                }
                std::hint::spin_loop();
            }
            // Where there are fewer processors than who polls, the client needs one too.
            std::thread::yield_now();
        }
    }

    /// Waits until there is something to do; tells whether that is to stop.
    fn is_stopped(&self) -> Result<bool> {
        let stops = self.stop.iter().copied().chain(&self.wake);
        let fds = stops.map(AsFd::as_fd).chain([self.core.transport.as_fd()]);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Number::EINTR) => {
                fds.pop();
                Ok(fds.iter().any(|fd| fd.any() == Some(true)))
            }
            Err(errno) => Err(Error::io("waiting for requests", errno)),
        }
    }

    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(wake) = &self.wake {
            wake.stop();
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::SeqCst)
    }

    /// Whether the server is to die here; then the attachment ends at once.
    fn dies_at(&self, moment: Moment) -> bool {
        if self.stop.is_some_and(|stop| stop.takes_death(moment)) {
            self.abandoned.store(true, Ordering::SeqCst);
            self.core.detach();
        }
        self.is_abandoned()
    }
}
