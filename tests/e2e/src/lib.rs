// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the end-to-end tests and the demonstration are made of: both sides of a muser device, as
//! seen by processes that know nothing but the kernel's interfaces.
//!
//! From the bottom up: [`sys`] has the system calls, [`mdev`] creates and removes devices in
//! sysfs, [`node`] is a device process on the bare ABI of `/dev/muser/UUID`, [`vfio`] is a VFIO
//! client on the group and on the cdev, [`rig`] joins both for one test, [`process`] runs either
//! side in another process that can be killed, and [`check`] says what was expected. [`storm`] kills
//! and accounts.

#![deny(unsafe_code)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes and counts here are of the tests' own making, and small"
)]

pub mod cgroup;
pub mod check;
pub mod fault;
pub mod helper;
pub mod kmsg;
pub mod mdev;
pub mod module;
pub mod node;
pub mod operator;
pub mod pci;
pub mod process;
pub mod random;
pub mod rig;
pub mod service;
pub mod storm;
#[expect(unsafe_code, reason = "the one place for system calls")]
pub mod sys;
pub mod time;
pub mod vfio;
