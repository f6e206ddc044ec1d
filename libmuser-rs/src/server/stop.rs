// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The handle that stops a server from another thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};

/// Stops a server from another thread. A handle: clone it.
#[derive(Clone, Debug)]
pub struct Stop {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    event: EventFd,
    /// What `event` says, for who has no time to ask it.
    used: AtomicBool,
    /// Whether SIGTERM and SIGINT use it.
    #[cfg(feature = "cli")]
    on_termination: AtomicBool,
    death: Mutex<Option<Moment>>,
}

/// Where [`Stop::die_at`] leaves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moment {
    /// Taken, and nothing done of it.
    Taken,
    /// Done, and not replied to.
    Replying,
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
            inner: Arc::new(Inner {
                event,
                used: AtomicBool::new(false),
                #[cfg(feature = "cli")]
                on_termination: AtomicBool::new(false),
                death: Mutex::new(None),
            }),
        })
    }

    /// Stops the servers that [run until](crate::Server::run_until) this handle is used, now and
    /// later, after the requests that each is at.
    pub fn stop(&self) {
        self.inner.used.store(true, Ordering::SeqCst);
        // A full counter is readable just as well.
        let _ = self.inner.event.write(1);
    }

    /// Uses this handle when SIGTERM or SIGINT comes, from now on and as long as the process lives.
    /// The same signal once more ends the process at once.
    #[cfg(feature = "cli")]
    pub(crate) fn use_on_termination(&self) -> Result<()> {
        crate::sys::write_on_termination(self.as_fd())
            .map_err(|error| Error::io("handling SIGTERM", error))?;
        self.inner.on_termination.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether it was used. Unlike the descriptor, this costs nothing to ask.
    #[must_use]
    pub fn is_used(&self) -> bool {
        #[cfg(feature = "cli")]
        if self.inner.on_termination.load(Ordering::SeqCst) && crate::sys::is_terminated() {
            return true;
        }
        self.inner.used.load(Ordering::SeqCst)
    }

    /// Ends the server with its next request as if its process were killed there: no reply is sent,
    /// and what the device does from then on leaves no trace. For tests of recovery.
    /// The run ends with [`Ended::Abandoned`](crate::Ended::Abandoned).
    pub fn die_at(&self, moment: Moment) {
        let death = self.inner.death.lock();
        *death.unwrap_or_else(PoisonError::into_inner) = Some(moment);
    }

    /// Whether it is time to die, once.
    pub(super) fn takes_death(&self, moment: Moment) -> bool {
        let death = self.inner.death.lock();
        let mut death = death.unwrap_or_else(PoisonError::into_inner);
        death.take_if(|at| *at == moment).is_some()
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

#[cfg(all(test, feature = "cli"))]
mod tests {
    use super::*;
    use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
    use nix::sys::signal::{raise, Signal};

    #[test]
    fn signal_uses_the_handle_that_asked_for_it() {
        let (stop, other) = (Stop::new().unwrap(), Stop::new().unwrap());
        stop.use_on_termination().unwrap();
        assert!(!stop.is_used());

        raise(Signal::SIGTERM).unwrap();

        assert!(stop.is_used() && !other.is_used());
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
    }
}
