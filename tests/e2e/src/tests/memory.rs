// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device memory: pages of the kernel that client and process map, and that `pread` and `pwrite`
//! reach without a request.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, fails_as, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, Server, MEMORY, MIXED, MIXED_AREA, TRAPPED};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::sys::{Mapping, PAGE};
use muser_e2e::vfio::{Client, Road};
use muser_uapi::*;

use super::topic;

topic!("memory", once: [
    process_maps_slots_and_status_only_as_they_are,
    status_page_cannot_be_written,
    process_maps_beyond_areas_refused,
    mapping_outlives_the_attachment,
], roads: [
    starts_zeroed,
    both_sides_see_each_others_stores,
    read_and_write_are_served_by_the_kernel,
    served_with_no_process_attached,
    survives_the_process,
    zeroed_for_the_next_client,
    held_by_a_former_client_is_not_the_next_ones,
    untouched_pages_are_not_allocated,
    trapped_region_cannot_be_mapped,
    mapping_beyond_an_area_refused,
    private_mapping_refused_or_harmless,
    mapping_outlives_the_client,
    every_page_of_every_area_is_its_own,
    memory_of_removed_device_is_given_back,
    threads_on_both_sides_lose_no_increment,
]);

fn starts_zeroed(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let mapped = works("mapping", rig.client.map(MEMORY, 0, 64 << 10))?;
    let clean = mapped.read_bytes(0, 64 << 10).iter().all(|&byte| byte == 0);
    equal("memory is zeroed", clean, true)?;
    let data = rig
        .client
        .read_vec(MIXED, MIXED_AREA.0, MIXED_AREA.1 as usize)?;
    equal(
        "memory read is zeroed",
        data.iter().all(|&byte| byte == 0),
        true,
    )
}

fn both_sides_see_each_others_stores(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for (region, offset, len) in [(MEMORY, 0, 64 << 10), (MIXED, MIXED_AREA.0, 8192usize)] {
        let client = works("the client's mmap", rig.client.map(region, offset, len))?;
        let node = rig.server.node();
        let process = works("the process's mmap", node.map(region, offset, len))?;
        client.write(16, 0x0102_0304_0506_0708_u64);
        equal(
            "the client's store",
            process.read::<u64>(16),
            0x0102_0304_0506_0708,
        )?;
        process.write(len - 8, 0xA1A2_A3A4_A5A6_A7A8_u64);
        equal(
            "the process's store",
            client.read::<u64>(len - 8),
            0xA1A2_A3A4_A5A6_A7A8,
        )?;
        // A second mapping of a part is the same memory.
        let part = works("a part", rig.client.map(region, offset + 4096, 4096))?;
        part.write(0, 77u32);
        equal("the part's store", process.read::<u32>(4096), 77)?;
    }
    Ok(())
}

fn read_and_write_are_served_by_the_kernel(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let process = rig.server.node().map(MEMORY, 0, 64 << 10)?;
    let data: Vec<u8> = (0..10_000).map(|i| (i % 251) as u8).collect();
    works("pwrite", rig.client.write_all(MEMORY, 4000, &data))?;
    ensure!(
        process.read_bytes(4000, data.len()) == data,
        "the process sees other bytes"
    );
    process.write_bytes(4001, &[0xEE; 3]);
    let back = works("pread", rig.client.read_vec(MEMORY, 4000, 10_000))?;
    equal(
        "what the process wrote",
        &back[..5],
        &[0, 0xEE, 0xEE, 0xEE, 4][..],
    )?;
    let mut tail = [0; 64];
    equal(
        "bytes read at the end",
        rig.client.read(MEMORY, (64 << 10) - 8, &mut tail)?,
        8,
    )?;
    ensure!(
        rig.service.record().drain().is_empty(),
        "requests reached the process"
    );
    let counters = rig.server.node().query()?.counters;
    ensure!(
        counters.memory_reads >= 2,
        "memory_reads is {}",
        counters.memory_reads
    );
    equal("memory_writes", counters.memory_writes, 1)
}

fn served_with_no_process_attached(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    drop(server);
    let client = Client::open(&mdev, road)?;
    works("pwrite", client.write_all(MEMORY, 100, &[1, 2, 3]))?;
    equal(
        "pread",
        works("pread", client.read_vec(MEMORY, 100, 3))?,
        vec![1, 2, 3],
    )?;
    let mapped = works("mmap", client.map(MEMORY, 0, PAGE))?;
    equal("mapped", mapped.read::<u8>(101), 2)
}

fn survives_the_process(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut process = Process::helper(&["serve", mdev.uuid()])?;
    process.expect("ready")?;
    let client = Client::open(&mdev, road)?;
    let mapped = client.map(MEMORY, 0, 64 << 10)?;
    mapped.write(8192, 0x5EED_u32);
    process.kill()?;
    equal("with no process", mapped.read::<u32>(8192), 0x5EED)?;
    mapped.write(8196, 0xF00D_u32);
    let server = Server::attach(&mdev, &Description::pci())?;
    let seen = server.node().map(MEMORY, 0, 64 << 10)?;
    let words = (seen.read::<u32>(8192), seen.read::<u32>(8196));
    equal("what the next process sees", words, (0x5EED, 0xF00D))
}

/// What one client leaves in the memory of a device is not for the next, whatever the process does.
fn zeroed_for_the_next_client(road: Road) -> Result<()> {
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    works("pwrite", client.write_all(MEMORY, 0, &[9; 16]))?;
    let kept = server.node().map(MEMORY, 0, 4096)?;
    drop(client);
    service.record().wait(1)?;
    equal("what the process sees", kept.read::<u64>(0), 0)?;
    let client = works("the next client", Client::open(&mdev, road))?;
    equal(
        "what it reads",
        client.read_vec(MEMORY, 0, 16)?,
        vec![0; 16],
    )?;
    drop(client);
    drop(service);
    drop(server);
    Ok(())
}

/// A client can keep a page that it had mapped, here in a pipe. The next client and the process have
/// another one, and the same.
fn held_by_a_former_client_is_not_the_next_ones(road: Road) -> Result<()> {
    const FORMER: u64 = 0x1111_1111_1111_1111;
    const NEXT: u64 = 0x2222_2222_2222_2222;
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    let process = server.node().map(MEMORY, 0, 4096)?;
    let mapped = works("mapping", client.map(MEMORY, 0, 4096))?;
    mapped.write(0, FORMER);
    equal("the process sees", process.read::<u64>(0), FORMER)?;
    let mut pipe = works("vmsplice", mapped.splice(0, 8))?;
    drop(mapped);
    drop(client);
    service.record().wait(1)?;
    let client = works("the next client", Client::open(&mdev, road))?;
    let mapped = works("its mapping", client.map(MEMORY, 0, 4096))?;
    equal("the next client sees", mapped.read::<u64>(0), 0)?;
    mapped.write(0, NEXT);
    equal("the process sees now", process.read::<u64>(0), NEXT)?;
    let mut held = [0; 8];
    std::io::Read::read_exact(&mut pipe, &mut held)?;
    equal("what was held", u64::from_ne_bytes(held), FORMER)?;
    drop(mapped);
    drop(client);
    drop(service);
    drop(server);
    Ok(())
}

fn untouched_pages_are_not_allocated(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let pages = || -> Result<u64> { Ok(rig.server.node().query()?.memory_pages) };
    equal("pages at first", pages()?, 0)?;
    let mapped = rig.client.map(MEMORY, 0, 64 << 10)?;
    let _process = rig.server.node().map(MEMORY, 0, 64 << 10)?;
    equal("pages when mapped", pages()?, 0)?;
    mapped.write(5 * PAGE, 1u8);
    equal("pages after one store", pages()?, 1)?;
    mapped.write(5 * PAGE + 8, 1u8);
    rig.client.write_all(MEMORY, (PAGE * 5) as u64, &[1; 8])?;
    equal("pages after more to the same", pages()?, 1)?;
    rig.client
        .write_all(MEMORY, (PAGE * 7 - 4) as u64, &[1; 8])?;
    equal("pages after a write to two others", pages()?, 3)
}

fn trapped_region_cannot_be_mapped(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let refused = [libc::EINVAL];
    for region in [TRAPPED, 3, 4, 5, 7, 8, 9, 100] {
        let what = format!("region {region}");
        fails_as(&what, rig.client.map(region, 0, PAGE), &refused)?;
        fails_as(&what, rig.server.node().map(region, 0, PAGE), &refused)?;
    }
    Ok(())
}

fn mapping_beyond_an_area_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for (region, offset, len) in [
        (MIXED, 0, 4096),
        (MIXED, 0, 16384),
        (MIXED, 4096, 12288),
        (MIXED, 8192, 8192),
        (MIXED, 12288, 4096),
        (MEMORY, 0, 68 << 10),
        (MEMORY, 60 << 10, 8192),
        (MEMORY, 64 << 10, 4096),
        (MEMORY, 1 << 39, 4096),
    ] {
        let what = format!("{len} bytes at {offset} of region {region}");
        fails(&what, rig.client.map(region, offset, len), libc::EINVAL)?;
        fails(
            &what,
            rig.server.node().map(region, offset, len),
            libc::EINVAL,
        )?;
    }
    works("the area itself", rig.client.map(MIXED, 4096, 8192)).map(drop)
}

/// A private mapping is either refused, or it is a copy that nobody else sees.
fn private_mapping_refused_or_harmless(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let position = Client::position(MEMORY, 0);
    match Mapping::new(&rig.client, position, PAGE, protection, libc::MAP_PRIVATE) {
        Err(error) => fails("MAP_PRIVATE", Err::<(), _>(error), libc::EINVAL),
        Ok(private) => {
            let process = rig.server.node().map(MEMORY, 0, PAGE)?;
            process.write(0, 1u32);
            equal(
                "seen through the private mapping",
                private.read::<u32>(0),
                1,
            )?;
            private.write(0, 2u32);
            equal("seen by the process", process.read::<u32>(0), 1)?;
            let mut data = [0; 4];
            rig.client.read(MEMORY, 0, &mut data)?;
            equal("read by the client", data, [1, 0, 0, 0])
        }
    }
}

fn mapping_outlives_the_client(road: Road) -> Result<()> {
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    let mapped = client.map(MEMORY, 0, 64 << 10)?;
    let process = server.node().map(MEMORY, 0, 64 << 10)?;
    // The mapping holds the file open, so this is no close yet: a fault in it is served.
    drop(client);
    mapped.write(3 * PAGE, 0x33u8);
    equal("seen by the process", process.read::<u8>(3 * PAGE), 0x33)?;
    drop(mapped);
    service.record().wait(1)?;
    drop(service);
    drop(server);
    works("remove", mdev.remove())?;
    // The process's own mapping stays readable behind the removal, whatever it shows.
    let _: u8 = process.read(3 * PAGE);
    Ok(())
}

fn every_page_of_every_area_is_its_own(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let places: Vec<(u32, u64)> = (0..16)
        .map(|page| (MEMORY, page * 4096))
        .chain((1..3).map(|page| (MIXED, page * 4096)))
        .collect();
    for (value, &(region, offset)) in (1u32..).zip(&places) {
        rig.client.write_all(region, offset, &value.to_le_bytes())?;
    }
    for (value, &(region, offset)) in (1u32..).zip(&places) {
        let what = format!("region {region} at {offset:#x}");
        equal(&what, rig.client.read_u32(region, offset)?, value)?;
        let process = rig.server.node().map(region, offset, PAGE)?;
        equal(&what, process.read::<u32>(0), value)?;
    }
    Ok(())
}

/// Kilobytes of the machine that are free or can be at once.
fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.unwrap_or_default().parse()?)
}

fn memory_of_removed_device_is_given_back(road: Road) -> Result<()> {
    const SIZE: u64 = 16 << 20;
    let mut description = Description::minimal();
    let region = muser_region {
        num_areas: 1,
        ..muser_e2e::node::region(0, SIZE)
    };
    description.regions.insert(0, region);
    description.areas = vec![muser_e2e::node::area(0, SIZE)];
    let before = available()?;
    for _ in 0..12 {
        let rig = Rig::with(road, &description)?;
        rig.client.write_all(0, 0, &vec![0xAB; SIZE as usize])?;
        equal(
            "pages",
            rig.server.node().query()?.memory_pages,
            SIZE / 4096,
        )?;
    }
    // Twelve times the size were allocated; a leak of a third of it would show.
    let limit = SIZE / 1024 * 4;
    muser_e2e::time::until("the memory coming back", || {
        available().is_ok_and(|now| before.saturating_sub(now) < limit)
    })
}

fn threads_on_both_sides_lose_no_increment(road: Road) -> Result<()> {
    const ROUNDS: u32 = 20_000;
    let rig = Rig::new(road)?;
    let client = rig.client.map(MEMORY, 0, PAGE)?;
    let process = rig.server.node().map(MEMORY, 0, PAGE)?;
    // Each side owns a word, and sees the other's grow to its end.
    process::scope(|scope| {
        let sides = [(&client, 0, 64), (&process, 64, 0)].map(|(memory, own, other)| {
            scope.spawn(move || {
                let mut last = 0;
                for round in 1..=ROUNDS {
                    memory.write(own, round);
                    let seen: u32 = memory.read(other);
                    assert!(
                        seen >= last,
                        "the other side's word fell from {last} to {seen}"
                    );
                    last = seen;
                }
            })
        });
        for side in sides {
            side.join()
                .map_err(|_| anyhow::anyhow!("a side panicked"))?;
        }
        anyhow::Ok(())
    })?;
    let ends = (process.read::<u32>(0), client.read::<u32>(64));
    equal("the words", ends, (ROUNDS, ROUNDS))
}

fn process_maps_slots_and_status_only_as_they_are() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let node = Node::open(&mdev)?;
    let answer = node.attach_raw(&Description {
        slots: 2,
        ..Description::pci()
    })?;
    let whole = (answer.slots * answer.slot_stride).next_multiple_of(PAGE as u32) as usize;
    works("the slots", Mapping::shared(&node, MUSER_MMAP_SLOTS, whole))?;
    let more = Mapping::shared(&node, MUSER_MMAP_SLOTS, whole + PAGE);
    fails("more than the slots", more, libc::EINVAL)?;
    let behind = Mapping::shared(&node, MUSER_MMAP_SLOTS + whole as u64, PAGE);
    fails("behind the slots", behind, libc::EINVAL)?;
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    let two = Mapping::new(&node, MUSER_MMAP_STATUS, 2 * PAGE, read, shared);
    fails("two pages of status", two, libc::EINVAL)?;
    let between = Mapping::shared(&node, 1 << 37, PAGE);
    fails("between slots and state", between, libc::EINVAL)
}

fn status_page_cannot_be_written() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    let write = libc::PROT_READ | libc::PROT_WRITE;
    let refused = [libc::EACCES, libc::EPERM, libc::EINVAL];
    let node = server.node();
    let writable = Mapping::new(node, MUSER_MMAP_STATUS, PAGE, write, libc::MAP_SHARED);
    fails_as("mapping it writable", writable, &refused)?;
    let page = works("mapping it", server.status())?;
    fails("making it writable", page.protect(write), libc::EACCES)
}

fn process_maps_beyond_areas_refused() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    let node = server.node();
    for region in [31, 32, 1 << 20] {
        fails(
            &format!("region {region}"),
            node.map(region, 0, PAGE),
            libc::EINVAL,
        )?;
    }
    let last_page = u64::MAX - 4095;
    let end = Mapping::shared(node, last_page, PAGE);
    fails_as(
        "the last page of 64 bits",
        end,
        &[libc::EINVAL, libc::EOVERFLOW],
    )
}

/// What a process has mapped when its attachment ends is harmless, and no way back in.
fn mapping_outlives_the_attachment() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let memory = server.node().map(MEMORY, 0, PAGE)?;
    let status = server.status()?;
    memory.write(0, 0xAAu8);
    // The mappings keep the file, and with it the attachment: closing the descriptor is no end.
    drop(server);
    let _: u32 = status.read(0);
    drop(status);
    drop(memory);
    let next = Server::attach(&mdev, &Description::pci())?;
    let memory = next.node().map(MEMORY, 0, PAGE)?;
    equal("the byte", memory.read::<u8>(0), 0xAA)?;
    works("remove", mdev.remove())?;
    memory.write(8, 0xBBu8);
    Ok(())
}
