// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Region accesses: what the client gets, what the process sees, and many of them at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, errno_of, fails, works};
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
    many_threads_get_their_own_answers,
    replies_out_of_order_reach_their_clients,
    more_requests_than_slots_wait,
    two_devices_at_once_stay_apart,
    second_client_of_a_device_refused,
    signals_at_a_waiting_client_do_not_end_its_wait,
    signal_storm_at_the_process_loses_nothing,
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
        equal("state, reserved", (head.state, head.reserved), (0, [0; 3]))?;
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

/// A device of which each register reads as a function of its offset.
fn answer_by_offset(request: &Request) -> Reply {
    match request.head.kind {
        MUSER_REQUEST_READ => {
            Reply::Data((request.head.offset as u32 ^ 0xABCD).to_le_bytes().into())
        }
        _ => Reply::Done,
    }
}

const CLIENT_THREADS: u64 = 16;

fn hammer(client: &Client, rounds: u64) -> Result<()> {
    process::scope(|scope| {
        let threads: Vec<_> = (0..CLIENT_THREADS)
            .map(|thread| {
                scope.spawn(move || -> Result<()> {
                    for round in 0..rounds {
                        let offset = (thread * rounds + round) * 4 % 0xFFFC;
                        let value = works("read", client.read_u32(TRAPPED, offset))?;
                        equal("answer", value, offset as u32 ^ 0xABCD)?;
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client thread panicked"))??;
        }
        Ok(())
    })
}

fn many_threads_get_their_own_answers(road: Road) -> Result<()> {
    let rig = Rig::serving(road, &Description::pci(), 4, answer_by_offset)?;
    hammer(&rig.client, 100)?;
    let served = accesses(&rig.service.record().drain()).len() as u64;
    equal("requests", served, CLIENT_THREADS * 100)
}

fn replies_out_of_order_reach_their_clients(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    process::scope(|scope| {
        let readers: Vec<_> = (0..8u64)
            .map(|i| {
                let client = &client;
                scope.spawn(move || (i, client.read_u32(TRAPPED, i * 4)))
            })
            .collect();
        let mut requests = (0..8)
            .map(|_| works("take", bare.server.take()))
            .collect::<Result<Vec<_>>>()?;
        // Neither the order of arrival nor its reverse.
        requests.sort_by_key(|request| (request.head.offset / 4 * 5 + 3) % 8);
        for request in requests {
            let value = request.head.offset as u32 + 1000;
            works(
                "reply",
                bare.server.reply_data(request.slot, &value.to_le_bytes()),
            )?;
        }
        for reader in readers {
            let (i, value) = reader
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?;
            equal("answer", works("read", value)?, i as u32 * 4 + 1000)?;
        }
        Ok(())
    })
}

fn more_requests_than_slots_wait(road: Road) -> Result<()> {
    let bare = Bare::with(&Description {
        slots: 2,
        ..Description::pci()
    })?;
    let client = bare.client(road)?;
    process::scope(|scope| {
        let readers: Vec<_> = (0..5u64)
            .map(|i| {
                let client = &client;
                scope.spawn(move || client.read_u32(TRAPPED, i * 4))
            })
            .collect();
        let mut taken = vec![
            works("take", bare.server.take())?,
            works("take", bare.server.take())?,
        ];
        time::until("five requests being there", || {
            bare.server
                .node()
                .query()
                .is_ok_and(|query| query.queued + query.taken == 5)
        })?;
        fails("a third take", bare.server.try_take(), libc::EAGAIN)?;
        let events = sys::poll(bare.server.node(), libc::POLLIN, time::quiet())?;
        equal("events with no free slot", events, 0)?;
        for served in 0..5 {
            let request = match taken.pop() {
                Some(request) => request,
                None => works("take", bare.server.take())
                    .with_context(|| format!("after {served} replies"))?,
            };
            let data = (request.head.offset as u32).to_le_bytes();
            works("reply", bare.server.reply_data(request.slot, &data))?;
        }
        for (i, reader) in readers.into_iter().enumerate() {
            let value = reader
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?;
            equal("answer", works("read", value)?, i as u32 * 4)?;
        }
        Ok(())
    })
}

fn two_devices_at_once_stay_apart(road: Road) -> Result<()> {
    let answer = |base: u8| {
        move |request: &Request| match request.head.kind {
            READ => Reply::Data(vec![base; request.head.count as usize]),
            _ => Reply::Done,
        }
    };
    let description = Description::pci();
    let one = Rig::serving(road, &description, 2, answer(1))?;
    let two = Rig::serving(road, &description, 2, answer(2))?;
    let irq_one = one.client.enable_irq(1, 0)?;
    let irq_two = two.client.enable_irq(1, 0)?;
    process::scope(|scope| {
        let threads: Vec<_> = [(&one, 1u8), (&two, 2u8), (&one, 1u8), (&two, 2u8)]
            .into_iter()
            .map(|(rig, base)| {
                scope.spawn(move || -> Result<()> {
                    for _ in 0..200 {
                        let data = rig.client.read_vec(TRAPPED, 64, 4)?;
                        equal("answer", data, vec![base; 4])?;
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        anyhow::Ok(())
    })?;
    one.server.trigger(1, 0, 1)?;
    equal("interrupts of one", irq_one.take()?, 1)?;
    equal("interrupts of the other", irq_two.take()?, 0)?;
    let memory = (one.client.map(2, 0, 4096)?, two.client.map(2, 0, 4096)?);
    memory.0.write(0, 0x1111_1111u32);
    equal("memory of the other", memory.1.read::<u32>(0), 0)
}

fn second_client_of_a_device_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let busy = [libc::EBUSY, libc::EINVAL];
    for other in Road::ALL {
        if other.lacking().is_none() {
            let second = Client::open(&rig.mdev, other);
            let what = format!("a second client, on the {other}");
            muser_e2e::check::fails_as(&what, second.map(drop), &busy)?;
        }
    }
    works("the first client", rig.client.read_u32(TRAPPED, 0)).map(drop)
}

/// VFIO clients wait killably: an alarm does not abort a register access half-way.
fn signals_at_a_waiting_client_do_not_end_its_wait(road: Road) -> Result<()> {
    sys::catch_signal(libc::SIGUSR1, false)?;
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    let (send, receive) = std::sync::mpsc::channel();
    process::scope(|scope| {
        let client = &client;
        let reader = scope.spawn(move || {
            send.send(sys::thread_id()).map_err(std::io::Error::other)?;
            client.read_u32(TRAPPED, 0)
        });
        let tid = receive.recv()?;
        let request = works("take", bare.server.take())?;
        for _ in 0..100 {
            sys::kill_thread(tid, libc::SIGUSR1)?;
        }
        ensure!(!reader.is_finished(), "a signal ended the client's wait");
        works("reply", bare.server.reply_data(request.slot, &[1, 0, 0, 0]))?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("answer", works("read", value)?, 1)
    })
}

/// A process that is interrupted all the time, in calls which reply and take at once: each write
/// arrives once, and each is answered.
fn signal_storm_at_the_process_loses_nothing(road: Road) -> Result<()> {
    // Once with calls that fail with EINTR, once with calls that the kernel restarts.
    for restart in [false, true] {
        sys::catch_signal(libc::SIGUSR1, restart)?;
        storm(road).with_context(|| format!("with SA_RESTART {restart}"))?;
    }
    Ok(())
}

fn storm(road: Road) -> Result<()> {
    const WRITES: u64 = 1000;
    let bare = Bare::new()?;
    let client = bare.client(road)?;
    let over = AtomicBool::new(false);
    let (sum, count) = (AtomicU64::new(0), AtomicU64::new(0));
    let (send, receive) = std::sync::mpsc::channel();
    let interrupted = AtomicU64::new(0);
    process::scope(|scope| {
        let (server, over, sum, count) = (&bare.server, &over, &sum, &count);
        let interrupted = &interrupted;
        let serving = scope.spawn(move || -> Result<()> {
            send.send(sys::thread_id())?;
            let mut next = muser_next {
                size: size_of::<muser_next>() as u32,
                flags: MUSER_NEXT_TAKE,
                ..Default::default()
            };
            while count.load(Ordering::Relaxed) < WRITES {
                match server.node().next(&mut next) {
                    Ok(()) => {}
                    // NEXT clears REPLY in place once it is accepted: calling again is all there
                    // is to do.
                    Err(error) if errno_of(&error) == libc::EINTR => {
                        interrupted.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    Err(error) => return Err(error).context("NEXT"),
                }
                let request = server.request(next.slot);
                let mut value = [0; 8];
                value.copy_from_slice(&request.data);
                sum.fetch_add(u64::from_le_bytes(value), Ordering::Relaxed);
                count.fetch_add(1, Ordering::Relaxed);
                server.set_result(next.slot, 0);
                next.flags = MUSER_NEXT_REPLY | MUSER_NEXT_TAKE;
            }
            // The last reply goes alone.
            works("the last reply", server.send_reply(next.slot))
        });
        let tid = receive.recv()?;
        let storm = scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                // The thread may have ended.
                let _ = sys::kill_thread(tid, libc::SIGUSR1);
                std::thread::yield_now();
            }
        });
        let mut expected = 0;
        let mut writes = || -> Result<()> {
            for i in 0..WRITES {
                let value = i * 7 + 1;
                expected += value;
                works("write", client.write_all(TRAPPED, 0, &value.to_le_bytes()))?;
            }
            Ok(())
        };
        let written = writes();
        over.store(true, Ordering::Relaxed);
        storm
            .join()
            .map_err(|_| anyhow::anyhow!("the storm panicked"))?;
        written?;
        serving
            .join()
            .map_err(|_| anyhow::anyhow!("the process panicked"))??;
        equal("writes served", count.load(Ordering::Relaxed), WRITES)?;
        equal(
            "sum of what was written",
            sum.load(Ordering::Relaxed),
            expected,
        )
    })?;
    println!(
        "{} calls were interrupted",
        interrupted.load(Ordering::Relaxed)
    );
    Ok(())
}
