// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters that never miss or double an increment, whatever happens to the process that counts.
//!
//! BAR 0 has 16 lanes, a counter each, 0x40 bytes apart. Registers of a lane:
//!
//! | offset | name      | bits | access | what it does                                            |
//! |--------|-----------|------|--------|---------------------------------------------------------|
//! | 0x00   | ADD       | 32   | W      | adds the value to the counter                           |
//! | 0x08   | VALUE     | 64   | R      | the counter                                             |
//! | 0x10   | FETCH_ADD | 64   | R      | the counter, to which 1 is added                        |
//! | 0x18   | ADDRESS   | 64   | RW     | IOVA of the lane's block in the client's memory         |
//! | 0x20   | GO        | 32   | W      | does what the block says                                |
//! | 0x28   | BELL      | 32   | R      | what was last written to the lane's doorbell            |
//!
//! The doorbell of lane `i` is at `0x1000 + 4 * i`. A block has four 64-bit integers: the client
//! writes *addend* and *sequence*; GO adds the addend to the counter, writes the *counter* after and
//! the *sequence* behind them, and raises vector `i` of MSI-X. The sequence is written last, as a
//! whole: who sees it sees the counter that belongs to it. What can't be answered is not counted:
//! the address must be a multiple of 8, and all of the block be memory that the device may write.
//!
//! Counters and addresses are [`State`]: they outlive the process. A reset that the client asks for
//! or causes clears them. Several threads may serve the device.

use libmuser::{
    Access, Bar, Bus, Dma, DmaAccess, Doorbell, Errno, Error, Interrupts, Msix, PciBuilder,
    PciModel, Region, Reset, Result, SharedDevice, State, Width,
};

/// Lanes there are.
pub const LANES: u16 = 16;
const LANE_SIZE: u64 = 0x40;
const DOORBELLS: u64 = 0x1000;
const BAR_SIZE: u64 = 0x2000;

const ADD: u64 = 0x00;
const VALUE: u64 = 0x08;
const FETCH_ADD: u64 = 0x10;
const ADDRESS: u64 = 0x18;
const GO: u64 = 0x20;
const BELL: u64 = 0x28;

/// Describes the device.
pub fn model() -> Result<PciModel> {
    PciBuilder::new(0x1234, 0xc047)
        .class(0xff, 0x00, 0x00)
        .bar(0, Bar::memory32(BAR_SIZE).doorbells(DOORBELLS..BAR_SIZE))
        .bar(1, Bar::memory32(0x1000))
        .msix(Msix::new(LANES).table(1, 0).pba(1, 0x800))
        .state(usize::from(LANES) * LANE_STATE)
        .build()
}

/// Bytes of state that a lane has.
const LANE_STATE: usize = 16;
/// Where in them its counter is.
const COUNTER: usize = 0;
/// Where in them its address is.
const BLOCK: usize = 8;

/// The device.
#[derive(Debug)]
pub struct Counter {
    state: State,
    dma: Dma,
    interrupts: Interrupts,
    doorbells: Doorbell,
}

impl Counter {
    /// The device, just powered on or recovered from an earlier process: here that is the same.
    pub fn new(bus: &Bus) -> Result<Self> {
        let missing = || Error::new(Errno::EIO, "the doorbells are missing");
        Ok(Self {
            state: bus.state(),
            dma: bus.dma(),
            interrupts: bus.interrupts(),
            doorbells: bus
                .doorbell(Region::Bar(0), DOORBELLS)
                .ok_or_else(missing)?,
        })
    }

    /// Adds to a lane's counter, exactly once for an access; returns what it was before.
    fn add(&self, access: &Access, lane: u16, addend: u64) -> Result<u64> {
        self.state.once(access, |bytes| {
            let before = get(bytes, lane, COUNTER);
            put(bytes, lane, COUNTER, before.wrapping_add(addend));
            before
        })
    }

    /// Adds what the client's memory says, and writes there what came of it. When this is replayed,
    /// the client has waited: its block is the same, and only the sum must not be made again.
    fn go(&self, access: &Access, lane: u16) -> Result<()> {
        let address = self.kept(lane, BLOCK);
        if address % 8 != 0 {
            let message = format!("lane {lane}: no block can be at {address:#x}");
            return Err(Error::new(Errno::EINVAL, message));
        }
        // The mapping is there until this access has ended.
        let block = self.dma.map(address, 32, DmaAccess::ReadWrite)?;
        let [addend, sequence] = block.read_obj::<[u64; 2]>(0)?.map(u64::from_le);
        let sum = self.add(access, lane, addend)?.wrapping_add(addend);
        block.write_obj(16, sum.to_le())?;
        block.store(24, sequence.to_le())?;
        self.interrupts.raise(lane)
    }

    fn kept(&self, lane: u16, which: usize) -> u64 {
        self.state.read(|bytes| get(bytes, lane, which))
    }
}

impl SharedDevice for Counter {
    fn read(&self, access: Access) -> Result<u64> {
        let Some((lane, register)) = place(&access) else {
            return access.unhandled_read();
        };
        match (register, access.width) {
            (VALUE, Width::Qword) => Ok(self.kept(lane, COUNTER)),
            (FETCH_ADD, Width::Qword) => self.add(&access, lane, 1),
            (ADDRESS, Width::Qword) => Ok(self.kept(lane, BLOCK)),
            (BELL, Width::Dword) => {
                // The client is answered for a doorbell as soon as the value lies here.
                let value = self.doorbells.memory().load::<u32>(usize::from(lane) * 4)?;
                Ok(u32::from_le(value).into())
            }
            _ => access.unhandled_read(),
        }
    }

    fn write(&self, access: Access, value: u64) -> Result<()> {
        let Some((lane, register)) = place(&access) else {
            return access.unhandled_write(value);
        };
        match (register, access.width) {
            (ADD, Width::Dword) => self.add(&access, lane, value).map(drop),
            (ADDRESS, Width::Qword) => {
                self.state.update(|bytes| put(bytes, lane, BLOCK, value));
                Ok(())
            }
            (GO, Width::Dword) => self.go(&access, lane),
            _ => access.unhandled_write(value),
        }
    }

    /// A device that had something to do would do it here; this one looks when it is asked.
    fn doorbell(&self, _rung: &Doorbell) -> Result<()> {
        Ok(())
    }

    fn reset(&self, _reset: Reset) -> Result<()> {
        self.state.update(|bytes| bytes.fill(0));
        self.doorbells.memory().clear();
        Ok(())
    }
}

/// The lane and its register that are accessed.
fn place(access: &Access) -> Option<(u16, u64)> {
    let lane = u16::try_from(access.offset / LANE_SIZE).ok()?;
    let ours = access.region == Region::Bar(0) && lane < LANES;
    ours.then_some((lane, access.offset % LANE_SIZE))
}

/// A number of what a lane keeps.
fn get(state: &[u8], lane: u16, which: usize) -> u64 {
    let at = usize::from(lane) * LANE_STATE + which;
    let number = state.get(at..).and_then(<[u8]>::first_chunk);
    number.map_or(0, |number| u64::from_le_bytes(*number))
}

fn put(state: &mut [u8], lane: u16, which: usize, value: u64) {
    let at = usize::from(lane) * LANE_STATE + which;
    state[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
