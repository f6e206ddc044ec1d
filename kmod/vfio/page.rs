// SPDX-License-Identifier: GPL-2.0
//! Pages of device memory: owned by the kernel, mapped by two processes.
//!
//! C headers: `include/linux/mm.h`, `include/linux/memcontrol.h`.

use super::bindings;
use core::ptr::NonNull;
use kernel::{
    ffi::c_void,
    prelude::*,
    types::ForeignOwnable,
    uaccess::UserPtr, //
};

/// Bytes of a page.
pub(crate) const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// Who pays for pages: the memory cgroup of the process that created the device.
///
/// # Invariants
///
/// The pointer is null (no memory cgroups) or a counted reference.
pub(crate) struct Charge(*mut bindings::mem_cgroup);

// SAFETY: A `mem_cgroup` is refcounted and may be used from any thread.
unsafe impl Send for Charge {}
// SAFETY: It is only handed to functions that may be called concurrently.
unsafe impl Sync for Charge {}

impl Charge {
    /// The memory cgroup of the current process.
    pub(crate) fn current() -> Self {
        // INVARIANT: The function takes a reference.
        // SAFETY: Called in process context.
        Self(unsafe { bindings::muser_memcg_of_current() })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        // SAFETY: The reference is ours to give back, and null is allowed.
        unsafe { bindings::muser_memcg_put(self.0) };
    }
}

/// A reference to a page which processes may have mapped, so that its bytes can change at any time.
///
/// # Invariants
///
/// The pointer is a counted reference to a page with a kernel mapping (x86-64 has no highmem).
pub(crate) struct SharedPage(NonNull<bindings::page>);

// SAFETY: Pages are refcounted and may be used from any thread.
unsafe impl Send for SharedPage {}
// SAFETY: The content is only accessed as memory that others change.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// Allocates a page of zeroes.
    pub(crate) fn new(charge: &Charge) -> Result<Self> {
        // SAFETY: The charge is null or a valid cgroup.
        let page = unsafe { bindings::muser_alloc_page(charge.0) };
        // INVARIANT: The allocation is the reference.
        Ok(Self(NonNull::new(page).ok_or(ENOMEM)?))
    }

    fn address(&self, offset: usize) -> *mut u8 {
        // SAFETY: The page is alive.
        let base: *mut u8 = unsafe { bindings::muser_page_address(self.0.as_ptr()) }.cast();
        base.wrapping_add(offset)
    }

    fn check(offset: usize, len: usize) -> Result {
        match offset.checked_add(len) {
            Some(end) if end <= PAGE_SIZE => Ok(()),
            _ => Err(EINVAL),
        }
    }

    /// Copies to a process. An aligned access of 1, 2, 4 or 8 bytes is one load.
    pub(crate) fn copy_to_user(&self, offset: usize, to: UserPtr, len: usize) -> Result {
        Self::check(offset, len)?;
        let mut single = [0u8; 8];
        let from: *const u8 = match self.load(offset, len) {
            Some(value) => {
                single = value.to_ne_bytes();
                single.as_ptr()
            }
            None => self.address(offset),
        };
        // SAFETY: `from` is valid for `len` bytes: at most 8 of `single`, or the part of the page
        // checked above; user addresses are checked by the function.
        let missed = unsafe { bindings::copy_to_user(to.as_mut_ptr(), from.cast(), len) };
        // Keeps `single` alive up to here.
        let _ = single;
        if missed == 0 {
            Ok(())
        } else {
            Err(EFAULT)
        }
    }

    /// Copies from a process. An aligned access of 1, 2, 4 or 8 bytes is one store.
    pub(crate) fn copy_from_user(&self, offset: usize, from: UserPtr, len: usize) -> Result {
        Self::check(offset, len)?;
        if is_single(offset, len) {
            let mut value = [0u8; 8];
            // SAFETY: `value` has room for `len`, at most 8.
            let missed = unsafe {
                bindings::copy_from_user(value.as_mut_ptr().cast(), from.as_const_ptr(), len)
            };
            if missed != 0 {
                return Err(EFAULT);
            }
            self.store(offset, len, u64::from_ne_bytes(value));
            return Ok(());
        }
        // SAFETY: The part of the page was checked above. What is missed stays as it was.
        let missed = unsafe {
            bindings::muser_copy_in(self.address(offset).cast(), from.as_const_ptr(), len)
        };
        if missed == 0 {
            Ok(())
        } else {
            Err(EFAULT)
        }
    }

    /// Whether two references are to one page.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    /// Waits until nobody is about to show it in a mapping, and keeps others from doing so.
    pub(crate) fn lock(&self) -> Locked<'_> {
        // SAFETY: The page is alive.
        unsafe { bindings::muser_lock_page(self.0.as_ptr()) };
        Locked(self)
    }

    /// The number of its page frame.
    pub(super) fn frame(&self) -> u64 {
        // SAFETY: The page is alive.
        unsafe { bindings::muser_page_frame(self.0.as_ptr()) }
    }

    /// Makes zeroes of it.
    pub(super) fn clear(&self) {
        // SAFETY: The page is alive, and a page long. Who has it mapped may look on.
        unsafe { bindings::muser_clear(self.address(0).cast(), PAGE_SIZE) };
    }

    fn load(&self, offset: usize, len: usize) -> Option<u64> {
        if !is_single(offset, len) {
            return None;
        }
        let at = self.address(offset);
        Some(match len {
            // SAFETY: In the page and aligned, as `is_single` says; likewise below.
            1 => u64::from(unsafe { at.read_volatile() }),
            // SAFETY: As above.
            2 => u64::from(unsafe { at.cast::<u16>().read_volatile() }),
            // SAFETY: As above.
            4 => u64::from(unsafe { at.cast::<u32>().read_volatile() }),
            // SAFETY: As above.
            _ => unsafe { at.cast::<u64>().read_volatile() },
        })
    }

    fn store(&self, offset: usize, len: usize, value: u64) {
        let at = self.address(offset);
        match len {
            // SAFETY: In the page and aligned, as the caller checked; likewise below.
            1 => unsafe { at.write_volatile(value as u8) },
            // SAFETY: As above.
            2 => unsafe { at.cast::<u16>().write_volatile(value as u16) },
            // SAFETY: As above.
            4 => unsafe { at.cast::<u32>().write_volatile(value as u32) },
            // SAFETY: As above.
            _ => unsafe { at.cast::<u64>().write_volatile(value) },
        }
    }

    /// Hands the reference to C, which gives it back with `put_page`.
    pub(super) fn into_raw(self) -> *mut bindings::page {
        core::mem::ManuallyDrop::new(self).0.as_ptr()
    }
}

/// A page that nobody else begins to show.
pub(crate) struct Locked<'a>(&'a SharedPage);

impl Locked<'_> {
    /// Leaves the lock to somebody else.
    pub(super) fn leave_locked(self) {
        core::mem::forget(self);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: `SharedPage::lock` locked it.
        unsafe { bindings::muser_unlock_page(self.0 .0.as_ptr()) };
    }
}

/// Whether an access is one that memory does at once.
fn is_single(offset: usize, len: usize) -> bool {
    matches!(len, 1 | 2 | 4 | 8) && offset % len == 0
}

impl Clone for SharedPage {
    fn clone(&self) -> Self {
        // SAFETY: The page is alive.
        unsafe { bindings::muser_get_page(self.0.as_ptr()) };
        // INVARIANT: The reference was just taken.
        Self(self.0)
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: The reference is ours to give back.
        unsafe { bindings::muser_put_page(self.0.as_ptr()) };
    }
}

/// Lets an XArray own pages.
// SAFETY: `into_foreign` gives out a non-null pointer, aligned as `struct page` is, and
// `from_foreign` takes the same one back.
unsafe impl ForeignOwnable for SharedPage {
    const FOREIGN_ALIGN: usize = core::mem::align_of::<bindings::page>();
    type Borrowed<'a> = core::mem::ManuallyDrop<SharedPage>;
    type BorrowedMut<'a> = core::mem::ManuallyDrop<SharedPage>;

    fn into_foreign(self) -> *mut c_void {
        self.into_raw().cast()
    }

    unsafe fn from_foreign(page: *mut c_void) -> Self {
        // INVARIANT: The reference comes from `into_foreign`.
        // SAFETY: `into_foreign` never gives out null.
        Self(unsafe { NonNull::new_unchecked(page.cast()) })
    }

    unsafe fn borrow<'a>(page: *mut c_void) -> Self::Borrowed<'a> {
        // SAFETY: By the caller; `ManuallyDrop` keeps the reference with the owner.
        core::mem::ManuallyDrop::new(unsafe { Self::from_foreign(page) })
    }

    unsafe fn borrow_mut<'a>(page: *mut c_void) -> Self::BorrowedMut<'a> {
        // SAFETY: By the caller.
        unsafe { Self::borrow(page) }
    }
}
