// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many requests, devices and clients at once, and signals in between.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, errno_of, fails, works};
use muser_e2e::node::{Description, Request, TRAPPED};
use muser_e2e::process;
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::service::Reply;
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{sys, time};
use muser_uapi::*;

use super::topic;

topic!("parallel", once: [], roads: [
    many_threads_get_their_own_answers,
    replies_out_of_order_reach_their_clients,
    more_requests_than_slots_wait,
    two_devices_at_once_stay_apart,
    second_client_of_a_device_refused,
    signals_at_a_waiting_client_do_not_end_its_wait,
    signal_storm_at_the_process_loses_nothing,
]);

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
    let served = rig.service.record().drain().len() as u64;
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
            MUSER_REQUEST_READ => Reply::Data(vec![base; request.head.count as usize]),
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
