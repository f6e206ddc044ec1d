// SPDX-License-Identifier: GPL-2.0
//! Error numbers which the kernel crate does not name.
//!
//! C header: `include/uapi/asm-generic/errno.h`.

use super::bindings;
use kernel::error::Error;

/// An error number by its C name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::upper_case_acronyms, reason = "C names")]
#[repr(u32)]
pub(crate) enum Errno {
    EBADSLT = bindings::EBADSLT,
    ECANCELED = bindings::ECANCELED,
    EDQUOT = bindings::EDQUOT,
    EISCONN = bindings::EISCONN,
    ENOMSG = bindings::ENOMSG,
    ENOTCONN = bindings::ENOTCONN,
    EOPNOTSUPP = bindings::EOPNOTSUPP,
    EPROTO = bindings::EPROTO,
    ESHUTDOWN = bindings::ESHUTDOWN,
    ESTALE = bindings::ESTALE,
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error::from_errno(-(errno as i32))
    }
}
