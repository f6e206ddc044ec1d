// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: the handle that a device raises them with.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio;

use crate::dma::Gate;
use crate::error::{Errno, Error, Result};
use crate::pci::function::{Eventfds, Function, Signal};
use crate::transport::{Description, Trigger};

/// A function and the way out for its interrupts, shared by the server and interrupt handles.
///
/// Interrupts leave under the lock, so that a line which goes up and down in two threads ends up
/// where the function has it.
pub(crate) struct Shared {
    function: Mutex<Function>,
    trigger: Arc<dyn Trigger>,
    /// Whether the function lets the device reach the client's memory.
    gate: Arc<Gate>,
}

impl Shared {
    pub(crate) fn new(function: Function, trigger: Arc<dyn Trigger>) -> Self {
        Self {
            gate: Arc::new(Gate::new(function.config().mastering())),
            function: Mutex::new(function),
            trigger,
        }
    }

    pub(crate) fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// Lowers the line, which a process before this one may have left up.
    pub(crate) fn settle(&self, description: &Description) -> Result<()> {
        match description.irq(vfio::VFIO_PCI_INTX_IRQ_INDEX) {
            Some(_) => self.send(Signal::Line(false)),
            None => Ok(()),
        }
    }

    /// The function, to look at.
    pub(crate) fn function(&self) -> MutexGuard<'_, Function> {
        // The function is pure code: a panic in it left nothing half done that matters.
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the function, and sends the interrupts that come of it.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut Function) -> R) -> (R, Result<()>) {
        let mut function = self.function();
        let result = work(&mut function);
        self.gate.set(function.config().mastering());
        let sent = function
            .take_signals()
            .map(|signal| self.send(signal))
            .fold(Ok(()), Result::and);
        (result, sent)
    }

    fn send(&self, signal: Signal) -> Result<()> {
        match signal {
            Signal::Line(true) => self.trigger.raise(vfio::VFIO_PCI_INTX_IRQ_INDEX, 0),
            Signal::Line(false) => self.trigger.lower(vfio::VFIO_PCI_INTX_IRQ_INDEX, 0),
            Signal::Msi(vector) => self
                .trigger
                .raise(vfio::VFIO_PCI_MSI_IRQ_INDEX, vector.into()),
            Signal::Msix(vector) => self
                .trigger
                .raise(vfio::VFIO_PCI_MSIX_IRQ_INDEX, vector.into()),
        }
    }

    fn eventfds(&self) -> Eventfds {
        Eventfds {
            msi: self.trigger.eventfds(vfio::VFIO_PCI_MSI_IRQ_INDEX),
            msix: self.trigger.eventfds(vfio::VFIO_PCI_MSIX_IRQ_INDEX),
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("trigger", &self.trigger)
            .finish_non_exhaustive()
    }
}

/// Raises the interrupts of a device. A handle: clone it, and use it from any thread.
///
/// A device says *that* something happened. *How* the client hears of it is the library's job:
/// by MSI-X, by MSI or by the interrupt line, as the client has set up, with masks and pending bits.
#[derive(Clone, Debug)]
pub struct Interrupts {
    shared: Arc<Shared>,
    vectors: u16,
    error: bool,
}

impl Interrupts {
    pub(crate) fn new(shared: Arc<Shared>, vectors: u16, error: bool) -> Self {
        Self {
            shared,
            vectors,
            error,
        }
    }

    /// Vectors the device has: the most of those of MSI-X, of MSI, and 1 of an interrupt pin.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Raises a vector.
    ///
    /// With MSI or MSI-X that is one message: now, or once the client unmasks the vector. Where the
    /// client granted fewer vectors than there are, vectors share messages: `vector` modulo the
    /// number granted.
    ///
    /// The interrupt line of a device with a pin goes up with the first vector raised, and stays up
    /// until each has been [lowered](Self::lower). A vector counts as raised until then, however
    /// the client heard of it: so a device with a pin should lower each.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the device has no such vector. Others: the client can't be reached any more.
    pub fn raise(&self, vector: u16) -> Result<()> {
        self.check(vector)?;
        let eventfds = self.shared.eventfds();
        self.shared
            .with(|function| function.raise(vector, eventfds))
            .1
    }

    /// Lowers a vector: what it was raised for has been dealt with. No-op for MSI and MSI-X.
    ///
    /// # Errors
    ///
    /// As [`raise`](Self::raise).
    pub fn lower(&self, vector: u16) -> Result<()> {
        self.check(vector)?;
        self.shared.with(|function| function.lower(vector)).1
    }

    /// Tells the client of an error that the device can't recover from (`VFIO_PCI_ERR_IRQ_INDEX`).
    /// A VMM stops its guest.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the device is not PCI Express. Others: the client can't be reached any more.
    pub fn raise_fatal_error(&self) -> Result<()> {
        if !self.error {
            return Err(Error::new(
                Errno::EINVAL,
                "only a PCI Express device can report errors",
            ));
        }
        self.shared.trigger.raise(vfio::VFIO_PCI_ERR_IRQ_INDEX, 0)
    }

    fn check(&self, vector: u16) -> Result<()> {
        if vector < self.vectors {
            return Ok(());
        }
        let message = format!(
            "no interrupt vector {vector}: the device has {}",
            self.vectors
        );
        Err(Error::new(Errno::EINVAL, message))
    }
}
