// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stands between a vfio-user client and a server that may die, so that the client does not notice.
//!
//! A [`Supervisor`] has the socket, the connection and all descriptors. A server gets the client's
//! messages over a [link](Links::link), and serves it as any other client
//! ([`SocketTransport::from_fd`](crate::transport::SocketTransport::from_fd)); what it answers goes
//! to the client. When it is gone, another one may have the next link, and goes on where it was:
//!
//! | what                                    | kept by                                             |
//! |-----------------------------------------|-----------------------------------------------------|
//! | requests that were not answered         | the supervisor: given to the next server in their order, with their [numbers](crate::RequestId), as [replays](crate::Access::replay) |
//! | the version agreed upon                 | the supervisor                                      |
//! | mappings for DMA and their descriptors  | the supervisor                                      |
//! | interrupts: eventfds and masks          | the supervisor                                      |
//! | memory of mappable areas, [state](crate::State) | files, of which the supervisor has the descriptors |
//! | what the device was described as        | the supervisor: a server that differs is refused    |
//!
//! So a device keeps the promises that it keeps over `muser.ko`: with
//! [`State::once`](crate::State::once) nothing is lost and nothing happens twice. The price is one
//! hop for each message. Memory, interrupts and `ioeventfd`s need none: they go between client and
//! server directly; but no `ioeventfd` is offered to the client, for those of a server that is gone
//! would lead nowhere.
//!
//! With no server there, a request waits for one, for [`REATTACH_TIMEOUT`] if nothing else is said;
//! then it fails with `ETIMEDOUT`. One that 64 servers have died with fails with `EIO`.
//!
//! A supervisor trusts neither side. What it keeps is bounded, and who makes no sense is sent away.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};

use crate::error::{Error, Result};
use crate::server::{Ended, Stop};
use crate::transport::socket::door::{Door, Given, Knock, Listener, Single};
use crate::transport::ListenOptions;

mod asked;
mod candidate;
mod client;
mod device;
mod dirty;
mod files;
mod kept;
mod link;
mod relay;
mod requests;
mod vectors;

use candidate::Candidate;
use client::{Client, Stranger};
use device::Kept as KeptDevice;
use link::Program;

/// How long a request waits while no server is there, unless another time is set.
///
/// QEMU gives a device up that does not reply within 5 seconds (`x-msg-timeout`). An error that comes
/// before that costs one access.
pub const REATTACH_TIMEOUT: Duration = Duration::from_secs(4);

/// Servers that wait for their turn.
const MOST_CANDIDATES: usize = 16;
/// Clients that are told that another one is there.
const MOST_STRANGERS: usize = 8;
/// How long they may take to say who they are.
const STRANGERS_TIME: Duration = Duration::from_secs(1);

/// Stands between a client and its servers.
///
/// One thread [runs](Self::run_until) it, or takes [turns](Self::turn) with it. Servers get their
/// links from [`links`](Self::links), in any thread or process.
///
/// # Examples
///
/// A server in the same process; as a rule it is another one, which `muserctl supervise` starts.
///
/// ```no_run
/// use libmuser::supervise::Supervisor;
/// use libmuser::transport::SocketTransport;
/// use libmuser::{Bar, Device, PciBuilder, Server, Stop};
///
/// struct Null;
/// impl Device for Null {}
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut supervisor = Supervisor::listen("/run/null.sock".as_ref(), Default::default())?;
/// let (links, stop) = (supervisor.links(), Stop::new()?);
/// let stopped = stop.clone();
/// let supervising = std::thread::spawn(move || supervisor.run_until(&stopped));
///
/// let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
/// for _life in 0..2 {
///     let transport = SocketTransport::from_fd(links.link()?)?;
///     let mut server = Server::new(model.clone(), transport, |_| Ok(Null))?;
///     server.process()?;
/// }
/// stop.stop();
/// supervising.join().unwrap()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Supervisor {
    door: Box<dyn Door>,
    /// Whether nobody will come any more.
    shut: bool,
    links: Links,
    candidates: Vec<Candidate>,
    program: Option<Program>,
    /// What the programs have described, and the memory that they have made.
    device: Option<KeptDevice>,
    client: Option<Client>,
    /// Whether a client has gone of which the program has not wound up what it had.
    closing: bool,
    strangers: Vec<Stranger>,
    /// Requests so far: a number is never used again.
    sequence: u64,
    /// Since when nobody serves.
    unserved_since: Option<Instant>,
    reattach_timeout: Duration,
    counters: Counters,
}

/// What a supervisor has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Servers that have attached.
    pub attachments: u64,
    /// Requests that a server had and did not answer.
    pub replays: u64,
    /// Requests that nobody answered in time.
    pub timeouts: u64,
}

/// Makes the links of a [`Supervisor`] to its servers. A handle: clone it.
#[derive(Clone, Debug)]
pub struct Links {
    inner: Arc<Inbox>,
}

#[derive(Debug)]
struct Inbox {
    sockets: Mutex<Vec<OwnedFd>>,
    event: EventFd,
}

impl Links {
    fn new() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::io("making an eventfd", errno))?;
        let sockets = Mutex::default();
        let inner = Arc::new(Inbox { sockets, event });
        Ok(Self { inner })
    }

    /// A link for a server, which attaches by it as soon as none before it does. It is closed at an
    /// exec. When the server closes it, or dies, the supervisor knows that it is gone.
    ///
    /// # Errors
    ///
    /// The process has no file descriptors left.
    pub fn link(&self) -> Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (own, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|errno| Error::io("making a socket", errno))?;
        let sockets = self.inner.sockets.lock();
        sockets.unwrap_or_else(PoisonError::into_inner).push(own);
        // A full counter is readable just as well.
        let _ = self.inner.event.write(1);
        Ok(other)
    }

    fn take(&self) -> Vec<OwnedFd> {
        // It is not readable when nothing was made.
        let _ = self.inner.event.read();
        let sockets = self.inner.sockets.lock();
        std::mem::take(&mut *sockets.unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a turn waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Links,
    Door,
    Stranger(usize),
    Candidate(usize),
    Control,
    Stream,
    StreamTwin,
    Client,
    ClientTwin,
    Other,
}

impl Supervisor {
    /// Makes a socket file, and supervises for whoever connects to it, one client after the other.
    ///
    /// # Errors
    ///
    /// As [`SocketTransport::listen`](crate::transport::SocketTransport::listen).
    pub fn listen(path: &Path, options: ListenOptions) -> Result<Self> {
        Self::new(Box::new(Listener::new(path, options)?))
    }

    /// Supervises for whoever comes by a socket that somebody else has made: a listening one, or one
    /// that is connected to the only client there will be.
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`]: it is not such a socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        Self::new(match Given::of(&fd)? {
            Given::Listening => Box::new(Listener::from_fd(fd)?),
            Given::Connected => Box::new(Single::new(fd)?),
            Given::Supervised => {
                let message = "a supervisor is at the other end of the socket, and one is enough";
                return Err(Error::refused(libc::EINVAL, message));
            }
        })
    }

    fn new(door: Box<dyn Door>) -> Result<Self> {
        Ok(Self {
            door,
            shut: false,
            links: Links::new()?,
            candidates: Vec::new(),
            program: None,
            device: None,
            client: None,
            closing: false,
            strangers: Vec::new(),
            sequence: 0,
            unserved_since: Some(Instant::now()),
            reattach_timeout: REATTACH_TIMEOUT,
            counters: Counters::default(),
        })
    }

    /// Sets how long a request waits while no server is there.
    pub fn set_reattach_timeout(&mut self, timeout: Duration) {
        self.reattach_timeout = timeout;
    }

    /// Where servers get their links from.
    #[must_use]
    pub fn links(&self) -> Links {
        self.links.clone()
    }

    /// Whether a server is attached.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.program.is_some()
    }

    /// Whether a client is there.
    #[must_use]
    pub fn has_client(&self) -> bool {
        self.client.is_some()
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Supervises until `stop` is used, or the only client there is has gone.
    ///
    /// # Errors
    ///
    /// Waiting failed.
    pub fn run_until(&mut self, stop: &Stop) -> Result<Ended> {
        loop {
            if stop.is_used() {
                return Ok(Ended::Stopped);
            }
            if let Some(ended) = self.turn(None, &[stop.as_fd()])? {
                return Ok(ended);
            }
        }
    }

    /// Waits until there is something to do, and does it. It waits no longer than `timeout`, and not
    /// when one of `others` is readable. Tells whether it is over: there was one client, which has
    /// gone.
    ///
    /// # Errors
    ///
    /// Waiting failed.
    pub fn turn(
        &mut self,
        timeout: Option<Duration>,
        others: &[BorrowedFd<'_>],
    ) -> Result<Option<Ended>> {
        for source in self.wait(timeout, others)? {
            match source {
                Source::Links => self.meet_candidates(),
                Source::Door => self.answer_door(),
                Source::Stranger(at) => self.turn_away(at),
                Source::Candidate(at) => self.hear(at),
                Source::Control => self.hear_program(),
                Source::Stream => self.take_from_program(),
                Source::StreamTwin => self.take_from_program_twin(),
                Source::Client => self.take_from_client(),
                Source::ClientTwin => self.take_from_client_twin(),
                Source::Other => {}
            }
        }
        self.candidates.retain(|candidate| !candidate.is_done());
        let now = Instant::now();
        self.strangers.retain(|stranger| stranger.until > now);
        self.seat_candidate();
        self.expire(now);
        self.pump();
        let over = self.shut && self.client.is_none() && !(self.closing && self.program.is_some());
        Ok(over.then_some(Ended::Removed))
    }

    /// Waits; returns what is ready.
    fn wait(&self, timeout: Option<Duration>, others: &[BorrowedFd<'_>]) -> Result<Vec<Source>> {
        let mut sources = Vec::with_capacity(12);
        let mut polled = Vec::with_capacity(12);
        // What a receiver has buffered does not make its socket readable.
        let mut buffered = Vec::new();
        let mut watch = |source, fd, receive, send| {
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, receive);
            events.set(PollFlags::POLLOUT, send);
            if !events.is_empty() {
                sources.push(source);
                polled.push(PollFd::new(fd, events));
            }
        };
        watch(Source::Links, self.links.inner.event.as_fd(), true, false);
        for (at, stranger) in self.strangers.iter().enumerate() {
            watch(Source::Stranger(at), stranger.as_fd(), true, false);
        }
        for (at, candidate) in self.candidates.iter().enumerate() {
            watch(Source::Candidate(at), candidate.as_fd(), true, false);
        }
        let (backlog, twin_backlog) = self.client.as_ref().map_or((false, false), |client| {
            let twin = client.twin.as_ref();
            let twin = twin.is_some_and(|twin| twin.sender.has_backlog());
            (client.main.sender.has_backlog(), twin)
        });
        if let Some(program) = &self.program {
            watch(Source::Control, program.control.as_fd(), true, false);
            if let Some(stream) = program.stream.as_ref().filter(|stream| !stream.ended) {
                // What the client does not take is left to the program.
                let send = stream.wants_to_send();
                watch(Source::Stream, stream.sender.as_fd(), !backlog, send);
                if !backlog && stream.receiver.is_ready() {
                    buffered.push(Source::Stream);
                }
                if let Some((sender, receiver)) = &stream.twin {
                    let send = sender.has_backlog();
                    watch(Source::StreamTwin, sender.as_fd(), !twin_backlog, send);
                    if !twin_backlog && receiver.is_ready() {
                        buffered.push(Source::StreamTwin);
                    }
                }
            }
        }
        if let Some(client) = &self.client {
            let wanted = client.is_wanted();
            watch(Source::Client, client.main.sender.as_fd(), wanted, backlog);
            if wanted && client.main.receiver.is_ready() {
                buffered.push(Source::Client);
            }
            if let Some(twin) = &client.twin {
                watch(Source::ClientTwin, twin.sender.as_fd(), true, twin_backlog);
                if twin.receiver.is_ready() {
                    buffered.push(Source::ClientTwin);
                }
            }
        }
        // Last: who has gone by now makes room for who has come.
        if self.wants_door() {
            watch(Source::Door, self.door.as_fd(), true, false);
        }
        for other in others {
            watch(Source::Other, *other, true, false);
        }
        let now = Instant::now();
        let deadline = self.deadline();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
        let left = match (timeout, left) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let left = if buffered.is_empty() {
            left
        } else {
            Some(Duration::ZERO)
        };
        match poll(&mut polled, to_poll(left)) {
            Ok(_) => {}
            Err(Number::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(Error::io("waiting", errno)),
        }
        let ready = polled.iter().zip(sources);
        let ready = ready.filter(|(polled, _)| polled.any() == Some(true));
        buffered.extend(ready.map(|(_, source)| source));
        Ok(buffered)
    }

    /// When something is due that nobody announces.
    fn deadline(&self) -> Option<Instant> {
        let strangers = self.strangers.iter().map(|stranger| stranger.until);
        let program = self.program.as_ref().and_then(|program| program.deadline);
        let request = self.unserved_since.and_then(|since| {
            let oldest = self.client.as_ref()?.requests.oldest()?;
            Some(oldest.max(since) + self.reattach_timeout)
        });
        let leaves = self.client.as_ref().and_then(|client| client.leaves);
        let all = strangers.chain(program).chain(request).chain(leaves);
        all.min()
    }

    /// Whether it matters who is at the door.
    fn wants_door(&self) -> bool {
        if self.shut || self.closing {
            return false;
        }
        match &self.client {
            // Its place is free in a moment.
            Some(client) if client.has_hung_up() => false,
            Some(_) => self.door.refuses() && self.strangers.len() < MOST_STRANGERS,
            None => true,
        }
    }

    fn answer_door(&mut self) {
        // Somebody may have gone since the wait.
        if !self.wants_door() {
            return;
        }
        let knock = self.door.accept().unwrap_or_else(|error| {
            // The process may have too many descriptors for now.
            log::warn!("{error}");
            Knock::Nobody
        });
        match knock {
            Knock::Nobody => {}
            Knock::Closed => self.shut = true,
            Knock::Client(socket) if self.client.is_some() => {
                log::warn!("a client is turned away: another one is there");
                let until = Instant::now() + STRANGERS_TIME;
                self.strangers.push(Stranger::new(socket, until));
            }
            Knock::Client(socket) => {
                log::info!("a client has connected");
                self.client = Some(Client::new(socket));
                self.shut = !self.door.refuses();
                self.open_stream();
            }
        }
    }

    fn turn_away(&mut self, at: usize) {
        if let Some(stranger) = self.strangers.get_mut(at)
            && stranger.turn_away()
        {
            // It is taken out with those that are late.
            stranger.until = Instant::now();
        }
    }
}

/// The time as `poll` takes it, rounded up, so that it is not polled again and again in the last
/// millisecond.
fn to_poll(left: Option<Duration>) -> PollTimeout {
    let Some(left) = left else {
        return PollTimeout::NONE;
    };
    let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests;
