// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A connection to a server: commands out, each matched with its reply, and what the server asks for
//! answered meanwhile.
//!
//! No thread is forced on anyone. Of the threads that wait for something, one leads: it polls the
//! sockets, hands replies to the threads whose they are, and serves the server. The others are
//! parked. Whoever leads and has got what it waited for hands over to one of the others. So a thread
//! that is alone, as most are, gets its reply with one wake-up.
//!
//! Locks: `waiting` is never held while another is taken, nor over a system call that waits.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{shutdown, Shutdown};

use super::failure::{self, Failure};
use super::lent::LentMemory;
use crate::error::{Errno, Error, Result};
use crate::vfio_user::stream::{Descriptors, Progress, StreamError};
use crate::vfio_user::wire::{Command, Header};

mod channel;
mod receiving;
mod serving;
mod waiting;

use channel::send;
pub(super) use channel::Channel;
use waiting::{hand_over, Departure, Leading, Slot, Waiting};

/// Reply bodies whose memory is kept for the next.
const SPARE: usize = 8;

/// What came in reply to a command.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) result: Result<(), Errno>,
    pub(super) body: Vec<u8>,
    pub(super) descriptors: Descriptors,
}

/// What a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// The reply to the command with this id.
    Answer(u16),
    /// All that the main socket's sender keeps is sent.
    Flushed,
    /// The end of the client; until then whatever comes is served.
    End,
    /// Nothing: what is there is served.
    Nothing,
}

/// A connection after its negotiation.
#[derive(Debug)]
pub(super) struct Connection {
    main: Channel,
    /// On which the server asks, if there is one.
    twin: Option<Channel>,
    /// Whether a thread of its own serves the twin socket.
    twin_is_served: AtomicBool,
    waiting: Mutex<Waiting>,
    /// Has whoever leads look what else there is to wait for.
    kick: EventFd,
    /// Written once, at the end.
    end: EventFd,
    /// Has the thread that serves the twin socket look at the main one.
    stir: EventFd,
    ended: AtomicBool,
    lent: LentMemory,
    /// Bytes of data that the server may send or ask for in one message.
    data: usize,
    timeout: Duration,
    /// When the client has to be open, until it is.
    opening: Option<Instant>,
    /// Readable when there is something to serve.
    events: Epoll,
    /// For what is received and not served: it shows on no socket.
    inside: EventFd,
    watched: Mutex<Watched>,
    /// Commands of the server's that were refused.
    refused: AtomicU64,
}

/// What a connection's descriptor shows.
#[derive(Debug)]
struct Watched {
    inside: bool,
    /// Of each socket.
    wanted: [PollFlags; 2],
}

impl Connection {
    pub(super) fn new(
        main: Channel,
        twin: Option<Channel>,
        data: usize,
        timeout: Duration,
        opening: Option<Instant>,
    ) -> Result<Self> {
        let failed = |errno: Number| Error::io("making an epoll descriptor", errno);
        let events = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| Error::io("making an eventfd", errno))
        };
        let inside = event()?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        events.add(&inside, readable).map_err(failed)?;
        for channel in std::iter::once(&main).chain(&twin) {
            events.add(channel, readable).map_err(failed)?;
        }
        Ok(Self {
            main,
            twin,
            twin_is_served: AtomicBool::new(false),
            waiting: Mutex::default(),
            kick: event()?,
            end: event()?,
            stir: event()?,
            ended: AtomicBool::new(false),
            lent: LentMemory::default(),
            data,
            timeout,
            opening,
            events,
            inside,
            watched: Mutex::new(Watched {
                inside: false,
                wanted: [PollFlags::POLLIN; 2],
            }),
            refused: AtomicU64::new(0),
        })
    }

    /// The client is open: from now on each call has its own deadline.
    pub(super) const fn opened(&mut self) {
        self.opening = None;
    }

    /// What is readable when there is something to serve.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.events.0.as_fd()
    }

    /// The deadline of a call that begins.
    fn deadline(&self) -> Option<Instant> {
        let deadline = Instant::now().checked_add(self.timeout);
        match (deadline, self.opening) {
            (Some(deadline), Some(opening)) => Some(deadline.min(opening)),
            (deadline, opening) => deadline.or(opening),
        }
    }

    /// Has the descriptor show what nobody attends to: messages that were received, and replies
    /// that the server has to make room for.
    fn show(&self) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inside = false;
        for (at, channel) in self.channels().enumerate() {
            let wanted = channel.wanted();
            // What can't be answered must not keep it readable.
            let takes = wanted.contains(PollFlags::POLLIN);
            inside |= takes && channel.left.load(Ordering::Acquire);
            if wanted != watched.wanted[at] {
                let mut flags = EpollFlags::empty();
                flags.set(EpollFlags::EPOLLIN, takes);
                flags.set(EpollFlags::EPOLLOUT, wanted.contains(PollFlags::POLLOUT));
                // Of what is in there already, nothing can fail.
                let mut event = EpollEvent::new(flags, 0);
                let _ = self.events.modify(channel, &mut event);
                watched.wanted[at] = wanted;
                if self.twin_is_served.load(Ordering::Acquire) {
                    // It sends what others leave.
                    let _ = self.stir.write(1);
                }
            }
        }
        if inside != watched.inside {
            // The counter is 0 before the write, and 1 before the read.
            let _ = match inside {
                true => self.inside.write(1).map(drop),
                false => self.inside.read().map(drop),
            };
            watched.inside = inside;
        }
    }

    fn channels(&self) -> impl Iterator<Item = &Channel> {
        std::iter::once(&self.main).chain(&self.twin)
    }

    pub(super) fn lent(&self) -> &LentMemory {
        &self.lent
    }

    /// Sends a command, and waits for its reply, which is not an error.
    ///
    /// # Errors
    ///
    /// The server answered with an error, or not in time, or the connection is at its end.
    pub(super) fn call(
        &self,
        command: Command,
        payload: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer> {
        let deadline = self.deadline();
        let id = self.reserve(command)?;
        let header = Header::command(id, command);
        let answer = match self.push(header, payload, descriptors, deadline) {
            Ok(_) => self.wait(Goal::Answer(id), deadline)?,
            Err(error) => {
                let mut waiting = self.lock();
                waiting.slots.remove(&id);
                hand_over(waiting);
                return Err(error);
            }
        };
        let answer = answer.ok_or_else(|| failure::late(command, self.timeout))?;
        match answer.result {
            Ok(()) => Ok(answer),
            Err(errno) => Err(failure::refused(command, errno)),
        }
    }

    /// Sends a command to which no reply is wanted, and waits until the socket has it.
    ///
    /// # Errors
    ///
    /// The server does not receive it in time, or the connection is at its end.
    pub(super) fn post(&self, command: Command, payload: &[&[u8]]) -> Result<()> {
        let deadline = self.deadline();
        // No reply will have it, so it can be that of another command.
        let header = Header::command(0, command).unanswered();
        if self.push(header, payload, &[], deadline)? == Progress::Sent {
            return Ok(());
        }
        let flushed = self.wait(Goal::Flushed, deadline)?;
        flushed
            .map(drop)
            .ok_or_else(|| failure::unsent(self.timeout))
    }

    /// Gives the memory of an answer back.
    pub(super) fn done(&self, answer: Answer) {
        let mut waiting = self.lock();
        if waiting.spare.len() < SPARE {
            waiting.spare.push(answer.body);
        }
    }

    /// Serves what the server has asked for until now, without waiting.
    pub(super) fn serve(&self) -> Result<()> {
        self.wait(Goal::Nothing, Some(Instant::now())).map(drop)
    }

    /// Serves the server until the client ends, or the connection does.
    pub(super) fn serve_on(&self) {
        let serve = || match &self.twin {
            Some(twin) => {
                self.twin_is_served.store(true, Ordering::Release);
                if let Err(failure) = self.serve_twin(twin) {
                    self.fail(failure);
                }
            }
            // Whoever calls next is told of it.
            None => drop(self.wait(Goal::End, None)),
        };
        // What panics is memory of the user's, and the panic has been told. The server gets no
        // answer to that, and to what else it asks for it does.
        while catch_unwind(AssertUnwindSafe(serve)).is_err() {}
    }

    /// Ends the client's side.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        for event in [&self.kick, &self.end] {
            // It fails only if it is written to already.
            let _ = event.write(1);
        }
        if let Some(idle) = self.lock().idle.take() {
            idle.unpark();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an id that no command has whose reply is still to come.
    fn reserve(&self, command: Command) -> Result<u16> {
        let mut waiting = self.lock();
        if let Some(failure) = &waiting.failure {
            return Err(failure.to_error());
        }
        waiting.check_thread()?;
        if waiting.slots.len() > usize::from(u16::MAX) {
            let message = "the server has left 65536 commands unanswered";
            return Err(Error::new(Errno::EBUSY, message));
        }
        while waiting.slots.contains_key(&waiting.next) {
            waiting.next = waiting.next.wrapping_add(1);
        }
        let id = waiting.next;
        waiting.next = id.wrapping_add(1);
        let slot = Slot {
            command,
            thread: Some(thread::current()),
            answer: None,
        };
        waiting.slots.insert(id, slot);
        Ok(id)
    }

    /// Has the main socket's sender take a message: all of it, or nothing if that fails.
    fn push(
        &self,
        header: Header,
        payload: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<Progress> {
        let waiting = self.lock();
        if let Some(failure) = &waiting.failure {
            return Err(failure.to_error());
        }
        waiting.check_thread()?;
        drop(waiting);
        loop {
            let sent = send(&self.main, header, payload, descriptors);
            match sent {
                Ok(Progress::Sent) => return Ok(Progress::Sent),
                Ok(Progress::Kept) => {
                    self.show();
                    self.kick();
                    return Ok(Progress::Kept);
                }
                Ok(Progress::Full) => {
                    self.kick();
                    self.wait(Goal::Flushed, deadline)?
                        .ok_or_else(|| failure::unsent(self.timeout))?;
                }
                // Replies, of which one may say why, may have come before: whoever leads ends the
                // connection when it has them.
                Err(error) if error.is_closed() => {
                    self.kick();
                    return Ok(Progress::Kept);
                }
                Err(error) => return Err(Failure::from(error).to_error()),
            }
        }
    }

    fn kick(&self) {
        // It fails only if nobody has looked for 2^64 - 2 times.
        let _ = self.kick.write(1);
    }

    /// Waits for something; `None` if the deadline has passed. What is not an answer is an empty one.
    fn wait(&self, goal: Goal, deadline: Option<Instant>) -> Result<Option<Answer>> {
        let _departure = Departure(self, goal);
        loop {
            let mut waiting = self.lock();
            if let Goal::Answer(id) = goal {
                let answer = waiting
                    .slots
                    .get_mut(&id)
                    .and_then(|slot| slot.answer.take());
                if let Some(answer) = answer {
                    waiting.slots.remove(&id);
                    return Ok(Some(answer));
                }
            }
            if let Some(failure) = &waiting.failure {
                let error = failure.to_error();
                match goal {
                    Goal::Answer(id) => drop(waiting.slots.remove(&id)),
                    Goal::Flushed => waiting.leave_flushing(),
                    Goal::End | Goal::Nothing => {}
                }
                return Err(error);
            }
            let is_late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            match goal {
                Goal::End if self.ended.load(Ordering::Acquire) => return Ok(None),
                Goal::Answer(id) if is_late => {
                    // The reply may still come, and must not be taken for that to another command.
                    if let Some(slot) = waiting.slots.get_mut(&id) {
                        slot.thread = None;
                    }
                    hand_over(waiting);
                    return Ok(None);
                }
                Goal::Flushed if is_late => {
                    waiting.leave_flushing();
                    hand_over(waiting);
                    return Ok(None);
                }
                _ => {}
            }
            if waiting.led.is_none() {
                waiting.led = Some(thread::current().id());
                drop(waiting);
                let leading = Leading(self);
                let led = self.lead(goal, deadline);
                drop(leading);
                match led {
                    Ok(true) if matches!(goal, Goal::Flushed | Goal::Nothing) => {
                        return Ok(Some(Answer::empty()))
                    }
                    Ok(_) => {}
                    Err(failure) => self.fail(failure),
                }
                continue;
            }
            match goal {
                Goal::Answer(_) => {}
                // Whoever leads serves.
                Goal::Nothing => return Ok(None),
                Goal::Flushed => {
                    // First of all it is known to whoever flushes: what is flushed after the look
                    // at the backlog wakes it.
                    waiting.join_flushing();
                    drop(waiting);
                    let sender = self.main.sender();
                    let is_flushed = !sender.has_backlog() && sender.failure().is_none();
                    drop(sender);
                    if is_flushed {
                        let mut waiting = self.lock();
                        waiting.leave_flushing();
                        hand_over(waiting);
                        return Ok(Some(Answer::empty()));
                    }
                    waiting = self.lock();
                }
                Goal::End => waiting.idle = Some(thread::current()),
            }
            drop(waiting);
            match deadline {
                Some(deadline) => {
                    thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
                }
                None => thread::park(),
            }
        }
    }

    /// Receives and sends until the goal is reached; tells whether it was before the deadline.
    fn lead(&self, goal: Goal, deadline: Option<Instant>) -> Result<bool, Failure> {
        loop {
            self.drain(&self.main, goal, deadline)?;
            let twin = self.twin.as_ref();
            let twin = twin.filter(|_| !self.twin_is_served.load(Ordering::Acquire));
            if let Some(twin) = twin {
                self.drain(twin, goal, deadline)?;
                self.flush(twin, deadline)?;
            }
            let flushed = self.flush(&self.main, deadline)?;
            if flushed {
                self.wake_flushing();
            }
            let is_late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if self.is_reached(goal, flushed) || is_late {
                return Ok(self.is_reached(goal, flushed));
            }
            self.poll(twin, deadline)?;
        }
    }

    /// Sends what is kept; tells whether nothing of it is left.
    fn flush(&self, channel: &Channel, deadline: Option<Instant>) -> Result<bool, Failure> {
        let flushed = channel.sender().flush();
        match flushed {
            Ok(progress) => Ok(progress == Progress::Sent),
            Err(error) if error.is_closed() => {
                // What it has sent before it went is there yet.
                self.drain(channel, Goal::End, deadline)?;
                match channel.left.load(Ordering::Acquire) {
                    true => Ok(false),
                    false => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    fn is_reached(&self, goal: Goal, flushed: bool) -> bool {
        match goal {
            Goal::Answer(id) => {
                let waiting = self.lock();
                let slot = waiting.slots.get(&id);
                slot.is_none_or(|slot| slot.answer.is_some())
            }
            Goal::Flushed => flushed,
            // A thread that wants its reply had better wait for it itself.
            Goal::End => self.ended.load(Ordering::Acquire),
            Goal::Nothing => true,
        }
    }

    /// Waits until one of the sockets is ready, or there is something else to wait for.
    fn poll(&self, twin: Option<&Channel>, deadline: Option<Instant>) -> Result<(), Failure> {
        let count = if twin.is_some() { 3 } else { 2 };
        let twin = twin.unwrap_or(&self.main);
        let mut polled = [
            PollFd::new(self.kick.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.main.as_fd(), self.main.wanted()),
            PollFd::new(twin.as_fd(), twin.wanted()),
        ];
        match poll(&mut polled[..count], timeout(deadline)) {
            Ok(_) | Err(Number::EINTR) => {}
            Err(error) => return Err(StreamError::Socket(error).into()),
        }
        let is_kicked = polled[0].any().unwrap_or(false);
        if is_kicked {
            // Somebody else may have read it.
            let _ = self.kick.read();
        }
        Ok(())
    }

    /// Ends the connection: everybody who waits is told why.
    fn fail(&self, failure: Failure) {
        let mut waiting = self.lock();
        if waiting.failure.is_none() {
            log::warn!("vfio-user client: {failure}");
            waiting.failure = Some(failure);
        }
        let slots = waiting.slots.values_mut();
        let threads: Vec<_> = slots.filter_map(|slot| slot.thread.clone()).collect();
        let idle = waiting.idle.take();
        let flushing = std::mem::take(&mut waiting.flushing);
        drop(waiting);
        let all = threads.into_iter().chain(idle).chain(flushing);
        all.for_each(|thread| thread.unpark());
        for channel in self.channels() {
            // The other side may have closed it.
            let _ = shutdown(channel.socket.as_raw_fd(), Shutdown::Both);
        }
        let _ = self.end.write(1);
    }

    fn wake_flushing(&self) {
        let flushing = std::mem::take(&mut self.lock().flushing);
        flushing.iter().for_each(Thread::unpark);
    }
}

impl Answer {
    fn empty() -> Self {
        Self {
            result: Ok(()),
            body: Vec::new(),
            descriptors: Descriptors::default(),
        }
    }
}

/// The time to a deadline, as `poll` takes it, rounded up.
fn timeout(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}
