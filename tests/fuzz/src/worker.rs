// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One fuzzing process: what it has open and mapped, and its next operation.

use std::io;
use std::time::{Duration, Instant};

use muser_e2e::random::Random;
use muser_e2e::time;

use crate::kcov::Kcov;
use crate::ops::{prologue, Role, OPERATIONS};
use crate::shared::Shared;
use crate::sys::{self, Arena, WINDOWS};

/// Exit status of a process that found something.
pub(crate) const FOUND: i32 = 3;
/// How long a process lives at the most, and how often a signal interrupts what it waits for.
const LIFE: Duration = Duration::from_secs(4);
const ALARM_MS: i64 = 50;
/// Descriptors that a process keeps.
const FILES: usize = 40;

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/dev/muser/UUID`.
    Node,
    /// `/dev/vfio/N`.
    Group,
    /// A type1 container.
    Container,
    /// `/dev/iommu`, with an address space of that number.
    Iommu(u32),
    /// A VFIO device.
    Device,
    /// An eventfd.
    Event,
    /// A file of tmpfs.
    Memory,
}

/// An open file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) fd: i32,
    pub(crate) kind: Kind,
    /// Which of the devices it leads to.
    pub(crate) device: usize,
}

/// What is mapped in a window of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    Nothing,
    /// Anonymous memory, a file's, device memory or state: only fuzzers write it.
    Plain,
    /// Slots, of which only the data is ours.
    Slots,
    Status,
    /// The client's memory, whatever it mapped there, or several of these.
    Window,
}

impl Mapped {
    /// What a window is whose pages are partly of this kind and partly of the other.
    pub(crate) fn beside(self, other: Self) -> Self {
        if self == Self::Plain && other == Self::Plain {
            Self::Plain
        } else {
            Self::Window
        }
    }
}

/// An attachment that this process has made.
#[derive(Clone, Debug)]
pub(crate) struct Attachment {
    pub(crate) fd: i32,
    pub(crate) stride: usize,
    pub(crate) slots: u32,
    /// Window of the slots' mapping, once they are mapped.
    pub(crate) window: Option<usize>,
    /// Slots taken and not replied to.
    pub(crate) taken: Vec<u32>,
}

/// A fuzzing process.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) random: Random,
    pub(crate) arena: Arena,
    pub(crate) shared: Shared,
    pub(crate) files: Vec<Entry>,
    pub(crate) windows: [Mapped; WINDOWS],
    pub(crate) attachment: Option<Attachment>,
    /// Whether other processes have this one's files and mappings, so that what is in slots may
    /// change at any time.
    pub(crate) has_siblings: bool,
    pub(crate) uuids: Vec<String>,
    /// The device that it has most to do with.
    pub(crate) home: usize,
    index: Option<usize>,
    pub(crate) role: Role,
    kcov: Option<Kcov>,
    epoch: Instant,
}

impl Worker {
    /// The process of that place and generation.
    pub(crate) fn new(
        shared: Shared,
        seed: u64,
        index: usize,
        generation: u64,
        uuids: Vec<String>,
    ) -> io::Result<Self> {
        sys::interrupt_every(ALARM_MS)?;
        let role = Role::of(index);
        Ok(Self {
            random: Random::branch(seed, generation << 8 | index as u64),
            arena: Arena::new()?,
            shared,
            files: Vec::new(),
            windows: [Mapped::Nothing; WINDOWS],
            attachment: None,
            has_siblings: false,
            home: role.home(index),
            uuids,
            index: Some(index),
            role,
            kcov: Kcov::start()?,
            epoch: Instant::now(),
        })
    }

    /// Fuzzes until its life ends.
    pub(crate) fn live(&mut self) {
        for first in prologue(self.role) {
            if let Some(kind) = OPERATIONS.iter().position(|op| op.name == *first) {
                self.act(kind);
            }
        }
        let operations = 200 + self.random.below(4000);
        self.run(operations);
        // Half of them leave it all to the kernel.
        if self.random.chance(50) {
            while !self.files.is_empty() {
                let at = self.random.below(self.files.len() as u64) as usize;
                let entry = self.files.swap_remove(at);
                // Some are garbage by intention.
                let _ = sys::close(entry.fd);
            }
            self.collect();
        }
    }

    fn run(&mut self, operations: u64) {
        let total: u64 = OPERATIONS.iter().map(|op| op.weight(self.role)).sum();
        for _ in 0..operations {
            if self.epoch.elapsed() > LIFE * time::slowness() {
                return;
            }
            let mut ticket = self.random.below(total);
            let chosen = OPERATIONS.iter().position(|op| {
                let hit = ticket < op.weight(self.role);
                ticket = ticket.saturating_sub(op.weight(self.role));
                hit
            });
            let Some(kind) = chosen else { continue };
            self.act(kind);
        }
    }

    fn act(&mut self, kind: usize) {
        if let Some(index) = self.index {
            self.shared.begin(index, kind, sys::milliseconds());
        }
        if let Some(result) = (OPERATIONS[kind].run)(self) {
            self.shared.count(kind, &result);
        }
        self.collect();
    }

    fn collect(&self) {
        if let Some(kcov) = &self.kcov {
            kcov.collect(&self.shared);
        }
    }

    /// Forks a process that goes on with the same files and mappings.
    pub(crate) fn fork(&mut self) -> io::Result<u64> {
        let seed = self.random.next();
        self.has_siblings = true;
        let pid = sys::fork()?;
        if pid != 0 {
            return Ok(1);
        }
        self.random = Random::new(seed);
        self.index = None;
        self.role = Role::Any;
        self.kcov = None;
        self.epoch = Instant::now();
        // Without the timer, which a child does not inherit, it would wait for ever.
        if sys::interrupt_every(ALARM_MS).is_ok() {
            self.kcov = Kcov::start().unwrap_or_default();
            let operations = 20 + self.random.below(200);
            self.run(operations);
        }
        sys::exit(0);
    }

    /// Says what the kernel did that it must not, and ends the process.
    pub(crate) fn found(&self, what: &str) -> ! {
        eprintln!("FINDING in {:?}: {what}", self.role);
        self.shared.find();
        sys::exit(FOUND);
    }

    /// Keeps a descriptor; closes one of many.
    pub(crate) fn keep(&mut self, fd: u64, kind: Kind, device: usize) -> i32 {
        let fd = i32::try_from(fd).unwrap_or(-1);
        if self.files.len() >= FILES {
            let at = self.random.below(self.files.len() as u64) as usize;
            let old = self.files.swap_remove(at);
            // It may be closed already.
            let _ = sys::close(old.fd);
        }
        self.files.push(Entry { fd, kind, device });
        fd
    }

    /// One of the open files that are of such a kind.
    pub(crate) fn any(&mut self, wanted: impl Fn(Kind) -> bool) -> Option<Entry> {
        let count = self.files.iter().filter(|entry| wanted(entry.kind)).count();
        let at = self.random.below(count as u64) as usize;
        let mut entries = self.files.iter().filter(|entry| wanted(entry.kind));
        entries.nth(at).copied()
    }

    /// A device: mostly its own.
    pub(crate) fn device(&mut self) -> usize {
        if self.random.chance(85) {
            self.home
        } else {
            self.random.below(self.uuids.len() as u64) as usize
        }
    }

    /// A window of the arena.
    pub(crate) fn window(&mut self) -> usize {
        self.random.below(WINDOWS as u64) as usize
    }

    /// A number that is often near an edge.
    pub(crate) fn number(&mut self) -> u64 {
        const EDGES: [u64; 14] = [
            0,
            1,
            2,
            7,
            8,
            63,
            64,
            4095,
            4096,
            1 << 16,
            1 << 31,
            1 << 40,
            1 << 62,
            u64::MAX,
        ];
        match self.random.below(4) {
            0 => self.random.next(),
            1 => self.random.below(256),
            _ => {
                let edge = *self.random.pick(&EDGES);
                let off = self.random.below(3);
                edge.wrapping_add(off).wrapping_sub(1)
            }
        }
    }

    /// Whether something happens that does so `percent` times of 100.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.random.chance(percent)
    }
}
