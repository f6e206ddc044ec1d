// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A successor in standby: it waits until the attached process goes, and takes over in that moment.

use std::sync::mpsc;
use std::time::Instant;

use anyhow::{anyhow, bail, ensure, Context, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, Refusal, Server, TRAPPED};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::Bare;
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{sys, time};
use muser_uapi::*;

use super::topic;

topic!("standby", once: [
    standby_without_anybody_attached_attaches_at_once,
    standby_is_told_to_the_attached_process,
    handover_happens_at_detach,
    handover_happens_at_close,
    handover_happens_at_death,
    second_standby_refused,
    standby_with_other_description_refused_at_once,
    standby_with_other_tag_refused_at_once,
    nonblocking_standby_would_wait,
    interrupted_standby_leaves_no_trace,
    killed_standby_leaves_no_trace,
    standby_of_removed_device_ends,
    standby_in_the_attached_file_refused,
    recovered_says_what_is_there,
], roads: [
    requests_wait_for_the_successor_and_do_not_time_out,
    attached_process_replies_to_what_it_took_but_takes_no_more,
    waiting_threads_of_the_attached_process_are_told,
    chain_of_successors_loses_nothing,
]);

fn successor() -> Description {
    Description {
        flags: MUSER_ATTACH_STANDBY,
        ..Description::pci()
    }
}

/// Waits until somebody waits in standby, as another file sees it.
fn in_standby(node: &Node) -> Result<muser_query> {
    time::until("a standby waiting", || {
        node.query()
            .is_ok_and(|query| query.flags & MUSER_STATE_STANDBY != 0)
    })?;
    Ok(node.query()?)
}

fn refused(refusal: Result<muser_attach, Refusal>, errno: i32, fault: u32) -> Result<()> {
    match refusal {
        Ok(_) => bail!("accepted, expected fault {fault}"),
        Err(refusal) => equal(
            "errno, fault",
            (refusal.errno, refusal.fault),
            (errno, fault),
        ),
    }
}

fn standby_without_anybody_attached_attaches_at_once() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let answer = Node::open(&mdev)?.attach_raw(&successor())?;
    equal("recovered", answer.recovered, 0)
}

fn standby_is_told_to_the_attached_process() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let status = server.status()?;
    equal("flags before", status.read::<u32>(0), 0)?;
    let before = sys::poll(server.node(), libc::POLLIN, time::quiet())?;
    equal("events before", before, 0)?;
    process::scope(|scope| {
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        let events = sys::poll(server.node(), libc::POLLIN, time::patience())?;
        equal("events", events, libc::POLLIN)?;
        let query = in_standby(server.node())?;
        equal("pid", query.pid, std::process::id())?;
        equal("standby_pid", query.standby_pid, std::process::id())?;
        equal("status", status.read::<u32>(0), MUSER_STATE_STANDBY)?;
        fails("take", server.try_take(), libc::ESHUTDOWN)?;
        fails("blocking take", server.take_with(0), libc::ESHUTDOWN)?;
        ensure!(!waiting.is_finished(), "the standby did not wait");
        works("detach", server.node().detach())?;
        let successor = waiting
            .join()
            .map_err(|_| anyhow!("the standby panicked"))??;
        let query = successor.node().query()?;
        equal("standby_pid after", query.standby_pid, 0)?;
        equal("state after", query.flags & MUSER_STATE_STANDBY, 0)?;
        equal("status after", successor.status()?.read::<u32>(0), 0)?;
        let events = sys::poll(server.node(), libc::POLLIN, time::patience())?;
        ensure!(events & libc::POLLHUP != 0, "the old file has {events:#x}");
        fails("the old file's take", server.try_take(), libc::ENOTCONN)?;
        fails("the successor's take", successor.try_take(), libc::EAGAIN)
    })
}

/// Somebody is attached, or the device's requests would notice: `leave` must be the hand-over.
fn handed_over(leave: impl FnOnce(Process) -> Result<Option<Process>>) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    mdev.set_attribute("reattach_timeout_ms", "0")?;
    let process = Process::helper(&["serve", mdev.uuid()])?;
    process.expect("ready")?;
    let watch = Node::open(&mdev)?;
    process::scope(|scope| {
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        let query = in_standby(&watch)?;
        equal("pid", query.pid, process.id().unsigned_abs())?;
        let kept = leave(process)?;
        let server = waiting
            .join()
            .map_err(|_| anyhow!("the standby panicked"))??;
        let query = server.node().query()?;
        equal("pid after", query.pid, std::process::id())?;
        equal("attachments", query.counters.attachments, 2)?;
        drop(kept);
        Ok(())
    })
}

fn handover_happens_at_detach() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    process::scope(|scope| {
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        in_standby(server.node())?;
        works("detach", server.node().detach())?;
        // In that very moment, and not when the waiting thread gets to run.
        let flags = server.node().query()?.flags;
        equal(
            "attached",
            flags & MUSER_STATE_ATTACHED,
            MUSER_STATE_ATTACHED,
        )?;
        waiting
            .join()
            .map_err(|_| anyhow!("the standby panicked"))?
            .map(drop)
    })
}

fn handover_happens_at_close() -> Result<()> {
    handed_over(|mut process| {
        process.close_input();
        process.wait()?;
        Ok(Some(process))
    })
}

fn handover_happens_at_death() -> Result<()> {
    handed_over(|mut process| {
        process.kill()?;
        Ok(None)
    })
}

fn second_standby_refused() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    process::scope(|scope| {
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        in_standby(server.node())?;
        let second = Node::open(&mdev)?.attach_raw(&successor());
        refused(second, libc::EBUSY, MUSER_FAULT_STANDBY)?;
        let plain = Node::open(&mdev)?.attach_raw(&Description::pci());
        refused(plain, libc::EBUSY, MUSER_FAULT_ATTACHED)?;
        works("detach", server.node().detach())?;
        waiting
            .join()
            .map_err(|_| anyhow!("the standby panicked"))?
            .map(drop)
    })
}

fn standby_with_other_description_refused_at_once() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let mut other = successor();
    other.regions[0].size *= 2;
    let answer = Node::open(&mdev)?.attach_raw(&other);
    refused(answer, libc::ESTALE, MUSER_FAULT_DIFFERS)?;
    let query = server.node().query()?;
    equal("standby", query.flags & MUSER_STATE_STANDBY, 0)?;
    fails("take", server.try_take(), libc::EAGAIN)
}

fn standby_with_other_tag_refused_at_once() -> Result<()> {
    let tagged = |tag, description| Description {
        state_tag: tag,
        ..description
    };
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &tagged(7, Description::pci()))?;
    let client = Client::open(&mdev, Road::Group)?;
    let answer = Node::open(&mdev)?.attach_raw(&tagged(8, successor()));
    refused(answer, libc::ESTALE, MUSER_FAULT_STATE_DIFFERS)?;
    // The attached process does not hear of it, and serves on.
    let query = server.node().query()?;
    equal("standby", query.flags & MUSER_STATE_STANDBY, 0)?;
    equal(
        "status",
        server.status()?.read::<u32>(0) & MUSER_STATE_STANDBY,
        0,
    )?;
    fails("take", server.try_take(), libc::EAGAIN)?;
    process::scope(|scope| {
        let reading = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = server.take()?;
        works(
            "reply",
            server.reply_data(request.slot, &5u32.to_ne_bytes()),
        )?;
        let read = reading.join().map_err(|_| anyhow!("the client panicked"))?;
        equal("read", read?, 5)
    })?;
    // One that understands the state takes over, as does one without an opinion.
    for tag in [7, 0] {
        let owner = Mdev::create(Type::Pci)?;
        let server = Server::attach(&owner, &tagged(7, Description::pci()))?;
        process::scope(|scope| {
            let waiting = scope.spawn(|| Server::attach(&owner, &tagged(tag, successor())));
            in_standby(server.node())?;
            works("detach", server.node().detach())?;
            let waited = waiting.join();
            waited
                .map_err(|_| anyhow!("the standby panicked"))?
                .map(drop)
        })?;
    }
    Ok(())
}

fn nonblocking_standby_would_wait() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let node = Node::open(&mdev)?;
    sys::set_nonblocking(&node, true)?;
    for _ in 0..2 {
        refused(node.attach_raw(&successor()), libc::EAGAIN, 0)?;
        equal(
            "events",
            sys::poll(server.node(), libc::POLLIN, time::quiet())?,
            0,
        )?;
    }
    works("detach", server.node().detach())?;
    node.attach_raw(&successor())?;
    Ok(())
}

fn interrupted_standby_leaves_no_trace() -> Result<()> {
    sys::catch_signal(libc::SIGUSR1, false)?;
    let Bare { server, mdev } = Bare::new()?;
    let (send, receive) = mpsc::channel();
    process::scope(|scope| {
        let node = Node::open(&mdev)?;
        let waiting = scope.spawn(|| {
            // The receiver waits for it.
            let _ = send.send(sys::thread_id());
            let answer = node.attach_raw(&successor());
            (node, answer)
        });
        let tid = receive.recv()?;
        in_standby(server.node())?;
        sys::kill_thread(tid, libc::SIGUSR1)?;
        let (node, answer) = waiting.join().map_err(|_| anyhow!("it panicked"))?;
        refused(answer, libc::EINTR, 0)?;
        let query = server.node().query()?;
        equal(
            "standby",
            (query.flags & MUSER_STATE_STANDBY, query.standby_pid),
            (0, 0),
        )?;
        equal("status", server.status()?.read::<u32>(0), 0)?;
        fails("take", server.try_take(), libc::EAGAIN)?;
        // The same file may try again.
        works("detach", server.node().detach())?;
        node.attach_raw(&successor())?;
        Ok(())
    })
}

fn killed_standby_leaves_no_trace() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let mut standby = Process::helper(&["standby", mdev.uuid()])?;
    let query = in_standby(server.node())?;
    equal(
        "standby_pid",
        query.standby_pid,
        standby.id().unsigned_abs(),
    )?;
    standby.kill()?;
    time::until("the standby being forgotten", || {
        let query = server.node().query();
        query.is_ok_and(|query| query.flags & MUSER_STATE_STANDBY == 0)
    })?;
    fails("take", server.try_take(), libc::EAGAIN)?;
    drop(server);
    Server::attach(&mdev, &Description::pci()).map(drop)
}

fn standby_of_removed_device_ends() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    process::scope(|scope| {
        let waiting = scope.spawn(|| {
            Node::open(&mdev)?
                .attach_raw(&successor())
                .map_err(anyhow::Error::from)
        });
        in_standby(server.node())?;
        works("remove", mdev.remove())?;
        let answer = waiting.join().map_err(|_| anyhow!("it panicked"))?;
        let refusal = answer.expect_err("attached to a removed device");
        let refusal = refusal.downcast::<Refusal>()?;
        equal("errno", refusal.errno, libc::ENODEV)
    })
}

/// Two threads of one process, one file: whoever attaches first, the file is attached once.
fn standby_in_the_attached_file_refused() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let answer = server.node().attach_raw(&successor());
    refused(answer, libc::EISCONN, MUSER_FAULT_ATTACHED_SELF)?;
    let twice = Node::open(&mdev)?;
    process::scope(|scope| {
        let first = scope.spawn(|| twice.attach_raw(&successor()));
        in_standby(server.node())?;
        refused(
            twice.attach_raw(&successor()),
            libc::EBUSY,
            MUSER_FAULT_STANDBY,
        )?;
        works("detach", server.node().detach())?;
        first.join().map_err(|_| anyhow!("it panicked"))??;
        let again = twice.attach_raw(&successor());
        refused(again, libc::EISCONN, MUSER_FAULT_ATTACHED_SELF)
    })
}

fn recovered_says_what_is_there() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    mdev.set_attribute("reattach_timeout_ms", "60000")?;
    let attach = || -> Result<(Node, muser_attach)> {
        let node = Node::open(&mdev)?;
        let answer = node.attach_raw(&Description::pci())?;
        Ok((node, answer))
    };
    let (node, first) = attach()?;
    equal("at first", first.recovered, 0)?;
    drop(node);
    let (node, second) = attach()?;
    equal("served before", second.recovered, MUSER_RECOVERED_SERVED)?;
    drop(node);
    let client = Client::open(&mdev, Road::Group)?;
    let (node, third) = attach()?;
    let open = MUSER_RECOVERED_SERVED | MUSER_RECOVERED_CLIENT;
    equal("with a client", third.recovered, open)?;
    drop(node);
    let server = Server::attach(&mdev, &Description::pci())?;
    process::scope(|scope| {
        let read = scope.spawn(|| client.read_u32(TRAPPED, 0));
        works("take", server.take())?;
        drop(server);
        let node = Node::open(&mdev)?;
        let answer = node.attach_raw(&Description::pci())?;
        let replays = open | MUSER_RECOVERED_REPLAYS;
        equal("with a replay", answer.recovered, replays)?;
        drop(node);
        let server = Server::attach(&mdev, &Description::pci())?;
        let request = works("take", server.take())?;
        works("reply", server.reply(request.slot, 0))?;
        let read = read.join().map_err(|_| anyhow!("the client panicked"))?;
        works("read", read).map(drop)
    })
}

fn requests_wait_for_the_successor_and_do_not_time_out(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    // Any moment without an attachment would end a waiting request.
    mdev.set_attribute("reattach_timeout_ms", "0")?;
    let client = works("opening", Client::open(&mdev, road))?;
    process::scope(|scope| {
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        in_standby(server.node())?;
        let reads = [0, 4, 8].map(|offset| {
            let client = &client;
            scope.spawn(move || client.read_u32(TRAPPED, offset))
        });
        time::until("the requests being queued", || {
            server.node().query().is_ok_and(|query| query.queued == 3)
        })?;
        fails("take", server.try_take(), libc::ESHUTDOWN)?;
        works("detach", server.node().detach())?;
        let successor = waiting.join().map_err(|_| anyhow!("it panicked"))??;
        for _ in 0..3 {
            let request = works("take", successor.take())?;
            equal("flags", request.head.flags, 0)?;
            let data = (request.head.offset as u32 + 1).to_le_bytes();
            works("reply", successor.reply_data(request.slot, &data))?;
        }
        for (offset, read) in [0, 4, 8].into_iter().zip(reads) {
            let value = read.join().map_err(|_| anyhow!("the client panicked"))?;
            equal("answer", works("read", value)?, offset + 1)?;
        }
        equal("timeouts", successor.node().query()?.counters.timeouts, 0)
    })
}

fn attached_process_replies_to_what_it_took_but_takes_no_more(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let client = works("opening", Client::open(&mdev, road))?;
    process::scope(|scope| {
        let reads = [0, 4].map(|offset| {
            let client = &client;
            scope.spawn(move || client.read_u32(TRAPPED, offset))
        });
        let taken = [works("take", server.take())?, works("take", server.take())?];
        let third = scope.spawn(|| client.read_u32(TRAPPED, 8));
        time::until("the third request being queued", || {
            server.node().query().is_ok_and(|query| query.queued == 1)
        })?;
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        in_standby(server.node())?;
        // A reply and a take in one call: the reply counts, and is not sent again.
        server.set_data(taken[0].slot, &[7, 0, 0, 0]);
        server.set_result(taken[0].slot, 0);
        let mut next = muser_next {
            size: size_of::<muser_next>() as u32,
            flags: MUSER_NEXT_REPLY | MUSER_NEXT_TAKE,
            slot: taken[0].slot,
            ..Default::default()
        };
        fails(
            "reply and take",
            server.node().next(&mut next),
            libc::ESHUTDOWN,
        )?;
        equal("flags", next.flags, MUSER_NEXT_TAKE)?;
        fails(
            "the same again",
            server.node().next(&mut next),
            libc::ESHUTDOWN,
        )?;
        // The other one is left to the successor.
        works("detach", server.node().detach())?;
        let successor = waiting.join().map_err(|_| anyhow!("it panicked"))??;
        let mut seen = Vec::new();
        for _ in 0..2 {
            let request = works("take", successor.take())?;
            seen.push((request.head.id, request.head.flags));
            works("reply", successor.reply_data(request.slot, &[9, 0, 0, 0]))?;
        }
        equal(
            "the replay",
            seen[0],
            (taken[1].head.id, MUSER_REQUEST_REPLAY),
        )?;
        equal("flags of the third", seen[1].1, 0)?;
        let mut values = Vec::new();
        for read in reads {
            let value = read.join().map_err(|_| anyhow!("the client panicked"))?;
            values.push(works("read", value)?);
        }
        values.sort_unstable();
        equal("answers", values, vec![7, 9])?;
        let third = third.join().map_err(|_| anyhow!("the client panicked"))?;
        equal("the third", works("read", third)?, 9)
    })
}

fn waiting_threads_of_the_attached_process_are_told(_road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    process::scope(|scope| {
        let takers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| server.take_with(0)))
            .collect();
        let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
        for taker in takers {
            let taken = taker.join().map_err(|_| anyhow!("a thread panicked"))?;
            fails("take", taken, libc::ESHUTDOWN)?;
        }
        works("detach", server.node().detach())?;
        waiting
            .join()
            .map_err(|_| anyhow!("it panicked"))?
            .map(drop)
    })
}

/// Process after process takes over amid a client that never stops, with no patience at all.
fn chain_of_successors_loses_nothing(road: Road) -> Result<()> {
    const GENERATIONS: usize = 50;
    let Bare { server, mdev } = Bare::new()?;
    mdev.set_attribute("reattach_timeout_ms", "0")?;
    let client = works("opening", Client::open(&mdev, road))?;
    let over = std::sync::atomic::AtomicBool::new(false);
    let started = Instant::now();
    process::scope(|scope| {
        let (client, over) = (&client, &over);
        let writing = scope.spawn(move || -> Result<u64> {
            let mut count = 0u64;
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let write = client.write_all(TRAPPED, 0, &count.to_le_bytes());
                works("write", write).with_context(|| format!("after {count}"))?;
                count += 1;
            }
            Ok(count)
        });
        let mut seen = 0u64;
        let mut serve = |server: &Server| -> Result<()> {
            loop {
                let request = match server.take_with(0) {
                    Ok(request) => request,
                    Err(error) if error.raw_os_error() == Some(libc::ESHUTDOWN) => return Ok(()),
                    Err(error) => return Err(error).context("take"),
                };
                let mut value = [0; 8];
                value.copy_from_slice(&request.data);
                equal("write", u64::from_le_bytes(value), seen)?;
                equal("flags", request.head.flags, 0)?;
                works("reply", server.reply(request.slot, 0))?;
                seen += 1;
            }
        };
        let mut server = server;
        for _ in 0..GENERATIONS {
            let waiting = scope.spawn(|| Server::attach(&mdev, &successor()));
            serve(&server)?;
            works("detach", server.node().detach())?;
            server = waiting.join().map_err(|_| anyhow!("it panicked"))??;
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        while !writing.is_finished() {
            if let Ok(request) = server.try_take() {
                works("reply", server.reply(request.slot, 0))?;
                seen += 1;
            }
        }
        let count = writing
            .join()
            .map_err(|_| anyhow!("the client panicked"))??;
        equal("writes", seen, count)?;
        println!(
            "{GENERATIONS} hand-overs amid {count} writes in {:?}",
            started.elapsed()
        );
        Ok(())
    })
}
