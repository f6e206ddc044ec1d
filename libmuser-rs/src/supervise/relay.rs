// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hands messages from one side to the other, and what is done when a side is gone.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::{FromBytes, IntoBytes};

use super::client::Channel;
use super::client::{twin, Client, Reason};
use super::kept::Step;
use super::link::{limits, send, Fault, Stream};
use super::requests::{ReplyTo, Request};
use super::Supervisor;
use crate::error::Errno;
use crate::vfio_user::control::{self, Packet, Received};
use crate::vfio_user::link::Prefix;
use crate::vfio_user::stream::split;
use crate::vfio_user::wire::payload::RegionIoFds;
use crate::vfio_user::wire::{Command, Header, Kind};

/// Messages that are taken from a side before the other has its turn.
const TURN: usize = 64;
/// Turns of a program that has gone: more than its socket has messages.
const MOST_TURNS: usize = 256;

/// Programs in a row that may refuse to take over what a client has set up.
const MOST_SETUPS_REFUSED: u32 = 5;

/// A message of a program's.
struct FromProgram {
    prefix: Prefix,
    header: Header,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Supervisor {
    /// Opens a stream to the program, if there is a client for it.
    pub(super) fn open_stream(&mut self) {
        let (Some(client), Some(program)) = (&self.client, &mut self.program) else {
            return;
        };
        if self.closing {
            return;
        }
        if let Err(error) = program.open(&client.kept) {
            self.give_up_program(&error.to_string());
        }
    }

    /// Gives the program what is there for it.
    pub(super) fn pump(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        // Whether they have gone is found by receiving, behind what has come before.
        let _ = client.main.sender.flush();
        if let Some(twin) = &mut client.twin {
            let _ = twin.sender.flush();
        }
        if client.has_left(Instant::now()) {
            return self.end_client("it has gone");
        }
        let Some(program) = &mut self.program else {
            return;
        };
        let Some(stream) = &mut program.stream else {
            return;
        };
        if let Some((sender, _)) = &mut stream.twin {
            let _ = sender.flush();
        }
        match stream.pump(&client.kept, &mut client.requests) {
            Ok(failed) => {
                for (number, errno) in failed {
                    let request = client.requests.answered(number, &mut self.sequence);
                    let Some(request) = request else { continue };
                    log::warn!("a command can't be given to the program: {errno}");
                    if let Err(reason) = client.refuse(request.reply_to, errno, &mut self.sequence)
                    {
                        return self.end_client(&reason);
                    }
                }
            }
            Err(fault) => self.give_up_program(&fault),
        }
    }

    /// The program says something on its control socket.
    pub(super) fn hear_program(&mut self) {
        let Some(program) = &self.program else {
            return;
        };
        let packet = match control::receive(program.control.as_fd()) {
            Received::Nothing => return,
            Received::Closed => return self.program_gone(),
            Received::Malformed(malformed) => {
                return self.give_up_program(&format!("what it says: {malformed}"));
            }
            Received::Packet(packet, descriptors) => (packet, descriptors),
        };
        if matches!(packet.0, Packet::Closed) {
            // What it has sent before that is as good as ever.
            self.drain_program();
            if self.program.is_none() {
                return;
            }
        }
        let done = match (packet, &mut self.device) {
            ((Packet::Memory, files), Some(device)) => device.complete(files),
            ((Packet::Closed, areas), Some(device)) => {
                let done = device.replace_areas(areas);
                if !self.closing {
                    // It could not make sense of the client.
                    self.end_client("the program has closed its connection");
                }
                self.wound_up();
                done
            }
            _ => Err("it says what nobody has asked for"),
        };
        if let Err(fault) = done {
            self.give_up_program(fault);
        }
    }

    /// The program is done with a client that has gone.
    fn wound_up(&mut self) {
        self.closing = false;
        if let Some(program) = &mut self.program {
            program.deadline = None;
        }
    }

    /// The client has gone, or is sent away; what it had is the program's to wind up.
    pub(super) fn end_client(&mut self, reason: &str) {
        let Some(client) = self.client.take() else {
            return;
        };
        log::info!("the client is not served any more: {reason}");
        let unanswered = client.requests.len();
        if unanswered > 0 {
            log::debug!("it leaves {unanswered} requests");
        }
        // Before there was a program, nothing was done for it.
        self.closing = self.device.is_some();
        if let Some(program) = &mut self.program {
            program.close();
            // Nothing is to be set up in it any more.
            self.unserved_since = None;
        }
    }

    /// The program does not make sense. It is told so by the end of its sockets.
    pub(super) fn give_up_program(&mut self, fault: &str) {
        if self.program.is_some() {
            log::error!("the program is given up: {fault}");
            self.drop_program();
        }
    }

    /// The program is gone: what it had not answered is for the next one.
    fn program_gone(&mut self) {
        // What it has sent before is as good as if it lived.
        self.drain_program();
        self.drop_program();
    }

    /// Takes all that a program has sent which will send no more.
    fn drain_program(&mut self) {
        // One that sends on and on is not believed that it has come to its end.
        for _ in 0..MOST_TURNS {
            let Some(stream) = self
                .program
                .as_mut()
                .and_then(|program| program.stream.as_mut())
            else {
                return;
            };
            if stream.ended || !has_more(stream) {
                break;
            }
            self.take_messages_of_program(|_| false);
        }
        self.take_from_program_twin();
    }

    fn drop_program(&mut self) {
        if self.program.take().is_none() {
            return;
        }
        log::debug!("the program is gone");
        self.unserved_since.get_or_insert_with(Instant::now);
        let Some(client) = &mut self.client else {
            return;
        };
        client.forget_program();
        let before = client.requests.len();
        let deadly = client.requests.put_back(&mut self.sequence);
        self.counters.replays += client.requests.given_before() as u64;
        if !deadly.is_empty() {
            log::error!(
                "{} of {before} requests fail: many programs have died with them",
                deadly.len()
            );
        }
        for request in deadly {
            if let Err(reason) = client.refuse(request.reply_to, Errno::EIO, &mut self.sequence) {
                return self.end_client(&reason);
            }
        }
    }

    /// What waits for a program for too long fails, and so does a program that takes too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |program: &super::Program| program.deadline.is_some_and(|at| at <= now);
        if self.program.as_ref().is_some_and(late) {
            self.give_up_program("it does not come to an end with what it was told");
        }
        let Some(before) = now.checked_sub(self.reattach_timeout) else {
            return;
        };
        let unserved = self.unserved_since.is_some_and(|since| since <= before);
        let Some(client) = self.client.as_mut().filter(|_| unserved) else {
            return;
        };
        // The moment itself is over.
        let before = before + Duration::from_nanos(1);
        let expired = client.requests.expired(before, &mut self.sequence);
        if expired.is_empty() {
            return;
        }
        log::warn!(
            "{} requests fail: no program has come in time",
            expired.len()
        );
        self.counters.timeouts += expired.len() as u64;
        for request in expired {
            if let Err(reason) = client.refuse(request.reply_to, ETIMEDOUT, &mut self.sequence) {
                return self.end_client(&reason);
            }
        }
    }

    /// Takes messages from the client.
    pub(super) fn take_from_client(&mut self) {
        for _ in 0..TURN {
            let Some(client) = &mut self.client else {
                return;
            };
            if !client.is_wanted() {
                return;
            }
            let message = match client.main.receiver.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) if error.is_closed() => return client.leave(),
                Err(error) => return self.end_client(&error.to_string()),
            };
            let header = Header::parse(message.header()).unwrap_or_default();
            let body = message.body().to_vec();
            let descriptors = message.descriptors;
            let stream = self
                .program
                .as_mut()
                .and_then(|program| program.stream.as_mut());
            let done = match header.kind() {
                Ok(Kind::Command { .. }) => {
                    client.asked(header, body, descriptors, &mut self.sequence)
                }
                Ok(Kind::Reply(result)) => {
                    if let Some(id) = known(&mut client.main, header.id)
                        && let Some(stream) = stream
                    {
                        let reply = Header { id, ..header }.reply(result);
                        let kept = descriptors.into_kept();
                        let fds: Vec<_> = kept.iter().map(AsFd::as_fd).collect();
                        if let Err(error) = stream.forward(reply, &body, &fds) {
                            self.give_up_program(&error.to_string());
                        }
                    }
                    Ok(())
                }
                Err(malformed) => client.refuse(
                    ReplyTo::Client(header),
                    malformed.errno(),
                    &mut self.sequence,
                ),
            };
            if let Err(reason) = done {
                return self.end_client(&reason);
            }
        }
    }

    /// Takes replies from the client's second socket.
    pub(super) fn take_from_client_twin(&mut self) {
        for _ in 0..TURN {
            let Some(channel) = self.client.as_mut().and_then(|client| client.twin.as_mut()) else {
                return;
            };
            let message = match channel.receiver.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                // It may have gone, and have asked for something on the other one before.
                Err(error) if error.is_closed() && !channel.asks.is_waiting() => {
                    if let Some(client) = &mut self.client {
                        client.twin = None;
                    }
                    return;
                }
                Err(error) => {
                    return self.end_client(&format!("of its second socket: {error}"));
                }
            };
            let header = Header::parse(message.header()).unwrap_or_default();
            let body = message.body().to_vec();
            let Ok(Kind::Reply(result)) = header.kind() else {
                log::debug!("a command on the second socket is ignored");
                continue;
            };
            let Some(id) = known(channel, header.id) else {
                continue;
            };
            let stream = self
                .program
                .as_mut()
                .and_then(|program| program.stream.as_mut());
            if let Some((sender, _)) = stream.and_then(|stream| stream.twin.as_mut()) {
                let reply = Header { id, ..header }.reply(result);
                if let Err(error) = send(sender, None, reply, &body, &[]) {
                    return self.give_up_program(&error.to_string());
                }
            }
        }
    }

    /// Takes messages from the program, as long as the client takes what they bring.
    pub(super) fn take_from_program(&mut self) {
        self.take_messages_of_program(|client| client.main.sender.has_backlog());
    }

    /// Takes messages from the program, as long as the client is not one to `stop` at.
    fn take_messages_of_program(&mut self, stop: impl Fn(&Client) -> bool) {
        for _ in 0..TURN {
            if self.client.as_ref().is_some_and(&stop) {
                return;
            }
            let Some(program) = &mut self.program else {
                return;
            };
            let Some(stream) = program.stream.as_mut().filter(|stream| !stream.ended) else {
                return;
            };
            let message = match stream.receiver.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) if error.is_closed() => {
                    // Either it dies, or it can't make sense of the client. It says so, or not.
                    stream.ended = true;
                    program.deadline = Some(Instant::now() + super::link::PATIENCE);
                    return;
                }
                Err(error) => return self.give_up_program(&error.to_string()),
            };
            if message.descriptors.lost() > 0 {
                return self.give_up_program("its descriptors are more than there is room for");
            }
            let message = FromProgram {
                prefix: Prefix::read_from_bytes(message.prefix()).unwrap_or_default(),
                header: Header::parse(message.header()).unwrap_or_default(),
                body: message.body().to_vec(),
                descriptors: message.descriptors.into_kept(),
            };
            match self.relay(message) {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => return self.end_client(&reason),
                Err(fault) => return self.give_up_program(&fault),
            }
        }
    }

    /// Hands on a message of the program's: the program is at fault, or else the client, or nobody.
    fn relay(&mut self, message: FromProgram) -> Result<Result<(), Reason>, Fault> {
        let (Some(client), Some(program)) = (&mut self.client, &mut self.program) else {
            return Ok(Ok(()));
        };
        let Some(stream) = &mut program.stream else {
            return Ok(Ok(()));
        };
        let header = message.header;
        let kind = header.kind().map_err(|malformed| malformed.to_string())?;
        let result = match kind {
            Kind::Command { .. } => {
                check_command(header)?;
                let fds: Vec<_> = message.descriptors.iter().map(AsFd::as_fd).collect();
                client.main.ask(header, &message.body, &fds)?;
                return Ok(Ok(()));
            }
            Kind::Reply(result) => result,
        };
        if message.prefix.number == 0 {
            if let Err(fault) = set_up(stream, client, result, message) {
                client.setups_refused += 1;
                if client.setups_refused < MOST_SETUPS_REFUSED {
                    return Err(fault);
                }
                // It is no program's fault then. This one can go on with the next client.
                return Ok(Err(format!(
                    "what it has set up can't be set up again: {fault}"
                )));
            }
            if stream.is_set_up() {
                client.setups_refused = 0;
                program.deadline = None;
                self.unserved_since = None;
            }
            return Ok(Ok(()));
        }
        let number = message.prefix.number;
        if client.requests.command(number) != Some(header.command) {
            return Err("it replies to what it was not given".into());
        }
        let request = client.requests.answered(number, &mut self.sequence);
        let Some(request) = request else {
            return Err("it replies to what it was not given".into());
        };
        if let Err(errno) = result {
            return Ok(client.refuse(request.reply_to, errno, &mut self.sequence));
        }
        let to = request.reply_to;
        answer(stream, client, request, message, &mut self.sequence).or_else(|fault| {
            // The request has ended, however badly.
            client.refuse(to, Errno::EIO, &mut self.sequence)?;
            Err(fault)
        })
    }

    /// Takes what the program asks for over its second socket.
    pub(super) fn take_from_program_twin(&mut self) {
        for _ in 0..TURN {
            let Some(program) = &mut self.program else {
                return;
            };
            let Some(stream) = &mut program.stream else {
                return;
            };
            let Some((_, receiver)) = &mut stream.twin else {
                return;
            };
            let twin = self.client.as_ref().and_then(|client| client.twin.as_ref());
            if twin.is_some_and(|twin| twin.sender.has_backlog()) {
                return;
            }
            let message = match receiver.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) if error.is_closed() => {
                    // Its other sockets say the same, or that it lives on without.
                    stream.twin = None;
                    return;
                }
                Err(error) => return self.give_up_program(&error.to_string()),
            };
            let header = Header::parse(message.header()).unwrap_or_default();
            let body = message.body().to_vec();
            let channel = self.client.as_mut().and_then(|client| client.twin.as_mut());
            let Some(channel) = channel else {
                return;
            };
            let asked = check_command(header)
                .and_then(|()| channel.ask(header, &body, &[]).map_err(Fault::from));
            if let Err(fault) = asked {
                return self.give_up_program(&fault);
            }
        }
    }
}

/// Whether a program's stream has something, or its end.
fn has_more(stream: &Stream) -> bool {
    let mut polled = [PollFd::new(stream.sender.as_fd(), PollFlags::POLLIN)];
    stream.receiver.is_ready() || poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// The program's id for what the client replies to, if it is still there.
fn known(channel: &mut Channel, id: u16) -> Option<u16> {
    match channel.asks.answer(id) {
        Some(Some(id)) => Some(id),
        // It was for a program that is gone.
        Some(None) => None,
        None => {
            log::debug!("a reply to nothing is ignored");
            None
        }
    }
}

/// Whether a program may ask a client for that.
fn check_command(header: Header) -> Result<(), Fault> {
    match Command::new(header.command) {
        Some(command) if !command.is_clients() => Ok(()),
        _ => Err("it asks for what only a client asks for".into()),
    }
}

/// A reply to what was set up in the program.
fn set_up(
    stream: &mut Stream,
    client: &mut Client,
    result: Result<(), Errno>,
    message: FromProgram,
) -> Result<(), Fault> {
    let step = stream.answered_step();
    let step = step.ok_or("it replies to what it was not given")?;
    if let Err(errno) = result {
        return Err(format!(
            "it does not take over what is set up ({step:?}): {errno}"
        ));
    }
    if step != Step::Version {
        return Ok(());
    }
    if !client.kept.agrees(&message.body) {
        return Err("its version or capabilities are not those agreed upon".into());
    }
    stream.twin = client
        .twin
        .as_ref()
        .and_then(|_| twin(&message.body, message.descriptors))
        .map(|socket| split(socket, limits(0)));
    Ok(())
}

/// The reply to a request that was done.
fn answer(
    stream: &mut Stream,
    client: &mut Client,
    mut request: Request,
    message: FromProgram,
    sequence: &mut u64,
) -> Result<Result<(), Reason>, Fault> {
    let FromProgram {
        header,
        mut body,
        mut descriptors,
        ..
    } = message;
    match Command::new(header.command) {
        Some(Command::Version) => {
            if client.kept.is_negotiated() {
                return Err("it agrees to a version twice".into());
            }
            return Ok(
                match client.negotiated(request, &body, descriptors, sequence) {
                    Ok(twin) => {
                        stream.twin = twin.map(|socket| split(socket, limits(0)));
                        Ok(())
                    }
                    Err(reason) => Err(reason),
                },
            );
        }
        Some(Command::DeviceGetRegionIoFds) => {
            // Eventfds of a program that is gone would lead nowhere: writes come as messages.
            if let Ok((fixed, _)) = RegionIoFds::read_from_prefix(&body) {
                let none = RegionIoFds {
                    argsz: IO_FDS,
                    count: 0,
                    ..fixed
                };
                body = none.as_bytes().to_vec();
            }
            descriptors.clear();
        }
        Some(Command::DeviceFeature) => client.lost.report(&mut body),
        Some(Command::DmaUnmap) => client.lost.unmapped(&mut body),
        _ => {}
    }
    if let Some(command) = Command::new(request.header.command) {
        let fds = std::mem::take(&mut request.descriptors);
        let done = client.kept.done(command, &request.payload, fds);
        done.map_err(|much| format!("it agrees to more {} than there can be", much.0))?;
        if client.kept.logging().is_none() {
            client.lost.clear();
        }
    }
    let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    Ok(client.answer(request.reply_to, Ok(()), &body, &fds, sequence))
}

const IO_FDS: u32 = 16;
const _: () = assert!(size_of::<RegionIoFds>() == IO_FDS as usize);

const ETIMEDOUT: Errno = match Errno::new(libc::ETIMEDOUT) {
    Some(errno) => errno,
    None => Errno::EIO,
};
