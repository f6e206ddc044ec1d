// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test device's DMA engine: copies between the client's memory and the memory area, in each of
//! the ways that the library offers.
//!
//! Registers of [`REGISTERS`](super::REGISTERS), 4 bytes each. Data lies at the start of the memory
//! area. A command fails with the errno of what it did.
//!
//! | offset          | what it is                                                             |
//! |-----------------|------------------------------------------------------------------------|
//! | [`IOVA`]        | IOVA, and its upper half 4 bytes further                                |
//! | [`LEN`]         | bytes, at most those of the memory area                                 |
//! | [`GO`]          | a write does what [`Command`] says                                      |
//! | [`UNMAPS`]      | how often the device was told of an unmap                               |
//! | [`UNMAPPED`]    | number of the first page of the last of them                            |
//! | [`UNMAPPED_LEN`]| its pages                                                               |

use std::ops::Range;

use libmuser::{Dma, DmaAccess, DmaRange, Errno, Error, Result, SharedMemory};

/// See the [module](self).
pub const IOVA: u64 = 0x90;
/// See the [module](self).
pub const LEN: u64 = 0x98;
/// See the [module](self).
pub const GO: u64 = 0x9C;
/// See the [module](self).
pub const UNMAPS: u64 = 0xA0;
/// See the [module](self).
pub const UNMAPPED: u64 = 0xA4;
/// See the [module](self).
pub const UNMAPPED_LEN: u64 = 0xA8;

/// What the engine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Command {
    /// Copy out of the client's memory.
    Read = 1,
    /// Copy into the client's memory.
    Write,
    /// Map a range and keep it, for reading and writing.
    Hold,
    /// Map a range and keep it, for reading.
    HoldRead,
    /// Read the range that is kept.
    ReadHeld,
    /// Write the range that is kept.
    WriteHeld,
    /// Add 1 to the 4 bytes at its start, by a load and a store.
    Increment,
    /// Write the range that is kept through its volatile slices.
    WriteSlices,
    /// Drop the range that is kept, and let go of its memory.
    Release,
    /// Remember a piece to gather.
    Piece,
    /// Read all pieces, and forget them.
    ReadPieces,
    /// Write all pieces, and forget them.
    WritePieces,
}

impl Command {
    const ALL: [Self; 12] = [
        Self::Read,
        Self::Write,
        Self::Hold,
        Self::HoldRead,
        Self::ReadHeld,
        Self::WriteHeld,
        Self::Increment,
        Self::WriteSlices,
        Self::Release,
        Self::Piece,
        Self::ReadPieces,
        Self::WritePieces,
    ];
}

/// The engine.
#[derive(Debug)]
pub(super) struct Engine {
    dma: Dma,
    iova: u64,
    len: usize,
    held: Option<DmaRange>,
    pieces: Vec<(u64, usize)>,
    unmaps: u32,
    unmapped: Range<u64>,
}

impl Engine {
    pub(super) fn new(dma: Dma) -> Self {
        Self {
            dma,
            iova: 0,
            len: 0,
            held: None,
            pieces: Vec::new(),
            unmaps: 0,
            unmapped: 0..0,
        }
    }

    pub(super) fn unmapped(&mut self, iova: Range<u64>) {
        self.unmaps += 1;
        self.unmapped = iova;
    }

    pub(super) fn read(&self, offset: u64) -> Option<u64> {
        match offset {
            UNMAPS => Some(self.unmaps.into()),
            UNMAPPED => Some(self.unmapped.start >> 12),
            UNMAPPED_LEN => Some((self.unmapped.end - self.unmapped.start) >> 12),
            _ => None,
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32, memory: &SharedMemory) -> Result<()> {
        const HIGH: u64 = IOVA + 4;
        match offset {
            IOVA => self.iova = self.iova >> 32 << 32 | u64::from(value),
            HIGH => self.iova = self.iova & 0xFFFF_FFFF | u64::from(value) << 32,
            LEN => self.len = value as usize,
            _ => self.command(value, memory)?,
        }
        Ok(())
    }

    fn command(&mut self, number: u32, memory: &SharedMemory) -> Result<()> {
        let mut commands = Command::ALL.into_iter();
        let command = commands.find(|command| *command as u32 == number);
        match command.ok_or_else(|| Error::from(Errno::EINVAL))? {
            Command::Read => {
                let mut data = vec![0; self.len];
                self.dma.read(self.iova, &mut data)?;
                memory.write_bytes(0, &data)
            }
            Command::Write => {
                let data = bytes(memory, self.len)?;
                self.dma.write(self.iova, &data)
            }
            Command::Hold => self.hold(DmaAccess::ReadWrite),
            Command::HoldRead => self.hold(DmaAccess::Read),
            Command::ReadHeld => {
                let held = self.held()?;
                let mut data = vec![0; held.len()];
                held.read(0, &mut data)?;
                memory.write_bytes(0, &data)
            }
            Command::WriteHeld => {
                let held = self.held()?;
                held.write(0, &bytes(memory, held.len())?)
            }
            Command::Increment => {
                let held = self.held()?;
                let value: u32 = held.load(0)?;
                held.store(0, value.wrapping_add(1))
            }
            Command::WriteSlices => {
                let slices = self.held()?.slices()?;
                let data = bytes(memory, slices.len())?;
                let mut rest = &data[..];
                for slice in slices.iter() {
                    let (part, after) = rest.split_at(slice.len());
                    slice.volatile()?.copy_from(part);
                    rest = after;
                }
                Ok(())
            }
            Command::Release => {
                self.held = None;
                self.dma.release(self.iova, self.len as u64)
            }
            Command::Piece => {
                self.pieces.push((self.iova, self.len));
                Ok(())
            }
            Command::ReadPieces => {
                let pieces = std::mem::take(&mut self.pieces);
                let gathered = self.dma.gather(&pieces, DmaAccess::Read)?;
                let mut data = vec![0; gathered.len()];
                gathered.read(0, &mut data)?;
                memory.write_bytes(0, &data)
            }
            Command::WritePieces => {
                let pieces = std::mem::take(&mut self.pieces);
                let gathered = self.dma.gather(&pieces, DmaAccess::Write)?;
                gathered.write(0, &bytes(memory, gathered.len())?)
            }
        }
    }

    fn hold(&mut self, access: DmaAccess) -> Result<()> {
        self.held = Some(self.dma.map(self.iova, self.len, access)?);
        Ok(())
    }

    fn held(&self) -> Result<&DmaRange> {
        self.held.as_ref().ok_or_else(|| Errno::ENXIO.into())
    }
}

fn bytes(memory: &SharedMemory, len: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; len];
    memory.read_bytes(0, &mut data)?;
    Ok(data)
}
