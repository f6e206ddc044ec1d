// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `fuzz-kmod`: several processes at once do to muser.ko whatever processes, clients and owners can
//! do, right and wrong; run as root in a guest by `cargo xtask fuzz kmod`.
//!
//! What each process does follows from the seed, its place and its generation alone. When it does
//! it, and so what comes of it, is up to the scheduler: the same seed makes the same calls, not the
//! same run.

#![deny(unsafe_code)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "random numbers are cut to size by intention"
)]

mod content;
mod kcov;
mod ops;
mod points;
mod run;
mod shared;
#[expect(unsafe_code, reason = "the one place for system calls")]
mod sys;
mod worker;

use std::process::ExitCode;

use anyhow::{bail, Context, Result};
use muser_e2e::random;

const USAGE: &str = "fuzz-kmod [--seconds N] [--seed S]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == run::WORKER) {
        return match run::work(&words[1..]) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("a fuzzing process: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    match parse(&words).and_then(|(seconds, seed)| run::run(seconds, seed)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("fuzz kmod: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(words: &[String]) -> Result<(u64, u64)> {
    let (mut seconds, mut seed) = (60, None);
    for pair in words.chunks(2) {
        let [option, value] = pair else {
            bail!("{pair:?} needs a value; {USAGE}");
        };
        match &**option {
            "--seconds" => seconds = value.parse()?,
            "--seed" => seed = Some(value.parse()?),
            _ => bail!("{option}? {USAGE}"),
        }
    }
    let seed = match seed {
        Some(seed) => seed,
        None => random::seed().context("making a seed")?,
    };
    Ok((seconds, seed))
}
