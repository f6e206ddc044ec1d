// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a fuzzer does to libmuser, and what must hold then.
//!
//! A target is a function of bytes that panics where something is wrong. `cargo xtask fuzz TARGET`
//! looks for such bytes, guided by what of the library they reach; the tests of this crate replay
//! what is in `corpus/` and `regressions/`, and what proptest comes up with, on any toolchain.
//!
//! The meaning of an input is laid down here ([`Input`]) rather than by a crate, so that what was
//! committed goes on meaning the same.

pub mod client;
pub mod config;
mod descriptors;
mod input;
pub mod server;
mod socket;

pub use input::Input;

/// Does what an input says, and panics where something is wrong.
pub type Target = fn(&[u8]);

/// A target by its name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    let all: [(&str, Target); 3] = [
        ("client", client::run),
        ("config", config::run),
        ("server", server::run),
    ];
    let found = all.into_iter().find(|(known, _)| *known == name);
    found.map(|(_, run)| run)
}
