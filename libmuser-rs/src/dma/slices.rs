// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's memory as volatile slices, which mark what is written through them.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, VolatileSlice, WriteVolatile};

use super::{outside, DirtyLog, DmaAccess};
use crate::error::{Errno, Error, Result};
use crate::transport::{Acquired, IovaRange, Piece};

/// A range as it was acquired.
#[derive(Debug)]
pub(super) struct View {
    /// `None` for an empty one, which is never outdated.
    generation: Option<u64>,
    /// Each piece with the offset in the range at which it starts. `None`: only copies can be made.
    pieces: Option<Vec<(usize, Piece)>>,
}

impl View {
    /// What was acquired of this range.
    pub(super) fn new(acquired: Acquired, range: IovaRange) -> Self {
        let mut start = 0;
        let place = |piece: Piece| {
            let at = start;
            start += piece.bytes.len();
            (at, piece)
        };
        let pieces = acquired.pieces;
        let pieces: Option<Vec<_>> = pieces.map(|pieces| pieces.into_iter().map(place).collect());
        Self {
            generation: Some(acquired.generation),
            // With gaps, offsets would not be what they are.
            pieces: pieces.filter(|_| start as u64 == range.len()),
        }
    }

    pub(super) const fn empty() -> Self {
        Self {
            generation: None,
            pieces: Some(Vec::new()),
        }
    }

    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.generation.is_none_or(|mine| mine == generation)
    }

    #[cfg(test)]
    pub(super) const fn is_direct(&self) -> bool {
        self.pieces.is_some()
    }

    /// The pieces in which these bytes lie, and which bytes of each.
    fn parts(&self, bytes: Range<usize>) -> Option<impl Iterator<Item = Part<'_>>> {
        let pieces = self.pieces.as_deref()?;
        let first =
            pieces.partition_point(|(start, piece)| start + piece.bytes.len() <= bytes.start);
        let pieces = pieces[first..].iter();
        let pieces = pieces.take_while(move |(start, _)| *start < bytes.end);
        Some(pieces.map(move |(start, piece)| {
            let from = bytes.start.max(*start);
            let to = bytes.end.min(start + piece.bytes.len());
            let inside = piece.bytes.start + (from - start);
            Part {
                piece,
                inside: inside..inside + (to - from),
                bytes: from - bytes.start..to - bytes.start,
            }
        }))
    }

    /// Copies out; `None` if that can't be done here.
    pub(super) fn read(&self, start: usize, to: &mut [u8]) -> Option<()> {
        for part in self.parts(start..start + to.len())? {
            part.slice()?.copy_to(&mut to[part.bytes.clone()]);
        }
        Some(())
    }

    /// Copies in; `None` if that can't be done here.
    pub(super) fn write(&self, start: usize, from: &[u8]) -> Option<()> {
        for part in self.parts(start..start + from.len())? {
            part.slice()?.copy_from(&from[part.bytes.clone()]);
        }
        Some(())
    }

    /// Bytes that lie in one piece.
    pub(super) fn contiguous(
        &self,
        bytes: Range<usize>,
    ) -> Option<VolatileSlice<'_, DirtyLog<'_>>> {
        let count = bytes.len();
        let part = self.parts(bytes)?.next()?;
        part.slice().filter(|slice| slice.len() == count)
    }
}

struct Part<'a> {
    piece: &'a Piece,
    /// Which bytes of the piece's backing.
    inside: Range<usize>,
    /// Which bytes of those asked for.
    bytes: Range<usize>,
}

impl<'a> Part<'a> {
    fn slice(&self) -> Option<VolatileSlice<'a, DirtyLog<'a>>> {
        self.piece.backing.slice(self.inside.clone())
    }
}

/// The memory of a [`DmaRange`](super::DmaRange) or a [`ScatterGather`](super::ScatterGather) at one
/// time, piece by piece.
///
/// As long as it lives, its memory is not given to anything else. It is meant for one use.
#[derive(Debug)]
pub struct DmaSlices {
    views: Vec<(Arc<View>, Range<usize>)>,
    access: DmaAccess,
}

impl DmaSlices {
    pub(super) fn new(view: Arc<View>, bytes: Range<usize>, access: DmaAccess) -> Result<Self> {
        if view.pieces.is_none() {
            let message = "the client's memory can't be mapped into this process: copy it";
            return Err(Error::new(Errno::EOPNOTSUPP, message));
        }
        Ok(Self {
            views: vec![(view, bytes)],
            access,
        })
    }

    /// One after the other.
    pub(super) fn concat(
        all: impl Iterator<Item = Result<Self>>,
        access: DmaAccess,
    ) -> Result<Self> {
        let mut views = Vec::new();
        for slices in all {
            views.extend(slices?.views);
        }
        Ok(Self { views, access })
    }

    /// The slices, in order. None is empty; together they are all bytes.
    pub fn iter(&self) -> impl Iterator<Item = DmaSlice<'_>> {
        let parts = self
            .views
            .iter()
            .filter_map(|(view, bytes)| view.parts(bytes.clone()))
            .flatten();
        parts.filter_map(|part| {
            Some(DmaSlice {
                memory: part.slice()?,
                access: self.access,
            })
        })
    }

    /// Bytes of all slices.
    #[must_use]
    pub fn len(&self) -> usize {
        self.views.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Contiguous memory of the client.
///
/// It knows what it is for: memory that is for reading only may be mapped for nothing else, and a
/// write to it would end the process.
#[derive(Clone, Debug)]
pub struct DmaSlice<'a> {
    memory: VolatileSlice<'a, DirtyLog<'a>>,
    access: DmaAccess,
}

impl<'a> DmaSlice<'a> {
    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there are no empty slices")]
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// The slice with all that [`vm_memory`] offers, of memory that is for reading and writing.
    /// Whatever is written through it or a part of it is recorded.
    ///
    /// # Errors
    ///
    /// `EPERM`: it is for reading only, or for writing only.
    pub fn volatile(&self) -> Result<VolatileSlice<'a, DirtyLog<'a>>> {
        self.check(DmaAccess::ReadWrite)?;
        Ok(self.memory)
    }

    /// Copies out of the memory.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the slice. `EPERM`: it is for writing only.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        self.check(DmaAccess::Read)?;
        let part = self.part(offset, to.len())?;
        part.copy_to(to);
        Ok(())
    }

    /// Copies into the memory.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the slice. `EPERM`: it is for reading only.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.check(DmaAccess::Write)?;
        let part = self.part(offset, from.len())?;
        part.copy_from(from);
        Ok(())
    }

    /// Has all of the memory written to `out`, a file for instance, without a copy in between.
    ///
    /// # Errors
    ///
    /// `EPERM`: it is for writing only. Else, those of `out`.
    pub fn write_all_to(&self, out: &mut impl WriteVolatile) -> Result<()> {
        self.check(DmaAccess::Read)?;
        out.write_all_volatile(&self.memory).map_err(failed)
    }

    /// Has all of the memory filled from `from`, a file for instance, without a copy in between.
    ///
    /// # Errors
    ///
    /// `EPERM`: it is for reading only. Else, those of `from`, which may end too early.
    pub fn read_exact_from(&self, from: &mut impl vm_memory::ReadVolatile) -> Result<()> {
        self.check(DmaAccess::Write)?;
        self.memory
            .read_exact_volatile_from(0, from, self.memory.len())
            .map_err(failed)
    }

    fn check(&self, wanted: DmaAccess) -> Result<()> {
        if self.access.allows(wanted) {
            return Ok(());
        }
        let message = format!("{wanted:?} of memory that is for {:?} only", self.access);
        Err(Error::new(Errno::EPERM, message))
    }

    fn part(&self, offset: usize, count: usize) -> Result<VolatileSlice<'a, DirtyLog<'a>>> {
        self.memory
            .subslice(offset, count)
            .map_err(|_| outside(offset, count, self.len()))
    }
}

fn failed(error: vm_memory::VolatileMemoryError) -> Error {
    match error {
        vm_memory::VolatileMemoryError::IOError(error) => Error::io("a file and DMA", error),
        other => Error::new(Errno::EIO, format!("a file and DMA: {other}")),
    }
}
