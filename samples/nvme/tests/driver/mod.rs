// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small NVMe driver, which knows nothing of how it comes to its controller: that is a [`Machine`].
//!
//! It is no more than tests need: who is at a queue is alone there, commands are sixteen dwords, and
//! what can't go on panics.

#![expect(clippy::unwrap_used, reason = "a driver of tests panics")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Long enough for anything that is going to happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
pub(crate) const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

pub(crate) const CC: u64 = 0x14;
pub(crate) const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// EN, with entries of 64 and 16 bytes.
pub(crate) const ENABLE: u32 = 0x0046_0001;

/// What a driver runs on: BAR 0 of a controller, memory that it reaches, and its interrupts.
pub(crate) trait Machine: Sync {
    /// Reads registers.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes registers.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Where the memory begins that the controller reaches as well, and where it ends.
    fn memory(&self) -> std::ops::Range<u64>;
    /// Reads that memory.
    fn load(&self, address: u64, to: &mut [u8]);
    /// Writes it.
    fn store(&self, address: u64, from: &[u8]);
    /// Waits for an interrupt, for a while; tells whether it came.
    fn wait(&self, vector: u16, time: Duration) -> bool;
}

/// A submission queue and its completion queue.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) id: u16,
    pub(crate) size: u32,
    pub(crate) sq: u64,
    pub(crate) cq: u64,
    pub(crate) tail: u32,
    pub(crate) head: u32,
    pub(crate) phase: bool,
    pub(crate) cid: u16,
    /// Whether completions are waited for by interrupt.
    pub(crate) interrupts: bool,
}

/// An entry of a completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) dw0: u32,
    pub(crate) cid: u16,
    pub(crate) sq_id: u16,
    /// Status code and type, and the bit not to retry, without the phase tag.
    pub(crate) status: u16,
}

/// A command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Command(pub(crate) [u32; 16]);

impl Command {
    pub(crate) fn new(opcode: u8, nsid: u32) -> Self {
        let mut dwords = [0; 16];
        dwords[0] = opcode.into();
        dwords[1] = nsid;
        Self(dwords)
    }

    pub(crate) fn with(mut self, dword: usize, value: u32) -> Self {
        self.0[dword] = value;
        self
    }

    /// PRP1 and PRP2, or a descriptor of an SGL.
    pub(crate) fn pointing(mut self, first: u64, second: u64) -> Self {
        for (at, value) in [(6, first), (8, second)] {
            [self.0[at], self.0[at + 1]] = halves(value);
        }
        self
    }

    /// Starting LBA, and number of blocks.
    pub(crate) fn blocks(self, first: u64, count: u32) -> Self {
        let [low, high] = halves(first);
        self.with(10, low).with(11, high).with(12, count - 1)
    }

    fn bytes(&self, cid: u16) -> [u8; 64] {
        let mut dwords = self.0;
        dwords[0] = dwords[0] & 0xffff | u32::from(cid) << 16;
        let mut bytes = [0; 64];
        bytes.copy_from_slice(dwords.map(u32::to_le_bytes).as_flattened());
        bytes
    }
}

/// A number as two dwords, the lower one first.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
}

/// A driver of a controller.
#[derive(Debug)]
pub(crate) struct Driver<M> {
    pub(crate) machine: M,
    free: AtomicU64,
    pub(crate) admin: Pair,
}

impl<M: Machine> Driver<M> {
    /// Resets and enables a controller.
    pub(crate) fn start(machine: M) -> Self {
        let free = AtomicU64::new(machine.memory().start);
        let mut driver = Self {
            machine,
            free,
            admin: Pair::nowhere(),
        };
        driver.enable();
        driver
    }

    pub(crate) fn enable(&mut self) {
        self.set_cc(0, 0);
        self.admin = self.pair(0, 32);
        self.write32(AQA, 31 << 16 | 31);
        self.write64(ASQ, self.admin.sq);
        self.write64(ACQ, self.admin.cq);
        self.set_cc(ENABLE, 1);
    }

    /// Forgets all memory that it has, and enables the controller again.
    pub(crate) fn start_over(&mut self) {
        self.set_cc(0, 0);
        let start = self.machine.memory().start;
        self.free.store(start, Ordering::SeqCst);
        self.enable();
    }

    /// Writes CC, and waits for CSTS.RDY.
    pub(crate) fn set_cc(&self, cc: u32, ready: u32) {
        self.write32(CC, cc);
        let end = Instant::now() + DEADLINE;
        while self.read32(CSTS) & 1 != ready {
            assert!(Instant::now() < end, "CSTS {:#x}", self.read32(CSTS));
        }
    }

    pub(crate) fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.machine.read(offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write32(&self, offset: u64, value: u32) {
        self.machine.write(offset, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn write64(&self, offset: u64, value: u64) {
        self.machine.write(offset, &value.to_le_bytes()).unwrap();
    }

    /// Pages of memory, zeroed, which are never given back.
    pub(crate) fn pages(&self, count: u64) -> u64 {
        let start = self.free.fetch_add(count * PAGE, Ordering::SeqCst);
        assert!(start + count * PAGE <= self.machine.memory().end);
        for page in 0..count {
            self.machine.store(start + page * PAGE, &[0; PAGE_BYTES]);
        }
        start
    }

    /// Memory for a pair of queues that the controller does not know yet.
    pub(crate) fn pair(&self, id: u16, size: u32) -> Pair {
        let pages = |entry: u64| (u64::from(size) * entry).div_ceil(PAGE);
        Pair {
            id,
            size,
            sq: self.pages(pages(64)),
            cq: self.pages(pages(16)),
            phase: true,
            ..Pair::nowhere()
        }
    }

    /// Puts a command into a queue, and does not ring.
    pub(crate) fn put(&self, pair: &mut Pair, command: &Command) -> u16 {
        pair.cid = pair.cid.wrapping_add(1);
        let at = pair.sq + 64 * u64::from(pair.tail);
        self.machine.store(at, &command.bytes(pair.cid));
        pair.tail = (pair.tail + 1) % pair.size;
        pair.cid
    }

    pub(crate) fn ring(&self, pair: &Pair) {
        self.ring_with(2 * u64::from(pair.id), pair.tail);
    }

    pub(crate) fn ring_with(&self, bell: u64, value: u32) {
        self.write32(DOORBELLS + 4 * bell, value);
    }

    pub(crate) fn submit(&self, pair: &mut Pair, command: &Command) -> u16 {
        let cid = self.put(pair, command);
        self.ring(pair);
        cid
    }

    /// The next completion, if there is one.
    pub(crate) fn peek(&self, pair: &Pair) -> Option<Entry> {
        let mut bytes = [0; 16];
        let at = pair.cq + 16 * u64::from(pair.head);
        // The phase first: what it belongs to was there before.
        self.machine.load(at + 14, &mut bytes[14..]);
        if (bytes[14] & 1 != 0) != pair.phase {
            return None;
        }
        self.machine.load(at, &mut bytes);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Some(Entry {
            dw0: u32::from(word(2)) << 16 | u32::from(word(0)),
            sq_id: word(10),
            cid: word(12),
            status: word(14) >> 1,
        })
    }

    /// Takes the next completion, if there is one, and says so by the doorbell.
    pub(crate) fn take(&self, pair: &mut Pair) -> Option<Entry> {
        let entry = self.peek(pair)?;
        pair.head += 1;
        if pair.head == pair.size {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        self.ring_with(2 * u64::from(pair.id) + 1, pair.head);
        Some(entry)
    }

    /// Waits for the next completion.
    pub(crate) fn next(&self, pair: &mut Pair) -> Entry {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(entry) = self.take(pair) {
                return entry;
            }
            let failed = self.read32(CSTS);
            assert!(Instant::now() < end, "no completion, CSTS {failed:#x}");
            if pair.interrupts {
                self.machine.wait(pair.id, Duration::from_millis(100));
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Has a command carried out at a queue where nothing else is.
    pub(crate) fn at(&self, pair: &mut Pair, command: &Command) -> Entry {
        let cid = self.submit(pair, command);
        let entry = self.next(pair);
        assert_eq!((entry.cid, entry.sq_id), (cid, pair.id));
        entry
    }

    /// Has an admin command carried out.
    pub(crate) fn admin(&mut self, command: &Command) -> Entry {
        let mut pair = std::mem::replace(&mut self.admin, Pair::nowhere());
        let entry = self.at(&mut pair, command);
        self.admin = pair;
        entry
    }

    /// Creates a pair of I/O queues, with the interrupt vector of the same number.
    pub(crate) fn create(&mut self, id: u16, size: u32) -> Pair {
        let pair = self.pair(id, size);
        for command in [create_cq(&pair), create_sq(&pair)] {
            assert_eq!(self.admin(&command).status, 0);
        }
        Pair {
            interrupts: true,
            ..pair
        }
    }

    /// Identify, or a log page: a command that fills a page.
    pub(crate) fn page(&mut self, command: &Command) -> Result<Vec<u8>, u16> {
        let page = self.pages(1);
        match self.admin(&command.pointing(page, 0)).status {
            0 => Ok(self.bytes(page, PAGE_BYTES)),
            status => Err(status),
        }
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.machine.load(address, &mut bytes);
        bytes
    }

    /// PRPs of memory that goes on for so many bytes, with a list where one is needed.
    pub(crate) fn prps(&self, address: u64, len: u64) -> (u64, u64) {
        let second = (address & !(PAGE - 1)) + PAGE;
        let end = address + len;
        if end <= second + PAGE {
            return (address, if end > second { second } else { 0 });
        }
        let mut pages: Vec<u64> = (second..end).step_by(PAGE_BYTES).collect();
        let list = self.pages(1 + pages.len() as u64 / 511);
        // Each page of the list but the last ends with where it goes on.
        let mut at = list;
        while pages.len() > 512 {
            let rest = pages.split_off(511);
            pages.push(at + PAGE);
            self.store_list(at, &pages);
            pages = rest;
            at += PAGE;
        }
        self.store_list(at, &pages);
        (address, list)
    }

    fn store_list(&self, at: u64, entries: &[u64]) {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        self.machine.store(at, &bytes);
    }
}

impl Pair {
    fn nowhere() -> Self {
        Self {
            id: 0,
            size: 2,
            sq: 0,
            cq: 0,
            tail: 0,
            head: 0,
            phase: true,
            cid: 0,
            interrupts: false,
        }
    }
}

pub(crate) fn create_cq(pair: &Pair) -> Command {
    let command = Command::new(0x05, 0).pointing(pair.cq, 0);
    command
        .with(10, (pair.size - 1) << 16 | u32::from(pair.id))
        .with(11, u32::from(pair.id) << 16 | 3)
}

pub(crate) fn create_sq(pair: &Pair) -> Command {
    let command = Command::new(0x01, 0).pointing(pair.sq, 0);
    command
        .with(10, (pair.size - 1) << 16 | u32::from(pair.id))
        .with(11, u32::from(pair.id) << 16 | 1)
}
