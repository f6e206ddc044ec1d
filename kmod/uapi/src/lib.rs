// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause
//! The ABI of `/dev/muser/UUID` for userspace: [`muser.rs`](../src/muser_uapi/muser.rs.html), the
//! very file that the kernel module compiles.

#![no_std]
#![forbid(unsafe_code)]

mod muser;

pub use muser::*;
