// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `e2e`: the end-to-end tests, run as root in a guest. The options are those of libtest.
//!
//! Tests run one after another, since modules are loaded and unloaded; each in a process of its
//! own, so that one which hangs or dies is named, killed, and the run goes on.

#![forbid(unsafe_code)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes and counts here are of the tests' own making, and small"
)]

mod runner;
mod tests;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use muser_e2e::{helper, process, sys};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((first, rest)) if first == process::HELPER => outcome(helper::run(rest)),
        Some((first, rest)) if first == runner::INNER => {
            let name = rest.first().map_or("", String::as_str);
            outcome(runner::run_inner(&tests::all(), name))
        }
        _ => {
            let mut arguments = Arguments::from_args();
            arguments.test_threads = Some(1);
            if let Err(error) = sys::adopt_orphans() {
                eprintln!("orphans will not be reaped: {error}");
            }
            let trials = tests::all().into_iter().map(runner::trial).collect();
            libtest_mimic::run(&arguments, trials).exit_code()
        }
    }
}

fn outcome(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
