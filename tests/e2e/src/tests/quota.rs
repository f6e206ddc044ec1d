// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Limits that an operator sets: of a device, and of all devices of a user.

use std::fs;
use std::path::PathBuf;

use anyhow::{anyhow, bail, Context, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{area, irq, region, Description, Node, Server, MSI, MSIX, TRAPPED};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::Bare;
use muser_e2e::vfio::Road;
use muser_e2e::{module, time};
use muser_uapi::*;

use super::owner::{create_as, USER};
use super::topic;

topic!("quota", once: [
    max_requests_is_from_1_to_512,
    max_vectors_counts_all_indexes,
    user_limits_have_defaults_and_are_beside_one_parent,
    devices_beyond_the_users_limit_refused,
    removed_device_counts_while_its_node_is_open,
    users_do_not_count_for_each_other,
    memory_beyond_the_users_limit_refused,
    memory_of_a_user_comes_back_with_the_device,
    memory_of_a_removed_device_counts_while_it_is_mapped,
    successor_that_gives_up_gives_its_memory_back,
], roads: [
    max_requests_makes_clients_wait,
    clients_that_wait_for_room_can_be_killed_and_stopped,
    max_requests_does_not_keep_the_reset_of_a_close,
]);

const PAGE: u32 = 4096;

fn max_requests_is_from_1_to_512() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let name = "max_requests";
    equal("default", mdev.attribute(name)?.as_str(), "512")?;
    for value in ["0", "513", "4294967296", "18446744073709551615"] {
        fails(value, mdev.set_attribute(name, value), libc::ERANGE)?;
    }
    for value in ["x", "-1"] {
        fails(value, mdev.set_attribute(name, value), libc::EINVAL)?;
    }
    for value in ["1", "512"] {
        works(value, mdev.set_attribute(name, value))?;
        equal("value", mdev.attribute(name)?.as_str(), value)?;
    }
    Ok(())
}

fn max_requests_makes_clients_wait(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let (server, mdev) = (&bare.server, &bare.mdev);
    works("limit", mdev.set_attribute("max_requests", "2"))?;
    let client = bare.client(road)?;
    let in_flight = |count: u32| {
        time::until("the requests being in flight", || {
            let query = server.node().query();
            query.is_ok_and(|query| query.queued + query.taken == count)
        })
    };
    process::scope(|scope| {
        let reads: Vec<_> = (0..6u64)
            .map(|i| {
                let client = &client;
                scope.spawn(move || client.read_u32(TRAPPED, i * 4))
            })
            .collect();
        in_flight(2)?;
        let first = [works("take", server.take())?, works("take", server.take())?];
        fails("a third", server.try_take(), libc::EAGAIN)?;
        works("reply", server.reply(first[0].slot, 0))?;
        // One goes, one comes; then there is room for two more.
        in_flight(2)?;
        works("raising it", mdev.set_attribute("max_requests", "4"))?;
        in_flight(4)?;
        works("lowering it", mdev.set_attribute("max_requests", "1"))?;
        works("reply", server.reply(first[1].slot, 0))?;
        for _ in 0..4 {
            let next = works("take", server.take())?;
            works("reply", server.reply(next.slot, 0))?;
        }
        for read in reads {
            let value = read.join().map_err(|_| anyhow!("a client panicked"))?;
            works("read", value)?;
        }
        in_flight(0)
    })
}

/// Who is killed may have been woken for the room that there was: then another one needs to be.
fn clients_that_wait_for_room_can_be_killed_and_stopped(road: Road) -> Result<()> {
    const ROUNDS: u32 = 8;
    let bare = Bare::new()?;
    let server = &bare.server;
    works("limit", bare.mdev.set_attribute("max_requests", "1"))?;
    let client = bare.client(road)?;
    let position = client.region_info(TRAPPED)?.offset.to_string();
    let sharer = || -> Result<Process> {
        let sharer = Process::helper_on(client.file(), &["sharer", "read", &position])?;
        sharer.expect("ready")?;
        sharer.wait_for_sleep()?;
        Ok(sharer)
    };
    let in_flight = || {
        server
            .node()
            .query()
            .map(|query| query.queued + query.taken)
    };
    for round in 0..ROUNDS {
        process::scope(|scope| {
            let client = &client;
            let read = || scope.spawn(move || client.read_u32(TRAPPED, 4));
            let mut reads = vec![read()];
            let first = works("take", server.take())?;
            // The first to wait is the first to be woken.
            let mut killed = sharer()?;
            let mut stopped = sharer()?;
            reads.extend([read(), read()]);
            stopped.signal(libc::SIGSTOP)?;
            equal("in flight", in_flight()?, 1)?;
            if round % 2 == 0 {
                works("reply", server.reply(first.slot, 0))?;
                killed.kill()?;
            } else {
                killed.kill()?;
                equal("in flight after the kill", in_flight()?, 1)?;
                works("reply", server.reply(first.slot, 0))?;
            }
            // The one that is stopped stops when it has its answer.
            time::until("the others getting through", || {
                if let Ok(request) = server.try_take() {
                    // It may be that of who was killed.
                    let _ = server.reply(request.slot, 0);
                }
                reads.iter().all(|read| read.is_finished())
                    && in_flight().is_ok_and(|count| count == 0)
            })?;
            for read in reads {
                let value = read.join().map_err(|_| anyhow!("a client panicked"))?;
                works("read", value)?;
            }
            stopped.signal(libc::SIGCONT)?;
            time::until("the one that was stopped getting through", || {
                if let Ok(request) = server.try_take() {
                    let _ = server.reply(request.slot, 0);
                }
                matches!(stopped.wait_within(std::time::Duration::ZERO), Ok(Some(_)))
            })?;
            stopped.expect("read")?;
            equal("in flight at the end", in_flight()?, 0)
        })?;
    }
    Ok(())
}

fn max_requests_does_not_keep_the_reset_of_a_close(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    works("limit", mdev.set_attribute("max_requests", "1"))?;
    let words = ["client", road.name(), mdev.uuid(), "read", "0", "64"];
    let mut client = Process::helper(&words)?;
    client.expect("open")?;
    let taken = works("take", server.take())?;
    client.kill()?;
    time::until("the reset being queued", || {
        server.node().query().is_ok_and(|query| query.queued == 1)
    })?;
    fails("late reply", server.reply(taken.slot, 0), libc::ECANCELED)?;
    let reset = works("taking the reset", server.take())?;
    equal("flags", reset.head.flags, MUSER_REQUEST_CLOSE)
}

fn refused(mdev: &Mdev, description: &Description, expected: (i32, u32, u32)) -> Result<()> {
    match Node::open(mdev)?.attach_raw(description) {
        Ok(_) => bail!("accepted, expected fault {}", expected.1),
        Err(refusal) => equal(
            "errno, fault, index",
            (refusal.errno, refusal.fault, refusal.fault_index),
            expected,
        ),
    }
}

fn max_vectors_counts_all_indexes() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let name = "max_vectors";
    equal("default", mdev.attribute(name)?.as_str(), "4096")?;
    let with = |msi, msix| Description {
        irqs: vec![irq(MSI, msi, 0), irq(MSIX, msix, 0)],
        ..Description::minimal()
    };
    works("limit", mdev.set_attribute(name, "40"))?;
    let too_many = (libc::ENOSPC, MUSER_FAULT_LIMIT, 4);
    refused(&mdev, &with(8, 33), too_many)?;
    refused(&mdev, &with(2048, 2048), too_many)?;
    let server = Server::attach(&mdev, &with(8, 32))?;
    fails(
        "once described",
        mdev.set_attribute(name, "41"),
        libc::EBUSY,
    )?;
    drop(server);
    Server::attach(&mdev, &with(8, 32))?;
    let platform = Mdev::create(Type::Platform)?;
    let three = Description {
        irqs: (0..3).map(|index| irq(index, 2048, 0)).collect(),
        ..Description::platform()
    };
    refused(&platform, &three, too_many)
}

fn parent(name: &str) -> PathBuf {
    PathBuf::from("/sys/class/mdev_bus/muser").join(name)
}

fn limit(name: &str) -> Result<String> {
    let text = fs::read_to_string(parent(name)).with_context(|| format!("reading {name}"))?;
    Ok(text.trim_end().to_owned())
}

/// A limit of users, as it was when dropped.
struct Limit {
    name: &'static str,
    before: String,
}

impl Limit {
    fn set(name: &'static str, value: u64) -> Result<Self> {
        module::load()?;
        let before = limit(name)?;
        fs::write(parent(name), value.to_string()).with_context(|| format!("writing {name}"))?;
        Ok(Self { name, before })
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // Whoever comes next finds a strange limit, and says so.
        let _ = fs::write(parent(self.name), &self.before);
    }
}

fn user_limits_have_defaults_and_are_beside_one_parent() -> Result<()> {
    module::load()?;
    equal("devices", limit("max_user_devices")?.as_str(), "256")?;
    equal("memory", limit("max_user_memory")?.as_str(), "4294967296")?;
    for (name, beyond) in [
        ("max_user_devices", "4294967296"),
        ("max_user_memory", "18446744073709551616"),
    ] {
        let other = PathBuf::from("/sys/class/mdev_bus/muser-platform").join(name);
        equal("beside the other parent", other.exists(), false)?;
        for (value, errno) in [("x", libc::EINVAL), (beyond, libc::ERANGE)] {
            fails(
                &format!("{value} to {name}"),
                fs::write(parent(name), value),
                errno,
            )?;
        }
    }
    Ok(())
}

fn devices_beyond_the_users_limit_refused() -> Result<()> {
    let _limit = Limit::set("max_user_devices", 2)?;
    let first = works("the first", create_as(USER, Type::Pci)?)?;
    let _second = works("the second", create_as(USER, Type::Platform)?)?;
    for kind in Type::ALL {
        fails("the third", create_as(USER, kind)?, libc::EDQUOT)?;
    }
    // Nothing is left of what was refused.
    equal("devices", Mdev::list().len(), 2)?;
    equal("nodes", fs::read_dir("/dev/muser")?.count(), 2)?;
    let _roots: Vec<Mdev> = (0..4)
        .map(|_| Mdev::create(Type::Pci))
        .collect::<Result<_>>()?;
    works("remove", first.remove())?;
    let _third = works("the third now", create_as(USER, Type::Platform)?)?;
    fails("the fourth", create_as(USER, Type::Pci)?, libc::EDQUOT)
}

fn removed_device_counts_while_its_node_is_open() -> Result<()> {
    let _limit = Limit::set("max_user_devices", 1)?;
    let first = works("the first", create_as(USER, Type::Pci)?)?;
    let node = works("its node", Node::open(&first))?;
    works("remove", first.remove())?;
    fails("the second", create_as(USER, Type::Pci)?, libc::EDQUOT)?;
    drop(node);
    // The last reference goes shortly after the last file is closed.
    let mut second = create_as(USER, Type::Pci)?;
    for _ in 0..1000 {
        if second.is_ok() {
            break;
        }
        second = create_as(USER, Type::Pci)?;
    }
    works("the second now", second).map(drop)
}

fn users_do_not_count_for_each_other() -> Result<()> {
    let _limit = Limit::set("max_user_devices", 1)?;
    let mut devices = Vec::new();
    for uid in USER..USER + 5 {
        devices.push(works("the user's one", create_as(uid, Type::Pci)?)?);
        fails(
            "the user's second",
            create_as(uid, Type::Pci)?,
            libc::EDQUOT,
        )?;
    }
    drop(devices);
    works("again", create_as(USER + 3, Type::Pci)?).map(drop)
}

/// A device with so many pages of memory and state.
fn sized(pages: u64, state_pages: u32) -> Description {
    let mut description = Description::minimal();
    let size = pages * u64::from(PAGE);
    let memory = muser_region {
        num_areas: 1,
        ..region(0, size)
    };
    description.regions.insert(0, memory);
    description.areas = vec![area(0, size)];
    description.state_size = state_pages * PAGE;
    description
}

const QUOTA: (i32, u32, u32) = (libc::EDQUOT, MUSER_FAULT_USER_MEMORY, 0);

fn memory_beyond_the_users_limit_refused() -> Result<()> {
    let _limit = Limit::set("max_user_memory", 10 * u64::from(PAGE))?;
    let one = works("create", create_as(USER, Type::Pci)?)?;
    let two = works("create", create_as(USER, Type::Pci)?)?;
    refused(&one, &sized(11, 0), QUOTA)?;
    refused(&one, &sized(10, 1), QUOTA)?;
    let server = Server::attach(&one, &sized(5, 1))?;
    refused(&two, &sized(5, 0), QUOTA)?;
    refused(&two, &sized(3, 2), QUOTA)?;
    let other = Server::attach(&two, &sized(2, 1))?;
    // One page is left: enough for a page of state more, whoever comes.
    drop(server);
    refused(&one, &sized(5, 3), QUOTA)?;
    let server = Server::attach(&one, &sized(5, 2))?;
    // The quota is looked at before who is attached.
    refused(&two, &sized(2, 2), QUOTA)?;
    // What a device has it keeps, as often as processes come.
    drop((server, other));
    for _ in 0..3 {
        drop(Server::attach(&one, &sized(5, 2))?);
        drop(Server::attach(&two, &sized(2, 1))?);
    }
    // Root's devices are not the user's.
    let roots = Mdev::create(Type::Pci)?;
    Server::attach(&roots, &sized(100, 0)).map(drop)
}

fn memory_of_a_user_comes_back_with_the_device() -> Result<()> {
    let _limit = Limit::set("max_user_memory", 10 * u64::from(PAGE))?;
    for _ in 0..3 {
        let mdev = works("create", create_as(USER, Type::Pci)?)?;
        drop(Server::attach(&mdev, &sized(8, 2))?);
        works("remove", mdev.remove())?;
    }
    // A description that was refused for something else has taken nothing.
    let mdev = works("create", create_as(USER, Type::Pci)?)?;
    drop(Server::attach(&mdev, &sized(6, 0))?);
    refused(&mdev, &sized(9, 0), (libc::ESTALE, MUSER_FAULT_DIFFERS, 0))?;
    let other = works("create", create_as(USER, Type::Pci)?)?;
    Server::attach(&other, &sized(4, 0)).map(drop)
}

fn memory_of_a_removed_device_counts_while_it_is_mapped() -> Result<()> {
    let _limit = Limit::set("max_user_memory", 10 * u64::from(PAGE))?;
    let mdev = works("create", create_as(USER, Type::Pci)?)?;
    let server = Server::attach(&mdev, &sized(10, 0))?;
    let mapped = server.node().map(0, 0, PAGE as usize)?;
    mapped.write(0, 1u8);
    works("remove", mdev.remove())?;
    let next = works("create", create_as(USER, Type::Pci)?)?;
    refused(&next, &sized(1, 0), QUOTA)?;
    drop(server);
    refused(&next, &sized(1, 0), QUOTA)?;
    drop(mapped);
    time::until("the memory coming back", || {
        Server::attach(&next, &sized(10, 0)).is_ok()
    })
}

fn successor_that_gives_up_gives_its_memory_back() -> Result<()> {
    let _limit = Limit::set("max_user_memory", 40 * u64::from(PAGE))?;
    let mdev = works("create", create_as(USER, Type::Pci)?)?;
    let server = Server::attach(&mdev, &Description::pci())?;
    // The description has 18 pages.
    let mut standby = Process::helper(&["standby", mdev.uuid(), &(20 * PAGE).to_string()])?;
    time::until("a standby waiting", || {
        let query = server.node().query();
        query.is_ok_and(|query| query.flags & MUSER_STATE_STANDBY != 0)
    })?;
    let other = works("create", create_as(USER, Type::Pci)?)?;
    refused(&other, &sized(3, 0), QUOTA)?;
    standby.kill()?;
    time::until("the standby being forgotten", || {
        let query = server.node().query();
        query.is_ok_and(|query| query.flags & MUSER_STATE_STANDBY == 0)
    })?;
    time::until("its memory coming back", || {
        Server::attach(&other, &sized(22, 0)).is_ok()
    })
}
