// SPDX-License-Identifier: GPL-2.0
//! Numbers in sysfs, beside a device.
//!
//! C header: `include/linux/device.h`, `struct device_attribute`.

use super::bindings;
use core::{
    marker::PhantomData,
    ptr::null, //
};
use kernel::{
    error::to_result,
    prelude::*,
    types::Opaque, //
};

/// A number of a `T`, read and written as text.
pub(crate) trait Attribute<T>: 'static {
    /// Name of the file.
    const NAME: &'static CStr;

    /// The number.
    fn show(of: &T) -> u64;

    /// Takes a new one.
    fn store(of: &T, value: u64) -> Result;
}

/// A number of a `T` that can only be read.
pub(crate) trait Fact<T>: 'static {
    /// Name of the file.
    const NAME: &'static CStr;

    /// The number.
    fn show(of: &T) -> u64;
}

/// A file beside a device whose `driver_data` is a `T`.
///
/// # Invariants
///
/// The pointer is to an attribute that lives for ever, and works on such devices.
pub(crate) struct Entry<T>(*const bindings::attribute, PhantomData<T>);

/// The C struct for attribute or fact `A` of a `T`.
pub(crate) struct File<T, A>(PhantomData<(T, A)>);

impl<T: 'static, A: Attribute<T>> File<T, A> {
    /// What is listed of an attribute.
    pub(crate) const ENTRY: Entry<T> = Entry(&raw const Self::READ_WRITE.attr, PhantomData);

    #[allow(clippy::needless_update, reason = "lockdep adds fields")]
    const READ_WRITE: &'static bindings::device_attribute = &bindings::device_attribute {
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
        // SAFETY: The files of a device are there while its data are.
        let of = unsafe { data::<T>(device) };
        // SAFETY: `buffer` is what sysfs passed.
        unsafe { print(buffer, A::show(of)) }
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
        // SAFETY: The files of a device are there while its data are.
        let of = unsafe { data::<T>(device) };
        let mut value = 0;
        // SAFETY: sysfs terminates the buffer with a NUL.
        let parsed = unsafe { bindings::kstrtoull(buffer, 0, &raw mut value) };
        match to_result(parsed).and_then(|()| A::store(of, value)) {
            Ok(()) => count as isize,
            Err(error) => error.to_errno() as isize,
        }
    }
}

impl<T: 'static, A: Fact<T>> File<T, A> {
    /// What is listed of a fact.
    pub(crate) const FACT: Entry<T> = Entry(&raw const Self::READ_ONLY.attr, PhantomData);

    #[allow(clippy::needless_update, reason = "lockdep adds fields")]
    const READ_ONLY: &'static bindings::device_attribute = &bindings::device_attribute {
        attr: bindings::attribute {
            name: super::char_ptr(A::NAME),
            mode: 0o444,
            ..pin_init::zeroed()
        },
        __bindgen_anon_1: bindings::device_attribute__bindgen_ty_1 {
            show: Some(Self::show_fact),
        },
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Only for the C core, as `show` of `struct device_attribute`.
    unsafe extern "C" fn show_fact(
        device: *mut bindings::device,
        _attribute: *mut bindings::device_attribute,
        buffer: *mut c_char,
    ) -> isize {
        // SAFETY: The files of a device are there while its data are.
        let of = unsafe { data::<T>(device) };
        // SAFETY: `buffer` is what sysfs passed.
        unsafe { print(buffer, A::show(of)) }
    }
}

/// # Safety
///
/// The device's `driver_data` must be a `T` for as long as the value is used.
unsafe fn data<'a, T>(device: *mut bindings::device) -> &'a T {
    // SAFETY: By the safety requirements.
    unsafe { &*(*device).driver_data.cast_const().cast() }
}

/// # Safety
///
/// `buffer` must be what sysfs passed to a `show`.
unsafe fn print(buffer: *mut c_char, value: u64) -> isize {
    // SAFETY: `buffer` is a page, as `sysfs_emit` wants it.
    (unsafe { bindings::sysfs_emit(buffer, c"%llu\n".as_char_ptr(), value) }) as isize
}

/// Lists of attributes, as C wants them: the group, and the list of groups, each ending with null.
///
/// Once [`Group::list`] was called it must not move.
pub(super) struct Group {
    attributes: KVec<*const bindings::attribute>,
    group: Opaque<bindings::attribute_group>,
    groups: Opaque<[*const bindings::attribute_group; 2]>,
}

impl Group {
    /// Collects entries.
    pub(super) fn new<T>(entries: &[Entry<T>]) -> Result<Self> {
        let mut attributes = KVec::with_capacity(entries.len() + 1, GFP_KERNEL)?;
        for entry in entries {
            attributes.push(entry.0, GFP_KERNEL)?;
        }
        attributes.push(null(), GFP_KERNEL)?;
        Ok(Self {
            attributes,
            group: Opaque::zeroed(),
            groups: Opaque::zeroed(),
        })
    }

    /// Fills in the structs, and gives the list of groups, which is good as long as `self`.
    ///
    /// # Safety
    ///
    /// Nobody may have the list yet, and `self` must not move any more.
    pub(super) unsafe fn list(&self) -> *mut *const bindings::attribute_group {
        // SAFETY: By the safety requirements, nobody else looks at it.
        let group = unsafe { &mut *self.group.get() };
        group.__bindgen_anon_2.attrs = self.attributes.as_ptr().cast_mut().cast();
        // SAFETY: As above.
        unsafe { *self.groups.get() = [self.group.get(), null()] };
        self.groups.get().cast()
    }
}
