// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves a card with all that the samples have not: memory that clients map, a BAR of 64 bits, an
//! expansion ROM, PCI Express and power management, and registers that kill the program.
//!
//! BAR 0 has registers of 4 bytes in its first page, each of which is the word at the same place of
//! the second page, which clients map. BAR 2 is 64 KiB of memory that clients map. BAR 4 has a
//! counter, and registers at which the program dies once at each access, where that hurts most:
//!
//! | offset | access | what it does                                                  |
//! |--------|--------|---------------------------------------------------------------|
//! | 0x00   | R      | returns the counter, adds 1 to it, dies before it has replied |
//! | 0x04   | R      | dies, and does that as a replay                               |
//! | 0x08   | W      | adds to the counter, dies before it has replied               |
//! | 0x0c   | R      | the counter                                                   |

#![forbid(unsafe_code)]

use std::process::ExitCode;

use libmuser::{
    cli, Access, Bar, Bus, Device, Errno, Error, Express, PciBuilder, PciModel, PowerManagement,
    Region, Reset, Result, SharedMemory, State, Width,
};
use nix::sys::signal::{raise, Signal};

/// The registers of BAR 4.
const ADD_AND_DIE: u64 = 0x00;
const DIE_AND_ADD: u64 = 0x04;
const WRITE_AND_DIE: u64 = 0x08;
const COUNTER: u64 = 0x0c;
/// The state: the counter, and whether the program has died for the present access.
const DEAD: usize = 4;
const STATE_SIZE: usize = 5;

const PAGE: u64 = 0x1000;
const LARGE: u64 = 0x1_0000;
/// What an expansion ROM begins with (PCI Firmware Specification, 5.1), and some bytes to see.
const ROM: &[u8] = b"\x55\xaa\x01 this is the card's ROM";

fn main() -> ExitCode {
    let about = "Serves a card with memory that clients map";
    let version = env!("CARGO_PKG_VERSION");
    cli::run("vmm-device", version, about, model(), Windows::new)
}

fn model() -> Result<PciModel> {
    let registers = Bar::memory32(2 * PAGE).registers(Width::Dword);
    let large = Bar::memory64(LARGE).prefetchable();
    PciBuilder::new(0x1234, 0x3a9d)
        .class(0x05, 0x80, 0x00)
        .bar(0, registers.mappable(PAGE..2 * PAGE))
        .bar(2, large.mappable(0..LARGE))
        .bar(4, Bar::memory32(PAGE).registers(Width::Dword))
        .rom(ROM)
        .state(STATE_SIZE)
        .power_management(PowerManagement::new())
        .express(Express::endpoint())
        .build()
}

/// The card.
#[derive(Debug)]
struct Windows {
    state: State,
    small: SharedMemory,
    large: SharedMemory,
}

impl Windows {
    fn new(bus: &Bus) -> Result<Self> {
        let memory = |bar, offset| {
            let missing = || Error::new(Errno::EIO, "the memory is missing");
            bus.memory(Region::Bar(bar), offset).ok_or_else(missing)
        };
        Ok(Self {
            state: bus.state(),
            small: memory(0, PAGE)?,
            large: memory(2, 0)?,
        })
    }
}

impl Windows {
    /// Adds to the counter, exactly once for an access; dies if it has.
    fn add_and_die(&self, access: &Access, addend: u32) -> Result<u64> {
        let mut added = false;
        let before = self.state.once(access, |bytes| {
            added = true;
            add(bytes, addend)
        })?;
        if added {
            die();
        }
        Ok(before)
    }

    /// Dies if it has not, for this access; then adds to the counter.
    fn die_and_add(&self, access: &Access, addend: u32) -> Result<u64> {
        if self.state.read(|bytes| bytes[DEAD] == 0) {
            self.state.update(|bytes| bytes[DEAD] = 1);
            die();
        }
        self.state.once(access, |bytes| {
            bytes[DEAD] = 0;
            add(bytes, addend)
        })
    }
}

fn counter(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |counter| u32::from_le_bytes(*counter))
}

/// Adds to the counter; returns what it was.
fn add(bytes: &mut [u8], addend: u32) -> u64 {
    let before = counter(bytes);
    let after = before.wrapping_add(addend).to_le_bytes();
    bytes[..after.len()].copy_from_slice(&after);
    before.into()
}

/// Ends the program as nothing else does: no destructor, no handler, no last word.
fn die() {
    // What can't be killed fails the test.
    let _ = raise(Signal::SIGKILL);
}

impl Device for Windows {
    fn read(&mut self, access: Access) -> Result<u64> {
        match (access.region, access.offset) {
            (Region::Bar(4), ADD_AND_DIE) => return self.add_and_die(&access, 1),
            (Region::Bar(4), DIE_AND_ADD) => return self.die_and_add(&access, 1),
            (Region::Bar(4), COUNTER) => return Ok(self.state.read(counter).into()),
            _ => {}
        }
        let Some(place) = register(&access) else {
            return access.unhandled_read();
        };
        Ok(self.small.load::<u32>(place)?.into())
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        let [a, b, c, d, ..] = value.to_le_bytes();
        let value = u32::from_le_bytes([a, b, c, d]);
        if (access.region, access.offset) == (Region::Bar(4), WRITE_AND_DIE) {
            return self.add_and_die(&access, value).map(drop);
        }
        match register(&access) {
            Some(place) => self.small.store(place, value),
            None => access.unhandled_write(value.into()),
        }
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.state.update(|bytes| bytes.fill(0));
        self.small.clear();
        self.large.clear();
        Ok(())
    }
}

fn register(access: &Access) -> Option<usize> {
    let place = usize::try_from(access.offset).ok()?;
    (access.region == Region::Bar(0) && access.width == Width::Dword).then_some(place)
}
