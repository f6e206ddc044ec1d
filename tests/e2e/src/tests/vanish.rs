// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients and processes that are killed in the middle of a request.

use std::time::Instant;

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Server, TRAPPED};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::Bare;
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::{MUSER_REQUEST_CLOSE, MUSER_REQUEST_REPLAY, MUSER_REQUEST_RESET};

use super::topic;

topic!("vanish", once: [], roads: [
    client_killed_before_its_request_is_taken,
    client_killed_while_its_request_is_taken,
    client_killed_with_nobody_attached,
    client_killed_in_reset,
    process_killed_with_nobody_after_it_times_out,
    process_killed_and_replaced_answers_the_same_request,
    process_closed_its_file_replays_too,
    replays_keep_their_order,
    request_before_any_process_waits_for_one,
    timeout_is_counted_and_device_goes_on,
    process_killed_with_device_idle_notices_nobody,
    process_killed_a_hundred_times,
]);

const REGION: &str = "0";

/// A killed client is gone when its files are; then its close is announced.
fn wait_for_close(server: &Server) -> Result<()> {
    let request = works("taking the close", server.take())?;
    equal("kind", request.head.kind, MUSER_REQUEST_RESET)?;
    equal(
        "flags",
        request.head.flags & MUSER_REQUEST_CLOSE,
        MUSER_REQUEST_CLOSE,
    )?;
    works("replying to the close", server.reply(request.slot, 0))
}

fn goes_on(server: &Server, mdev: &Mdev, road: Road) -> Result<()> {
    let client = works("the next client", Client::open(mdev, road))?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = works("the next take", server.take())?;
        equal("offset of the next request", request.head.offset, 0)?;
        works(
            "the next reply",
            server.reply_data(request.slot, &[7, 0, 0, 0]),
        )?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("the next answer", works("read", value)?, 7)
    })
}

fn waiting_client(mdev: &Mdev, road: Road) -> Result<Process> {
    let client = Process::helper(&["client", road.name(), mdev.uuid(), "read", REGION, "64"])?;
    client.expect("open")?;
    Ok(client)
}

fn queued(server: &Server, count: u32) -> Result<()> {
    time::until("the request being queued", || {
        server
            .node()
            .query()
            .is_ok_and(|query| query.queued == count)
    })
}

fn client_killed_before_its_request_is_taken(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let mut client = waiting_client(&mdev, road)?;
    queued(&server, 1)?;
    client.kill()?;
    wait_for_close(&server)?;
    fails(
        "taking the killed client's request",
        server.try_take(),
        libc::EAGAIN,
    )?;
    equal("withdrawn", server.node().query()?.counters.withdrawn, 1)?;
    goes_on(&server, &mdev, road)
}

fn client_killed_while_its_request_is_taken(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let mut client = waiting_client(&mdev, road)?;
    let request = works("take", server.take())?;
    client.kill()?;
    let late = server.reply_data(request.slot, &[1; 4]);
    fails("the late reply", late, libc::ECANCELED)?;
    let again = server.reply(request.slot, 0);
    fails("the same once more", again, libc::ENOENT)?;
    wait_for_close(&server)?;
    goes_on(&server, &mdev, road)
}

fn client_killed_with_nobody_attached(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    mdev.set_attribute("reattach_timeout_ms", "3600000")?;
    drop(server);
    let mut client = waiting_client(&mdev, road)?;
    client.wait_for_sleep()?;
    client.kill()?;
    let server = Server::attach(&mdev, &Description::pci())?;
    wait_for_close(&server)?;
    goes_on(&server, &mdev, road)
}

fn client_killed_in_reset(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let mut client = Process::helper(&["client", road.name(), mdev.uuid(), "reset"])?;
    client.expect("open")?;
    let request = works("take", server.take())?;
    equal(
        "kind, flags",
        (request.head.kind, request.head.flags),
        (MUSER_REQUEST_RESET, 0),
    )?;
    client.kill()?;
    fails(
        "the late reply",
        server.reply(request.slot, 0),
        libc::ECANCELED,
    )?;
    wait_for_close(&server)?;
    goes_on(&server, &mdev, road)
}

/// A device with a process of its own that takes the client's request and holds it; in the order
/// in whose reverse they must go.
fn held(road: Road, timeout_ms: &str) -> Result<(Mdev, Process, Client)> {
    let mdev = Mdev::create(Type::Pci)?;
    mdev.set_attribute("reattach_timeout_ms", timeout_ms)?;
    let process = Process::helper(&["hold", mdev.uuid(), "1"])?;
    process.expect("ready")?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    Ok((mdev, process, client))
}

fn process_killed_with_nobody_after_it_times_out(road: Road) -> Result<()> {
    let (_mdev, mut process, client) = held(road, "200")?;
    process::scope(|scope| {
        let reader = scope.spawn(|| {
            let value = client.read_u32(TRAPPED, 64);
            (value, Instant::now())
        });
        let taken = process.line()?;
        ensure!(taken.starts_with("taken"), "the process wrote {taken:?}");
        process.kill()?;
        let killed = Instant::now();
        let (value, at) = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        fails("the client's read", value, libc::ETIMEDOUT)?;
        let waited = at.saturating_duration_since(killed);
        ensure!(
            waited < time::patience(),
            "the client waited {waited:?} for 200 ms"
        );
        Ok(())
    })
}

fn replaced(road: Road, leave: impl FnOnce(&mut Process) -> Result<()>) -> Result<()> {
    let (mdev, mut process, client) = held(road, "60000")?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 64));
        let taken = process.line()?;
        leave(&mut process)?;
        let server = Server::attach(&mdev, &Description::pci())?;
        let request = works("taking the replay", server.take())?;
        let head = request.head;
        equal("taken before", taken, format!("taken {} 0", head.id))?;
        equal("flags", head.flags, MUSER_REQUEST_REPLAY)?;
        equal(
            "region, offset, count",
            (head.region, head.offset, head.count),
            (0, 64, 4),
        )?;
        works(
            "reply",
            server.reply_data(request.slot, &[0xD, 0xC, 0xB, 0xA]),
        )?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("the client's answer", works("read", value)?, 0x0A0B_0C0D)?;
        equal("replays", server.node().query()?.counters.replays, 1)
    })
}

fn process_killed_and_replaced_answers_the_same_request(road: Road) -> Result<()> {
    replaced(road, Process::kill)
}

fn process_closed_its_file_replays_too(road: Road) -> Result<()> {
    replaced(road, |process| {
        process.close_input();
        process.wait().map(drop)
    })
}

/// Requests taken and put back come before those that were never taken, in their first order.
fn replays_keep_their_order(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let client = Client::open(&mdev, road)?;
    process::scope(|scope| {
        let mut readers = Vec::new();
        for i in 0..6u64 {
            let client = &client;
            readers.push(scope.spawn(move || client.read_u32(TRAPPED, i * 4)));
            time::until("the request being queued", || {
                server
                    .node()
                    .query()
                    .is_ok_and(|query| query.queued == i as u32 + 1)
            })?;
        }
        // Three are taken, of which the second is answered.
        let taken = [
            works("take", server.take())?,
            works("take", server.take())?,
            works("take", server.take())?,
        ];
        works(
            "reply",
            server.reply_data(taken[1].slot, &4u32.to_le_bytes()),
        )?;
        drop(server);
        let server = Server::attach(&mdev, &Description::pci())?;
        let mut seen = Vec::new();
        for _ in 0..5 {
            let request = works("take", server.take())?;
            seen.push((request.head.offset, request.head.flags));
            let data = (request.head.offset as u32).to_le_bytes();
            works("reply", server.reply_data(request.slot, &data))?;
        }
        let replay = MUSER_REQUEST_REPLAY;
        equal(
            "order",
            seen,
            vec![(0, replay), (8, replay), (12, 0), (16, 0), (20, 0)],
        )?;
        for (i, reader) in readers.into_iter().enumerate() {
            let value = reader
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?;
            equal("answer", works("read", value)?, i as u32 * 4)?;
        }
        Ok(())
    })
}

fn request_before_any_process_waits_for_one(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    mdev.set_attribute("reattach_timeout_ms", "60000")?;
    drop(server);
    let client = Client::open(&mdev, road)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 4));
        let watch = muser_e2e::node::Node::open(&mdev)?;
        time::until("the request being queued", || {
            watch.query().is_ok_and(|query| query.queued == 1)
        })?;
        let server = Server::attach(&mdev, &Description::pci())?;
        let request = works("take", server.take())?;
        equal("flags of a request never taken", request.head.flags, 0)?;
        works("reply", server.reply_data(request.slot, &[6, 0, 0, 0]))?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("answer", works("read", value)?, 6)
    })
}

fn timeout_is_counted_and_device_goes_on(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    mdev.set_attribute("reattach_timeout_ms", "20")?;
    drop(server);
    let client = Client::open(&mdev, road)?;
    fails("read", client.read_u32(TRAPPED, 0), libc::ETIMEDOUT)?;
    fails("write", client.write_all(TRAPPED, 0, &[1]), libc::ETIMEDOUT)?;
    fails("reset", client.reset(), libc::ETIMEDOUT)?;
    drop(client);
    let server = Server::attach(&mdev, &Description::pci())?;
    equal("timeouts", server.node().query()?.counters.timeouts, 3)?;
    wait_for_close(&server)?;
    goes_on(&server, &mdev, road)
}

fn process_killed_with_device_idle_notices_nobody(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let serve = || -> Result<Process> {
        let process = Process::helper(&["serve", mdev.uuid()])?;
        process.expect("ready")?;
        Ok(process)
    };
    let mut process = serve()?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    works("read", client.read_u32(TRAPPED, 0))?;
    process.kill()?;
    let _process = serve()?;
    works("read from the next process", client.read_u32(TRAPPED, 0)).map(drop)
}

fn process_killed_a_hundred_times(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    mdev.set_attribute("reattach_timeout_ms", "60000")?;
    drop(Server::attach(&mdev, &Description::pci())?);
    let client = works("opening the client", Client::open(&mdev, road))?;
    process::scope(|scope| {
        let reading = scope.spawn(|| -> Result<()> {
            for i in 0..100u64 {
                works("read", client.read_u32(TRAPPED, i * 4))?;
            }
            Ok(())
        });
        let mut kills = 0;
        while !reading.is_finished() {
            // Each takes one request to its grave; its successor answers that one and takes the
            // next: so every request is replayed once.
            let mut process = Process::helper(&["hold", mdev.uuid(), "1"])?;
            process.expect("ready")?;
            process.expect_containing("taken")?;
            process.kill()?;
            kills += 1;
            let server = Server::attach(&mdev, &Description::pci())?;
            let request = works("take", server.take())?;
            equal("flags", request.head.flags, MUSER_REQUEST_REPLAY)?;
            works("reply", server.reply_data(request.slot, &[0; 4]))?;
            if kills == 100 {
                break;
            }
        }
        reading
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))??;
        equal("kills", kills, 100)
    })
}
