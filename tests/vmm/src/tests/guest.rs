// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gpio card in a guest that runs Debian's own kernel, with the driver that Linux has for it.
//!
//! It is booted once, see [`super::shared`].

use anyhow::{anyhow, ensure, Context as _, Result};
use serde_json::json;

use super::shared::Shared;
use super::{equal, topic};
use crate::linux::Linux;
use crate::qemu::{card, Setup, PORT};
use crate::server::Server;
use crate::wait::{LONG, SOON};

topic!("guest": [
    driver_binds_to_the_card,
    outputs_arrive_at_the_device,
    inputs_toggle_every_three_reads,
    interrupts_come_once_a_change,
    reset_by_qemu_is_a_reset_of_the_card,
    reboot_by_the_guest_is_a_reset_of_the_card,
    plugged_card_works_and_goes_and_comes_again,
    server_is_killed_while_the_guest_works,
]);

/// Where the guest finds the card it boots with, and one that is plugged in.
const SLOT: &str = "4";
const CARD: &str = "0000:00:04.0";
const PLUGGED: &str = "0000:01:00.0";

/// A guest with a card.
struct Rig {
    linux: Linux,
    server: Server,
}

impl Rig {
    fn boot() -> Result<Self> {
        let server = Server::start("gpio")?;
        let setup = Setup::new("guest", "q35")?.shared_memory("512M");
        let setup = setup.device(server.socket(), &[("addr", json!(SLOT))]);
        let linux = Linux::boot(setup.with("-device", PORT), "")?;
        let mut rig = Self { linux, server };
        rig.load_driver()?;
        Ok(rig)
    }

    fn load_driver(&mut self) -> Result<()> {
        self.linux.run("modprobe gpio-pci-idio-16").map(drop)
    }

    /// What the card itself has at one of its ports, past the driver.
    fn port(&mut self, register: u8) -> Result<String> {
        let base = format!("/sys/bus/pci/devices/{CARD}/resource");
        // The third line is BAR 2: its first port, its last, its flags.
        let read = format!(
            "dd if=/dev/port bs=1 count=1 skip=$(($(sed -n 3p {base} | cut -d' ' -f1) + {register})) 2>/dev/null | od -An -tx1"
        );
        Ok(self.linux.run(&read)?.trim().to_owned())
    }
}

fn in_guest(test: impl FnOnce(&mut Rig) -> Result<()>) -> Result<()> {
    static GUEST: Shared<Rig> = Shared::new();
    GUEST.run(Rig::boot, test, |rig, error| {
        let error = rig.linux.explain(error);
        anyhow!("{error:#}\n{}", rig.server.process.story())
    })
}

fn driver_binds_to_the_card() -> Result<()> {
    in_guest(|rig| {
        let driver = format!("readlink /sys/bus/pci/devices/{CARD}/driver");
        let driver = rig.linux.run(&driver)?;
        ensure!(driver.ends_with("/pci-idio-16"), "the driver: {driver}");
        let chips = rig
            .linux
            .run("cat /sys/bus/gpio/devices/gpiochip*/uevent")?;
        ensure!(!chips.is_empty(), "no chip");
        Ok(())
    })
}

fn outputs_arrive_at_the_device() -> Result<()> {
    in_guest(|rig| {
        for value in [0xffff_u16, 0x8001, 0x1234, 0] {
            let mark = rig.server.process.mark();
            rig.linux.run(&format!("vmm-guest drive {CARD} {value}"))?;
            let outputs = format!("outputs: {value:#06x}");
            rig.server.process.hear(mark, &outputs, SOON)?;
        }
        Ok(())
    })
}

fn inputs_toggle_every_three_reads() -> Result<()> {
    in_guest(|rig| {
        for input in [0, 15] {
            // Others have read before: nine reads show two changes, three reads apart.
            let read = rig.linux.run(&format!("vmm-guest read {CARD} {input} 9"))?;
            let runs: Vec<usize> = read
                .as_bytes()
                .chunk_by(|a, b| a == b)
                .map(<[u8]>::len)
                .collect();
            let whole = matches!(*runs.as_slice(), [1 | 2, 3, 3, 1 | 2] | [3, 3, 3]);
            ensure!(whole, "inputs: {read}");
        }
        Ok(())
    })
}

fn interrupts_come_once_a_change() -> Result<()> {
    in_guest(|rig| {
        let taken = |rig: &mut Rig| -> Result<u32> {
            let sum = format!(
                "awk '/ {CARD}$/ {{ n += $2 + $3 }} END {{ print n + 0 }}' /proc/interrupts"
            );
            Ok(rig.linux.run(&sum)?.parse()?)
        };
        let before = taken(rig)?;
        rig.linux
            .run_for(&format!("vmm-guest work {CARD} 3 20"), LONG)?;
        let after = taken(rig)?;
        ensure!(
            after >= before + 20,
            "interrupts in the kernel's list: {before}, then {after}"
        );
        Ok(())
    })
}

fn reset_by_qemu_is_a_reset_of_the_card() -> Result<()> {
    in_guest(|rig| resets(rig, |rig| rig.linux.qemu.reset()))
}

fn reboot_by_the_guest_is_a_reset_of_the_card() -> Result<()> {
    in_guest(|rig| resets(rig, |rig| rig.linux.send("reboot -f")))
}

fn resets(rig: &mut Rig, reset: impl FnOnce(&mut Rig) -> Result<()>) -> Result<()> {
    rig.linux.run(&format!("vmm-guest drive {CARD} 4660"))?;
    equal("outputs 8 to 15", rig.port(4)?.as_str(), "12")?;
    reset(rig)?;
    rig.linux.wait_until_up()?;
    // The firmware has given it ports, but not switched them on; the driver does.
    rig.load_driver()?;
    equal("outputs 8 to 15", rig.port(4)?.as_str(), "00")?;
    equal("outputs 0 to 7", rig.port(0)?.as_str(), "00")?;
    rig.linux
        .run_for(&format!("vmm-guest work {CARD} 3 5"), LONG)?;
    Ok(())
}

/// Plugs a card into the guest's port, and waits until its driver has it.
fn plug(linux: &mut Linux, server: &Server) -> Result<()> {
    let mut device = card(server.socket());
    device["id"] = json!("plugged");
    device["bus"] = json!("port-1");
    linux.qemu.qmp.execute("device_add", device)?;
    let bound = format!("[ -e /sys/bus/pci/devices/{PLUGGED}/driver ]");
    linux.wait_for("the driver binding to the plugged card", &bound)
}

/// Has the guest let go of the plugged card.
fn unplug(linux: &mut Linux) -> Result<()> {
    let plugged = json!({ "id": "plugged" });
    linux.qemu.qmp.execute("device_del", plugged)?;
    let gone = |data: &serde_json::Value| data["device"] == "plugged";
    linux.qemu.qmp.event("DEVICE_DELETED", gone)?;
    linux.run(&format!("[ ! -e /sys/bus/pci/devices/{PLUGGED} ]"))?;
    Ok(())
}

fn plugged_card_works_and_goes_and_comes_again() -> Result<()> {
    in_guest(|rig| {
        let mut server = Server::start("gpio")?;
        for round in 1..=3_u16 {
            plug(&mut rig.linux, &server).with_context(|| server.process.story())?;
            let mark = server.process.mark();
            let value = 0x1111 * round;
            rig.linux
                .run(&format!("vmm-guest drive {PLUGGED} {value}"))?;
            server
                .process
                .hear(mark, &format!("outputs: {value:#06x}"), SOON)?;
            // A card that was just plugged in counts from nothing.
            let read = rig.linux.run(&format!("vmm-guest read {PLUGGED} 0 6"))?;
            equal("inputs", read.as_str(), "000111")?;
            rig.linux
                .run_for(&format!("vmm-guest work {PLUGGED} 8 3"), LONG)?;
            unplug(&mut rig.linux)?;
            server.process.running()?;
        }
        // The card that the guest booted with has seen nothing of it.
        rig.linux
            .run_for(&format!("vmm-guest work {CARD} 3 3"), LONG)?;
        Ok(())
    })
}

fn server_is_killed_while_the_guest_works() -> Result<()> {
    const KILLS: usize = 10;
    in_guest(|rig| {
        let mut server = Server::supervised("gpio")?;
        plug(&mut rig.linux, &server)?;
        let work = format!("vmm-guest work {PLUGGED} 8");
        let worked = rig.linux.work_amid(&work, KILLS, || server.kill_program());
        worked.with_context(|| server.process.story())?;
        unplug(&mut rig.linux)
    })
}
