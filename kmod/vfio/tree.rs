// SPDX-License-Identifier: GPL-2.0
//! A prefix tree of numbers by number.
//!
//! The kernel crate's `XArray` holds pointers to what it owns; this one holds what fits into a
//! pointer, and can be searched.
//!
//! C header: `include/linux/xarray.h`.

use super::bindings;
use kernel::{
    error::to_result,
    ffi::c_void,
    prelude::*,
    types::Opaque, //
};

/// A mark, of those that each entry can have.
const MARK: bindings::xa_mark_t = 0; // XA_MARK_0
/// Has the memory cgroup of who stores pay for the tree: `XA_FLAGS_ACCOUNT`.
const ACCOUNT: bindings::gfp_t = 32;
/// Finds any entry: `XA_PRESENT`.
const PRESENT: bindings::xa_mark_t = 8;

/// A prefix tree of numbers below 2^63. It has a lock of its own for each operation.
#[pin_data(PinnedDrop)]
pub(crate) struct Tree {
    #[pin]
    tree: Opaque<bindings::xarray>,
}

// SAFETY: An `xarray` of numbers may be used from any thread.
unsafe impl Send for Tree {}
// SAFETY: An `xarray` has a lock of its own.
unsafe impl Sync for Tree {}

impl Tree {
    /// Makes an empty tree.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes.
            tree <- Opaque::ffi_init(|slot| unsafe {
                bindings::xa_init_flags(slot, ACCOUNT)
            }),
        })
    }

    /// The number at an index.
    pub(crate) fn load(&self, index: usize) -> Option<u64> {
        // SAFETY: The tree is initialised; likewise below.
        number(unsafe { bindings::xa_load(self.tree.get(), index) })
    }

    /// Puts a number at an index, instead of the one that is there, if any. A mark stays.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, where none is there.
    pub(crate) fn store(&self, index: usize, value: u64) -> Result {
        let entry = ((value as usize) << 1 | 1) as *mut c_void;
        // SAFETY: An odd entry is a number, as `xa_mk_value` makes it.
        let old = unsafe {
            bindings::xa_store(self.tree.get(), index, entry, bindings::GFP_KERNEL_ACCOUNT)
        };
        // SAFETY: A plain look at the pointer.
        to_result(unsafe { bindings::xa_err(old) })
    }

    /// Takes the number at an index away, and its mark.
    pub(crate) fn erase(&self, index: usize) {
        // SAFETY: As in `load`.
        unsafe { bindings::xa_erase(self.tree.get(), index) };
    }

    /// Marks the entry at an index, if there is one.
    pub(crate) fn mark(&self, index: usize) {
        // SAFETY: As in `load`.
        unsafe { bindings::xa_set_mark(self.tree.get(), index, MARK) };
    }

    /// Takes the mark of the entry at an index away.
    pub(crate) fn unmark(&self, index: usize) {
        // SAFETY: As in `load`.
        unsafe { bindings::xa_clear_mark(self.tree.get(), index, MARK) };
    }

    /// Whether there is a marked entry at an index.
    pub(crate) fn is_marked(&self, index: usize) -> bool {
        // SAFETY: As in `load`.
        unsafe { bindings::xa_get_mark(self.tree.get(), index, MARK) }
    }

    /// The first entry from `first` up to `last`.
    pub(crate) fn first(&self, first: usize, last: usize) -> Option<(usize, u64)> {
        self.find(first, last, PRESENT)
    }

    /// The first marked entry from `first` up to `last`.
    pub(crate) fn first_marked(&self, first: usize, last: usize) -> Option<(usize, u64)> {
        self.find(first, last, MARK)
    }

    fn find(&self, first: usize, last: usize, what: bindings::xa_mark_t) -> Option<(usize, u64)> {
        let mut index = first;
        // SAFETY: As in `load`, and `index` is valid for writes.
        let entry = unsafe { bindings::xa_find(self.tree.get(), &raw mut index, last, what) };
        Some((index, number(entry)?))
    }
}

#[pinned_drop]
impl PinnedDrop for Tree {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Nobody else uses the tree any more.
        unsafe { bindings::xa_destroy(self.tree.get()) };
    }
}

/// The number that an entry is: `xa_to_value`.
fn number(entry: *mut c_void) -> Option<u64> {
    (entry as usize & 1 != 0).then_some((entry as u64) >> 1)
}
