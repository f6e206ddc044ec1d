// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that does whatever its registers are told, so that a client reaches all of the library.

use libmuser::{
    Access, Bar, Bus, Device, Dma, Express, Interrupts, Msi, Msix, PciBuilder, PciModel, Pin,
    PowerManagement, Region, Reset, Result,
};

/// Keeps what it is told, and what it was last told to look at.
#[derive(Debug)]
pub(super) struct Prober {
    dma: Dma,
    interrupts: Interrupts,
    scratch: u64,
    iova: u64,
}

/// Registers of BAR 0.
pub(super) const SCRATCH: u64 = 0;
/// An address in the client's memory.
pub(super) const IOVA: u64 = 8;
/// Read: the 8 bytes at `IOVA`. Written: they are written there.
pub(super) const DATA: u64 = 16;
/// Written: that vector is fired.
pub(super) const FIRE: u64 = 24;

pub(super) const IDS: [u16; 2] = [0x1af4, 0x10f0];

pub(super) fn model() -> PciModel {
    let builder = PciBuilder::new(IDS[0], IDS[1])
        .bar(0, Bar::memory32(0x4000).mappable(0x1000..0x2000))
        .bar(1, Bar::io(0x40))
        .bar(2, Bar::memory64(0x8000).doorbells(0x4000..0x4100))
        .rom([0x55, 0xaa])
        .interrupt_pin(Pin::A)
        .power_management(PowerManagement::new().soft_reset())
        .express(Express::endpoint())
        .msi(Msi::new(4).maskable())
        .msix(Msix::new(8).table(2, 0).pba(2, 0x1000));
    builder.build().expect("it can exist")
}

impl Prober {
    pub(super) fn new(bus: &Bus) -> Result<Self> {
        Ok(Self {
            dma: bus.dma(),
            interrupts: bus.interrupts(),
            scratch: 0,
            iova: 0,
        })
    }
}

impl Device for Prober {
    fn read(&mut self, access: Access) -> Result<u64> {
        match (access.region, access.offset) {
            (Region::Bar(0), SCRATCH) => Ok(self.scratch),
            (Region::Bar(0), IOVA) => Ok(self.iova),
            (Region::Bar(0), DATA) => self.dma.read_obj(self.iova),
            _ => access.unhandled_read(),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        match (access.region, access.offset) {
            (Region::Bar(0), SCRATCH) => self.scratch = value,
            (Region::Bar(0), IOVA) => self.iova = value,
            (Region::Bar(0), DATA) => self.dma.write_obj(self.iova, value)?,
            (Region::Bar(0), FIRE) => {
                self.interrupts
                    .raise(u16::try_from(value).unwrap_or(u16::MAX))?;
            }
            _ => access.unhandled_write(value)?,
        }
        Ok(())
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.scratch = 0;
        self.iova = 0;
        Ok(())
    }
}
