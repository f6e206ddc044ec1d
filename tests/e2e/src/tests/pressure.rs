// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Little memory: a device's creator pays for its memory from a cgroup that has no more.
//!
//! Whoever asks for what there is no memory for is told, and nobody else is: nothing is killed, and
//! the device goes on for all that it has. The toucher stays outside of the cgroup, so that all that
//! is paid for there is the module's.

use std::process::Command;
use std::sync::Arc;

use anyhow::{ensure, Result};
use muser_e2e::cgroup::{self, Cgroup};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{area, region, Description, Node, Server, MEMORY, TRAPPED};
use muser_e2e::process::Process;
use muser_e2e::service::{ram, Service};
use muser_e2e::sys::{child_touches, PAGE};
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{module, time};
use muser_uapi::*;

use crate::runner::Test;

/// The tests of this topic.
pub(super) fn tests() -> Vec<Test> {
    let tests = super::list(
        &[(
            "pressure::attach_without_memory_refused_until_there_is_some",
            attach_without_memory_refused_until_there_is_some,
        )],
        &[(
            "pressure::touch_without_memory_is_a_sigbus_and_the_device_goes_on",
            touch_without_memory_is_a_sigbus_and_the_device_goes_on,
        )],
    );
    let tests = tests.into_iter();
    tests.map(|test| test.needs(cgroup::lacking)).collect()
}

/// Bytes of the device's memory, and what there is for them.
const SIZE: u64 = 8 << 20;
const LIMIT: u64 = 4 << 20;
/// What a cgroup may go on paying for when a device is gone: each CPU keeps up to 64 pages that it
/// has paid for, and slabs have objects of others.
const REST: u64 = 1 << 20;

fn roomy() -> Description {
    let mut description = Description::pci();
    for described in &mut description.regions {
        if described.index == MEMORY {
            *described = muser_region {
                num_areas: 1,
                ..region(MEMORY, SIZE)
            };
        }
    }
    if let Some(last) = description.areas.last_mut() {
        *last = area(0, SIZE);
    }
    description
}

/// A device that a cgroup pays for.
fn create(group: &Cgroup) -> Result<Mdev> {
    // The module itself is nobody's.
    module::load()?;
    group.within(|| Mdev::create(Type::Pci))?
}

/// Expects a cgroup to pay for no more than before, about.
fn paid_back(group: &Cgroup, before: u64) -> Result<()> {
    let back = time::until("what was paid coming back", || {
        group.current().is_ok_and(|now| now <= before + REST)
    });
    back.map_err(|error| error.context(format!("{before} before, {:?} now", group.current())))?;
    equal("killed for memory", group.out_of_memory()?, 0)
}

fn touch_without_memory_is_a_sigbus_and_the_device_goes_on(road: Road) -> Result<()> {
    let group = Cgroup::new(LIMIT)?;
    let before = group.current()?;
    let mdev = create(&group)?;
    let description = roomy();
    let server = Arc::new(Server::attach(&mdev, &description)?);
    let service = Service::start(&server, 1, ram(&description))?;
    let client = Client::open(&mdev, road)?;
    let memory = client.map(MEMORY, 0, SIZE as usize)?;
    // Somebody who could be killed for it.
    let mut bystander = Process::start(&mut Command::new("cat"))?;
    bystander.wait_for_sleep()?;
    group.add(&bystander)?;
    let mut touched = 0;
    // What is asked for is as much paid for as what is touched, and needs no process that may die.
    let refused = loop {
        ensure!((touched as u64) < SIZE, "there was memory for all");
        match client.write_all(MEMORY, touched as u64, &[1]) {
            Ok(()) => touched += PAGE,
            Err(error) => break error,
        }
    };
    fails("write", Err::<(), _>(refused), libc::ENOMEM)?;
    let signal = child_touches(&memory, touched)?;
    equal("signal", signal, Some(libc::SIGBUS))?;
    let pages = server.node().query()?.memory_pages;
    equal("pages", pages, (touched / PAGE) as u64)?;
    ensure!(
        (touched as u64) <= LIMIT && touched as u64 >= LIMIT - REST,
        "{touched} bytes were paid for from {LIMIT}"
    );
    let read = client.read_u32(MEMORY, touched as u64);
    fails("read", read, libc::ENOMEM)?;
    let served = server.node().map(MEMORY, 0, SIZE as usize)?;
    equal(
        "the process",
        child_touches(&served, touched)?,
        Some(libc::SIGBUS),
    )?;
    // What is there is there for all, and requests go on.
    equal("the first byte", served.read::<u8>(0), 1)?;
    equal("the last byte", memory.read::<u8>(touched - PAGE), 1)?;
    works("write", client.write_all(TRAPPED, 8, &[1, 2, 3, 4]))?;
    equal("read", client.read_u32(TRAPPED, 8)?, 0x0403_0201)?;
    group.limit(2 * SIZE)?;
    equal("with memory", child_touches(&memory, touched)?, None)?;
    equal("the process", served.read::<u8>(touched), 1)?;
    equal("killed for memory", group.out_of_memory()?, 0)?;
    bystander.close_input();
    equal("the bystander", bystander.wait()?.code(), Some(0))?;
    drop((memory, served, client, service));
    drop(server);
    works("remove", mdev.remove())?;
    paid_back(&group, before)
}

fn attach_without_memory_refused_until_there_is_some() -> Result<()> {
    // Enough for the device itself, but not for its slots.
    let group = Cgroup::new(REST)?;
    let before = group.current()?;
    let mdev = create(&group)?;
    let description = Description {
        slots: MUSER_MAX_SLOTS,
        state_size: REST as u32,
        ..Description::pci()
    };
    let node = Node::open(&mdev)?;
    let alone = group.current()?;
    for _ in 0..20 {
        let refused = group.within(|| node.attach_raw(&description).err())?;
        let refused = refused.map(|refusal| (refusal.errno, refusal.fault));
        equal("refused", refused, Some((libc::ENOMEM, MUSER_FAULT_NONE)))?;
        // What there was of the slots goes, a moment later.
        time::until("the refused one's memory coming back", || {
            group.current().is_ok_and(|now| now <= alone + REST / 4)
        })?;
    }
    equal("attached", node.query()?.pid, 0)?;
    group.limit(8 * REST)?;
    let attach = group.within(|| node.attach_raw(&description))?;
    let server = Server::attached(node, &attach?)?;
    let state = server.node().map_state(0, REST as usize)?;
    equal("state", child_touches(&state, REST as usize - PAGE)?, None)?;
    ensure!(group.current()? > REST, "nothing was paid for the slots");
    drop((state, server));
    works("remove", mdev.remove())?;
    paid_back(&group, before)
}
