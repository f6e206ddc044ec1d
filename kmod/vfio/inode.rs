// SPDX-License-Identifier: GPL-2.0
//! Inodes without a name: one address space for all files of a device, so that a range of all
//! mappings of it can be taken away at once.
//!
//! The inode behind a node won't do: there may be several for one device number.
//!
//! C headers: `include/linux/pseudo_fs.h`, `include/linux/mm.h` (`unmap_mapping_range`).

use super::bindings;
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::Arc, //
};

/// The file system in which the inodes are. Nobody else can mount it.
///
/// # Invariants
///
/// The pointer is a mount of the file system, and this is its owner.
pub(crate) struct Inodes(NonNull<bindings::vfsmount>);

// SAFETY: A mount may be used from any thread.
unsafe impl Send for Inodes {}
// SAFETY: As above.
unsafe impl Sync for Inodes {}

impl Inodes {
    /// Mounts it.
    pub(crate) fn new() -> Result<Arc<Self>> {
        // SAFETY: Nothing to uphold.
        let mount = from_err_ptr(unsafe { bindings::muser_mount() })?;
        // INVARIANT: Just mounted.
        Ok(Arc::new(
            Self(NonNull::new(mount).ok_or(ENOMEM)?),
            GFP_KERNEL,
        )?)
    }
}

impl Drop for Inodes {
    fn drop(&mut self) {
        // SAFETY: By the invariant. Every inode holds a reference to `self`, so all are gone.
        unsafe { bindings::kern_unmount(self.0.as_ptr()) };
    }
}

/// An inode.
///
/// # Invariants
///
/// The pointer is a counted reference.
pub(crate) struct Inode {
    inode: NonNull<bindings::inode>,
    _inodes: Arc<Inodes>,
}

// SAFETY: An inode may be used from any thread.
unsafe impl Send for Inode {}
// SAFETY: What is done with it here takes the locks that it needs.
unsafe impl Sync for Inode {}

impl Inode {
    /// Makes one.
    pub(crate) fn new(inodes: &Arc<Inodes>) -> Result<Self> {
        // SAFETY: The mount is valid.
        let inode = from_err_ptr(unsafe { bindings::muser_inode(inodes.0.as_ptr()) })?;
        // INVARIANT: The reference is that of the allocation.
        Ok(Self {
            inode: NonNull::new(inode).ok_or(ENOMEM)?,
            _inodes: inodes.clone(),
        })
    }

    /// Has the mappings of `file` belong to this inode.
    ///
    /// # Safety
    ///
    /// `file` is just being opened, and the inode must live until it is released.
    pub(super) unsafe fn adopt(&self, file: *mut bindings::file) {
        // SAFETY: By the safety requirements.
        unsafe { bindings::muser_adopt(file, self.inode.as_ptr()) };
    }

    /// Takes `len` bytes from `offset` on out of all mappings: the next touch is a fault.
    pub(crate) fn zap(&self, offset: u64, len: u64) {
        // SAFETY: The inode is alive.
        unsafe { bindings::muser_zap(self.inode.as_ptr(), offset, len) };
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        // SAFETY: The reference is ours to give back.
        unsafe { bindings::iput(self.inode.as_ptr()) };
    }
}
