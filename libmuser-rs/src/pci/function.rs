// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One PCI function: its configuration space and MSI-X table, and which interrupt leaves it when.
//!
//! Pure as well: interrupts that are due collect in an outbox, which the owner empties.
//!
//! # Which way an interrupt goes
//!
//! MSI-X if it is enabled, else MSI if it is enabled, and in any case the interrupt line follows:
//! it is up while a vector is raised, unless MSI or MSI-X is enabled in configuration space,
//! Interrupt Disable is set, or the function is not in D0.
//!
//! VFIO lets a client enable MSI and MSI-X by setting eventfds alone, without a word in
//! configuration space. Either sign of being enabled is taken.

use super::config::{ConfigSpace, Effects};
use super::msi::Delivery;
use super::msix::{MsixTable, VectorSet};

/// An interrupt that leaves the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// The interrupt line goes up or down.
    Line(bool),
    /// An MSI message.
    Msi(u16),
    /// An MSI-X message.
    Msix(u16),
}

/// How many vectors a client has given an eventfd.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Eventfds {
    pub(crate) msi: u32,
    pub(crate) msix: u32,
}

/// The state of a function.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    config: ConfigSpace,
    msix: Option<MsixTable>,
    /// Vectors raised and not lowered.
    raised: VectorSet,
    /// Where the interrupt line is.
    line: bool,
    outbox: Vec<Signal>,
}

impl Function {
    pub(crate) fn new(config: ConfigSpace, msix_vectors: Option<u16>, vectors: u16) -> Self {
        Self {
            config,
            msix: msix_vectors.map(MsixTable::new),
            raised: VectorSet::new(vectors),
            line: false,
            outbox: Vec::new(),
        }
    }

    /// Appends all that changes to `image`: always the same number of bytes.
    pub(crate) fn save(&self, image: &mut Vec<u8>) {
        image.extend(self.config.bytes());
        if let Some(msix) = &self.msix {
            msix.save(image);
        }
        self.raised.save(image);
        image.push(self.line.into());
    }

    /// Returns to what was saved, of a function like this one.
    pub(crate) fn restore(&mut self, mut image: &[u8]) {
        self.config.restore(&mut image);
        if let Some(msix) = &mut self.msix {
            msix.restore(&mut image);
        }
        self.raised.restore(&mut image);
        self.line = image.first().is_some_and(|line| *line != 0);
        self.settle();
    }

    /// Where the interrupt line is.
    pub(crate) fn line(&self) -> bool {
        self.line
    }

    pub(crate) fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// Interrupts that are due since the last call, in order.
    pub(crate) fn take_signals(&mut self) -> impl Iterator<Item = Signal> {
        self.outbox.drain(..)
    }

    pub(crate) fn write_config(&mut self, offset: usize, data: &[u8]) -> Effects {
        let effects = self.config.write(offset, data);
        if let Some(msix) = self.msix.as_mut().filter(|_| effects.msix_disabled) {
            msix.forget_pending();
        }
        if effects.function_level_reset || effects.power_up_reset {
            self.reset();
        }
        self.settle();
        effects
    }

    pub(crate) fn read_msix_table(&self, offset: usize, data: &mut [u8]) {
        if let Some(msix) = &self.msix {
            msix.read_table(offset, data);
        }
    }

    pub(crate) fn write_msix_table(&mut self, offset: usize, data: &[u8]) {
        if let Some(msix) = &mut self.msix {
            msix.write_table(offset, data);
        }
        self.settle();
    }

    pub(crate) fn read_msix_pba(&self, offset: usize, data: &mut [u8]) {
        if let Some(msix) = &self.msix {
            msix.read_pba(offset, data);
        }
    }

    /// Returns to the state after power-on; nothing is raised any more.
    pub(crate) fn reset(&mut self) {
        self.config.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.raised.clear();
        self.settle();
    }

    pub(crate) fn raise(&mut self, vector: u16, eventfds: Eventfds) {
        if self.config.has_pin() {
            self.raised.insert(vector);
        }
        self.settle();
        let msix_enabled = self.config.msix_enabled() || eventfds.msix > 0;
        let msi_enabled = self.config.msi_enabled() || eventfds.msi > 0;
        match &mut self.msix {
            Some(msix) if msix_enabled => {
                let vector = vector % msix.vectors();
                let held = self.config.msix_function_mask() || !self.config.is_powered();
                if held || msix.is_masked(vector) {
                    msix.pend(vector);
                } else {
                    self.outbox.push(Signal::Msix(vector));
                }
            }
            _ if msi_enabled => {
                // PCI 3.0, 6.8.3.4: with fewer vectors than it asked for, a function decides which
                // of them share a message.
                let granted = if self.config.msi_enabled() {
                    self.config.msi_granted()
                } else {
                    u16::try_from(eventfds.msi).unwrap_or(1)
                };
                if let Delivery::Fire(vector) = self.config.msi_deliver(vector % granted) {
                    self.outbox.push(Signal::Msi(vector));
                }
            }
            _ => {}
        }
    }

    pub(crate) fn lower(&mut self, vector: u16) {
        self.raised.remove(vector);
        self.settle();
    }

    /// Brings the line and the pending messages in line with the rest of the state.
    fn settle(&mut self) {
        let messages = self.config.msi_enabled() || self.config.msix_enabled();
        let asserted = !self.raised.is_empty() && !messages;
        self.config.set_interrupt_status(asserted);
        let line = asserted && self.config.intx_allowed() && self.config.is_powered();
        if line != self.line {
            self.line = line;
            self.outbox.push(Signal::Line(line));
        }
        while let Some(vector) = self.config.msi_take_pending() {
            self.outbox.push(Signal::Msi(vector));
        }
        let held = self.config.msix_function_mask() || !self.config.is_powered();
        if let Some(msix) = self.msix.as_mut().filter(|_| !held) {
            while let Some(vector) = msix.take_pending() {
                self.outbox.push(Signal::Msix(vector));
            }
        }
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
