// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the threads of a controller have in common, and how they are stopped and woken.
//!
//! Locks, in the order in which they are taken: that of the registers, those of the workers by
//! ascending number, those of the completion queues, and that of the kept state, in which nothing
//! else is taken.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libmuser::{Bus, Dma, DmaRange, Doorbell, Errno, Error, Interrupts, Region, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::backing::Backing;
use crate::engine::{Engine, Method};
use crate::event::Event;
use crate::kept::{Control, Features, Kept, Work, SLOTS};
use crate::queue::Worker;
use crate::regs::{CSTS_CFS, CSTS_RDY, CSTS_SHST_DONE, DOORBELLS};
use crate::spec::QUEUE_ENTRIES;

/// What does not change.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) serial: String,
    /// Logical blocks.
    pub(crate) blocks: u64,
    /// Their size, as a power of two.
    pub(crate) block_shift: u8,
    pub(crate) read_only: bool,
    /// Pairs of I/O queues.
    pub(crate) queues: u16,
    pub(crate) method: Method,
}

impl Config {
    /// A globally unique identifier that follows from the serial number: FNV-1a, twice.
    pub(crate) fn nguid(&self) -> [u8; 16] {
        let hash = |seed: u64| {
            self.serial.bytes().fold(seed, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
        };
        let halves = [hash(0xcbf2_9ce4_8422_2325), hash(0x8422_2325_cbf2_9ce4)];
        let mut nguid = [0; 16];
        nguid.copy_from_slice(halves.map(u64::to_be_bytes).as_flattened());
        nguid
    }
}

/// A controller without its threads.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) backing: Arc<dyn Backing>,
    pub(crate) dma: Dma,
    pub(crate) interrupts: Interrupts,
    pub(crate) kept: Kept,
    doorbells: Doorbell,
    /// A worker for each submission queue.
    pub(crate) seats: Vec<Seat>,
    /// Memory of the completion queues: who posts to one holds it.
    pub(crate) cqs: Vec<Mutex<Option<Mapped>>>,
    /// Held by who writes registers.
    registers: Mutex<()>,
    /// What the registers say: whether commands are processed.
    live: AtomicBool,
    over: AtomicBool,
}

/// A queue's memory, and what it was mapped for.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) range: DmaRange,
}

/// Where a worker sits.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) wake: EventFd,
    /// How many want the worker to stop.
    pausing: AtomicU32,
    /// Whether completions wait for room.
    pub(crate) starved: AtomicBool,
    /// The tail that the worker was last woken for; none at first, since an earlier process may have
    /// been woken for any.
    rung: AtomicU32,
    worker: Mutex<Worker>,
}

/// How often a doorbell is looked at again because it was rung meanwhile.
const ATTEMPTS: usize = 16;

/// No tail.
const NEVER: u32 = u32::MAX;

impl Seat {
    pub(crate) fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.wake.write(1);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.pausing.load(Ordering::SeqCst) > 0
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker that has nothing under way, and begins nothing until this is dropped.
#[derive(Debug)]
pub(crate) struct Paused<'a> {
    seat: &'a Seat,
    worker: Option<MutexGuard<'a, Worker>>,
}

impl Paused<'_> {
    pub(crate) fn worker(&mut self) -> &mut Worker {
        match &mut self.worker {
            Some(worker) => worker,
            None => unreachable!("it is taken by the drop alone"),
        }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.worker = None;
        self.seat.pausing.fetch_sub(1, Ordering::SeqCst);
        self.seat.wake();
    }
}

impl Core {
    pub(crate) fn new(bus: &Bus, config: Config, backing: Arc<dyn Backing>) -> Result<Self> {
        let pairs = usize::from(config.queues) + 1;
        let kept = Kept::new(bus.state(), pairs);
        let missing = || Error::new(Errno::EIO, "the doorbells are missing");
        let doorbells = bus.doorbell(Region::Bar(0), DOORBELLS);
        let seat = |index| -> io::Result<Seat> {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let engine = Engine::new(Arc::clone(&backing), config.method, SLOTS)?;
            Ok(Seat {
                wake: EventFd::from_value_and_flags(1, flags)?,
                pausing: AtomicU32::new(0),
                starved: AtomicBool::new(false),
                rung: AtomicU32::new(NEVER),
                worker: Mutex::new(Worker::new(index, engine)),
            })
        };
        let seats = (0..pairs).map(seat).collect::<io::Result<Vec<_>>>()?;
        kept.change_control(|control| {
            if control.version == 0 {
                power_on(control);
            }
        })?;
        Ok(Self {
            live: AtomicBool::new(kept.control().is_live()),
            backing,
            dma: bus.dma(),
            interrupts: bus.interrupts(),
            kept,
            doorbells: doorbells.ok_or_else(missing)?,
            seats,
            cqs: (0..pairs).map(|_| Mutex::default()).collect(),
            registers: Mutex::default(),
            over: AtomicBool::new(false),
            config,
        })
    }

    /// Whether commands are processed.
    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::SeqCst)
    }

    /// Whether the threads are to end.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.seats.iter().for_each(Seat::wake);
    }

    pub(crate) fn registers(&self) -> MutexGuard<'_, ()> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops a worker, once what it has under way has ended.
    pub(crate) fn pause(&self, queue: usize) -> Paused<'_> {
        let seat = &self.seats[queue];
        seat.pausing.fetch_add(1, Ordering::SeqCst);
        seat.wake();
        Paused {
            seat,
            worker: Some(seat.lock()),
        }
    }

    pub(crate) fn pause_all(&self) -> Vec<Paused<'_>> {
        (0..self.seats.len())
            .map(|queue| self.pause(queue))
            .collect()
    }

    /// Pauses all queues, which forget what they were at and what was rung.
    fn stop_all(&self) -> Vec<Paused<'_>> {
        let mut paused = self.pause_all();
        paused
            .iter_mut()
            .for_each(|paused| paused.worker().forget());
        self.clear_doorbells();
        paused
    }

    /// The tail of a submission queue, as the host has it.
    pub(crate) fn tail(&self, queue: usize) -> u32 {
        self.bell(2 * queue)
    }

    /// The head of a completion queue, as the host has it.
    pub(crate) fn head(&self, queue: usize) -> u32 {
        self.bell(2 * queue + 1)
    }

    fn bell(&self, number: usize) -> u32 {
        let value = self.doorbells.memory().load::<u32>(4 * number);
        u32::from_le(value.unwrap_or(0))
    }

    pub(crate) fn clear_doorbell(&self, queue: usize, completion: bool) {
        let number = 2 * queue + usize::from(completion);
        if let Err(error) = self.doorbells.memory().store::<u32>(4 * number, 0) {
            log::error!("doorbell {number} is not there: {error}");
        }
        if !completion {
            self.seats[queue].rung.store(0, Ordering::SeqCst);
        }
    }

    /// Wakes the workers for which there is something new in the doorbells.
    pub(crate) fn ring(&self) {
        let mut unknown = false;
        for (queue, seat) in self.seats.iter().enumerate() {
            // Until it is the tail of after its being noted: another thread may have had a later one.
            let mut settled = false;
            for _ in 0..ATTEMPTS {
                let tail = self.tail(queue);
                settled = seat.rung.swap(tail, Ordering::SeqCst) == tail;
                if settled {
                    break;
                }
                unknown |= tail != 0 && !self.kept.sq(queue).exists();
                seat.wake();
            }
            if !settled {
                // Somebody rings all the time, and the next time is as good.
                seat.rung.store(NEVER, Ordering::SeqCst);
            }
            if seat.starved.swap(false, Ordering::SeqCst) {
                seat.wake();
            }
        }
        if self.is_live() && unknown {
            self.note(Event::InvalidDoorbellRegister);
        }
        if self.is_live() && (0..self.seats.len()).any(|queue| self.has_bad_head(queue)) {
            self.note(Event::InvalidDoorbellValue);
        }
    }

    fn has_bad_head(&self, queue: usize) -> bool {
        let head = self.head(queue);
        // Most of the time there is no need to look for the queue's size.
        head >= QUEUE_ENTRIES || head > 0 && head >= self.kept.cq(queue).size
    }

    /// Notes an event for the admin queue's worker to tell.
    pub(crate) fn note(&self, event: Event) {
        log::debug!("{event:?}");
        if self
            .kept
            .change_control(|control| control.note(event))
            .is_ok()
        {
            self.seats[0].wake();
        }
    }

    /// A failure that no completion can tell of: CSTS.CFS (section 9.5).
    pub(crate) fn fail(&self, why: &dyn std::fmt::Display) {
        self.live.store(false, Ordering::SeqCst);
        let failed = self.kept.change_control(|control| control.csts |= CSTS_CFS);
        // After the end of the server, it is another process's.
        if failed.is_ok() {
            log::error!("the controller has failed: {why}");
        }
    }

    /// All that was done since the controller was made.
    pub(crate) fn work(&self) -> Work {
        let mut all = Work::default();
        for queue in 0..self.seats.len() {
            all.add(&self.kept.sq(queue).work);
        }
        all
    }

    /// Enables the controller with this CC.
    pub(crate) fn enable(&self, cc: u32) -> Result<()> {
        let _paused = self.stop_all();
        self.kept.change(|whole| {
            let control = &mut whole.control;
            let possible = control.can_enable(cc);
            control.cc = cc;
            if !possible {
                control.csts |= CSTS_CFS;
                return;
            }
            control.csts = CSTS_RDY;
            let (sq, cq) = control.admin_sizes();
            whole.sqs[0].create(control.asq, sq, 0);
            whole.cqs[0].create(control.acq, cq, Some(0));
        })?;
        self.refresh();
        Ok(())
    }

    /// Returns to what the controller is before it is enabled: with the addresses of the admin
    /// queues if CC was written, and without after other resets.
    pub(crate) fn reset(&self, cc: Option<u32>) -> Result<()> {
        self.live.store(false, Ordering::SeqCst);
        let _paused = self.stop_all();
        self.kept.change(|whole| {
            let control = &mut whole.control;
            let before = (control.asq, control.acq, control.aqa);
            power_on(control);
            if let Some(cc) = cc {
                (control.asq, control.acq, control.aqa) = before;
                control.cc = cc;
            }
            whole.sqs.iter_mut().for_each(|sq| sq.delete());
            whole.cqs.iter_mut().for_each(|cq| cq.delete());
        })?;
        self.refresh();
        Ok(())
    }

    /// Shuts down: all that was written is brought to the medium.
    pub(crate) fn shut_down(&self, cc: u32) -> Result<()> {
        let _paused = self.pause_all();
        let flushed = self.backing.flush();
        if let Err(error) = &flushed {
            self.fail(error);
        }
        self.kept.change_control(|control| {
            control.cc = cc;
            if flushed.is_ok() {
                control.csts |= CSTS_SHST_DONE;
            }
        })?;
        self.refresh();
        Ok(())
    }

    fn refresh(&self) {
        let live = self.kept.control().is_live();
        self.live.store(live, Ordering::SeqCst);
    }

    fn clear_doorbells(&self) {
        self.doorbells.memory().clear();
        for seat in &self.seats {
            seat.rung.store(0, Ordering::SeqCst);
            seat.starved.store(false, Ordering::SeqCst);
        }
    }
}

/// As after power-on, but for what is counted for ever.
fn power_on(control: &mut Control) {
    *control = Control {
        asq: 0,
        acq: 0,
        cc: 0,
        csts: 0,
        aqa: 0,
        version: 1,
        features: Features::DEFAULT,
        events: 0,
        told: 0,
        ..*control
    };
}
