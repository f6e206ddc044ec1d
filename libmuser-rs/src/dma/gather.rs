// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scatter-gather: pieces of the client's memory, used as if they were one.

use std::ops::Range;

use vm_memory::ByteValued;

use super::{outside, Dma, DmaAccess, DmaRange, DmaSlices};
use crate::error::{Errno, Error, Result};

/// Pieces of the client's memory in the order in which they were given, which [`Dma::gather`] gives.
/// They may overlap. A handle, as [`DmaRange`].
#[derive(Clone, Debug)]
pub struct ScatterGather {
    /// Each with the offset at which it starts. None is empty.
    parts: Vec<(usize, DmaRange)>,
    len: usize,
    dma: Dma,
    access: DmaAccess,
}

impl ScatterGather {
    pub(super) fn new(dma: &Dma, parts: &[(u64, usize)], access: DmaAccess) -> Result<Self> {
        dma.bus_master.check()?;
        let mut ranges = Vec::with_capacity(parts.len());
        let mut len = 0_usize;
        for (iova, count) in parts {
            let end = len.checked_add(*count).ok_or_else(|| {
                let message = "pieces of DMA that add up to more than memory can have";
                Error::new(Errno::EOVERFLOW, message)
            })?;
            let range = dma.map(*iova, *count, access)?;
            if !range.is_empty() {
                ranges.push((len, range));
            }
            len = end;
        }
        Ok(Self {
            parts: ranges,
            len,
            dma: dma.clone(),
            access,
        })
    }

    /// Bytes of all pieces.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces which are not empty.
    pub fn ranges(&self) -> impl Iterator<Item = &DmaRange> {
        self.parts.iter().map(|(_, range)| range)
    }

    /// Copies out of the pieces, from `offset` bytes after the start of the first on.
    ///
    /// # Errors
    ///
    /// As [`DmaRange::read`].
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        for (range, inside, bytes) in self.within(offset, to.len())? {
            range.read(inside, &mut to[bytes])?;
        }
        Ok(())
    }

    /// Copies into the pieces, as [`read`](Self::read).
    ///
    /// # Errors
    ///
    /// As [`DmaRange::write`]. Pieces before the one that fails are written.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        for (range, inside, bytes) in self.within(offset, from.len())? {
            range.write(inside, &from[bytes])?;
        }
        Ok(())
    }

    /// Reads a value, which may lie in several pieces.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_obj<T: ByteValued>(&self, offset: usize) -> Result<T> {
        let mut value = T::zeroed();
        self.read(offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes a value, which may lie in several pieces.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_obj<T: ByteValued>(&self, offset: usize, value: T) -> Result<()> {
        self.write(offset, value.as_slice())
    }

    /// The memory itself, as [`DmaRange::slices`].
    ///
    /// # Errors
    ///
    /// As [`DmaRange::slices`].
    pub fn slices(&self) -> Result<DmaSlices> {
        self.dma.bus_master.check()?;
        DmaSlices::concat(self.ranges().map(DmaRange::slices), self.access)
    }

    /// The pieces in which some bytes lie: each with where in it, and which of the bytes.
    fn within(
        &self,
        offset: usize,
        count: usize,
    ) -> Result<impl Iterator<Item = (&DmaRange, usize, Range<usize>)>> {
        self.dma.bus_master.check()?;
        let end = offset
            .checked_add(count)
            .filter(|end| *end <= self.len)
            .ok_or_else(|| outside(offset, count, self.len))?;
        let first = self
            .parts
            .partition_point(|(start, range)| start + range.len() <= offset);
        let parts = self.parts[first..].iter();
        let parts = parts.take_while(move |(start, _)| *start < end);
        Ok(parts.map(move |(start, range)| {
            let from = offset.max(*start);
            let to = end.min(start + range.len());
            (range, from - start, from - offset..to - offset)
        }))
    }
}
