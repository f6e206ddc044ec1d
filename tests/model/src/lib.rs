// SPDX-License-Identifier: GPL-2.0
//! The parts of `kmod/driver` which need nothing of the kernel: the very files that the module
//! compiles, checked on the host against simple models and in every state within reach.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "the files belong to the module, whose lints are the kernel's"
)]

mod uapi {
    pub use muser_uapi::*;
}

#[path = "../../../kmod/driver/description.rs"]
mod description;
#[path = "../../../kmod/driver/queue.rs"]
mod queue;

#[cfg(test)]
mod description_tests;
#[cfg(test)]
mod life_tests;
#[cfg(test)]
mod queue_tests;
