// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the threads of a server share: the door, the session, requests in flight, and the rules of
//! their order.
//!
//! Commands are handled in the order in which they come. Accesses may be in the device at the same
//! time; everything else waits until they have ended, and nothing behind it starts before it has.
//! Of writes that nobody waits for, it is the same for what is behind them.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::areas::Areas;
use super::door::Door;
use super::events::{Events, Happened, Source};
use super::flight::Flight;
use super::guests::Guests;
use super::interrupts::Gates;
use super::io_events::IoEvents;
use super::keeper::Keeper;
use super::session::{Channel, Framing, ReplyTo, Session};
use crate::error::{Errno, Error, Result};
use crate::transport::dma::{DmaTable, FileCache};
use crate::transport::irqs::Irqs;
use crate::transport::{Description, Operation, Reply, Request, RequestId, Take, Token};

mod clients;

/// Requests in flight at one time.
#[expect(clippy::cast_possible_truncation, reason = "they are 512")]
const PLACES: u16 = RequestId::PLACES as u16;
/// Places below this are for a supervisor to give, where there is one.
const SUPERVISED: u16 = PLACES / 2;
/// In the numbers of requests that this side gives: a supervisor's are without.
const OWN: u64 = 1 << 63;
/// Clients of which the log has the end at its usual level.
const LOGGED: u64 = 32;
/// Turns after which it is looked what has happened beside the client's commands.
const TURNS: u32 = 64;
/// Commands that are answered in one turn, and the time they may take together: a client that sends
/// without end must not keep whoever serves it from hearing anything else.
const ANSWERS: usize = 64;
const ANSWERING: Duration = Duration::from_millis(1);

/// What the threads of a server share.
#[derive(Debug)]
pub(super) struct Hub {
    state: Mutex<State>,
    pub(super) events: Events,
    /// Readable while somebody who waits for a reply of the client's has one.
    answered: EventFd,
}

/// What a device is, once it is attached.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) description: Description,
    pub(super) areas: Areas,
}

/// How far the end of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// There is one, or the next may come.
    No,
    /// The device is to be reset, when all requests have ended.
    Due,
    /// The device is being reset.
    Taken,
}

pub(super) struct State {
    pub(super) hub: Weak<Hub>,
    door: Box<dyn Door>,
    /// Whether nobody will come any more.
    shut: bool,
    pub(super) keeper: Box<dyn Keeper>,
    framing: Framing,
    pub(super) served: Option<Served>,
    pub(super) session: Option<Session>,
    sessions: u64,
    closing: Closing,
    pub(super) guests: Guests,
    pub(super) irqs: Arc<Irqs>,
    pub(super) dma: Arc<DmaTable>,
    pub(super) files: FileCache,
    pub(super) gates: Gates,
    pub(super) io_events: IoEvents,
    /// Whether the client wants to know what the device writes.
    pub(super) logging: bool,
    flights: Vec<Flight>,
    /// Flights of which the next part can be taken.
    due: VecDeque<RequestId>,
    /// Whether nothing may start before the flights have ended.
    pub(super) exclusive: bool,
    places: Vec<u16>,
    requests: u64,
    detached: bool,
    /// What `Hub::events` and `Hub::answered` show.
    inside: bool,
    answers: bool,
    door_watched: bool,
    happened: Happened,
    turns: u32,
}

impl Hub {
    pub(super) fn new(
        door: Box<dyn Door>,
        keeper: Box<dyn Keeper>,
        framing: Framing,
    ) -> Result<Arc<Self>> {
        let events = Events::new()?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let answered = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::io("making an eventfd", errno))?;
        let places = match framing {
            Framing::Plain => 0..PLACES,
            Framing::Numbered => SUPERVISED..PLACES,
        };
        Ok(Arc::new_cyclic(|hub| {
            let state = State {
                hub: Weak::clone(hub),
                door,
                shut: false,
                keeper,
                framing,
                served: None,
                session: None,
                sessions: 0,
                closing: Closing::No,
                guests: Guests::default(),
                irqs: Arc::default(),
                dma: Arc::default(),
                files: FileCache::default(),
                gates: Gates::default(),
                io_events: IoEvents::default(),
                logging: false,
                flights: Vec::new(),
                due: VecDeque::new(),
                exclusive: false,
                places: places.rev().collect(),
                requests: first_request(),
                detached: false,
                inside: false,
                answers: false,
                door_watched: false,
                happened: Happened::default(),
                turns: 0,
            };
            Self {
                state: Mutex::new(state),
                events,
                answered,
            }
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answered(&self) -> BorrowedFd<'_> {
        self.answered.as_fd()
    }

    /// See [`Transport::turn`](crate::transport::Transport::turn).
    pub(super) fn turn(
        &self,
        reply: Option<Reply>,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        let mut state = if reply.is_none() && take == Take::Ready {
            match self.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(state)) => state.into_inner(),
                // Whoever has it takes what there is, or leaves the descriptor readable.
                Err(TryLockError::WouldBlock) => return Ok(None),
            }
        } else {
            self.lock()
        };
        // Who replies looks at his client first: others are found by the descriptor.
        let mut look = reply.is_none();
        if let Some(reply) = reply {
            state.finish(reply, data);
        }
        loop {
            let taken = match take {
                Take::Nothing => Ok(None),
                Take::Ready | Take::Wait => state.take(self, look, data),
            };
            state.update(self)?;
            match taken? {
                None if take == Take::Wait => {}
                taken => return Ok(taken),
            }
            drop(state);
            self.events.wait()?;
            look = true;
            state = self.lock();
        }
    }

    pub(super) fn detach(&self) {
        let mut state = self.lock();
        state.detached = true;
        state.keeper.detach();
        if let Some(session) = state.session.take() {
            session.unwatch(&self.events);
        }
        state.guests.clear(&self.events);
        state.irqs.disable_all();
        state.dma.clear();
    }
}

impl AsFd for Hub {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl State {
    /// The session of this number, if it is still there.
    pub(super) fn session_of(&mut self, number: u64) -> Option<&mut Session> {
        let session = self.session.as_mut();
        session.filter(|session| session.number == number)
    }

    /// A request that goes to the device, with the number that a supervisor has given it, if it has.
    /// There is none if too many are there already.
    pub(super) fn launch(
        &mut self,
        number: u64,
        make: impl FnOnce(RequestId) -> Flight,
    ) -> Option<RequestId> {
        let id = if number == 0 {
            let place = self.places.pop()?;
            self.requests += 1;
            RequestId::new(self.requests << 16 | u64::from(place) | OWN)
        } else {
            RequestId::new(number)
        };
        self.flights.push(make(id));
        Some(id)
    }

    /// Whether nothing is under way.
    pub(super) fn flights_are_over(&self) -> bool {
        self.flights.is_empty()
    }

    /// Whether a request can be launched.
    pub(super) fn has_room(&self) -> bool {
        !self.places.is_empty()
    }

    /// A reply of the device's: the request has ended, or its next part is due.
    fn finish(&mut self, reply: Reply, data: &mut Vec<u8>) {
        let id = reply.token.request();
        let Some(at) = self.flights.iter().position(|flight| flight.id == id) else {
            // Nobody waits for it: it is one of before a detach.
            return;
        };
        let mut flight = self.flights.swap_remove(at);
        if let Some(session) = &mut self.session {
            session.waits = false;
        }
        if self.advance(&mut flight, reply.result, data) {
            self.exclusive &= !flight.excludes;
            if flight.has_own_number() {
                let place = u16::try_from(id.place()).ok();
                self.places.extend(place.filter(|place| *place < PLACES));
            }
            if flight.closes {
                self.closing = Closing::No;
                if let Some(served) = &self.served {
                    let areas: Vec<_> = served.areas.files().collect();
                    self.keeper.wound_up(&areas);
                }
            }
        } else {
            self.due.push_back(id);
            self.flights.push(flight);
        }
    }

    /// The request for a flight that is ready for the device.
    pub(super) fn request(&self, id: RequestId, operation: Operation, replay: bool) -> Request {
        let reads = matches!(operation, Operation::Read { .. });
        Request {
            replay,
            ..Request::new(Token::new(id, 0, reads), operation)
        }
    }

    /// Takes the next request, if there is one.
    fn take(&mut self, hub: &Hub, look: bool, data: &mut Vec<u8>) -> Result<Option<Request>> {
        if self.detached || self.served.is_none() {
            return Err(Error::io("serving a device", nix::errno::Errno::ENOTCONN));
        }
        if let Some(request) = self.take_part(data) {
            return Ok(Some(request));
        }
        self.turns = self.turns.wrapping_add(1);
        if self.turns % TURNS == 0 {
            self.look_around(hub)?;
        }
        let request = self.take_new(hub, data)?;
        if request.is_some() || !look {
            return Ok(request);
        }
        self.look_around(hub)?;
        self.take_new(hub, data)
    }

    /// What the device has to do next, if it may.
    fn take_new(&mut self, hub: &Hub, data: &mut Vec<u8>) -> Result<Option<Request>> {
        if self.exclusive {
            return Ok(None);
        }
        if let Some(request) = self.take_io_event(data) {
            return Ok(Some(request));
        }
        self.take_command(hub, data)
    }

    /// The next part of a flight.
    fn take_part(&mut self, data: &mut Vec<u8>) -> Option<Request> {
        let id = self.due.pop_front()?;
        let flight = self.flights.iter_mut().find(|flight| flight.id == id)?;
        let operation = flight.operation(data)?;
        let replay = flight.replay;
        Some(self.request(id, operation, replay))
    }

    /// The request which the client's next command is; commands that the device need not know of
    /// are answered, though not without end: the descriptor stays readable for the rest.
    fn take_command(&mut self, hub: &Hub, data: &mut Vec<u8>) -> Result<Option<Request>> {
        let mut begin = None;
        for _ in 0..ANSWERS {
            if begin.is_some_and(|begin: Instant| begin.elapsed() >= ANSWERING) {
                break;
            }
            if self.exclusive {
                return Ok(None);
            }
            if self.closing == Closing::Due {
                return self.take_close();
            }
            let Some(session) = &mut self.session else {
                if self.shut && self.flights_are_over() {
                    return Err(Error::removed());
                }
                return Ok(None);
            };
            // To who has gone nothing is sent any more, so that there is nothing to wait for.
            if !session.flush() && !session.is_over() {
                return Ok(None);
            }
            session.waits = false;
            if session.ended.is_none() {
                match session.next(data) {
                    Ok(Some(incoming)) => match self.handle(hub, incoming, data)? {
                        Handled::Answered => {
                            begin.get_or_insert_with(Instant::now);
                            continue;
                        }
                        Handled::Taken(request) => return Ok(Some(request)),
                        Handled::Later => return Ok(None),
                    },
                    Ok(None) => return Ok(None),
                    Err(error) => session.end(error.to_string()),
                }
            }
            self.end_session(hub);
        }
        Ok(None)
    }

    /// Looks at what is not the client's commands.
    fn look_around(&mut self, hub: &Hub) -> Result<()> {
        let mut happened = std::mem::take(&mut self.happened);
        let mut looked = hub.events.look(&mut happened);
        if let Some(session) = &mut self.session {
            if session.twin.as_ref().is_some_and(Channel::is_ready) {
                session.pump_twin();
            }
        }
        for source in happened.sources() {
            match source {
                Source::Inside | Source::Main => {}
                Source::Door => looked = looked.and_then(|()| self.answer_door(hub)),
                Source::Twin => {
                    if let Some(session) = &mut self.session {
                        session.flush();
                        session.pump_twin();
                    }
                }
                Source::Guest(index) => self.guests.turn_away(index, &hub.events),
                Source::Gate(number) => self.pass_gate(hub, number),
                Source::IoEvent(number) => self.note_io_event(number),
            }
        }
        self.happened = happened;
        looked
    }

    /// Receives and sends what can be, for whoever waits for a reply of the client's.
    pub(super) fn pump(&mut self) {
        if let Some(session) = &mut self.session {
            session.flush();
            session.pump();
            session.pump_twin();
        }
    }

    /// Has the descriptors show what there is.
    pub(super) fn update(&mut self, hub: &Hub) -> Result<()> {
        let blocked = self.exclusive || self.closing != Closing::No;
        if let Some(session) = &mut self.session {
            if blocked || session.is_blocked() || session.awaits_reply() {
                // What can't be handled yet must not keep the descriptor readable, and a reply that
                // was received along with a command is for who waits: the socket does not show it.
                session.pump();
            }
        }
        let mut inside = !self.due.is_empty();
        inside |= self.closing == Closing::Due && self.flights_are_over() && !self.exclusive;
        inside |= self.session.is_none() && self.shut && self.flights_are_over();
        inside |= self.io_events.has_signals() && !self.exclusive && self.has_room();
        let mut answers = false;
        if let Some(session) = &mut self.session {
            session.watch(&hub.events)?;
            // That it has gone may just have been found, and then replies block nothing any more.
            inside |= !blocked && !session.is_blocked() && session.is_ready();
            // Of what can't be handled yet, some may be in the buffer still, and is to be pumped.
            inside |= session.can_pump();
            answers = session.exchanges.has_answers();
        }
        if inside != self.inside {
            self.inside = inside;
            hub.events.set_inside(inside);
        }
        if answers != self.answers {
            self.answers = answers;
            // Neither can fail: the counter is 0 before the write and 1 before the read.
            let _ = if answers {
                hub.answered.write(1).map(drop)
            } else {
                hub.answered.read().map(drop)
            };
        }
        self.watch_door(hub)
    }

    /// Replies to the client of a flight, if it is still there.
    pub(super) fn reply_to(&mut self, to: ReplyTo, result: Result<&[&[u8]], Errno>) {
        let Some(session) = self.session_of(to.session) else {
            return;
        };
        match result {
            Ok(payload) => session.reply(to, payload),
            Err(errno) => session.refuse(to, errno, format_args!("the device says so")),
        }
    }
}

/// What numbers of requests begin with: what an earlier server has left says of its requests by
/// their numbers what was done, and must not mean those of this one.
fn first_request() -> u64 {
    let epoch = std::time::SystemTime::UNIX_EPOCH;
    let micros = epoch.elapsed().map_or(0, |elapsed| elapsed.as_micros());
    u64::try_from(micros).unwrap_or(0) & (u64::MAX >> 18)
}

/// What has become of a command.
#[derive(Debug)]
pub(super) enum Handled {
    /// It is done.
    Answered,
    /// The device does it.
    Taken(Request),
    /// It has to wait for the requests in flight.
    Later,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("door", &self.door)
            .field("session", &self.session.as_ref().map(|s| s.number))
            .field("flights", &self.flights.len())
            .field("closing", &self.closing)
            .finish_non_exhaustive()
    }
}
