// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers that die, are started again, and are replaced. The client notices nothing.

use anyhow::{Context, Result};
use libmuser::Moment;

use super::config::capability;
use super::interrupt::{count, counts, enable, enable_capability, set_table_mask};
use super::{get, read, set, topic, write};
use crate::check::equal;
use crate::device::{
    ADD, FETCH_ADD, FETCH_ADDS, KEPT, LAST_RESET, LOWER, RAISE, RECOVERED, REGISTERS, REPLAYS,
    RESETS, SCRATCH, SUM, TABLE,
};
use crate::{Client, Host};

topic!("recovery":;
    restarts: first_server_has_nothing_to_recover,
    config_space_survives,
    config_write_cut_short_is_done_once,
    function_level_reset_cut_short_is_done_once,
    power_up_cut_short_resets_once,
    reset_cut_short_is_done_again,
    msix_table_and_pending_bits_survive,
    unmask_cut_short_loses_no_interrupt,
    line_that_was_up_stays_up,
    line_that_was_down_stays_down,
    state_survives,
    replay_is_marked,
    effect_happens_once,
    long_access_happens_once,
    successor_takes_over,
    hand_over_is_not_noticed,
);

const INTX: u32 = 0;
const MSIX: u32 = 2;
const CONFIG: u32 = 7;
const MOMENTS: [Moment; 2] = [Moment::Taken, Moment::Replying];

fn first_server_has_nothing_to_recover(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    equal("recovered", get(&*client, RECOVERED)?, 0)?;
    host.restart()?;
    equal("recovered by the second", get(&*client, RECOVERED)?, 1)
}

fn config_space_survives(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    write(&*client, CONFIG, 4, &[0x06, 0x04])?;
    write(&*client, CONFIG, 0x10, &0xFEBF_0000u32.to_le_bytes())?;
    write(&*client, CONFIG, 0x3C, &[11])?;
    let before: [u8; 256] = read(&*client, CONFIG, 0)?;
    host.restart()?;
    equal("config space", read(&*client, CONFIG, 0)?, before)
}

fn config_write_cut_short_is_done_once(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (round, moment) in (0u8..).zip(MOMENTS) {
        host.die_at(moment);
        write(&*client, CONFIG, 0x3C, &[40 + round])?;
        equal("line", read(&*client, CONFIG, 0x3C)?, [40 + round])?;
    }
    Ok(())
}

/// How often and how this server's device was reset.
fn resets(client: &dyn Client) -> Result<(u32, u32)> {
    Ok((get(client, RESETS)?, get(client, LAST_RESET)?))
}

/// What [`resets`] says after a reset of this kind, of which the server before died.
fn expected(moment: Moment, kind: u32) -> (u32, u32) {
    match moment {
        Moment::Taken => (1, kind),
        Moment::Replying => (0, 0),
    }
}

fn function_level_reset_cut_short_is_done_once(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let express = capability(&*client, 0x10)?.context("no Express")?;
    for moment in MOMENTS {
        set(&*client, SCRATCH, 0x1234)?;
        host.die_at(moment);
        // Device control, bit 15: initiate FLR (PCI Express 4.0, 7.5.3.4).
        write(&*client, CONFIG, express + 8, &(1u16 << 15).to_le_bytes())?;
        // The server which answers resets the device, unless the one before it was done with that.
        equal("reset", resets(&*client)?, expected(moment, 3))?;
        equal("scratch", get(&*client, SCRATCH)?, 0)?;
    }
    Ok(())
}

/// The first server has seen the write that returns the function to D0; the second one finds it
/// there, and still has to reset the device, if the first has not.
fn power_up_cut_short_resets_once(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let pm = capability(&*client, 0x01)?.context("no power management")?;
    for moment in MOMENTS {
        // Power management control: D3hot, and back (PCI PM 1.2, 3.2.4).
        write(&*client, CONFIG, pm + 4, &[3, 0])?;
        host.die_at(moment);
        write(&*client, CONFIG, pm + 4, &[0, 0])?;
        equal("reset", resets(&*client)?, expected(moment, 4))?;
    }
    Ok(())
}

fn reset_cut_short_is_done_again(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for moment in MOMENTS {
        write(&*client, CONFIG, 0x3C, &[11])?;
        host.die_at(moment);
        client.reset()?;
        equal("last reset", get(&*client, LAST_RESET)?, 1)?;
        equal("line", read(&*client, CONFIG, 0x3C)?, [0])?;
    }
    Ok(())
}

fn msix_table_and_pending_bits_survive(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 4)?;
    enable_capability(&*client, 0x11)?;
    write(&*client, TABLE, 0x10, &0xFEE0_1000u32.to_le_bytes())?;
    set_table_mask(&*client, 2, true)?;
    set(&*client, RAISE, 2)?;
    let table: [u8; 64] = read(&*client, TABLE, 0)?;
    host.restart()?;
    equal("table", read(&*client, TABLE, 0)?, table)?;
    equal("pending", read(&*client, TABLE, 0x800)?, [0b100, 0, 0, 0])?;
    equal("counts while masked", counts(&vectors), vec![0; 4])?;
    set_table_mask(&*client, 2, false)?;
    equal("counts", counts(&vectors), vec![0, 0, 1, 0])?;
    host.restart()?;
    equal("counts afterwards", counts(&vectors), vec![0; 4])
}

/// An interrupt may come twice then, but it comes.
fn unmask_cut_short_loses_no_interrupt(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 1)?;
    enable_capability(&*client, 0x11)?;
    for moment in MOMENTS {
        set_table_mask(&*client, 0, true)?;
        set(&*client, RAISE, 0)?;
        host.die_at(moment);
        set_table_mask(&*client, 0, false)?;
        equal("fired", (1..=2).contains(&count(&vectors[0])), true)?;
        equal("pending bits", read(&*client, TABLE, 0x800)?, [0; 4])?;
    }
    Ok(())
}

fn line_that_was_up_stays_up(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let line = enable(&*client, INTX, 1)?;
    set(&*client, RAISE, 0)?;
    equal("count", count(&line[0]), 1)?;
    host.restart()?;
    // The line masked itself when it fired, and is up: unmasked, it fires again.
    get(&*client, RECOVERED)?;
    equal("count while masked", count(&line[0]), 0)?;
    client.set_mask(INTX, 0, false)?;
    equal("count once unmasked", count(&line[0]), 1)?;
    set(&*client, LOWER, 0)?;
    client.set_mask(INTX, 0, false)?;
    equal("count once lowered", count(&line[0]), 0)
}

fn line_that_was_down_stays_down(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let line = enable(&*client, INTX, 1)?;
    set(&*client, RAISE, 0)?;
    host.die_at(Moment::Replying);
    set(&*client, LOWER, 0)?;
    count(&line[0]);
    client.set_mask(INTX, 0, false)?;
    equal("count", count(&line[0]), 0)?;
    set(&*client, RAISE, 0)?;
    equal("count once raised", count(&line[0]), 1)
}

fn state_survives(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (value, moment) in (1..).zip(MOMENTS) {
        host.die_at(moment);
        set(&*client, KEPT, value)?;
        equal("kept", get(&*client, KEPT)?, value)?;
    }
    set(&*client, SCRATCH, 5)?;
    host.restart()?;
    equal("kept", get(&*client, KEPT)?, 2)?;
    equal("not kept", get(&*client, SCRATCH)?, 0)
}

fn replay_is_marked(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for moment in MOMENTS {
        host.restart()?;
        get(&*client, SUM)?;
        equal("replays", get(&*client, REPLAYS)?, 0)?;
        host.die_at(moment);
        get(&*client, SUM)?;
        equal("replays after a death", get(&*client, REPLAYS)?, 1)?;
    }
    Ok(())
}

fn effect_happens_once(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let mut sum = 0;
    for round in 1..=10 {
        for moment in MOMENTS {
            host.die_at(moment);
            set(&*client, ADD, round)?;
            sum += round;
            host.die_at(moment);
            equal("sum before", get(&*client, FETCH_ADD)?, sum)?;
            sum += 1;
        }
    }
    equal("sum", get(&*client, SUM)?, sum)
}

/// One request makes many accesses, each with an effect and a result of its own.
fn long_access_happens_once(host: &dyn Host) -> Result<()> {
    const SIZE: usize = 4 * FETCH_ADDS as usize;
    let client = host.open()?;
    // At an offset of 4, so that it is not cut into accesses of 8 bytes only.
    for (round, moment) in (0..).zip(MOMENTS) {
        host.die_at(moment);
        let data: [u8; SIZE] = read(&*client, REGISTERS, FETCH_ADD)?;
        let accesses = FETCH_ADDS as u32 / 2;
        let expected = (0..accesses).flat_map(|access| {
            let before = u64::from(round * accesses + access);
            before.to_le_bytes()
        });
        equal("results", data.to_vec(), expected.collect())?;
        equal("sum", get(&*client, SUM)?, (round + 1) * accesses)?;
    }
    Ok(())
}

fn successor_takes_over(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    set(&*client, KEPT, 77)?;
    set(&*client, SCRATCH, 78)?;
    host.hand_over()?;
    equal("kept", get(&*client, KEPT)?, 77)?;
    equal("not kept", get(&*client, SCRATCH)?, 0)?;
    equal("recovered", get(&*client, RECOVERED)?, 1)?;
    equal("replays", get(&*client, REPLAYS)?, 0)
}

fn hand_over_is_not_noticed(host: &dyn Host) -> Result<()> {
    const ADDS: u32 = 300;
    let client = host.open()?;
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| (0..ADDS).try_for_each(|_| set(&*client, ADD, 1)));
        for _ in 0..4 {
            host.hand_over()?;
        }
        adding.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    equal("sum", get(&*client, SUM)?, ADDS)
}
