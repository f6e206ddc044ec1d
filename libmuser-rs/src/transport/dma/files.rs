// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a client hands over as a file: one descriptor and, as a rule, one mapping for a file,
//! however many parts of it the client maps.
//!
//! A VMM has a file or two for all of its guest's memory, and maps pieces of it by the dozen, or by
//! the thousand with an IOMMU in the guest. A process may have 1,024 descriptors and 65,530
//! mappings as a rule, and a table has room for 65,535 pieces.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno as Number;

use super::table::Memory;
use super::DmaAccess;
use crate::peer_file::{FileId, PeerFile, PeerMapping};
use crate::sys::Mapping;

/// A file of more bytes is mapped in the parts that the client maps.
const WHOLE: u64 = 1 << 42;

/// The files that a client has handed over and that are in use.
#[derive(Debug, Default)]
pub(crate) struct FileCache {
    files: Mutex<Files>,
}

#[derive(Debug, Default)]
struct Files {
    by_id: BTreeMap<FileId, Weak<SharedFile>>,
    /// How many there are to be before those out of use are looked for.
    enough: usize,
}

impl Files {
    const FEW: usize = 32;

    /// What is out of use is found before it is more than what is in use.
    fn tidy(&mut self) {
        if self.by_id.len() >= self.enough.max(Self::FEW) {
            self.by_id.retain(|_, file| file.strong_count() > 0);
            self.enough = 2 * self.by_id.len();
        }
    }
}

impl FileCache {
    /// The file of a descriptor. If it is known already, the descriptor is closed.
    fn file(&self, descriptor: OwnedFd, writable: bool) -> Result<Arc<SharedFile>, Number> {
        let file = PeerFile::new(descriptor, writable)?;
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        // As long as it is open, no other file has its id.
        if let Some(known) = files.by_id.get(&file.id()).and_then(Weak::upgrade) {
            return Ok(known);
        }
        files.tidy();
        let shared = Arc::new(SharedFile {
            file,
            mapping: Mutex::new(Weak::new()),
        });
        let id = shared.file.id();
        files.by_id.insert(id, Arc::downgrade(&shared));
        Ok(shared)
    }
}

/// A client's file, which is open as long as a part of it is mapped.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: PeerFile,
    /// The mapping to be shared, if it is still in use.
    mapping: Mutex<Weak<FileMapping>>,
}

impl SharedFile {
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, to)
    }

    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write(offset, from)
    }

    /// A mapping which has all these bytes of the file, of which it has `size` now.
    fn map(self: &Arc<Self>, bytes: Range<u64>, size: u64) -> Result<Arc<FileMapping>, Number> {
        let mut shared = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has lost a part has lost it for good; the file may have it again.
        let present = shared.upgrade().filter(|present| !present.mapping.is_cut());
        if let Some(present) = present.filter(|present| present.has(&bytes)) {
            return Ok(present);
        }
        if size <= WHOLE
            && let Ok(whole) = self.map_new(0..size)
        {
            *shared = Arc::downgrade(&whole);
            return Ok(whole);
        }
        self.map_new(bytes)
    }

    fn map_new(self: &Arc<Self>, bytes: Range<u64>) -> Result<Arc<FileMapping>, Number> {
        let granule = self.file.granule();
        let start = bytes.start / granule * granule;
        let end = bytes.end.checked_next_multiple_of(granule);
        let len = end.ok_or(Number::EOVERFLOW)? - start;
        Ok(Arc::new(FileMapping {
            mapping: self.file.map(start, len)?,
            start,
            told: AtomicBool::new(false),
            _file: Arc::clone(self),
        }))
    }
}

/// A part of a client's file, mapped. What is cut off the file reads as zeroes.
#[derive(Debug)]
pub(crate) struct FileMapping {
    mapping: PeerMapping,
    /// Where it starts in the file.
    start: u64,
    /// Whether it was said that a part is gone.
    told: AtomicBool,
    _file: Arc<SharedFile>,
}

impl FileMapping {
    pub(crate) fn mapping(&self) -> &Mapping {
        self.tell();
        &self.mapping
    }

    fn has(&self, bytes: &Range<u64>) -> bool {
        let end = self.start + self.mapping.len() as u64;
        self.start <= bytes.start && bytes.end <= end
    }

    fn tell(&self) {
        if self.mapping.is_cut() && !self.told.swap(true, Ordering::Relaxed) {
            log::warn!(
                "the client has cut a file short that it had mapped for DMA: \
                 the device reads zeroes there, and what it writes is lost"
            );
        }
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        self.tell();
    }
}

impl Memory {
    /// `len` bytes of a client's file from `offset` on: mapped where it can be, read and written
    /// where it can't.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the file does not have these bytes; or it was opened to be appended to, and can't
    /// be mapped. `ENODEV`, `EACCES`, `EPERM`, `EBADF`, `EMFILE`: [it can't be
    /// memory](PeerFile::new). `ENOSPC`, `ENOMEM`: there is no room for it here.
    pub(crate) fn from_fd(
        cache: &FileCache,
        descriptor: OwnedFd,
        offset: u64,
        len: u64,
        access: DmaAccess,
    ) -> Result<Self, Number> {
        let file = cache.file(descriptor, access.writes())?;
        let size = file.file.size()?;
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let end = end.filter(|_| len != 0).ok_or(Number::EINVAL)?;
        match file.map(offset..end, size) {
            Ok(mapping) => {
                let start = usize::try_from(offset - mapping.start);
                let start = start.map_err(|_| Number::EOVERFLOW)?;
                Ok(Self::Mapped(mapping, start))
            }
            Err(Number::ENODEV) if access.writes() && file.file.appends() => Err(Number::EINVAL),
            Err(Number::ENODEV) => Ok(Self::File(file, offset)),
            Err(error) => Err(error),
        }
    }

    /// A file that can be mapped, as if it could not.
    #[cfg(test)]
    pub(crate) fn unmapped(
        cache: &FileCache,
        descriptor: OwnedFd,
        offset: u64,
        access: DmaAccess,
    ) -> Result<Self, Number> {
        Ok(Self::File(cache.file(descriptor, access.writes())?, offset))
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
