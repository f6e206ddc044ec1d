// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves a card with all that the samples have not: memory that clients map, a BAR of 64 bits, an
//! expansion ROM, PCI Express and power management.
//!
//! BAR 0 has registers of 4 bytes in its first page, each of which is the word at the same place of
//! the second page, which clients map. BAR 2 is 64 KiB of memory that clients map.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use libmuser::{
    cli, Access, Bar, Bus, Device, Errno, Error, Express, PciBuilder, PciModel, PowerManagement,
    Region, Reset, Result, SharedMemory, Width,
};

const PAGE: u64 = 0x1000;
const LARGE: u64 = 0x1_0000;
/// What an expansion ROM begins with (PCI Firmware Specification, 5.1), and some bytes to see.
const ROM: &[u8] = b"\x55\xaa\x01 this is the card's ROM";

fn main() -> ExitCode {
    let about = "Serves a card with memory that clients map";
    let version = env!("CARGO_PKG_VERSION");
    cli::run("vmm-device", version, about, model(), Windows::new)
}

fn model() -> Result<PciModel> {
    let registers = Bar::memory32(2 * PAGE).registers(Width::Dword);
    let large = Bar::memory64(LARGE).prefetchable();
    PciBuilder::new(0x1234, 0x3a9d)
        .class(0x05, 0x80, 0x00)
        .bar(0, registers.mappable(PAGE..2 * PAGE))
        .bar(2, large.mappable(0..LARGE))
        .rom(ROM)
        .power_management(PowerManagement::new())
        .express(Express::endpoint())
        .build()
}

/// The card.
#[derive(Debug)]
struct Windows {
    small: SharedMemory,
    large: SharedMemory,
}

impl Windows {
    fn new(bus: &Bus) -> Result<Self> {
        let memory = |bar, offset| {
            let missing = || Error::new(Errno::EIO, "the memory is missing");
            bus.memory(Region::Bar(bar), offset).ok_or_else(missing)
        };
        Ok(Self {
            small: memory(0, PAGE)?,
            large: memory(2, 0)?,
        })
    }
}

impl Device for Windows {
    fn read(&mut self, access: Access) -> Result<u64> {
        let Some(place) = register(&access) else {
            return access.unhandled_read();
        };
        Ok(self.small.load::<u32>(place)?.into())
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        let Some(place) = register(&access) else {
            return access.unhandled_write(value);
        };
        let [a, b, c, d, ..] = value.to_le_bytes();
        self.small.store(place, u32::from_le_bytes([a, b, c, d]))
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.small.clear();
        self.large.clear();
        Ok(())
    }
}

fn register(access: &Access) -> Option<usize> {
    let place = usize::try_from(access.offset).ok()?;
    (access.region == Region::Bar(0) && access.width == Width::Dword).then_some(place)
}
