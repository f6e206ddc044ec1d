// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Base address registers: what a device decodes (PCI 3.0, 6.2.5.1).

use std::ops::Range;

use super::config::Layout;
use super::regs::*;
use crate::region::{Area, AreaKind, IoEvent, Width};

/// What one base address register asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bar {
    pub(crate) kind: BarKind,
    pub(crate) size: u64,
    pub(crate) prefetchable: bool,
    pub(crate) width: Width,
    pub(crate) areas: Vec<Area>,
    signalled: Vec<Signalled>,
}

/// A register of which writes may come by eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signalled {
    offset: u64,
    width: Width,
    value: Option<u64>,
}

/// The address space of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarKind {
    Memory32,
    Memory64,
    Io,
}

impl Bar {
    /// Memory at a 32-bit address: a power of two from 16 bytes to 2 GiB.
    #[must_use]
    pub const fn memory32(size: u64) -> Self {
        Self::new(BarKind::Memory32, size)
    }

    /// Memory at a 64-bit address: a power of two from 16 bytes. Takes the next BAR's number too.
    #[must_use]
    pub const fn memory64(size: u64) -> Self {
        Self::new(BarKind::Memory64, size)
    }

    /// I/O ports: a power of two from 4 to 256.
    #[must_use]
    pub const fn io(size: u64) -> Self {
        Self::new(BarKind::Io, size)
    }

    const fn new(kind: BarKind, size: u64) -> Self {
        Self {
            kind,
            size,
            prefetchable: false,
            width: Width::Qword,
            areas: Vec::new(),
            signalled: Vec::new(),
        }
    }

    /// Says that reads have no side effects, and that writes may be merged.
    #[must_use]
    pub fn prefetchable(self) -> Self {
        Self {
            prefetchable: true,
            ..self
        }
    }

    /// Cuts accesses that are wider than the device's registers; 8 bytes is the default.
    #[must_use]
    pub fn registers(self, widest: Width) -> Self {
        Self {
            width: widest,
            ..self
        }
    }

    /// Makes part of the BAR memory that client and device share and may map, whole pages each.
    ///
    /// Accesses to it don't reach the device: see [`Bus::memory`](crate::Bus::memory).
    #[must_use]
    pub fn mappable(mut self, range: Range<u64>) -> Self {
        self.areas.push(area(AreaKind::Mappable, range));
        self
    }

    /// Makes part of the BAR doorbells, in units of 4 bytes: registers that a client writes without
    /// waiting for the device.
    ///
    /// The value lies in the area's memory at once, where the client reads it back; the device gets
    /// to know that it was rung ([`Device::doorbell`](crate::Device::doorbell)), and looks. Over a
    /// transport without doorbells the write waits, and does the same.
    #[must_use]
    pub fn doorbells(mut self, range: Range<u64>) -> Self {
        self.areas.push(area(AreaKind::Doorbell, range));
        self
    }

    /// Says that writes of this width to a register, and of this value if one is given, may come by
    /// eventfd, where the transport has such: the hypervisor signals it, past the VMM, and nobody
    /// waits. Several of them at once may become one.
    ///
    /// The device can't tell them from other writes. Without a value given, the value of one that
    /// came by eventfd is 0: the register is one that only counts as written to, as the doorbell of a
    /// queue.
    #[must_use]
    pub fn ioeventfd(mut self, offset: u64, width: Width, value: Option<u64>) -> Self {
        self.signalled.push(Signalled {
            offset,
            width,
            value,
        });
        self
    }

    /// The same, as part of the region of this index.
    pub(crate) fn io_events(&self, region: u32) -> impl Iterator<Item = IoEvent> + '_ {
        let event = move |signalled: &Signalled| IoEvent {
            region,
            offset: signalled.offset,
            width: signalled.width,
            value: signalled.value,
            ports: self.kind == BarKind::Io,
        };
        self.signalled.iter().map(event)
    }

    fn signalled_fault(&self) -> Option<String> {
        for (number, signalled) in self.signalled.iter().enumerate() {
            let Signalled {
                offset,
                width,
                value,
            } = *signalled;
            let name = format!("its eventfd at {offset:#x}");
            let bytes = width.bytes() as u64;
            let end = offset.checked_add(bytes);
            if offset % bytes != 0 || end.is_none_or(|end| end > self.size) {
                return Some(format!("{name} is not that of a register of {bytes} bytes"));
            }
            if value.is_some_and(|value| value > width.ones()) {
                return Some(format!("{name} has a value of more than {bytes} bytes"));
            }
            let is_shared = |area: &Area| offset < area.end() && area.offset < offset + bytes;
            if self.areas.iter().any(is_shared) {
                return Some(format!(
                    "{name} is in an area that clients write themselves"
                ));
            }
            // A hypervisor takes either any value, or single ones.
            let clashes = |other: &Signalled| {
                let values = value.is_none() || other.value.is_none() || value == other.value;
                (offset, width) == (other.offset, other.width) && values
            };
            if self.signalled[..number].iter().any(clashes) {
                return Some(format!("{name} is there twice"));
            }
        }
        None
    }

    /// What is wrong with this BAR, if anything is.
    pub(crate) fn fault(&self, page_size: u64) -> Option<String> {
        let Self { kind, size, .. } = self;
        let sizes = match kind {
            BarKind::Memory32 => 16..=1 << 31,
            BarKind::Memory64 => 16..=muser_uapi::MUSER_MAX_REGION_SIZE,
            BarKind::Io => 4..=256,
        };
        if !size.is_power_of_two() {
            return Some(format!("its size {size:#x} is not a power of two"));
        }
        if !sizes.contains(size) {
            let (least, most) = (sizes.start(), sizes.end());
            return Some(format!(
                "its size {size:#x} is not between {least:#x} and {most:#x}"
            ));
        }
        if *kind == BarKind::Io && self.prefetchable {
            return Some("I/O ports can't be prefetchable".into());
        }
        let mapped = |area: &Area| area.kind == AreaKind::Mappable;
        if *kind == BarKind::Io && self.areas.iter().any(mapped) {
            return Some("I/O ports can't be mapped".into());
        }
        self.area_fault(page_size)
            .or_else(|| self.signalled_fault())
    }

    fn area_fault(&self, page_size: u64) -> Option<String> {
        let mut before: Option<Area> = None;
        for area in &self.areas {
            let (what, unit, units) = match area.kind {
                AreaKind::Mappable => ("mappable area", page_size, "whole pages"),
                AreaKind::Doorbell => ("doorbell area", DOORBELL_UNIT, "whole doorbells"),
            };
            let name = format!("its {what} {:#x}..{:#x}", area.offset, area.end());
            if area.size == 0 {
                return Some(format!("{name} is empty"));
            }
            if area.offset % unit != 0 || area.size % unit != 0 {
                return Some(format!("{name} is not made of {units} of {unit} bytes"));
            }
            if area.end() > self.size {
                return Some(format!("{name} ends beyond its size {:#x}", self.size));
            }
            if let Some(before) = before.filter(|before| before.end() > area.offset) {
                let (start, end) = (before.offset, before.end());
                return Some(format!("{name} overlaps {start:#x}..{end:#x}"));
            }
            before = Some(*area);
        }
        None
    }

    /// Registers taken: two at a 64-bit address.
    pub(crate) fn registers_taken(&self) -> u8 {
        if self.kind == BarKind::Memory64 {
            2
        } else {
            1
        }
    }

    /// Describes the register in configuration space.
    pub(crate) fn lay_out(&self, number: u8, layout: &mut Layout) {
        let offset = PCI_BASE_ADDRESS_0 + 4 * u16::from(number);
        let prefetch = if self.prefetchable {
            PCI_BASE_ADDRESS_MEM_PREFETCH
        } else {
            0
        };
        let size_mask = !(self.size - 1);
        match self.kind {
            BarKind::Io => {
                let writable = low_half(size_mask & PCI_BASE_ADDRESS_IO_MASK);
                layout.dword(offset, PCI_BASE_ADDRESS_SPACE_IO, writable);
            }
            BarKind::Memory32 => {
                let writable = low_half(size_mask & PCI_BASE_ADDRESS_MEM_MASK);
                layout.dword(offset, prefetch, writable);
            }
            BarKind::Memory64 => {
                let writable = size_mask & PCI_BASE_ADDRESS_MEM_MASK;
                let flags = PCI_BASE_ADDRESS_MEM_TYPE_64 | prefetch;
                layout.dword(offset, flags, low_half(writable));
                layout.dword(offset + 4, 0, low_half(writable >> 32));
            }
        }
    }
}

/// Doorbells are aligned to this (`muser_area` in the ABI).
const DOORBELL_UNIT: u64 = 4;

fn area(kind: AreaKind, range: Range<u64>) -> Area {
    Area {
        offset: range.start,
        size: range.end.saturating_sub(range.start),
        kind,
    }
}

fn low_half(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
