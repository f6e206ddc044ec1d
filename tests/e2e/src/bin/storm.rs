// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `storm`: kills a device's process under its clients, and accounts for every operation.
//!
//! `storm counter` is the sample, for a storm that has no other program at hand.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::{Args, FromArgMatches};
use libmuser::cli::SharedOptions;
use muser_e2e::random;
use muser_e2e::storm::{self, Program, Storm};
use muser_e2e::vfio::Road;

const USAGE: &str =
    "storm [--kills N] [--seed S] [--road group|cdev|compat|socket] [--device PROGRAM] \
                     [--restarts N] [--deadline SECONDS]";

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "counter") {
        return counter(words);
    }
    match run() {
        Ok(good) if good => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("storm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Serves the sample.
fn counter(words: impl Iterator<Item = OsString>) -> ExitCode {
    let command = SharedOptions::augment_args(clap::Command::new("counter"));
    let options = command.try_get_matches_from(words);
    match options.and_then(|matches| SharedOptions::from_arg_matches(&matches)) {
        Ok(options) => options.serve("counter", "", counter::model(), counter::Counter::new),
        Err(error) => error.exit(),
    }
}

fn run() -> Result<bool> {
    let outcome = parse()?.run()?;
    println!("{outcome}");
    Ok(outcome.is_good())
}

fn parse() -> Result<Storm> {
    let mut storm = Storm {
        kills: 200,
        seed: random::seed()?,
        road: Some(Road::Group),
        program: Program("counter".to_owned()),
        restarts: 20,
        deadline: storm::deadline(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(option) = words.next() {
        let value = words
            .next()
            .with_context(|| format!("{option} needs a value; {USAGE}"))?;
        match &*option {
            "--kills" => storm.kills = value.parse()?,
            "--seed" => storm.seed = value.parse()?,
            "--road" if value == "socket" => storm.road = None,
            "--road" => {
                let road = Road::from_name(&value);
                storm.road = Some(road.with_context(|| format!("no road {value}"))?);
            }
            "--device" => storm.program = Program(value),
            "--restarts" => storm.restarts = value.parse()?,
            "--deadline" => storm.deadline = Duration::from_secs(value.parse()?),
            _ => bail!("{option}? {USAGE}"),
        }
    }
    Ok(storm)
}
