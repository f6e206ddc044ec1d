// SPDX-License-Identifier: GPL-2.0
//! Memory which the kernel and a process both use: slots and the status page.
//!
//! C header: `include/linux/vmalloc.h`.

use super::{bindings, page::PAGE_SIZE, vm::NewVma};
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// Zeroed memory of whole pages. The process may write to it at any time: what is read from here
/// must be copied first and checked then.
///
/// # Invariants
///
/// `start` is an allocation of `len` bytes, a multiple of the page size.
pub(crate) struct SharedMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: The memory is owned, and only accessed as memory that others change.
unsafe impl Send for SharedMemory {}
// SAFETY: As above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Allocates at least `len` bytes, charged to the current process.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let len = len.checked_next_multiple_of(PAGE_SIZE).ok_or(EOVERFLOW)?;
        // SAFETY: Any size may be asked for.
        let start = unsafe { bindings::muser_alloc_shared(len) };
        // INVARIANT: Just allocated.
        Ok(Self {
            start: NonNull::new(start.cast()).ok_or(ENOMEM)?,
            len,
        })
    }

    /// Maps it from its start. A private mapping, and one beyond the end, are refused.
    pub(crate) fn map(&self, vma: &NewVma<'_>) -> Result {
        let len = vma.pages() * PAGE_SIZE;
        if vma.is_private() || len > self.len {
            return Err(EINVAL);
        }
        vma.keep_as_is();
        // SAFETY: The allocation is at least `len` bytes long, and the mapping is being set up.
        to_result(unsafe {
            bindings::muser_map_shared(vma.as_ptr(), self.start.as_ptr().cast(), len)
        })
    }

    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.start.as_ptr().wrapping_add(offset)),
            _ => Err(EINVAL),
        }
    }

    /// Copies out.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        let from = self.at(offset, to.len())?;
        // SAFETY: Both are valid for the length. The process may change the source while it is
        // copied: the copy has some bytes then, and any will do.
        unsafe { bindings::muser_copy(to.as_mut_ptr().cast(), from.cast(), to.len()) };
        Ok(())
    }

    /// Copies in.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result {
        let to = self.at(offset, from.len())?;
        // SAFETY: Both are valid for the length. The process may look at the target meanwhile.
        unsafe { bindings::muser_copy(to.cast(), from.as_ptr().cast(), from.len()) };
        Ok(())
    }

    /// Stores one word, at once.
    pub(crate) fn store(&self, offset: usize, value: u32) -> Result {
        if offset % size_of::<u32>() != 0 {
            return Err(EINVAL);
        }
        let to = self.at(offset, size_of::<u32>())?.cast::<u32>();
        // SAFETY: Valid and aligned.
        unsafe { to.write_volatile(value) };
        Ok(())
    }

    /// Stores one long word, at once.
    pub(crate) fn store_long(&self, offset: usize, value: u64) -> Result {
        if offset % size_of::<u64>() != 0 {
            return Err(EINVAL);
        }
        let to = self.at(offset, size_of::<u64>())?.cast::<u64>();
        // SAFETY: Valid and aligned.
        unsafe { to.write_volatile(value) };
        Ok(())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: By the invariant. Mappings hold references to the pages of their own.
        unsafe { bindings::muser_free_shared(self.start.as_ptr().cast()) };
    }
}
