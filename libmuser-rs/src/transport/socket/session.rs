// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One connection: its streams, what was negotiated, and messages that have come and can't be
//! handled yet.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::{FromBytes, IntoBytes};

use super::events::{Events, Source, Watch};
use super::remote::Exchanges;
use crate::error::{Errno, Result};
use crate::vfio_user::capabilities::Capabilities;
use crate::vfio_user::link::Prefix;
use crate::vfio_user::stream::{
    split, wait, Descriptors, Limits, Progress, Ready, Receiver, Sender, StreamError,
};
use crate::vfio_user::wire::{max_message, Command, Header, Kind, DEFAULT_DATA, HEADER, MAX_FDS};

/// Bytes of data in a message that this side takes (`max_data_xfer_size`).
pub(super) const MAX_DATA: usize = DEFAULT_DATA;
/// Bytes of messages which wait for others to be handled: beyond them nothing more is received.
pub(super) const MAX_QUEUED: usize = 64 << 20;

/// Messages that are received at once for later: a client that sends without end must not keep
/// whoever receives them.
const PUMPED: usize = 256;
/// Descriptors of such messages.
const MAX_RIDERS: usize = 256;

/// What goes before the messages of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// Nothing: a client is at the other end.
    Plain,
    /// A [`Prefix`]: a supervisor is.
    Numbered,
}

/// One of a session's sockets.
#[derive(Debug)]
pub(super) struct Channel {
    framing: Framing,
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    source: Source,
    watch: Watch,
}

/// A message, but for the bytes behind its header.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) header: Header,
    pub(super) prefix: Prefix,
    pub(super) descriptors: Descriptors,
}

/// Who gets a reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplyTo {
    pub(super) session: u64,
    header: Header,
    prefix: Prefix,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) main: Channel,
    /// For what this side asks for.
    pub(super) twin: Option<Channel>,
    /// What the client can, once a version is agreed upon.
    pub(super) peer: Option<Capabilities>,
    /// Descriptors that it may send in one message.
    pub(super) fds: usize,
    queue: VecDeque<(Incoming, Vec<u8>)>,
    queued: usize,
    /// Descriptors of messages that wait.
    riders: usize,
    pub(super) exchanges: Exchanges,
    /// Why nothing more is received.
    pub(super) ended: Option<String>,
    /// Whether the client has hung up; what it has sent before may be there still.
    hung_up: bool,
    /// Whether the next command waits for the requests in flight.
    pub(super) waits: bool,
    /// Whether that command, which may be looked at again, comes before what is signalled from now
    /// on.
    pub(super) first: bool,
    watched: bool,
}

impl ReplyTo {
    /// Whether nobody waits for the reply.
    pub(super) const fn is_posted(&self) -> bool {
        self.header.is_unanswered()
    }

    /// Whether an earlier server was given the command, and has not answered it.
    pub(super) const fn is_replay(&self) -> bool {
        self.prefix.flags & Prefix::REPLAY != 0
    }

    /// The number that a supervisor has given it; 0 without one.
    pub(super) const fn number(&self) -> u64 {
        self.prefix.number
    }
}

impl Channel {
    pub(super) fn new(
        socket: OwnedFd,
        framing: Framing,
        source: Source,
        events: &Events,
    ) -> Result<Self> {
        let limits = Limits {
            message: max_message(MAX_DATA),
            descriptors: MAX_FDS,
            prefix: match framing {
                Framing::Plain => 0,
                Framing::Numbered => Prefix::SIZE,
            },
            // Commands are neither handled nor sent while anything is kept, so it is little.
            backlog: usize::MAX,
        };
        let (sender, receiver) = split(socket, limits);
        events.add(&sender, source, Watch::RECEIVE)?;
        Ok(Self {
            framing,
            sender,
            receiver,
            source,
            watch: Watch::RECEIVE,
        })
    }

    pub(super) const fn framing(&self) -> Framing {
        self.framing
    }

    /// Whether there is a message, or the end, without the socket.
    pub(super) fn is_ready(&self) -> bool {
        self.receiver.is_ready()
    }

    /// Watches the socket for what it is worth watching.
    pub(super) fn watch(&mut self, receive: bool, events: &Events) -> Result<()> {
        let watch = Watch {
            receive,
            send: self.sender.has_backlog(),
        };
        if watch != self.watch {
            events.change(&self.sender, self.source, watch)?;
            self.watch = watch;
        }
        Ok(())
    }

    /// Waits until there is something to receive, or room for what is to be sent.
    pub(super) fn wait(&self) -> std::result::Result<(), StreamError> {
        let wanted = Ready {
            receive: true,
            send: self.sender.has_backlog(),
        };
        wait(self.sender.as_fd(), wanted, None).map(drop)
    }

    /// Receives a message, if a whole one is there; its bytes behind the header go to `body`.
    pub(super) fn receive(
        &mut self,
        body: &mut Vec<u8>,
    ) -> std::result::Result<Option<Incoming>, StreamError> {
        let Some(message) = self.receiver.receive()? else {
            return Ok(None);
        };
        body.clear();
        body.extend_from_slice(message.body());
        // Both are as long as they have to be.
        let header = Header::parse(message.header()).unwrap_or_default();
        let prefix = Prefix::read_from_bytes(message.prefix()).unwrap_or_default();
        Ok(Some(Incoming {
            header,
            prefix,
            descriptors: message.descriptors,
        }))
    }

    /// Sends a message, or keeps what the socket does not take. A payload has three parts at most.
    pub(super) fn send(
        &mut self,
        prefix: Prefix,
        header: Header,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), Errno> {
        let size = HEADER + payload.iter().map(|part| part.len()).sum::<usize>();
        let size = u32::try_from(size).map_err(|_| Errno::EIO)?;
        let header = Header { size, ..header };
        let number = Prefix {
            number: prefix.number,
            flags: 0,
        };
        let prefixed: &[u8] = match self.framing {
            Framing::Plain => &[],
            Framing::Numbered => number.as_bytes(),
        };
        let mut start = [0; HEADER + Prefix::SIZE];
        let used = prefixed.len() + HEADER;
        start[..prefixed.len()].copy_from_slice(prefixed);
        start[prefixed.len()..used].copy_from_slice(header.as_bytes());
        let mut parts = [&[][..]; 4];
        parts[0] = &start[..used];
        for (part, bytes) in parts[1..].iter_mut().zip(payload) {
            *part = bytes;
        }
        match self.sender.send(&parts[..=payload.len().min(3)], fds) {
            Ok(Progress::Sent | Progress::Kept) => Ok(()),
            Ok(Progress::Full) => Err(Errno::ENOMEM),
            // That it has gone is for the receiver to find, behind what has come before.
            Err(error) if error.is_closed() => Ok(()),
            Err(StreamError::Socket(errno)) => Err(to_errno(errno)),
            Err(_) => Err(Errno::EIO),
        }
    }
}

impl Session {
    pub(super) fn new(
        number: u64,
        socket: OwnedFd,
        framing: Framing,
        events: &Events,
    ) -> Result<Self> {
        Ok(Self {
            number,
            main: Channel::new(socket, framing, Source::Main, events)?,
            twin: None,
            peer: None,
            fds: MAX_FDS,
            queue: VecDeque::new(),
            queued: 0,
            riders: 0,
            exchanges: Exchanges::default(),
            ended: None,
            hung_up: false,
            waits: false,
            first: false,
            watched: true,
        })
    }

    /// The next message, in the order in which they came; its bytes behind the header go to `body`.
    pub(super) fn next(
        &mut self,
        body: &mut Vec<u8>,
    ) -> std::result::Result<Option<Incoming>, StreamError> {
        if let Some((incoming, queued)) = self.queue.pop_front() {
            self.queued -= cost(&incoming, &queued);
            self.riders -= incoming.descriptors.kept().len();
            *body = queued;
            return Ok(Some(incoming));
        }
        self.main.receive(body)
    }

    /// Puts a message back that could not be handled.
    pub(super) fn put_back(&mut self, incoming: Incoming, body: Vec<u8>) {
        self.queued += cost(&incoming, &body);
        self.riders += incoming.descriptors.kept().len();
        self.queue.push_front((incoming, body));
    }

    /// Puts a message behind those which wait.
    pub(super) fn put_behind(&mut self, incoming: Incoming, body: Vec<u8>) {
        self.queued += cost(&incoming, &body);
        self.riders += incoming.descriptors.kept().len();
        self.queue.push_back((incoming, body));
    }

    /// Whether somebody waits for a reply that comes along with commands.
    pub(super) fn awaits_reply(&self) -> bool {
        self.twin.is_none() && self.exchanges.are_awaited()
    }

    /// Whether so much waits that nothing more is received.
    pub(super) fn is_full(&self) -> bool {
        self.queued >= MAX_QUEUED || self.riders >= MAX_RIDERS
    }

    /// Whether there is a message, or the end, without the socket.
    pub(super) fn is_ready(&self) -> bool {
        self.is_over() || !self.queue.is_empty() || self.main.receiver.is_ready()
    }

    /// Whether its next message can't be handled yet: requests are in flight, or it does not receive
    /// its replies. To who has gone nothing is sent any more.
    pub(super) fn is_blocked(&self) -> bool {
        self.waits || self.main.sender.has_backlog() && !self.is_over()
    }

    /// Ends the session: what waits is not handled any more.
    pub(super) fn end(&mut self, reason: String) {
        self.queue.clear();
        self.queued = 0;
        self.riders = 0;
        self.ended.get_or_insert(reason);
    }

    /// Where the reply to a message goes.
    pub(super) fn reply_to(&self, incoming: &Incoming) -> ReplyTo {
        ReplyTo {
            session: self.number,
            header: incoming.header,
            prefix: incoming.prefix,
        }
    }

    /// Whether a command is replied to: a supervisor has to know when it has ended. What is kept for
    /// a client that has gone is never sent, and must not grow.
    fn answers(&self, to: ReplyTo) -> bool {
        let is_lost = self.is_over() && self.main.sender.has_backlog();
        !is_lost && (self.main.framing == Framing::Numbered || !to.is_posted())
    }

    /// Replies, if a reply is wanted.
    pub(super) fn reply(&mut self, to: ReplyTo, payload: &[&[u8]]) {
        self.reply_with(to, payload, &[]);
    }

    /// Replies with descriptors, if a reply is wanted.
    pub(super) fn reply_with(&mut self, to: ReplyTo, payload: &[&[u8]], fds: &[BorrowedFd<'_>]) {
        if !self.answers(to) {
            return;
        }
        let header = to.header.reply(Ok(()));
        if let Err(errno) = self.main.send(to.prefix, header, payload, fds) {
            self.refuse(to, errno, format_args!("the reply could not be sent"));
        }
    }

    /// Replies that a command failed. Why goes to the log: the client gets a number only.
    pub(super) fn refuse(&mut self, to: ReplyTo, errno: Errno, why: std::fmt::Arguments<'_>) {
        let name = Command::new(to.header.command).map_or("a command", Command::name);
        log::debug!("{name} is refused: {why} ({errno})");
        if self.answers(to) {
            let header = to.header.reply(Err(errno));
            if let Err(errno) = self.main.send(to.prefix, header, &[], &[]) {
                // It is small, and has no descriptors: the client would wait for it for ever.
                self.end(format!("an error could not be told: {errno}"));
            }
        }
    }

    /// Sends what is kept; tells whether all of it has gone.
    pub(super) fn flush(&mut self) -> bool {
        let channels = std::iter::once(&mut self.main).chain(&mut self.twin);
        let mut broken = None;
        for channel in channels {
            if channel.sender.has_backlog() {
                let _ = channel.sender.flush();
            }
            // A peer that has gone is found by receiving, behind what came before. Else what was
            // kept is lost, and nothing that is answered from now on would reach it.
            let failure = channel.sender.failure();
            broken = broken.or(failure.filter(|failure| !failure.is_closed()));
        }
        if let Some(failure) = broken {
            self.end(format!("a reply could not be sent: {failure}"));
        }
        !self.main.sender.has_backlog()
    }

    /// Bytes of data that a message may have, in either direction.
    pub(super) fn data(&self) -> usize {
        let theirs = self.peer.map_or(DEFAULT_DATA, |peer| peer.data());
        theirs.min(MAX_DATA)
    }

    /// Looks whether the client has hung up.
    pub(super) fn has_hung_up(&mut self) -> bool {
        let mut fds = [PollFd::new(self.main.sender.as_fd(), PollFlags::empty())];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0) {
            self.hung_up = true;
        }
        self.is_over()
    }

    /// Whether there will be nothing more from the client than what has come.
    pub(super) const fn is_over(&self) -> bool {
        self.hung_up || self.ended.is_some()
    }

    /// Whether a message has come that does not make a socket readable any more, and can be received
    /// for later.
    pub(super) fn can_pump(&self) -> bool {
        let twin = self.twin.as_ref();
        let main = self.main.is_ready() && !self.is_full();
        !self.is_over() && (main || twin.is_some_and(Channel::is_ready))
    }

    /// Receives what has come, for later; not without end.
    pub(super) fn pump(&mut self) {
        for _ in 0..PUMPED {
            if self.ended.is_some() || self.is_full() {
                return;
            }
            let mut body = Vec::new();
            match self.main.receive(&mut body) {
                Ok(Some(incoming)) => match incoming.header.kind() {
                    Ok(Kind::Reply(result)) => self.answer(&incoming, result, body),
                    _ => self.put_behind(incoming, body),
                },
                Ok(None) => return,
                Err(_) => {
                    // It says so again behind what has come before.
                    self.hung_up = true;
                    return;
                }
            }
        }
    }

    /// Receives replies from the second socket; not without end.
    pub(super) fn pump_twin(&mut self) {
        for _ in 0..PUMPED {
            if self.ended.is_some() {
                return;
            }
            let mut body = Vec::new();
            let Some(twin) = &mut self.twin else { return };
            let incoming = match twin.receive(&mut body) {
                Ok(Some(incoming)) => incoming,
                Ok(None) => return,
                Err(error) => return self.end(format!("the second socket: {error}")),
            };
            match incoming.header.kind() {
                Ok(Kind::Reply(result)) => self.answer(&incoming, result, body),
                _ => self.end("a command on the second socket".into()),
            }
        }
    }

    /// A reply has come.
    pub(super) fn answer(
        &mut self,
        incoming: &Incoming,
        result: std::result::Result<(), Errno>,
        body: Vec<u8>,
    ) {
        if let Err(what) = self.exchanges.answer(&incoming.header, result, body) {
            log::debug!("{what} is dropped");
        }
    }

    /// Watches the sockets for what it is worth watching.
    pub(super) fn watch(&mut self, events: &Events) -> Result<()> {
        if self.is_full() {
            // Of a socket that is not received from, the end shows all the same.
            self.has_hung_up();
        }
        if self.is_over() {
            if self.watched {
                self.watched = false;
                self.unwatch(events);
            }
            return Ok(());
        }
        let receive = !self.is_full();
        self.main.watch(receive, events)?;
        match &mut self.twin {
            Some(twin) => twin.watch(true, events),
            None => Ok(()),
        }
    }

    /// Stops watching its sockets.
    pub(super) fn unwatch(&self, events: &Events) {
        events.remove(self.main.sender.as_fd());
        if let Some(twin) = &self.twin {
            events.remove(twin.sender.as_fd());
        }
    }
}

/// What a message that waits takes. A process has few descriptors, so that a few hundred of them are
/// as much as can wait.
fn cost(incoming: &Incoming, body: &[u8]) -> usize {
    const DESCRIPTOR: usize = MAX_QUEUED / 256;
    let descriptors = incoming.descriptors.kept().len() * DESCRIPTOR;
    body.len() + descriptors + size_of::<(Incoming, Vec<u8>)>()
}

pub(super) fn to_errno(errno: nix::errno::Errno) -> Errno {
    Errno::new(errno as i32).unwrap_or(Errno::EIO)
}
