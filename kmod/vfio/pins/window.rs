// SPDX-License-Identifier: GPL-2.0
//! The window: a mapping that shows the pinned pages at their IOVA.
//!
//! A fault only looks the page up. Where none is pinned the process reads the page of zeroes, and
//! writes to a page that nobody reads; when a page is pinned there, what was shown is taken away.
//!
//! C header: `include/linux/mm.h`, `struct vm_operations_struct`.

use super::{Pin, Pins, Rights, PAGE_SIZE};
use crate::vfio::{bindings, vm::NewVma};
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
    types::ForeignOwnable, //
};

impl Pins {
    /// Sets up a mapping as a window. The file that is mapped has adopted the inode.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is private, or not all of it lies where IOVAs are.
    pub(crate) fn map(self: &Arc<Self>, vma: &NewVma<'_>) -> Result {
        let end = vma.offset().checked_add(vma.pages()).ok_or(EINVAL)?;
        if vma.is_private() || vma.offset() < self.window || end > 2 * self.window {
            return Err(EINVAL);
        }
        let vma = vma.as_ptr();
        // SAFETY: The mapping is being set up, so nobody else looks at its fields; likewise below.
        unsafe { bindings::muser_make_window(vma) };
        // SAFETY: As above.
        unsafe { (*vma).vm_private_data = self.clone().into_foreign() };
        // SAFETY: As above.
        unsafe { (*vma).vm_ops = OPERATIONS };
        Ok(())
    }

    /// Takes pages out of all windows. The caller holds `shown` for writing, unless what is shown
    /// there now may come back.
    pub(super) fn zap(&self, first: usize, last: usize) {
        // What lies beyond the window's end was never shown.
        let last = last.min(self.window - 1);
        if first <= last {
            let len = (last - first + 1) * PAGE_SIZE;
            let offset = (self.window + first) * PAGE_SIZE;
            self.inode.zap(offset as u64, len as u64);
        }
    }

    fn fault(
        &self,
        index: usize,
        write: bool,
        vmf: *mut bindings::vm_fault,
    ) -> bindings::vm_fault_t {
        let _shown = self.shown.read();
        let pin = self.tree.load(index).map(Pin::from_number);
        let rights = if write { Rights::Write } else { Rights::Read };
        let frame = match pin {
            Some(pin) if pin.writable || rights == Rights::Read => {
                if write {
                    self.log.record(&self.tree, index);
                }
                pin.frame
            }
            _ if write => {
                self.discard.clear();
                self.discard.frame()
            }
            // SAFETY: A plain look.
            _ => unsafe { bindings::muser_zero_frame() },
        };
        // SAFETY: The fault is of a window, and the frame is there as long as `shown` is held: who
        // takes it away zaps the window before.
        unsafe { bindings::muser_show_frame(vmf, frame, write) }
    }
}

const OPERATIONS: &bindings::vm_operations_struct = &bindings::vm_operations_struct {
    open: Some(open),
    close: Some(close),
    fault: Some(fault),
    pfn_mkwrite: Some(pfn_mkwrite),
    ..pin_init::zeroed()
};

/// # Safety
///
/// `vmf` must be a fault of a window.
unsafe fn pins<'a>(vmf: *mut bindings::vm_fault) -> (ArcBorrow<'a, Pins>, usize) {
    // SAFETY: By the caller.
    let vma = unsafe { bindings::muser_fault_vma(vmf) };
    // SAFETY: `map` or `open` put an `Arc` there, which the mapping holds until `close`.
    let pins = unsafe { <Arc<Pins>>::borrow((*vma).vm_private_data) };
    // SAFETY: By the caller. `map` saw to it that the mapping begins behind the window's start.
    let index = unsafe { bindings::muser_fault_pgoff(vmf) } - pins.window;
    (pins, index)
}

/// # Safety
///
/// Only for the C core, as `open` of `struct vm_operations_struct`.
unsafe extern "C" fn open(vma: *mut bindings::vm_area_struct) {
    // SAFETY: The mapping was split off another one, which still holds its `Arc`.
    let pins = unsafe { <Arc<Pins>>::borrow((*vma).vm_private_data) };
    core::mem::forget(Arc::from(pins));
}

/// # Safety
///
/// Only for the C core, as `close` of `struct vm_operations_struct`.
unsafe extern "C" fn close(vma: *mut bindings::vm_area_struct) {
    // SAFETY: `map` or `open` made this mapping an owner.
    drop(unsafe { <Arc<Pins>>::from_foreign((*vma).vm_private_data) });
}

/// # Safety
///
/// Only for the C core, as `fault` of `struct vm_operations_struct`.
unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The core passes a valid fault; likewise below.
    if unsafe { bindings::muser_fault_is_remote(vmf) } {
        // Somebody pins this very window as the memory of a client: `shown` may be held for that.
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    // SAFETY: As above.
    let write = unsafe { bindings::muser_fault_is_write(vmf) };
    // SAFETY: Only windows have these operations.
    let (pins, index) = unsafe { pins(vmf) };
    pins.fault(index, write, vmf)
}

/// # Safety
///
/// Only for the C core, as `pfn_mkwrite` of `struct vm_operations_struct`.
unsafe extern "C" fn pfn_mkwrite(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: Only windows have these operations.
    let (pins, index) = unsafe { pins(vmf) };
    // What is shown for reading goes. The next touch is a fault for writing, which finds what there
    // is to write to; to make this very entry writable would be to trust what was found before.
    pins.zap(index, index);
    bindings::vm_fault_reason_VM_FAULT_NOPAGE
}
