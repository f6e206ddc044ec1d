// SPDX-License-Identifier: GPL-2.0
//! A sleeping lock for many readers or one writer, which a dying task need not wait for.
//!
//! The kernel crate has no `rw_semaphore`, and its `Mutex` can't be waited for killably.
//!
//! C header: `include/linux/rwsem.h`.

use super::bindings;
use core::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut}, //
};
use kernel::{
    error::to_result,
    prelude::*,
    sync::LockClassKey,
    types::{NotThreadSafe, Opaque}, //
};

/// A value behind a `struct rw_semaphore`.
#[pin_data]
pub(crate) struct RwLock<T> {
    #[pin]
    semaphore: Opaque<bindings::rw_semaphore>,
    value: UnsafeCell<T>,
}

// SAFETY: The semaphore may be used from any thread, and the value can be sent.
unsafe impl<T: Send> Send for RwLock<T> {}
// SAFETY: Readers share the value, and a writer has it alone.
unsafe impl<T: Send + Sync> Sync for RwLock<T> {}

impl<T> RwLock<T> {
    /// Makes an unlocked lock, with a name and a lock class for lockdep.
    pub(crate) fn new(
        value: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes, and `name` and `key` live for ever.
            semaphore <- Opaque::ffi_init(|slot| unsafe {
                bindings::__init_rwsem(slot, name.as_char_ptr(), key.as_ptr())
            }),
            value: UnsafeCell::new(value),
        })
    }

    /// Waits for the writer to finish.
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // SAFETY: The semaphore is initialised and pinned.
        unsafe { bindings::down_read(self.semaphore.get()) };
        ReadGuard(self, NotThreadSafe)
    }

    /// Waits for everybody to finish.
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        // SAFETY: As in `read`.
        unsafe { bindings::down_write(self.semaphore.get()) };
        WriteGuard(self, NotThreadSafe)
    }

    /// Waits for everybody to finish, unless the task is being killed.
    ///
    /// # Errors
    ///
    /// `EINTR`.
    pub(crate) fn write_killable(&self) -> Result<WriteGuard<'_, T>> {
        // SAFETY: As in `read`.
        to_result(unsafe { bindings::down_write_killable(self.semaphore.get()) })?;
        Ok(WriteGuard(self, NotThreadSafe))
    }
}

/// Access to look.
pub(crate) struct ReadGuard<'a, T>(&'a RwLock<T>, NotThreadSafe);

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The semaphore is held for reading, so that nobody writes.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: Taken by `read`.
        unsafe { bindings::up_read(self.0.semaphore.get()) };
    }
}

/// Access to change.
pub(crate) struct WriteGuard<'a, T>(&'a RwLock<T>, NotThreadSafe);

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The semaphore is held for writing, so that nobody else has the value.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: As in `deref`, and `self` is borrowed mutably.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: Taken by `write` or `write_killable`.
        unsafe { bindings::up_write(self.0.semaphore.get()) };
    }
}
