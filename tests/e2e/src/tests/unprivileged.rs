// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Users without root: what `tools/system` installs lets them make, serve and use devices, and
//! lets nobody at another's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::{random_uuid, Mdev, Type, DEVICES};
use muser_e2e::module;
use muser_e2e::operator::{commands, Udev, User, ALICE, BOB, CAROL, MALLORY};
use muser_e2e::process::{succeed, Process, HELPER};
use muser_e2e::rig::BASE;
use muser_e2e::vfio::Road;

use super::topic;
use crate::runner::Test;

topic!("unprivileged", once: [
    rules_are_correct,
    module_load_gives_create_to_the_group,
    readme_device_of_ones_own,
    stranger_refused_and_told_of_the_group,
    limits_stay_with_root,
    churn_gives_nobody_the_device_of_another,
    devices_of_root_stay_with_root,
], roads: [
    member_serves_and_uses,
    others_are_kept_out,
    users_side_by_side,
    namespace_serves_and_uses,
    namespace_of_a_container_serves_and_uses,
]);

/// What the config space of the gpio sample begins with: device and vendor.
const CARD: &str = "read 0xdc8494f";

/// The tests, for a guest that has udev.
pub(super) fn where_installed() -> Vec<Test> {
    let peer = super::once(
        "unprivileged::devices_of_other_drivers_stay_with_root",
        devices_of_other_drivers_stay_with_root,
    );
    let peer = peer.needs(|| {
        let missing = !Path::new(MTTY).exists();
        missing.then(|| "this kernel has no mtty".to_owned())
    });
    let tests = tests().into_iter();
    tests
        .map(|test| test.needs(|| super::missing("udevadm")))
        .chain([peer])
        .chain(super::dma_roads(
            "unprivileged::member_pins_what_may_be_locked",
            member_pins_what_may_be_locked,
        ))
        .collect()
}

/// A type of the kernel's sample driver.
const MTTY: &str = "/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1";

/// Creates a device as a shell does that a user writes to, and waits for the rules.
fn create(udev: &Udev, mut shell: Command) -> Result<Mdev> {
    let uuid = random_uuid()?;
    let create = Type::Pci.directory().join("create");
    let output = shell.args(["-ec", &format!("echo {uuid} >{}", create.display())]);
    let output = muser_e2e::process::output(output)?;
    ensure!(output.code == 0, "create: {output:?}");
    let mdev = Mdev::adopt(&uuid);
    udev.settle()?;
    Ok(mdev)
}

/// Owner, group and mode of a file.
fn rights(path: impl AsRef<Path>) -> Result<(u32, u32, u32)> {
    let path = path.as_ref();
    let meta = fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok((meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777))
}

/// The nodes that this kernel has for a device.
fn nodes(mdev: &Mdev) -> Result<Vec<std::path::PathBuf>> {
    let mut nodes = vec![mdev.node(), mdev.group_node()?];
    nodes.extend(mdev.cdev_node().ok());
    Ok(nodes)
}

/// Checks that a device is a user's, and only the user's.
fn belongs(mdev: &Mdev, id: u32) -> Result<()> {
    for node in nodes(mdev)? {
        equal(&node.display().to_string(), rights(&node)?, (id, id, 0o600))?;
    }
    let own = [("remove", 0o200), ("reattach_timeout_ms", 0o644)];
    for (name, mode) in own {
        equal(name, rights(mdev.directory().join(name))?, (id, id, mode))?;
    }
    for entry in fs::read_dir(mdev.directory())?.flatten() {
        let name = entry.file_name();
        if !entry.file_type()?.is_file() || own.iter().any(|(own, _)| name == *own) {
            continue;
        }
        let (uid, gid, mode) = rights(entry.path())?;
        equal(&format!("owner of {name:?}"), (uid, gid), (0, 0))?;
        equal(&format!("mode of {name:?} for others"), mode & 0o022, 0)?;
    }
    for (name, id) in [("uid", id), ("gid", id)] {
        equal(name, mdev.attribute(name)?, id.to_string())?;
    }
    Ok(())
}

/// Serves a device with the gpio sample.
fn serve(mdev: &Mdev, mut command: Command) -> Result<Process> {
    let process = Process::start(command.args(["--uuid", mdev.uuid()]))?;
    process.expect_containing("serves")?;
    Ok(process)
}

/// Uses a device as a client.
fn uses(mdev: &Mdev, road: Road, mut command: Command) -> Result<()> {
    let arguments = [HELPER, "client", road.name(), mdev.uuid(), "read", "7", "0"];
    let client = Process::start(command.args(arguments))?;
    client.expect("open")?;
    client.expect(CARD)
}

/// This binary's path.
fn itself() -> Result<String> {
    let path = std::env::current_exe()?;
    Ok(path.to_str().context("this binary's path")?.to_owned())
}

/// Expects a user's shell to be refused.
fn denied(user: User, script: &str) -> Result<()> {
    let output = user.run(script)?;
    let said = output.stderr.to_lowercase();
    let refused = said.contains("permission denied") || said.contains("not permitted");
    ensure!(
        output.code != 0 && refused,
        "{} ran {script:?}: {output:?}",
        user.name
    );
    Ok(())
}

fn rules_are_correct() -> Result<()> {
    let _udev = Udev::start()?;
    succeed(
        "udevadm",
        &["verify", "/usr/lib/udev/rules.d/60-muser.rules"],
    )
    .map(drop)
}

fn module_load_gives_create_to_the_group() -> Result<()> {
    let udev = Udev::start()?;
    works("rmmod", module::unload())?;
    module::load()?;
    udev.settle()?;
    for kind in Type::ALL {
        let (uid, gid, mode) = rights(kind.directory().join("create"))?;
        equal(kind.name(), (uid, mode), (0, 0o220))?;
        ensure!(gid != 0, "the group of {}'s create is root's", kind.name());
    }
    Ok(())
}

fn readme_device_of_ones_own() -> Result<()> {
    let _udev = Udev::start()?;
    let said = ALICE.shell(&commands("A device of one's own")?.join("\n"))?;
    ensure!(said.contains("(alice:alice 0600)"), "{said}");
    equal("devices", Mdev::list(), Vec::<String>::new())
}

fn stranger_refused_and_told_of_the_group() -> Result<()> {
    let _udev = Udev::start()?;
    let uuid = random_uuid()?;
    let create = Type::Pci.directory().join("create");
    denied(MALLORY, &format!("echo {uuid} >{}", create.display()))?;
    let output = MALLORY.run("muserctl create")?;
    ensure!(
        output.code == 1 && output.stderr.contains("members of group muser"),
        "{output:?}"
    );
    equal("devices", Mdev::list(), Vec::<String>::new())?;
    let uuid = ALICE.shell("muserctl create")?;
    ensure!(Mdev::adopt(uuid.trim()).exists(), "a member made no device");
    Ok(())
}

fn limits_stay_with_root() -> Result<()> {
    let udev = Udev::start()?;
    let mdev = create(&udev, ALICE.command("sh"))?;
    let uuid = mdev.uuid();
    denied(ALICE, &format!("muserctl set {uuid} max_memory=1G"))?;
    ALICE.shell(&format!("muserctl set {uuid} reattach_timeout_ms=777"))?;
    equal(
        "timeout",
        mdev.attribute("reattach_timeout_ms")?,
        "777".to_owned(),
    )
}

fn member_serves_and_uses(road: Road) -> Result<()> {
    let udev = Udev::start()?;
    let mdev = create(&udev, ALICE.command("sh"))?;
    belongs(&mdev, ALICE.id)?;
    let mut process = serve(&mdev, ALICE.command("gpio"))?;
    uses(&mdev, road, ALICE.command(&itself()?))?;
    ALICE.shell(&format!("muserctl remove {}", mdev.uuid()))?;
    mdev.wait_gone()?;
    equal("exit code", process.wait()?.code(), Some(0))
}

/// A shell's `ulimit -l` is what a user's client and process have: 16 pages.
fn member_pins_what_may_be_locked(road: Road) -> Result<()> {
    let udev = Udev::start()?;
    let mdev = create(&udev, ALICE.command("sh"))?;
    let base = BASE.to_string();
    let pin = |pages: &str| ALICE.helper(&["pin", mdev.uuid(), &base, pages]);
    // It describes the device, which a client finds from then on.
    let mut process = pin("0")?;
    process.expect("ready")?;
    process.kill()?;
    let client = ALICE.helper(&["guest", road.name(), mdev.uuid(), "32", "0"])?;
    client.expect("mapped")?;
    let mut process = pin("8")?;
    process.expect("ready")?;
    process.kill()?;
    pin("32")?.expect_containing("os error 12").map(drop)
}

fn others_are_kept_out(road: Road) -> Result<()> {
    let udev = Udev::start()?;
    let mdev = create(&udev, ALICE.command("sh"))?;
    let _process = serve(&mdev, ALICE.command("gpio"))?;
    let directory = format!("{DEVICES}/{}", mdev.uuid());
    for other in [BOB, MALLORY] {
        for node in nodes(&mdev)? {
            for way in ["<", ">", "<>"] {
                denied(other, &format!(": {way}{}", node.display()))?;
            }
            denied(other, &format!("chmod 666 {}", node.display()))?;
        }
        denied(other, &format!("echo 1 >{directory}/remove"))?;
        denied(other, &format!("echo 1 >{directory}/reattach_timeout_ms"))?;
        // The state is behind the node.
        let shown = other.shell(&format!("muserctl show {} --json", mdev.uuid()))?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        let device = &shown["devices"][0];
        ensure!(
            device["counters"].is_null() && device["state_error"].is_string(),
            "{} sees {device}",
            other.name
        );
        let arguments = ["client", road.name(), mdev.uuid()];
        other.helper(&arguments)?.expect("EACCES")?;
    }
    uses(&mdev, road, ALICE.command(&itself()?))
}

fn users_side_by_side(road: Road) -> Result<()> {
    let udev = Udev::start()?;
    let start = |user: User| {
        let mdev = create(&udev, user.command("sh"))?;
        let process = serve(&mdev, user.command("gpio"))?;
        anyhow::Ok((mdev, process))
    };
    let (first, _one) = start(ALICE)?;
    let (second, _two) = start(BOB)?;
    for (mdev, user, other) in [(&first, ALICE, BOB), (&second, BOB, ALICE)] {
        belongs(mdev, user.id)?;
        uses(mdev, road, user.command(&itself()?))?;
        denied(other, &format!("muserctl remove {}", mdev.uuid()))?;
    }
    for (mdev, user) in [(&first, ALICE), (&second, BOB)] {
        user.shell(&format!("muserctl remove {}", mdev.uuid()))?;
    }
    Ok(())
}

/// Makes, serves and uses a device as root of a user namespace.
fn in_namespace(user: User, road: Road) -> Result<()> {
    let udev = Udev::start()?;
    let mdev = create(&udev, user.contained("sh"))?;
    belongs(&mdev, user.id)?;
    let mut process = serve(&mdev, user.contained("gpio"))?;
    uses(&mdev, road, user.contained(&itself()?))?;

    // Its root is nobody outside: neither the rights of root nor another's device are its own.
    let others = create(&udev, BOB.command("sh"))?;
    let limit = mdev.directory().join("max_memory");
    let mut attempts = vec![
        format!("echo 1 >{}", limit.display()),
        format!("echo 1 >{}/remove", others.directory().display()),
        format!("chown 0:0 {}", others.node().display()),
    ];
    for node in nodes(&others)? {
        attempts.push(format!(": <>{}", node.display()));
    }
    for script in attempts {
        let output = muser_e2e::process::output(user.contained("sh").args(["-ec", &script]))?;
        ensure!(output.code != 0, "in the namespace, {script:?} worked");
    }

    let remove = format!("muserctl remove {}", mdev.uuid());
    let output = muser_e2e::process::output(user.contained("sh").args(["-ec", &remove]))?;
    equal("exit code of remove", output.code, 0)?;
    equal("exit code", process.wait()?.code(), Some(0))
}

fn namespace_serves_and_uses(road: Road) -> Result<()> {
    in_namespace(ALICE, road)
}

fn namespace_of_a_container_serves_and_uses(road: Road) -> Result<()> {
    in_namespace(CAROL, road)
}

/// A user who creates and removes as fast as may be, so that the names of nodes change hands
/// between a rule's look at them and what it does, must not get another's device by it.
fn churn_gives_nobody_the_device_of_another() -> Result<()> {
    const ROUNDS: usize = 20;
    let udev = Udev::start()?;
    let create_file = Type::Pci.directory().join("create");
    let churn = format!(
        "while :; do \
         read -r uuid </proc/sys/kernel/random/uuid; \
         echo $uuid >{} || continue; \
         until echo 1 >{DEVICES}/$uuid/remove; do :; done; \
         done 2>/dev/null",
        create_file.display()
    );
    let mut churning = Process::start(ALICE.command("sh").args(["-c", &churn]))?;
    for _ in 0..ROUNDS {
        let uuid = random_uuid()?;
        BOB.shell(&format!("echo {uuid} >{}", create_file.display()))?;
        let mdev = Mdev::adopt(&uuid);
        let nodes = nodes(&mdev)?;
        let mut strange = None;
        muser_e2e::time::until("the nodes becoming bob's", || {
            let mut all = true;
            for node in &nodes {
                let owner = fs::metadata(node).map_or(0, |meta| meta.uid());
                if owner != 0 && owner != BOB.id {
                    strange = Some((node.clone(), owner));
                }
                all &= owner == BOB.id;
            }
            all || strange.is_some()
        })?;
        ensure!(strange.is_none(), "{strange:?} instead of {}", BOB.id);
    }
    churning.kill()?;
    // What was being made when the loop was killed; its remover is gone too.
    udev.settle()?;
    for uuid in Mdev::list() {
        drop(Mdev::adopt(&uuid));
    }
    Ok(())
}

fn devices_of_root_stay_with_root() -> Result<()> {
    let udev = Udev::start()?;
    let mdev = Mdev::create(Type::Pci)?;
    udev.settle()?;
    belongs(&mdev, 0)
}

fn devices_of_other_drivers_stay_with_root() -> Result<()> {
    let udev = Udev::start()?;
    let create = Path::new(MTTY).join("create");
    let uuid = random_uuid()?;
    let before = rights(&create)?;
    fs::write(&create, &uuid)?;
    let mdev = Mdev::adopt(&uuid);
    // Events that the rules may be asked about again at any time.
    for subsystem in ["mdev", "vfio", "vfio-dev", "mdev_bus"] {
        let matching = format!("--subsystem-match={subsystem}");
        succeed("udevadm", &["trigger", "--action=change", &matching])?;
    }
    udev.settle()?;
    equal("create", rights(&create)?, before)?;
    equal("group", rights(mdev.group_node()?)?, (0, 0, 0o600))?;
    if let Ok(cdev) = mdev.cdev_node() {
        equal("cdev", rights(cdev)?, (0, 0, 0o600))?;
    }
    let remove = mdev.directory().join("remove");
    equal("remove", rights(remove)?, (0, 0, 0o200))
}
