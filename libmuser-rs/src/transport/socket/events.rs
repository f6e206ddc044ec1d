// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one descriptor that is readable when a turn would find something.
//!
//! What lies in this process already does not show on any socket, so there is an eventfd for that.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};

/// What a descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// There is something in this process.
    Inside,
    /// Somebody may be at the door.
    Door,
    /// The client's socket.
    Main,
    /// The second one.
    Twin,
    /// One who was turned away.
    Guest(u32),
    /// Writes that come by eventfd.
    IoEvent(u32),
    /// An eventfd with which the client masks or unmasks.
    Gate(u32),
}

impl Source {
    fn number(self) -> u64 {
        let of = |kind: u64, index: u32| kind << 32 | u64::from(index);
        match self {
            Self::Inside => 0,
            Self::Door => 1,
            Self::Main => 2,
            Self::Twin => 3,
            Self::Guest(index) => of(1, index),
            Self::IoEvent(index) => of(2, index),
            Self::Gate(index) => of(3, index),
        }
    }

    fn of(number: u64) -> Option<Self> {
        let index = u32::try_from(number & u64::from(u32::MAX)).ok()?;
        Some(match (number >> 32, index) {
            (0, 0) => Self::Inside,
            (0, 1) => Self::Door,
            (0, 2) => Self::Main,
            (0, 3) => Self::Twin,
            (1, index) => Self::Guest(index),
            (2, index) => Self::IoEvent(index),
            (3, index) => Self::Gate(index),
            _ => return None,
        })
    }
}

/// For what a socket is watched, beside for its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Watch {
    pub(super) receive: bool,
    pub(super) send: bool,
}

impl Watch {
    pub(super) const RECEIVE: Self = Self {
        receive: true,
        send: false,
    };

    fn flags(self, source: Source) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, self.receive);
        flags.set(EpollFlags::EPOLLOUT, self.send);
        // One of the client's may count down (`EFD_SEMAPHORE`), and so stay readable for as long as
        // it likes. Each signal is an edge, so none is missed.
        let is_gate = matches!(source, Source::Gate(_));
        flags.set(EpollFlags::EPOLLET, is_gate);
        flags
    }
}

/// What happened, as far as one look at it says.
#[derive(Debug, Default)]
pub(super) struct Happened {
    sources: Vec<Source>,
}

/// The descriptor, and all that it watches.
#[derive(Debug)]
pub(super) struct Events {
    epoll: Epoll,
    inside: EventFd,
}

impl Events {
    pub(super) fn new() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let inside = EventFd::from_value_and_flags(0, flags).map_err(failed)?;
        let events = Self { epoll, inside };
        events.add(&events.inside, Source::Inside, Watch::RECEIVE)?;
        Ok(events)
    }

    /// Watches one more descriptor.
    pub(super) fn add(&self, fd: impl AsFd, source: Source, watch: Watch) -> Result<()> {
        let event = EpollEvent::new(watch.flags(source), source.number());
        self.epoll.add(fd, event).map_err(failed)
    }

    /// Watches one for other things.
    pub(super) fn change(&self, fd: impl AsFd, source: Source, watch: Watch) -> Result<()> {
        let mut event = EpollEvent::new(watch.flags(source), source.number());
        self.epoll.modify(fd, &mut event).map_err(failed)
    }

    /// Does not watch one any more, which must be before it is closed: somebody else may have it too.
    pub(super) fn remove(&self, fd: impl AsFd) {
        // Who is not there any more need not be removed.
        let _ = self.epoll.delete(fd);
    }

    /// Makes the descriptor readable, or not, for what lies in this process.
    pub(super) fn set_inside(&self, readable: bool) {
        // Neither can fail: the counter is 0 before the write and 1 before the read.
        let _ = if readable {
            self.inside.write(1).map(drop)
        } else {
            self.inside.read().map(drop)
        };
    }

    /// Looks what has happened, without waiting.
    pub(super) fn look(&self, happened: &mut Happened) -> Result<()> {
        let mut events = [EpollEvent::empty(); 16];
        happened.sources.clear();
        match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => {
                let sources = events[..count].iter();
                let sources = sources.filter_map(|event| Source::of(event.data()));
                happened.sources.extend(sources);
                Ok(())
            }
            Err(Number::EINTR) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Waits until something happens.
    pub(super) fn wait(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Number::EINTR) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }
}

impl Happened {
    pub(super) fn sources(&self) -> impl Iterator<Item = Source> + '_ {
        self.sources.iter().copied()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

fn failed(errno: Number) -> Error {
    Error::io("waiting for a client", errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_that_stays_readable_is_told_of_once_a_signal() {
        let events = Events::new().unwrap();
        let gate = EventFd::from_value_and_flags(5, EfdFlags::EFD_SEMAPHORE).unwrap();
        events.add(&gate, Source::Gate(3), Watch::RECEIVE).unwrap();
        let mut happened = Happened::default();
        for _ in 0..2 {
            events.look(&mut happened).unwrap();
            assert_eq!(happened.sources().collect::<Vec<_>>(), [Source::Gate(3)]);
            gate.read().unwrap();

            events.look(&mut happened).unwrap();
            assert_eq!(happened.sources().count(), 0);
            gate.write(1).unwrap();
        }
    }

    #[test]
    fn source_is_found_again_by_its_number() {
        for source in [
            Source::Inside,
            Source::Door,
            Source::Main,
            Source::Twin,
            Source::Guest(7),
            Source::IoEvent(0),
            Source::Gate(u32::MAX),
        ] {
            assert_eq!(Source::of(source.number()), Some(source));
        }
        assert_eq!(Source::of(4), None);
        assert_eq!(Source::of(u64::MAX), None);
    }
}
