// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A reset is a barrier: a process has it alone, after all that came before and before all that
//! came after.

use std::sync::mpsc;

use anyhow::{anyhow, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::{Description, Request, Server, TRAPPED};
use muser_e2e::process;
use muser_e2e::rig::Bare;
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{sys, time};
use muser_uapi::*;

use super::topic;

topic!("barrier", once: [], roads: [
    reset_waits_for_all_that_is_taken,
    nothing_is_taken_beside_a_reset,
    end_of_a_reset_wakes_every_waiting_thread,
    reset_of_a_process_that_died_stays_a_barrier,
    late_reply_of_a_killed_client_frees_the_reset,
]);

fn queued(server: &Server, count: u32) -> Result<()> {
    time::until("the requests being queued", || {
        let query = server.node().query();
        query.is_ok_and(|query| query.queued == count)
    })
}

/// Nothing can be taken, and poll knows.
fn kept_back(server: &Server) -> Result<()> {
    let events = sys::poll(server.node(), libc::POLLIN, time::quiet())?;
    equal("events", events, 0)?;
    fails("take", server.try_take(), libc::EAGAIN)
}

fn kind(request: &Request) -> u32 {
    request.head.kind
}

fn reply(server: &Server, request: &Request) -> Result<()> {
    works("reply", server.reply(request.slot, 0))
}

fn reset_waits_for_all_that_is_taken(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    let server = &bare.server;
    process::scope(|scope| {
        let reads = [0, 4].map(|offset| {
            scope.spawn({
                let client = &client;
                move || client.read_u32(TRAPPED, offset)
            })
        });
        let taken = [works("take", server.take())?, works("take", server.take())?];
        let reset = scope.spawn(|| client.reset());
        queued(server, 1)?;
        kept_back(server)?;
        reply(server, &taken[1])?;
        kept_back(server)?;
        reply(server, &taken[0])?;
        // `take` polls first: the last reply has made it ready.
        let last = works("taking the reset", server.take())?;
        equal("kind", kind(&last), MUSER_REQUEST_RESET)?;
        reply(server, &last)?;
        works(
            "reset",
            reset.join().map_err(|_| anyhow!("the client panicked"))?,
        )?;
        for read in reads {
            works(
                "read",
                read.join().map_err(|_| anyhow!("the client panicked"))?,
            )?;
        }
        Ok(())
    })
}

fn nothing_is_taken_beside_a_reset(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    let server = &bare.server;
    process::scope(|scope| {
        let reset = scope.spawn(|| client.reset());
        let taken = works("taking the reset", server.take())?;
        equal("kind", kind(&taken), MUSER_REQUEST_RESET)?;
        let read = scope.spawn(|| client.read_u32(TRAPPED, 8));
        queued(server, 1)?;
        kept_back(server)?;
        reply(server, &taken)?;
        let next = works("taking the read", server.take())?;
        equal("kind", kind(&next), MUSER_REQUEST_READ)?;
        reply(server, &next)?;
        works(
            "reset",
            reset.join().map_err(|_| anyhow!("the client panicked"))?,
        )?;
        works(
            "read",
            read.join().map_err(|_| anyhow!("the client panicked"))?,
        )
        .map(drop)
    })
}

/// One reply makes room for many threads, each of which must hear of it.
fn end_of_a_reset_wakes_every_waiting_thread(road: Road) -> Result<()> {
    const THREADS: u64 = 6;
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    let server = &bare.server;
    process::scope(|scope| {
        let reset = scope.spawn(|| client.reset());
        let taken = works("taking the reset", server.take())?;
        let (send, receive) = mpsc::channel();
        for _ in 0..THREADS {
            let send = send.clone();
            scope.spawn(move || {
                // The receiver may have given up.
                let _ = send.send(server.take_with(0));
            });
        }
        let reads: Vec<_> = (0..THREADS)
            .map(|i| {
                let client = &client;
                scope.spawn(move || client.read_u32(TRAPPED, i * 4))
            })
            .collect();
        queued(server, THREADS as u32)?;
        equal("taken", server.node().query()?.taken, 1)?;
        reply(server, &taken)?;
        let mut requests = Vec::new();
        for _ in 0..THREADS {
            requests.push(works("take", receive.recv_timeout(time::patience())?)?);
        }
        for request in &requests {
            reply(server, request)?;
        }
        for read in reads {
            works(
                "read",
                read.join().map_err(|_| anyhow!("the client panicked"))?,
            )?;
        }
        works(
            "reset",
            reset.join().map_err(|_| anyhow!("the client panicked"))?,
        )
    })
}

fn reset_of_a_process_that_died_stays_a_barrier(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    mdev.set_attribute("reattach_timeout_ms", "60000")?;
    let client = works("opening", Client::open(&mdev, road))?;
    process::scope(|scope| {
        let reset = scope.spawn(|| client.reset());
        works("taking the reset", server.take())?;
        let read = scope.spawn(|| client.read_u32(TRAPPED, 8));
        queued(&server, 1)?;
        drop(server);
        let server = Server::attach(&mdev, &Description::pci())?;
        let replay = works("taking the reset again", server.take())?;
        let head = &replay.head;
        equal(
            "kind, flags",
            (head.kind, head.flags),
            (MUSER_REQUEST_RESET, MUSER_REQUEST_REPLAY),
        )?;
        kept_back(&server)?;
        reply(&server, &replay)?;
        let next = works("taking the read", server.take())?;
        equal("flags", next.head.flags, 0)?;
        reply(&server, &next)?;
        works(
            "reset",
            reset.join().map_err(|_| anyhow!("the client panicked"))?,
        )?;
        works(
            "read",
            read.join().map_err(|_| anyhow!("the client panicked"))?,
        )
        .map(drop)
    })
}

/// The process still works on what nobody waits for: the reset behind it waits for the late reply.
fn late_reply_of_a_killed_client_frees_the_reset(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let words = ["client", road.name(), mdev.uuid(), "read", "0", "64"];
    let mut client = process::Process::helper(&words)?;
    client.expect("open")?;
    let taken = works("take", server.take())?;
    client.kill()?;
    // Its close resets the device.
    queued(&server, 1)?;
    kept_back(&server)?;
    fails(
        "the late reply",
        server.reply(taken.slot, 0),
        libc::ECANCELED,
    )?;
    let reset = works("taking the reset", server.take())?;
    equal("flags", reset.head.flags, MUSER_REQUEST_CLOSE)?;
    reply(&server, &reset)
}
