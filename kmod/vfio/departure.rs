// SPDX-License-Identifier: GPL-2.0
//! Something to do when the present system call is over.
//!
//! The last reference to a file that a task gives back is released when the task leaves the kernel,
//! not before. That is what is used here: a file for one value, which is dropped with it.
//!
//! C headers: `include/linux/anon_inodes.h`, `include/linux/file.h`.

use super::{bindings, chrdev};
use core::marker::PhantomData;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    types::ForeignOwnable, //
};

/// Drops `value` when the current task leaves the kernel; soon, if it never will.
///
/// # Errors
///
/// There is no memory for that; the value is dropped now.
pub(crate) fn drop_at_departure<T: Send + 'static>(value: T) -> Result {
    let value = KBox::new(value, GFP_KERNEL_ACCOUNT)?;
    let raw = value.into_foreign();
    // SAFETY: The operations live as long as the module, to which the file holds a reference.
    let file = unsafe {
        bindings::anon_inode_getfile(
            c"[muser]".as_char_ptr(),
            VTable::<T>::FILE_OPERATIONS,
            raw,
            0,
        )
    };
    match from_err_ptr(file) {
        Ok(file) => {
            // SAFETY: The only reference is ours to give back.
            unsafe { bindings::fput(file) };
            Ok(())
        }
        Err(error) => {
            // SAFETY: There is no file that took it over.
            drop(unsafe { <KBox<T>>::from_foreign(raw) });
            Err(error)
        }
    }
}

struct VTable<T>(PhantomData<T>);

impl<T: Send + 'static> VTable<T> {
    const FILE_OPERATIONS: &'static bindings::file_operations = &bindings::file_operations {
        owner: chrdev::this_module(),
        release: Some(Self::release),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Only for the C core, as `release` of `struct file_operations`.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: `drop_at_departure` put the box there, and this is the file's last use.
        drop(unsafe { <KBox<T>>::from_foreign((*file).private_data) });
        0
    }
}
