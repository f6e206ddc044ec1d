// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Doorbells: a client's write is over at once, the process hears of it by an eventfd, and finds the
//! value in device memory.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::{anyhow, ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::{
    area, doorbell, Description, Node, Server, BELL, FAR_BELL, MEMORY, MIXED_AREA, NEXT_BELL,
    TRAPPED,
};
use muser_e2e::process;
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::service::{ram, Service};
use muser_e2e::sys::{EventFd, Mapping, PAGE};
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::*;

use super::topic;

topic!("doorbell", once: [
    setting_it_fires_at_once,
    wrong_areas_and_descriptors_refused,
    process_maps_the_pages_around_it,
    process_maps_one_in_a_write_only_region,
], roads: [
    write_is_over_without_the_process,
    write_needs_nobody_attached,
    each_area_has_its_own_eventfd,
    straddling_write_is_cut_at_the_edges,
    value_is_read_back_from_the_kernel,
    client_cannot_map_it,
    detach_forgets_the_eventfd,
    successor_hears_what_was_rung_before,
    clearing_the_eventfd_silences_it,
    is_zeroed_for_the_next_client,
    bad_buffer_rings_nothing_false,
    writes_to_one_cell_are_never_torn,
]);

const PAGE_OF_BELL: u64 = 0x8000;

fn described() -> Bare {
    Bare::with(&Description::with_doorbells()).expect("a device with doorbells")
}

fn listen(node: &Node, area: u32) -> Result<EventFd> {
    let eventfd = EventFd::new()?;
    works("DOORBELL", node.doorbell(area, eventfd.as_raw_fd()))?;
    equal("fired when set", eventfd.take()?, 1)?;
    Ok(eventfd)
}

fn setting_it_fires_at_once() -> Result<()> {
    let bare = described();
    let first = listen(bare.server.node(), 0)?;
    // The same again, and another one in its place.
    works("again", bare.server.node().doorbell(0, first.as_raw_fd()))?;
    equal("fired again", first.take()?, 1)?;
    let second = listen(bare.server.node(), 0)?;
    equal("the one replaced", first.take()?, 0)?;
    equal("the other", second.take()?, 0)
}

fn wrong_areas_and_descriptors_refused() -> Result<()> {
    let bare = described();
    let node = bare.server.node();
    let eventfd = EventFd::new()?;
    // Behind the doorbells come mappable areas; behind those nothing.
    for area in [3, 4, 5, 255, 256, u32::MAX] {
        let what = format!("area {area}");
        fails(&what, node.doorbell(area, eventfd.as_raw_fd()), libc::ENXIO)?;
        fails(&what, node.doorbell(area, -1), libc::ENXIO)?;
    }
    fails("no descriptor", node.doorbell(0, 9999), libc::EBADF)?;
    fails("a negative one", node.doorbell(0, -2), libc::EBADF)?;
    let file = std::fs::File::open("/proc/self/status")?;
    fails("a file", node.doorbell(0, file.as_raw_fd()), libc::EINVAL)?;
    let stranger = Node::open(&bare.mdev)?;
    fails(
        "not attached",
        stranger.doorbell(0, eventfd.as_raw_fd()),
        libc::ENOTCONN,
    )?;
    works("none where none was", node.doorbell(0, -1))?;
    equal("signals", eventfd.take()?, 0)
}

fn process_maps_the_pages_around_it() -> Result<()> {
    let bare = described();
    let node = bare.server.node();
    works("the page of two", node.map(TRAPPED, PAGE_OF_BELL, PAGE))?;
    works(
        "both pages of one across",
        node.map(TRAPPED, 0x9000, 2 * PAGE),
    )?;
    works("one of them", node.map(TRAPPED, 0xA000, PAGE))?;
    for (offset, pages) in [
        (0x7000, 1),
        (0x7000, 2),
        (0x8000, 2),
        (0xB000, 1),
        (0xA000, 2),
    ] {
        let what = format!("{pages} pages at {offset:#x}");
        fails(&what, node.map(TRAPPED, offset, pages * PAGE), libc::EINVAL)?;
    }
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let at = MUSER_MMAP_REGIONS + PAGE_OF_BELL;
    let private = Mapping::new(node, at, PAGE, both, libc::MAP_PRIVATE);
    fails("a private mapping", private, libc::EINVAL)
}

/// A client may not read there, but the process must.
fn process_maps_one_in_a_write_only_region() -> Result<()> {
    let mut description = Description::pci();
    description.regions[4].num_areas = 1;
    description.areas.push(doorbell(16, 4));
    let bare = Bare::with(&description)?;
    let client = bare.client(Road::Group)?;
    let bells = works("mapping it", bare.server.node().map(4, 0, PAGE))?;
    works("write", client.write_all(4, 16, &[5, 0, 0, 0]))?;
    equal("value", bells.read::<u32>(16), 5)?;
    fails("the client's read", client.read_vec(4, 16, 4), libc::EINVAL)
}

fn write_is_over_without_the_process(road: Road) -> Result<()> {
    let bare = described();
    let client = bare.client(road)?;
    let heard = listen(bare.server.node(), 0)?;
    let bells = bare.server.node().map(TRAPPED, PAGE_OF_BELL, PAGE)?;
    // Nobody serves: a write that waited would wait for ever.
    works(
        "write",
        client.write_all(TRAPPED, BELL.0, &0xD00D_u32.to_le_bytes()),
    )?;
    equal("signals", heard.take()?, 1)?;
    equal("value", bells.read::<u32>(0x10), 0xD00D)?;
    works(
        "a wide one",
        client.write_all(TRAPPED, BELL.0, &u64::MAX.to_le_bytes()),
    )?;
    equal("signals", heard.take()?, 1)?;
    equal("value", bells.read::<u64>(0x10), u64::MAX)?;
    works("half of it", client.write_all(TRAPPED, BELL.0 + 2, &[0, 0]))?;
    equal("value", bells.read::<u32>(0x10), 0xFFFF)?;
    let query = bare.server.node().query()?;
    equal("doorbells", query.counters.doorbells, 3)?;
    equal("requests", (query.queued, query.taken), (0, 0))?;
    equal("memory_writes", query.counters.memory_writes, 0)
}

fn write_needs_nobody_attached(road: Road) -> Result<()> {
    let Bare { server, mdev } = described();
    drop(server);
    let client = Client::open(&mdev, road)?;
    works("write", client.write_all(TRAPPED, BELL.0, &[1, 2, 3, 4]))?;
    works("write", client.write_all(TRAPPED, BELL.0, &[5, 6, 7, 8]))?;
    let server = Server::attach(&mdev, &Description::with_doorbells())?;
    let bells = server.node().map(TRAPPED, PAGE_OF_BELL, PAGE)?;
    equal("the last value", bells.read::<u32>(0x10), 0x0807_0605)
}

fn each_area_has_its_own_eventfd(road: Road) -> Result<()> {
    let bare = described();
    let client = bare.client(road)?;
    let heard = [0, 1, 2].map(|area| listen(bare.server.node(), area).expect("listening"));
    for (i, (offset, _)) in [BELL, NEXT_BELL, FAR_BELL].into_iter().enumerate() {
        works("write", client.write_all(TRAPPED, offset, &[1; 4]))?;
        for (j, eventfd) in heard.iter().enumerate() {
            let what = format!("signals of {j} after a write to {i}");
            equal(&what, eventfd.take()?, u64::from(i == j))?;
        }
    }
    Ok(())
}

/// Registers, two doorbells, registers: in one write, and in one read.
fn straddling_write_is_cut_at_the_edges(road: Road) -> Result<()> {
    let Bare { server, mdev } = described();
    let server = Arc::new(server);
    let handler = ram(&Description::with_doorbells());
    let service = Service::start(&server, 1, handler)?;
    let client = Client::open(&mdev, road)?;
    let heard = [listen(server.node(), 0)?, listen(server.node(), 1)?];
    let start = BELL.0 - 4;
    let data: Vec<u8> = (1..=20).collect();
    works("write", client.write_all(TRAPPED, start, &data))?;
    equal("signals", [heard[0].take()?, heard[1].take()?], [1, 1])?;
    let back = works("read", client.read_vec(TRAPPED, start, 20))?;
    equal("read back", back, data.clone())?;
    let bells = server.node().map(TRAPPED, PAGE_OF_BELL, PAGE)?;
    let seen = bells.read_bytes(0x10, 12);
    equal("device memory", seen.as_slice(), &data[4..16])?;
    let requests: Vec<_> = service
        .record()
        .drain()
        .iter()
        .map(|request| (request.head.kind, request.head.offset, request.head.count))
        .collect();
    let ends = [(start, 4), (NEXT_BELL.0 + 4, 4)];
    let expected: Vec<_> = [MUSER_REQUEST_WRITE, MUSER_REQUEST_READ]
        .into_iter()
        .flat_map(|kind| ends.map(|(offset, count)| (kind, offset, count)))
        .collect();
    equal("requests", requests, expected)?;
    // One that lies across a page's edge is one doorbell.
    let far = listen(server.node(), 2)?;
    works(
        "across a page",
        client.write_all(TRAPPED, FAR_BELL.0, &[9; 8]),
    )?;
    equal("signals", far.take()?, 1)?;
    let bells = server.node().map(TRAPPED, 0x9000, 2 * PAGE)?;
    equal("value", bells.read_bytes(PAGE - 4, 8), vec![9; 8])
}

fn value_is_read_back_from_the_kernel(road: Road) -> Result<()> {
    let bare = described();
    let client = bare.client(road)?;
    equal(
        "at first",
        works("read", client.read_u32(TRAPPED, BELL.0))?,
        0,
    )?;
    let bells = bare.server.node().map(TRAPPED, PAGE_OF_BELL, PAGE)?;
    bells.write(0x10, 0x1234_5678_u32);
    equal(
        "what the process left",
        works("read", client.read_u32(TRAPPED, BELL.0))?,
        0x1234_5678,
    )?;
    let counters = bare.server.node().query()?.counters;
    equal(
        "memory_reads, doorbells",
        (counters.memory_reads, counters.doorbells),
        (2, 0),
    )
}

fn client_cannot_map_it(road: Road) -> Result<()> {
    let mut description = Description::with_doorbells();
    // A region with both kinds: the doorbell directly behind the mappable area.
    description.regions[1].num_areas = 2;
    let end = MIXED_AREA.0 + MIXED_AREA.1;
    description.areas.insert(4, doorbell(end, 4));
    let rig = Rig::with(road, &description)?;
    let info = rig.client.region_info(TRAPPED)?;
    equal("MMAP flag", info.flags & 4, 0)?;
    ensure!(info.areas.is_none(), "a list of areas: {:?}", info.areas);
    for offset in [PAGE_OF_BELL, 0x9000, 0xA000] {
        fails(
            "mapping it",
            rig.client.map(TRAPPED, offset, PAGE),
            libc::EINVAL,
        )?;
    }
    let mixed = rig.client.region_info(1)?;
    let listed: Vec<_> = mixed
        .areas
        .unwrap_or_default()
        .iter()
        .map(|area| (area.offset, area.size))
        .collect();
    equal("areas", listed, vec![MIXED_AREA])?;
    fails(
        "the page behind",
        rig.client.map(1, end, PAGE),
        libc::EINVAL,
    )?;
    fails(
        "both",
        rig.client
            .map(1, MIXED_AREA.0, MIXED_AREA.1 as usize + PAGE),
        libc::EINVAL,
    )?;
    works(
        "the area",
        rig.client.map(1, MIXED_AREA.0, MIXED_AREA.1 as usize),
    )?;
    let whole = rig.client.region_info(MEMORY)?;
    ensure!(whole.areas.is_none(), "a list for a whole region");
    equal("MMAP flag of memory", whole.flags & 4, 4)?;
    equal("an area by hand", area(0, 4).flags, MUSER_AREA_MMAP)
}

fn detach_forgets_the_eventfd(road: Road) -> Result<()> {
    let Bare { server, mdev } = described();
    let client = Client::open(&mdev, road)?;
    let heard = listen(server.node(), 0)?;
    works("detach", server.node().detach())?;
    works("write", client.write_all(TRAPPED, BELL.0, &[1; 4]))?;
    equal("signals", heard.take()?, 0)?;
    let late = server.node().doorbell(0, heard.as_raw_fd());
    fails("setting it once detached", late, libc::ENOTCONN)?;
    let server = Server::attach(&mdev, &Description::with_doorbells())?;
    works("write", client.write_all(TRAPPED, BELL.0, &[1; 4]))?;
    equal("signals with a successor", heard.take()?, 0)?;
    equal("doorbells", server.node().query()?.counters.doorbells, 2)
}

fn successor_hears_what_was_rung_before(road: Road) -> Result<()> {
    let Bare { server, mdev } = described();
    let client = Client::open(&mdev, road)?;
    let heard = listen(server.node(), 0)?;
    process::scope(|scope| {
        let standby = Description {
            flags: MUSER_ATTACH_STANDBY,
            ..Description::with_doorbells()
        };
        let mdev = &mdev;
        let waiting = scope.spawn(move || Server::attach(mdev, &standby));
        time::until("a standby waiting", || {
            let query = server.node().query();
            query.is_ok_and(|query| query.flags & MUSER_STATE_STANDBY != 0)
        })?;
        works("write", client.write_all(TRAPPED, BELL.0, &[7, 0, 0, 0]))?;
        equal("signals of the old one", heard.take()?, 1)?;
        works("detach", server.node().detach())?;
        let successor = waiting.join().map_err(|_| anyhow!("it panicked"))??;
        let hears = listen(successor.node(), 0)?;
        let bells = successor.node().map(TRAPPED, PAGE_OF_BELL, PAGE)?;
        equal("value", bells.read::<u32>(0x10), 7)?;
        works("write", client.write_all(TRAPPED, BELL.0, &[8, 0, 0, 0]))?;
        equal("signals", (heard.take()?, hears.take()?), (0, 1))
    })
}

fn clearing_the_eventfd_silences_it(road: Road) -> Result<()> {
    let bare = described();
    let client = bare.client(road)?;
    let heard = listen(bare.server.node(), 0)?;
    works("clearing", bare.server.node().doorbell(0, -1))?;
    works("write", client.write_all(TRAPPED, BELL.0, &[1; 4]))?;
    equal("signals", heard.take()?, 0)
}

fn is_zeroed_for_the_next_client(road: Road) -> Result<()> {
    let Bare { server, mdev } = described();
    let client = Client::open(&mdev, road)?;
    works("write", client.write_all(TRAPPED, BELL.0, &[1; 8]))?;
    works("write", client.write_all(TRAPPED, FAR_BELL.0, &[1; 8]))?;
    drop(client);
    works("the close", server.take())?;
    let client = works("the next client", Client::open(&mdev, road))?;
    equal("value", client.read_vec(TRAPPED, BELL.0, 8)?, vec![0; 8])?;
    equal(
        "across pages",
        client.read_vec(TRAPPED, FAR_BELL.0, 8)?,
        vec![0; 8],
    )
}

fn bad_buffer_rings_nothing_false(road: Road) -> Result<()> {
    let bare = described();
    let client = bare.client(road)?;
    let hole = Mapping::with_hole(PAGE)?;
    let position = Client::position(TRAPPED, BELL.0);
    let write = muser_e2e::sys::pwrite_at(&client, &hole, PAGE - 2, 4, position);
    fails("write", write, libc::EFAULT)?;
    let counters = bare.server.node().query()?.counters;
    equal("doorbells", counters.doorbells, 0)
}

/// The process reads whole values while a client writes, and misses no signal.
fn writes_to_one_cell_are_never_torn(road: Road) -> Result<()> {
    const ROUNDS: u32 = 20_000;
    let bare = described();
    let client = bare.client(road)?;
    let heard = listen(bare.server.node(), 0)?;
    let bells = bare.server.node().map(TRAPPED, PAGE_OF_BELL, PAGE)?;
    process::scope(|scope| {
        let writing = scope.spawn(|| -> Result<()> {
            for round in 1..=ROUNDS {
                let value = u64::from(round) << 32 | u64::from(!round);
                works(
                    "write",
                    client.write_all(TRAPPED, BELL.0, &value.to_le_bytes()),
                )?;
            }
            Ok(())
        });
        let mut rung = 0;
        while rung < u64::from(ROUNDS) {
            let count = works("waiting", heard.wait(time::patience()))?;
            ensure!(count > 0, "no signal after {rung}");
            rung += count;
            let value: u64 = bells.read(0x10);
            equal("halves of a value", (value >> 32) as u32, !(value as u32))?;
        }
        writing
            .join()
            .map_err(|_| anyhow!("the client panicked"))??;
        equal("signals", rung, u64::from(ROUNDS))?;
        equal(
            "the last value",
            bells.read::<u64>(0x10) >> 32,
            u64::from(ROUNDS),
        )
    })
}
