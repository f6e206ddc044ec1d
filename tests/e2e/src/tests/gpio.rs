// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gpio sample as it is shipped: the program, its command line, and the card that it is.

use std::process::Command;

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{CONFIG, INTX, MSI};
use muser_e2e::pci::{Bar, BarKind, Function};
use muser_e2e::process::{self, Process};
use muser_e2e::time;
use muser_e2e::vfio::{Client, IrqData, IrqSet, Road};

use super::topic;
use crate::runner::Test;

topic!("gpio", once: [
    help_tells_the_options,
    no_arguments_refused,
    bad_uuid_refused,
    absent_device_refused,
    second_server_refused,
    ends_when_device_is_removed,
], roads: [
    config_space_is_that_of_the_card,
    config_space_guards_what_is_read_only,
    outputs_keep_what_is_written,
    inputs_toggle_every_three_reads,
    change_raises_the_line,
    change_sends_msi,
    restart_goes_unnoticed,
]);

/// The tests, for a guest that has the program.
pub(super) fn where_installed() -> Vec<Test> {
    tests()
        .into_iter()
        .map(|test| test.needs(|| super::missing("gpio")))
        .collect()
}

/// BAR of the card's registers (`drivers/gpio/gpio-pci-idio-16.c`).
const REGISTERS: u32 = 2;
const OUT_0_7: u64 = 0;
const IN_0_7: u64 = 1;
const IRQ_CTL: u64 = 2;
const OUT_8_15: u64 = 4;
const IN_8_15: u64 = 5;
const IRQ_STATUS: u64 = 6;

/// The program on a device, and a client.
struct Card {
    client: Client,
    _process: Process,
    _mdev: Mdev,
}

fn serve(mdev: &Mdev) -> Result<Process> {
    let process = Process::start(Command::new("gpio").args(["--uuid", mdev.uuid()]))?;
    process.expect_containing("serves")?;
    Ok(process)
}

impl Card {
    fn new(road: Road) -> Result<Self> {
        let mdev = Mdev::create(Type::Pci)?;
        let process = serve(&mdev)?;
        let client = works("opening the client", Client::open(&mdev, road))?;
        Ok(Self {
            client,
            _process: process,
            _mdev: mdev,
        })
    }

    fn get(&self, register: u64) -> Result<u8> {
        Ok(works(
            "register read",
            self.client.read_vec(REGISTERS, register, 1),
        )?[0])
    }

    fn set(&self, register: u64, value: u8) -> Result<()> {
        works(
            "register write",
            self.client.write_all(REGISTERS, register, &[value]),
        )
    }
}

fn config_space_is_that_of_the_card(road: Road) -> Result<()> {
    let card = Card::new(road)?;
    let function = Function::walk(&card.client)?;
    println!("{function}");
    equal("ids", (function.vendor, function.device), (0x494F, 0x0DC8))?;
    equal("base class", function.class.0, 0x11)?;
    equal("interrupt pin", function.pin, 1)?;
    let registers = Bar {
        index: 2,
        kind: BarKind::Io,
        prefetchable: false,
        size: 8,
    };
    equal("BARs", function.bars.clone(), vec![registers])?;
    let info = card.client.region_info(REGISTERS)?;
    equal("size of the region", info.size, 8)?;
    ensure!(
        function.capability(5).is_some(),
        "no MSI capability: {function}"
    );
    equal("vectors of MSI", card.client.irq_info(MSI)?.count, 1)?;
    equal("INTx", card.client.irq_info(INTX)?.count, 1)
}

fn config_space_guards_what_is_read_only(road: Road) -> Result<()> {
    let card = Card::new(road)?;
    let before = card.client.read_vec(CONFIG, 0, 64)?;
    for offset in [0x00, 0x02, 0x08, 0x0E, 0x2C, 0x34, 0x3D] {
        works("write", card.client.write_all(CONFIG, offset, &[0xFF]))?;
    }
    equal("header", card.client.read_vec(CONFIG, 0, 64)?, before)?;
    // Command: I/O space, memory space and bus master can be set.
    card.client.write_all(CONFIG, 4, &[0x01, 0x00])?;
    equal("command", card.client.read_vec(CONFIG, 4, 1)?[0] & 1, 1)
}

fn outputs_keep_what_is_written(road: Road) -> Result<()> {
    let card = Card::new(road)?;
    for value in [0x00, 0xFF, 0xA5, 0x5A, 0x01, 0x80] {
        card.set(OUT_0_7, value)?;
        card.set(OUT_8_15, !value)?;
        equal("outputs 0 to 7", card.get(OUT_0_7)?, value)?;
        equal("outputs 8 to 15", card.get(OUT_8_15)?, !value)?;
    }
    works("reset", card.client.reset())?;
    equal(
        "outputs after a reset",
        (card.get(OUT_0_7)?, card.get(OUT_8_15)?),
        (0, 0),
    )
}

fn inputs_toggle_every_three_reads(road: Road) -> Result<()> {
    let card = Card::new(road)?;
    for group in [IN_0_7, IN_8_15] {
        let reads = (0..12)
            .map(|_| card.get(group))
            .collect::<Result<Vec<_>>>()?;
        let expected = [0, 0, 0, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF];
        equal("inputs", reads.as_slice(), &expected[..])?;
    }
    Ok(())
}

fn change_raises_the_line(road: Road) -> Result<()> {
    let card = Card::new(road)?;
    let line = card.client.enable_irq(INTX, 0)?;
    // A read of the control register enables interrupts.
    card.get(IRQ_CTL)?;
    for _ in 0..3 {
        card.get(IN_0_7)?;
    }
    equal("interrupts", line.wait(time::patience())?, 1)?;
    equal("status", card.get(IRQ_STATUS)? & 0b100, 0b100)?;
    // A write to the inputs clears it, and the line falls.
    card.set(IN_0_7, 0)?;
    equal("status once cleared", card.get(IRQ_STATUS)?, 0)?;
    works(
        "unmask",
        card.client
            .set_irqs(&IrqSet::unmask(INTX, 0, IrqData::None(1))),
    )?;
    equal("interrupts of the lowered line", line.take()?, 0)?;
    // A write to the control register disables interrupts.
    card.set(IRQ_CTL, 0)?;
    for _ in 0..3 {
        card.get(IN_0_7)?;
    }
    equal("interrupts when disabled", line.wait(time::quiet())?, 0)
}

fn change_sends_msi(road: Road) -> Result<()> {
    let card = Card::new(road)?;
    let function = Function::walk(&card.client)?;
    let msi = card.client.enable_irq(MSI, 0)?;
    if let Some(offset) = function.capability(5) {
        // Message control, bit 0: MSI on (PCI 3.0, 6.8.1.3).
        works(
            "enabling MSI",
            card.client
                .write_all(CONFIG, u64::from(offset) + 2, &[1, 0]),
        )?;
    }
    card.get(IRQ_CTL)?;
    for _ in 0..3 {
        card.get(IN_8_15)?;
    }
    equal("interrupts", msi.wait(time::patience())?, 1)
}

fn restart_goes_unnoticed(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut process = serve(&mdev)?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    let first = works(
        "walk",
        Function::walk(&client).map_err(std::io::Error::other),
    )?;
    process.kill()?;
    let _process = serve(&mdev)?;
    let second = works(
        "walk",
        Function::walk(&client).map_err(std::io::Error::other),
    )?;
    equal("the card", second, first)
}

fn help_tells_the_options() -> Result<()> {
    let help = process::succeed("gpio", &["--help"])?;
    for part in ["--uuid", "Usage", "digital I/O"] {
        ensure!(help.contains(part), "--help lacks {part:?}: {help}");
    }
    Ok(())
}

/// Runs the program with arguments that it must refuse, with a sentence and no panic.
fn refused(arguments: &[&str], code: i32, part: &str) -> Result<()> {
    let output = process::run("gpio", arguments)?;
    equal(&format!("exit code of {arguments:?}"), output.code, code)?;
    let said = output.stderr;
    ensure!(
        said.contains(part),
        "{arguments:?}: {said:?} lacks {part:?}"
    );
    ensure!(!said.contains("panicked"), "{arguments:?}: {said:?}");
    Ok(())
}

fn no_arguments_refused() -> Result<()> {
    refused(&[], 2, "--uuid")?;
    refused(&["--no-such-option"], 2, "--no-such-option")
}

fn bad_uuid_refused() -> Result<()> {
    for uuid in ["nonsense", "", "83b8f4f2", "../../etc/passwd"] {
        refused(&["--uuid", uuid], 2, "--uuid")?;
    }
    Ok(())
}

fn absent_device_refused() -> Result<()> {
    let uuid = muser_e2e::mdev::random_uuid()?;
    refused(&["--uuid", &uuid], 3, &uuid)
}

fn second_server_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let _process = serve(&mdev)?;
    refused(&["--uuid", mdev.uuid()], 3, "another process serves it")
}

fn ends_when_device_is_removed() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut process = serve(&mdev)?;
    works("remove", mdev.remove())?;
    let status = process.wait()?;
    equal("exit code", status.code(), Some(0))
}
