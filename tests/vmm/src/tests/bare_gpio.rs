// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gpio card in a QEMU without a guest.

use anyhow::{bail, ensure, Result};
use serde_json::json;

use super::{equal, topic};
use crate::pci::{Function, BUS_MASTER, CAP_MSI, IO};
use crate::qemu::{Qemu, Setup};
use crate::qtest::Qtest;
use crate::server::Server;
use crate::wait::{self, SOON};

topic!("qtest::gpio": [
    config_space_is_that_of_the_card,
    outputs_keep_what_is_written,
    inputs_toggle_every_three_reads,
    change_raises_the_line_until_it_is_cleared,
    change_writes_an_msi_to_memory,
    reset_of_the_machine_resets_the_card,
    next_qemu_finds_the_card_as_new,
    second_qemu_is_turned_away,
    killed_server_leaves_qemu_alive,
    two_cards_keep_apart,
]);

/// Registers of the card, by ports from where BAR 2 is put.
const PORTS: u16 = 0xc000;
pub(super) const OUT_0_7: u16 = PORTS;
pub(super) const IN_0_7: u16 = PORTS + 1;
pub(super) const IRQ_CONTROL: u16 = PORTS + 2;
const OUT_8_15: u16 = PORTS + 4;
const IN_8_15: u16 = PORTS + 5;
pub(super) const IRQ_STATUS: u16 = PORTS + 6;
pub(super) const CHANGED: u32 = 1 << 2;

const SLOT: u8 = 4;
/// Where in the guest's memory an MSI is sent, and what it says.
const MESSAGE_ADDRESS: u32 = 0x0010_0000;
const MESSAGE: u16 = 0x1234;

/// A machine with a card, whose registers are at the ports.
pub(super) struct Bench {
    pub(super) cpu: Qtest,
    pub(super) qemu: Qemu,
    card: Function,
}

impl Bench {
    pub(super) fn new(server: &Server) -> Result<Self> {
        let setup = Setup::new("qtest-gpio", "q35")?.shared_memory("64M");
        let place = [("addr", json!(format!("{SLOT:x}")))];
        let (qemu, cpu) = setup.device(server.socket(), &place).start_bare()?;
        let card = Function::at(SLOT);
        let mut bench = Self { cpu, qemu, card };
        bench.switch_on()?;
        Ok(bench)
    }

    /// What firmware and a driver do first.
    pub(super) fn switch_on(&mut self) -> Result<()> {
        self.card.place(&mut self.cpu, 2, PORTS.into())?;
        self.card.command(&mut self.cpu, IO | BUS_MASTER)
    }

    pub(super) fn get(&mut self, port: u16) -> Result<u32> {
        self.cpu.port_read(port, 1)
    }

    pub(super) fn set(&mut self, port: u16, value: u32) -> Result<()> {
        self.cpu.port_write(port, 1, value)
    }

    /// Reads inputs until they change once.
    pub(super) fn toggle(&mut self) -> Result<()> {
        for _ in 0..3 {
            self.get(IN_0_7)?;
        }
        Ok(())
    }

    /// The card counts reads of its inputs from none.
    pub(super) fn inputs_begin_anew(&mut self) -> Result<()> {
        let reads = (0..4).map(|_| self.get(IN_0_7));
        let reads = reads.collect::<Result<Vec<_>>>()?;
        equal("inputs", reads, vec![0, 0, 0, 0xff])
    }
}

fn config_space_is_that_of_the_card() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    let Bench { cpu, card, .. } = &mut bench;
    equal("ids", card.read(cpu, 0x00, 4)?, 0x0dc8_494f)?;
    equal("class", card.read(cpu, 0x08, 4)? >> 8, 0x0011_8000)?;
    equal("interrupt pin", card.read(cpu, 0x3d, 1)?, 1)?;
    // An I/O BAR of 8 ports, and no other.
    equal("BAR 2", card.bar(cpu, 2)?, (1, 8))?;
    for other in [0, 1, 3, 4, 5] {
        equal("a BAR that is not there", card.bar(cpu, other)?, (0, 0))?;
    }
    card.capability(cpu, CAP_MSI)?;
    Ok(())
}

fn outputs_keep_what_is_written() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    for value in [0x00, 0xff, 0xa5, 0x5a, 0x01, 0x80] {
        let mark = server.process.mark();
        bench.set(OUT_0_7, value)?;
        bench.set(OUT_8_15, value ^ 0xff)?;
        equal("outputs 0 to 7", bench.get(OUT_0_7)?, value)?;
        equal("outputs 8 to 15", bench.get(OUT_8_15)?, value ^ 0xff)?;
        // And what the device says that it did.
        let outputs = format!("outputs: {:#06x}", (value ^ 0xff) << 8 | value);
        server.process.hear(mark, &outputs, SOON)?;
    }
    Ok(())
}

fn inputs_toggle_every_three_reads() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    for group in [IN_0_7, IN_8_15] {
        let reads = (0..9).map(|_| bench.get(group));
        let reads = reads.collect::<Result<Vec<_>>>()?;
        equal("inputs", reads, vec![0, 0, 0, 0xff, 0xff, 0xff, 0, 0, 0])?;
    }
    Ok(())
}

/// The line goes to the I/O APIC: up when the inputs change, down for good when that is cleared.
/// In between it falls with each access, for QEMU can't tell which of them ends the interrupt, and
/// rises again since it does not.
fn change_raises_the_line_until_it_is_cleared() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    bench.cpu.watch("ioapic")?;
    bench.get(IRQ_CONTROL)?;
    bench.toggle()?;
    let first = bench
        .cpu
        .wait_for("the line to rise", |inputs| inputs.high.len() == 1)?;
    equal("status", bench.get(IRQ_STATUS)?, CHANGED)?;
    bench.cpu.wait_for("the line to rise again", |inputs| {
        inputs.rises > first.rises && inputs.high == first.high
    })?;
    bench.set(IN_0_7, 0)?;
    bench
        .cpu
        .wait_for("the line to fall", |inputs| inputs.high.is_empty())?;
    equal("status once cleared", bench.get(IRQ_STATUS)?, 0)?;
    bench.cpu.quiet()?;
    // A write to the control register disables interrupts.
    bench.set(IRQ_CONTROL, 0)?;
    bench.toggle()?;
    bench.cpu.quiet()
}

fn change_writes_an_msi_to_memory() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    let Bench { cpu, card, .. } = &mut bench;
    let msi = card.capability(cpu, CAP_MSI)?;
    let control = card.read(cpu, msi + 2, 2)?;
    let wide = control & 1 << 7 != 0;
    card.write(cpu, msi + 4, 4, MESSAGE_ADDRESS)?;
    if wide {
        card.write(cpu, msi + 8, 4, 0)?;
    }
    let data = if wide { msi + 12 } else { msi + 8 };
    card.write(cpu, data, 2, MESSAGE.into())?;
    card.write(cpu, msi + 2, 2, control | 1)?;
    cpu.watch("ioapic")?;
    for round in 0..3 {
        bench.cpu.write(MESSAGE_ADDRESS.into(), 4, 0)?;
        bench.get(IRQ_CONTROL)?;
        bench.toggle()?;
        let what = format!("message {round}");
        wait::until(&what, SOON, || {
            let message = bench.cpu.read(MESSAGE_ADDRESS.into(), 4)?;
            Ok((message == u64::from(MESSAGE)).then_some(()))
        })?;
        bench.set(IN_0_7, 0)?;
    }
    // And by no line.
    equal("rises of lines", bench.cpu.inputs()?.rises, 0)
}

fn reset_of_the_machine_resets_the_card() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    bench.set(OUT_0_7, 0x55)?;
    bench.get(IN_0_7)?;
    for _ in 0..3 {
        bench.qemu.reset()?;
        bench.switch_on()?;
        equal("outputs", bench.get(OUT_0_7)?, 0)?;
        bench.inputs_begin_anew()?;
        bench.set(OUT_0_7, 0xaa)?;
    }
    Ok(())
}

/// Whether QEMU ends in order or is killed, the server serves the next one, which finds nothing of
/// what the one before did.
fn next_qemu_finds_the_card_as_new() -> Result<()> {
    let mut server = Server::start("gpio")?;
    for round in 0..4 {
        let mut bench = Bench::new(&server)?;
        equal("outputs", bench.get(OUT_0_7)?, 0)?;
        equal("status", bench.get(IRQ_STATUS)?, 0)?;
        bench.inputs_begin_anew()?;
        bench.set(OUT_0_7, 0x77)?;
        bench.get(IRQ_CONTROL)?;
        bench.toggle()?;
        equal("status", bench.get(IRQ_STATUS)?, CHANGED)?;
        if round % 2 == 0 {
            bench.qemu.process.kill()?;
        } else {
            bench.qemu.quit()?;
        }
        server.process.running()?;
    }
    Ok(())
}

/// A card is one machine's. Who comes while another has it is told so, and the other goes on.
fn second_qemu_is_turned_away() -> Result<()> {
    let server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    bench.set(OUT_0_7, 0x55)?;
    for _ in 0..3 {
        let Err(error) = Bench::new(&server) else {
            bail!("two machines have the card");
        };
        let error = format!("{error:#}");
        ensure!(error.contains("vfio-user"), "QEMU did not refuse: {error}");
    }
    equal("outputs", bench.get(OUT_0_7)?, 0x55)
}

/// Without a supervisor a killed server is a card that is pulled: reads are all ones, and QEMU lives.
fn killed_server_leaves_qemu_alive() -> Result<()> {
    let mut server = Server::start("gpio")?;
    let mut bench = Bench::new(&server)?;
    bench.set(OUT_0_7, 0x55)?;
    server.process.kill()?;
    equal("a read", bench.get(OUT_0_7)?, 0xff)?;
    bench.qemu.process.running()?;
    // The socket's file is what the killed server left; its successor takes the place.
    server.start_again()?;
    let mut next = Bench::new(&server)?;
    equal("outputs", next.get(OUT_0_7)?, 0)
}

fn two_cards_keep_apart() -> Result<()> {
    let servers = [Server::start("gpio")?, Server::start("gpio")?];
    let mut setup = Setup::new("qtest-two", "q35")?.shared_memory("64M");
    for (slot, server) in (SLOT..).zip(&servers) {
        setup = setup.device(server.socket(), &[("addr", json!(format!("{slot:x}")))]);
    }
    let (_qemu, mut cpu) = setup.start_bare()?;
    for (slot, value) in (SLOT..).zip([0x11, 0x22]) {
        let card = Function::at(slot);
        let ports = PORTS + 0x100 * u16::from(slot);
        card.place(&mut cpu, 2, ports.into())?;
        card.command(&mut cpu, IO)?;
        cpu.port_write(ports, 1, value)?;
    }
    for (slot, value) in (SLOT..).zip([0x11, 0x22]) {
        let ports = PORTS + 0x100 * u16::from(slot);
        equal("outputs", cpu.port_read(ports, 1)?, value)?;
    }
    Ok(())
}
