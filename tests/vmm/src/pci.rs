// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI function as a CPU without an operating system finds it: by the ports 0xcf8 and 0xcfc (PCI
//! Local Bus Specification 3.0, 3.2.2.3.2).

use anyhow::{ensure, Context as _, Result};

use crate::qtest::Qtest;

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// Registers of configuration space (the same, 6.1).
pub(crate) const COMMAND: u8 = 0x04;
const STATUS: u8 = 0x06;
const BARS: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const HAS_CAPABILITIES: u32 = 1 << 4;

/// Bits of the command register.
pub(crate) const IO: u32 = 1 << 0;
pub(crate) const MEMORY: u32 = 1 << 1;
pub(crate) const BUS_MASTER: u32 = 1 << 2;

/// Ids of capabilities (the same, appendix H).
pub(crate) const CAP_POWER: u8 = 0x01;
pub(crate) const CAP_MSI: u8 = 0x05;
pub(crate) const CAP_EXPRESS: u8 = 0x10;
pub(crate) const CAP_MSIX: u8 = 0x11;

/// The function 0 of a slot on bus 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    slot: u8,
}

impl Function {
    pub(crate) fn at(slot: u8) -> Self {
        Self { slot }
    }

    /// Reads a register of configuration space; `width` in bytes.
    pub(crate) fn read(self, cpu: &mut Qtest, register: u8, width: u8) -> Result<u32> {
        let port = self.select(cpu, register)?;
        cpu.port_read(port, width)
    }

    /// Writes to a register of configuration space; `width` in bytes.
    pub(crate) fn write(self, cpu: &mut Qtest, register: u8, width: u8, value: u32) -> Result<()> {
        let port = self.select(cpu, register)?;
        cpu.port_write(port, width, value)
    }

    fn select(self, cpu: &mut Qtest, register: u8) -> Result<u16> {
        let address = ENABLE | u32::from(self.slot) << 11 | u32::from(register & !3);
        cpu.port_write(ADDRESS_PORT, 4, address)?;
        Ok(DATA_PORT + u16::from(register & 3))
    }

    /// What a BAR is: its flag bits, and its size by the writing of ones.
    pub(crate) fn bar(self, cpu: &mut Qtest, index: u8) -> Result<(u32, u32)> {
        let register = BARS + 4 * index;
        let before = self.read(cpu, register, 4)?;
        self.write(cpu, register, 4, u32::MAX)?;
        let ones = self.read(cpu, register, 4)?;
        self.write(cpu, register, 4, before)?;
        let flags = if ones & 1 == 1 { ones & 3 } else { ones & 0xf };
        let mask = ones & !(if ones & 1 == 1 { 3 } else { 0xf });
        Ok((flags, mask.wrapping_neg()))
    }

    /// Puts a BAR somewhere.
    pub(crate) fn place(self, cpu: &mut Qtest, index: u8, address: u32) -> Result<()> {
        self.write(cpu, BARS + 4 * index, 4, address)
    }

    /// Switches on what the command register can.
    pub(crate) fn command(self, cpu: &mut Qtest, bits: u32) -> Result<()> {
        self.write(cpu, COMMAND, 2, bits)
    }

    /// Where a capability is.
    pub(crate) fn capability(self, cpu: &mut Qtest, id: u8) -> Result<u8> {
        let has = self.read(cpu, STATUS, 2)? & HAS_CAPABILITIES != 0;
        ensure!(has, "the function has no capabilities");
        let mut place = self.byte(cpu, CAPABILITIES)?;
        let mut seen = 0;
        while place != 0 {
            if self.byte(cpu, place)? == id {
                return Ok(place);
            }
            seen += 1;
            ensure!(seen < 48, "the list of capabilities has no end");
            place = self.byte(cpu, place + 1)?;
        }
        None.with_context(|| format!("the function has no capability {id:#04x}"))
    }

    fn byte(self, cpu: &mut Qtest, register: u8) -> Result<u8> {
        Ok(u8::try_from(self.read(cpu, register, 1)?)?)
    }
}
