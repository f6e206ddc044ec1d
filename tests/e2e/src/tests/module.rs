// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loading and unloading, with devices in every state.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, errno_of, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node};
use muser_e2e::rig::Rig;
use muser_e2e::vfio::Road;
use muser_e2e::{module, time};

use super::topic;
use crate::runner::Test;

topic!("module", once: [
    load_registers_both_types,
    unload_removes_types_and_nodes,
    unload_with_idle_devices_removes_them,
    unload_with_described_device_removes_it,
    unload_with_open_node_busy,
], roads: [unload_with_open_client_busy]);

/// The long ones, which take the time of many.
pub(super) fn long() -> Vec<Test> {
    vec![
        super::once(
            "module::load_create_remove_unload_in_every_order",
            every_order,
        )
        .long(5),
        super::once("module::a_hundred_rounds_leave_nothing", a_hundred_rounds).long(5),
    ]
}

fn load_registers_both_types() -> Result<()> {
    module::load()?;
    for kind in Type::ALL {
        ensure!(
            kind.directory().exists(),
            "{} is missing",
            kind.directory().display()
        );
    }
    Ok(())
}

fn unload_removes_types_and_nodes() -> Result<()> {
    module::load()?;
    works("rmmod", module::unload())?;
    ensure!(!module::is_loaded(), "sysfs still has the module");
    for kind in Type::ALL {
        ensure!(
            !kind.directory().exists(),
            "{} is still there",
            kind.directory().display()
        );
    }
    Ok(())
}

fn unload_with_idle_devices_removes_them() -> Result<()> {
    let pci = Mdev::create(Type::Pci)?;
    let platform = Mdev::create(Type::Platform)?;
    works("rmmod", module::unload())?;
    pci.wait_gone()?;
    platform.wait_gone()
}

fn unload_with_described_device_removes_it() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    drop(Node::open(&mdev)?.attach(&Description::pci())?);
    works("rmmod", module::unload())?;
    mdev.wait_gone()
}

fn unload_with_open_node_busy() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let node = Node::open(&mdev)?;
    fails(
        "rmmod with an open node",
        module::unload(),
        libc::EWOULDBLOCK,
    )?;
    ensure!(mdev.exists(), "the refused rmmod took the device");
    drop(node);
    works("rmmod after closing the node", module::unload())
}

fn unload_with_open_client_busy(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    fails(
        "rmmod with an open client",
        module::unload(),
        libc::EWOULDBLOCK,
    )?;
    equal(
        "config space behind the refused rmmod",
        rig.client.read_u32(7, 0)?,
        0,
    )?;
    drop(rig);
    works("rmmod after closing everything", module::unload())
}

/// The steps that a life of the module consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Load,
    Create,
    Serve,
    Remove,
    Unload,
}

/// Walks all sequences of seven steps that are possible from an unloaded module.
fn every_order() -> Result<()> {
    if module::is_loaded() {
        works("rmmod", module::unload())?;
    }
    let mut sequences = 0;
    let mut path = Vec::new();
    walk(&mut path, 7, &mut sequences)?;
    println!("{sequences} sequences");
    ensure!(sequences > 20, "only {sequences} sequences were possible");
    Ok(())
}

fn walk(path: &mut Vec<Step>, length: usize, sequences: &mut usize) -> Result<()> {
    if path.len() == length {
        *sequences += 1;
        return play(path).map_err(|error| error.context(format!("in the order {path:?}")));
    }
    let loaded = path.iter().rev().find_map(|step| match step {
        Step::Load => Some(true),
        Step::Unload => Some(false),
        _ => None,
    });
    let loaded = loaded.unwrap_or(false);
    let created = loaded
        && path.iter().rev().find_map(|step| match step {
            Step::Create | Step::Serve => Some(true),
            Step::Remove | Step::Unload => Some(false),
            Step::Load => None,
        }) == Some(true);
    for step in [
        Step::Load,
        Step::Create,
        Step::Serve,
        Step::Remove,
        Step::Unload,
    ] {
        let possible = match step {
            Step::Load => !loaded,
            Step::Create => loaded && !created,
            Step::Serve | Step::Remove => created && path.last() != Some(&Step::Serve),
            Step::Unload => loaded,
        };
        // A served device may be removed as well; only serving twice in a row shows nothing.
        let possible = possible || (step == Step::Remove && created);
        if possible {
            path.push(step);
            walk(path, length, sequences)?;
            path.pop();
        }
    }
    Ok(())
}

fn play(path: &[Step]) -> Result<()> {
    let mut device = None;
    for step in path {
        match step {
            Step::Load => module::load()?,
            Step::Create => device = Some(Mdev::create(Type::Pci)?),
            Step::Serve => {
                if let Some(device) = &device {
                    drop(Node::open(device)?.attach(&Description::pci())?);
                }
            }
            Step::Remove => {
                if let Some(device) = device.take() {
                    works("remove", device.remove())?;
                    device.wait_gone()?;
                }
            }
            Step::Unload => works("rmmod", unload_once_free())?,
        }
    }
    drop(device);
    if module::is_loaded() {
        works("rmmod", unload_once_free())?;
    }
    Ok(())
}

/// A closed file's last reference goes shortly after close(2) returns.
fn unload_once_free() -> std::io::Result<()> {
    let mut last = Ok(());
    // The error is in `last`, and says more than the deadline does.
    let _ = time::until("rmmod", || {
        last = module::unload();
        !matches!(&last, Err(error) if errno_of(error) == libc::EWOULDBLOCK)
    });
    last
}

fn a_hundred_rounds() -> Result<()> {
    for round in 0..100 {
        let played = match round % 4 {
            0 => play(&[Step::Load, Step::Create, Step::Remove, Step::Unload]),
            1 => play(&[Step::Load, Step::Create, Step::Unload]),
            2 => play(&[
                Step::Load,
                Step::Create,
                Step::Serve,
                Step::Remove,
                Step::Unload,
            ]),
            _ => play(&[Step::Load, Step::Create, Step::Serve, Step::Unload]),
        };
        played.map_err(|error| error.context(format!("in round {round}")))?;
    }
    equal("devices left", Mdev::list().len(), 0)?;
    let nodes = std::fs::read_dir("/dev/muser").map_or(0, Iterator::count);
    equal("nodes left in /dev/muser", nodes, 0)
}
