// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `DEVICE_GET_REGION_IO_FDS`: writes that come by eventfd, past the client.
//!
//! A signal is a write that nobody waits for. Several signals at once are one write, as with KVM.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_bindings::bindings::vfio;
use zerocopy::IntoBytes;

use super::commands::Refusal;
use super::events::{Source, Watch};
use super::flight::Flight;
use super::hub::{Hub, State};
use super::infos::size_of_u32;
use super::session::{Framing, ReplyTo};
use crate::error::{Errno, Error};
use crate::sys::event;
use crate::transport::{Operation, Request};
use crate::vfio_user::wire::payload;
use crate::vfio_user::wire::request::Query;

/// The eventfds of one client.
#[derive(Debug, Default)]
pub(super) struct IoEvents {
    /// Which of the description's it is, and its eventfd.
    events: Vec<(usize, EventFd)>,
    /// Those that were signalled.
    signalled: VecDeque<usize>,
    /// Those that were signalled when a command was waiting for what was before it.
    later: VecDeque<usize>,
}

impl IoEvents {
    pub(super) fn has_signals(&self) -> bool {
        !self.signalled.is_empty()
    }

    /// The command that waited has had its turn: what was signalled meanwhile is next.
    pub(super) fn release(&mut self) {
        self.signalled.append(&mut self.later);
    }

    fn get(&self, number: usize) -> Option<BorrowedFd<'_>> {
        let mut events = self.events.iter();
        let (_, event) = events.find(|(candidate, _)| *candidate == number)?;
        Some(event.as_fd())
    }
}

impl State {
    pub(super) fn region_io_fds(
        &mut self,
        hub: &Hub,
        to: ReplyTo,
        query: Query,
    ) -> Result<(), Refusal> {
        let (Some(served), Some(session)) = (&self.served, &mut self.session) else {
            return Ok(());
        };
        if query.index >= vfio::VFIO_PCI_NUM_REGIONS {
            let why = format!("there is no region {}", query.index);
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let events = served.description.io_events.iter().enumerate();
        let events = events.filter(|(_, event)| event.region == query.index);
        // A client that takes fewer writes the others as any register. So does one behind a
        // supervisor, since the next server would not have the eventfds of this one.
        let most = match session.main.framing() {
            Framing::Plain => session.peer.map_or(0, |peer| peer.fds()),
            Framing::Numbered => 0,
        };
        let events: Vec<_> = events.take(most).collect();
        let count = u32::try_from(events.len()).unwrap_or(u32::MAX);
        let entry = size_of_u32::<payload::IoEventFd>();
        let fixed = payload::RegionIoFds {
            argsz: size_of_u32::<payload::RegionIoFds>() + count.saturating_mul(entry),
            flags: 0,
            index: query.index,
            count,
        };
        if query.argsz < fixed.argsz {
            session.reply(to, &[fixed.as_bytes()]);
            return Ok(());
        }
        for (number, _) in &events {
            if self.io_events.get(*number).is_none() {
                let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                let event = EventFd::from_flags(flags)
                    .map_err(|errno| Error::io("making an eventfd", errno))?;
                let source = Source::IoEvent(u32::try_from(*number).unwrap_or(u32::MAX));
                hub.events.add(&event, source, Watch::RECEIVE)?;
                self.io_events.events.push((*number, event));
            }
        }
        let mut entries = Vec::new();
        let mut fds = Vec::new();
        for (fd_index, (number, event)) in (0..).zip(&events) {
            let mut flags = 0;
            let mut flag = |is, flag| flags |= if is { flag } else { 0 };
            flag(event.value.is_some(), payload::IoEventFd::DATAMATCH);
            flag(event.ports, payload::IoEventFd::PIO);
            let entry = payload::IoEventFd {
                offset: event.offset,
                size: event.width.bytes() as u64,
                fd_index,
                kind: payload::IoEventFd::EVENTFD,
                flags,
                padding: 0,
                datamatch: event.value.unwrap_or(0),
            };
            entries.extend_from_slice(entry.as_bytes());
            fds.extend(self.io_events.get(*number));
        }
        session.reply_with(to, &[fixed.as_bytes(), &entries], &fds);
        Ok(())
    }

    /// One was signalled, or may have been. It is behind a command that waits, which otherwise would
    /// never have its turn where there is always a signal.
    pub(super) fn note_io_event(&mut self, number: u32) {
        let number = usize::try_from(number).unwrap_or(usize::MAX);
        let waits = self.session.as_ref().is_some_and(|session| session.first);
        let events = &mut self.io_events;
        let taken = events.get(number).map(event::take);
        let noted = if waits {
            &mut events.later
        } else {
            &mut events.signalled
        };
        if matches!(taken, Some(Ok(_))) && !noted.contains(&number) {
            noted.push_back(number);
        }
    }

    /// Looks for signals from before a command that was received.
    pub(super) fn note_io_events(&mut self) {
        let IoEvents {
            events, signalled, ..
        } = &mut self.io_events;
        for (number, event) in events {
            if event::take(event.as_fd()).is_ok() && !signalled.contains(number) {
                signalled.push_back(*number);
            }
        }
    }

    /// The write which a signal is.
    pub(super) fn take_io_event(&mut self, data: &mut Vec<u8>) -> Option<Request> {
        if !self.has_room() {
            return None;
        }
        let number = self.io_events.signalled.pop_front()?;
        let served = self.served.as_ref()?;
        let event = *served.description.io_events.get(number)?;
        data.clear();
        let value = event.value.unwrap_or(0).to_le_bytes();
        data.extend_from_slice(&value[..event.width.bytes()]);
        let operation = Operation::Write {
            region: event.region,
            offset: event.offset,
        };
        let id = self.launch(0, Flight::signal)?;
        Some(self.request(id, operation, false))
    }

    /// The client has gone, and may signal what it has for ever.
    pub(super) fn drop_io_events(&mut self, hub: &Hub) {
        for (_, event) in &self.io_events.events {
            hub.events.remove(event);
        }
        self.io_events = IoEvents::default();
    }
}
