// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Does jobs of input and output: many at a time by io_uring, or each at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::backing::{complete, Backing, Segments};
use crate::sys::{Done, Entry, Ring};

/// What to do.
#[derive(Debug)]
pub(crate) enum Job {
    Read(u64, Segments),
    /// With whether it must reach the medium.
    Write(u64, Segments, bool),
    Flush,
}

/// How a job ended. Reads and writes that ended well were whole.
pub(crate) type Ended = (io::Result<()>, Option<Segments>);

/// How input and output are to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// By io_uring if that can be had
    #[default]
    Auto,
    /// By io_uring
    Uring,
    /// By one system call after another
    Sync,
}

/// Does jobs for one queue.
#[derive(Debug)]
pub(crate) struct Engine {
    backing: Arc<dyn Backing>,
    ring: Option<Ring>,
    /// What the ring has been given: offset, bytes, and whether it is a write, and a durable one.
    given: Vec<Option<Given>>,
}

#[derive(Clone, Copy, Debug)]
enum Given {
    Read(u64),
    Write(u64, bool),
    Flush,
}

impl Engine {
    pub(crate) fn new(backing: Arc<dyn Backing>, method: Method, jobs: usize) -> io::Result<Self> {
        let ring = match (method, backing.file()) {
            (Method::Sync, _) | (_, None) => None,
            (Method::Uring, Some(_)) => Some(Ring::new(jobs)?),
            (Method::Auto, Some(_)) => Ring::new(jobs)
                .inspect_err(|error| log::info!("no io_uring, but system calls: {error}"))
                .ok(),
        };
        Ok(Self {
            backing,
            ring,
            given: vec![None; jobs],
        })
    }

    /// Starts a job under a number; what came of it, if it is done already.
    pub(crate) fn start(&mut self, number: usize, job: Job) -> Option<Ended> {
        let (Some(ring), Some(file), Some(place)) = (
            &mut self.ring,
            self.backing.file(),
            self.given.get_mut(number),
        ) else {
            return Some(perform(&*self.backing, job));
        };
        let (given, at, entry) = match job {
            Job::Read(at, to) => (Given::Read(at), at, Entry::Read(to)),
            Job::Write(at, from, durable) => {
                let given = Given::Write(at, durable);
                (given, at, Entry::Write(from, durable))
            }
            Job::Flush => (Given::Flush, 0, Entry::Flush),
        };
        match ring.start(number, file, at, entry) {
            Ok(()) => {
                *place = Some(given);
                None
            }
            Err(error) => Some((Err(error), None)),
        }
    }

    /// Waits until jobs are done, or `wake` is readable.
    pub(crate) fn wait(
        &mut self,
        wake: BorrowedFd<'_>,
        ended: &mut dyn FnMut(usize, Ended),
    ) -> io::Result<()> {
        let Some(ring) = &mut self.ring else {
            let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
            return match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Number::EINTR) => Ok(()),
                Err(errno) => Err(errno.into()),
            };
        };
        let (backing, all) = (&*self.backing, &mut self.given);
        ring.wait(wake, &mut |done: Done| {
            let given = all.get_mut(done.number).and_then(Option::take);
            if let Some(given) = given {
                ended(done.number, finish(backing, given, done));
            }
        })
    }
}

/// Does a job at once.
pub(crate) fn perform(backing: &dyn Backing, job: Job) -> Ended {
    match job {
        Job::Read(at, to) => {
            let step = |done| backing.read(at + done as u64, &to, done);
            (complete(to.len(), 0, step), Some(to))
        }
        Job::Write(at, from, durable) => {
            let step = |done| backing.write(at + done as u64, &from, done, durable);
            (complete(from.len(), 0, step), Some(from))
        }
        Job::Flush => (backing.flush(), None),
    }
}

/// What came of a job of the ring, of which a part may be left to do.
fn finish(backing: &dyn Backing, given: Given, done: Done) -> Ended {
    let failed = || io::Error::from_raw_os_error(done.result.saturating_neg());
    let Ok(count) = usize::try_from(done.result) else {
        let again = matches!(-done.result, libc::EINTR | libc::EAGAIN);
        if !again {
            return (Err(failed()), done.segments);
        }
        return match (given, done.segments) {
            (Given::Read(at), Some(to)) => perform(backing, Job::Read(at, to)),
            (Given::Write(at, durable), Some(from)) => {
                perform(backing, Job::Write(at, from, durable))
            }
            _ => perform(backing, Job::Flush),
        };
    };
    let Some(segments) = done.segments else {
        return (Ok(()), None);
    };
    let result = match given {
        _ if count == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
        Given::Read(at) => complete(segments.len(), count, |done| {
            backing.read(at + done as u64, &segments, done)
        }),
        Given::Write(at, durable) => complete(segments.len(), count, |done| {
            backing.write(at + done as u64, &segments, done, durable)
        }),
        Given::Flush => Ok(()),
    };
    (result, Some(segments))
}
