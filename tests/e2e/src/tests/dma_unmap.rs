// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client unmaps memory that is pinned: who is asked, who is waited for and how long, and what is
//! there afterwards.

use std::thread::ScopedJoinHandle;

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, fails_as, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Server, Unmap, TRAPPED};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::{pattern, Bare, DmaRig, Guest, BASE};
use muser_e2e::sys::{self, Mapping, PAGE};
use muser_e2e::time;
use muser_e2e::vfio::{Road, DMA_BOTH};
use muser_uapi::*;

use super::topic;

topic!("dma_unmap", dma: [
    process_is_asked_and_waited_for,
    each_mapping_with_pins_is_asked_for,
    nothing_pinned_asks_nobody,
    silent_process_loses_the_pages,
    late_reply_changes_nothing,
    silent_process_is_not_waited_for_twice,
    error_in_the_reply_is_a_reply,
    no_process_to_ask,
    process_dies_when_asked,
    process_detaches_when_asked,
    client_is_killed_when_it_waits,
    window_shows_zeroes_and_loses_writes,
    iova_mapped_again_is_other_memory,
    unmap_leaves_other_mappings_alone,
    requests_before_an_unmap_are_taken_before_it,
    huge_sparse_mapping_costs_what_is_pinned,
    attribute_is_a_time,
]);

const BOTH: u32 = MUSER_DMA_READ | MUSER_DMA_WRITE;

/// So long that a test fails which has to wait for it.
const HOUR: &str = "3600000";

/// An attached process that is asked for an hour, and a client with so many pages, all acquired. In
/// this order, so that the device is dropped last.
fn asked(road: Road, pages: usize) -> Result<(Mdev, Server, Guest)> {
    let Bare { server, mdev } = Bare::new()?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", HOUR),
    )?;
    let guest = Guest::open(&mdev, road, pages)?;
    works(
        "acquiring",
        server.node().dma_acquire(BASE, guest.len(), BOTH),
    )?;
    Ok((mdev, server, guest))
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> Result<T> {
    time::until("the client's call returning", || thread.is_finished())?;
    thread
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))
}

/// How many unmaps there were, and how many of them were forced.
fn unmaps(server: &Server) -> Result<(u64, u64)> {
    let counters = works("MUSER_QUERY", server.node().query())?.counters;
    Ok((counters.unmaps, counters.unmaps_forced))
}

fn process_is_asked_and_waited_for(road: Road) -> Result<()> {
    let (_mdev, server, guest) = asked(road, 8)?;
    let window = server.node().window(BASE, 8 * PAGE)?;
    process::scope(|scope| {
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        let (request, unmap) = works("the request", server.take_unmap())?;
        let range = Unmap {
            iova: BASE,
            length: guest.len(),
        };
        equal("what is unmapped", unmap, range)?;
        equal("flags", request.head.flags, 0)?;
        equal(
            "region, count",
            (request.head.region, request.head.count),
            (0, 0),
        )?;
        // Until the reply the process can finish what it was doing.
        std::thread::sleep(time::quiet());
        ensure!(
            !client.is_finished(),
            "the unmap did not wait for the process"
        );
        equal("pages pinned", server.node().pinned()?, 8)?;
        window.write(8, 0xF171_u64);
        equal("the client's word", guest.memory.read::<u64>(8), 0xF171)?;
        works("copying", server.node().dma_read(BASE, &mut [0; PAGE]))?;
        works("reply", server.reply(request.slot, 0))?;
        let unmapped = works("unmapping", joined(client)?)?;
        equal("bytes unmapped", unmapped, guest.len())
    })?;
    equal("pages pinned", server.node().pinned()?, 0)?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 0))?;
    equal("the window", window.read::<u64>(8), 0)
}

fn each_mapping_with_pins_is_asked_for(road: Road) -> Result<()> {
    let (_mdev, server, guest) = asked(road, 4)?;
    let more = [Mapping::anonymous(4 * PAGE)?, Mapping::anonymous(4 * PAGE)?];
    let iovas = [BASE + (1 << 20), BASE + (1 << 30)];
    for (iova, memory) in iovas.into_iter().zip(&more) {
        works("mapping", guest.client.dma_map(memory, iova, DMA_BOTH))?;
    }
    // The first of these stays without pins.
    works(
        "reading",
        server.node().dma_read(iovas[1] + 4096, &mut [0; 8]),
    )?;
    process::scope(|scope| {
        let client = scope.spawn(|| guest.client.dma_unmap_all());
        let mut seen = Vec::new();
        for _ in 0..2 {
            let (request, unmap) = works("a request", server.take_unmap())?;
            seen.push((unmap.iova, unmap.length));
            works("reply", server.reply(request.slot, 0))?;
        }
        seen.sort_unstable();
        equal(
            "what is unmapped",
            seen,
            vec![(BASE, 4 * 4096), (iovas[1], 4 * 4096)],
        )?;
        equal(
            "bytes",
            works("unmapping all", joined(client)?)?,
            3 * 4 * 4096,
        )
    })?;
    fails("another request", server.try_take(), libc::EAGAIN)?;
    equal("unmaps, and forced ones", unmaps(&server)?, (2, 0))?;
    equal("pages pinned", server.node().pinned()?, 0)
}

fn nothing_pinned_asks_nobody(road: Road) -> Result<()> {
    let (_mdev, server, guest) = asked(road, 4)?;
    let released = works("releasing", server.node().dma_release(BASE, guest.len()))?;
    equal("bytes released", released, guest.len())?;
    let other = Mapping::anonymous(PAGE)?;
    works("mapping", guest.client.dma_map(&other, 0, DMA_BOTH))?;
    works("reading", server.node().dma_read(0, &mut [0; 8]))?;
    works("unmapping", guest.client.dma_unmap(BASE, guest.len()))?;
    fails("a request", server.try_take(), libc::EAGAIN)?;
    equal("unmaps, and forced ones", unmaps(&server)?, (0, 0))?;
    equal("pages pinned", server.node().pinned()?, 1)
}

fn silent_process_loses_the_pages(road: Road) -> Result<()> {
    let (mdev, server, guest) = asked(road, 8)?;
    let window = server.node().window(BASE, 8 * PAGE)?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", "100"),
    )?;
    let unmapped = works("unmapping", guest.client.dma_unmap(BASE, guest.len()))?;
    equal("bytes unmapped", unmapped, guest.len())?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))?;
    equal("pages pinned", server.node().pinned()?, 0)?;
    equal("the window", window.read::<u64>(8), 0)?;
    window.write(8, u64::MAX);
    guest.is_untouched()?;
    fails("the request, too late", server.try_take(), libc::EAGAIN)
}

fn late_reply_changes_nothing(road: Road) -> Result<()> {
    let (mdev, server, guest) = asked(road, 8)?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", "200"),
    )?;
    process::scope(|scope| {
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        let (request, _) = works("the request", server.take_unmap())?;
        works("unmapping", joined(client)?)?;
        let late = server.reply(request.slot, 0);
        fails_as("the reply", late, &[libc::ECANCELED, libc::ENOENT])
    })?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))?;
    equal("requests not answered", server.node().query()?.taken, 0)?;
    works(
        "mapping",
        guest.client.dma_map(&guest.memory, BASE, DMA_BOTH),
    )?;
    works("acquiring", server.node().dma_acquire(BASE, 4096, BOTH)).map(drop)
}

fn silent_process_is_not_waited_for_twice(road: Road) -> Result<()> {
    let (mdev, server, guest) = asked(road, 8)?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", "100"),
    )?;
    works("unmapping", guest.client.dma_unmap(BASE, guest.len()))?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))?;
    // From here on a wait would be an hour's.
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", HOUR),
    )?;
    for round in 2..=4 {
        works(
            "mapping",
            guest.client.dma_map(&guest.memory, BASE, DMA_BOTH),
        )?;
        works("acquiring", server.node().dma_acquire(BASE, 4096, BOTH))?;
        works("unmapping", guest.client.dma_unmap(BASE, guest.len()))?;
        equal("unmaps, and forced ones", unmaps(&server)?, (round, round))?;
    }
    // Heard of again, it is asked again.
    process::scope(|scope| {
        let reading = scope.spawn(|| guest.client.read_u32(TRAPPED, 0));
        let request = works("the read", server.take())?;
        works("reply", server.reply_data(request.slot, &[1, 0, 0, 0]))?;
        equal("the read", works("read", joined(reading)?)?, 1)?;
        works(
            "mapping",
            guest.client.dma_map(&guest.memory, BASE, DMA_BOTH),
        )?;
        works("acquiring", server.node().dma_acquire(BASE, 4096, BOTH))?;
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        let (request, _) = works("the request", server.take_unmap())?;
        works("reply", server.reply(request.slot, 0))?;
        works("unmapping", joined(client)?).map(drop)
    })?;
    equal("unmaps, and forced ones", unmaps(&server)?, (5, 4))
}

fn error_in_the_reply_is_a_reply(road: Road) -> Result<()> {
    let (_mdev, server, guest) = asked(road, 2)?;
    process::scope(|scope| {
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        let (request, _) = works("the request", server.take_unmap())?;
        works("reply", server.reply(request.slot, -libc::EIO))?;
        works("unmapping", joined(client)?).map(drop)
    })?;
    equal("pages pinned", server.node().pinned()?, 0)
}

fn no_process_to_ask(road: Road) -> Result<()> {
    let (mdev, server, guest) = asked(road, 4)?;
    drop(server);
    works("unmapping", guest.client.dma_unmap(BASE, guest.len()))?;
    let server = Server::attach(&mdev, &Description::pci())?;
    equal("pages pinned", server.node().pinned()?, 0)?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))?;
    fails("a request", server.try_take(), libc::EAGAIN)
}

fn process_dies_when_asked(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", HOUR),
    )?;
    drop(Server::attach(&mdev, &Description::pci())?);
    let guest = Guest::open(&mdev, road, 4)?;
    let mut process = Process::helper(&["pin", mdev.uuid(), &BASE.to_string(), "4"])?;
    process.expect("ready")?;
    process::scope(|scope| {
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        process.expect(&format!("unmap {BASE} {}", guest.len()))?;
        process.kill()?;
        works("unmapping", joined(client)?).map(drop)
    })?;
    let server = Server::attach(&mdev, &Description::pci())?;
    equal("pages pinned", server.node().pinned()?, 0)?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))?;
    fails("the request again", server.try_take(), libc::EAGAIN)
}

fn process_detaches_when_asked(road: Road) -> Result<()> {
    let (_mdev, server, guest) = asked(road, 4)?;
    process::scope(|scope| {
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        works("the request", server.take_unmap())?;
        works(
            "detaching",
            sys::ioctl_value(server.node(), MUSER_DETACH, 0),
        )?;
        works("unmapping", joined(client)?).map(drop)
    })?;
    equal("pages pinned", server.node().pinned()?, 0)?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))
}

fn client_is_killed_when_it_waits(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", HOUR),
    )?;
    let mut client = Process::helper(&["guest", road.name(), mdev.uuid(), "8", "0"])?;
    client.expect("mapped")?;
    works("acquiring", server.node().dma_acquire(BASE, 8 * 4096, BOTH))?;
    let window = server.node().window(BASE, 8 * PAGE)?;
    client.tell("unmap")?;
    let (request, _) = works("the request", server.take_unmap())?;
    client.kill()?;
    time::until("the pins going with the client", || {
        server.node().pinned().is_ok_and(|pages| pages == 0)
    })?;
    equal("the window", window.read::<u64>(8), 0)?;
    let late = server.reply(request.slot, 0);
    fails_as("the reply", late, &[libc::ECANCELED, libc::ENOENT])?;
    let reset = works("the close", server.take())?;
    equal("what comes then", reset.head.kind, MUSER_REQUEST_RESET)?;
    works("reply", server.reply(reset.slot, 0))?;
    let guest = works(
        "the next client",
        Guest::open(&mdev, road, 2).map_err(std::io::Error::other),
    )?;
    works(
        "acquiring",
        server.node().dma_acquire(BASE, guest.len(), BOTH),
    )?;
    equal("pages pinned", server.node().pinned()?, 2)
}

fn window_shows_zeroes_and_loses_writes(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    works("acquiring", rig.node().dma_acquire(BASE, 4 * 4096, BOTH))?;
    let window = rig.node().window(BASE, 4 * PAGE)?;
    for page in 0..3 {
        let word = window.read::<u64>(page * PAGE);
        equal("acquired", word, pattern(Guest::SEED)(page * PAGE))?;
    }
    works("unmapping", rig.guest.client.dma_unmap(BASE, 4 * 4096))?;
    // The last page was never touched before, the others were.
    for page in 0..4 {
        equal("unmapped", window.read::<u64>(page * PAGE), 0)?;
        window.write(page * PAGE, u64::MAX);
    }
    let fresh = rig.node().window(BASE, 4 * PAGE)?;
    fresh.write(8, u64::MAX);
    equal(
        "by a fresh mapping",
        fresh.read::<u64>(PAGE),
        window.read::<u64>(PAGE),
    )?;
    rig.guest.is_untouched()
}

fn iova_mapped_again_is_other_memory(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let status = rig.server.status()?;
    let first = works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    let window = rig.node().window(BASE, 2 * PAGE)?;
    equal(
        "the first memory",
        window.read::<u64>(8),
        pattern(Guest::SEED)(8),
    )?;
    works("unmapping", rig.guest.client.dma_unmap(BASE, 8192))?;
    let other = Mapping::anonymous(2 * PAGE)?;
    other.fill(pattern(2));
    works("mapping", rig.guest.client.dma_map(&other, BASE, DMA_BOTH))?;
    let generation = Server::generation(&status);
    ensure!(
        generation > first,
        "the generation is {generation}, was {first}"
    );
    equal("before an acquire", window.read::<u64>(8), 0)?;
    window.write(8, u64::MAX);
    ensure!(
        other.differs(pattern(2)).is_none(),
        "the other memory changed"
    );
    let second = works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    equal("the generation", second, generation)?;
    equal("the other memory", window.read::<u64>(8), pattern(2)(8))?;
    equal(
        "never touched before",
        window.read::<u64>(PAGE + 8),
        pattern(2)(PAGE + 8),
    )?;
    window.write(8, 3u64);
    equal("the client's word", other.read::<u64>(8), 3)?;
    rig.guest.is_untouched()
}

fn unmap_leaves_other_mappings_alone(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let neighbours = [Mapping::anonymous(2 * PAGE)?, Mapping::anonymous(2 * PAGE)?];
    let (before, behind) = (BASE - 8192, BASE + 8192);
    for (iova, memory) in [before, behind].into_iter().zip(&neighbours) {
        memory.fill(pattern(iova));
        works("mapping", rig.guest.client.dma_map(memory, iova, DMA_BOTH))?;
    }
    works("acquiring", rig.node().dma_acquire(before, 6 * 4096, BOTH))?;
    let window = rig.node().window(before, 6 * PAGE)?;
    let words = || [1, 2, 3, 4].map(|page| window.read::<u64>(page * PAGE + 8));
    let word = pattern(Guest::SEED);
    let expected = [
        pattern(before)(PAGE + 8),
        word(8),
        word(PAGE + 8),
        pattern(behind)(8),
    ];
    equal("around the borders", words(), expected)?;
    works("unmapping", rig.guest.client.dma_unmap(BASE, 8192))?;
    let expected = [expected[0], 0, 0, expected[3]];
    equal("around the borders", words(), expected)?;
    equal("pages pinned", rig.node().pinned()?, 4)?;
    works("a neighbour", rig.node().dma_write(behind, &[1; 16]))?;
    let across = rig.node().dma_read(before + 4096, &mut [0; 2 * PAGE]);
    fails("across the border", across, libc::EFAULT)
}

/// An unmap is queued like any other request: it does not overtake.
fn requests_before_an_unmap_are_taken_before_it(road: Road) -> Result<()> {
    let (_mdev, server, guest) = asked(road, 2)?;
    process::scope(|scope| {
        let reading = scope.spawn(|| guest.client.read_u32(TRAPPED, 16));
        time::until("the read being queued", || {
            server.node().query().is_ok_and(|query| query.queued == 1)
        })?;
        let client = scope.spawn(|| guest.client.dma_unmap(BASE, guest.len()));
        time::until("the unmap being queued", || {
            server.node().query().is_ok_and(|query| query.queued == 2)
        })?;
        let read = works("the first", server.take())?;
        equal("the first", read.head.kind, MUSER_REQUEST_READ)?;
        // The read is not answered yet: an unmap is no barrier.
        let (unmap, _) = works("the second", server.take_unmap())?;
        works("reply", server.reply(unmap.slot, 0))?;
        works("unmapping", joined(client)?)?;
        works("reply", server.reply_data(read.slot, &[0; 4]))?;
        works("reading", joined(reading)?).map(drop)
    })
}

/// A terabyte, of which three pages are pinned.
fn huge_sparse_mapping_costs_what_is_pinned(road: Road) -> Result<()> {
    const SIZE: usize = 1 << 40;
    const PART: usize = 1 << 36;
    let rig = DmaRig::new(road, 1)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let memory = works("a terabyte", Mapping::without_file(SIZE, flags))?;
    let start = 1 << 41;
    for part in (0..SIZE).step_by(PART) {
        let mapped =
            rig.guest
                .client
                .space()
                .map(&memory, part..part + PART, start + part as u64, DMA_BOTH);
        works("mapping a part", mapped)?;
    }
    for offset in [0, SIZE / 2 + PART / 2, SIZE - PAGE] {
        let iova = start + offset as u64;
        works("acquiring", rig.node().dma_acquire(iova, 4096, BOTH))?;
        let window = works("the window", rig.node().window(iova, PAGE))?;
        window.write(8, iova);
        equal("the client's word", memory.read::<u64>(offset + 8), iova)?;
    }
    let over = rig.node().pinning(MUSER_DMA_RELEASE, start, 4096, 0);
    works("releasing", over.result)?;
    let unmapped = works("unmapping all", rig.guest.client.dma_unmap_all())?;
    equal("bytes unmapped", unmapped, SIZE as u64 + 4096)?;
    let query = rig.node().query()?;
    let counters = (
        query.counters.pins,
        query.counters.unpins,
        query.pinned_pages,
    );
    equal("pins, unpins, pages pinned", counters, (3, 3, 0))?;
    equal("unmaps, and forced ones", unmaps(&rig.server)?, (2, 0))?;
    equal("requests", rig.service.record().wait(2)?.len(), 2)
}

fn attribute_is_a_time(road: Road) -> Result<()> {
    let (mdev, server, guest) = asked(road, 1)?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", "1234"),
    )?;
    equal(
        "unmap_timeout_ms",
        mdev.attribute("unmap_timeout_ms")?,
        "1234".to_owned(),
    )?;
    for wrong in ["-1", "x", "99999999999999999999999"] {
        let refused = mdev.set_attribute("unmap_timeout_ms", wrong);
        ensure!(refused.is_err(), "unmap_timeout_ms took {wrong:?}");
    }
    // 0: whoever is attached is told, and not waited for.
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", "0"),
    )?;
    works("unmapping", guest.client.dma_unmap_all())?;
    equal("unmaps, and forced ones", unmaps(&server)?, (1, 1))?;
    let fresh = Mdev::create(Type::Pci)?;
    equal(
        "at first",
        fresh.attribute("unmap_timeout_ms")?,
        "1000".to_owned(),
    )
}
