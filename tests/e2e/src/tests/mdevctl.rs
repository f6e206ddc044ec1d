// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's `mdevctl`, which libvirt and administrators make mediated devices with.

use anyhow::{ensure, Result};
use muser_e2e::mdev::{random_uuid, Mdev, Type};
use muser_e2e::module;
use muser_e2e::process::succeed;

use super::topic;
use crate::runner::Test;

topic!("mdevctl", once: [
    types_name_both,
    define_start_list_stop_undefine,
], roads: []);

/// The tests, for a guest that has the program.
pub(super) fn where_installed() -> Vec<Test> {
    tests()
        .into_iter()
        .map(|test| test.needs(|| super::missing("mdevctl")))
        .collect()
}

fn types_name_both() -> Result<()> {
    module::load()?;
    let text = succeed("mdevctl", &["types"])?;
    for kind in Type::ALL {
        for part in [kind.name(), kind.api()] {
            ensure!(text.contains(part), "mdevctl types lacks {part}: {text}");
        }
    }
    for part in ["Available instances", "Name", "Description"] {
        ensure!(text.contains(part), "mdevctl types lacks {part:?}: {text}");
    }
    Ok(())
}

fn define_start_list_stop_undefine() -> Result<()> {
    module::load()?;
    let uuid = random_uuid()?;
    let mdev = Mdev::adopt(&uuid);
    let define = [
        "define",
        "--uuid",
        &uuid,
        "--parent",
        "muser",
        "--type",
        "muser-pci",
    ];
    succeed("mdevctl", &define)?;
    let defined = succeed("mdevctl", &["list", "--defined"])?;
    ensure!(
        defined.contains(&uuid),
        "list --defined lacks it: {defined}"
    );
    ensure!(!mdev.exists(), "define has started it");
    succeed("mdevctl", &["start", "--uuid", &uuid])?;
    ensure!(
        mdev.exists() && mdev.node().exists(),
        "start made no device"
    );
    let active = succeed("mdevctl", &["list"])?;
    ensure!(
        active.contains(&uuid) && active.contains("muser-pci"),
        "list lacks it: {active}"
    );
    succeed("mdevctl", &["stop", "--uuid", &uuid])?;
    mdev.wait_gone()?;
    succeed("mdevctl", &["undefine", "--uuid", &uuid])?;
    let defined = succeed("mdevctl", &["list", "--defined"])?;
    ensure!(
        !defined.contains(&uuid),
        "list --defined still has it: {defined}"
    );
    Ok(())
}
