// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `storm-device`: the device of a storm, on the bare ABI.

use std::process::ExitCode;

use anyhow::{bail, Context, Result};
use muser_e2e::storm::stand_in::{self, Fault};
use muser_e2e::sys;

const USAGE: &str = "storm-device --uuid UUID [--take-over] [--fault double|lose|silent]";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storm-device: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut uuid = None;
    let mut take_over = false;
    let mut fault = Fault::None;
    let mut words = std::env::args().skip(1);
    while let Some(option) = words.next() {
        match &*option {
            "--uuid" => uuid = words.next(),
            "--take-over" => take_over = true,
            "--fault" => {
                fault = words
                    .next()
                    .as_deref()
                    .and_then(Fault::from_name)
                    .context(USAGE)?
            }
            _ => bail!("{option}? {USAGE}"),
        }
    }
    sys::die_with_parent()?;
    stand_in::run(&uuid.context(USAGE)?, take_over, fault)
}
