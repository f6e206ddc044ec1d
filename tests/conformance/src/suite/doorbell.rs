// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Doorbells: posted where the transport can, and the same to look at where it can't.

use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use libmuser::Moment;

use super::{get, read, topic, write};
use crate::check::{equal, fails};
use crate::device::{BELL, DOORBELL, RECOVERED, RINGS, TABLE};
use crate::{Client, Host};

topic!("doorbell":
    value_reads_back,
    device_sees_the_value,
    device_is_told,
    part_of_a_doorbell_can_be_rung,
    can_not_be_mapped,
    is_zeroed_for_the_next_client;
    restarts: last_value_survives_a_death,
);

/// Long enough for anything that is going to happen.
const PATIENCE: Duration = Duration::from_secs(20);

fn ring(client: &dyn Client, value: u32) -> Result<()> {
    write(client, TABLE, DOORBELL, &value.to_le_bytes())
}

fn value_reads_back(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    equal("at first", read(&*client, TABLE, DOORBELL)?, [0; 4])?;
    ring(&*client, 0xAABB_CCDD)?;
    let value = read(&*client, TABLE, DOORBELL)?;
    equal("value", u32::from_le_bytes(value), 0xAABB_CCDD)?;
    // Around it is nothing.
    let around: [u8; 6] = read(&*client, TABLE, DOORBELL - 1)?;
    equal("around", around, [0xFF, 0xDD, 0xCC, 0xBB, 0xAA, 0xFF])
}

fn device_sees_the_value(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for value in [1, u32::MAX, 0, 77] {
        ring(&*client, value)?;
        equal("the device's view", get(&*client, BELL)?, value)?;
    }
    Ok(())
}

/// When it is told is not said: another request may be answered before.
fn device_is_told(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let deadline = Instant::now() + PATIENCE;
    let mut told = get(&*client, RINGS)?;
    for round in 0..3 {
        ring(&*client, round)?;
        let before = told;
        while told == before {
            ensure!(Instant::now() < deadline, "ring {round} is not told");
            told = get(&*client, RINGS)?;
        }
    }
    Ok(())
}

fn part_of_a_doorbell_can_be_rung(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    ring(&*client, 0x1111_1111)?;
    write(&*client, TABLE, DOORBELL + 1, &[0x22, 0x33])?;
    equal("the device's view", get(&*client, BELL)?, 0x1133_2211)
}

fn last_value_survives_a_death(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (value, moment) in [(5, Moment::Taken), (6, Moment::Replying)] {
        host.die_at(moment);
        ring(&*client, value)?;
        // If nobody had to answer that, this kills.
        equal("recovered", get(&*client, RECOVERED)?, 1)?;
        equal("the device's view", get(&*client, BELL)?, value)?;
    }
    host.restart()?;
    equal("the device's view", get(&*client, BELL)?, 6)
}

fn can_not_be_mapped(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for offset in [0, DOORBELL] {
        let mapped = client.map(TABLE, offset, 4096);
        fails(&format!("mapping {offset:#x}"), mapped, 22)?;
    }
    Ok(())
}

fn is_zeroed_for_the_next_client(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    ring(&*client, 9)?;
    drop(client);
    let client = host.open()?;
    equal("value", read(&*client, TABLE, DOORBELL)?, [0; 4])?;
    equal("the device's view", get(&*client, BELL)?, 0)
}
