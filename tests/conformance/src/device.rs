// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device made to be tested: registers that remember, count, fail and interrupt.
//!
//! Registers of [`REGISTERS`], little-endian:
//!
//! | offset          | what it is                                                            |
//! |-----------------|-----------------------------------------------------------------------|
//! | [`SCRATCH`]     | 64 bytes that keep what is written, in accesses of any width           |
//! | [`ERRNO`]       | the errno with which [`FAIL`] fails                                    |
//! | [`FAIL`]        | fails every access                                                     |
//! | [`RAISE`]       | a write raises the interrupt of that number                            |
//! | [`LOWER`]       | a write lowers it                                                      |
//! | [`RESETS`]      | resets so far; they do not clear it                                    |
//! | [`LAST_RESET`]  | kind of the last reset: 1 client, 2 close, 3 function level, 4 power up |
//! | [`PEEK_AT`]     | offset in the memory area that [`PEEK`] reaches                        |
//! | [`PEEK`]        | the device's own view of 4 bytes of the memory area                    |
//! | [`TRACE`]       | accesses of the scratch registers since the last write to this         |
//! | [`TRACE_AT`]    | which of them [`TRACE_ENTRY`] shows                                    |
//! | [`TRACE_ENTRY`] | its offset in bits 8 to 15, its width in bits 0 to 6, bit 7: a write    |
//!
//! And those of what survives it, see [`KEPT`] and the others there.
//! Those from 0x90 on are of its DMA [`engine`].

use libmuser::{
    Access, Bar, Bus, Device, Errno, Express, Interrupts, Msi, Msix, PciBuilder, PciModel, Pin,
    PowerManagement, Region, Reset, Result, SharedMemory, VendorCapability,
};

pub mod engine;
mod keeper;

pub use keeper::{
    SharedTestDevice, ADD, BELL, DOORBELL, FETCH_ADD, FETCH_ADDS, INTRUDERS, KEPT, RECOVERED,
    REPLAYS, RINGS, SUM, TOGETHER,
};

use engine::Engine;
use keeper::Keeper;

/// Vendor id and device id.
pub const IDS: (u16, u16) = (0x1234, 0xC0DE);
/// BAR of the registers: 4 KiB.
pub const REGISTERS: u32 = 0;
/// BAR with shared memory in its middle: 64 KiB, of which [`MEMORY_AREA`] is mappable.
pub const MEMORY: u32 = 2;
/// Offset and size of the mappable area of [`MEMORY`].
pub const MEMORY_AREA: (u64, u64) = (0x4000, 0x8000);
/// BAR of the MSI-X table.
pub const TABLE: u32 = 4;
/// Vectors of MSI-X.
pub const MSIX_VECTORS: u16 = 16;

/// Scratch registers: the first 64 bytes.
pub const SCRATCH: u64 = 0x00;
/// Bytes of the scratch registers.
pub const SCRATCH_SIZE: usize = 0x40;
/// See the [module](self).
pub const ERRNO: u64 = 0x40;
/// See the [module](self).
pub const FAIL: u64 = 0x44;
/// See the [module](self).
pub const RAISE: u64 = 0x48;
/// See the [module](self).
pub const LOWER: u64 = 0x4C;
/// See the [module](self).
pub const RESETS: u64 = 0x60;
/// See the [module](self).
pub const LAST_RESET: u64 = 0x64;
/// See the [module](self).
pub const PEEK_AT: u64 = 0x68;
/// See the [module](self).
pub const PEEK: u64 = 0x6C;
/// See the [module](self).
pub const TRACE: u64 = 0x70;
/// See the [module](self).
pub const TRACE_AT: u64 = 0x74;
/// See the [module](self).
pub const TRACE_ENTRY: u64 = 0x78;
/// A register that the device does not have.
pub const NOTHING: u64 = 0x80;

/// The device's model.
///
/// # Errors
///
/// None, unless the library has a bug.
pub fn model() -> Result<PciModel> {
    let (offset, size) = MEMORY_AREA;
    PciBuilder::new(IDS.0, IDS.1)
        .class(0xFF, 0x00, 0x00)
        .interrupt_pin(Pin::A)
        .bar(0, Bar::memory32(0x1000))
        .bar(
            2,
            Bar::memory64(0x10000)
                .prefetchable()
                .mappable(offset..offset + size),
        )
        .bar(4, Bar::memory32(0x1000).doorbells(DOORBELL..DOORBELL + 4))
        .state(keeper::STATE)
        .power_management(PowerManagement::new().soft_reset())
        .express(Express::endpoint())
        .msi(Msi::new(4).maskable())
        .msix(Msix::new(MSIX_VECTORS).table(4, 0).pba(4, 0x800))
        .vendor_capability(VendorCapability::new(vec![0xAB, 0xCD]))
        .serial_number(0x0123_4567_89AB_CDEF)
        .build()
}

/// The device.
#[derive(Debug)]
pub struct TestDevice {
    interrupts: Interrupts,
    memory: Option<SharedMemory>,
    scratch: [u8; SCRATCH_SIZE],
    errno: i32,
    resets: u32,
    last_reset: u32,
    peek_at: usize,
    trace: Vec<u8>,
    trace_at: usize,
    keeper: Keeper,
    engine: Engine,
}

impl TestDevice {
    /// A device just powered on.
    pub fn new(bus: &Bus) -> Self {
        Self {
            interrupts: bus.interrupts(),
            memory: bus.memory(Region::Bar(2), MEMORY_AREA.0),
            scratch: [0; SCRATCH_SIZE],
            errno: 5,
            resets: 0,
            last_reset: 0,
            peek_at: 0,
            trace: Vec::new(),
            trace_at: 0,
            keeper: Keeper::new(bus),
            engine: Engine::new(bus.dma()),
        }
    }

    fn scratch(&mut self, access: Access, write: bool) -> Option<&mut [u8]> {
        let start = usize::try_from(access.offset).ok()?;
        let bytes = self
            .scratch
            .get_mut(start..start.checked_add(access.width.bytes())?)?;
        let width = u8::try_from(access.width.bytes()).ok()? | u8::from(write) << 7;
        self.trace
            .extend([width, u8::try_from(access.offset).ok()?]);
        Some(bytes)
    }

    fn memory(&self) -> Result<&SharedMemory> {
        self.memory
            .as_ref()
            .ok_or_else(|| libmuser::Error::new(Errno::EIO, "the device has no memory"))
    }

    fn failure(&self) -> Result<u64> {
        Err(Errno::new(self.errno).unwrap_or(Errno::EIO).into())
    }
}

impl Device for TestDevice {
    fn read(&mut self, access: Access) -> Result<u64> {
        if access.region != Region::Bar(0) {
            return access.unhandled_read();
        }
        if let Some(bytes) = self.scratch(access, false) {
            let mut value = [0; 8];
            value[..bytes.len()].copy_from_slice(bytes);
            return Ok(u64::from_le_bytes(value));
        }
        if let Some(value) = self.keeper.read(&access)? {
            return Ok(value);
        }
        match access.offset {
            FAIL => self.failure(),
            RESETS => Ok(self.resets.into()),
            LAST_RESET => Ok(self.last_reset.into()),
            PEEK => Ok(self.memory()?.read::<u32>(self.peek_at)?.into()),
            TRACE => Ok((self.trace.len() / 2) as u64),
            TRACE_ENTRY => {
                let entry = self.trace.get(self.trace_at * 2..self.trace_at * 2 + 2);
                Ok(entry.map_or(u64::MAX, |entry| {
                    u16::from_le_bytes([entry[0], entry[1]]).into()
                }))
            }
            offset => match self.engine.read(offset) {
                Some(value) => Ok(value),
                None => access.unhandled_read(),
            },
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        if access.region != Region::Bar(0) {
            return access.unhandled_write(value);
        }
        if let Some(bytes) = self.scratch(access, true) {
            bytes.copy_from_slice(&value.to_le_bytes()[..access.width.bytes()]);
            return Ok(());
        }
        if self.keeper.write(&access, value as u32)? {
            return Ok(());
        }
        let vector = (value & 0xFFFF) as u16;
        match access.offset {
            ERRNO => self.errno = i32::try_from(value).unwrap_or(5),
            FAIL => self.failure().map(drop)?,
            RAISE => self.interrupts.raise(vector)?,
            LOWER => self.interrupts.lower(vector)?,
            PEEK_AT => self.peek_at = value as u32 as usize,
            PEEK => self.memory()?.write(self.peek_at, value as u32)?,
            TRACE => self.trace.clear(),
            TRACE_AT => self.trace_at = usize::from(vector),
            offset if (engine::IOVA..=engine::GO).contains(&offset) => {
                let memory = self.memory()?.clone();
                self.engine.write(offset, value as u32, &memory)?;
            }
            _ => access.unhandled_write(value)?,
        }
        Ok(())
    }

    fn doorbell(&mut self, _doorbell: &libmuser::Doorbell) -> Result<()> {
        self.keeper.ring();
        Ok(())
    }

    fn dma_unmapped(&mut self, iova: std::ops::Range<u64>) {
        self.engine.unmapped(iova);
    }

    fn reset(&mut self, reset: Reset) -> Result<()> {
        self.scratch.fill(0);
        self.resets += 1;
        self.last_reset = match reset {
            Reset::Client => 1,
            Reset::Close => 2,
            Reset::FunctionLevel => 3,
            Reset::PowerUp => 4,
            _ => 0,
        };
        Ok(())
    }
}
