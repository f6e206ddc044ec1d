// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The conformance suite: what a client sees of a libmuser device is the same over every transport.
//!
//! [`device`] is a device made to be tested, written with libmuser as any other. [`Client`] is
//! what a client can do, whatever the transport; [`Backend`] makes the two sides of one. [`cases`]
//! are the tests; each is run by [`run`] against a fresh device. The suite runs over the memory
//! transport as a test of this crate, and over the kernel's, on group and cdev, in the end-to-end
//! tests. A new transport implements [`Backend`] and runs the same.

#![forbid(unsafe_code)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes and counts here are of the suite's own making, and small"
)]

mod check;
mod client;
pub mod device;
mod host;
mod own;
mod suite;

pub use client::{Access, Client, DmaMemory, Memory, RegionInfo};
pub use host::{run, run_with, Backend, Host};
pub use suite::{cases, Case};
