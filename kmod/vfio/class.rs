// SPDX-License-Identifier: GPL-2.0
//! A class of devices in sysfs.
//!
//! C header: `include/linux/device/class.h`.

use super::bindings;
use core::ptr::NonNull;
use kernel::{error::from_err_ptr, prelude::*};

/// A registered class.
///
/// # Invariants
///
/// The pointer is what `class_create` returned.
pub(crate) struct Class(NonNull<bindings::class>);

// SAFETY: A class may be used from any thread.
unsafe impl Send for Class {}
// SAFETY: As above.
unsafe impl Sync for Class {}

impl Class {
    /// Registers a class.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The name lives for ever.
        let class = from_err_ptr(unsafe { bindings::class_create(name.as_char_ptr()) })?;
        // INVARIANT: Just made.
        Ok(Self(NonNull::new(class).ok_or(ENOMEM)?))
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::class {
        self.0.as_ptr()
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: By the invariant; devices of the class are gone by the order of the owner.
        unsafe { bindings::class_destroy(self.as_ptr()) };
    }
}
