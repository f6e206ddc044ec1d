// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client: its connection, what it has asked for, and what it has set up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use zerocopy::IntoBytes;

use super::asked::Asks;
use super::dirty::Lost;
use super::kept::Kept;
use super::link::{limits, send};
use super::requests::{ReplyTo, Request, Requests};
use crate::error::{Errno, Result};
use crate::vfio_user::capabilities::Capabilities;
use crate::vfio_user::stream::{split, Descriptors, Receiver, Sender, StreamError};
use crate::vfio_user::wire::payload;
use crate::vfio_user::wire::request::{ClientRequest, Version};
use crate::vfio_user::wire::{Command, Header};

/// What a client may have under way, in bytes, before nothing more is received of it.
const SOFT: usize = 16 << 20;
/// The same while the program waits for an answer of the client's, which may be behind its requests.
const HARD: usize = 64 << 20;

/// How long what a client has asked for may take that has gone, while another one may be waiting.
const FAREWELL: Duration = Duration::from_secs(5);

/// A socket to the client, and what programs have asked for over it.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    pub(super) asks: Asks,
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) main: Channel,
    pub(super) twin: Option<Channel>,
    pub(super) requests: Requests,
    pub(super) kept: Kept,
    /// What programs that are gone knew of dirty pages.
    pub(super) lost: Lost,
    /// Set when it has said its last: until when what it has asked for is done all the same.
    pub(super) leaves: Option<Instant>,
    /// Programs in a row that have refused to take over what it has set up.
    pub(super) setups_refused: u32,
}

/// Why a client is not served any more, as the end of a sentence.
pub(super) type Reason = String;

impl Channel {
    fn new(socket: OwnedFd) -> Self {
        let (sender, receiver) = split(socket, limits(0));
        Self {
            sender,
            receiver,
            asks: Asks::default(),
        }
    }

    /// Sends what a program asks for, under an id that is free.
    pub(super) fn ask(
        &mut self,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), &'static str> {
        let asked = self.asks.ask(header.id);
        let id = asked.map_err(|_| "it asks for too much at a time")?;
        let header = Header { id, ..header };
        send(&mut self.sender, None, header, payload, fds)
            .map_err(|_| "what it asks for can't be sent to the client")
    }
}

impl Client {
    /// Whether it has closed the connection, of which the rest may not be read yet.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(self.main.sender.as_fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }

    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            main: Channel::new(socket),
            twin: None,
            requests: Requests::new(),
            kept: Kept::default(),
            lost: Lost::default(),
            leaves: None,
            setups_refused: 0,
        }
    }

    /// Whether more is to be received of it.
    pub(super) fn is_wanted(&self) -> bool {
        if self.leaves.is_some() {
            return false;
        }
        let waiting = self.main.asks.is_waiting();
        self.requests.cost() < if waiting { HARD + SOFT } else { SOFT }
    }

    /// It says nothing more, but what it has asked for before is done, as far as that takes no answer
    /// of its.
    pub(super) fn leave(&mut self) {
        self.leaves.get_or_insert_with(|| Instant::now() + FAREWELL);
    }

    /// Whether nothing is left to be done for one that has said its last.
    pub(super) fn has_left(&self, now: Instant) -> bool {
        let twin = self.twin.as_ref();
        let asked = self.main.asks.is_waiting() || twin.is_some_and(|twin| twin.asks.is_waiting());
        let idle = self.requests.len() == 0 && !self.main.sender.has_backlog();
        self.leaves
            .is_some_and(|until| idle || asked || until <= now)
    }

    /// A command has come.
    ///
    /// # Errors
    ///
    /// The client can't be served any more.
    pub(super) fn asked(
        &mut self,
        header: Header,
        body: Vec<u8>,
        descriptors: Descriptors,
        sequence: &mut u64,
    ) -> Result<(), Reason> {
        if self.main.asks.is_waiting() && self.requests.cost() > HARD {
            return Err("it asks on and on, and does not answer the device".into());
        }
        let reply_to = match header.is_unanswered() {
            true => ReplyTo::Nobody,
            false => ReplyTo::Client(header),
        };
        if descriptors.lost() > 0 {
            log::warn!("a command of the client's is refused: it came with {descriptors}");
            return self.refuse(reply_to, EMFILE, sequence);
        }
        let request = |header, payload, reply_to, descriptors| Request {
            header,
            payload,
            descriptors,
            reply_to,
            since: Instant::now(),
            deaths: 0,
            given: false,
        };
        if header.command == Command::RegionWriteMulti.number()
            && let Ok(Some(ClientRequest::WriteMulti(writes))) =
                ClientRequest::parse(Command::RegionWriteMulti, &body)
            && !writes.is_empty()
        {
            let name = self.requests.add_several(header, writes.len() as u64);
            for write in (0..writes.len()).filter_map(|at| writes.nth(at)) {
                let fixed = payload::RegionAccess {
                    offset: write.access.offset,
                    region: write.access.region,
                    count: write.access.count,
                };
                let payload = [fixed.as_bytes(), write.data()].concat();
                // Without a reply: then nothing behind it is begun before it has ended.
                let header = Header::command(0, Command::RegionWrite).unanswered();
                let part = request(header, payload, ReplyTo::Several(name), Vec::new());
                self.requests.add(part, sequence);
            }
            return Ok(());
        }
        let request = request(header, body, reply_to, descriptors.into_kept());
        self.requests.add(request, sequence);
        Ok(())
    }

    /// A request has ended.
    ///
    /// # Errors
    ///
    /// The client can't be served any more.
    pub(super) fn answer(
        &mut self,
        to: ReplyTo,
        result: Result<(), Errno>,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        sequence: &mut u64,
    ) -> Result<(), Reason> {
        match to {
            ReplyTo::Client(header) => self.reply(header.reply(result), body, fds),
            ReplyTo::Several(name) => match self.requests.end_one(name, result, sequence) {
                Some((header, result)) if !header.is_unanswered() => {
                    let done = result.map(|count| payload::WriteMulti { count });
                    let body = done.as_ref().map_or(&[][..], |done| done.as_bytes());
                    self.reply(header.reply(result.map(drop)), body, &[])
                }
                _ => Ok(()),
            },
            ReplyTo::Nobody => {
                if let Err(errno) = result {
                    log::debug!("a command without a reply has failed: {errno}");
                }
                Ok(())
            }
        }
    }

    /// A request has failed.
    pub(super) fn refuse(
        &mut self,
        to: ReplyTo,
        errno: Errno,
        sequence: &mut u64,
    ) -> Result<(), Reason> {
        self.answer(to, Err(errno), &[], &[], sequence)
    }

    fn reply(&mut self, header: Header, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Reason> {
        match send(&mut self.main.sender, None, header, body, fds) {
            Ok(()) => Ok(()),
            Err(StreamError::Long { .. }) => Err("it does not receive its replies".into()),
            // There is no room for its descriptors.
            Err(error) => {
                log::warn!("a reply can't be sent: {error}");
                let header = Header {
                    size: 0,
                    ..header.reply(Err(EMFILE))
                };
                send(&mut self.main.sender, None, header, &[], &[])
                    .map_err(|error| error.to_string())
            }
        }
    }

    /// The program has agreed to a version; it may have made a socket for what it asks for, instead of
    /// which the client gets one of ours, since it is to outlive the program. Returns the
    /// program's.
    pub(super) fn negotiated(
        &mut self,
        request: Request,
        body: &[u8],
        descriptors: Vec<OwnedFd>,
        sequence: &mut u64,
    ) -> Result<Option<OwnedFd>, Reason> {
        let twin = twin(body, descriptors);
        let mut given = None;
        if twin.is_some() {
            let flags = SockFlag::SOCK_CLOEXEC;
            let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, flags);
            let (own, other) = pair.map_err(|errno| format!("no socket can be made: {errno}"))?;
            self.twin = Some(Channel::new(own));
            given = Some(other);
        }
        self.kept.negotiated(request.payload, body.to_vec());
        let fds: Vec<_> = given.iter().map(std::os::fd::AsFd::as_fd).collect();
        self.answer(request.reply_to, Ok(()), body, &fds, sequence)?;
        Ok(twin)
    }

    /// What programs that are gone had asked for is for nobody.
    pub(super) fn forget_program(&mut self) {
        self.main.asks.forget();
        if let Some(twin) = &mut self.twin {
            twin.asks.forget();
        }
        if let Some(logging) = self.kept.logging() {
            self.lost.add(logging);
        }
    }
}

/// The second socket that a reply to VERSION has brought.
pub(super) fn twin(body: &[u8], descriptors: Vec<OwnedFd>) -> Option<OwnedFd> {
    let version = Version::parse(body).ok()?;
    let capabilities = Capabilities::parse(version.data).ok()?;
    if !capabilities.has_twin_socket() {
        return None;
    }
    descriptors.into_iter().next()
}

const EMFILE: Errno = match Errno::new(libc::EMFILE) {
    Some(errno) => errno,
    None => Errno::EIO,
};

/// Somebody who comes while another client is there: told so, and sent away.
#[derive(Debug)]
pub(super) struct Stranger {
    sender: Sender,
    receiver: Receiver,
    pub(super) until: Instant,
}

impl Stranger {
    pub(super) fn new(socket: OwnedFd, until: Instant) -> Self {
        let (sender, receiver) = split(socket, limits(0));
        Self {
            sender,
            receiver,
            until,
        }
    }

    /// Answers the first message; tells whether that is done, or can't be.
    pub(super) fn turn_away(&mut self) -> bool {
        match self.receiver.receive() {
            Ok(None) => false,
            Ok(Some(message)) => {
                let header = Header::parse(message.header()).unwrap_or_default();
                let reply = header.reply(Err(Errno::EBUSY));
                // It is small: it is sent now or never.
                let _ = send(&mut self.sender, None, reply, &[], &[]);
                true
            }
            Err(_) => true,
        }
    }
}

impl std::os::fd::AsFd for Stranger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sender.as_fd()
    }
}
