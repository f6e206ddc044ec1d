// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who waits in the module and is stopped, traced or signalled there goes on as if nothing had been.
//!
//! Kills at the same places are in `vanish`, `standby`, `dma_unmap` and `dma_bad`.

use anyhow::{anyhow, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, TRAPPED};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::Bare;
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{sys, time};
use muser_uapi::*;

use super::topic;

topic!("wait", once: [
    standby_stopped_and_continued_takes_over,
    standby_traced_takes_over,
    standby_with_restarting_handler_takes_over,
], roads: [
    client_stopped_while_it_waits_gets_its_answer,
    client_traced_while_it_waits_gets_its_answer,
    process_stopped_and_traced_in_next_loses_nothing,
    process_with_restarting_handler_in_next_loses_nothing,
]);

/// Stops and goes on so often.
const TIMES: u32 = 20;

fn stop_and_continue(process: &Process) -> Result<()> {
    for _ in 0..TIMES {
        process.signal(libc::SIGSTOP)?;
        process.signal(libc::SIGCONT)?;
    }
    Ok(())
}

fn in_standby(node: &Node, wanted: bool) -> Result<()> {
    time::until("the standby coming or going", || {
        node.query()
            .is_ok_and(|query| (query.flags & MUSER_STATE_STANDBY != 0) == wanted)
    })
}

/// A successor that something is done to, and which then takes over.
fn successor(disturb: impl FnOnce(&Process, &Node) -> Result<()>) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let standby = Process::helper(&["standby", mdev.uuid()])?;
    in_standby(server.node(), true)?;
    disturb(&standby, server.node())?;
    in_standby(server.node(), true)?;
    works("detach", server.node().detach())?;
    let watch = Node::open(&mdev)?;
    time::until("the hand-over", || {
        watch
            .query()
            .is_ok_and(|query| query.pid == standby.id().unsigned_abs())
    })
}

fn standby_stopped_and_continued_takes_over() -> Result<()> {
    successor(|standby, node| {
        stop_and_continue(standby)?;
        // One that stays stopped does not wait: nobody could be handed over to.
        standby.signal(libc::SIGSTOP)?;
        in_standby(node, false)?;
        standby.signal(libc::SIGCONT)
    })
}

fn standby_traced_takes_over() -> Result<()> {
    successor(|standby, _| {
        for _ in 0..TIMES {
            works("tracing", sys::trace_stop(standby.id(), || ()))?;
        }
        Ok(())
    })
}

fn standby_with_restarting_handler_takes_over() -> Result<()> {
    sys::catch_signal(libc::SIGUSR1, true)?;
    let Bare { server, mdev } = Bare::new()?;
    let description = Description {
        flags: MUSER_ATTACH_STANDBY,
        ..Description::pci()
    };
    let (send, receive) = std::sync::mpsc::channel();
    process::scope(|scope| {
        let (description, node) = (&description, Node::open(&mdev)?);
        let waiting = scope.spawn(move || {
            // The receiver waits for it.
            let _ = send.send(sys::thread_id());
            node.attach_raw(description).map(|_| node)
        });
        let tid = receive.recv()?;
        in_standby(server.node(), true)?;
        for _ in 0..TIMES {
            sys::kill_thread(tid, libc::SIGUSR1)?;
        }
        in_standby(server.node(), true)?;
        works("detach", server.node().detach())?;
        let node = waiting.join().map_err(|_| anyhow!("it panicked"))??;
        equal("attachments", node.query()?.counters.attachments, 2)
    })
}

/// A client in a process of its own, whose read waits.
fn waiting_client(bare: &Bare, road: Road) -> Result<Process> {
    let offset = "4";
    let arguments = ["client", road.name(), bare.mdev.uuid(), "read", "0", offset];
    let client = Process::helper(&arguments)?;
    client.expect("open")?;
    Ok(client)
}

fn client_stopped_while_it_waits_gets_its_answer(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let mut client = waiting_client(&bare, road)?;
    let request = works("take", bare.server.take())?;
    stop_and_continue(&client)?;
    client.signal(libc::SIGSTOP)?;
    let reply = bare.server.reply_data(request.slot, &[0x2A, 0, 0, 0]);
    works("reply to a client that is stopped", reply)?;
    client.signal(libc::SIGCONT)?;
    client.expect("read 0x2a")?;
    client.wait().map(drop)
}

fn client_traced_while_it_waits_gets_its_answer(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let mut client = waiting_client(&bare, road)?;
    let request = works("take", bare.server.take())?;
    let mut reply = Ok(());
    // It stops when its wait is over.
    let traced = sys::trace_stop(client.id(), || {
        reply = bare.server.reply_data(request.slot, &[0x2A, 0, 0, 0]);
    });
    works("tracing", traced)?;
    works("reply", reply)?;
    client.expect("read 0x2a")?;
    client.wait().map(drop)
}

/// Reads, while something is done to the process that answers.
fn disturbed(road: Road, disturb: impl Fn(&Process) -> Result<()>) -> Result<()> {
    const READS: u64 = 200;
    let mdev = Mdev::create(Type::Pci)?;
    mdev.set_attribute("reattach_timeout_ms", "60000")?;
    let process = Process::helper(&["next", mdev.uuid()])?;
    process.expect("ready")?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    process::scope(|scope| {
        let reading = scope.spawn(|| -> Result<()> {
            for i in 0..READS {
                let value = works("read", client.read_u32(TRAPPED, i * 4))?;
                equal("answer", u64::from(value), i * 4)?;
            }
            Ok(())
        });
        while !reading.is_finished() {
            disturb(&process)?;
        }
        reading.join().map_err(|_| anyhow!("the client panicked"))?
    })?;
    let query = Node::open(&mdev)?.query()?;
    equal("reads", query.counters.reads, READS)?;
    equal(
        "replays, attachments",
        (query.counters.replays, query.counters.attachments),
        (0, 1),
    )
}

fn process_stopped_and_traced_in_next_loses_nothing(road: Road) -> Result<()> {
    disturbed(road, |process| {
        process.signal(libc::SIGSTOP)?;
        process.signal(libc::SIGCONT)?;
        works("tracing", sys::trace_stop(process.id(), || ()))
    })
}

fn process_with_restarting_handler_in_next_loses_nothing(road: Road) -> Result<()> {
    disturbed(road, |process| process.signal(libc::SIGTERM))
}
