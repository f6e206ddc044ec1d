// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What runs in a guest: `vmm-guest VERB ADDRESS …` does something with the card at a PCI address,
//! as any program that uses GPIO lines or VFIO would. The kernel knows nothing of muser.

#![deny(unsafe_code)]

mod gpio;
#[expect(unsafe_code, reason = "what a device reaches is mapped for it")]
mod sys;
mod vfio;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Result};

/// A work of rounds without number ends after the round in which this comes to be.
const STOP: &str = "/tmp/stop";
/// How long an interrupt may take: an emulated CPU and a server that starts anew are slow.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error:#}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match *words {
        ["drive", address, value] => gpio::drive(address, value.parse()?),
        ["read", address, input, count] => gpio::read(address, input.parse()?, count.parse()?),
        ["work", address, input, number] => gpio::work(address, input.parse()?, rounds(number)?),
        ["intx", address, count] => vfio::interrupts(address, vfio::Way::Line, count.parse()?),
        ["msi", address, count] => vfio::interrupts(address, vfio::Way::Message, count.parse()?),
        ["dma", address, number] => vfio::dma(address, rounds(number)?),
        _ => bail!("drive, read, work, intx, msi or dma, and the address of a card"),
    }
}

/// So many rounds; with `-`, until there is [`STOP`].
fn rounds(number: &str) -> Result<impl Iterator<Item = u64>> {
    let last = match number {
        "-" => u64::MAX,
        number => number.parse()?,
    };
    Ok((1..=last).take_while(move |_| last < u64::MAX || !Path::new(STOP).exists()))
}
