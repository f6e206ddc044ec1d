// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The half of a stream that sends: whole messages, of which it keeps what the socket does not take.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};

use super::{Limits, StreamError};
use crate::sys::ancillary;

/// How far a sender has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Progress {
    /// Everything is in the socket.
    Sent,
    /// The sender has the message, and keeps what the socket does not take:
    /// [`flush`](Sender::flush) goes on when it does.
    Kept,
    /// The sender keeps too much already, and has taken nothing of this message: the peer does not
    /// receive. Flush, receive meanwhile, and send it again.
    Full,
}

/// Descriptors that go with the message in `start..end` of everything that was ever kept.
#[derive(Debug)]
struct Riders {
    start: u64,
    end: u64,
    descriptors: Vec<OwnedFd>,
}

/// The half that sends.
///
/// # Invariants
///
/// `kept` is what was taken and not sent, of which the first byte is number `sent`; `riders` are
/// those of whole messages in it, ascending.
#[derive(Debug)]
pub(crate) struct Sender {
    socket: Arc<OwnedFd>,
    backlog: usize,
    kept: VecDeque<u8>,
    sent: u64,
    riders: VecDeque<Riders>,
    failed: Option<StreamError>,
}

impl Sender {
    pub(super) fn new(socket: Arc<OwnedFd>, limits: Limits) -> Self {
        Self {
            socket,
            backlog: limits.backlog,
            kept: VecDeque::new(),
            sent: 0,
            riders: VecDeque::new(),
            failed: None,
        }
    }

    pub(crate) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Whether there is something to [`flush`](Self::flush), so that it pays to wait until the
    /// socket takes more.
    pub(crate) fn has_backlog(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Whether so much is kept that [`send`](Self::send) would take nothing.
    pub(crate) fn is_full(&self) -> bool {
        !self.kept.is_empty() && self.kept.len() >= self.backlog
    }

    /// Why nothing can be sent any more.
    pub(crate) const fn failure(&self) -> Option<StreamError> {
        self.failed
    }

    /// Sends a message as [`send`](Self::send) does, also when too much is kept already. Who calls
    /// it sees to it that there are few of these.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub(crate) fn insist(&mut self, parts: &[&[u8]]) -> Result<Progress, StreamError> {
        match self.send(parts, &[])? {
            Progress::Full => {
                self.keep(parts, 0, &[])?;
                Ok(Progress::Kept)
            }
            progress => Ok(progress),
        }
    }

    /// Sends a message, which is the `parts` one behind the other.
    ///
    /// A message of any size is taken while less than the limit is kept, so what is kept is bounded
    /// by that and one message.
    ///
    /// # Errors
    ///
    /// The stream has ended ([`StreamError::is_closed`]). Else nothing was taken of this message, and
    /// the stream goes on: it has more descriptors than there can be (`EINVAL`), too many are under
    /// way in sockets (`ETOOMANYREFS`), or this process can't have more (`EMFILE`).
    pub(crate) fn send(
        &mut self,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Progress, StreamError> {
        if descriptors.len() > ancillary::MOST {
            return Err(StreamError::Socket(Errno::EINVAL));
        }
        if self.flush()? == Progress::Kept {
            if self.kept.len() >= self.backlog {
                return Ok(Progress::Full);
            }
            self.keep(parts, 0, descriptors)?;
            return Ok(Progress::Kept);
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let sent = match self.send_once(parts, descriptors) {
            Ok(sent) => sent,
            Err(Errno::EAGAIN) => 0,
            Err(error) if StreamError::Socket(error).is_closed() => return Err(self.fail(error)),
            Err(error) => return Err(StreamError::Socket(error)),
        };
        if sent == total {
            return Ok(Progress::Sent);
        }
        // Descriptors have gone with the first byte.
        let descriptors = if sent == 0 { descriptors } else { &[] };
        self.keep(parts, sent, descriptors)?;
        // The socket may take more at once: it cuts what is large.
        self.flush()
    }

    /// Sends what is kept, as far as the socket takes it.
    ///
    /// # Errors
    ///
    /// The stream has ended.
    pub(crate) fn flush(&mut self) -> Result<Progress, StreamError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        while !self.kept.is_empty() {
            match self.flush_once() {
                Ok(sent) => {
                    self.kept.drain(..sent);
                    self.sent += sent as u64;
                }
                Err(Errno::EAGAIN) => return Ok(Progress::Kept),
                Err(error) => return Err(self.fail(error)),
            }
        }
        Ok(Progress::Sent)
    }

    /// Sends what is kept up to the next message with descriptors, or that message: a receiver finds
    /// by the end of a call to which message descriptors belong.
    fn flush_once(&mut self) -> Result<usize, Errno> {
        let (first, second) = self.kept.as_slices();
        let next = self.riders.front();
        let is_due = next.is_some_and(|riders| riders.start == self.sent);
        let (limit, descriptors) = match next {
            Some(riders) if is_due => (riders.end - self.sent, riders.descriptors.as_slice()),
            Some(riders) => (riders.start - self.sent, &[][..]),
            None => (u64::MAX, &[][..]),
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let first = &first[..first.len().min(limit)];
        let second = &second[..second.len().min(limit - first.len())];
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = transmit(&self.socket, &[first, second], &numbers)?;
        if is_due {
            self.riders.pop_front();
        }
        Ok(sent)
    }

    fn send_once(
        &mut self,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<usize, Errno> {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        transmit(&self.socket, parts, &numbers)
    }

    /// Keeps a message without its first `skip` bytes.
    fn keep(
        &mut self,
        parts: &[&[u8]],
        skip: usize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), StreamError> {
        let copies = descriptors.iter().map(|fd| fd.try_clone_to_owned());
        let copies: Vec<OwnedFd> = copies.collect::<Result<_, _>>().map_err(|error| {
            let number = error.raw_os_error().unwrap_or(libc::EMFILE);
            StreamError::Socket(Errno::from_raw(number))
        })?;
        let start = self.sent + self.kept.len() as u64;
        let mut skip = skip;
        for part in parts {
            let skipped = skip.min(part.len());
            skip -= skipped;
            self.kept.extend(&part[skipped..]);
        }
        if !copies.is_empty() {
            self.riders.push_back(Riders {
                start,
                end: self.sent + self.kept.len() as u64,
                descriptors: copies,
            });
        }
        Ok(())
    }

    fn fail(&mut self, error: Errno) -> StreamError {
        let error = StreamError::Socket(error);
        self.failed = Some(error);
        self.kept = VecDeque::new();
        self.riders = VecDeque::new();
        error
    }
}

/// Sends once, without waiting and without a signal when the peer has gone.
fn transmit(socket: &OwnedFd, parts: &[&[u8]], descriptors: &[RawFd]) -> Result<usize, Errno> {
    /// The most parts that a message has.
    const PARTS: usize = 4;
    let mut slices = [IoSlice::new(&[]); PARTS];
    let count = parts.len().min(PARTS);
    for (slice, part) in slices.iter_mut().zip(parts) {
        *slice = IoSlice::new(part);
    }
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights: &[_] = if descriptors.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &slices[..count], rights, flags, None) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
