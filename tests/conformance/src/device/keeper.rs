// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of the test device that survives it, and tells whether it did.
//!
//! Its registers are further ones of [`REGISTERS`](super::REGISTERS), of 4 bytes each.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libmuser::{
    Access, Bus, Device, Doorbell, Errno, Error, Region, Reset, Result, SharedDevice, State,
};

use super::TestDevice;

/// Keeps what is written beyond the life of the server, and over resets.
pub const KEPT: u64 = 0x100;
/// A write adds the value to [`SUM`], exactly once.
pub const ADD: u64 = 0x104;
/// What was added; survives as well.
pub const SUM: u64 = 0x108;
/// 1 if the server found the state of an earlier one, else 0.
pub const RECOVERED: u64 = 0x10C;
/// Accesses of these registers that were marked as replays, of this server.
pub const REPLAYS: u64 = 0x110;
/// The device's own view of the doorbell.
pub const BELL: u64 = 0x114;
/// How often this server was told of the doorbell.
pub const RINGS: u64 = 0x118;
/// A read waits for another read of it, of another thread of the client, and returns how many
/// there were. For servers with several threads.
pub const TOGETHER: u64 = 0x11C;
/// Accesses that were in the device during a reset so far.
pub const INTRUDERS: u64 = 0x120;
/// A read returns [`SUM`] and adds 1 to it, exactly once.
pub const FETCH_ADD: u64 = 0x140;
/// Registers in a row that do the same as [`FETCH_ADD`].
pub const FETCH_ADDS: u64 = 16;
/// The doorbell, 4 bytes in [`TABLE`](super::TABLE).
pub const DOORBELL: u64 = 0xC00;
/// Bytes of state.
pub(super) const STATE: usize = 8;

/// The part of the test device that survives it.
#[derive(Debug)]
pub(super) struct Keeper {
    state: State,
    recovered: bool,
    doorbell: Option<Doorbell>,
    replays: u32,
    rings: u32,
}

impl Keeper {
    pub(super) fn new(bus: &Bus) -> Self {
        Self {
            state: bus.state(),
            recovered: bus.is_recovered(),
            doorbell: bus.doorbell(Region::Bar(4), DOORBELL),
            replays: 0,
            rings: 0,
        }
    }

    /// Reads one of these registers; `None` where it has none.
    pub(super) fn read(&mut self, access: &Access) -> Result<Option<u64>> {
        let value = match access.offset {
            KEPT => self.word(0),
            SUM => self.word(4),
            RECOVERED => self.recovered.into(),
            REPLAYS => self.replays,
            BELL => {
                let missing = || Error::new(Errno::EIO, "the device has no doorbell");
                self.doorbell
                    .as_ref()
                    .ok_or_else(missing)?
                    .memory()
                    .load(0)?
            }
            RINGS => self.rings,
            FETCH_ADD..0x180 => return self.add(access, 1).map(Some),
            _ => return Ok(None),
        };
        if access.replay {
            self.replays += 1;
        }
        Ok(Some(value.into()))
    }

    /// Writes one of these registers; tells whether it is one.
    pub(super) fn write(&mut self, access: &Access, value: u32) -> Result<bool> {
        match access.offset {
            KEPT => self
                .state
                .update(|bytes| bytes[..4].copy_from_slice(&value.to_le_bytes())),
            ADD => self.add(access, value).map(drop)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn ring(&mut self) {
        self.rings += 1;
    }

    fn add(&mut self, access: &Access, addend: u32) -> Result<u64> {
        if access.replay {
            self.replays += 1;
        }
        self.state.once(access, |bytes| {
            let before = word(bytes, 4);
            bytes[4..8].copy_from_slice(&before.wrapping_add(addend).to_le_bytes());
            before.into()
        })
    }

    fn word(&self, at: usize) -> u32 {
        self.state.read(|bytes| word(bytes, at))
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The test device for several threads: most of it behind a lock, so that it is the same device.
#[derive(Debug)]
pub struct SharedTestDevice {
    device: Mutex<TestDevice>,
    together: Mutex<u32>,
    met: Condvar,
    inside: AtomicU32,
    intruders: AtomicU32,
}

/// Long enough for anything that is going to happen.
const PATIENCE: Duration = Duration::from_secs(20);

impl SharedTestDevice {
    /// A device just powered on.
    pub fn new(bus: &Bus) -> Self {
        Self {
            device: Mutex::new(TestDevice::new(bus)),
            together: Mutex::default(),
            met: Condvar::new(),
            inside: AtomicU32::new(0),
            intruders: AtomicU32::new(0),
        }
    }

    fn access<R>(&self, work: impl FnOnce() -> R) -> R {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let result = work();
        self.inside.fetch_sub(1, Ordering::SeqCst);
        result
    }

    fn meet(&self) -> u64 {
        let mut together = self.together.lock().unwrap_or_else(PoisonError::into_inner);
        *together += 1;
        self.met.notify_all();
        let alone = |together: &mut u32| *together < 2;
        let waited = self.met.wait_timeout_while(together, PATIENCE, alone);
        let (together, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (*together).into()
    }

    fn device(&self) -> MutexGuard<'_, TestDevice> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SharedDevice for SharedTestDevice {
    fn read(&self, access: Access) -> Result<u64> {
        self.access(|| match (access.region, access.offset) {
            (Region::Bar(0), TOGETHER) => Ok(self.meet()),
            (Region::Bar(0), INTRUDERS) => Ok(self.intruders.load(Ordering::SeqCst).into()),
            _ => self.device().read(access),
        })
    }

    fn write(&self, access: Access, value: u64) -> Result<()> {
        self.access(|| self.device().write(access, value))
    }

    fn reset(&self, reset: Reset) -> Result<()> {
        for _ in 0..100 {
            let inside = self.inside.load(Ordering::SeqCst);
            self.intruders.fetch_add(inside, Ordering::SeqCst);
            std::thread::yield_now();
        }
        self.device().reset(reset)
    }

    fn doorbell(&self, doorbell: &Doorbell) -> Result<()> {
        self.access(|| self.device().doorbell(doorbell))
    }

    fn dma_unmapped(&self, iova: std::ops::Range<u64>) {
        self.device().dma_unmapped(iova);
    }
}
