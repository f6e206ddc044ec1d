// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device's process killed again and again under its clients: nothing is lost, nothing happens
//! twice. `cargo xtask storm` does the same for longer, or from another seed.

use anyhow::{ensure, Result};
use muser_e2e::storm::{Program, Storm};
use muser_e2e::vfio::Road;
use muser_e2e::{random, time};

use crate::runner::Test;

/// The tests of this topic.
pub(super) fn tests() -> Vec<Test> {
    let bare = tests_of("storm::on_the_bare_abi_loses_nothing", |road| {
        storm(road, "storm-device")
    });
    let library = tests_of("storm::on_libmuser_loses_nothing", |road| {
        storm(road, "counter")
    })
    .map(|test| test.needs(|| super::missing("counter")));
    bare.chain(library).collect()
}

/// Where a road's DMA is spoiled, its storm goes without, and so is not skipped.
fn tests_of(name: &str, run: fn(Road) -> Result<()>) -> impl Iterator<Item = Test> {
    super::dma_roads(name, run)
        .map(|test| Test {
            pins: false,
            ..test
        })
        .map(|test| test.long(5))
}

fn storm(road: Road, program: &str) -> Result<()> {
    let storm = Storm {
        // A kill costs a debug kernel ten times the time.
        kills: if time::slowness() > 1 { 150 } else { 500 },
        seed: random::seed()?,
        road,
        program: Program(program.to_owned()),
        restarts: 0,
    };
    let outcome = storm.run()?;
    println!("{outcome}");
    ensure!(outcome.is_good(), "{outcome}");
    Ok(())
}
