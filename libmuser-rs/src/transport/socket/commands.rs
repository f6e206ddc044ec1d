// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each command of a client's becomes: an answer, or a request for the device.

use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use super::access::{Access, Next};
use super::flight::{Flight, Multi};
use super::hub::{Handled, Hub, State};
use super::session::{Incoming, ReplyTo, MAX_DATA};
use crate::error::{Errno, Result};
use crate::transport::{Operation, RequestId};
use crate::vfio_user::wire::request::{ClientRequest, RegionAccess};
use crate::vfio_user::wire::{Command, Kind};

/// Why a command is refused: what the client gets, and what is said of it in the log.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) Errno, pub(super) String);

impl Refusal {
    pub(super) fn new(errno: Errno, why: impl Into<String>) -> Self {
        Self(errno, why.into())
    }
}

impl From<nix::errno::Errno> for Refusal {
    fn from(errno: nix::errno::Errno) -> Self {
        Self(
            super::session::to_errno(errno),
            "it can't be done".to_owned(),
        )
    }
}

impl From<crate::error::Error> for Refusal {
    fn from(error: crate::error::Error) -> Self {
        Self(error.errno(), error.to_string())
    }
}

const EMFILE: Errno = match Errno::new(libc::EMFILE) {
    Some(errno) => errno,
    None => Errno::EIO,
};

/// What is done with a command, as far as that is known before it may be done.
enum Order {
    /// It may be done at any time.
    Free,
    /// Nothing else may be under way, and nothing behind it starts before it has ended.
    Barrier,
}

/// Commands which look at nothing that others change, and so need not wait.
fn order(command: Command) -> Order {
    match command {
        Command::Version
        | Command::DeviceGetInfo
        | Command::DeviceGetRegionInfo
        | Command::DeviceGetRegionIoFds
        | Command::DeviceGetIrqInfo
        | Command::RegionRead
        | Command::RegionWrite
        | Command::RegionWriteMulti
        | Command::DmaRead
        | Command::DmaWrite
        | Command::MigDataRead
        | Command::MigDataWrite => Order::Free,
        Command::DmaMap
        | Command::DmaUnmap
        | Command::DeviceSetIrqs
        | Command::DeviceReset
        | Command::DeviceFeature => Order::Barrier,
    }
}

/// Whether descriptors may ride on a command.
fn takes_descriptors(command: Command) -> bool {
    matches!(command, Command::DmaMap | Command::DeviceSetIrqs)
}

impl State {
    /// Handles a message of the client's, whose payload is in `data`.
    pub(super) fn handle(
        &mut self,
        hub: &Hub,
        incoming: Incoming,
        data: &mut Vec<u8>,
    ) -> Result<Handled> {
        let Some(session) = &mut self.session else {
            return Ok(Handled::Answered);
        };
        let to = session.reply_to(&incoming);
        match incoming.header.kind() {
            Ok(Kind::Command { .. }) => {}
            Ok(Kind::Reply(result)) => {
                session.answer(&incoming, result, std::mem::take(data));
                return Ok(Handled::Answered);
            }
            Err(error) => {
                session.refuse(to, error.errno(), format_args!("{error}"));
                return Ok(Handled::Answered);
            }
        }
        let Some(command) = Command::new(incoming.header.command) else {
            let number = incoming.header.command;
            let why = format_args!("there is no command {number}");
            session.refuse(to, Errno::EOPNOTSUPP, why);
            return Ok(Handled::Answered);
        };
        if session.peer.is_none() && command != Command::Version {
            let why = "no version was agreed upon before";
            session.refuse(to, Errno::EINVAL, format_args!("{why}"));
            session.end(format!("its first command is {command}, and {why}"));
            return Ok(Handled::Answered);
        }
        let is_barrier = matches!(order(command), Order::Barrier);
        if is_barrier && !session.first {
            // What was signalled before it was sent is a write before it.
            self.note_io_events();
        }
        let is_clear = self.flights_are_over() && !self.io_events.has_signals();
        if is_barrier && !is_clear || !self.has_room() {
            if let Some(session) = &mut self.session {
                session.put_back(incoming, std::mem::take(data));
                session.waits = true;
                session.first = true;
            }
            return Ok(Handled::Later);
        }
        if let Some(session) = &mut self.session {
            session.first = false;
        }
        self.io_events.release();
        let fds = incoming.descriptors;
        let handled = if fds.lost() > 0 {
            // Those beyond what was agreed upon; or this process can't have more.
            let beyond = self
                .session
                .as_ref()
                .is_some_and(|s| fds.kept().len() >= s.fds);
            let errno = if beyond { Errno::EINVAL } else { EMFILE };
            Err(Refusal::new(errno, format!("it came with {fds}")))
        } else if !fds.is_empty() && !takes_descriptors(command) {
            let why = format!("it came with {fds}, and takes none");
            Err(Refusal::new(Errno::EINVAL, why))
        } else {
            self.perform(hub, command, to, fds.into_kept(), data)
        };
        handled.or_else(|Refusal(errno, why)| {
            if let Some(session) = self.session_of(to.session) {
                session.refuse(to, errno, format_args!("{why}"));
                if session.peer.is_none() {
                    session.end(format!("no version was agreed upon: {why}"));
                }
            }
            Ok(Handled::Answered)
        })
    }

    /// Does a command whose turn it is.
    fn perform(
        &mut self,
        hub: &Hub,
        command: Command,
        to: ReplyTo,
        fds: Vec<OwnedFd>,
        data: &mut Vec<u8>,
    ) -> Result<Handled, Refusal> {
        // What accesses write stays in `data`; everything else is small.
        let request = ClientRequest::parse(command, data)
            .map_err(|error| Refusal::new(error.errno(), error.to_string()))?;
        let Some(request) = request else {
            let why = format!("{command} is for the server to ask for");
            return Err(Refusal::new(Errno::EINVAL, why));
        };
        match request {
            ClientRequest::Version(version) => self.negotiate(hub, to, version)?,
            ClientRequest::DeviceInfo(query) => self.device_info(to, query),
            ClientRequest::RegionInfo(query) => self.region_info(to, query)?,
            ClientRequest::RegionIoFds(query) => self.region_io_fds(hub, to, query)?,
            ClientRequest::IrqInfo(query) => self.irq_info(to, query)?,
            ClientRequest::SetIrqs(request) => {
                self.set_irqs(hub, request, fds)?;
                self.reply_to(to, Ok(&[]));
            }
            ClientRequest::DmaMap(request) => {
                self.dma_map(to, request, fds)?;
                self.reply_to(to, Ok(&[]));
            }
            ClientRequest::DmaUnmap(request) => return self.dma_unmap(to, request),
            ClientRequest::RegionRead(access) => {
                data.clear();
                return self.access(to, access, false, data);
            }
            ClientRequest::RegionWrite(access, written) => {
                let start = data.len() - written.len();
                data.drain(..start);
                return self.access(to, access, true, data);
            }
            ClientRequest::WriteMulti(_) => return self.write_multi(to, data),
            ClientRequest::Reset => {
                let operation = Operation::Reset { close: false };
                return Ok(self.depart(to, operation, |id| Flight::reset(id, to)));
            }
            ClientRequest::Feature(request) => self.feature(to, request)?,
            ClientRequest::MigDataRead | ClientRequest::MigDataWrite => {
                return Err(Refusal::new(
                    Errno::EOPNOTSUPP,
                    "the device does not migrate",
                ))
            }
        }
        Ok(Handled::Answered)
    }

    /// Gives the device a request, before which nothing else waits for room.
    pub(super) fn depart(
        &mut self,
        to: ReplyTo,
        operation: Operation,
        make: impl FnOnce(RequestId) -> Flight,
    ) -> Handled {
        let mut excludes = false;
        let launched = self.launch(to.number(), |id| {
            let flight = make(id);
            excludes = flight.excludes;
            flight
        });
        // There is room: that was looked at before.
        let Some(id) = launched else {
            return Handled::Later;
        };
        self.exclusive |= excludes;
        Handled::Taken(self.request(id, operation, to.is_replay()))
    }

    fn access(
        &mut self,
        to: ReplyTo,
        asked: RegionAccess,
        write: bool,
        data: &mut Vec<u8>,
    ) -> Result<Handled, Refusal> {
        let count = usize::try_from(asked.count).unwrap_or(usize::MAX);
        // What a client has said it takes is its own concern: only this side's limit counts.
        if count > MAX_DATA {
            let why = format!("{count} bytes are more than was negotiated");
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let Some(served) = &self.served else {
            return Err(Refusal::new(Errno::EIO, "there is no device"));
        };
        let info = served.description.region(asked.region);
        let outside = |errno| {
            let RegionAccess { region, offset, .. } = asked;
            let why = format!("region {region} offset {offset:#x}: nothing can be accessed there");
            Refusal::new(errno, why)
        };
        let mut access = Access::new(info, asked.offset, count, write).map_err(outside)?;
        let Some(info) = info else {
            return Err(outside(Errno::EINVAL));
        };
        match access.start(info, &served.areas, data) {
            Next::Device(operation) => {
                Ok(self.depart(to, operation, |id| Flight::access(id, to, access)))
            }
            Next::Ended(Ok(count)) => {
                let fixed = access.reply(count);
                let read: &[u8] = if write { &[] } else { data };
                self.reply_to(to, Ok(&[fixed.as_bytes(), read]));
                Ok(Handled::Answered)
            }
            Next::Ended(Err(errno)) => Err(outside(errno)),
        }
    }

    fn write_multi(&mut self, to: ReplyTo, data: &mut Vec<u8>) -> Result<Handled, Refusal> {
        let Some(served) = &self.served else {
            return Err(Refusal::new(Errno::EIO, "there is no device"));
        };
        let mut multi = Multi::new(std::mem::take(data));
        match multi.go_on(served, data) {
            Next::Device(operation) => {
                Ok(self.depart(to, operation, |id| Flight::multi(id, to, multi)))
            }
            Next::Ended(Ok(count)) => {
                self.reply_to(to, Ok(&[(count as u64).as_bytes()]));
                Ok(Handled::Answered)
            }
            Next::Ended(Err(errno)) => Err(Refusal::new(errno, "none of the writes can be done")),
        }
    }
}
