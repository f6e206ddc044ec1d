// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `muserctl` on real devices.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;

use anyhow::{anyhow, ensure, Context, Result};
use muser_e2e::check::equal;
use muser_e2e::mdev::{random_uuid, Mdev, Type};
use muser_e2e::module;
use muser_e2e::node::{Description, Server, BELL, TRAPPED};
use muser_e2e::process::{run, scope, succeed, Process};
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::{MUSER_ATTACH_STANDBY, MUSER_STATE_STANDBY};
use serde_json::Value;

use super::owner::USER;
use super::topic;
use crate::runner::Test;

topic!("muserctl", once: [
    types_are_listed,
    create_list_show_remove,
    create_of_given_uuid_and_type,
    show_tells_regions_and_interrupts,
    set_changes_attributes,
    bad_uuid_refused,
    absent_device_refused,
    present_uuid_refused,
    show_tells_standby_state_doorbells_and_limits,
    quota_is_told_in_words,
    module_not_loaded_told,
], roads: [remove_with_open_client_says_who]);

/// The tests, for a guest that has the program.
pub(super) fn where_installed() -> Vec<Test> {
    tests()
        .into_iter()
        .map(|test| test.needs(|| super::missing("muserctl")))
        .collect()
}

fn json(arguments: &[&str]) -> Result<Value> {
    let text = succeed("muserctl", arguments)?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed {text:?}"))
}

/// Runs muserctl with arguments that it must refuse, with a sentence on stderr and nothing else.
fn refused(arguments: &[&str], code: i32, part: &str) -> Result<()> {
    let output = run("muserctl", arguments)?;
    equal(&format!("exit code of {arguments:?}"), output.code, code)?;
    let said = output.stderr.to_lowercase();
    ensure!(
        said.contains(&part.to_lowercase()),
        "{arguments:?}: {said:?} lacks {part:?}"
    );
    ensure!(!said.contains("panicked"), "{arguments:?}: {said:?}");
    equal("stdout", output.stdout.as_str(), "")
}

fn types_are_listed() -> Result<()> {
    module::load()?;
    let text = succeed("muserctl", &["types"])?;
    let types = json(&["types", "--json"])?;
    for kind in Type::ALL {
        ensure!(
            text.contains(kind.name()),
            "types lacks {}: {text}",
            kind.name()
        );
        let found = types["types"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|found| {
                found["name"] == kind.name()
                    && found["device_api"] == kind.api()
                    && found["available_instances"]
                        .as_u64()
                        .is_some_and(|free| free > 0)
            });
        ensure!(found, "types --json lacks {}: {types}", kind.name());
    }
    Ok(())
}

fn create_list_show_remove() -> Result<()> {
    module::load()?;
    let uuid = succeed("muserctl", &["create"])?.trim().to_owned();
    let mdev = Mdev::adopt(&uuid);
    ensure!(mdev.exists(), "create printed {uuid:?}, which is no device");
    let text = succeed("muserctl", &["list"])?;
    ensure!(text.contains(&uuid), "list lacks {uuid}: {text}");
    let list = json(&["list", "--json"])?;
    equal(
        "devices listed",
        list["devices"].as_array().map(Vec::len),
        Some(1),
    )?;
    let device = &list["devices"][0];
    equal("uuid", device["uuid"].as_str(), Some(uuid.as_str()))?;
    equal("type", device["type"].as_str(), Some("muser-pci"))?;
    equal("described", device["described"].as_bool(), Some(false))?;
    equal("attached", device["attached"].as_bool(), Some(false))?;
    let group = mdev.group_node()?;
    equal(
        "group",
        device["group_path"].as_str().map(Path::new),
        Some(group.as_path()),
    )?;
    let text = succeed("muserctl", &["show", &uuid[..8]])?;
    ensure!(text.contains(&uuid), "show by prefix lacks {uuid}: {text}");
    equal(
        "stdout of remove",
        succeed("muserctl", &["remove", &uuid])?.as_str(),
        "",
    )?;
    mdev.wait_gone()?;
    let list = json(&["list", "--json"])?;
    equal(
        "devices left",
        list["devices"].as_array().map(Vec::len),
        Some(0),
    )
}

fn create_of_given_uuid_and_type() -> Result<()> {
    module::load()?;
    let uuid = random_uuid()?;
    let capitals = uuid.to_uppercase();
    let printed = succeed(
        "muserctl",
        &["create", &capitals, "--type", "muser-platform"],
    )?;
    let mdev = Mdev::adopt(&uuid);
    equal("printed", printed.trim(), uuid.as_str())?;
    let link = std::fs::read_link(mdev.directory().join("mdev_type"))?;
    ensure!(
        link.ends_with("muser-platform"),
        "the type is {}",
        link.display()
    );
    Ok(())
}

fn show_tells_regions_and_interrupts() -> Result<()> {
    let rig = Rig::new(Road::Group)?;
    let _events = rig.client.enable_irqs(2, 0, 5)?;
    rig.client.read_u32(0, 0)?;
    let shown = json(&["show", rig.mdev.uuid(), "--json"])?;
    let device = &shown["devices"][0];
    for state in ["described", "attached", "client"] {
        equal(state, device[state].as_bool(), Some(true))?;
    }
    let pid = u64::from(std::process::id());
    equal("server", device["server"]["pid"].as_u64(), Some(pid))?;
    let regions = device["regions"].as_array().context("no regions")?;
    equal("regions", regions.len(), 6)?;
    let config = regions.iter().find(|region| region["name"] == "config");
    equal(
        "config space",
        config.and_then(|config| config["size"].as_u64()),
        Some(256),
    )?;
    let mixed = &regions[1];
    equal("area", mixed["areas"][0]["offset"].as_u64(), Some(4096))?;
    let irqs = device["irqs"].as_array().context("no irqs")?;
    let msix = irqs
        .iter()
        .find(|irq| irq["name"] == "MSI-X")
        .context("no MSI-X")?;
    let numbers = (msix["vectors"].as_u64(), msix["enabled"].as_u64());
    equal("vectors and enabled", numbers, (Some(128), Some(5)))?;
    equal("reads", device["counters"]["reads"].as_u64(), Some(1))?;
    let text = succeed("muserctl", &["show", rig.mdev.uuid()])?;
    for part in ["BAR0", "config", "MSI-X"] {
        ensure!(text.contains(part), "show lacks {part}: {text}");
    }
    Ok(())
}

fn set_changes_attributes() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let (uuid, names) = (mdev.uuid(), ["reattach_timeout_ms=123", "max_memory=1M"]);
    succeed("muserctl", &["set", uuid, names[0], names[1]])?;
    equal(
        "timeout",
        mdev.attribute("reattach_timeout_ms")?.as_str(),
        "123",
    )?;
    equal("memory", mdev.attribute("max_memory")?.as_str(), "1048576")?;
    refused(
        &["set", uuid, "no_such_attribute=1"],
        1,
        "no_such_attribute",
    )?;
    refused(&["set", uuid, "nonsense"], 2, "nonsense")
}

fn bad_uuid_refused() -> Result<()> {
    module::load()?;
    refused(&["create", "nonsense"], 2, "nonsense")?;
    refused(&["remove", "no/uuid"], 2, "no/uuid")?;
    refused(&["create", "--type", "no-such-type"], 2, "no-such-type")
}

fn absent_device_refused() -> Result<()> {
    module::load()?;
    let uuid = random_uuid()?;
    for command in ["show", "remove"] {
        refused(&[command, &uuid], 1, "there is no muser device")?;
    }
    Ok(())
}

fn present_uuid_refused() -> Result<()> {
    let Bare {
        server: _server,
        mdev,
    } = Bare::new()?;
    refused(&["create", mdev.uuid()], 1, "exists already")
}

fn show_tells_standby_state_doorbells_and_limits() -> Result<()> {
    let description = Description {
        state_size: 5000,
        ..Description::with_doorbells()
    };
    let Bare { server, mdev } = Bare::with(&description)?;
    let client = Client::open(&mdev, Road::Group)?;
    client.write_all(TRAPPED, BELL.0, &[1; 4])?;
    scope(|scope| {
        let successor = Description {
            flags: MUSER_ATTACH_STANDBY,
            ..description
        };
        let mdev = &mdev;
        let waiting = scope.spawn(move || Server::attach(mdev, &successor));
        time::until("a standby waiting", || {
            let query = server.node().query();
            query.is_ok_and(|query| query.flags & MUSER_STATE_STANDBY != 0)
        })?;
        let shown = json(&["show", mdev.uuid(), "--json"])?;
        let device = &shown["devices"][0];
        equal("standby", device["standby"].as_bool(), Some(true))?;
        let pid = Some(u64::from(std::process::id()));
        equal("successor", device["successor"]["pid"].as_u64(), pid)?;
        equal("state_size", device["state_size"].as_u64(), Some(5000))?;
        equal(
            "doorbells",
            device["counters"]["doorbells"].as_u64(),
            Some(1),
        )?;
        equal("pinned", device["pinned"]["pages"].as_u64(), Some(0))?;
        equal("creator", device["creator"]["uid"].as_u64(), Some(0))?;
        let kind = &device["regions"][0]["areas"][0]["flags"][0];
        equal("area", kind.as_str(), Some("doorbell"))?;
        for (name, value) in [
            ("max_requests", 512),
            ("max_vectors", 4096),
            ("max_state", 1 << 20),
        ] {
            equal(name, device["attributes"][name].as_u64(), Some(value))?;
        }
        let text = succeed("muserctl", &["show", mdev.uuid()])?;
        for part in [
            "waits to take over",
            "doorbell 0x8010+0x8",
            "4.8 KiB (5000)",
            "created by",
        ] {
            ensure!(text.contains(part), "show lacks {part}: {text}");
        }
        let list = succeed("muserctl", &["list"])?;
        ensure!(
            list.contains("handing-over"),
            "list lacks the state: {list}"
        );
        server.node().detach()?;
        waiting
            .join()
            .map_err(|_| anyhow!("the standby panicked"))?
            .map(drop)
    })?;
    succeed("muserctl", &["set", mdev.uuid(), "max_requests=7"])?;
    equal(
        "max_requests",
        mdev.attribute("max_requests")?.as_str(),
        "7",
    )?;
    refused(&["set", mdev.uuid(), "max_requests=513"], 1, "out of range")?;
    refused(&["set", mdev.uuid(), "max_vectors=9"], 1, "only before")
}

/// As a user whom the module gives no device at all.
fn quota_is_told_in_words() -> Result<()> {
    module::load()?;
    let limit = Path::new("/sys/class/mdev_bus/muser/max_user_devices");
    std::fs::write(limit, "0")?;
    let create = Type::Pci.directory().join("create");
    chown(&create, Some(USER), None)?;
    let output = std::process::Command::new("muserctl")
        .arg("create")
        .uid(USER)
        .output();
    chown(&create, Some(0), None)?;
    std::fs::write(limit, "256")?;
    let output = output.context("running muserctl")?;
    equal("exit code", output.status.code(), Some(1))?;
    let said = String::from_utf8_lossy(&output.stderr);
    for part in [
        "as many devices as a user may (0, says",
        "max_user_devices",
        "muserctl remove",
    ] {
        ensure!(said.contains(part), "{said:?} lacks {part:?}");
    }
    Ok(())
}

fn module_not_loaded_told() -> Result<()> {
    if module::is_loaded() {
        module::unload()?;
    }
    for command in ["list", "types", "create"] {
        refused(&[command], 1, "modprobe muser")?;
    }
    Ok(())
}

fn remove_with_open_client_says_who(road: Road) -> Result<()> {
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    let mut command = std::process::Command::new("muserctl");
    let mut process = Process::start(command.args(["remove", mdev.uuid()]))?;
    let said = process.expect_containing("client has the device open")?;
    let pid = std::process::id().to_string();
    ensure!(said.contains(&pid), "{said:?} does not name process {pid}");
    drop(client);
    equal("exit code", process.wait()?.code(), Some(0))?;
    mdev.wait_gone()?;
    drop(service);
    drop(server);
    Ok(())
}
