// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the guest lets the device use its memory: what a function without Bus Master Enable, or
//! out of D0, may not do.

use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno as Number;

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
    /// The attachment is over, and the memory another server's to use. It stays over.
    Ended = 3,
}

/// [`Mastering`], for any thread to see. The function keeps it up to date.
#[derive(Debug)]
pub(crate) struct BusMaster(AtomicU8);

impl BusMaster {
    pub(crate) const fn new(state: Mastering) -> Self {
        Self(AtomicU8::new(state as u8))
    }

    pub(crate) fn set(&self, state: Mastering) {
        let state = state as u8;
        if self.0.load(Ordering::Relaxed) != state {
            let next = |now| (now != Mastering::Ended as u8).then_some(state);
            // Where it has ended there is nothing to be said.
            let _ = self
                .0
                .fetch_update(Ordering::Release, Ordering::Relaxed, next);
        }
    }

    /// # Errors
    ///
    /// `EPERM`: it may not. `ENOTCONN`: it is not served any more.
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
    const UNPOWERED: u8 = Mastering::Unpowered as u8;
    const ENDED: u8 = Mastering::Ended as u8;
    match state {
        UNPOWERED => Error::new(Errno::EPERM, "DMA while the function is in D3hot"),
        ENDED => Error::io(
            "DMA of a device that this server serves no more",
            Number::ENOTCONN,
        ),
        _ => Error::new(
            Errno::EPERM,
            "DMA without Bus Master Enable in the command register",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_says_why() {
        let bus_master = BusMaster::new(Mastering::Disabled);

        let disabled = bus_master.check().unwrap_err();
        bus_master.set(Mastering::Unpowered);
        let unpowered = bus_master.check().unwrap_err();
        bus_master.set(Mastering::Enabled);

        assert_eq!(disabled.errno(), Errno::EPERM);
        assert!(disabled.to_string().contains("Bus Master"), "{disabled}");
        assert_eq!(unpowered.errno(), Errno::EPERM);
        assert!(unpowered.to_string().contains("D3hot"), "{unpowered}");
        assert!(bus_master.check().is_ok());
    }

    #[test]
    fn end_is_for_good() {
        let bus_master = BusMaster::new(Mastering::Enabled);

        bus_master.set(Mastering::Ended);
        bus_master.set(Mastering::Enabled);

        let error = bus_master.check().unwrap_err();
        assert_eq!(error.errno().number(), libc::ENOTCONN);
    }
}
