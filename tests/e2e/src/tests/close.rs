// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reset by the client, and the reset that its close is.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::{Description, Node, Server, TRAPPED};
use muser_e2e::process;
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::service::Reply;
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::{MUSER_REQUEST_CLOSE, MUSER_REQUEST_RESET, MUSER_STATE_CLIENT};

use super::topic;

topic!("close", once: [], roads: [
    last_close_sends_a_reset_that_nobody_waits_for,
    close_with_no_process_attached_does_not_wait,
    close_is_told_to_the_next_process,
    many_closes_without_a_process_do_not_pile_up,
    duplicated_descriptor_closes_once,
    open_and_close_hundred_times,
    reset_reaches_the_process_and_waits,
    error_of_reset_reaches_client,
    state_of_client_is_seen,
]);

fn is_close(request: &muser_e2e::node::Request) -> bool {
    let head = &request.head;
    head.kind == MUSER_REQUEST_RESET && head.flags & MUSER_REQUEST_CLOSE != 0
}

fn last_close_sends_a_reset_that_nobody_waits_for(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    fails(
        "take with an open client",
        bare.server.try_take(),
        libc::EAGAIN,
    )?;
    // Nobody serves: if close waited, this would hang.
    drop(client);
    let request = works("take", bare.server.take())?;
    ensure!(is_close(&request), "not a close: {:?}", request.head);
    works("reply", bare.server.reply(request.slot, 0))
}

fn close_with_no_process_attached_does_not_wait(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    mdev.set_attribute("reattach_timeout_ms", "3600000")?;
    drop(server);
    drop(Client::open(&mdev, road)?);
    works("remove", mdev.remove())
}

fn close_is_told_to_the_next_process(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    drop(server);
    drop(Client::open(&mdev, road)?);
    let server = Server::attach(&mdev, &Description::pci())?;
    let request = works("take", server.take())?;
    ensure!(is_close(&request), "not a close: {:?}", request.head);
    works("reply", server.reply(request.slot, 0))
}

fn many_closes_without_a_process_do_not_pile_up(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    drop(server);
    for _ in 0..50 {
        drop(works("opening", Client::open(&mdev, road))?);
    }
    let node = Node::open(&mdev)?;
    let queued = node.query()?.queued;
    // One reset says as much as fifty; a few would do no harm, one each is a leak.
    ensure!(
        (1..50).contains(&queued),
        "{queued} requests are queued after 50 closes"
    );
    Ok(())
}

fn duplicated_descriptor_closes_once(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    let duplicate = client.file().try_clone()?;
    let mapped = client.map(2, 0, 4096)?;
    drop(client);
    drop(mapped);
    let watched = muser_e2e::sys::poll(bare.server.node(), libc::POLLIN, time::quiet())?;
    equal("events with a descriptor left", watched, 0)?;
    drop(duplicate);
    let request = works("take", bare.server.take())?;
    ensure!(is_close(&request), "not a close: {:?}", request.head);
    works("reply", bare.server.reply(request.slot, 0))
}

fn open_and_close_hundred_times(road: Road) -> Result<()> {
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    drop(client);
    for round in 0..100 {
        let client = works("opening", Client::open(&mdev, road))?;
        let value = works("read", client.read_u32(TRAPPED, 0))?;
        equal(&format!("value in round {round}"), value, 0)?;
        client.write_all(TRAPPED, 0, &[1])?;
    }
    time::until("the last close being served", || {
        server
            .node()
            .query()
            .is_ok_and(|query| query.queued + query.taken == 0)
    })?;
    let closes = service
        .record()
        .drain()
        .iter()
        .filter(|request| is_close(request))
        .count();
    equal("closes served", closes, 101)
}

fn reset_reaches_the_process_and_waits(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    process::scope(|scope| {
        let resetting = scope.spawn(|| client.reset());
        let request = works("take", bare.server.take())?;
        let head = request.head;
        equal(
            "kind, flags",
            (head.kind, head.flags),
            (MUSER_REQUEST_RESET, 0),
        )?;
        ensure!(
            !resetting.is_finished(),
            "the reset did not wait for the process"
        );
        works("reply", bare.server.reply(request.slot, 0))?;
        let reset = resetting
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        works("reset", reset)
    })
}

fn error_of_reset_reaches_client(road: Road) -> Result<()> {
    let handler = |request: &muser_e2e::node::Request| match request.head.kind {
        MUSER_REQUEST_RESET if !is_close(request) => Reply::Error(libc::EIO),
        _ => Reply::Data(vec![0; request.head.count as usize]),
    };
    let rig = Rig::serving(road, &Description::pci(), 1, handler)?;
    fails("reset", rig.client.reset(), libc::EIO)?;
    works("a read afterwards", rig.client.read_u32(TRAPPED, 0)).map(drop)
}

fn state_of_client_is_seen(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let state = || -> Result<u32> { Ok(bare.server.node().query()?.flags & MUSER_STATE_CLIENT) };
    equal("state before", state()?, 0)?;
    let client = bare.client(road)?;
    equal("state with a client", state()?, MUSER_STATE_CLIENT)?;
    drop(client);
    works("taking the close", bare.server.take())?;
    equal("state after", state()?, 0)
}
