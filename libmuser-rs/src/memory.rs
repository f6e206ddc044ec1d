// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that client and device share: the mappable areas of a BAR.
//!
//! The client can change it at any time, between any two bytes. So there is never a `&[u8]` to it:
//! accesses are volatile copies, or atomic, with the types of [`vm_memory`].

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::sys::memfd::{memfd_create, MFdFlags};
use vm_memory::{AtomicAccess, ByteValued, Bytes, VolatileSlice};

use crate::error::{Errno, Error, Result};
use crate::peer_file::{PeerMapping, Shares};
use crate::sys::Mapping;

/// A mappable area of a BAR. A handle: clone it, and use it from any thread.
///
/// What [`slice`](Self::slice) gives has all of [`vm_memory::Bytes`] for more than the methods here.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    mapping: Arc<Mapping>,
    /// Where it is in the mapping, which has whole pages.
    start: usize,
    len: usize,
    /// Of memory that a peer has handed over: what of the process' budget it has.
    _shares: Option<Arc<Shares>>,
}

impl SharedMemory {
    pub(crate) fn new(mapping: Mapping) -> Self {
        let len = mapping.len();
        Self::part(mapping, 0, len)
    }

    /// `len` bytes from `start` of a mapping on, which has as many.
    pub(crate) fn part(mapping: Mapping, start: usize, len: usize) -> Self {
        Self {
            mapping: Arc::new(mapping),
            start,
            len,
            _shares: None,
        }
    }

    /// Memory that the other side of a socket has handed over.
    pub(crate) fn of_peer(mapping: PeerMapping) -> Self {
        let (mapping, shares) = mapping.into_parts();
        Self {
            _shares: Some(Arc::new(shares)),
            ..Self::new(mapping)
        }
    }

    /// Memory of this process, zeroed.
    pub(crate) fn anonymous(len: usize) -> Result<Self> {
        let failed = |errno: Number| Error::io("allocating shared memory", errno);
        let file = File::from(memfd_create("muser", MFdFlags::MFD_CLOEXEC).map_err(failed)?);
        file.set_len(len as u64)
            .map_err(|error| Error::io("allocating shared memory", error))?;
        let mapping = Mapping::new(file.as_fd(), 0, len, true).map_err(failed)?;
        Ok(Self::new(mapping))
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an area is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The memory as a whole.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        let whole = self.mapping.slice();
        // It lies in the mapping; a slice of nothing would show if it did not.
        whole
            .subslice(self.start, self.len)
            .unwrap_or_else(|_| whole.subslice(0, 0).unwrap_or(whole))
    }

    /// Reads a value.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the memory.
    pub fn read<T: ByteValued>(&self, offset: usize) -> Result<T> {
        self.slice()
            .read_obj(offset)
            .map_err(|error| self.outside(offset, &error))
    }

    /// Writes a value.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the memory.
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) -> Result<()> {
        self.slice()
            .write_obj(value, offset)
            .map_err(|error| self.outside(offset, &error))
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// `EINVAL`: they end beyond the memory.
    pub fn read_bytes(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.slice()
            .read_slice(data, offset)
            .map_err(|error| self.outside(offset, &error))
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// `EINVAL`: they end beyond the memory.
    pub fn write_bytes(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.slice()
            .write_slice(data, offset)
            .map_err(|error| self.outside(offset, &error))
    }

    /// Loads a value atomically, and sees whatever was written before a store with
    /// [`store`](Self::store).
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is not aligned, or ends beyond the memory.
    pub fn load<T: AtomicAccess>(&self, offset: usize) -> Result<T> {
        use std::sync::atomic::Ordering::Acquire;
        self.slice()
            .load(offset, Acquire)
            .map_err(|error| self.outside(offset, &error))
    }

    /// Stores a value atomically, after everything written before.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is not aligned, or ends beyond the memory.
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T) -> Result<()> {
        use std::sync::atomic::Ordering::Release;
        self.slice()
            .store(value, offset, Release)
            .map_err(|error| self.outside(offset, &error))
    }

    /// Fills the memory with zeroes, as a device may want to at a reset. When the last client closes
    /// the device, that is done without it: no client sees what one before it has left.
    pub fn clear(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let slice = self.slice();
        for offset in (0..slice.len()).step_by(ZEROES.len()) {
            if let Ok(rest) = slice.offset(offset) {
                rest.copy_from(&ZEROES);
            }
        }
    }

    /// Shows what is at `offset` of another file instead, to everybody who has this handle. Of a
    /// handle that is a whole mapping.
    pub(crate) fn replace(&self, file: BorrowedFd<'_>, offset: u64) -> Result<()> {
        self.mapping
            .replace(file, offset)
            .map_err(|errno| Error::io("mapping shared memory", errno))
    }

    fn outside(&self, offset: usize, error: &vm_memory::VolatileMemoryError) -> Error {
        let message = format!(
            "offset {offset:#x} of {:#x} bytes shared: {error}",
            self.len()
        );
        Error::new(Errno::EINVAL, message)
    }
}
