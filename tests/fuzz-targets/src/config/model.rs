// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space once more, by hand from the specifications: PCI 3.0 (chapter 6), PCI PM 1.2,
//! PCIe 4.0 (7.5.3, 7.6, 7.7, 7.9).

use super::{Cap, Declared, DeclaredBar, Ext};

/// Where the pending bits of MSI-X are, behind the largest table there is.
pub(super) const PBA: u32 = 0x8000;

/// A configuration space: each byte, and which bits of it a write changes.
#[derive(Debug)]
pub(super) struct Model {
    power_on: Vec<u8>,
    bytes: Vec<u8>,
    writable: Vec<u8>,
    /// Where the power management capability is, and whether its state goes with the power.
    power: Option<(usize, bool)>,
    /// Where PCI Express is, if the function can be reset.
    resettable: Option<usize>,
    /// Where MSI is, and the vectors asked for as a power of two.
    msi: Option<(usize, u8)>,
    msix: Option<usize>,
}

impl Model {
    /// What was declared; `None` if there is no room for it.
    pub(super) fn new(declared: &Declared) -> Option<Self> {
        let express = declared
            .caps
            .iter()
            .any(|cap| matches!(cap, Cap::Express { .. }));
        let size = if express { 4096 } else { 256 };
        let mut model = Self {
            power_on: vec![0; size],
            bytes: Vec::new(),
            writable: vec![0; size],
            power: None,
            resettable: None,
            msi: None,
            msix: None,
        };
        model.header(declared);
        let mut at = 0x40;
        let mut link = 0x34;
        for cap in &declared.caps {
            let end = at + cap_size(cap);
            if end > 0x100 {
                return None;
            }
            model.power_on[link] = u8::try_from(at).ok()?;
            model.capability(at, cap);
            link = at + 1;
            at = end.next_multiple_of(4);
        }
        let mut at = 0x100;
        for (number, ext) in declared.extended.iter().enumerate() {
            let end = at + ext_size(ext);
            if end > size {
                return None;
            }
            let next = end.next_multiple_of(4);
            let last = number + 1 == declared.extended.len();
            model.extended(at, if last { 0 } else { next }, ext);
            at = next;
        }
        model.bytes.clone_from(&model.power_on);
        Some(model)
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn reset(&mut self) {
        self.bytes.clone_from(&self.power_on);
    }

    /// Beyond the end there are ones.
    pub(super) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let byte = |at: usize| self.bytes.get(offset.saturating_add(at)).copied();
        (0..len).map(|at| byte(at).unwrap_or(0xff)).collect()
    }

    /// Tells of function level reset, power-up reset, and the end of MSI-X.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> [bool; 3] {
        let before = self.bytes.clone();
        let mut reset = false;
        for (at, value) in data.iter().enumerate() {
            let at = offset.saturating_add(at);
            if at >= self.bytes.len() {
                break;
            }
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
            // Initiate Function Level Reset: bit 15 of Device Control.
            reset |= self.resettable.is_some_and(|express| at == express + 9) && value & 0x80 != 0;
        }
        [
            reset,
            self.settle_power(&before),
            self.settle_messages(&before),
        ]
    }

    /// D1 and D2 are not supported, and writing them does nothing.
    fn settle_power(&mut self, before: &[u8]) -> bool {
        let Some((power, soft_reset)) = self.power else {
            return false;
        };
        let (was, is) = (before[power + 4] & 3, self.bytes[power + 4] & 3);
        if is == 1 || is == 2 {
            self.bytes[power + 4] = self.bytes[power + 4] & !3 | was;
        }
        was == 3 && is == 0 && soft_reset
    }

    /// No more messages are granted than were asked for.
    fn settle_messages(&mut self, before: &[u8]) -> bool {
        if let Some((msi, asked)) = self.msi {
            let granted = (self.bytes[msi + 2] >> 4 & 7).min(asked);
            self.bytes[msi + 2] = self.bytes[msi + 2] & !0x70 | granted << 4;
        }
        self.msix.is_some_and(|msix| {
            let enabled = |bytes: &[u8]| bytes[msix + 3] & 0x80 != 0;
            enabled(before) && !enabled(&self.bytes)
        })
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.power_on[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn header(&mut self, declared: &Declared) {
        let [vendor, device, subsystem_vendor, subsystem] = declared.ids;
        let [base, subclass, interface] = declared.class;
        self.put(0x00, &vendor.to_le_bytes());
        self.put(0x02, &device.to_le_bytes());
        self.put(0x08, &[declared.revision, interface, subclass, base]);
        self.put(0x2c, &subsystem_vendor.to_le_bytes());
        self.put(0x2e, &subsystem.to_le_bytes());
        self.put(0x3d, &[if declared.pin { 3 } else { 0 }]);
        // Cache Line Size and Interrupt Line are for software to keep.
        self.allow(0x0c, &[0xff]);
        self.allow(0x3c, &[0xff]);
        if !declared.caps.is_empty() {
            self.put(0x06, &[0x10]);
        }
        // Bus Master, Parity Error Response, SERR#, Interrupt Disable; the spaces there are.
        let mut command = 0x0544_u16;
        for (number, bar) in &declared.bars {
            let at = 0x10 + 4 * usize::from(*number);
            let (flags, mask) = match *bar {
                DeclaredBar::Io { log2 } => {
                    command |= 1;
                    (1, u64::MAX << log2 & 0xffff_ffff)
                }
                DeclaredBar::Memory32 { log2, prefetchable } => {
                    command |= 2;
                    (u8::from(prefetchable) << 3, u64::MAX << log2 & 0xffff_ffff)
                }
                DeclaredBar::Memory64 { log2, prefetchable } => {
                    command |= 2;
                    (u8::from(prefetchable) << 3 | 4, u64::MAX << log2)
                }
            };
            let registers = if matches!(bar, DeclaredBar::Memory64 { .. }) {
                8
            } else {
                4
            };
            self.put(at, &[flags]);
            self.allow(at, &mask.to_le_bytes()[..registers]);
        }
        if let Some(log2) = declared.rom {
            command |= 2;
            let mask = u32::MAX << log2.max(11) | 1;
            self.allow(0x30, &mask.to_le_bytes());
        }
        self.allow(0x04, &command.to_le_bytes());
    }

    fn capability(&mut self, at: usize, cap: &Cap) {
        match cap {
            Cap::Power { soft_reset } => {
                self.power = Some((at, *soft_reset));
                let keeps = if *soft_reset { 0 } else { 8 };
                self.put(at, &[0x01]);
                self.put(at + 2, &[3, 0, keeps]);
                self.allow(at + 4, &[3]);
            }
            Cap::Express { flr } => {
                self.resettable = flr.then_some(at);
                self.put(at, &[0x10]);
                self.put(at + 0x02, &[2, 0]);
                self.put(at + 0x04, &[0, 0x80, 0, if *flr { 0x10 } else { 0 }]);
                self.put(at + 0x08, &[0x10, 0x28]);
                self.allow(at + 0x08, &[0xff, 0x78]);
                self.put(at + 0x0c, &[0x11, 0, 0, 0]);
                self.allow(at + 0x10, &[0xcb, 0]);
                self.put(at + 0x12, &[0x11, 0]);
                self.put(at + 0x24, &[0x10, 0, 0, 0]);
                self.allow(at + 0x28, &[0x10, 0]);
                self.put(at + 0x2c, &[0x02, 0, 0, 0]);
                self.put(at + 0x30, &[0x01, 0]);
                self.allow(at + 0x30, &[0x0f, 0]);
            }
            Cap::Msi { log2, maskable } => {
                self.msi = Some((at, *log2));
                self.put(at, &[0x05]);
                self.put(at + 2, &[log2 << 1 | 0x80, u8::from(*maskable)]);
                self.allow(at + 2, &[0x71, 0]);
                self.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
                self.allow(at + 12, &[0xff, 0xff]);
                if *maskable {
                    let vectors = (1_u64 << (1 << log2)) - 1;
                    self.allow(at + 16, &vectors.to_le_bytes()[..4]);
                }
            }
            Cap::Msix { bar, vectors } => {
                self.msix = Some(at);
                self.put(at, &[0x11]);
                self.put(at + 2, &(vectors - 1).to_le_bytes());
                self.allow(at + 2, &[0, 0xc0]);
                self.put(at + 4, &u32::from(*bar).to_le_bytes());
                self.put(at + 8, &(PBA | u32::from(*bar)).to_le_bytes());
            }
            Cap::Vendor { data, writable } => {
                let len = u8::try_from(3 + data.len()).unwrap_or(u8::MAX);
                self.put(at, &[0x09]);
                self.put(at + 2, &[len]);
                self.put(at + 3, data);
                self.allow(at + 3, writable);
            }
        }
    }

    fn extended(&mut self, at: usize, next: usize, ext: &Ext) {
        let next = u32::try_from(next).unwrap_or(0) << 20;
        match ext {
            Ext::Serial(serial) => {
                self.put(at, &(0x0001_0003 | next).to_le_bytes());
                self.put(at + 4, &serial.to_le_bytes());
            }
            Ext::Vendor { id, revision, data } => {
                let len = u32::try_from(8 + data.len()).unwrap_or(0);
                let header = u32::from(*id) | u32::from(*revision) << 16 | len << 20;
                self.put(at, &(0x0001_000b | next).to_le_bytes());
                self.put(at + 4, &header.to_le_bytes());
                self.put(at + 8, data);
            }
        }
    }
}

fn cap_size(cap: &Cap) -> usize {
    match cap {
        Cap::Power { .. } => 8,
        Cap::Express { .. } => 0x3c,
        Cap::Msi { maskable, .. } => {
            if *maskable {
                0x18
            } else {
                0x0e
            }
        }
        Cap::Msix { .. } => 12,
        Cap::Vendor { data, .. } => 3 + data.len(),
    }
}

fn ext_size(ext: &Ext) -> usize {
    match ext {
        Ext::Serial(_) => 12,
        Ext::Vendor { data, .. } => 8 + data.len(),
    }
}
