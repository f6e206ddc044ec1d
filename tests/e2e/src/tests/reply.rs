// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wrong replies: each has its errno, harms nobody, and leaves the request to be answered rightly.

use std::io;

use anyhow::{Context, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::Mdev;
use muser_e2e::node::{Description, Request, Server, TRAPPED};
use muser_e2e::process;
use muser_e2e::rig::Bare;
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::{muser_next, MUSER_NEXT_REPLY, MUSER_NEXT_TAKE};

use super::topic;

topic!("reply", once: [
    slot_out_of_range_refused,
    id_never_made_refused,
    request_not_taken_refused,
    other_slot_of_same_file_refused,
    bad_result_refused,
    second_reply_refused,
    reply_to_empty_slot_refused,
    garbage_in_the_slot_beside_the_reply_ignored,
    wrong_reply_takes_nothing,
    reply_flag_is_cleared_in_place,
], roads: []);

/// An attached device with a client that waits for a read of [`TRAPPED`], which was taken.
fn with_taken(
    description: &Description,
    act: impl FnOnce(&Server, &Request, &Client, &Mdev) -> Result<()>,
) -> Result<()> {
    let bare = Bare::with(description)?;
    let client = bare.client(Road::Group)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0x40));
        let request = works("take", bare.server.take())?;
        let acted = act(&bare.server, &request, &client, &bare.mdev);
        // Whatever went wrong, the request is still there and can be answered.
        bare.server.set_id(request.slot, request.head.id);
        let answered = bare
            .server
            .reply_data(request.slot, &[0x11, 0x22, 0x33, 0x44]);
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        acted?;
        works("the right reply afterwards", answered)?;
        equal("the client's answer", works("read", value)?, 0x4433_2211)?;
        device_goes_on(&bare.server, &client)
    })
}

fn device_goes_on(server: &Server, client: &Client) -> Result<()> {
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = works("the next take", server.take())?;
        works(
            "the next reply",
            server.reply_data(request.slot, &[9, 0, 0, 0]),
        )?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("the next answer", works("the next read", value)?, 9)
    })
    .context("after the wrong reply")
}

fn reply_with(server: &Server, slot: u32, id: u64, result: i32) -> io::Result<()> {
    server.set_id(slot, id);
    server.reply(slot, result)
}

fn slot_out_of_range_refused() -> Result<()> {
    with_taken(&Description::pci(), |server, _, _, _| {
        for slot in [server.slots(), server.slots() + 1, 1 << 16, u32::MAX] {
            fails(
                &format!("slot {slot}"),
                server.send_reply(slot),
                libc::ENOSPC,
            )?;
        }
        Ok(())
    })
}

fn id_never_made_refused() -> Result<()> {
    with_taken(&Description::pci(), |server, request, _, _| {
        for id in [
            0,
            request.head.id + 1,
            request.head.id + 1000,
            u64::MAX,
            1 << 63,
        ] {
            let result = reply_with(server, request.slot, id, 0);
            fails(&format!("id {id:#x}"), result, libc::ENOENT)?;
        }
        Ok(())
    })
}

/// A request that was taken by a file which then closed is queued again: the file that comes next
/// can't answer it without taking it.
fn request_not_taken_refused() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let client = Client::open(&mdev, Road::Group)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = works("take", server.take())?;
        drop(server);
        let server = Server::attach(&mdev, &Description::pci())?;
        let result = reply_with(&server, 0, request.head.id, 0);
        let judged = fails("replying for the process before", result, libc::ENOMSG);
        let again = works("taking it again", server.take())?;
        equal("its id", again.head.id, request.head.id)?;
        works("replying", server.reply_data(again.slot, &[2, 0, 0, 0]))?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("answer", works("read", value)?, 2)?;
        judged
    })
}

fn other_slot_of_same_file_refused() -> Result<()> {
    with_taken(&Description::pci(), |server, request, _, _| {
        let other = (request.slot + 1) % server.slots();
        let result = reply_with(server, other, request.head.id, 0);
        fails("replying from another slot", result, libc::EBADSLT)
    })
}

fn bad_result_refused() -> Result<()> {
    with_taken(&Description::pci(), |server, request, _, _| {
        for result in [1, 4, i32::MAX, i32::MIN, -4096, -4097] {
            let replied = server.reply(request.slot, result);
            fails(&format!("result {result}"), replied, libc::ERANGE)?;
        }
        Ok(())
    })
}

fn second_reply_refused() -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(Road::Group)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = works("take", bare.server.take())?;
        works("reply", bare.server.reply_data(request.slot, &[3, 0, 0, 0]))?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("answer", works("read", value)?, 3)?;
        let again = reply_with(&bare.server, request.slot, request.head.id, 0);
        fails("the second reply", again, libc::ENOENT)
    })?;
    device_goes_on(&bare.server, &client)
}

fn reply_to_empty_slot_refused() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    for slot in 0..server.slots() {
        fails(
            "reply to an empty slot",
            server.send_reply(slot),
            libc::ENOENT,
        )?;
    }
    Ok(())
}

/// The module wrote the slot's head, and believes only its own record of it: a process can't make
/// it copy other bytes than it asked for.
fn garbage_in_the_slot_beside_the_reply_ignored() -> Result<()> {
    with_taken(&Description::pci(), |server, request, _, _| {
        server.scribble(request.slot);
        // `with_taken` writes the id back, then the data and a result.
        Ok(())
    })
}

fn wrong_reply_takes_nothing() -> Result<()> {
    with_taken(&Description::pci(), |server, request, client, _| {
        process::scope(|scope| {
            let second = scope.spawn(|| client.read_u32(TRAPPED, 0x80));
            time::until("a second request being queued", || {
                server.node().query().is_ok_and(|query| query.queued == 1)
            })?;
            server.set_id(request.slot, u64::MAX);
            let mut next = muser_next {
                size: size_of::<muser_next>() as u32,
                flags: MUSER_NEXT_REPLY | MUSER_NEXT_TAKE,
                slot: request.slot,
                reserved: 0,
            };
            let result = server.node().next(&mut next);
            let judged = fails("a wrong reply with a take", result, libc::ENOENT);
            let queued = server.node().query()?.queued;
            let other = works("taking the second", server.take())?;
            works("replying to it", server.reply_data(other.slot, &[0; 4]))?;
            second
                .join()
                .map_err(|_| anyhow::anyhow!("the client panicked"))??;
            equal("queued after it", queued, 1)?;
            judged
        })
    })
}

fn reply_flag_is_cleared_in_place() -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(Road::Group)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = works("take", bare.server.take())?;
        bare.server.set_data(request.slot, &[5, 0, 0, 0]);
        bare.server.set_result(request.slot, 0);
        let mut next = muser_next {
            size: size_of::<muser_next>() as u32,
            flags: MUSER_NEXT_REPLY | MUSER_NEXT_TAKE | muser_uapi::MUSER_NEXT_NONBLOCK,
            slot: request.slot,
            reserved: 0,
        };
        fails(
            "reply, then no request",
            bare.server.node().next(&mut next),
            libc::EAGAIN,
        )?;
        equal("REPLY in the flags", next.flags & MUSER_NEXT_REPLY, 0)?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("answer", works("read", value)?, 5)
    })
}
