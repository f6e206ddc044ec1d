// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `storm`: kills a device's process under its clients, and accounts for every operation.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use muser_e2e::random;
use muser_e2e::storm::{self, Program, Storm};
use muser_e2e::vfio::Road;

const USAGE: &str = "storm [--kills N] [--seed S] [--road group|cdev|compat] [--device PROGRAM] \
                     [--restarts N] [--deadline SECONDS]";

fn main() -> ExitCode {
    match run() {
        Ok(good) if good => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("storm: {error:#}");
            ExitCode::FAILURE
        }
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
        road: Road::Group,
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
            "--road" => {
                storm.road = Road::from_name(&value).with_context(|| format!("no road {value}"))?;
            }
            "--device" => storm.program = Program(value),
            "--restarts" => storm.restarts = value.parse()?,
            "--deadline" => storm.deadline = Duration::from_secs(value.parse()?),
            _ => bail!("{option}? {USAGE}"),
        }
    }
    Ok(storm)
}
