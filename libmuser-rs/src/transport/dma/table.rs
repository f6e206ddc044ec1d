// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client has mapped for DMA, where no kernel keeps it: for the transports which are told of
//! maps.
//!
//! The rules are those of VFIO's type1 v2 (`drivers/vfio/vfio_iommu_type1.c`): mappings do not
//! overlap, and go as they came or several at once, never a part of one.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno as Number;
use vm_memory::VolatileSlice;

use super::dirty::PAGE;
use super::files::{FileMapping, SharedFile};
use super::{Acquired, Backing, DirtyLog, DirtyPages, DmaAccess, GuestMemory, IovaRange, Piece};
use crate::error::{Error, Result};
use crate::sys::Mapping;
use crate::transport::sealed;

/// Mappings there can be, as type1's `dma_entry_limit`.
const MAX_MAPPINGS: usize = 65_535;
/// Bytes of all mappings together: as many as a process can address.
const MAX_BYTES: u64 = 1 << 47;

/// Memory of a client which can't be mapped into this process: each access is a call.
pub trait RemoteMemory: Debug + Send + Sync {
    /// Reads all of `to` from `offset` on.
    ///
    /// # Errors
    ///
    /// The memory is not there, or can't be reached.
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from` to `offset` on.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;
}

/// Where the memory of a mapping is.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// In this process, from this offset of the mapping on. If it is mapped for reading only, so is
    /// what the client is told of it.
    Direct(Arc<Mapping>, usize),
    /// In this process, from this offset of a file's mapping on.
    Mapped(Arc<FileMapping>, usize),
    /// In a file that can't be mapped, from this offset on.
    File(Arc<SharedFile>, u64),
    /// With the client, from this offset on.
    Remote(Arc<dyn RemoteMemory>, u64),
}

impl Memory {
    /// What is in this process, and where in it the memory starts.
    fn mapping(&self) -> Option<(&Mapping, usize)> {
        match self {
            Self::Direct(mapping, start) => Some((mapping, *start)),
            Self::Mapped(file, start) => Some((file.mapping(), *start)),
            Self::File(..) | Self::Remote(..) => None,
        }
    }

    /// Whether an access needs the client to do something.
    fn is_remote(&self) -> bool {
        matches!(self, Self::Remote(..))
    }
}

/// A mapping of the client's.
#[derive(Debug)]
pub(crate) struct Mapped {
    range: IovaRange,
    access: DmaAccess,
    memory: Memory,
    dirty: DirtyPages,
    /// Whether the device has used it since it was mapped or released.
    used: AtomicBool,
    /// Whether the client is just unmapping it.
    leaving: AtomicBool,
}

impl Mapped {
    pub(crate) fn range(&self) -> IovaRange {
        self.range
    }

    /// Whether the device has used it.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        match &self.memory {
            Memory::Direct(..) | Memory::Mapped(..) => {
                let slice = self.copied(offset, to.len())?;
                slice.copy_to(to);
                Ok(())
            }
            Memory::File(file, start) => file
                .read(start.saturating_add(offset), to)
                .map_err(|error| Error::io("reading the client's file", error)),
            Memory::Remote(remote, start) => remote
                .read(start.saturating_add(offset), to)
                .map_err(|error| Error::io("reading the client's memory", error)),
        }
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        match &self.memory {
            Memory::Direct(..) | Memory::Mapped(..) => {
                let slice = self.copied(offset, from.len())?;
                slice.copy_from(from);
                Ok(())
            }
            Memory::File(file, start) => {
                let written = file.write(start.saturating_add(offset), from);
                self.mark(offset, from.len());
                written.map_err(|error| Error::io("writing the client's file", error))
            }
            Memory::Remote(remote, start) => {
                let written = remote.write(start.saturating_add(offset), from);
                self.mark(offset, from.len());
                written.map_err(|error| Error::io("writing the client's memory", error))
            }
        }
    }

    /// Marks what may have been written, also by a call that failed half-way.
    fn mark(&self, offset: u64, len: usize) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        self.dirty.mark(offset, len);
    }

    fn copied(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_, DirtyLog<'_>>> {
        let start = usize::try_from(offset).ok();
        let end = start.and_then(|start| start.checked_add(len));
        let bytes = start.zip(end).map(|(start, end)| start..end);
        let slice = bytes.and_then(|bytes| self.slice(bytes));
        slice.ok_or_else(|| self.range.not_mapped())
    }
}

impl Backing for Mapped {
    fn slice(&self, bytes: Range<usize>) -> Option<VolatileSlice<'_, DirtyLog<'_>>> {
        let (mapping, offset) = self.memory.mapping()?;
        let log = DirtyLog::new(&self.dirty, bytes.start);
        let start = offset.checked_add(bytes.start)?;
        mapping.slice_with(start..offset.checked_add(bytes.end)?, log)
    }
}

/// All mappings of a device's clients.
#[derive(Debug, Default)]
pub(crate) struct DmaTable {
    mappings: RwLock<Mappings>,
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Mappings {
    by_start: BTreeMap<Start, Arc<Mapped>>,
    bytes: u64,
}

/// The first IOVA of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start(u64);

impl Ord for Start {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        #[cfg(test)]
        Self::comparisons().set(Self::comparisons().get() + 1);
        self.0.cmp(&other.0)
    }
}

impl PartialOrd for Start {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
impl Start {
    /// How often this thread has compared two.
    fn comparisons() -> &'static std::thread::LocalKey<std::cell::Cell<usize>> {
        thread_local! {
            static COMPARISONS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
        }
        &COMPARISONS
    }
}

impl DmaTable {
    /// A client maps memory.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is empty, or not made of whole pages. `EOVERFLOW`: it ends beyond 2^64.
    /// `EEXIST`: it overlaps another mapping. `ENOSPC`: there are too many.
    pub(crate) fn map(
        &self,
        iova: u64,
        len: u64,
        access: DmaAccess,
        memory: Memory,
    ) -> Result<(), Number> {
        let range = pages(iova, len)?;
        let mut mappings = self.write_lock();
        if mappings.overlapping(range).next().is_some() {
            return Err(Number::EEXIST);
        }
        let bytes = mappings.bytes.checked_add(len);
        let bytes = bytes.filter(|bytes| *bytes <= MAX_BYTES);
        let (Some(bytes), true) = (bytes, mappings.by_start.len() < MAX_MAPPINGS) else {
            return Err(Number::ENOSPC);
        };
        mappings.bytes = bytes;
        let mapped = Mapped {
            range,
            access,
            memory,
            dirty: DirtyPages::new(len),
            used: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
        };
        mappings.by_start.insert(Start(iova), Arc::new(mapped));
        Ok(())
    }

    /// A client is about to unmap all mappings in a range: none of them can be acquired any more.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the range is empty, is not made of whole pages, or has only a part of a mapping.
    /// `EOVERFLOW`: it ends beyond 2^64.
    pub(crate) fn leave(&self, iova: u64, len: u64) -> Result<Vec<Arc<Mapped>>, Number> {
        let range = pages(iova, len)?;
        let mappings = self.write_lock();
        let whole = |mapped: &&Arc<Mapped>| range.contains(mapped.range);
        if !mappings.overlapping(range).all(|mapped| whole(&mapped)) {
            return Err(Number::EINVAL);
        }
        Ok(leaving(mappings.overlapping(range)))
    }

    /// A client is about to unmap everything.
    pub(crate) fn leave_all(&self) -> Vec<Arc<Mapped>> {
        leaving(self.write_lock().by_start.values())
    }

    /// Mappings that were about to go stay.
    pub(crate) fn stay(&self, going: &[Arc<Mapped>]) {
        // Nobody looks for one while the lock is held for writing.
        let _mappings = self.write_lock();
        for mapped in going {
            mapped.leaving.store(false, Ordering::Relaxed);
        }
    }

    /// The mappings go, and with them what was acquired of them. Tells how many bytes went: what
    /// somebody else unmapped at the same time counts once.
    pub(crate) fn remove(&self, gone: &[Arc<Mapped>]) -> u64 {
        let mut bytes = 0;
        let mut mappings = self.write_lock();
        for mapped in gone {
            let start = Start(mapped.range.first());
            let present = mappings.by_start.get(&start);
            if present.is_some_and(|present| Arc::ptr_eq(present, mapped)) {
                mappings.by_start.remove(&start);
                bytes += mapped.range.len();
            }
        }
        mappings.bytes -= bytes;
        if gone.iter().any(|mapped| mapped.is_used()) {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        bytes
    }

    /// All mappings go at once, as when the last client closes the device.
    pub(crate) fn clear(&self) {
        let all = self.leave_all();
        let _ = self.remove(&all);
    }

    /// First IOVA of each page of a range that the device has written to, ascending; of memory that
    /// is not mapped any more there is no record.
    pub(crate) fn dirty_pages(&self, iovas: Range<u64>, clear: bool) -> Vec<u64> {
        let mut found = Vec::new();
        let Some(last) = iovas.end.checked_sub(1).filter(|last| *last >= iovas.start) else {
            return found;
        };
        let range = IovaRange::between(iovas.start, last);
        let page = |offset: u64| usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
        for mapped in self.read_lock().overlapping(range) {
            let start = mapped.range.first();
            let first = page(range.first().saturating_sub(start));
            let last = page(range.last().min(mapped.range.last()) - start);
            mapped.dirty.harvest(first, last, clear, |number| {
                found.push(start + number as u64 * PAGE);
            });
        }
        found
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, Mappings> {
        self.mappings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Mappings> {
        self.mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a copy, mapping by mapping: of the range's bytes from `done` on, `len` lie at `offset`
    /// of a mapping. All of the range is known to be there before the first.
    fn copy(
        &self,
        range: IovaRange,
        access: DmaAccess,
        mut work: impl FnMut(&Mapped, u64, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mappings = self.read_lock();
        let parts = mappings.parts(range, access)?;
        if !parts.iter().any(|part| part.mapped.memory.is_remote()) {
            // Under the lock, so that an unmap which has ended is not written to any more.
            return parts
                .iter()
                .try_for_each(|part| work(&part.mapped, part.offset, part.bytes.clone()));
        }
        // A call of the client's may take long, and may need the table. Meanwhile he may unmap what
        // comes behind it.
        drop(mappings);
        parts.iter().try_for_each(|part| {
            let mappings = self.read_lock();
            if !mappings.has(&part.mapped) {
                return Err(range.not_mapped());
            }
            if part.mapped.memory.is_remote() {
                drop(mappings);
            }
            work(&part.mapped, part.offset, part.bytes.clone())
        })
    }
}

/// A part of a range that lies in one mapping.
struct Part {
    mapped: Arc<Mapped>,
    /// Where in the mapping.
    offset: u64,
    /// Where in the range.
    bytes: Range<usize>,
}

impl Mappings {
    /// Those which have an IOVA of the range, ascending.
    fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = &Arc<Mapped>> {
        let before = self.by_start.range(..Start(range.first())).next_back();
        let before = before.filter(|(_, mapped)| mapped.range.overlaps(range));
        let inside = self
            .by_start
            .range(Start(range.first())..=Start(range.last()));
        before.into_iter().chain(inside).map(|(_, mapped)| mapped)
    }

    /// Whether a mapping is there still, and nobody unmaps it.
    fn has(&self, mapped: &Arc<Mapped>) -> bool {
        let present = self.by_start.get(&Start(mapped.range.first()));
        present.is_some_and(|present| Arc::ptr_eq(present, mapped))
            && !mapped.leaving.load(Ordering::Relaxed)
    }

    /// The range, cut where one mapping ends and the next begins.
    fn parts(&self, range: IovaRange, access: DmaAccess) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(1);
        let mut done = 0;
        for mapped in self.overlapping(range) {
            let at = range.first() + done;
            if mapped.range.first() > at || mapped.leaving.load(Ordering::Relaxed) {
                return Err(range.not_mapped());
            }
            if !mapped.access.allows(access) {
                return Err(refused(range, mapped.access));
            }
            mapped.used.store(true, Ordering::Release);
            let len = mapped.range.last().min(range.last()) - at + 1;
            let start = usize::try_from(done).map_err(|_| range.not_mapped())?;
            let end = usize::try_from(done + len).map_err(|_| range.not_mapped())?;
            parts.push(Part {
                mapped: Arc::clone(mapped),
                offset: at - mapped.range.first(),
                bytes: start..end,
            });
            done += len;
            if done == range.len() {
                return Ok(parts);
            }
        }
        Err(range.not_mapped())
    }
}

fn refused(range: IovaRange, granted: DmaAccess) -> Error {
    match granted {
        DmaAccess::Write => {
            let (first, last) = (range.first(), range.last());
            let message =
                format!("the client has mapped IOVA {first:#x} to {last:#x} for writing only");
            Error::new(crate::error::Errno::EPERM, message)
        }
        _ => range.read_only(),
    }
}

/// A range that a client gives, which has whole pages only.
fn pages(iova: u64, len: u64) -> Result<IovaRange, Number> {
    if len == 0 || (iova | len) % PAGE != 0 {
        return Err(Number::EINVAL);
    }
    IovaRange::new(iova, len)
        .ok()
        .flatten()
        .ok_or(Number::EOVERFLOW)
}

fn leaving<'a>(mappings: impl Iterator<Item = &'a Arc<Mapped>>) -> Vec<Arc<Mapped>> {
    mappings
        .inspect(|mapped| mapped.leaving.store(true, Ordering::Relaxed))
        .cloned()
        .collect()
}

impl sealed::Sealed for DmaTable {}

impl GuestMemory for DmaTable {
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn acquire(&self, range: IovaRange, access: DmaAccess) -> Result<Acquired> {
        let mappings = self.read_lock();
        // It can't change under the lock.
        let generation = self.generation();
        let parts = mappings.parts(range, access)?;
        let pieces = parts.into_iter().map(|part| {
            part.mapped.memory.mapping()?;
            let start = usize::try_from(part.offset).ok()?;
            Some(Piece {
                bytes: start..start.checked_add(part.bytes.len())?,
                backing: part.mapped,
            })
        });
        Ok(Acquired {
            generation,
            pieces: pieces.collect(),
        })
    }

    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<()> {
        for (iova, to) in parts {
            let Some(range) = IovaRange::new(*iova, to.len() as u64)? else {
                continue;
            };
            self.copy(range, DmaAccess::Read, |mapped, offset, bytes| {
                mapped.read(offset, &mut to[bytes])
            })?;
        }
        Ok(())
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<()> {
        for (iova, from) in parts {
            let Some(range) = IovaRange::new(*iova, from.len() as u64)? else {
                continue;
            };
            self.copy(range, DmaAccess::Write, |mapped, offset, bytes| {
                mapped.write(offset, &from[bytes])
            })?;
        }
        Ok(())
    }

    /// Nothing is held here; but of a mapping that the device does not use, it is not told when it
    /// goes.
    fn release(&self, range: IovaRange) -> Result<()> {
        // Nobody can get hold of another while the lock is held for writing.
        let mappings = self.write_lock();
        for mapped in mappings.overlapping(range) {
            if range.contains(mapped.range) && Arc::strong_count(mapped) == 1 {
                mapped.used.store(false, Ordering::Release);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod model_tests;
#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
