// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One lane of the device as its client uses it, and the account that the client keeps of it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::port::Port;
use super::registers::*;
use super::Ability;
use crate::check::errno_text;
use crate::random::Random;
use crate::sys::{EventFd, Mapping};

/// What all lanes have done, and what went wrong.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Operations that came to an end.
    pub(super) operations: AtomicU64,
    /// Operations without the effect that they should have had.
    pub(super) lost: AtomicU64,
    /// Operations whose effect is there more than once.
    pub(super) doubled: AtomicU64,
    /// Operations and interrupts that did not come to an end in time.
    pub(super) stuck: AtomicU64,
}

impl Tally {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A lane, its interrupt, and its block in memory that the device can reach.
pub(super) struct Lane<'a> {
    /// Its number.
    pub(super) number: u32,
    /// The client that all lanes share.
    pub(super) client: &'a dyn Port,
    /// What its vector signals.
    pub(super) interrupt: &'a EventFd,
    /// Memory mapped for DMA, where the block is at `BLOCK` times the number.
    pub(super) memory: Option<&'a Mapping>,
    /// What the device can do.
    pub(super) ability: Ability,
    /// How long an operation may take.
    pub(super) deadline: Duration,
    /// Where the lane's results are added up.
    pub(super) tally: &'a Tally,
    /// Counter that the device must have.
    pub(super) expected: u64,
    /// Number of operations so far, which makes each one's data its own.
    pub(super) sequence: u64,
}

impl Lane<'_> {
    /// Does one operation of any kind, and holds the device to it.
    pub(super) fn step(&mut self, random: &mut Random) {
        self.sequence += 1;
        let done = match random.below(100) {
            0..30 => self.add(random.next() as u32),
            30..50 => self.value(),
            50..75 => self.fetch_add(),
            75..90 => self.go(random.next() >> 32),
            _ if self.ability.doorbells => self.bell(random.next() as u32),
            _ => self.value(),
        };
        match done {
            Ok(()) => Tally::add(&self.tally.operations),
            // Nobody knows whether it took effect, which is as bad as if it had not.
            Err(error) => {
                self.complain(&format!("failed with {}", errno_text(&error)));
                Tally::add(&self.tally.lost);
            }
        }
    }

    /// Reads the counter, and compares.
    ///
    /// # Errors
    ///
    /// The errno of the read.
    pub(super) fn value(&mut self) -> io::Result<()> {
        let value = self.read_u64(VALUE)?;
        self.settle("VALUE", value);
        Ok(())
    }

    fn add(&mut self, addend: u32) -> io::Result<()> {
        self.write(ADD, &addend.to_le_bytes())?;
        self.expected = self.expected.wrapping_add(addend.into());
        Ok(())
    }

    fn fetch_add(&mut self) -> io::Result<()> {
        let before = self.read_u64(FETCH_ADD)?;
        self.settle("FETCH_ADD", before);
        self.expected = self.expected.wrapping_add(1);
        Ok(())
    }

    fn go(&mut self, addend: u64) -> io::Result<()> {
        // What came before this operation is not its interrupt.
        self.interrupt.take()?;
        let Some(memory) = self.memory else {
            // The stand-in's GO without a block adds what is written.
            let addend = addend as u32;
            self.write(GO, &addend.to_le_bytes())?;
            self.expected = self.expected.wrapping_add(addend.into());
            return self.interrupted();
        };
        let block = (u64::from(self.number) * BLOCK) as usize;
        let sequence = self.sequence;
        memory.write(block, addend);
        memory.write(block + 8, sequence);
        memory.write(block + 16, 0u64);
        memory.write(block + 24, 0u64);
        self.write(GO, &1u32.to_le_bytes())?;
        self.expected = self.expected.wrapping_add(addend);
        self.interrupted()?;
        let (after, answered): (u64, u64) = (memory.read(block + 16), memory.read(block + 24));
        if answered == sequence {
            self.settle("the block", after);
        } else {
            self.complain(&format!(
                "GO {sequence} is answered in the block by {answered}"
            ));
            Tally::add(&self.tally.lost);
        }
        Ok(())
    }

    /// Waits for the interrupt. It may come twice: who died after it had raised it can't tell.
    fn interrupted(&self) -> io::Result<()> {
        if self.interrupt.wait(self.deadline)? == 0 {
            self.complain("the interrupt of GO did not come");
            Tally::add(&self.tally.stuck);
        }
        Ok(())
    }

    /// Rings, and waits until the device has heard it: a ring costs no answer.
    fn bell(&mut self, value: u32) -> io::Result<()> {
        let at = doorbell(self.number);
        self.client.write(LANES, at, &value.to_le_bytes())?;
        let began = std::time::Instant::now();
        loop {
            let mut heard = [0; 4];
            let at = register(self.number, BELL);
            self.client.read(LANES, at, &mut heard)?;
            let heard = u32::from_le_bytes(heard);
            if heard == value {
                return Ok(());
            }
            if began.elapsed() > self.deadline {
                self.complain(&format!(
                    "rung with {value:#x}, but BELL stays at {heard:#x}"
                ));
                Tally::add(&self.tally.stuck);
                return Ok(());
            }
        }
    }

    /// Compares the counter with the account, and goes on from what is there.
    fn settle(&mut self, what: &str, value: u64) {
        if value == self.expected {
            return;
        }
        let difference = i64::from_ne_bytes(value.wrapping_sub(self.expected).to_ne_bytes());
        self.complain(&format!(
            "{what} is {value:#x}, which is {difference} from what it should be"
        ));
        Tally::add(if difference < 0 {
            &self.tally.lost
        } else {
            &self.tally.doubled
        });
        self.expected = value;
    }

    fn complain(&self, what: &str) {
        println!("lane {} operation {}: {what}", self.number, self.sequence);
    }

    fn read_u64(&self, at: u64) -> io::Result<u64> {
        let mut data = [0; 8];
        let at = register(self.number, at);
        self.client.read(LANES, at, &mut data)?;
        Ok(u64::from_le_bytes(data))
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.client.write(LANES, register(self.number, at), data)
    }
}
