// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Region accesses: what the client gets, what the process sees, and many of them at once.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::{
    Description, Request, ABSENT, CONFIG, MIXED, MIXED_AREA, READ_ONLY, TRAPPED, WRITE_ONLY,
};
use muser_e2e::process;
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::service::Reply;
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{sys, time};
use muser_uapi::*;

use super::topic;

topic!("request", once: [
    no_request_with_nonblock_again,
    no_request_with_nonblocking_file_again,
    poll_follows_the_queue,
], roads: [
    read_reaches_process_as_it_is,
    write_reaches_process_as_it_is,
    every_width_and_alignment_keeps_data,
    long_access_comes_in_ascending_pieces,
    access_straddling_device_memory_is_split,
    access_across_the_end_is_short,
    access_behind_the_end_refused,
    access_to_absent_region_refused,
    access_against_region_flags_refused,
    access_of_0_bytes_does_nothing,
    bad_buffer_refused,
    error_of_process_reaches_client,
    error_after_some_data_gives_short_count,
    ids_are_never_used_twice,
]);

/// The recorded requests without the resets that opening and closing cause.
fn accesses(requests: &[Request]) -> Vec<(u32, u32, u64, u32)> {
    requests
        .iter()
        .filter(|request| request.head.kind != MUSER_REQUEST_RESET)
        .map(|request| {
            let head = &request.head;
            (head.kind, head.region, head.offset, head.count)
        })
        .collect()
}

const READ: u32 = MUSER_REQUEST_READ;
const WRITE: u32 = MUSER_REQUEST_WRITE;

fn read_reaches_process_as_it_is(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_vec(TRAPPED, 0x1234, 8));
        let request = works("take", bare.server.take())?;
        let head = request.head;
        ensure!(head.id != 0, "the request has id 0");
        equal("kind, flags", (head.kind, head.flags), (READ, 0))?;
        equal(
            "region, offset, count",
            (head.region, head.offset, head.count),
            (0, 0x1234, 8),
        )?;
        equal(
            "state, reserved",
            (head.state, head.length, head.reserved),
            (0, 0, [0; 2]),
        )?;
        works(
            "reply",
            bare.server
                .reply_data(request.slot, &[1, 2, 3, 4, 5, 6, 7, 8]),
        )?;
        let data = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))??;
        equal("data", data, vec![1, 2, 3, 4, 5, 6, 7, 8])
    })
}

fn write_reaches_process_as_it_is(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    rig.client.write_all(TRAPPED, 0xFFF0, &[0xAA, 0xBB, 0xCC])?;
    let requests = rig.service.record().wait(1)?;
    equal(
        "request",
        accesses(&requests),
        vec![(WRITE, TRAPPED, 0xFFF0, 3)],
    )?;
    equal("data", requests[0].data.as_slice(), &[0xAA, 0xBB, 0xCC])?;
    equal(
        "read back",
        rig.client.read_vec(TRAPPED, 0xFFF0, 3)?,
        vec![0xAA, 0xBB, 0xCC],
    )
}

/// Bytes that differ from their neighbours and from those of other seeds.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed)
        .collect()
}

fn every_width_and_alignment_keeps_data(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for (seed, count) in [1, 2, 4, 8, 3, 5, 7, 13, 64, 4095, 4096, 4097, 10_000]
        .into_iter()
        .enumerate()
    {
        for offset in [0, 1, 2, 3, 4, 7, 4095, 5000] {
            let data = pattern(count, seed as u8);
            let what = format!("{count} bytes at {offset}");
            works(&what, rig.client.write_all(TRAPPED, offset, &data))?;
            let back = works(&what, rig.client.read_vec(TRAPPED, offset, count))?;
            ensure!(back == data, "{what} came back changed");
        }
    }
    Ok(())
}

fn long_access_comes_in_ascending_pieces(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let data = pattern(10_000, 9);
    rig.client.write_all(TRAPPED, 100, &data)?;
    equal(
        "read back",
        rig.client.read_vec(TRAPPED, 100, 10_000)? == data,
        true,
    )?;
    let requests = rig.service.record().drain();
    for kind in [WRITE, READ] {
        let mut next = 100;
        for (_, region, offset, count) in accesses(&requests)
            .into_iter()
            .filter(|access| access.0 == kind)
        {
            equal("region", region, TRAPPED)?;
            equal("offset", offset, next)?;
            ensure!(
                (1..=MUSER_SLOT_DATA).contains(&count),
                "a piece has {count} bytes"
            );
            next += u64::from(count);
        }
        equal("end of the pieces", next, 10_100)?;
    }
    Ok(())
}

fn access_straddling_device_memory_is_split(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    // Served, device memory, served.
    let (start, end) = (MIXED_AREA.0, MIXED_AREA.0 + MIXED_AREA.1);
    let data = pattern(MIXED_AREA.1 as usize + 200, 5);
    works("write", rig.client.write_all(MIXED, start - 100, &data))?;
    let back = works("read", rig.client.read_vec(MIXED, start - 100, data.len()))?;
    ensure!(back == data, "the data came back changed");
    let pieces = [(start - 100, 100), (end, 100)];
    let expected: Vec<_> = [WRITE, READ]
        .into_iter()
        .flat_map(|kind| pieces.map(|(offset, count)| (kind, MIXED, offset, count)))
        .collect();
    equal(
        "requests",
        accesses(&rig.service.record().drain()),
        expected,
    )?;
    let mapped = rig.client.map(MIXED, start, MIXED_AREA.1 as usize)?;
    let inside = mapped.read_bytes(0, 16);
    equal("device memory", inside.as_slice(), &data[100..116])
}

fn access_across_the_end_is_short(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let mut data = [0xEE; 16];
    let read = works(
        "read across the end",
        rig.client.read(CONFIG, 250, &mut data),
    )?;
    equal("bytes read", read, 6)?;
    equal("bytes behind them", &data[6..], &[0xEE; 10][..])?;
    let written = works(
        "write across the end",
        rig.client.write(CONFIG, 255, &[1; 4]),
    )?;
    equal("bytes written", written, 1)?;
    let expected = vec![(READ, CONFIG, 250, 6), (WRITE, CONFIG, 255, 1)];
    equal(
        "requests",
        accesses(&rig.service.record().drain()),
        expected,
    )
}

fn access_behind_the_end_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for offset in [256, 257, 4096, 1 << 39, (1 << 40) - 1] {
        let what = format!("config space at {offset:#x}");
        fails(&what, rig.client.read_vec(CONFIG, offset, 4), libc::EINVAL)?;
        fails(
            &what,
            rig.client.write_all(CONFIG, offset, &[0; 4]),
            libc::EINVAL,
        )?;
    }
    equal("requests", accesses(&rig.service.record().drain()), vec![])
}

fn access_to_absent_region_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for region in [ABSENT, 8, 9, 31, 32, 1000, (1 << 23) - 1] {
        let what = format!("region {region}");
        fails(&what, rig.client.read_vec(region, 0, 4), libc::EINVAL)?;
        fails(
            &what,
            rig.client.write_all(region, 0, &[0; 4]),
            libc::EINVAL,
        )?;
    }
    equal("requests", accesses(&rig.service.record().drain()), vec![])
}

fn access_against_region_flags_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let write = rig.client.write_all(READ_ONLY, 0, &[0; 4]);
    fails("writing a read-only region", write, libc::EINVAL)?;
    let read = rig.client.read_vec(WRITE_ONLY, 0, 4);
    fails("reading a write-only region", read, libc::EINVAL)?;
    works(
        "reading a read-only region",
        rig.client.read_vec(READ_ONLY, 0, 4),
    )?;
    works(
        "writing a write-only region",
        rig.client.write_all(WRITE_ONLY, 0, &[0; 4]),
    )
}

fn access_of_0_bytes_does_nothing(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    equal(
        "bytes read",
        works("read", rig.client.read(TRAPPED, 0, &mut []))?,
        0,
    )?;
    equal(
        "bytes written",
        works("write", rig.client.write(TRAPPED, 0, &[]))?,
        0,
    )?;
    equal("requests", accesses(&rig.service.record().drain()), vec![])
}

/// A buffer that ends in a hole: the error or the short count, and never a wrong byte.
fn bad_buffer_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let hole = sys::Mapping::with_hole(sys::PAGE)?;
    let position = Client::position(TRAPPED, 0);
    for accessible in [0, 2] {
        let at = sys::PAGE - accessible;
        for result in [
            sys::pread_at(&rig.client, &hole, at, 4, position),
            sys::pwrite_at(&rig.client, &hole, at, 4, position),
        ] {
            fails(
                &format!("4 bytes, {accessible} of them there"),
                result,
                libc::EFAULT,
            )?;
        }
    }
    works("an ordinary read", rig.client.read_u32(TRAPPED, 0)).map(drop)
}

fn error_of_process_reaches_client(road: Road) -> Result<()> {
    let handler = |request: &Request| Reply::Error(request.head.offset as i32);
    let rig = Rig::serving(road, &Description::pci(), 1, handler)?;
    // 4095 is the largest there is; 512 and above are the kernel's own, but a process may say so.
    for errno in [
        libc::EIO,
        libc::ENXIO,
        libc::EBUSY,
        libc::EPERM,
        libc::EOPNOTSUPP,
        133,
    ] {
        let offset = u64::from(errno.unsigned_abs());
        let read = rig.client.read_vec(TRAPPED, offset, 1);
        fails("read", read, errno)?;
        fails("write", rig.client.write_all(TRAPPED, offset, &[1]), errno)?;
    }
    Ok(())
}

fn error_after_some_data_gives_short_count(road: Road) -> Result<()> {
    let handler = |request: &Request| match request.head.kind {
        _ if request.head.offset >= 4096 => Reply::Error(libc::EIO),
        MUSER_REQUEST_READ => Reply::Data(vec![7; request.head.count as usize]),
        _ => Reply::Done,
    };
    let rig = Rig::serving(road, &Description::pci(), 1, handler)?;
    let mut data = [0; 8192];
    equal(
        "bytes read",
        works("read", rig.client.read(TRAPPED, 0, &mut data))?,
        4096,
    )?;
    equal("data", data[..4096].iter().all(|&byte| byte == 7), true)?;
    equal(
        "bytes written",
        works("write", rig.client.write(TRAPPED, 0, &data))?,
        4096,
    )?;
    fails(
        "the rest",
        rig.client.read(TRAPPED, 4096, &mut data),
        libc::EIO,
    )
}

fn ids_are_never_used_twice(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for _ in 0..200 {
        rig.client.read_u32(TRAPPED, 0)?;
    }
    let mut ids: Vec<_> = rig
        .service
        .record()
        .drain()
        .iter()
        .map(|request| request.head.id)
        .collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    equal("different ids", ids.len(), count)
}

fn no_request_with_nonblock_again() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    fails("take with NONBLOCK", server.try_take(), libc::EAGAIN)
}

fn no_request_with_nonblocking_file_again() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    works("fcntl", sys::set_nonblocking(server.node(), true))?;
    fails(
        "take from a file with O_NONBLOCK",
        server.take_with(0),
        libc::EAGAIN,
    )
}

fn poll_follows_the_queue() -> Result<()> {
    let bare = Bare::new()?;
    let node = bare.server.node();
    equal(
        "events with no request",
        sys::poll(node, libc::POLLIN, time::quiet())?,
        0,
    )?;
    let client = bare.client(Road::Group)?;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let events = sys::poll(node, libc::POLLIN, time::patience())?;
        equal("events with a request", events, libc::POLLIN)?;
        equal(
            "events asked again",
            sys::poll(node, libc::POLLIN, time::quiet())?,
            libc::POLLIN,
        )?;
        let request = bare.server.try_take()?;
        equal(
            "events when it is taken",
            sys::poll(node, libc::POLLIN, time::quiet())?,
            0,
        )?;
        bare.server.reply_data(request.slot, &[0; 4])?;
        reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))??;
        equal(
            "events afterwards",
            sys::poll(node, libc::POLLIN, time::quiet())?,
            0,
        )
    })
}
