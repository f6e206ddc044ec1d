// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that the system keeps: the units and the mdevctl profile of `tools/system`.

use std::fs;

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::Mdev;
use muser_e2e::module;
use muser_e2e::node::CONFIG;
use muser_e2e::operator::{commands, shell, Systemd, Udev};
use muser_e2e::process::succeed;
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{sys, time};
use serde_json::Value;

use super::topic;
use crate::runner::Test;

topic!("service", once: [
    units_are_correct,
    killed_service_goes_on,
    restarted_service_goes_on,
    upgrade_hands_over_and_back,
    stopped_device_is_removed,
    removed_device_is_not_served_again,
    service_starts_with_a_device_of_root,
    socket_starts_its_service_which_is_replaced_and_goes_on,
    mdevctl_profile_starts_with_the_module,
], roads: []);

/// The UUIDs of the README.
const SERVED: &str = "83b8f4f2-509f-482f-bc1e-e6bfe0fa1002";
const DEFINED: &str = "83b8f4f2-509f-482f-bc1e-e6bfe0fa1003";

/// The tests, for a guest that has systemd.
pub(super) fn where_installed() -> Vec<Test> {
    tests()
        .into_iter()
        .map(|test| test.needs(|| super::missing("systemctl")))
        .collect()
}

/// The process that serves a device; none if there is no such device or process.
fn server(uuid: &str) -> Option<i32> {
    let shown = succeed("muserctl", &["show", uuid, "--json"]).ok()?;
    let shown: Value = serde_json::from_str(&shown).ok()?;
    let pid = shown["devices"][0]["server"]["pid"].as_i64()?;
    i32::try_from(pid).ok()
}

/// The README's service, running.
struct Service {
    systemd: Systemd,
    _udev: Udev,
    mdev: Mdev,
}

impl Service {
    fn start() -> Result<Self> {
        let udev = Udev::start()?;
        let systemd = Systemd::start()?;
        let [start, ..] = &commands("A service")?[..] else {
            anyhow::bail!("the README does not start a service");
        };
        systemd.shell(start)?;
        let mdev = Mdev::adopt(SERVED);
        time::until("the device being served", || server(SERVED).is_some())?;
        Ok(Self {
            systemd,
            _udev: udev,
            mdev,
        })
    }

    fn client(&self) -> Result<Client> {
        works("opening the client", Client::open(&self.mdev, Road::Group))
    }

    /// Runs a block of the README's section.
    fn shell(&self, block: usize) -> Result<()> {
        let blocks = commands("A service")?;
        let block = blocks.get(block).context("the README has lost a block")?;
        self.systemd.shell(block).map(drop)
    }

    fn state(&self) -> Result<String> {
        self.systemd
            .property(&format!("muser@{SERVED}.service"), "ActiveState")
    }
}

fn units_are_correct() -> Result<()> {
    let _udev = Udev::start()?;
    fs::write(
        format!("/etc/muser/{SERVED}.env"),
        "PROGRAM=/usr/bin/gpio\n",
    )?;
    fs::write("/etc/muser/door.env", "PROGRAM=/usr/bin/gpio\n")?;
    let served = ["muser@", "muser-next@", "muser-device@"];
    let served = served.map(|unit| format!("{unit}{SERVED}.service"));
    let at_a_socket = ["muser-socket@door.socket", "muser-socket@door.service"];
    let units = served.into_iter().chain(at_a_socket.map(str::to_owned));
    for unit in units {
        let said = succeed("systemd-analyze", &["verify", "--man=no", &unit])?;
        equal("systemd-analyze", said.as_str(), "")?;
    }
    Ok(())
}

fn killed_service_goes_on() -> Result<()> {
    let service = Service::start()?;
    let client = service.client()?;
    for _ in 0..5 {
        let pid = server(SERVED).context("nobody serves")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t0000000000000000"] {
            ensure!(status.contains(line), "no {line:?} in {status}");
        }
        ensure!(!status.contains("Uid:\t0"), "it runs as root: {status}");
        sys::kill(pid, libc::SIGKILL)?;
        // Waits for the next process, if need be.
        equal("card", client.read_u32(CONFIG, 0)?, 0x0dc8_494f)?;
    }
    equal("state", service.state()?, "active".to_owned())
}

fn restarted_service_goes_on() -> Result<()> {
    let service = Service::start()?;
    let client = service.client()?;
    let before = server(SERVED);
    service.shell(1)?;
    equal("card", client.read_u32(CONFIG, 0)?, 0x0dc8_494f)?;
    ensure!(server(SERVED) != before, "it was not restarted");
    Ok(())
}

fn upgrade_hands_over_and_back() -> Result<()> {
    let service = Service::start()?;
    let client = service.client()?;
    let units = ["muser@", "muser-next@"].map(|unit| format!("{unit}{SERVED}.service"));
    for (old, new) in [(0, 1), (1, 0)] {
        let before = server(SERVED);
        match new {
            1 => service.shell(2)?,
            _ => drop(
                service
                    .systemd
                    .shell(&format!("systemctl start {}", units[new]))?,
            ),
        }
        time::until("the old one ending", || {
            let state = service.systemd.property(&units[old], "ActiveState");
            state.is_ok_and(|state| state == "inactive")
        })?;
        equal("card", client.read_u32(CONFIG, 0)?, 0x0dc8_494f)?;
        ensure!(server(SERVED) != before, "the old one serves");
        let state = service.systemd.property(&units[new], "ActiveState")?;
        equal("the new one", state, "active".to_owned())?;
    }
    Ok(())
}

fn stopped_device_is_removed() -> Result<()> {
    let service = Service::start()?;
    service.shell(3)?;
    service.mdev.wait_gone()?;
    equal("state", service.state()?, "inactive".to_owned())
}

fn removed_device_is_not_served_again() -> Result<()> {
    let service = Service::start()?;
    works("remove", service.mdev.remove())?;
    time::until("the service ending", || {
        service.state().is_ok_and(|state| state == "inactive")
    })?;
    let unit = format!("muser@{SERVED}.service");
    equal(
        "restarts",
        service.systemd.property(&unit, "NRestarts")?,
        "0".to_owned(),
    )
}

fn service_starts_with_a_device_of_root() -> Result<()> {
    let udev = Udev::start()?;
    let _systemd = Systemd::start()?;
    fs::write(
        format!("/etc/muser/{SERVED}.env"),
        "PROGRAM=/usr/bin/gpio\n",
    )?;
    succeed("muserctl", &["create", SERVED])?;
    let mdev = Mdev::adopt(SERVED);
    udev.settle()?;
    time::until("the device being served", || server(SERVED).is_some())?;
    let client = works("opening the client", Client::open(&mdev, Road::Group))?;
    equal("card", client.read_u32(CONFIG, 0)?, 0x0dc8_494f)
}

fn socket_starts_its_service_which_is_replaced_and_goes_on() -> Result<()> {
    let _udev = Udev::start()?;
    let systemd = Systemd::start()?;
    let blocks = commands("A device at a socket")?;
    let [start, reload] = &blocks[..] else {
        anyhow::bail!("the README's section has other blocks: {blocks:?}");
    };
    systemd.shell(start)?;
    let socket = "/run/muser/door.sock";
    let mode = systemd.shell(&format!("stat -c '%U:%G %a' {socket}"))?;
    equal("socket", mode.trim(), "muser:muser 660")?;
    let client = libmuser::client::Client::connect(systemd.path(socket))?;
    let card = || -> Result<()> {
        let mut card = [0; 4];
        client.read(CONFIG, 0, &mut card)?;
        equal("card", u32::from_le_bytes(card), 0x0dc8_494f)
    };
    card()?;
    let unit = "muser-socket@door.service";
    let supervisor = systemd.property(unit, "MainPID")?;
    let program = || -> Result<String> {
        let children = format!("grep -ls '^PPid:.{supervisor}$' /proc/[0-9]*/status || true");
        let found = systemd.shell(&children)?;
        let pid = found.trim().trim_start_matches("/proc/").split('/').next();
        let pid = pid.filter(|pid| !pid.is_empty());
        Ok(pid.context("the program does not run")?.to_owned())
    };
    let first = program()?;
    let status = systemd.shell(&format!("cat /proc/{first}/status"))?;
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t0000000000000000"] {
        ensure!(status.contains(line), "no {line:?} in {status}");
    }
    ensure!(!status.contains("Uid:\t0"), "it runs as root: {status}");
    systemd.shell(&format!("kill -KILL {first}"))?;
    card()?;
    let second = program()?;
    ensure!(second != first, "it was not started again");
    systemd.shell(reload)?;
    time::until("the next program", || {
        program().is_ok_and(|next| next != second)
    })?;
    card()?;
    drop(client);
    systemd.shell("systemctl stop muser-socket@door.socket muser-socket@door.service")?;
    let left = fs::exists(systemd.path(socket))?;
    ensure!(!left, "the socket stays");
    Ok(())
}

fn mdevctl_profile_starts_with_the_module() -> Result<()> {
    let udev = Udev::start()?;
    shell(&commands("mdevctl and libvirt")?.join("\n"))?;
    let mdev = Mdev::adopt(DEFINED);
    let tried = || {
        equal(
            "timeout",
            mdev.attribute("reattach_timeout_ms")?,
            "60000".to_owned(),
        )?;
        works("remove", mdev.remove())?;
        mdev.wait_gone()?;
        works("rmmod", module::unload())?;
        module::load()?;
        udev.settle()?;
        ensure!(mdev.exists(), "it did not start with the module");
        equal(
            "timeout",
            mdev.attribute("reattach_timeout_ms")?,
            "60000".to_owned(),
        )
    };
    let tried = tried();
    succeed("mdevctl", &["undefine", "--uuid", DEFINED])?;
    tried
}
