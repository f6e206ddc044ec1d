// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device's process killed again and again under its clients: nothing is lost, nothing happens
//! twice. And a storm is worth that much: where something is lost, or happens twice, or never, it
//! says so. `cargo xtask storm` does the same for longer, or from another seed.

use anyhow::{ensure, Result};
use muser_e2e::mdev::Mdev;
use muser_e2e::storm::{self, Program, Storm};
use muser_e2e::vfio::Road;
use muser_e2e::{process, random, time};

use crate::runner::Test;

/// The tests of this topic.
pub(super) fn tests() -> Vec<Test> {
    // Where a road's DMA is spoiled, the stand-in goes without, and so is not skipped.
    let bare = super::dma_roads("storm::on_the_bare_abi_loses_nothing", |road| {
        storm(road, "storm-device")
    });
    let bare = bare.map(|test| Test {
        pins: false,
        ..test
    });
    let library = super::dma_roads("storm::on_libmuser_loses_nothing", |road| {
        storm(road, "counter")
    });
    let library = library.map(|test| test.needs(|| super::missing("counter")));
    let faults: &[(&str, super::Once)] = &[
        ("storm::effect_that_comes_twice_is_noticed", || {
            noticed("double", "doubled")
        }),
        ("storm::effect_that_is_lost_is_noticed", || {
            noticed("lose", "lost")
        }),
        ("storm::answer_that_never_comes_is_noticed", || {
            noticed("silent", "stuck")
        }),
    ];
    let faults = faults
        .iter()
        .map(|&(name, run)| super::once(name, run).long(2));
    let storms = bare.chain(library).map(|test| test.long(5));
    storms.chain(faults).collect()
}

/// A storm on a device with that fault fails, and counts it as `kind`.
fn noticed(fault: &str, kind: &str) -> Result<()> {
    let device = format!("storm-device --fault {fault}");
    let deadline = (2 * time::slowness()).to_string();
    let words = [
        "--kills",
        "60",
        "--restarts",
        "0",
        "--device",
        &device,
        "--deadline",
        &deadline,
    ];
    let output = process::run("storm", &words)?;
    // One whose client is stuck ends without its end, and so leaves its device.
    for uuid in Mdev::list() {
        drop(Mdev::adopt(&uuid));
    }
    let said = output.stdout.lines().last().unwrap_or_default();
    let count = said
        .split(", ")
        .find_map(|part| part.strip_prefix(kind)?.trim().parse().ok());
    ensure!(
        output.code == 1 && count.is_some_and(|count: u64| count > 0),
        "exit code {}, {said:?}, {:?}",
        output.code,
        output.stderr
    );
    println!("{fault}: {said}");
    Ok(())
}

fn storm(road: Road, program: &str) -> Result<()> {
    let storm = Storm {
        // A kill costs a debug kernel ten times the time. There are six storms.
        kills: if time::slowness() > 1 { 40 } else { 150 },
        seed: random::seed()?,
        road: Some(road),
        program: Program(program.to_owned()),
        restarts: 0,
        deadline: storm::deadline(),
    };
    let outcome = storm.run()?;
    println!("{outcome}");
    ensure!(outcome.is_good(), "{outcome}");
    Ok(())
}
