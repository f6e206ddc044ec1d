// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A card whose memory QEMU maps, in a QEMU without a guest: `device.rs`.

use anyhow::Result;
use serde_json::json;

use super::{equal, topic};
use crate::pci::{Function, BUS_MASTER, CAP_EXPRESS, CAP_POWER, MEMORY};
use crate::qemu::{Qemu, Setup};
use crate::qtest::Qtest;
use crate::server::Server;

topic!("qtest::windows": [
    mapped_page_is_what_the_device_sees,
    mapped_memory_keeps_every_width,
    bar_of_64_bits_lies_above_4_gib,
    memory_is_empty_after_a_reset_and_for_the_next_qemu,
    expansion_rom_is_read,
    function_level_reset_clears_the_card,
]);

const SLOT: u8 = 6;
/// Where the BARs and the ROM are put.
pub(super) const REGISTERS: u32 = 0xe000_0000;
pub(super) const PAGE: u64 = 0x1000;
pub(super) const LARGE: u64 = 0x20_0000_0000;
const LARGE_SIZE: u64 = 0x1_0000;
pub(super) const DEADLY: u32 = 0xe000_8000;
const ROM: u32 = 0xe010_0000;
const ROM_ENABLE: u32 = 1;

/// Registers of configuration space.
const BAR_2: u8 = 0x18;
const ROM_BAR: u8 = 0x30;
/// Of the PCI Express capability: Device Control, and in it Initiate Function Level Reset (PCI
/// Express Base Specification 4.0, 7.5.3.4).
const DEVICE_CONTROL: u8 = 0x08;
const FLR: u32 = 1 << 15;

/// A machine with the card.
pub(super) struct Bench {
    pub(super) cpu: Qtest,
    qemu: Qemu,
    card: Function,
}

impl Bench {
    pub(super) fn new(server: &Server) -> Result<Self> {
        let setup = Setup::new("qtest-windows", "q35")?.shared_memory("64M");
        let place = [("addr", json!(format!("{SLOT:x}")))];
        let (qemu, cpu) = setup.device(server.socket(), &place).start_bare()?;
        let card = Function::at(SLOT);
        let mut bench = Self { cpu, qemu, card };
        bench.switch_on()?;
        Ok(bench)
    }

    fn switch_on(&mut self) -> Result<()> {
        let Self { cpu, card, .. } = self;
        card.place(cpu, 0, REGISTERS)?;
        card.place(cpu, 2, 0)?;
        card.place(cpu, 3, u32::try_from(LARGE >> 32)?)?;
        card.place(cpu, 4, DEADLY)?;
        card.command(cpu, MEMORY | BUS_MASTER)
    }

    /// A register, which is a word of the mapped page by way of the device.
    pub(super) fn register(&mut self, place: u64) -> Result<u64> {
        self.cpu.read(u64::from(REGISTERS) + place, 4)
    }

    /// The same word, as QEMU has it mapped.
    pub(super) fn mapped(&mut self, place: u64) -> Result<u64> {
        self.cpu.read(u64::from(REGISTERS) + PAGE + place, 4)
    }
}

fn mapped_page_is_what_the_device_sees() -> Result<()> {
    let server = Server::start("vmm-device")?;
    let mut bench = Bench::new(&server)?;
    for place in (0..PAGE).step_by(0x44) {
        let word = 0xabcd_0000 + place;
        let mapped = u64::from(REGISTERS) + PAGE + place;
        bench.cpu.write(mapped, 4, word)?;
        equal("the register", bench.register(place)?, word)?;
        bench
            .cpu
            .write(u64::from(REGISTERS) + place, 4, !word & 0xffff_ffff)?;
        equal("the mapped word", bench.mapped(place)?, !word & 0xffff_ffff)?;
    }
    Ok(())
}

fn mapped_memory_keeps_every_width() -> Result<()> {
    let server = Server::start("vmm-device")?;
    let mut bench = Bench::new(&server)?;
    for (width, value) in [
        (1, 0x81),
        (2, 0x8182),
        (4, 0x8182_8384),
        (8, 0x8182_8384_8586_8788),
    ] {
        // The last that fit.
        let place = LARGE + LARGE_SIZE - u64::from(width);
        bench.cpu.write(place, width, value)?;
        equal("the value", bench.cpu.read(place, width)?, value)?;
    }
    Ok(())
}

fn bar_of_64_bits_lies_above_4_gib() -> Result<()> {
    let server = Server::start("vmm-device")?;
    let mut bench = Bench::new(&server)?;
    let Bench { cpu, card, .. } = &mut bench;
    // Memory, 64 bits, prefetchable.
    equal("flags of BAR 2", card.read(cpu, BAR_2, 4)? & 0xf, 0b1100)?;
    for page in 0..LARGE_SIZE / PAGE {
        cpu.write(LARGE + page * PAGE, 8, page + 1)?;
    }
    for page in 0..LARGE_SIZE / PAGE {
        equal("the page", cpu.read(LARGE + page * PAGE, 8)?, page + 1)?;
    }
    Ok(())
}

fn memory_is_empty_after_a_reset_and_for_the_next_qemu() -> Result<()> {
    let server = Server::start("vmm-device")?;
    let mut bench = Bench::new(&server)?;
    for next in ["reset", "killed"] {
        bench.cpu.write(LARGE, 8, 7)?;
        bench.cpu.write(u64::from(REGISTERS), 4, 8)?;
        if next == "reset" {
            bench.qemu.reset()?;
            bench.switch_on()?;
        } else {
            bench.qemu.process.kill()?;
            bench = Bench::new(&server)?;
        }
        equal("the large memory", bench.cpu.read(LARGE, 8)?, 0)?;
        equal("the small memory", bench.register(0)?, 0)?;
        equal("the small memory, mapped", bench.mapped(0)?, 0)?;
    }
    Ok(())
}

fn expansion_rom_is_read() -> Result<()> {
    let server = Server::start("vmm-device")?;
    let mut bench = Bench::new(&server)?;
    let Bench { cpu, card, .. } = &mut bench;
    card.write(cpu, ROM_BAR, 4, ROM | ROM_ENABLE)?;
    equal("its signature", cpu.read(ROM.into(), 2)?, 0xaa55)?;
    let text = [0, 1, 2, 3].map(|place| cpu.read(u64::from(ROM) + 4 + place, 1));
    let text = text.into_iter().collect::<Result<Vec<_>>>()?;
    equal("its text", text, b"this".map(u64::from).to_vec())
}

fn function_level_reset_clears_the_card() -> Result<()> {
    let server = Server::start("vmm-device")?;
    let mut bench = Bench::new(&server)?;
    bench.cpu.write(LARGE, 8, 7)?;
    let Bench { cpu, card, .. } = &mut bench;
    card.capability(cpu, CAP_POWER)?;
    let express = card.capability(cpu, CAP_EXPRESS)?;
    let control = card.read(cpu, express + DEVICE_CONTROL, 2)?;
    card.write(cpu, express + DEVICE_CONTROL, 2, control | FLR)?;
    // Which empties the command register too.
    bench.switch_on()?;
    equal("the memory", bench.cpu.read(LARGE, 8)?, 0)
}
