// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients that come while another one is served: they are told, and turned away.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::events::{Events, Source};
use super::session::{Channel, Framing};
use crate::error::Errno;
use crate::vfio_user::link::Prefix;

/// How many may be there at a time.
const MOST: usize = 16;

/// Of how many the log tells at its usual level.
const LOGGED: u32 = 32;

/// Clients who have not been told yet.
#[derive(Debug, Default)]
pub(super) struct Guests {
    channels: BTreeMap<u32, Channel>,
    next: u32,
}

impl Guests {
    /// One more has come. Of too many, the one goes who came first.
    pub(super) fn add(&mut self, socket: OwnedFd, events: &Events) {
        let level = match self.next {
            0..LOGGED => log::Level::Warn,
            _ => log::Level::Debug,
        };
        log::log!(level, "another client is served: a second one is refused");
        let index = self.next;
        self.next = self.next.wrapping_add(1);
        if self.channels.len() >= MOST {
            if let Some((_, channel)) = self.channels.pop_first() {
                events.remove(&channel.sender);
            }
        }
        // What can't even be watched is closed at once.
        if let Ok(mut channel) = Channel::new(socket, Framing::Plain, Source::Guest(index), events)
        {
            // Nothing that it says is looked at, so what it gives is closed at once.
            channel.receiver.set_descriptors(0);
            self.channels.insert(index, channel);
        }
        self.turn_away(index, events);
    }

    /// Tells one that has said something why it is not served, and closes the connection.
    pub(super) fn turn_away(&mut self, index: u32, events: &Events) {
        let Some(channel) = self.channels.get_mut(&index) else {
            return;
        };
        let mut body = Vec::new();
        match channel.receive(&mut body) {
            Ok(None) => return,
            Ok(Some(incoming)) => {
                let header = incoming.header.reply(Err(Errno::EBUSY));
                // It is closed whether it hears that or not.
                let _ = channel.send(Prefix::default(), header, &[], &[]);
            }
            Err(_) => {}
        }
        events.remove(&channel.sender);
        self.channels.remove(&index);
    }

    /// All of them go.
    pub(super) fn clear(&mut self, events: &Events) {
        for channel in self.channels.values() {
            events.remove(&channel.sender);
        }
        self.channels.clear();
    }
}
