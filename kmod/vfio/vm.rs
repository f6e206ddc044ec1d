// SPDX-License-Identifier: GPL-2.0
//! Mappings of a file into a process, filled page by page as they are touched.
//!
//! C header: `include/linux/mm.h`, `struct vm_operations_struct`.

use super::{
    bindings,
    page::{SharedPage, PAGE_SIZE},
};
use core::marker::PhantomData;
use kernel::{
    mm::virt::VmaNew,
    prelude::*,
    sync::Arc,
    types::ForeignOwnable, //
};

/// A mapping which `mmap` is about to make.
pub(crate) struct NewVma<'a>(&'a VmaNew);

/// What answers page faults of a mapping.
pub(crate) trait Pager {
    /// What the mapping keeps alive.
    type Data: Send + Sync + 'static;

    /// Gives the page for an offset in the file, in pages; an error is a SIGBUS.
    fn page(data: &Self::Data, offset: usize) -> Result<SharedPage>;

    /// Whether `page` is still the page for an offset. Whoever changes that locks the page it takes
    /// away before it takes the mappings away: so a page is not shown any more when it has gone.
    fn is_current(data: &Self::Data, offset: usize, page: &SharedPage) -> bool;
}

impl NewVma<'_> {
    /// # Safety
    ///
    /// `vma` must be what an `mmap` file operation was called with, and not be used after it.
    pub(super) unsafe fn from_raw<'a>(vma: *mut bindings::vm_area_struct) -> NewVma<'a> {
        // SAFETY: By the safety requirements.
        NewVma(unsafe { VmaNew::from_raw(vma) })
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::vm_area_struct {
        self.0.as_ptr()
    }

    /// Offset in the file, in pages.
    pub(crate) fn offset(&self) -> usize {
        // SAFETY: The mapping is valid while it is being set up.
        unsafe { bindings::muser_vma_pgoff(self.as_ptr()) }
    }

    /// Length, in pages.
    pub(crate) fn pages(&self) -> usize {
        (self.0.end() - self.0.start()) / PAGE_SIZE
    }

    /// Whether stores are private to the process.
    pub(crate) fn is_private(&self) -> bool {
        self.0.flags() & kernel::mm::virt::flags::SHARED == 0
    }

    /// Refuses a writable mapping, and one that could become writable.
    pub(crate) fn forbid_writing(&self) -> Result {
        self.0.try_clear_maywrite()
    }

    /// Whether the process may write.
    pub(crate) fn is_writable(&self) -> bool {
        self.0.writable()
    }

    /// Whether the process may read.
    pub(crate) fn is_readable(&self) -> bool {
        self.0.readable()
    }

    /// Keeps the mapping from growing, and out of core dumps.
    pub(crate) fn keep_as_is(&self) {
        self.0.set_dontexpand();
        self.0.set_dontdump();
    }

    /// Has `P` fill the mapping, which keeps `data` alive.
    pub(crate) fn fill<P: Pager>(&self, data: Arc<P::Data>) {
        self.keep_as_is();
        let vma = self.as_ptr();
        // SAFETY: The mapping is being set up, so nobody else looks at these fields.
        unsafe { (*vma).vm_private_data = data.into_foreign() };
        // SAFETY: As above.
        unsafe { (*vma).vm_ops = VTable::<P>::OPS };
    }
}

struct VTable<P>(PhantomData<P>);

impl<P: Pager> VTable<P> {
    const OPS: &'static bindings::vm_operations_struct = &bindings::vm_operations_struct {
        open: Some(Self::open),
        close: Some(Self::close),
        fault: Some(Self::fault),
        ..pin_init::zeroed()
    };

    /// A mapping was copied, by fork or by a split: the copy keeps the data alive too.
    ///
    /// # Safety
    ///
    /// Only for the C core, as `open` of `struct vm_operations_struct`.
    unsafe extern "C" fn open(vma: *mut bindings::vm_area_struct) {
        // SAFETY: `fill` put an `Arc` there, which this mapping's original still holds.
        let data = unsafe { <Arc<P::Data>>::borrow((*vma).vm_private_data) };
        core::mem::forget(Arc::from(data));
    }

    /// # Safety
    ///
    /// Only for the C core, as `close` of `struct vm_operations_struct`.
    unsafe extern "C" fn close(vma: *mut bindings::vm_area_struct) {
        // SAFETY: `fill` or `open` made this mapping an owner.
        drop(unsafe { <Arc<P::Data>>::from_foreign((*vma).vm_private_data) });
    }

    /// # Safety
    ///
    /// Only for the C core, as `fault` of `struct vm_operations_struct`.
    unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The fault is of a mapping with these operations.
        let vma = unsafe { bindings::muser_fault_vma(vmf) };
        // SAFETY: The mapping owns its data at least until `close`.
        let data = unsafe { <Arc<P::Data>>::borrow((*vma).vm_private_data) };
        // SAFETY: The fault is valid for the call.
        let offset = unsafe { bindings::muser_fault_pgoff(vmf) };
        loop {
            // Also without memory: out-of-memory handling would look for it in the cgroup of who
            // touches the page, and it is another's that is full.
            let Ok(page) = P::page(&data, offset) else {
                return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
            };
            let locked = page.lock();
            if P::is_current(&data, offset, &page) {
                locked.leave_locked();
                // SAFETY: The memory management takes over the reference and the lock.
                unsafe { (*vmf).page = page.into_raw() };
                return bindings::vm_fault_reason_VM_FAULT_LOCKED;
            }
        }
    }
}
