// SPDX-License-Identifier: GPL-2.0
//! The life of a request: queued, taken, and completed, withdrawn or put back.
//!
//! This is the logic alone: no locks, no allocation, nothing of the kernel, so that the host can
//! test this very file (`tests/model`). The driver keeps a [`Queue`] under a spinlock.
//!
//! ```text
//!            push             take              reply
//!   client ───────▶ queued ─────────▶ taken ─────────────▶ gone
//!                     │ ▲               │ │
//!            withdraw │ └───────────────┘ │ withdraw        reply, or owner gone
//!                     ▼    owner gone     └────────▶ abandoned ─────────▶ gone
//!                   gone   (replay)
//! ```
//!
//! Requests are taken in the order in which they were queued. A barrier, such as a reset, is taken
//! when nothing before it is taken any more, and nothing behind it is until it has ended: whoever
//! works on it works on nothing else.

use core::{
    marker::PhantomData,
    ops::DerefMut, //
};

/// The number of a request: never used twice in the life of a queue, and ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct Id(u64);

impl Id {
    /// Bits which say where the entry is; the rest counts requests.
    const INDEX_BITS: u32 = 16;

    /// Restores an id which [`Id::raw`] gave out, or any other number: look-ups check it.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The number that stands for the request outside.
    pub(crate) const fn raw(self) -> u64 {
        self.0
    }

    const fn new(sequence: u64, index: u16) -> Self {
        Self((sequence << Self::INDEX_BITS) | index as u64)
    }

    const fn index(self) -> usize {
        (self.0 & ((1 << Self::INDEX_BITS) - 1)) as usize
    }
}

/// Who took a request: an attachment and the slot of it that holds the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct Holder {
    /// Number of the attachment.
    pub(crate) owner: u64,
    /// Slot of the attachment.
    pub(crate) slot: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
enum State {
    /// Waits to be taken.
    Queued,
    /// A process works on it, and its client waits.
    Taken(Holder),
    /// A process works on it, and nobody waits any more.
    Abandoned(Holder),
}

/// A place in the queue.
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Entry<T> {
    id: Id,
    state: State,
    replays: u32,
    barrier: bool,
    /// The next queued entry; meaningless in any other state.
    next: Option<u16>,
    payload: T,
}

/// Why a reply is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyError {
    /// There is no such request: it was never made, or it ended.
    Unknown,
    /// It was not taken.
    NotTaken,
    /// Another attachment took it.
    OtherOwner,
    /// The same attachment holds it in another slot.
    OtherSlot,
    /// Its client is gone. The request has ended now.
    Abandoned,
}

/// What became of a request whose client stopped waiting.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Withdrawn<T> {
    /// It was queued, and is gone.
    Removed(T),
    /// A process has it: its reply will be dropped.
    Abandoned,
    /// It had ended already.
    Ended,
}

/// A request as a process gets it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken<T> {
    /// Its number.
    pub(crate) id: Id,
    /// Whether a process took it before.
    pub(crate) replay: bool,
    /// What the client put in.
    pub(crate) payload: T,
}

/// Requests in flight, as many at a time as `S` has places.
///
/// # Invariants
///
/// - The list from `head` over `next` holds exactly the queued entries, by ascending id.
/// - `tail` is its last entry, `queued` its length, `taken` the number of the other entries.
/// - An entry's id names the place where the entry is.
/// - If `barrier`, the one entry that is not queued is a barrier; otherwise none is. What is queued
///   is younger than that barrier.
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Queue<T, S> {
    entries: S,
    head: Option<u16>,
    tail: Option<u16>,
    queued: u32,
    taken: u32,
    barrier: bool,
    max_replays: u32,
    sequence: u64,
    payload: PhantomData<T>,
}

impl<T: Clone, S: DerefMut<Target = [Option<Entry<T>>]>> Queue<T, S> {
    /// Makes an empty queue of the places in `entries`, at most 2^16, which must all be `None`. A
    /// request may take `max_replays` owners with it before it is given up.
    pub(crate) fn new(entries: S, max_replays: u32) -> Self {
        Self {
            entries,
            head: None,
            tail: None,
            queued: 0,
            taken: 0,
            barrier: false,
            max_replays,
            sequence: 0,
            payload: PhantomData,
        }
    }

    /// Requests waiting to be taken.
    pub(crate) fn queued(&self) -> u32 {
        self.queued
    }

    /// Requests taken and not answered, those nobody waits for included.
    pub(crate) fn taken(&self) -> u32 {
        self.taken
    }

    /// The payload of the request that was queued last, unless it was taken since.
    pub(crate) fn last_queued(&self) -> Option<&T> {
        let entry = self.entries[self.tail? as usize].as_ref()?;
        Some(&entry.payload)
    }

    /// Queues a request behind all others; `None` if no place is free.
    pub(crate) fn push(&mut self, payload: T) -> Option<Id> {
        self.push_as(payload, false)
    }

    /// As [`Queue::push`], a request that is never taken together with another.
    pub(crate) fn push_barrier(&mut self, payload: T) -> Option<Id> {
        self.push_as(payload, true)
    }

    fn push_as(&mut self, payload: T, barrier: bool) -> Option<Id> {
        let index = self.entries.iter().position(Option::is_none)?;
        let place = u16::try_from(index).ok()?;
        self.sequence += 1;
        let id = Id::new(self.sequence, place);
        self.entries[index] = Some(Entry {
            id,
            state: State::Queued,
            replays: 0,
            barrier,
            next: None,
            payload,
        });
        self.insert(place);
        Some(id)
    }

    /// Whether [`Queue::take`] would give a request.
    pub(crate) fn is_takable(&self) -> bool {
        self.takable().is_some()
    }

    /// The place of the oldest queued request, unless a barrier keeps it: that before it, or it.
    fn takable(&self) -> Option<u16> {
        let place = self.head?;
        let entry = self.entries[place as usize].as_ref()?;
        // While a barrier is queued nothing behind it is taken: all that is taken is older.
        let kept = self.barrier || (entry.barrier && self.taken > 0);
        (!kept).then_some(place)
    }

    /// Gives the oldest queued request to `holder`.
    pub(crate) fn take(&mut self, holder: Holder) -> Option<Taken<T>> {
        let place = self.takable()?;
        let entry = self.entries[place as usize].as_mut()?;
        self.head = entry.next.take();
        entry.state = State::Taken(holder);
        self.barrier = entry.barrier;
        let taken = Taken {
            id: entry.id,
            replay: entry.replays > 0,
            payload: entry.payload.clone(),
        };
        if self.head.is_none() {
            self.tail = None;
        }
        self.queued -= 1;
        self.taken += 1;
        Some(taken)
    }

    /// Puts a request back as if `holder` had never taken it, for the taker could not be told of it;
    /// says whether it still had it.
    pub(crate) fn untake(&mut self, id: Id, holder: Holder) -> bool {
        let Some(entry) = self.entry(id) else {
            return false;
        };
        match entry.state {
            State::Queued => false,
            State::Taken(by) if by == holder => {
                entry.state = State::Queued;
                self.given_back();
                self.insert(id.index() as u16);
                true
            }
            State::Abandoned(by) if by == holder => {
                self.remove(id);
                true
            }
            State::Taken(_) | State::Abandoned(_) => false,
        }
    }

    /// Ends a request with the reply of its holder, and hands its payload back.
    pub(crate) fn reply(&mut self, id: Id, holder: Holder) -> Result<T, ReplyError> {
        let entry = self.entry(id).ok_or(ReplyError::Unknown)?;
        let (held_by, abandoned) = match entry.state {
            State::Queued => return Err(ReplyError::NotTaken),
            State::Taken(holder) => (holder, false),
            State::Abandoned(holder) => (holder, true),
        };
        if held_by.owner != holder.owner {
            return Err(ReplyError::OtherOwner);
        }
        if held_by.slot != holder.slot {
            return Err(ReplyError::OtherSlot);
        }
        let payload = self.remove(id).ok_or(ReplyError::Unknown)?;
        if abandoned {
            return Err(ReplyError::Abandoned);
        }
        Ok(payload)
    }

    /// Takes a request back if nobody has taken it, and otherwise leaves it alone.
    pub(crate) fn withdraw_queued(&mut self, id: Id) -> Option<T> {
        match self.entry(id)?.state {
            State::Queued => self.remove(id),
            State::Taken(_) | State::Abandoned(_) => None,
        }
    }

    /// Says that the client of a request no longer waits for it.
    pub(crate) fn withdraw(&mut self, id: Id) -> Withdrawn<T> {
        let Some(entry) = self.entry(id) else {
            return Withdrawn::Ended;
        };
        match entry.state {
            State::Taken(holder) | State::Abandoned(holder) => {
                entry.state = State::Abandoned(holder);
                Withdrawn::Abandoned
            }
            State::Queued => match self.remove(id) {
                Some(payload) => Withdrawn::Removed(payload),
                None => Withdrawn::Ended,
            },
        }
    }

    /// Puts back what `owner` took, each request in its original place and marked as a replay;
    /// those nobody waits for end. Returns how many were put back.
    ///
    /// A request that was put back `max_replays` times already is not: it may be what ends its
    /// processes. It stays with the owner who is gone, for [`Queue::pop_poison`].
    pub(crate) fn owner_gone(&mut self, owner: u64) -> u32 {
        let mut replays = 0;
        for index in 0..self.entries.len() {
            let Some(entry) = self.entries[index].as_mut() else {
                continue;
            };
            match entry.state {
                State::Taken(holder) if holder.owner == owner => {
                    if entry.replays >= self.max_replays {
                        continue;
                    }
                    entry.state = State::Queued;
                    entry.replays += 1;
                    self.given_back();
                    self.insert(index as u16);
                    replays += 1;
                }
                State::Abandoned(holder) if holder.owner == owner => {
                    let id = entry.id;
                    self.remove(id);
                }
                _ => {}
            }
        }
        replays
    }

    /// Ends a request which `owner`, who is gone, was not relieved of.
    pub(crate) fn pop_poison(&mut self, owner: u64) -> Option<T> {
        let id = self
            .entries
            .iter()
            .flatten()
            .find_map(|entry| match entry.state {
                State::Taken(holder) if holder.owner == owner => Some(entry.id),
                _ => None,
            })?;
        self.remove(id)
    }

    /// Ends one of the requests that `which` says yes to, whatever its state, and hands its payload
    /// back. A reply to it is one to an unknown request.
    pub(crate) fn pop_where(&mut self, which: impl Fn(&T) -> bool) -> Option<T> {
        let mut entries = self.entries.iter().flatten();
        let id = entries.find(|entry| which(&entry.payload))?.id;
        self.remove(id)
    }

    /// Ends the oldest request, whatever its state, and hands its payload back.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let id = self.entries.iter().flatten().map(|entry| entry.id).min()?;
        self.remove(id)
    }

    fn entry(&mut self, id: Id) -> Option<&mut Entry<T>> {
        self.entries
            .get_mut(id.index())?
            .as_mut()
            .filter(|entry| entry.id == id)
    }

    /// Links the queued entry at `place` into the list, by its id.
    fn insert(&mut self, place: u16) {
        let Some(id) = self.entries[place as usize].as_ref().map(|entry| entry.id) else {
            return;
        };
        let mut before = None;
        // A new request is the youngest: it goes behind the tail without a walk.
        match self.tail {
            Some(tail) if self.id_at(tail) < Some(id) => before = Some(tail),
            _ => {
                let mut at = self.head;
                while let Some(current) = at {
                    if self.id_at(current) > Some(id) {
                        break;
                    }
                    before = Some(current);
                    at = self.next_of(current);
                }
            }
        }
        let after = match before {
            Some(before) => self.next_of(before),
            None => self.head,
        };
        self.set_next(place, after);
        match before {
            Some(before) => self.set_next(before, Some(place)),
            None => self.head = Some(place),
        }
        if after.is_none() {
            self.tail = Some(place);
        }
        self.queued += 1;
    }

    /// Unlinks an entry if it is queued, and frees its place.
    fn remove(&mut self, id: Id) -> Option<T> {
        let state = self.entry(id)?.state;
        let place = id.index() as u16;
        if state == State::Queued {
            let after = self.next_of(place);
            let mut before = None;
            let mut at = self.head;
            while let Some(current) = at {
                if current == place {
                    break;
                }
                before = Some(current);
                at = self.next_of(current);
            }
            match before {
                Some(before) => self.set_next(before, after),
                None => self.head = after,
            }
            if self.tail == Some(place) {
                self.tail = before;
            }
            self.queued -= 1;
        } else {
            self.given_back();
        }
        self.entries[id.index()].take().map(|entry| entry.payload)
    }

    /// Notes that one entry less is taken. If it was a barrier, it was the only one.
    fn given_back(&mut self) {
        self.taken -= 1;
        self.barrier = false;
    }

    fn id_at(&self, place: u16) -> Option<Id> {
        self.entries[place as usize].as_ref().map(|entry| entry.id)
    }

    fn next_of(&self, place: u16) -> Option<u16> {
        self.entries[place as usize].as_ref()?.next
    }

    fn set_next(&mut self, place: u16, next: Option<u16>) {
        if let Some(entry) = self.entries[place as usize].as_mut() {
            entry.next = next;
        }
    }
}
