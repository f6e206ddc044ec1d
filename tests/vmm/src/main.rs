// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vmm`: tests of devices in QEMU, run by `cargo xtask test` in the build root, which has the QEMU
//! that users have. The options are those of libtest.
//!
//! Tests called `qtest` play the CPU themselves, those called `guest` boot Debian's own kernel.
//! Whatever is waited for has a deadline ([`wait`]), and whoever waits in vain says for what, and
//! what the programs said.

#![forbid(unsafe_code)]

mod lines;
mod linux;
mod pci;
mod place;
mod process;
mod qemu;
mod qmp;
mod qtest;
mod server;
mod tests;
mod wait;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Emulated CPUs take what there is, and several tests share a guest.
    arguments.test_threads = Some(1);
    let trials = tests::all().into_iter().map(|(name, test)| {
        Trial::test(name, move || {
            test().map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
