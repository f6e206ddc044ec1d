// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `storm-device`: the device of a storm, on the bare ABI.

use std::process::ExitCode;

use anyhow::{bail, Result};
use muser_e2e::storm::stand_in;
use muser_e2e::sys;

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
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--uuid", uuid] => serve(uuid, false),
        ["--uuid", uuid, "--take-over"] => serve(uuid, true),
        _ => bail!("storm-device --uuid UUID [--take-over]"),
    }
}

fn serve(uuid: &str, take_over: bool) -> Result<()> {
    sys::die_with_parent()?;
    stand_in::run(uuid, take_over)
}
