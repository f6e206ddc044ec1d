// SPDX-License-Identifier: GPL-2.0
//! An eventfd which the kernel holds and signals, and one whose signal the kernel acts on.
//!
//! C headers: `include/linux/eventfd.h`, `struct virqfd` in `include/linux/vfio.h`.

use super::bindings;
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*, //
};

/// A reference to the eventfd behind a file descriptor of a client or process.
///
/// # Invariants
///
/// The pointer is a counted reference.
pub(crate) struct EventFd(NonNull<bindings::eventfd_ctx>);

// SAFETY: An `eventfd_ctx` is refcounted and may be used from any thread.
unsafe impl Send for EventFd {}
// SAFETY: An `eventfd_ctx` has a lock of its own.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// Takes a reference to the eventfd `fd` of the current process.
    ///
    /// # Errors
    ///
    /// `EBADF` if `fd` is not open, `EINVAL` if it is no eventfd.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: Any number may be passed.
        let context = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(fd) })?;
        // INVARIANT: `eventfd_ctx_fdget` took the reference.
        Ok(Self(NonNull::new(context).ok_or(EINVAL)?))
    }

    /// Adds one to the eventfd's counter.
    pub(crate) fn signal(&self) {
        // SAFETY: The reference keeps the context alive.
        unsafe { bindings::eventfd_signal_mask(self.0.as_ptr(), 0) };
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: The reference is ours to give back.
        unsafe { bindings::eventfd_ctx_put(self.0.as_ptr()) };
    }
}

/// What to do when a client signals an eventfd.
pub(crate) trait Signalled: Send + Sync + 'static {
    /// Called in process context, from a workqueue.
    fn signalled(&self);
}

/// An eventfd on whose signal the kernel acts, for as long as this value lives.
///
/// Dropping waits for a call of [`Signalled::signalled`] in progress: no lock which that takes may
/// be held.
pub(crate) struct Listener<T: Signalled> {
    _inner: Pin<KBox<Inner<T>>>,
}

#[pin_data(PinnedDrop)]
struct Inner<T: Signalled> {
    // `vfio_virqfd_enable` keeps the address of this, hence the pinning.
    virqfd: core::cell::UnsafeCell<*mut bindings::virqfd>,
    #[cfg_attr(
        not(CONFIG_VFIO_VIRQFD),
        expect(dead_code, reason = "nothing calls it")
    )]
    target: T,
    #[pin]
    _pinned: core::marker::PhantomPinned,
}

// SAFETY: The cell is only changed by the VFIO core, under its own lock.
unsafe impl<T: Signalled> Send for Inner<T> {}
// SAFETY: As above.
unsafe impl<T: Signalled> Sync for Inner<T> {}

impl<T: Signalled> Listener<T> {
    /// Listens to the eventfd `fd` of the current process.
    ///
    /// # Errors
    ///
    /// `EBADF` if `fd` is not open, `EINVAL` if it is no eventfd, `ENOMEM`, and `ENOTTY` on a
    /// kernel built without `CONFIG_VFIO_VIRQFD`.
    #[cfg(CONFIG_VFIO_VIRQFD)]
    pub(crate) fn new(fd: i32, target: T) -> Result<Self> {
        let inner = KBox::pin_init(
            pin_init!(Inner {
                virqfd: core::cell::UnsafeCell::new(core::ptr::null_mut()),
                target,
                _pinned: core::marker::PhantomPinned,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let opaque: *const Inner<T> = &*inner;
        // SAFETY: `inner` does not move, and is not freed before `vfio_virqfd_disable` in its drop
        // has waited for the last call.
        kernel::error::to_result(unsafe {
            bindings::vfio_virqfd_enable(
                opaque.cast_mut().cast(),
                None,
                Some(signalled::<T>),
                core::ptr::null_mut(),
                inner.virqfd.get(),
                fd,
            )
        })?;
        Ok(Self { _inner: inner })
    }

    /// Listens to nothing: this kernel has no `CONFIG_VFIO_VIRQFD`.
    #[cfg(not(CONFIG_VFIO_VIRQFD))]
    pub(crate) fn new(_fd: i32, _target: T) -> Result<Self> {
        Err(ENOTTY)
    }
}

#[pinned_drop]
impl<T: Signalled> PinnedDrop for Inner<T> {
    fn drop(self: Pin<&mut Self>) {
        #[cfg(CONFIG_VFIO_VIRQFD)]
        // SAFETY: The cell is where `vfio_virqfd_enable` was told to keep its pointer, or null.
        unsafe {
            bindings::vfio_virqfd_disable(self.virqfd.get())
        };
    }
}

/// # Safety
///
/// Only for the C core, as `thread` of `struct virqfd`.
#[cfg(CONFIG_VFIO_VIRQFD)]
unsafe extern "C" fn signalled<T: Signalled>(opaque: *mut c_void, _data: *mut c_void) {
    // SAFETY: `opaque` is the `Inner<T>` given to `vfio_virqfd_enable`, which is alive until
    // `vfio_virqfd_disable` returns.
    let inner = unsafe { &*opaque.cast_const().cast::<Inner<T>>() };
    inner.target.signalled();
}
