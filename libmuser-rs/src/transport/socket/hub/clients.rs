// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How clients come and go.
//!
//! One is served at a time. When it has gone, the requests that it has in the device end, then the
//! device is reset, and then the next one is let in.

use std::os::fd::OwnedFd;

use super::{Closing, Handled, Hub, State, LOGGED};
use crate::error::{Error, Result};
use crate::transport::socket::door::Knock;
use crate::transport::socket::events::{Source, Watch};
use crate::transport::socket::flight::Flight;
use crate::transport::socket::session::Session;
use crate::transport::{Operation, Request};

impl State {
    /// Somebody is at the door.
    pub(super) fn answer_door(&mut self, hub: &Hub) -> Result<()> {
        if self.closing != Closing::No {
            return Ok(());
        }
        if let Some(session) = &mut self.session {
            // Who comes when another one goes waits until that is done.
            if session.has_hung_up() || !self.door.refuses() {
                return Ok(());
            }
        }
        let knock = self.door.accept().or_else(|error| {
            // The process may have too many descriptors for now.
            log::warn!("{error}");
            Ok::<_, Error>(Knock::Nobody)
        })?;
        match (knock, self.session.is_some()) {
            (Knock::Nobody, _) => {}
            (Knock::Closed, _) => self.shut = true,
            (Knock::Client(socket), true) => self.guests.add(socket, &hub.events),
            (Knock::Client(socket), false) => {
                self.sessions += 1;
                match Session::new(self.sessions, socket, self.framing, &hub.events) {
                    Ok(session) => {
                        log::debug!("client {} has connected", self.sessions);
                        self.session = Some(session);
                    }
                    Err(error) => log::warn!("a client can't be served: {error}"),
                }
            }
        }
        Ok(())
    }

    /// The client has gone, or can't be understood any more: what it had is given back.
    pub(super) fn end_session(&mut self, hub: &Hub) {
        let Some(session) = self.session.take() else {
            return;
        };
        session.unwatch(&hub.events);
        let reason = session.ended.as_deref().unwrap_or("it has gone");
        // Clients could fill the log by coming and going.
        let level = match session.number {
            0..=LOGGED if session.peer.is_some() => log::Level::Info,
            _ => log::Level::Debug,
        };
        log::log!(
            level,
            "client {} is not served any more: {reason}",
            session.number
        );
        self.irqs.disable_all();
        self.dma.clear();
        self.drop_gates(hub);
        self.drop_io_events(hub);
        self.logging = false;
        // Who has never said a word has changed nothing.
        if session.peer.is_some() {
            self.closing = Closing::Due;
        } else {
            self.keeper.wound_up(&[]);
        }
    }

    /// The earlier server did not come to an end with winding up its client.
    pub(in super::super) fn take_over_close(&mut self) {
        self.closing = Closing::Due;
    }

    /// Takes over a client of the earlier server's: so many messages come first that set up what that
    /// one had set up. Nothing of it is for the device.
    ///
    /// # Errors
    ///
    /// The supervisor has gone, or does not make sense.
    pub(in super::super) fn take_over(
        &mut self,
        hub: &Hub,
        stream: OwnedFd,
        count: u32,
    ) -> Result<()> {
        self.sessions += 1;
        let session = Session::new(self.sessions, stream, self.framing, &hub.events)?;
        self.session = Some(session);
        let refused = |message: String| Error::refused(libc::EPROTO, message);
        let mut data = Vec::new();
        for _ in 0..count {
            let incoming = loop {
                let Some(session) = &mut self.session else {
                    return Err(refused(
                        "the session that was to be taken over has ended".into(),
                    ));
                };
                session.flush();
                match session.next(&mut data) {
                    Ok(Some(incoming)) => break incoming,
                    Ok(None) => session
                        .main
                        .wait()
                        .map_err(|error| refused(error.to_string()))?,
                    Err(error) => return Err(refused(error.to_string())),
                }
            };
            match self.handle(hub, incoming, &mut data)? {
                Handled::Answered => {}
                Handled::Taken(_) | Handled::Later => {
                    return Err(refused(
                        "what sets a session up is not for the device".into(),
                    ))
                }
            }
        }
        Ok(())
    }

    /// The reset after a client, ahead of everything of the next one.
    pub(super) fn take_close(&mut self) -> Result<Option<Request>> {
        if !self.flights_are_over() {
            return Ok(None);
        }
        if let Some(served) = &mut self.served {
            if let Err(error) = served.areas.renew(&served.description, &*self.keeper) {
                log::error!("the next client shares memory with the last one: {error}");
            }
        }
        let Some(id) = self.launch(0, Flight::close) else {
            return Ok(None);
        };
        self.closing = Closing::Taken;
        self.exclusive = true;
        Ok(Some(self.request(
            id,
            Operation::Reset { close: true },
            false,
        )))
    }

    /// Watches the door while somebody may be let in, or turned away.
    pub(super) fn watch_door(&mut self, hub: &Hub) -> Result<()> {
        let waits = match &self.session {
            Some(session) => session.is_over() || !self.door.refuses(),
            None => false,
        };
        let watched = !self.shut && !waits && self.closing == Closing::No && !self.detached;
        if watched != self.door_watched {
            self.door_watched = watched;
            if watched {
                hub.events
                    .add(self.door.as_fd(), Source::Door, Watch::RECEIVE)?;
            } else {
                hub.events.remove(self.door.as_fd());
            }
        }
        Ok(())
    }
}
