// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way to one program: its control socket, and while a client is there, the stream over which it
//! gets the client's messages.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use zerocopy::IntoBytes;

use super::kept::{Kept, Step};
use super::requests::Requests;
use crate::error::{Errno, Error, Result};
use crate::vfio_user::control::{self, Packet};
use crate::vfio_user::link::Prefix;
use crate::vfio_user::stream::{split, Limits, Progress, Receiver, Sender, StreamError};
use crate::vfio_user::wire::{max_message, Header, DEFAULT_DATA, HEADER, MAX_FDS};

/// Messages of the set-up that are under way at one time: their descriptors count against a limit of
/// the user (unix(7), `ETOOMANYREFS`).
const SETTING_UP: usize = 64;
/// Bytes kept for a program that does not receive, before it is given up.
const BACKLOG: usize = 32 << 20;
/// How long a program may take for what is no request: to set a session up, or to wind it up.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A stream's limits.
pub(super) const fn limits(prefix: usize) -> Limits {
    Limits {
        message: max_message(DEFAULT_DATA),
        descriptors: MAX_FDS,
        prefix,
        backlog: BACKLOG,
    }
}

/// A program that serves.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) control: OwnedFd,
    pub(super) stream: Option<Stream>,
    /// When it has to be done with what it was told.
    pub(super) deadline: Option<Instant>,
}

/// The stream of a program, while a client is there.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    /// For what the program asks for, if the client has such a socket too.
    pub(super) twin: Option<(Sender, Receiver)>,
    /// What is still to be set up.
    steps: VecDeque<Step>,
    /// What was sent of it and not answered.
    unanswered: VecDeque<Step>,
    /// The program has closed it; it will say why by what comes next on the control socket.
    pub(super) ended: bool,
}

/// What is wrong with a program, as the end of a sentence.
pub(super) type Fault = String;

impl Program {
    pub(super) fn new(control: OwnedFd) -> Self {
        Self {
            control,
            stream: None,
            deadline: None,
        }
    }

    /// Tells the program of a client, with which it has to do what `kept` says first.
    pub(super) fn open(&mut self, kept: &Kept) -> Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, flags);
        let (own, other) = pair.map_err(|errno| Error::io("making a socket", errno))?;
        let steps: VecDeque<_> = kept.steps().into();
        let setup = u32::try_from(steps.len()).unwrap_or(u32::MAX);
        self.tell(&Packet::Session { setup }, &[other.as_fd()])?;
        if setup > 0 {
            self.deadline = Some(Instant::now() + PATIENCE);
        }
        let (sender, receiver) = split(own, limits(Prefix::SIZE));
        self.stream = Some(Stream {
            sender,
            receiver,
            twin: None,
            steps,
            unanswered: VecDeque::new(),
            ended: false,
        });
        Ok(())
    }

    /// Tells the program that the client has gone.
    pub(super) fn close(&mut self) {
        self.stream = None;
        self.deadline = Some(Instant::now() + PATIENCE);
    }

    /// Sends a packet on the control socket.
    pub(super) fn tell(&self, packet: &Packet, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        control::send(self.control.as_fd(), packet, descriptors)
            .map_err(|errno| Error::io("telling the program", errno))
    }
}

impl Stream {
    /// Sends what is to be set up, then requests, as much as the socket takes. Requests that can't
    /// be sent for a reason of their own are returned with it.
    pub(super) fn pump(
        &mut self,
        kept: &Kept,
        requests: &mut Requests,
    ) -> Result<Vec<(u64, Errno)>, Fault> {
        let mut failed = Vec::new();
        if self.ended {
            return Ok(failed);
        }
        // That it has gone is for the receiver to find, behind what has come before.
        if self.sender.flush().is_err() {
            return Ok(failed);
        }
        while !self.sender.has_backlog() {
            if !self.steps.is_empty() {
                if self.unanswered.len() >= SETTING_UP {
                    return Ok(failed);
                }
                self.set_up(kept)?;
                continue;
            }
            // Until it has agreed to all of it, requests are nobody's, and may expire.
            if !self.unanswered.is_empty() {
                return Ok(failed);
            }
            let Some((number, request)) = requests.next() else {
                return Ok(failed);
            };
            let flags = if request.is_replay() {
                Prefix::REPLAY
            } else {
                0
            };
            let prefix = Prefix { number, flags };
            let fds: Vec<_> = request.descriptors.iter().map(AsFd::as_fd).collect();
            request.given = true;
            match send(
                &mut self.sender,
                Some(prefix),
                request.header,
                &request.payload,
                &fds,
            ) {
                Ok(()) => {}
                Err(StreamError::Socket(errno)) => {
                    let errno = Errno::new(errno as i32).unwrap_or(Errno::EIO);
                    failed.push((number, errno));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(failed)
    }

    fn set_up(&mut self, kept: &Kept) -> Result<(), Fault> {
        let Some(step) = self.steps.pop_front() else {
            return Ok(());
        };
        let (command, payload, fds) = kept.message(&step);
        let header = Header::command(0, command);
        self.forward(header, &payload, &fds)
            .map_err(|error| format!("{command} can't be given to it: {error}"))?;
        self.unanswered.push_back(step);
        Ok(())
    }

    /// Sends a message that is no request of the client's.
    pub(super) fn forward(
        &mut self,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), StreamError> {
        send(
            &mut self.sender,
            Some(Prefix::default()),
            header,
            payload,
            fds,
        )
    }

    /// The step that a reply is for.
    pub(super) fn answered_step(&mut self) -> Option<Step> {
        self.unanswered.pop_front()
    }

    /// Whether everything is set up.
    pub(super) fn is_set_up(&self) -> bool {
        self.steps.is_empty() && self.unanswered.is_empty()
    }

    /// Whether there is something to send as soon as the socket takes more.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.ended && self.sender.has_backlog()
    }
}

/// Sends a message, or keeps it.
///
/// # Errors
///
/// It can't be sent, but the stream goes on ([`StreamError::Socket`]); or the other side does not
/// receive ([`StreamError::Long`]). That the other side has gone is none: who receives finds that,
/// behind what has come before.
pub(super) fn send(
    sender: &mut Sender,
    prefix: Option<Prefix>,
    header: Header,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), StreamError> {
    let size = HEADER + payload.len();
    let header = Header {
        size: u32::try_from(size).unwrap_or(u32::MAX),
        ..header
    };
    let prefix = prefix.as_ref().map_or(&[][..], IntoBytes::as_bytes);
    match sender.send(&[prefix, header.as_bytes(), payload], fds) {
        Ok(Progress::Sent | Progress::Kept) => Ok(()),
        Ok(Progress::Full) => Err(StreamError::Long {
            size,
            limit: BACKLOG,
        }),
        Err(error) if error.is_closed() => Ok(()),
        Err(error) => Err(error),
    }
}
