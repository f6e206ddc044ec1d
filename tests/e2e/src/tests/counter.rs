// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The counter sample as it is shipped, killed and started again, and replaced while it runs.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::Node;
use muser_e2e::process::{self, Process};
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::MUSER_STATE_STANDBY;

use super::topic;
use crate::runner::Test;

topic!("counter", once: [
    help_tells_the_options,
    print_capabilities_shows_the_device,
    threads_out_of_range_refused,
    absent_device_refused_in_standby_as_well,
    sigterm_ends_it_cleanly,
], roads: [
    lanes_count,
    bell_reads_back,
    bell_rung_with_nobody_there_is_not_lost,
    killed_between_accesses_goes_on,
    killed_under_load_counts_once,
    killed_under_load_with_threads_counts_once,
    successor_takes_over_under_load,
    killed_standby_leaves_no_trace,
    second_standby_refused,
]);

/// The tests, for a guest that has the program.
pub(super) fn where_installed() -> Vec<Test> {
    tests()
        .into_iter()
        .map(|test| test.needs(|| super::missing("counter")))
        .collect()
}

const BAR0: u32 = 0;
const ADD: u64 = 0x00;
const VALUE: u64 = 0x08;
const FETCH_ADD: u64 = 0x10;
const BELL: u64 = 0x28;
const DOORBELLS: u64 = 0x1000;

fn start(mdev: &Mdev, more: &[&str]) -> Result<Process> {
    let mut command = Command::new("counter");
    command.args(["--uuid", mdev.uuid()]).args(more);
    Process::start(&mut command)
}

fn serve(mdev: &Mdev, more: &[&str]) -> Result<Process> {
    let process = start(mdev, more)?;
    process.expect_containing("serves")?;
    Ok(process)
}

fn read(client: &Client, lane: u64, register: u64) -> Result<u64> {
    let size = if register == BELL { 4 } else { 8 };
    let bytes = works(
        "register read",
        client.read_vec(BAR0, lane * 0x40 + register, size),
    )?;
    let mut value = [0; 8];
    value[..bytes.len()].copy_from_slice(&bytes);
    Ok(u64::from_le_bytes(value))
}

fn add(client: &Client, lane: u64, value: u32) -> Result<()> {
    let register = lane * 0x40 + ADD;
    works(
        "ADD",
        client.write_all(BAR0, register, &value.to_le_bytes()),
    )
}

fn ring(client: &Client, lane: u64, value: u32) -> Result<()> {
    let register = DOORBELLS + lane * 4;
    works(
        "doorbell",
        client.write_all(BAR0, register, &value.to_le_bytes()),
    )
}

/// A device, the program on it, and a client: dropped from the last on, nothing has to wait.
fn counter(road: Road, more: &[&str]) -> Result<(Mdev, Process, Client)> {
    let mdev = Mdev::create(Type::Pci)?;
    let process = serve(&mdev, more)?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    Ok((mdev, process, client))
}

fn lanes_count(road: Road) -> Result<()> {
    let (_mdev, _process, client) = counter(road, &[])?;
    for lane in 0..16 {
        add(&client, lane, 5)?;
        equal("FETCH_ADD", read(&client, lane, FETCH_ADD)?, 5)?;
        equal("VALUE", read(&client, lane, VALUE)?, 6)?;
    }
    works("reset", client.reset())?;
    equal("VALUE after a reset", read(&client, 3, VALUE)?, 0)
}

fn bell_reads_back(road: Road) -> Result<()> {
    let (_mdev, _process, client) = counter(road, &[])?;
    for value in [7, 0, u32::MAX] {
        ring(&client, 9, value)?;
        equal("BELL", read(&client, 9, BELL)?, value.into())?;
        equal("BELL of another lane", read(&client, 8, BELL)?, 0)?;
    }
    Ok(())
}

fn bell_rung_with_nobody_there_is_not_lost(road: Road) -> Result<()> {
    let (mdev, mut process, client) = counter(road, &[])?;
    process.kill()?;
    // Nobody serves, and still this does not wait.
    ring(&client, 1, 0xBE11)?;
    let _process = serve(&mdev, &[])?;
    equal("BELL", read(&client, 1, BELL)?, 0xBE11)
}

fn killed_between_accesses_goes_on(road: Road) -> Result<()> {
    let (mdev, mut process, client) = counter(road, &[])?;
    let address = 0x1234_5678_9ABC_u64.to_le_bytes();
    works("ADDRESS", client.write_all(BAR0, 0x18, &address))?;
    for round in 0..5 {
        equal("FETCH_ADD", read(&client, 0, FETCH_ADD)?, round)?;
        process.kill()?;
        process = serve(&mdev, &[])?;
    }
    equal("ADDRESS", read(&client, 0, 0x18)?, 0x1234_5678_9ABC)
}

const KILLS: u32 = 12;

/// Counts from two threads, while `disturb` does that many times what it does. Nothing is lost or
/// doubled.
fn count_while(client: &Client, mut disturb: impl FnMut(u32) -> Result<()>) -> Result<()> {
    let over = AtomicBool::new(false);
    process::scope(|scope| {
        let adding = scope.spawn(|| {
            let mut sum = 0;
            while !over.load(Ordering::SeqCst) {
                add(client, 0, 3)?;
                sum += 3;
            }
            anyhow::Ok(sum)
        });
        let fetching = scope.spawn(|| {
            let mut expected = 0;
            while !over.load(Ordering::SeqCst) {
                equal("FETCH_ADD", read(client, 1, FETCH_ADD)?, expected)?;
                expected += 1;
            }
            anyhow::Ok(expected)
        });
        for round in 0..KILLS {
            disturb(round)?;
        }
        over.store(true, Ordering::SeqCst);
        let sums = [adding, fetching].map(|thread| thread.join().ok().context("it panicked"));
        let [added, fetched] = sums;
        let (added, fetched) = (added??, fetched??);
        ensure!(added > 0 && fetched > 0, "nothing was counted");
        println!("{KILLS} times: {added} added, {fetched} fetched");
        equal("what was added", read(client, 0, VALUE)?, added)?;
        equal("what was fetched", read(client, 1, VALUE)?, fetched)
    })
}

fn kill_under_load(road: Road, more: &[&str]) -> Result<()> {
    let (mdev, mut process, client) = counter(road, more)?;
    count_while(&client, |_| {
        // Accesses are made all the time: they are cut short wherever they are.
        process.kill()?;
        process = serve(&mdev, more)?;
        Ok(())
    })
}

fn killed_under_load_counts_once(road: Road) -> Result<()> {
    kill_under_load(road, &[])
}

fn killed_under_load_with_threads_counts_once(road: Road) -> Result<()> {
    kill_under_load(road, &["--threads", "4"])
}

fn successor_takes_over_under_load(road: Road) -> Result<()> {
    let (mdev, mut process, client) = counter(road, &["--threads", "2"])?;
    count_while(&client, |_| {
        let next = serve(&mdev, &["--threads", "2", "--take-over"])?;
        let mut before = std::mem::replace(&mut process, next);
        before.expect_containing("taken the device over")?;
        equal("exit code", before.wait()?.code(), Some(0))
    })
}

/// Starts one that waits: the one that serves is stopped, so that it doesn't hand over.
fn start_standby(mdev: &Mdev, serving: &Process) -> Result<Process> {
    let node = works("opening the node", Node::open(mdev))?;
    serving.signal(libc::SIGSTOP)?;
    let standby = start(mdev, &["--take-over"])?;
    time::until("a standby waiting", || {
        let query = node.query();
        query.is_ok_and(|query| query.flags & MUSER_STATE_STANDBY != 0)
    })?;
    Ok(standby)
}

fn killed_standby_leaves_no_trace(road: Road) -> Result<()> {
    let (mdev, process, client) = counter(road, &[])?;
    add(&client, 0, 1)?;
    let mut standby = start_standby(&mdev, &process)?;
    standby.signal(libc::SIGTERM)?;
    ensure!(!standby.wait()?.success(), "SIGTERM did not end it");
    process.signal(libc::SIGCONT)?;
    equal("VALUE", read(&client, 0, VALUE)?, 1)?;
    let said = process.drain();
    ensure!(said.is_empty(), "the one that serves said {said:?}");
    Ok(())
}

fn second_standby_refused(road: Road) -> Result<()> {
    let (mdev, process, _client) = counter(road, &[])?;
    let standby = start_standby(&mdev, &process)?;
    let output = process::run("counter", &["--uuid", mdev.uuid(), "--take-over"])?;
    equal("exit code", output.code, 3)?;
    let said = output.stderr;
    ensure!(said.contains("standby already"), "it said {said:?}");
    // Without the option it is refused as ever.
    let output = process::run("counter", &["--uuid", mdev.uuid()])?;
    equal("exit code", output.code, 3)?;
    process.signal(libc::SIGCONT)?;
    standby.expect_containing("serves").map(drop)
}

fn sigterm_ends_it_cleanly() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    for (threads, signal) in [("1", libc::SIGTERM), ("4", libc::SIGINT)] {
        let mut process = serve(&mdev, &["--threads", threads])?;
        process.signal(signal)?;
        equal("exit code", process.wait()?.code(), Some(0))?;
    }
    Ok(())
}

fn help_tells_the_options() -> Result<()> {
    let help = process::succeed("counter", &["--help"])?;
    for part in [
        "--uuid",
        "--take-over",
        "--threads",
        "SIGTERM",
        "EXIT STATUS",
    ] {
        ensure!(help.contains(part), "--help lacks {part:?}: {help}");
    }
    Ok(())
}

fn print_capabilities_shows_the_device() -> Result<()> {
    let said = process::succeed("counter", &["--print-capabilities"])?;
    for part in ["\"0xc047\"", "\"doorbells\"", "\"state\": 256"] {
        ensure!(
            said.contains(part),
            "--print-capabilities lacks {part:?}: {said}"
        );
    }
    Ok(())
}

fn threads_out_of_range_refused() -> Result<()> {
    let uuid = muser_e2e::mdev::random_uuid()?;
    for threads in ["0", "256", "-1", "many"] {
        let output = process::run("counter", &["--uuid", &uuid, "--threads", threads])?;
        equal("exit code", output.code, 2)?;
    }
    Ok(())
}

fn absent_device_refused_in_standby_as_well() -> Result<()> {
    let uuid = muser_e2e::mdev::random_uuid()?;
    let output = process::run("counter", &["--uuid", &uuid, "--take-over"])?;
    equal("exit code", output.code, 3)
}
