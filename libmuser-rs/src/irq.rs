// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: the handle that a device raises them with.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio;

use crate::dma::BusMaster;
use crate::error::{Errno, Error, Result};
use crate::pci::function::{Eventfds, Function, Signal};
use crate::state::{Key, Store};
use crate::transport::{Description, Trigger};

/// A function and the way out for its interrupts, shared by the server and interrupt handles.
///
/// Interrupts leave under the lock, so that a line which goes up and down in two threads ends up
/// where the function has it. They leave before the state is saved in which they have left: a kill
/// between the two doubles an interrupt, and loses none.
pub(crate) struct Shared {
    function: Mutex<Saved>,
    trigger: Arc<dyn Trigger>,
    /// Whether the function lets the device reach the client's memory.
    bus_master: Arc<BusMaster>,
    store: Arc<Store>,
}

/// A function and the room to save it in.
struct Saved {
    function: Function,
    image: Vec<u8>,
}

impl Shared {
    pub(crate) fn new(function: Function, trigger: Arc<dyn Trigger>, store: Arc<Store>) -> Self {
        let image = Vec::new();
        Self {
            bus_master: Arc::new(BusMaster::new(function.config().mastering())),
            function: Mutex::new(Saved { function, image }),
            trigger,
            store,
        }
    }

    pub(crate) fn bus_master(&self) -> Arc<BusMaster> {
        Arc::clone(&self.bus_master)
    }

    /// Puts the line where the function has it: a process before this one may have left it
    /// elsewhere. Sends what it left to be sent.
    pub(crate) fn settle(&self, description: &Description) -> Result<()> {
        if description.irq(vfio::VFIO_PCI_INTX_IRQ_INDEX).is_some() {
            let saved = self.lock();
            self.send(Signal::Line(saved.function.line()))?;
        }
        self.with(|_| ()).1
    }

    /// Looks at the function.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Function) -> R) -> R {
        look(&self.lock().function)
    }

    /// Where state is saved.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn lock(&self) -> MutexGuard<'_, Saved> {
        // The function is pure code: a panic in it left nothing half done that matters.
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the function, and sends the interrupts that come of it.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut Function) -> R) -> (R, Result<()>) {
        self.work(&mut self.lock(), |function| (work(function), None))
    }

    /// Works on the function once: what is done already is not done again, but has the result that
    /// it had then.
    pub(crate) fn once(
        &self,
        key: Key,
        work: impl FnOnce(&mut Function) -> u64,
    ) -> (u64, Result<()>) {
        let mut saved = self.lock();
        if let Some(result) = self.store.done(key) {
            return (result, Ok(()));
        }
        self.work(&mut saved, |function| {
            let result = work(function);
            (result, Some((key, result)))
        })
    }

    fn work<R>(
        &self,
        saved: &mut Saved,
        work: impl FnOnce(&mut Function) -> (R, Option<(Key, u64)>),
    ) -> (R, Result<()>) {
        let Saved { function, image } = saved;
        let (result, done) = work(function);
        self.bus_master.set(function.config().mastering());
        let sent = function
            .take_signals()
            .map(|signal| self.send(signal))
            .fold(Ok(()), Result::and);
        image.clear();
        function.save(image);
        let saved = self.store.save_library(image, done).map_err(|error| {
            let message = format!("the state of the function was not saved: {error}");
            Error::new(error.errno(), message)
        });
        (result, sent.and(saved))
    }

    fn send(&self, signal: Signal) -> Result<()> {
        if self.store.is_sealed() {
            let message = "the server has ended, and the device's interrupts are another's";
            return Err(Error::new(Errno::ENODEV, message));
        }
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
