// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI configuration space: what a client's reads and writes do to it, and nothing else.
//!
//! The unit is pure. It has bytes, and for each bit says whether a client can write it, clear it by
//! writing one, or neither ([`Layout`]); what follows from a write is returned ([`Effects`]). Base
//! address registers need no code: the bits below the size can't be written, so that all ones
//! read back as the size mask (PCI 3.0, 6.2.5.1).

use std::sync::Arc;

use super::regs::*;
use crate::dma::Mastering;
use crate::hash::hash;

/// What each byte of configuration space starts as and how it can be written. Fixed once built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Values after power-on.
    pub(crate) defaults: Vec<u8>,
    /// Bits which a client can set and clear.
    pub(crate) writable: Vec<u8>,
    /// Bits which a client clears by writing one.
    pub(crate) write_one_clears: Vec<u8>,
    /// Where the power management capability is.
    pub(crate) pm: Option<u16>,
    /// Where the PCI Express capability is.
    pub(crate) express: Option<u16>,
    /// Where the MSI capability is.
    pub(crate) msi: Option<u16>,
    /// Where the MSI-X capability is.
    pub(crate) msix: Option<u16>,
}

impl Layout {
    pub(crate) fn new(size: u16) -> Self {
        let zeroes = vec![0; usize::from(size)];
        Self {
            defaults: zeroes.clone(),
            writable: zeroes.clone(),
            write_one_clears: zeroes,
            pm: None,
            express: None,
            msi: None,
            msix: None,
        }
    }

    /// A number which differs, as good as always, from that of any other layout: FNV-1a, which is
    /// the same in every build.
    pub(crate) fn fingerprint(&self) -> u64 {
        let places = [self.pm, self.express, self.msi, self.msix];
        let places = places.map(|place| place.unwrap_or(0).to_le_bytes());
        let bytes = [&self.defaults, &self.writable, &self.write_one_clears]
            .into_iter()
            .flatten()
            .chain(places.as_flattened());
        hash(bytes)
    }

    pub(crate) fn size(&self) -> usize {
        self.defaults.len()
    }

    /// A 16-bit register: its value after power-on, and the bits that can be written.
    pub(crate) fn word(&mut self, offset: u16, default: u16, writable: u16) {
        store(&mut self.defaults, offset, &default.to_le_bytes());
        store(&mut self.writable, offset, &writable.to_le_bytes());
    }

    /// A 32-bit register: its value after power-on, and the bits that can be written.
    pub(crate) fn dword(&mut self, offset: u16, default: u32, writable: u32) {
        store(&mut self.defaults, offset, &default.to_le_bytes());
        store(&mut self.writable, offset, &writable.to_le_bytes());
    }

    /// The bits of a 16-bit register that are cleared by writing one.
    pub(crate) fn word_write_one_clears(&mut self, offset: u16, bits: u16) {
        store(&mut self.write_one_clears, offset, &bits.to_le_bytes());
    }
}

/// What a write to configuration space asks the rest of the device for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Effects {
    /// A function level reset was initiated (PCIe 4.0, 6.6.2).
    pub function_level_reset: bool,
    /// The function went from D3hot to D0 and does not keep its state (PCI PM 1.2, 5.4.1).
    pub power_up_reset: bool,
    /// MSI-X was disabled, so its pending bits mean nothing any more.
    pub msix_disabled: bool,
}

impl Effects {
    /// As a number, for the record of what is done.
    pub(crate) fn bits(self) -> u64 {
        let bits = [
            self.function_level_reset,
            self.power_up_reset,
            self.msix_disabled,
        ];
        bits.iter()
            .rev()
            .fold(0, |all, bit| all << 1 | u64::from(*bit))
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self {
            function_level_reset: bits & 1 != 0,
            power_up_reset: bits & 2 != 0,
            msix_disabled: bits & 4 != 0,
        }
    }
}

/// The configuration space of one function.
///
/// # Examples
///
/// ```
/// # fn main() -> libmuser::Result<()> {
/// let model = libmuser::PciBuilder::new(0x1234, 0x5678)
///     .bar(0, libmuser::Bar::memory32(0x1000))
///     .build()?;
/// let mut config = model.config_space();
///
/// config.write(0x10, &[0xff; 4]);
///
/// let mut size_mask = [0; 4];
/// config.read(0x10, &mut size_mask);
/// assert_eq!(u32::from_le_bytes(size_mask), 0xffff_f000);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    layout: Arc<Layout>,
    /// All that changes: with the layout, the whole state.
    bytes: Vec<u8>,
}

impl ConfigSpace {
    pub(crate) fn new(layout: Arc<Layout>) -> Self {
        let bytes = layout.defaults.clone();
        Self { layout, bytes }
    }

    /// Bytes there are: 256, or 4096 for PCI Express.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Reads any bytes at any offset; beyond the end they are all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        for (byte, value) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = *value;
        }
    }

    /// Writes any bytes at any offset, as far as they can be written; beyond the end they are lost.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effects {
        let power = self.power_state();
        let msix = self.msix_enabled();
        let msi_control = self.layout.msi.map(|msi| self.word(msi + PCI_MSI_FLAGS));
        for (at, value) in (offset..self.bytes.len()).zip(data) {
            let writable = self.layout.writable[at];
            let byte = &mut self.bytes[at];
            *byte = (*byte & !writable) | (value & writable);
            *byte &= !(value & self.layout.write_one_clears[at]);
        }
        self.limit_msi_vectors(msi_control);
        Effects {
            function_level_reset: self.initiates_reset(offset, data),
            power_up_reset: self.settle_power_state(power),
            msix_disabled: msix && !self.msix_enabled(),
        }
    }

    /// Returns everything to its value after power-on.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.layout.defaults);
    }

    /// All that changes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes all that changes from the head of `image`.
    pub(crate) fn restore(&mut self, image: &mut &[u8]) {
        restore_bytes(&mut self.bytes, image);
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn word(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(usize::from(offset), &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn dword(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(usize::from(offset), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets a register from the device's side, whatever a client could write of it.
    pub(crate) fn set_word(&mut self, offset: u16, value: u16) {
        store(&mut self.bytes, offset, &value.to_le_bytes());
    }

    /// Sets a register from the device's side, whatever a client could write of it.
    pub(crate) fn set_dword(&mut self, offset: u16, value: u32) {
        store(&mut self.bytes, offset, &value.to_le_bytes());
    }

    /// Sets or clears Interrupt Status (PCI 3.0, 6.2.3).
    pub(crate) fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.word(PCI_STATUS) & !PCI_STATUS_INTERRUPT;
        self.set_word(
            PCI_STATUS,
            if pending {
                status | PCI_STATUS_INTERRUPT
            } else {
                status
            },
        );
    }

    /// Whether the function may drive its interrupt line (PCI 3.0, 6.2.2, Interrupt Disable).
    pub(crate) fn intx_allowed(&self) -> bool {
        self.word(PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE == 0
    }

    /// Whether the function has an interrupt pin.
    pub(crate) fn has_pin(&self) -> bool {
        self.bytes[usize::from(PCI_INTERRUPT_PIN)] != 0
    }

    /// Whether the function is in D0, where alone it answers in its BARs and sends interrupts.
    pub(crate) fn is_powered(&self) -> bool {
        self.power_state().is_none_or(|state| state == 0)
    }

    /// Whether the function may reach memory.
    pub(crate) fn mastering(&self) -> Mastering {
        if !self.is_powered() {
            Mastering::Unpowered
        } else if self.word(PCI_COMMAND) & PCI_COMMAND_MASTER == 0 {
            Mastering::Disabled
        } else {
            Mastering::Enabled
        }
    }

    pub(crate) fn msix_enabled(&self) -> bool {
        self.msix_control() & PCI_MSIX_FLAGS_ENABLE != 0
    }

    pub(crate) fn msix_function_mask(&self) -> bool {
        self.msix_control() & PCI_MSIX_FLAGS_MASKALL != 0
    }

    fn msix_control(&self) -> u16 {
        self.layout
            .msix
            .map_or(0, |msix| self.word(msix + PCI_MSIX_FLAGS))
    }

    /// The D-state, of a function which has any.
    fn power_state(&self) -> Option<u16> {
        self.layout
            .pm
            .map(|pm| self.word(pm + PCI_PM_CTRL) & PCI_PM_CTRL_STATE_MASK)
    }

    /// Discards a write of D1 or D2, which are not supported (PCI PM 1.2, 3.2.4), and tells
    /// whether the function came back from D3hot without its state.
    fn settle_power_state(&mut self, before: Option<u16>) -> bool {
        const D0: u16 = 0;
        const D3HOT: u16 = 3;
        let (Some(pm), Some(before)) = (self.layout.pm, before) else {
            return false;
        };
        let control = self.word(pm + PCI_PM_CTRL);
        match control & PCI_PM_CTRL_STATE_MASK {
            D0 => before == D3HOT && control & PCI_PM_CTRL_NO_SOFT_RESET == 0,
            D3HOT => false,
            _ => {
                self.set_word(
                    pm + PCI_PM_CTRL,
                    (control & !PCI_PM_CTRL_STATE_MASK) | before,
                );
                false
            }
        }
    }

    /// Whether the write has a one for Initiate Function Level Reset, which always reads zero.
    fn initiates_reset(&self, offset: usize, data: &[u8]) -> bool {
        let Some(express) = self.layout.express else {
            return false;
        };
        if self.dword(express + PCI_EXP_DEVCAP) & PCI_EXP_DEVCAP_FLR == 0 {
            return false;
        }
        let [_, bit] = PCI_EXP_DEVCTL_BCR_FLR.to_le_bytes();
        let high_byte = usize::from(express + PCI_EXP_DEVCTL + 1);
        let written = high_byte.checked_sub(offset).and_then(|at| data.get(at));
        written.is_some_and(|value| value & bit != 0)
    }
}

/// Takes as many bytes as there are from the head of `image`, if it has them.
pub(crate) fn restore_bytes(bytes: &mut [u8], image: &mut &[u8]) {
    if let Some((head, rest)) = image.split_at_checked(bytes.len()) {
        bytes.copy_from_slice(head);
        *image = rest;
    }
}

/// Puts a register's bytes at `offset`. Registers lie inside of the space: the builder saw to it.
fn store(bytes: &mut [u8], offset: u16, value: &[u8]) {
    let offset = usize::from(offset);
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
