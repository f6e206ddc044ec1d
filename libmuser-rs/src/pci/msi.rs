// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Message signalled interrupts: their state is all in the capability (PCI 3.0, 6.8.1).

use super::config::ConfigSpace;
use super::regs::*;

/// Message signalled interrupts with 64-bit addresses, and per-vector masking if wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    pub(crate) vectors: u16,
    pub(crate) maskable: bool,
}

impl Msi {
    /// A capability for this many vectors: 1, 2, 4, 8, 16 or 32.
    #[must_use]
    pub const fn new(vectors: u16) -> Self {
        Self {
            vectors,
            maskable: false,
        }
    }

    /// Lets the client mask single vectors.
    #[must_use]
    pub const fn maskable(self) -> Self {
        Self {
            maskable: true,
            ..self
        }
    }

    /// Bytes of the capability.
    pub(crate) const fn size(self) -> u16 {
        if self.maskable {
            PCI_MSI_PENDING_64 + 4
        } else {
            PCI_MSI_DATA_64 + 2
        }
    }
}

/// What becomes of an interrupt that the device raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The message goes out now, for this vector.
    Fire(u16),
    /// The message is held back: if the vector can be masked, it goes out when it is unmasked.
    Held,
}

impl ConfigSpace {
    pub(crate) fn msi_enabled(&self) -> bool {
        self.msi_control()
            .is_some_and(|(_, control)| control & PCI_MSI_FLAGS_ENABLE != 0)
    }

    /// Vectors that the client granted (Multiple Message Enable).
    pub(crate) fn msi_granted(&self) -> u16 {
        self.msi_control()
            .map_or(1, |(_, control)| 1 << log2_granted(control))
    }

    /// Decides about a message; a masked one is marked as pending.
    pub(crate) fn msi_deliver(&mut self, vector: u16) -> Delivery {
        let Some(msi) = self.maskable_msi() else {
            return if self.is_powered() {
                Delivery::Fire(vector)
            } else {
                Delivery::Held
            };
        };
        let bit = 1_u32.checked_shl(u32::from(vector)).unwrap_or(0);
        if self.dword(msi + PCI_MSI_MASK_64) & bit == 0 && self.is_powered() {
            return Delivery::Fire(vector);
        }
        let pending = self.dword(msi + PCI_MSI_PENDING_64);
        self.set_dword(msi + PCI_MSI_PENDING_64, pending | bit);
        Delivery::Held
    }

    /// Takes a vector that is pending and not masked any more.
    pub(crate) fn msi_take_pending(&mut self) -> Option<u16> {
        let msi = self.maskable_msi()?;
        if !self.is_powered() {
            return None;
        }
        let pending = self.dword(msi + PCI_MSI_PENDING_64);
        let ready = pending & !self.dword(msi + PCI_MSI_MASK_64);
        let vector = ready.trailing_zeros();
        let bit = 1_u32.checked_shl(vector)?;
        self.set_dword(msi + PCI_MSI_PENDING_64, pending & !bit);
        u16::try_from(vector).ok()
    }

    /// After a write: a client can't be granted more vectors than the device asked for. Disabling
    /// MSI forgets what is pending.
    pub(super) fn limit_msi_vectors(&mut self, before: Option<u16>) {
        let (Some((msi, control)), Some(before)) = (self.msi_control(), before) else {
            return;
        };
        let asked = (control & PCI_MSI_FLAGS_QMASK) >> PCI_MSI_FLAGS_QMASK.trailing_zeros();
        let granted = log2_granted(control).min(asked) << PCI_MSI_FLAGS_QSIZE.trailing_zeros();
        self.set_word(
            msi + PCI_MSI_FLAGS,
            (control & !PCI_MSI_FLAGS_QSIZE) | granted,
        );
        if before & !control & PCI_MSI_FLAGS_ENABLE != 0 && self.maskable_msi().is_some() {
            self.set_dword(msi + PCI_MSI_PENDING_64, 0);
        }
    }

    fn msi_control(&self) -> Option<(u16, u16)> {
        self.layout()
            .msi
            .map(|msi| (msi, self.word(msi + PCI_MSI_FLAGS)))
    }

    fn maskable_msi(&self) -> Option<u16> {
        let (msi, control) = self.msi_control()?;
        (control & PCI_MSI_FLAGS_MASKBIT != 0).then_some(msi)
    }
}

fn log2_granted(control: u16) -> u16 {
    (control & PCI_MSI_FLAGS_QSIZE) >> PCI_MSI_FLAGS_QSIZE.trailing_zeros()
}
