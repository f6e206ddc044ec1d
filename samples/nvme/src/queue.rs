// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a submission queue: it fetches commands, has them carried out, and posts what came
//! of them. The crate's documentation has the order in which it does so.

use std::os::fd::AsFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use libmuser::{DmaAccess, DmaRange, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::admin::{self, Change, Outcome};
use crate::command::{Answer, Command, Completion};
use crate::controller::{Core, Mapped};
use crate::engine::Engine;
use crate::event::Event;
use crate::io::{self, Plan, Rest};
use crate::kept::{CompletionQueue, ErrorEntry, Submission, Work, BATCH, SLOTS};
use crate::spec::{admin as opcode, CQE, ERROR_ENTRIES, SQE};

/// A submission queue's worker. What is kept is kept elsewhere: this may be lost.
#[derive(Debug)]
pub(crate) struct Worker {
    queue: usize,
    /// Before what is under way: its end waits for the memory that it uses.
    engine: Engine,
    running: Vec<Option<Rest>>,
    /// Slots whose commands this worker has begun.
    begun: [bool; SLOTS],
    finished: Vec<Finished>,
    memory: Option<Mapped>,
    /// A tail that made no sense, and of which the host was told.
    bad_tail: Option<u32>,
}

/// What came of the command in a slot.
#[derive(Debug)]
struct Finished {
    slot: usize,
    end: End,
    work: Work,
}

#[derive(Debug)]
enum End {
    Answer(Answer),
    Change(Change),
}

/// Waits for work and does it, until the controller ends.
pub(crate) fn run(core: &Core, queue: usize) {
    let seat = &core.seats[queue];
    while !core.is_over() {
        let mut fds = [PollFd::new(seat.wake.as_fd(), PollFlags::POLLIN)];
        // A signal's interruption is as good as a wake-up.
        let _ = poll(&mut fds, PollTimeout::NONE);
        // From here on, whoever wakes this thread finds it awake at the next wait.
        let _ = seat.wake.read();
        // Who pauses it wakes it when he is done.
        if seat.is_paused() {
            continue;
        }
        let work = AssertUnwindSafe(|| seat.lock().work(core));
        if catch_unwind(work).is_err() {
            core.fail(&format_args!("the worker of queue {queue} panicked"));
        }
    }
}

impl Worker {
    pub(crate) fn new(queue: usize, engine: Engine) -> Self {
        Self {
            queue,
            engine,
            running: (0..SLOTS).map(|_| None).collect(),
            begun: [false; SLOTS],
            finished: Vec::new(),
            memory: None,
            bad_tail: None,
        }
    }

    /// Forgets the queue. Nothing is under way.
    pub(crate) fn forget(&mut self) {
        self.begun = [false; SLOTS];
        self.finished.clear();
        self.memory = None;
        self.bad_tail = None;
    }

    /// Works until there is nothing to do, or somebody wants it to stop.
    fn work(&mut self, core: &Core) {
        let seat = &core.seats[self.queue];
        loop {
            let goes_on = core.is_live() && !core.is_over() && !seat.is_paused();
            let progress = match self.step(core, goes_on) {
                Ok(progress) => progress,
                // The server has ended: the rest is the next one's.
                Err(error) => {
                    log::debug!("queue {}: {error}", self.queue);
                    false
                }
            };
            if self.running.iter().any(Option::is_some) {
                self.wait(core);
            } else if !progress {
                return;
            }
        }
    }

    /// Posts what has ended, and begins what is new if it is to; tells whether there was any.
    fn step(&mut self, core: &Core, goes_on: bool) -> Result<bool> {
        self.post(core)?;
        if !goes_on {
            return Ok(false);
        }
        let told = self.queue == 0 && self.tell(core)?;
        let fetched = self.fetch(core)?;
        let begun = self.begin(core);
        self.post(core)?;
        Ok(told || fetched || begun)
    }

    /// Waits until something under way has ended, or somebody wakes this thread.
    fn wait(&mut self, core: &Core) {
        let wake = &core.seats[self.queue].wake;
        let (running, finished) = (&mut self.running, &mut self.finished);
        let waited = self.engine.wait(wake.as_fd(), &mut |slot, ended| {
            if let Some(rest) = running.get_mut(slot).and_then(Option::take) {
                let (answer, work) = rest.finish(ended);
                finished.push(Finished {
                    slot,
                    end: End::Answer(answer),
                    work,
                });
            }
        });
        let _ = wake.read();
        if let Err(error) = waited {
            // What is under way can't be forgotten: the kernel uses its memory. So it is asked again.
            if core.is_live() {
                let queue = self.queue;
                core.fail(&format_args!("input and output of queue {queue}: {error}"));
            }
            std::thread::yield_now();
        }
    }

    /// Takes commands over from the host's memory; tells whether there were any.
    fn fetch(&mut self, core: &Core) -> Result<bool> {
        let sq = core.kept.sq(self.queue);
        if !sq.exists() || sq.closing != 0 {
            return Ok(false);
        }
        let tail = core.tail(self.queue);
        if tail >= sq.size {
            if self.bad_tail.replace(tail) != Some(tail) {
                core.note(Event::InvalidDoorbellValue);
            }
            return Ok(false);
        }
        self.bad_tail = None;
        let there = (tail + sq.size - sq.head) % sq.size;
        let count = usize::try_from(there).unwrap_or(0).min(sq.free_slots());
        if count == 0 {
            return Ok(false);
        }
        let commands = match self.read(core, &sq, count) {
            Ok(commands) => commands,
            Err(error) => {
                core.fail(&format_args!("submission queue {}: {error}", self.queue));
                return Ok(false);
            }
        };
        core.kept.change_sq(self.queue, |sq| sq.accept(&commands))?;
        Ok(true)
    }

    fn read(&mut self, core: &Core, sq: &Submission, count: usize) -> Result<Vec<Command>> {
        let memory = map(
            core,
            &mut self.memory,
            sq.base,
            sq.size,
            SQE,
            DmaAccess::Read,
        )?;
        let mut commands = vec![Command::new_zeroed(); count];
        for (command, entry) in commands.iter_mut().zip(sq.head..) {
            let at = usize::try_from(entry % sq.size).unwrap_or(0) * SQE;
            memory.read(at, command.as_mut_bytes())?;
        }
        Ok(commands)
    }

    /// Begins what is in the slots and was not begun, by this worker; tells whether there was any.
    fn begin(&mut self, core: &Core) -> bool {
        let sq = core.kept.sq(self.queue);
        if sq.closing != 0 {
            return false;
        }
        let mut any = false;
        for (slot, kept) in sq.slots.iter().enumerate() {
            if kept.used == 0 || self.begun[slot] {
                continue;
            }
            // What a command of administration changes must be posted at once.
            if self.queue == 0 && !self.finished.is_empty() && self.post(core).is_err() {
                return false;
            }
            if self.queue == 0 && !self.finished.is_empty() {
                break;
            }
            self.begun[slot] = true;
            any = true;
            let end = match self.queue {
                0 => self.administer(core, &sq, &kept.command),
                _ => self.carry_out(core, slot, &kept.command),
            };
            if let Some((end, work)) = end {
                self.finished.push(Finished { slot, end, work });
            }
        }
        any
    }

    fn administer(&self, core: &Core, sq: &Submission, command: &Command) -> Option<(End, Work)> {
        let slots = sq.slots.iter().zip(self.begun);
        let held = slots
            .filter(|(slot, begun)| *begun && slot.used != 0)
            .filter(|(slot, _)| slot.command.opcode == opcode::EVENT_REQUEST)
            .count();
        let own = usize::from(command.opcode == opcode::EVENT_REQUEST);
        log::trace!("admin command {:#04x}", command.opcode);
        let end = match admin::execute(core, command, held - own) {
            Outcome::Done(answer) => End::Answer(answer),
            Outcome::Change(change) => End::Change(change),
            Outcome::Held => return None,
        };
        Some((end, Work::default()))
    }

    fn carry_out(&mut self, core: &Core, slot: usize, command: &Command) -> Option<(End, Work)> {
        let (answer, work) = match io::plan(core, command) {
            Plan::Done(answer) => (answer, Work::default()),
            Plan::Job(job, rest) => match self.engine.start(slot, job) {
                Some(ended) => rest.finish(ended),
                None => {
                    self.running[slot] = Some(rest);
                    return None;
                }
            },
        };
        Some((End::Answer(answer), work))
    }

    /// Ends a request for events with one, if there are both; tells whether there were.
    fn tell(&mut self, core: &Core) -> Result<bool> {
        if !self.finished.is_empty() || core.kept.control().next_event().is_none() {
            return Ok(false);
        }
        let sq = core.kept.sq(0);
        let mut slots = sq.slots.iter().zip(self.begun);
        let held = slots.position(|(slot, begun)| {
            begun && slot.used != 0 && slot.command.opcode == opcode::EVENT_REQUEST
        });
        let Some(slot) = held else {
            return Ok(false);
        };
        // It is taken with the completion: a kill between would lose it.
        let change = Change::telling();
        self.finished.push(Finished {
            slot,
            end: End::Change(change),
            work: Work::default(),
        });
        self.post(core)?;
        Ok(true)
    }

    /// Posts what has ended, as far as there is room for it.
    fn post(&mut self, core: &Core) -> Result<()> {
        while !self.finished.is_empty() {
            let sq = core.kept.sq(self.queue);
            let Ok(number) = usize::try_from(sq.cq) else {
                return Ok(());
            };
            let mut memory = lock(core, number);
            let cq = core.kept.cq(number);
            if !sq.exists() || !cq.exists() {
                return Ok(());
            }
            let seat = &core.seats[self.queue];
            if cq.room(core.head(number)) == 0 {
                seat.starved.store(true, Ordering::SeqCst);
                // The host may have made room just before.
                if cq.room(core.head(number)) == 0 {
                    return Ok(());
                }
            }
            let room = cq.room(core.head(number)).min(BATCH);
            self.post_some(core, number, room, &mut memory)?;
        }
        Ok(())
    }

    /// Posts a batch: first it is kept that it is, and what; then the host sees it.
    fn post_some(
        &mut self,
        core: &Core,
        number: usize,
        room: usize,
        memory: &mut Option<Mapped>,
    ) -> Result<()> {
        let changes = |finished: &Finished| matches!(finished.end, End::Change(_));
        let alone = self.finished.first().is_some_and(changes);
        let plain = self.finished.iter().take_while(|one| !changes(one)).count();
        let count = if alone { 1 } else { plain.min(room) };
        let batch: Vec<_> = self.finished.drain(..count).collect();
        let slots: Vec<_> = batch.iter().map(|finished| finished.slot).collect();
        self.note_errors(core, &batch)?;
        let queue = self.queue;
        if alone {
            core.kept.change(|whole| {
                whole.cqs[number].begin();
                for Finished { slot, end, work } in batch {
                    let answer = match end {
                        End::Answer(answer) => answer,
                        End::Change(change) => change.make(whole),
                    };
                    let (sqs, cqs) = (&mut whole.sqs, &mut whole.cqs);
                    complete(
                        &mut sqs[queue],
                        &mut cqs[number],
                        queue,
                        slot,
                        answer,
                        &work,
                    );
                }
            })?;
        } else {
            core.kept.change_pair(queue, number, |sq, cq| {
                cq.begin();
                for Finished { slot, end, work } in batch {
                    if let End::Answer(answer) = end {
                        complete(sq, cq, queue, slot, answer, &work);
                    }
                }
            })?;
        }
        for slot in slots {
            self.begun[slot] = false;
        }
        show(core, number, memory);
        Ok(())
    }

    /// Puts into the error log what belongs there.
    fn note_errors(&self, core: &Core, batch: &[Finished]) -> Result<()> {
        let logged = batch.iter().filter_map(|finished| match &finished.end {
            End::Answer(answer) if answer.status.is_logged() => Some((finished.slot, answer)),
            _ => None,
        });
        let logged: Vec<_> = logged.collect();
        if logged.is_empty() {
            return Ok(());
        }
        let sq = core.kept.sq(self.queue);
        core.kept.change_control(|control| {
            for (slot, answer) in logged {
                let command = &sq.slots[slot].command;
                control.errors += 1;
                control.media_errors += u64::from(answer.status.is_media());
                let place = usize::try_from(control.errors).unwrap_or(0) % ERROR_ENTRIES;
                control.log[place] = ErrorEntry {
                    number: control.errors,
                    lba: command.slba(),
                    nsid: command.nsid.get(),
                    sq_id: u16::try_from(self.queue).unwrap_or(u16::MAX),
                    cid: command.cid.get(),
                    status: answer.status.bits(),
                    reserved: [0; 3],
                };
            }
        })
    }
}

/// Ends the command in a slot.
fn complete(
    sq: &mut Submission,
    cq: &mut CompletionQueue,
    queue: usize,
    slot: usize,
    answer: Answer,
    work: &Work,
) {
    let kept = &mut sq.slots[slot];
    kept.used = 0;
    sq.work.add(work);
    let cid = sq.slots[slot].command.cid;
    let number = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    cq.post(Completion {
        dw0: answer.dw0.into(),
        dw1: 0.into(),
        sq_head: number(sq.head).into(),
        sq_id: u16::try_from(queue).unwrap_or(u16::MAX).into(),
        cid,
        status: (answer.status.bits() << 1).into(),
    });
}

/// Holds a completion queue for whoever posts to it.
pub(crate) fn lock(core: &Core, number: usize) -> MutexGuard<'_, Option<Mapped>> {
    let cq = core.cqs[number].lock();
    cq.unwrap_or_else(PoisonError::into_inner)
}

/// Shows the host what was posted last, and tells it. To do so twice does no harm.
pub(crate) fn show(core: &Core, number: usize, memory: &mut Option<Mapped>) {
    let cq = core.kept.cq(number);
    if !cq.exists() || cq.posted == 0 {
        return;
    }
    if let Err(error) = write(core, &cq, memory) {
        core.fail(&format_args!("completion queue {number}: {error}"));
        return;
    }
    let vector = u16::try_from(cq.vector).unwrap_or(0);
    if cq.interrupts != 0 {
        if let Err(error) = core.interrupts.raise(vector) {
            log::debug!("vector {vector}: {error}");
        }
    }
}

fn write(core: &Core, cq: &CompletionQueue, memory: &mut Option<Mapped>) -> Result<()> {
    let memory = map(core, memory, cq.base, cq.size, CQE, DmaAccess::Write)?;
    for (entry, completion) in cq.batch() {
        let at = usize::try_from(entry).unwrap_or(0) * CQE;
        let bytes = completion.as_bytes();
        let (first, second) = bytes.split_at(CQE / 2);
        memory.write(at, first)?;
        // The phase tag is in the second half, which the host sees after the first.
        let second = u64::read_from_bytes(second).unwrap_or(0);
        memory.store(at + CQE / 2, second)?;
    }
    Ok(())
}

/// A queue's memory, mapped anew if it is another than it was.
fn map<'a>(
    core: &Core,
    mapped: &'a mut Option<Mapped>,
    base: u64,
    size: u32,
    entry: usize,
    access: DmaAccess,
) -> Result<&'a DmaRange> {
    let same = |mapped: &Mapped| mapped.base == base && mapped.size == size;
    if !mapped.as_ref().is_some_and(same) {
        let len = usize::try_from(size).unwrap_or(0) * entry;
        let range = core.dma.map(base, len, access)?;
        *mapped = Some(Mapped { base, size, range });
    }
    match mapped {
        Some(mapped) => Ok(&mapped.range),
        None => unreachable!("it was just mapped"),
    }
}
