// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space as a driver or `lspci -vvv` walks it: header, BARs by sizing, capabilities.

use std::collections::HashSet;
use std::fmt;
use std::io;

use anyhow::{ensure, Context, Result};

use crate::node::CONFIG;
use crate::vfio::Client;

/// What a BAR decodes (PCI 3.0, 6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BARs.
    Memory64,
}

/// A BAR, sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// From 0 to 5.
    pub index: u32,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
    /// Bytes.
    pub size: u64,
}

/// A capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability id, or extended capability id.
    pub id: u16,
    /// Where it is.
    pub offset: u16,
    /// Whether it is an extended one, above 0x100.
    pub extended: bool,
}

/// What a walk through configuration space finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor and device id.
    pub subsystem: (u16, u16),
    /// Base class, subclass, programming interface.
    pub class: (u8, u8, u8),
    /// Revision.
    pub revision: u8,
    /// Interrupt pin: 0 for none, 1 for INTA.
    pub pin: u8,
    /// BARs that there are.
    pub bars: Vec<Bar>,
    /// Capabilities in the order of their chains.
    pub capabilities: Vec<Capability>,
}

impl Function {
    /// Walks the configuration space of a VFIO device.
    ///
    /// # Errors
    ///
    /// When an access fails, the header is not that of an endpoint, a BAR keeps no address, or a
    /// capability chain has a loop or leaves its space.
    pub fn walk(client: &Client) -> Result<Self> {
        let config = Config(client);
        let id = config.u32(0x00).context("vendor and device id")?;
        let class = config.u32(0x08).context("class and revision")?;
        let header = config.u8(0x0E)?;
        ensure!(
            header & 0x7F == 0,
            "header type {header:#x} is not that of an endpoint"
        );
        let subsystem = config.u32(0x2C)?;
        Ok(Self {
            vendor: low(id),
            device: high(id),
            subsystem: (low(subsystem), high(subsystem)),
            class: (
                class.to_le_bytes()[3],
                class.to_le_bytes()[2],
                class.to_le_bytes()[1],
            ),
            revision: class.to_le_bytes()[0],
            pin: config.u8(0x3D)?,
            bars: config.bars().context("sizing the BARs")?,
            capabilities: config.capabilities().context("walking the capabilities")?,
        })
    }

    /// Where a capability is.
    pub fn capability(&self, id: u16) -> Option<u16> {
        self.capabilities
            .iter()
            .find(|cap| cap.id == id && !cap.extended)
            .map(|cap| cap.offset)
    }
}

/// Lines like those of `lspci -v`.
impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (base, sub, interface) = self.class;
        let Self {
            vendor,
            device,
            revision,
            ..
        } = self;
        writeln!(
            f,
            "{vendor:04x}:{device:04x} class {base:02x}{sub:02x}{interface:02x} (rev {revision:02x})"
        )?;
        writeln!(
            f,
            "Subsystem: {:04x}:{:04x}",
            self.subsystem.0, self.subsystem.1
        )?;
        if let Some(pin) = self.pin.checked_sub(1) {
            writeln!(f, "Interrupt: pin {}", char::from(b'A' + pin % 4))?;
        }
        for bar in &self.bars {
            let what = match bar.kind {
                BarKind::Io => "I/O ports",
                BarKind::Memory32 => "Memory (32-bit)",
                BarKind::Memory64 => "Memory (64-bit)",
            };
            let prefetch = if bar.prefetchable {
                ", prefetchable"
            } else {
                ""
            };
            writeln!(
                f,
                "Region {}: {what}{prefetch} [size={}]",
                bar.index, bar.size
            )?;
        }
        for cap in &self.capabilities {
            let name = match (cap.extended, cap.id) {
                (false, 0x01) => "Power Management",
                (false, 0x05) => "MSI",
                (false, 0x09) => "Vendor Specific",
                (false, 0x10) => "Express",
                (false, 0x11) => "MSI-X",
                (true, 0x03) => "Device Serial Number",
                (true, 0x0B) => "Vendor Specific (extended)",
                _ => "Unknown",
            };
            writeln!(f, "Capabilities: [{:02x}] {name}", cap.offset)?;
        }
        Ok(())
    }
}

fn low(word: u32) -> u16 {
    (word & 0xFFFF) as u16
}

fn high(word: u32) -> u16 {
    (word >> 16) as u16
}

/// Typed accesses to configuration space.
struct Config<'a>(&'a Client);

impl Config<'_> {
    fn u32(&self, offset: u64) -> io::Result<u32> {
        self.0.read_u32(CONFIG, offset)
    }

    fn u16(&self, offset: u64) -> io::Result<u16> {
        let data = self.0.read_vec(CONFIG, offset, 2)?;
        Ok(u16::from_le_bytes([data[0], data[1]]))
    }

    fn u8(&self, offset: u64) -> io::Result<u8> {
        Ok(self.0.read_vec(CONFIG, offset, 1)?[0])
    }

    fn set_u32(&self, offset: u64, value: u32) -> io::Result<()> {
        self.0.write_all(CONFIG, offset, &value.to_le_bytes())
    }

    /// Writes all ones to a register, and gives what can be set in it.
    fn sized(&self, offset: u64) -> Result<u32> {
        let before = self.u32(offset)?;
        self.set_u32(offset, u32::MAX)?;
        let mask = self.u32(offset)?;
        self.set_u32(offset, before)?;
        let after = self.u32(offset)?;
        ensure!(
            after == before,
            "register {offset:#x} was {before:#x} and is {after:#x}"
        );
        Ok(mask)
    }

    fn bars(&self) -> Result<Vec<Bar>> {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < 6 {
            let offset = 0x10 + u64::from(index) * 4;
            let mask = self.sized(offset)?;
            let (kind, bits) = match mask & 0b111 {
                _ if mask & 1 != 0 => (BarKind::Io, u64::from(mask & !0b11) | !0xFFFF_FFFF),
                0b100 => {
                    ensure!(index < 5, "BAR {index} has no upper half");
                    let upper = self.sized(offset + 4)?;
                    (
                        BarKind::Memory64,
                        u64::from(mask & !0xF) | u64::from(upper) << 32,
                    )
                }
                _ => (BarKind::Memory32, u64::from(mask & !0xF) | !0xFFFF_FFFF),
            };
            if mask != 0 {
                // I/O BARs may leave their upper half at zero (PCI 3.0, 6.2.5.1).
                let bits = if kind == BarKind::Io && bits & 0xFFFF_0000 == 0 {
                    bits | 0xFFFF_0000
                } else {
                    bits
                };
                let size = (!bits).wrapping_add(1);
                ensure!(
                    size.is_power_of_two(),
                    "BAR {index} has a mask of {bits:#x}"
                );
                bars.push(Bar {
                    index,
                    kind,
                    prefetchable: mask & 0b1001 == 0b1000,
                    size,
                });
            }
            index += if kind == BarKind::Memory64 { 2 } else { 1 };
        }
        Ok(bars)
    }

    fn capabilities(&self) -> Result<Vec<Capability>> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        let status = self.u16(0x06)?;
        // Status bit 4: there is a chain (PCI 3.0, 6.2.3).
        let mut offset = if status & 1 << 4 != 0 {
            self.u8(0x34)? & !0b11
        } else {
            0
        };
        while offset != 0 {
            ensure!(
                offset >= 0x40,
                "a capability at {offset:#x} lies in the header"
            );
            ensure!(
                seen.insert(u16::from(offset)),
                "the chain comes to {offset:#x} twice"
            );
            let head = self.u16(u64::from(offset))?;
            let [id, next] = head.to_le_bytes();
            ensure!(
                id != 0 && id != 0xFF,
                "a capability at {offset:#x} has id {id:#x}"
            );
            found.push(Capability {
                id: id.into(),
                offset: offset.into(),
                extended: false,
            });
            offset = next & !0b11;
        }
        let size = self.0.region_info(CONFIG)?.size;
        let mut offset = if size >= 4096 { 0x100u16 } else { 0 };
        while offset != 0 {
            ensure!(
                offset >= 0x100,
                "an extended capability at {offset:#x} lies too low"
            );
            ensure!(
                seen.insert(offset),
                "the extended chain comes to {offset:#x} twice"
            );
            let head = self.u32(u64::from(offset))?;
            if head == 0 {
                break;
            }
            found.push(Capability {
                id: low(head),
                offset,
                extended: true,
            });
            offset = (high(head) >> 4) & !0b11;
        }
        Ok(found)
    }
}
