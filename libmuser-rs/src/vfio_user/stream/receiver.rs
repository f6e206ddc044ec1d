// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The half of a stream that receives: it makes messages of bytes which come in any pieces.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::{size, Limits, StreamError};
use crate::sys::ancillary::{self, Received};
use crate::vfio_user::wire::HEADER;

/// Bytes that a buffer has at first: several messages of the usual sizes.
const BUFFER: usize = 16 << 10;

/// The descriptors that came with a message.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    kept: Vec<OwnedFd>,
    lost: usize,
}

impl Descriptors {
    /// Those within the limit, in their order.
    pub(crate) fn kept(&self) -> &[OwnedFd] {
        &self.kept
    }

    /// How many are not among [`kept`](Self::kept): beyond the limit, not on the first byte of a
    /// message, or more than this process can have. They are closed. Where the kernel does not say
    /// how many it dropped, they count as one.
    pub(crate) const fn lost(&self) -> usize {
        self.lost
    }

    /// Gives those within the limit away.
    pub(crate) fn into_kept(self) -> Vec<OwnedFd> {
        self.kept
    }

    /// Whether there were none at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.lost == 0
    }
}

/// A whole message.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    prefix: usize,
    bytes: &'a [u8],
    /// What came with it.
    pub(crate) descriptors: Descriptors,
}

impl<'a> Message<'a> {
    /// The bytes before the header; none on a stream as the specification has it.
    pub(crate) fn prefix(&self) -> &'a [u8] {
        &self.bytes[..self.prefix]
    }

    /// The header.
    pub(crate) fn header(&self) -> &'a [u8] {
        &self.bytes[self.prefix..][..HEADER]
    }

    /// What is behind the header.
    pub(crate) fn body(&self) -> &'a [u8] {
        &self.bytes[self.prefix + HEADER..]
    }
}

/// The half that receives.
///
/// # Invariants
///
/// `start <= end <= buffer.len()`. A message starts at `start`. `now` are the descriptors of that
/// message, `later` those of one that starts behind it in the buffer.
#[derive(Debug)]
pub(crate) struct Receiver {
    socket: Arc<OwnedFd>,
    limits: Limits,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    now: Descriptors,
    later: Option<(usize, Descriptors)>,
    /// What one call received, kept for its memory.
    fresh: Vec<OwnedFd>,
    failed: Option<StreamError>,
}

impl Receiver {
    pub(super) fn new(socket: Arc<OwnedFd>, limits: Limits) -> Self {
        Self {
            socket,
            limits,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            now: Descriptors::default(),
            later: None,
            fresh: Vec::new(),
            failed: None,
        }
    }

    pub(crate) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Sets how many descriptors a message may bring.
    pub(crate) fn set_descriptors(&mut self, descriptors: usize) {
        self.limits.descriptors = descriptors;
    }

    /// Whether [`receive`](Self::receive) has a message, or the end, without the socket: what is
    /// buffered here does not make the socket readable.
    pub(crate) fn is_ready(&self) -> bool {
        self.failed.is_some() || !matches!(self.complete(), Ok(None))
    }

    /// Receives a message, if a whole one is there.
    ///
    /// # Errors
    ///
    /// The stream has ended or is out of step; the messages before that were received.
    pub(crate) fn receive(&mut self) -> Result<Option<Message<'_>>, StreamError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let size = self.advance().inspect_err(|error| self.fail(*error))?;
        Ok(size.map(|size| self.take(size)))
    }

    /// Bytes that the buffer has.
    #[cfg(test)]
    pub(super) fn buffer_size(&self) -> usize {
        self.buffer.len()
    }

    /// Reads until a whole message is there, or nothing more is; tells its size.
    fn advance(&mut self) -> Result<Option<usize>, StreamError> {
        loop {
            if let Some(size) = self.complete()? {
                return Ok(Some(size));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// The size of the first message with its prefix, if all of it is in the buffer.
    fn complete(&self) -> Result<Option<usize>, StreamError> {
        let size = self.measure(self.start)?;
        Ok(size.filter(|size| *size <= self.end - self.start))
    }

    /// The size of the message at `at` of the buffer with its prefix, as soon as it is known.
    fn measure(&self, at: usize) -> Result<Option<usize>, StreamError> {
        let bytes = &self.buffer[at..self.end];
        let Some(size) = bytes.get(self.limits.prefix..).and_then(size) else {
            return Ok(None);
        };
        let limit = self.limits.message;
        match size {
            _ if size < HEADER => Err(StreamError::Short { size }),
            _ if size > limit => Err(StreamError::Long { size, limit }),
            _ => Ok(Some(self.limits.prefix + size)),
        }
    }

    /// Receives once; tells whether anything came.
    fn fill(&mut self) -> Result<bool, StreamError> {
        self.make_room();
        let socket = self.socket.as_fd();
        let room = &mut self.buffer[self.end..];
        let received = loop {
            match ancillary::receive(socket, room, &mut self.fresh) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(false),
                Err(error) => return Err(StreamError::Socket(error)),
                Ok(received) => break received,
            }
        };
        if received.bytes == 0 {
            return Err(match self.end - self.start {
                0 => StreamError::Closed,
                had => StreamError::ClosedInside { had },
            });
        }
        let before = self.end;
        self.end += received.bytes;
        self.assign(before, received);
        Ok(true)
    }

    /// Joins the descriptors of one call, which received from `before` on, with a message.
    ///
    /// The kernel ends a call behind the bytes that one call of `sendmsg` has sent with descriptors,
    /// but not before them (`unix_stream_read_generic`). So what came last in this call came with
    /// them, and the message is the last one that starts in it: nobody sends the start of two
    /// messages in one call with descriptors. Where none starts, they are on no first byte.
    fn assign(&mut self, before: usize, received: Received) {
        let lost = usize::from(received.truncated);
        if self.fresh.is_empty() && lost == 0 {
            return;
        }
        let mut at = self.start;
        while let Ok(Some(size)) = self.measure(at) {
            match at.checked_add(size) {
                Some(next) if next < self.end => at = next,
                _ => break,
            }
        }
        if at < before {
            self.now.lost += self.fresh.len() + lost;
            self.fresh.clear();
            return;
        }
        let excess = self.fresh.len().saturating_sub(self.limits.descriptors);
        self.fresh.truncate(self.limits.descriptors);
        let descriptors = Descriptors {
            kept: std::mem::take(&mut self.fresh),
            lost: excess + lost,
        };
        if at == self.start {
            self.now = descriptors;
        } else {
            self.later = Some((at, descriptors));
        }
    }

    /// Makes room behind what is in the buffer: by moving that to the front, else by growing with
    /// what has come, so that a size alone makes nobody allocate.
    fn make_room(&mut self) {
        if self.buffer.is_empty() {
            self.buffer.resize(BUFFER, 0);
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.end < self.buffer.len() {
            return;
        }
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        } else {
            let most = self.limits.prefix + self.limits.message.max(BUFFER);
            let len = self.buffer.len();
            let grown = len.saturating_mul(2).min(most).max(len + 1);
            self.buffer.resize(grown, 0);
        }
    }

    /// Takes the first message, of which all is in the buffer.
    fn take(&mut self, size: usize) -> Message<'_> {
        let start = self.start;
        self.start += size;
        let descriptors = std::mem::take(&mut self.now);
        // INVARIANT: The message for which `later` is has its turn when the one before is taken.
        if let Some((_, later)) = self.later.take_if(|(at, _)| *at == self.start) {
            self.now = later;
        }
        Message {
            prefix: self.limits.prefix,
            bytes: &self.buffer[start..start + size],
            descriptors,
        }
    }

    /// Nothing more is received after this: what has come is given back.
    fn fail(&mut self, error: StreamError) {
        self.failed = Some(error);
        self.now = Descriptors::default();
        self.later = None;
        self.fresh = Vec::new();
        self.buffer = Vec::new();
        (self.start, self.end) = (0, 0);
    }
}
