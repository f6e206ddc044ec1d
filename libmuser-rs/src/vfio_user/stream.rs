// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A UNIX stream socket that carries messages with descriptors.
//!
//! Its two halves are independent of each other: a thread that can't send, since the socket is full,
//! may receive meanwhile, so that two peers which both send never wait for each other. Neither half
//! ever blocks: a receiver says that nothing is there, a sender keeps what the socket does not take
//! and says so. Waiting is [`wait`], and holds neither half.
//!
//! The stream knows of a message its size only, which is in its header. What the bytes mean is for
//! [`wire`](super::wire).
//!
//! Descriptors of a message are those that ride on its first byte. How many messages come in one
//! system call is for the kernel to say; a message that comes whole needs one.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::wire::HEADER;

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

pub(crate) use receiver::{Descriptors, Message, Receiver};
pub(crate) use sender::{Progress, Sender};

/// Where a header has the size of its message.
const SIZE: std::ops::Range<usize> = 4..8;

/// What a stream takes from its peer, and keeps for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes of the largest message, with its header.
    pub(crate) message: usize,
    /// The most descriptors that a message may bring.
    pub(crate) descriptors: usize,
    /// Bytes that come before each message's header; descriptors ride on the first of them. 0 on a
    /// stream as the specification has it.
    pub(crate) prefix: usize,
    /// Bytes that a sender keeps for a peer which does not receive, before it takes no more messages.
    pub(crate) backlog: usize,
}

/// Why a stream can't go on. What it said once it says always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    /// The peer has closed the connection between two messages.
    #[error("the connection was closed")]
    Closed,
    /// The peer has closed the connection in a message.
    #[error("the connection was closed {had} bytes into a message")]
    ClosedInside {
        /// Bytes that had come of it.
        had: usize,
    },
    /// A message says that it is smaller than its header.
    #[error("a message of {size} bytes is smaller than its header of {HEADER}")]
    Short {
        /// What it says.
        size: usize,
    },
    /// A message says that it is larger than the limit.
    #[error("a message of {size} bytes is larger than the limit of {limit}")]
    Long {
        /// What it says.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// The system call failed.
    #[error("the socket failed: {0}")]
    Socket(Errno),
}

impl StreamError {
    /// Whether the peer has gone, rather than done something wrong.
    pub(crate) const fn is_closed(self) -> bool {
        matches!(
            self,
            Self::Closed
                | Self::ClosedInside { .. }
                | Self::Socket(Errno::EPIPE | Errno::ECONNRESET)
        )
    }
}

/// Makes the halves of a stream of a connected socket.
///
/// Each call is made non-blocking by itself, so the socket need not be, and another process that
/// has it open as well is not disturbed.
pub(crate) fn split(socket: OwnedFd, limits: Limits) -> (Sender, Receiver) {
    let socket = Arc::new(socket);
    let sender = Sender::new(Arc::clone(&socket), limits);
    (sender, Receiver::new(socket, limits))
}

/// What a socket is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    /// To receive: there are bytes, or the stream has ended.
    pub(crate) receive: bool,
    /// To send.
    pub(crate) send: bool,
}

/// Waits until `socket` is ready for one of `wanted`, or the deadline has passed: then it is ready
/// for nothing. Without a deadline it waits for as long as it takes.
///
/// # Errors
///
/// Those of `poll`; not `EINTR`.
pub(crate) fn wait(
    socket: BorrowedFd<'_>,
    wanted: Ready,
    deadline: Option<Instant>,
) -> Result<Ready, StreamError> {
    let mut events = PollFlags::empty();
    events.set(PollFlags::POLLIN, wanted.receive);
    events.set(PollFlags::POLLOUT, wanted.send);
    loop {
        let mut polled = [PollFd::new(socket, events)];
        match poll(&mut polled, timeout(deadline)) {
            // `poll` takes whole milliseconds, at most 25 days of them.
            Ok(0) if deadline.is_some_and(|at| Instant::now() < at) => {}
            Ok(_) => {
                let found = polled[0].revents().unwrap_or(PollFlags::empty());
                // Whoever waited to send or to receive gets the error by doing so.
                let failed = found.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
                let invalid = found.contains(PollFlags::POLLNVAL);
                return match invalid {
                    true => Err(StreamError::Socket(Errno::EBADF)),
                    false => Ok(Ready {
                        receive: wanted.receive && (failed || found.contains(PollFlags::POLLIN)),
                        send: wanted.send && (failed || found.contains(PollFlags::POLLOUT)),
                    }),
                };
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(StreamError::Socket(error)),
        }
    }
}

/// Waits until all that `sender` keeps is sent; tells whether it is, or the deadline has passed.
///
/// The sender is not locked while it waits. Whenever there is something to receive, `receive` is
/// called, which must take it off the socket: the peer may be waiting for just that.
///
/// # Errors
///
/// The stream has ended, or what `receive` returns.
pub(crate) fn drain<E: From<StreamError>>(
    sender: &Mutex<Sender>,
    deadline: Option<Instant>,
    mut receive: impl FnMut() -> Result<(), E>,
) -> Result<bool, E> {
    let lock = || sender.lock().unwrap_or_else(PoisonError::into_inner);
    let socket = Arc::clone(lock().socket());
    let both = Ready {
        receive: true,
        send: true,
    };
    while lock().flush()? != Progress::Sent {
        let ready = wait(socket.as_fd(), both, deadline)?;
        if ready == Ready::default() {
            return Ok(false);
        }
        if ready.receive {
            receive()?;
        }
    }
    Ok(true)
}

/// The time to `deadline` as `poll` takes it, rounded up, so that it is not polled again and again
/// in the last millisecond.
fn timeout(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = left.as_micros().div_ceil(1000);
    let millis = i32::try_from(millis).unwrap_or(i32::MAX);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

/// The size in the header that `bytes` start with, as far as they have come.
fn size(bytes: &[u8]) -> Option<usize> {
    let size: [u8; 4] = bytes.get(SIZE)?.try_into().ok()?;
    usize::try_from(u32::from_ne_bytes(size)).ok()
}

impl AsFd for Sender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl fmt::Display for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} descriptors", self.kept().len())?;
        match self.lost() {
            0 => Ok(()),
            lost => write!(f, " and {lost} that were not kept"),
        }
    }
}
