// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's state: memory for what a process wants its successor to find, whoever the client is.

use std::ops::Range;

use anyhow::{anyhow, bail, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, Server};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::Bare;
use muser_e2e::sys::{Mapping, PAGE};
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::*;

use super::topic;

topic!("state", once: [
    starts_zeroed_and_as_large_as_asked,
    survives_a_killed_process,
    successor_may_ask_for_more_and_never_gets_less,
    interrupted_standby_does_not_make_it_grow,
    beyond_max_state_refused,
    lowered_max_state_takes_nothing_away,
    mapping_beyond_it_refused,
    is_counted_page_by_page,
    is_gone_with_the_device,
    first_tag_stays,
], roads: [
    client_close_leaves_it,
    client_cannot_map_it,
]);

fn asking(state_size: u32) -> Description {
    Description {
        state_size,
        ..Description::pci()
    }
}

fn size(server: &Server) -> Result<u32> {
    Ok(server.node().query()?.state_size)
}

fn starts_zeroed_and_as_large_as_asked() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let node = Node::open(&mdev)?;
    let answer = node.attach_raw(&asking(10_000))?;
    equal("state_size", answer.state_size, 10_000)?;
    equal("in the query", node.query()?.state_size, 10_000)?;
    let state = works("mapping it", node.map_state(0, 3 * PAGE))?;
    let zero = state.read_bytes(0, 3 * PAGE).iter().all(|&byte| byte == 0);
    equal("zeroed", zero, true)
}

fn survives_a_killed_process() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut process = Process::helper(&["state", mdev.uuid(), "4096", "24", "77"])?;
    process.expect("0")?;
    process.kill()?;
    let server = Server::attach(&mdev, &asking(4096))?;
    let state = works("mapping it", server.node().map_state(0, PAGE))?;
    equal("what the first left", state.read::<u32>(24), 77)?;
    state.write(24, 78u32);
    drop(server);
    drop(state);
    let process = Process::helper(&["state", mdev.uuid(), "4096", "24", "79"])?;
    process.expect("78")
}

fn successor_may_ask_for_more_and_never_gets_less() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    for (asked, given) in [
        (0, 0),
        (100, 100),
        (0, 100),
        (99, 100),
        (5000, 5000),
        (1, 5000),
    ] {
        let answer = Node::open(&mdev)?.attach_raw(&asking(asked))?;
        equal(
            &format!("state_size when asking for {asked}"),
            answer.state_size,
            given,
        )?;
    }
    Ok(())
}

fn interrupted_standby_does_not_make_it_grow() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &asking(4096))?;
    let mut standby = Process::helper(&["standby", mdev.uuid(), "65536"])?;
    let is_there = |there: bool| {
        time::until("the standby coming or going", || {
            let query = server.node().query();
            query.is_ok_and(|query| (query.flags & MUSER_STATE_STANDBY != 0) == there)
        })
    };
    is_there(true)?;
    equal("while one waits who wants more", size(&server)?, 4096)?;
    standby.kill()?;
    is_there(false)?;
    equal("after it was killed", size(&server)?, 4096)?;
    process::scope(|scope| {
        let successor = Description {
            flags: MUSER_ATTACH_STANDBY,
            ..asking(65536)
        };
        let mdev = &mdev;
        let waiting = scope.spawn(move || Server::attach(mdev, &successor));
        is_there(true)?;
        works("detach", server.node().detach())?;
        let server = waiting.join().map_err(|_| anyhow!("it panicked"))??;
        equal("after it took over", size(&server)?, 65536)
    })
}

/// Attaches with a tag and goes away: the fault, if it was refused.
fn attach_tagged(mdev: &Mdev, state_tag: u64) -> Result<Option<(i32, u32, u32)>> {
    let description = Description {
        state_tag,
        ..Description::pci()
    };
    let answer = Node::open(mdev)?.attach_raw(&description);
    let refusal = answer.err();
    Ok(refusal.map(|refusal| (refusal.errno, refusal.fault, refusal.fault_index)))
}

fn first_tag_stays() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let differs = Some((libc::ESTALE, MUSER_FAULT_STATE_DIFFERS, 0));
    // One without an opinion leaves the choice to the next.
    for (tag, answer) in [
        (0, None),
        (1 << 63, None),
        (1, differs),
        (0, None),
        (u64::MAX, differs),
        (1 << 63, None),
    ] {
        equal(&format!("tag {tag:#x}"), attach_tagged(&mdev, tag)?, answer)?;
    }
    let other = Mdev::create(Type::Pci)?;
    equal("another device", attach_tagged(&other, 1)?, None)
}

fn refused(mdev: &Mdev, state_size: u32) -> Result<()> {
    match Node::open(mdev)?.attach_raw(&asking(state_size)) {
        Ok(_) => bail!("{state_size} bytes of state accepted"),
        Err(refusal) => equal(
            "errno, fault",
            (refusal.errno, refusal.fault),
            (libc::ENOSPC, MUSER_FAULT_STATE),
        ),
    }
}

fn beyond_max_state_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    equal("default", mdev.attribute("max_state")?.as_str(), "1048576")?;
    refused(&mdev, (1 << 20) + 1)?;
    refused(&mdev, u32::MAX)?;
    drop(Server::attach(&mdev, &asking(1 << 20))?);
    works("raising it", mdev.set_attribute("max_state", "2097152"))?;
    let server = Server::attach(&mdev, &asking(2 << 20))?;
    equal("state_size", size(&server)?, 2 << 20)?;
    let last = server.node().map_state((2 << 20) - PAGE as u64, PAGE)?;
    last.write(PAGE - 4, 5u32);
    equal("its last word", last.read::<u32>(PAGE - 4), 5)?;
    fails(
        "more than 32 bits",
        mdev.set_attribute("max_state", "4294967296"),
        libc::ERANGE,
    )
}

/// What was given is kept: a device whose limit is lowered can still be served.
fn lowered_max_state_takes_nothing_away() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    drop(Server::attach(&mdev, &asking(8192))?);
    works("lowering it", mdev.set_attribute("max_state", "0"))?;
    refused(&mdev, 8193)?;
    let server = Server::attach(&mdev, &asking(8192))?;
    equal("state_size", size(&server)?, 8192)
}

fn mapping_beyond_it_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &asking(PAGE as u32 + 1))?;
    let node = server.node();
    let page = PAGE as u64;
    for (offset, pages) in [
        (0, 3),
        (page, 2),
        (2 * page, 1),
        (1 << 37, 1),
        ((1 << 38) - page, 1),
    ] {
        let what = format!("{pages} pages at {offset:#x}");
        fails(&what, node.map_state(offset, pages * PAGE), libc::EINVAL)?;
    }
    works("both pages", node.map_state(0, 2 * PAGE))?;
    works("the second", node.map_state(page, PAGE))?;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let private = Mapping::new(node, MUSER_MMAP_STATE, PAGE, both, libc::MAP_PRIVATE);
    fails("a private mapping", private, libc::EINVAL)?;
    works("detach", node.detach())?;
    fails("once detached", node.map_state(0, PAGE), libc::ENOTCONN)?;
    let without = Server::attach(&Mdev::create(Type::Pci)?, &Description::pci())?;
    fails(
        "where there is none",
        without.node().map_state(0, PAGE),
        libc::EINVAL,
    )
}

fn is_counted_page_by_page() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &asking(16 * PAGE as u32))?;
    let pages = || -> Result<u64> { Ok(server.node().query()?.memory_pages) };
    let state = server.node().map_state(0, 16 * PAGE)?;
    equal("mapped", pages()?, 0)?;
    state.write(3 * PAGE, 1u8);
    state.write(9 * PAGE, 1u8);
    state.write(9 * PAGE + 9, 1u8);
    equal("touched", pages()?, 2)
}

fn is_gone_with_the_device() -> Result<()> {
    let Bare { server, mdev } = Bare::with(&asking(4096))?;
    server.node().map_state(0, PAGE)?.write(0, 5u32);
    let uuid = mdev.uuid().to_owned();
    works("remove", mdev.remove())?;
    drop(server);
    works("create", Type::Pci.create_raw(&uuid))?;
    let mdev = Mdev::adopt(&uuid);
    let server = Server::attach(&mdev, &asking(4096))?;
    let state = server.node().map_state(0, PAGE)?;
    equal("in the device that came after", state.read::<u32>(0), 0)
}

fn client_close_leaves_it(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::with(&asking(4096))?;
    let state = server.node().map_state(0, PAGE)?;
    state.write(8, 0xABCD_u32);
    drop(works("opening", Client::open(&mdev, road))?);
    let reset = works("taking the close", server.take())?;
    equal("flags", reset.head.flags, MUSER_REQUEST_CLOSE)?;
    works("reply", server.reply(reset.slot, 0))?;
    equal("after the client", state.read::<u32>(8), 0xABCD)
}

/// The state lies where no region does, for the client too.
fn client_cannot_map_it(road: Road) -> Result<()> {
    let bare = Bare::with(&asking(4096))?;
    let client = bare.client(road)?;
    let regions: Range<u32> = MUSER_MAX_REGIONS..MUSER_MAX_REGIONS + 2;
    for region in regions {
        let what = format!("region {region}");
        fails(&what, client.map(region, 0, PAGE), libc::EINVAL)?;
        fails(&what, client.read_vec(region, 0, 4), libc::EINVAL)?;
        fails(&what, bare.server.node().map(region, 0, PAGE), libc::EINVAL)?;
    }
    Ok(())
}
