// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a controller is, as bytes that outlive the process: registers, features, queues, and the
//! commands that were fetched and not completed.
//!
//! The crate's documentation says in which order it changes, and why.

use std::ops::Range;

use libmuser::{Result, State};
use zerocopy::{FromBytes, FromZeros, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command::{Command, Completion};
use crate::spec::{ERROR_ENTRIES, TEMPERATURE, WARNING_TEMPERATURE};

/// Commands of one submission queue that can be under way.
pub(crate) const SLOTS: usize = 32;
/// Completions that are posted as one.
pub(crate) const BATCH: usize = 8;

/// Registers, features and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Control {
    pub(crate) asq: u64,
    pub(crate) acq: u64,
    pub(crate) cc: u32,
    pub(crate) csts: u32,
    pub(crate) aqa: u32,
    /// 0: the controller has never had power.
    pub(crate) version: u32,
    pub(crate) features: Features,
    /// Events that happened and were not told yet, and those that were told and whose log page was
    /// not read yet: a bit each, see [`crate::event`].
    pub(crate) events: u32,
    pub(crate) told: u32,
    /// Errors there ever were; the log has the last ones.
    pub(crate) errors: u64,
    pub(crate) media_errors: u64,
    pub(crate) log: [ErrorEntry; ERROR_ENTRIES],
}

/// Values of the features that a host can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Features {
    pub(crate) arbitration: u32,
    pub(crate) power: u32,
    pub(crate) over_temperature: u32,
    pub(crate) under_temperature: u32,
    pub(crate) error_recovery: u32,
    pub(crate) write_cache: u32,
    pub(crate) coalescing: u32,
    pub(crate) atomicity: u32,
    pub(crate) events: u32,
    /// Of each vector, whether its coalescing is disabled.
    pub(crate) vectors: [u32; 4],
    pub(crate) reserved: u32,
}

impl Features {
    pub(crate) const DEFAULT: Self = Self {
        arbitration: 0,
        power: 0,
        over_temperature: WARNING_TEMPERATURE as u32,
        under_temperature: 0,
        error_recovery: 0,
        write_cache: 1,
        coalescing: 0,
        atomicity: 0,
        events: 0,
        vectors: [0; 4],
        reserved: 0,
    };

    /// What of SMART's critical warnings is so: the temperature is beyond a threshold.
    pub(crate) fn critical_warning(&self) -> u8 {
        let now = u32::from(TEMPERATURE);
        let warm = now >= self.over_temperature || now <= self.under_temperature;
        if warm {
            1 << 1
        } else {
            0
        }
    }
}

/// An entry of the error log (figure 195), as much as there is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ErrorEntry {
    pub(crate) number: u64,
    pub(crate) lba: u64,
    pub(crate) nsid: u32,
    pub(crate) sq_id: u16,
    pub(crate) cid: u16,
    pub(crate) status: u16,
    pub(crate) reserved: [u16; 3],
}

/// A submission queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Submission {
    pub(crate) base: u64,
    /// Entries; 0: there is no such queue.
    pub(crate) size: u32,
    /// The next entry to fetch.
    pub(crate) head: u32,
    pub(crate) cq: u32,
    /// Whether it is about to be deleted, and nothing of it is to be done any more.
    pub(crate) closing: u32,
    /// What it has done since the controller was made, for SMART.
    pub(crate) work: Work,
    /// Commands under way.
    pub(crate) slots: [Slot; SLOTS],
}

/// Counters of SMART.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct Work {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
}

impl Work {
    pub(crate) fn add(&mut self, other: &Self) {
        self.reads = self.reads.wrapping_add(other.reads);
        self.writes = self.writes.wrapping_add(other.writes);
        self.bytes_read = self.bytes_read.wrapping_add(other.bytes_read);
        self.bytes_written = self.bytes_written.wrapping_add(other.bytes_written);
    }
}

/// A command that was fetched, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Slot {
    /// 0: none.
    pub(crate) used: u64,
    pub(crate) command: Command,
}

/// A completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct CompletionQueue {
    pub(crate) base: u64,
    /// Entries; 0: there is no such queue.
    pub(crate) size: u32,
    /// The next entry to post.
    pub(crate) tail: u32,
    /// The phase tag of that entry.
    pub(crate) phase: u32,
    pub(crate) vector: u32,
    pub(crate) interrupts: u32,
    /// How many of `last`, which lie before the tail, may not lie in the host's memory yet.
    pub(crate) posted: u32,
    pub(crate) last: [Completion; BATCH],
}

impl Submission {
    pub(crate) fn exists(&self) -> bool {
        self.size > 0
    }

    /// A new queue; what the old one of this number has done is not forgotten.
    pub(crate) fn create(&mut self, base: u64, size: u32, cq: u32) {
        let work = self.work;
        *self = Self {
            base,
            size,
            cq,
            work,
            ..Self::new_zeroed()
        };
    }

    pub(crate) fn delete(&mut self) {
        self.create(0, 0, 0);
    }

    /// Takes commands over, as many as there are slots for them.
    pub(crate) fn accept(&mut self, commands: &[Command]) {
        let free = self.slots.iter_mut().filter(|slot| slot.used == 0);
        for (slot, command) in free.zip(commands) {
            *slot = Slot {
                used: 1,
                command: *command,
            };
            self.head = (self.head + 1) % self.size.max(1);
        }
    }

    pub(crate) fn free_slots(&self) -> usize {
        self.slots.iter().filter(|slot| slot.used == 0).count()
    }
}

impl CompletionQueue {
    pub(crate) fn exists(&self) -> bool {
        self.size > 0
    }

    pub(crate) fn create(&mut self, base: u64, size: u32, vector: Option<u32>) {
        *self = Self {
            base,
            size,
            phase: 1,
            vector: vector.unwrap_or(0),
            interrupts: vector.is_some().into(),
            ..Self::new_zeroed()
        };
    }

    pub(crate) fn delete(&mut self) {
        *self = Self::new_zeroed();
    }

    /// How many entries the host has room for, which has taken those before `head`.
    pub(crate) fn room(&self, head: u32) -> usize {
        if head >= self.size {
            return 0;
        }
        // One entry stays empty, so that full is not empty.
        let room = (head + self.size - self.tail - 1) % self.size;
        usize::try_from(room).unwrap_or(0)
    }

    /// Forgets what was posted before, which lies in the host's memory by now.
    pub(crate) fn begin(&mut self) {
        self.posted = 0;
    }

    /// Posts one of a batch. The caller has looked that there is room for it.
    pub(crate) fn post(&mut self, mut completion: Completion) {
        let phase = u16::from(self.phase != 0);
        completion.status.set(completion.status.get() & !1 | phase);
        let posted = usize::try_from(self.posted).unwrap_or(BATCH);
        if let Some(place) = self.last.get_mut(posted) {
            *place = completion;
            self.posted += 1;
            self.tail += 1;
            if self.tail >= self.size {
                self.tail = 0;
                self.phase ^= 1;
            }
        }
    }

    /// What was posted last, each with its place in the queue.
    pub(crate) fn batch(&self) -> impl Iterator<Item = (u32, Completion)> + '_ {
        let (size, count) = (self.size.max(1), self.posted.min(self.size));
        let first = (self.tail + size - count % size) % size;
        let last = self.last.iter().zip(0..count);
        last.map(move |(completion, number)| ((first + number) % size, *completion))
    }
}

/// All of it, for what changes much at once.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) control: Control,
    pub(crate) sqs: Vec<Submission>,
    pub(crate) cqs: Vec<CompletionQueue>,
}

/// Where all of it is kept. A handle: clone it.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    state: State,
    /// Pairs of queues, with those for administration.
    queues: usize,
}

impl Kept {
    pub(crate) fn new(state: State, queues: usize) -> Self {
        Self { state, queues }
    }

    /// Bytes of state.
    pub(crate) const fn size(queues: usize) -> usize {
        size_of::<Control>() + queues * (size_of::<Submission>() + size_of::<CompletionQueue>())
    }

    pub(crate) fn control(&self) -> Control {
        self.state.read(|bytes| load(bytes, Self::at_control()))
    }

    pub(crate) fn sq(&self, queue: usize) -> Submission {
        self.state.read(|bytes| load(bytes, self.at_sq(queue)))
    }

    pub(crate) fn cq(&self, queue: usize) -> CompletionQueue {
        self.state.read(|bytes| load(bytes, self.at_cq(queue)))
    }

    /// Changes registers, features or logs.
    ///
    /// # Errors
    ///
    /// Here and in what follows: the server has ended, and the controller is another process's.
    pub(crate) fn change_control<R>(&self, work: impl FnOnce(&mut Control) -> R) -> Result<R> {
        let parts = [Self::at_control()];
        self.state.update_parts(parts, |[bytes]| with(bytes, work))
    }

    pub(crate) fn change_sq<R>(
        &self,
        queue: usize,
        work: impl FnOnce(&mut Submission) -> R,
    ) -> Result<R> {
        let parts = [self.at_sq(queue)];
        self.state.update_parts(parts, |[bytes]| with(bytes, work))
    }

    /// Changes a pair of queues.
    pub(crate) fn change_pair<R>(
        &self,
        sq: usize,
        cq: usize,
        work: impl FnOnce(&mut Submission, &mut CompletionQueue) -> R,
    ) -> Result<R> {
        let parts = [self.at_sq(sq), self.at_cq(cq)];
        self.state.update_parts(parts, |[submission, completion]| {
            with(submission, |sq| with(completion, |cq| work(sq, cq)))
        })
    }

    pub(crate) fn change<R>(&self, work: impl FnOnce(&mut Whole) -> R) -> Result<R> {
        let all = 0..Self::size(self.queues);
        self.state.update_parts([all], |[bytes]| {
            let queues = 0..self.queues;
            let mut whole = Whole {
                control: load(bytes, Self::at_control()),
                sqs: queues.clone().map(|q| load(bytes, self.at_sq(q))).collect(),
                cqs: queues.clone().map(|q| load(bytes, self.at_cq(q))).collect(),
            };
            let result = work(&mut whole);
            store(bytes, Self::at_control(), &whole.control);
            for queue in queues {
                store(bytes, self.at_sq(queue), &whole.sqs[queue]);
                store(bytes, self.at_cq(queue), &whole.cqs[queue]);
            }
            result
        })
    }

    fn at_control() -> Range<usize> {
        0..size_of::<Control>()
    }

    fn at_sq(&self, queue: usize) -> Range<usize> {
        let start = size_of::<Control>() + queue * size_of::<Submission>();
        start..start + size_of::<Submission>()
    }

    fn at_cq(&self, queue: usize) -> Range<usize> {
        let before = size_of::<Control>() + self.queues * size_of::<Submission>();
        let start = before + queue * size_of::<CompletionQueue>();
        start..start + size_of::<CompletionQueue>()
    }
}

/// Copies, for nobody says that the bytes are aligned.
fn load<T: FromBytes>(bytes: &[u8], at: Range<usize>) -> T {
    let found = bytes
        .get(at)
        .and_then(|bytes| T::read_from_bytes(bytes).ok());
    found.unwrap_or_else(T::new_zeroed)
}

fn store<T: IntoBytes + zerocopy::Immutable>(bytes: &mut [u8], at: Range<usize>, value: &T) {
    if let Some(place) = bytes.get_mut(at) {
        place.copy_from_slice(value.as_bytes());
    }
}

fn with<T, R>(bytes: &mut [u8], work: impl FnOnce(&mut T) -> R) -> R
where
    T: FromBytes + IntoBytes + zerocopy::Immutable,
{
    let all = 0..bytes.len();
    let mut value = load(bytes, all.clone());
    let result = work(&mut value);
    store(bytes, all, &value);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(cid: u16) -> Completion {
        Completion {
            cid: cid.into(),
            ..Completion::new_zeroed()
        }
    }

    #[test]
    fn phase_flips_where_the_queue_begins_again() {
        let mut cq = CompletionQueue::new_zeroed();
        cq.create(0, 3, Some(1));
        let mut seen = Vec::new();
        for cid in 0..7 {
            cq.begin();
            cq.post(completion(cid));
            seen.extend(cq.batch().map(|(at, cqe)| (at, cqe.status.get())));
        }

        assert_eq!(
            seen,
            [(0, 1), (1, 1), (2, 1), (0, 0), (1, 0), (2, 0), (0, 1)]
        );
    }

    #[test]
    fn batch_over_the_end_is_in_its_places() {
        let mut cq = CompletionQueue::new_zeroed();
        cq.create(0, 4, None);
        cq.tail = 3;
        cq.begin();
        for cid in 0..3 {
            cq.post(completion(cid));
        }

        let places: Vec<_> = cq.batch().map(|(at, cqe)| (at, cqe.cid.get())).collect();

        assert_eq!(places, [(3, 0), (0, 1), (1, 2)]);
    }

    #[test]
    fn room_is_one_less_than_the_size() {
        let mut cq = CompletionQueue::new_zeroed();
        cq.create(0, 4, None);

        assert_eq!(cq.room(0), 3);
        cq.tail = 3;
        assert_eq!(cq.room(0), 0);
        assert_eq!(cq.room(2), 2);
        assert_eq!(cq.room(4), 0);
        assert_eq!(cq.room(u32::MAX), 0);
    }

    #[test]
    fn accept_takes_what_there_is_room_for() {
        let mut sq = Submission::new_zeroed();
        sq.create(0, 40, 0);
        let commands = [Command::new_zeroed(); 40];

        sq.accept(&commands[..30]);
        assert_eq!((sq.free_slots(), sq.head), (2, 30));
        sq.accept(&commands);

        assert_eq!((sq.free_slots(), sq.head), (0, 32));
    }
}
