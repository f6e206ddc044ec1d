// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the guest lets the device use its memory: what a function without Bus Master Enable, or
//! out of D0, may not do.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Errno, Error, Result};

/// What configuration space says about DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mastering {
    /// Bus Master Enable is off (PCI 3.0, 6.2.2).
    Disabled = 0,
    /// The function is in D3hot, where it initiates nothing (PCI PM 1.2, 5.4.1).
    Unpowered = 1,
    /// It may.
    Enabled = 2,
}

/// [`Mastering`], for any thread to see. The function keeps it up to date.
#[derive(Debug)]
pub(crate) struct Gate(AtomicU8);

impl Gate {
    pub(crate) const fn new(state: Mastering) -> Self {
        Self(AtomicU8::new(state as u8))
    }

    pub(crate) fn set(&self, state: Mastering) {
        self.0.store(state as u8, Ordering::Release);
    }

    /// # Errors
    ///
    /// `EPERM`: it may not.
    #[inline]
    pub(crate) fn check(&self) -> Result<()> {
        const ENABLED: u8 = Mastering::Enabled as u8;
        match self.0.load(Ordering::Acquire) {
            ENABLED => Ok(()),
            state => Err(refusal(state)),
        }
    }
}

#[cold]
fn refusal(state: u8) -> Error {
    let message = if state == Mastering::Unpowered as u8 {
        "DMA while the function is in D3hot"
    } else {
        "DMA without Bus Master Enable in the command register"
    };
    Error::new(Errno::EPERM, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_says_why_it_is_closed() {
        let gate = Gate::new(Mastering::Disabled);

        let disabled = gate.check().unwrap_err();
        gate.set(Mastering::Unpowered);
        let unpowered = gate.check().unwrap_err();
        gate.set(Mastering::Enabled);

        assert_eq!(disabled.errno(), Errno::EPERM);
        assert!(disabled.to_string().contains("Bus Master"), "{disabled}");
        assert_eq!(unpowered.errno(), Errno::EPERM);
        assert!(unpowered.to_string().contains("D3hot"), "{unpowered}");
        assert!(gate.check().is_ok());
    }
}
