// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A range of the client's memory, used in place.

use std::ops::Range;
use std::sync::atomic::{fence, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::{AtomicAccess, ByteValued, Bytes};

use super::slices::View;
use super::{outside, Dma, DmaAccess, DmaSlices};
use crate::error::{Errno, Error, Result};
use crate::transport::IovaRange;

/// A range of the client's memory, which [`Dma::map`] gives.
///
/// A handle: clone it, and use it from any thread. Its memory stays held when it is dropped; it can
/// be had again at no cost.
///
/// What is read was all there at one time: memory that the client takes away meanwhile is never
/// seen as something else. A write to memory which the client is just unmapping may be lost, as it
/// may be on hardware.
#[derive(Clone, Debug)]
pub struct DmaRange {
    shared: Arc<Shared>,
    /// Which bytes of it: a subrange shares it with the range.
    bytes: Range<usize>,
}

#[derive(Debug)]
struct Shared {
    dma: Dma,
    /// `None` if it is empty.
    range: Option<IovaRange>,
    access: DmaAccess,
    /// The memory as it was acquired last.
    view: RwLock<Arc<View>>,
}

/// How often memory that goes away during a use is looked up again, before it is copied by the
/// other end, which can't be overtaken.
const ATTEMPTS: usize = 4;

impl DmaRange {
    pub(super) fn new(dma: Dma, iova: u64, len: usize, access: DmaAccess) -> Result<Self> {
        dma.bus_master.check()?;
        let range = IovaRange::new(iova, len as u64)?;
        let view = match range {
            Some(range) => View::new(dma.memory.acquire(range, access)?, range),
            None => View::empty(),
        };
        let shared = Shared {
            dma,
            range,
            access,
            view: RwLock::new(Arc::new(view)),
        };
        Ok(Self {
            shared: Arc::new(shared),
            bytes: 0..len,
        })
    }

    /// The first byte's IOVA; 0 of an empty range.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova_at(0)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What it can be used for.
    #[must_use]
    pub fn access(&self) -> DmaAccess {
        self.shared.access
    }

    /// A part of the range, which costs nothing.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is not within the range.
    pub fn subrange(&self, bytes: Range<usize>) -> Result<Self> {
        let len = bytes.end.checked_sub(bytes.start);
        let len = len.ok_or_else(|| outside(bytes.start, 0, self.len()))?;
        Ok(Self {
            shared: Arc::clone(&self.shared),
            bytes: self.check(bytes.start, len)?,
        })
    }

    /// Copies out of the range.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the range. `EPERM`: the range is not for reading. Else as
    /// [`Dma::read`].
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let bytes = self.enter(offset, to.len(), DmaAccess::Read)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let done = self.settled(|view| view.read(bytes.start, to))?;
        match done {
            Some(()) => Ok(()),
            None => {
                let iova = self.iova_at(offset);
                self.shared.dma.memory.read(&mut [(iova, to)])
            }
        }
    }

    /// Copies into the range.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); `EPERM`: the range is not for writing.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        let bytes = self.enter(offset, from.len(), DmaAccess::Write)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let view = self.view()?;
        match view.write(bytes.start, from) {
            Some(()) => Ok(()),
            None => {
                let iova = self.iova_at(offset);
                self.shared.dma.memory.write(&[(iova, from)])
            }
        }
    }

    /// Reads a value; not atomically.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_obj<T: ByteValued>(&self, offset: usize) -> Result<T> {
        let mut value = T::zeroed();
        self.read(offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes a value; not atomically.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_obj<T: ByteValued>(&self, offset: usize, value: T) -> Result<()> {
        self.write(offset, value.as_slice())
    }

    /// Loads a value, and sees what the client wrote before it stored it (acquire).
    ///
    /// Memory that can't be mapped into this process is copied; then it is as atomic as the other
    /// end makes it.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and `EINVAL` if its IOVA is not a multiple of its size.
    pub fn load<T: AtomicAccess>(&self, offset: usize) -> Result<T> {
        let bytes = self.enter_aligned::<T>(offset, DmaAccess::Read)?;
        let loaded = self.settled(|view| {
            let slice = view.contiguous(bytes.clone())?;
            slice.load(0, Ordering::Acquire).ok()
        })?;
        match loaded {
            Some(value) => Ok(value),
            None => {
                let mut value = T::zeroed();
                let iova = self.iova_at(offset);
                let memory = &self.shared.dma.memory;
                memory.read(&mut [(iova, value.as_mut_slice())])?;
                fence(Ordering::Acquire);
                Ok(value)
            }
        }
    }

    /// Stores a value, after all that was written before (release). As for [`load`](Self::load).
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and `EINVAL` if its IOVA is not a multiple of its size.
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T) -> Result<()> {
        let bytes = self.enter_aligned::<T>(offset, DmaAccess::Write)?;
        let view = self.view()?;
        let slice = view.contiguous(bytes);
        let stored = slice.and_then(|slice| slice.store(value, 0, Ordering::Release).ok());
        match stored {
            Some(()) => Ok(()),
            None => {
                fence(Ordering::Release);
                let iova = self.iova_at(offset);
                self.shared.dma.memory.write(&[(iova, value.as_slice())])
            }
        }
    }

    /// The memory itself, to be passed to what takes volatile slices. It is checked now, and good
    /// for a short use: ask again for the next one.
    ///
    /// If the client unmaps the memory meanwhile, a slice never reaches other memory than that, and
    /// writes to it are lost or land in what was there.
    ///
    /// # Errors
    ///
    /// As [`Dma::map`]. `EOPNOTSUPP`: the memory can't be mapped into this process. Copies can be
    /// made all the same.
    pub fn slices(&self) -> Result<DmaSlices> {
        self.shared.dma.bus_master.check()?;
        DmaSlices::new(self.view()?, self.bytes.clone(), self.shared.access)
    }

    /// Whether everything in the range can be reached without copies.
    #[cfg(test)]
    pub(super) fn is_direct(&self) -> bool {
        self.view().is_ok_and(|view| view.is_direct())
    }

    /// Where `offset` is; it is in the range.
    fn iova_at(&self, offset: usize) -> u64 {
        let start = self.shared.range.map_or(0, IovaRange::first);
        // It wraps for what has no bytes, at the end of all addresses.
        start.wrapping_add((self.bytes.start + offset) as u64)
    }

    /// Which bytes of the view a use is about.
    fn check(&self, offset: usize, count: usize) -> Result<Range<usize>> {
        let end = offset
            .checked_add(count)
            .filter(|end| *end <= self.bytes.len())
            .ok_or_else(|| outside(offset, count, self.len()))?;
        Ok(self.bytes.start + offset..self.bytes.start + end)
    }

    /// What every use checks first.
    #[inline]
    fn enter(&self, offset: usize, count: usize, access: DmaAccess) -> Result<Range<usize>> {
        self.shared.dma.bus_master.check()?;
        if !self.shared.access.allows(access) {
            let message = match access {
                DmaAccess::Read => "reading from a range of DMA that is for writing only",
                _ => "writing to a range of DMA that is for reading only",
            };
            return Err(Error::new(Errno::EPERM, message));
        }
        self.check(offset, count)
    }

    fn enter_aligned<T>(&self, offset: usize, access: DmaAccess) -> Result<Range<usize>> {
        let bytes = self.enter(offset, size_of::<T>(), access)?;
        let iova = self.iova_at(offset);
        if iova % (size_of::<T>().max(1) as u64) != 0 {
            let message = format!("an atomic access of {} bytes at {iova:#x}", bytes.len());
            return Err(Error::new(Errno::EINVAL, message));
        }
        Ok(bytes)
    }

    /// The memory as it is now.
    #[inline]
    fn view(&self) -> Result<Arc<View>> {
        let generation = self.shared.dma.memory.generation();
        let view = self.shared.view.read();
        let view = Arc::clone(&view.unwrap_or_else(PoisonError::into_inner));
        if view.is_current(generation) {
            return Ok(view);
        }
        self.shared.acquire()
    }

    /// Looks at the memory; once more, if some of it went away meanwhile. `None` if it can't be
    /// looked at here, or goes away too often.
    fn settled<R>(&self, mut look: impl FnMut(&View) -> Option<R>) -> Result<Option<R>> {
        for _ in 0..ATTEMPTS {
            let view = self.view()?;
            let Some(seen) = look(&view) else {
                return Ok(None);
            };
            fence(Ordering::Acquire);
            if view.is_current(self.shared.dma.memory.generation()) {
                return Ok(Some(seen));
            }
        }
        Ok(None)
    }
}

impl Shared {
    #[cold]
    fn acquire(&self) -> Result<Arc<View>> {
        let view = match self.range {
            Some(range) => View::new(self.dma.memory.acquire(range, self.access)?, range),
            None => View::empty(),
        };
        let view = Arc::new(view);
        let mut place = self.view.write().unwrap_or_else(PoisonError::into_inner);
        *place = Arc::clone(&view);
        Ok(view)
    }
}

#[cfg(test)]
#[path = "range_tests.rs"]
mod tests;
