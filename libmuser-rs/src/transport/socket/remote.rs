// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a client that is reached by messages: `DMA_READ` and `DMA_WRITE`.
//!
//! Whoever waits for the client's reply receives meanwhile, and puts what is not the reply where it
//! belongs: other replies to those who wait for them, commands behind those which wait. So nobody
//! waits for a thread that is itself waiting, and a client that sends while this side does is heard.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::IntoBytes;

use super::hub::{Hub, State};
use super::session::Session;
use crate::error::Errno;
use crate::transport::RemoteMemory;
use crate::vfio_user::link::Prefix;
use crate::vfio_user::wire::payload::{self, take};
use crate::vfio_user::wire::{Command, Header};

/// How long a client may take for each [`SHARE`] of what it is asked for, and the rest. The same as
/// QEMU gives a server for a reply.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes.
const SHARE: usize = 1 << 20;

/// All of a client's memory that it has given without a descriptor; offsets are IOVAs.
#[derive(Debug)]
pub(super) struct ClientMemory {
    hub: Weak<Hub>,
    session: u64,
}

impl ClientMemory {
    pub(super) const fn new(hub: Weak<Hub>, session: u64) -> Self {
        Self { hub, session }
    }

    fn hub(&self) -> io::Result<Arc<Hub>> {
        Ok(self.hub.upgrade().ok_or(Number::ENODEV)?)
    }
}

impl RemoteMemory for ClientMemory {
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let hub = self.hub()?;
        let most = hub.remote_data(self.session)?;
        let deadline = deadline(to.len());
        let mut address = offset;
        for part in to.chunks_mut(most) {
            let asked = payload::DmaAccess {
                address,
                count: part.len() as u64,
            };
            let reply = hub.exchange((self.session, deadline), Command::DmaRead, asked, &[])?;
            let (said, data) = take::<payload::DmaAccess>(&reply).map_err(|_| Number::EPROTO)?;
            if said != asked || data.len() != part.len() {
                return Err(Number::EPROTO.into());
            }
            part.copy_from_slice(data);
            address = address.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let hub = self.hub()?;
        let most = hub.remote_data(self.session)?;
        let deadline = deadline(from.len());
        let mut address = offset;
        for part in from.chunks(most) {
            let asked = payload::DmaAccess {
                address,
                count: part.len() as u64,
            };
            // Clients differ in what their reply has: nothing, or a count of 4 or 8 bytes.
            hub.exchange((self.session, deadline), Command::DmaWrite, asked, part)?;
            address = address.wrapping_add(part.len() as u64);
        }
        Ok(())
    }
}

/// When all of a copy has to be done.
fn deadline(len: usize) -> Instant {
    let shares = u32::try_from(len / SHARE).unwrap_or(u32::MAX);
    let now = Instant::now();
    let time = TIMEOUT.saturating_mul(shares.saturating_add(1));
    now.checked_add(time).unwrap_or(now)
}

/// Commands of this side that the client has not answered, or nobody has looked at the answer.
#[derive(Debug, Default)]
pub(super) struct Exchanges {
    next: u16,
    pending: BTreeMap<u16, Exchange>,
    /// How many of them somebody waits for, and how many of these have an answer.
    awaited: usize,
    answered: usize,
}

#[derive(Debug)]
struct Exchange {
    command: Command,
    answer: Option<Result<Vec<u8>, Errno>>,
    /// Whether nobody waits any more.
    abandoned: bool,
}

impl Exchanges {
    /// A number for a command.
    fn begin(&mut self, command: Command) -> Result<u16, Number> {
        let free = (0..=u16::MAX)
            .map(|step| self.next.wrapping_add(step))
            .find(|id| !self.pending.contains_key(id))
            .ok_or(Number::EBUSY)?;
        self.next = free.wrapping_add(1);
        let exchange = Exchange {
            command,
            answer: None,
            abandoned: false,
        };
        self.pending.insert(free, exchange);
        self.awaited += 1;
        Ok(free)
    }

    /// The client has answered.
    ///
    /// # Errors
    ///
    /// Nobody has asked.
    pub(super) fn answer(
        &mut self,
        header: &Header,
        result: Result<(), Errno>,
        body: Vec<u8>,
    ) -> Result<(), &'static str> {
        let exchange = self.pending.get_mut(&header.id);
        let exchange = exchange.ok_or("a reply to a command that was not sent")?;
        if exchange.command.number() != header.command {
            return Err("a reply to another command than was sent");
        }
        if exchange.answer.is_some() {
            return Err("a second reply to one command");
        }
        if exchange.abandoned {
            self.pending.remove(&header.id);
            return Ok(());
        }
        exchange.answer = Some(result.map(|()| body));
        self.answered += 1;
        Ok(())
    }

    /// The answer, if there is one.
    fn take(&mut self, id: u16) -> Option<Result<Vec<u8>, Errno>> {
        let answer = self.pending.get_mut(&id)?.answer.take()?;
        self.pending.remove(&id);
        self.awaited -= 1;
        self.answered -= 1;
        Some(answer)
    }

    /// It was not sent.
    fn forget(&mut self, id: u16) {
        if self.pending.remove(&id).is_some() {
            self.awaited -= 1;
        }
    }

    /// Nobody waits for it any more; its number is free when the answer has come.
    fn abandon(&mut self, id: u16) {
        if let Some(exchange) = self.pending.get_mut(&id) {
            exchange.abandoned = true;
            self.awaited -= 1;
        }
    }

    /// Whether somebody waits for an answer that has not come.
    pub(super) const fn are_awaited(&self) -> bool {
        self.awaited > self.answered
    }

    /// Whether somebody who waits has an answer.
    pub(super) fn has_answers(&self) -> bool {
        self.answered > 0
    }
}

impl Session {
    /// Sends the client a command, unless it has not received what was sent before: what is kept for
    /// it must not grow with every command that it leaves unanswered. Tells the number.
    fn ask(
        &mut self,
        command: Command,
        asked: payload::DmaAccess,
        data: &[u8],
    ) -> Result<Option<u16>, Errno> {
        let channel = self.twin.as_mut().unwrap_or(&mut self.main);
        if channel.sender.has_backlog() {
            return Ok(None);
        }
        let Ok(id) = self.exchanges.begin(command) else {
            self.end("it has left as many commands unanswered as there can be".into());
            return Ok(None);
        };
        let header = Header::command(id, command);
        let payload = [asked.as_bytes(), data];
        if let Err(errno) = channel.send(Prefix::default(), header, &payload, &[]) {
            self.exchanges.forget(id);
            return Err(errno);
        }
        Ok(Some(id))
    }
}

impl Hub {
    /// Bytes that one message may carry to or from the client.
    fn remote_data(&self, session: u64) -> io::Result<usize> {
        let mut state = self.lock();
        let session = state.session_of(session).ok_or(Number::ENODEV)?;
        Ok(session.data())
    }

    /// Sends a command to the client and waits for the reply, whose payload is returned.
    fn exchange(
        &self,
        (number, deadline): (u64, Instant),
        command: Command,
        asked: payload::DmaAccess,
        data: &[u8],
    ) -> io::Result<Vec<u8>> {
        let mut state = self.lock();
        let mut id = None;
        loop {
            state.pump();
            if id.is_none() {
                if let Some(session) = state.session_of(number) {
                    id = session.ask(command, asked, data)?;
                }
            }
            let outcome = Self::look_for(&mut state, number, id, deadline);
            state.update(self).map_err(|error| error.errno())?;
            if let Some(outcome) = outcome {
                return outcome;
            }
            let session = state.session_of(number).ok_or(Number::ENODEV)?;
            let is_due = session.can_pump();
            let (main, twin) = (&session.main, session.twin.as_ref());
            let wanted = |receive, send| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, receive);
                flags.set(PollFlags::POLLOUT, send);
                flags
            };
            let main_wanted = wanted(!session.is_full(), main.sender.has_backlog());
            let main = Arc::clone(main.sender.socket());
            let twin = twin.map(|twin| {
                let wanted = wanted(true, twin.sender.has_backlog());
                (Arc::clone(twin.sender.socket()), wanted)
            });
            drop(state);
            let mut fds = vec![PollFd::new(self.answered(), PollFlags::POLLIN)];
            if !main_wanted.is_empty() {
                fds.push(PollFd::new(main.as_fd(), main_wanted));
            }
            if let Some((socket, wanted)) = &twin {
                fds.push(PollFd::new(socket.as_fd(), *wanted));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            let timeout = match PollTimeout::try_from(millis.saturating_add(1)) {
                // What is in a buffer does not show on a socket.
                _ if is_due => PollTimeout::ZERO,
                timeout => timeout.unwrap_or(PollTimeout::MAX),
            };
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Number::EINTR) => {}
                Err(errno) => {
                    let mut state = self.lock();
                    if let (Some(session), Some(id)) = (state.session_of(number), id) {
                        session.exchanges.abandon(id);
                    }
                    return Err(errno.into());
                }
            }
            state = self.lock();
        }
    }

    /// What has become of a command, if that is known.
    fn look_for(
        state: &mut State,
        number: u64,
        id: Option<u16>,
        deadline: Instant,
    ) -> Option<io::Result<Vec<u8>>> {
        let Some(session) = state.session_of(number) else {
            return Some(Err(Number::ENODEV.into()));
        };
        if let Some(answer) = id.and_then(|id| session.exchanges.take(id)) {
            return Some(answer.map_err(io::Error::from));
        }
        if session.is_over() {
            return Some(Err(Number::ENODEV.into()));
        }
        if session.is_full() && session.twin.is_none() {
            // The reply would be behind all that.
            session.end("it sends commands without end, and does not reply".into());
            return Some(Err(Number::ENOBUFS.into()));
        }
        if Instant::now() >= deadline {
            log::warn!("the client does not reply to what the device asks it for");
            if let Some(id) = id {
                session.exchanges.abandon(id);
            }
            return Some(Err(Number::ETIMEDOUT.into()));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_for_who_has_asked() {
        let mut exchanges = Exchanges::default();
        let first = exchanges.begin(Command::DmaRead).unwrap();
        let second = exchanges.begin(Command::DmaWrite).unwrap();
        let header = Header::command(second, Command::DmaWrite);

        exchanges.answer(&header, Ok(()), vec![7]).unwrap();

        assert!(exchanges.take(first).is_none());
        assert!(exchanges.has_answers());
        assert_eq!(exchanges.take(second), Some(Ok(vec![7])));
        assert!(!exchanges.has_answers());
    }

    #[test]
    fn answer_that_nobody_has_asked_for_is_refused() {
        let mut exchanges = Exchanges::default();
        let id = exchanges.begin(Command::DmaRead).unwrap();
        let mut answer = |id, command| {
            let header = Header::command(id, command);
            exchanges.answer(&header, Ok(()), Vec::new())
        };

        assert!(answer(id + 1, Command::DmaRead).is_err());
        assert!(answer(id, Command::DmaWrite).is_err());
        assert!(answer(id, Command::DmaRead).is_ok());
        assert!(answer(id, Command::DmaRead).is_err());
    }

    #[test]
    fn late_answer_is_dropped_and_its_number_is_free_again() {
        let mut exchanges = Exchanges::default();
        let id = exchanges.begin(Command::DmaRead).unwrap();
        exchanges.abandon(id);

        let header = Header::command(id, Command::DmaRead);
        exchanges.answer(&header, Ok(()), vec![1]).unwrap();

        assert!(!exchanges.has_answers());
        assert!(exchanges.pending.is_empty());
    }
}
