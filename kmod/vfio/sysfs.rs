// SPDX-License-Identifier: GPL-2.0
//! Numbers in sysfs, beside a device.
//!
//! C header: `include/linux/device.h`, `struct device_attribute`.

use super::{bindings, mdev};
use core::marker::PhantomData;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// A number of a device, read and written as text.
pub(crate) trait Attribute<D>: 'static {
    /// Name of the file.
    const NAME: &'static CStr;

    /// The number.
    fn show(device: &D) -> u64;

    /// Takes a new one.
    fn store(device: &D, value: u64) -> Result;
}

/// An attribute of the devices of mdev driver `D`.
///
/// # Invariants
///
/// The pointer is to an attribute that lives for ever, and works on devices bound to `D`.
pub(crate) struct Entry<D>(*const bindings::attribute, PhantomData<D>);

impl<D> Entry<D> {
    /// What an attribute group lists.
    pub(super) const fn as_ptr(&self) -> *const bindings::attribute {
        self.0
    }
}

/// The C struct for attribute `A` of the devices of mdev driver `D`.
pub(crate) struct File<D, A>(PhantomData<(D, A)>);

impl<D: mdev::Driver, A: Attribute<D>> File<D, A> {
    /// What a driver lists.
    pub(crate) const ENTRY: Entry<D> = Entry(&raw const Self::C.attr, PhantomData);

    #[allow(clippy::needless_update, reason = "lockdep adds fields")]
    const C: &'static bindings::device_attribute = &bindings::device_attribute {
        attr: bindings::attribute {
            name: super::char_ptr(A::NAME),
            mode: 0o644,
            ..pin_init::zeroed()
        },
        __bindgen_anon_1: bindings::device_attribute__bindgen_ty_1 {
            show: Some(Self::show),
        },
        __bindgen_anon_2: bindings::device_attribute__bindgen_ty_2 {
            store: Some(Self::store),
        },
    };

    /// # Safety
    ///
    /// Only for the C core, as `show` of `struct device_attribute`.
    unsafe extern "C" fn show(
        device: *mut bindings::device,
        _attribute: *mut bindings::device_attribute,
        buffer: *mut c_char,
    ) -> isize {
        // SAFETY: The file exists only while the device is bound to `D`.
        let data = unsafe { mdev::data::<D>(device) };
        // SAFETY: `buffer` is a page, as `sysfs_emit` wants it.
        (unsafe { bindings::sysfs_emit(buffer, c"%llu\n".as_char_ptr(), A::show(data)) }) as isize
    }

    /// # Safety
    ///
    /// Only for the C core, as `store` of `struct device_attribute`.
    unsafe extern "C" fn store(
        device: *mut bindings::device,
        _attribute: *mut bindings::device_attribute,
        buffer: *const c_char,
        count: usize,
    ) -> isize {
        // SAFETY: The file exists only while the device is bound to `D`.
        let data = unsafe { mdev::data::<D>(device) };
        let mut value = 0;
        // SAFETY: sysfs terminates the buffer with a NUL.
        let parsed = unsafe { bindings::kstrtoull(buffer, 0, &raw mut value) };
        match to_result(parsed).and_then(|()| A::store(data, value)) {
            Ok(()) => count as isize,
            Err(error) => error.to_errno() as isize,
        }
    }
}
