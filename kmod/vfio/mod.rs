// SPDX-License-Identifier: GPL-2.0
//! Safe abstractions over the parts of the kernel which the kernel crate has none for.
//!
//! All `unsafe` of the module is in this folder; `driver/` is built on it and has none. One file per
//! C concept, each in the manner of `rust/kernel/fwctl.rs`: the type, its trait, and the private
//! table of C callbacks last.

mod bindings;

pub(crate) mod chrdev;
pub(crate) mod class;
mod departure;
pub(crate) mod device;
pub(crate) mod errno;
pub(crate) mod eventfd;
pub(crate) mod inode;
pub(crate) mod irq_set;
pub(crate) mod mdev;
pub(crate) mod owner;
pub(crate) mod page;
pub(crate) mod pins;
pub(crate) mod process;
pub(crate) mod rwlock;
pub(crate) mod shared;
pub(crate) mod sysfs;
pub(crate) mod tree;
pub(crate) mod vm;
pub(crate) mod wait;

use kernel::prelude::*;

/// The pointer of a name, for constants.
#[expect(
    clippy::disallowed_methods,
    reason = "`as_char_ptr` does the same cast, but is not const"
)]
const fn char_ptr(name: &'static CStr) -> *const c_char {
    name.as_ptr().cast()
}
