// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the threads of a server have in common, whichever kind of device they serve.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::device::Bus;
use crate::dma::{Dma, Mastering};
use crate::error::{Error, Result};
use crate::irq::{Interrupts, Shared};
use crate::memory::SharedMemory;
use crate::model::PciModel;
use crate::state::{State, Store};
use crate::transport::{AttachOptions, Transport, Wait};

use super::gate::Gate;

/// A server without its device.
pub(super) struct Core {
    pub(super) transport: Box<dyn Transport>,
    pub(super) model: PciModel,
    pub(super) shared: Arc<Shared>,
    pub(super) gate: Arc<Gate>,
    pub(super) bus: Bus,
    pub(super) failures: Failures,
    pub(super) wait: Wait,
    /// What the device panicked with: it is not called again.
    panicked: OnceLock<String>,
}

impl Core {
    pub(super) fn attach(
        model: PciModel,
        mut transport: impl Transport + 'static,
        options: &AttachOptions,
    ) -> Result<Self> {
        let mut function = model.function();
        let mut image = Vec::new();
        function.save(&mut image);
        let parts = model.parts(&image);
        let options = AttachOptions {
            state_size: parts.size(),
            state_tag: parts.tag(),
            ..*options
        };
        let attachment = transport.attach(model.description(), &options)?;
        let memory = match attachment.state {
            Some(memory) => memory,
            None => SharedMemory::anonymous(parts.size())?,
        };
        let (store, recovered) = Store::open(memory, parts, &image)?;
        if recovered {
            log::debug!("the state of an earlier process is recovered");
            function.restore(&store.library());
        }
        let store = Arc::new(store);
        let shared = Shared::new(function, attachment.trigger, Arc::clone(&store));
        let shared = Arc::new(shared);
        shared.settle(model.description())?;
        let interrupts = Interrupts::new(Arc::clone(&shared), model.vectors(), model.is_express());
        let gate = Arc::new(Gate::default());
        let bus = Bus {
            interrupts,
            memory: attachment.memory.into(),
            dma: Dma::new(attachment.dma, shared.bus_master()),
            gate: Arc::clone(&gate),
            state: State::new(store),
            recovered,
        };
        Ok(Self {
            transport: Box::new(transport),
            model,
            shared,
            gate,
            bus,
            failures: Failures::default(),
            wait: options.wait,
            panicked: OnceLock::new(),
        })
    }

    /// Ends the attachment. What the device does from now on is no concern of its client.
    pub(super) fn detach(&self) {
        self.shared.store().seal();
        self.shared.bus_master().set(Mastering::Ended);
        self.transport.detach();
    }

    pub(super) fn set_panicked(&self, message: String) {
        // Of several panics the first one tells.
        let _ = self.panicked.set(message);
    }

    pub(super) fn check_panicked(&self) -> Result<()> {
        match self.panicked.get() {
            Some(message) => Err(Error::panicked(message.clone())),
            None => Ok(()),
        }
    }
}

/// The attachment ends here, whatever handles the device has given away.
impl Drop for Core {
    fn drop(&mut self) {
        self.detach();
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("transport", &self.transport)
            .field("panicked", &self.panicked)
            .finish_non_exhaustive()
    }
}

/// Logs failures: the first ones as errors. A client can cause as many as it likes, so those after
/// them go to the debug level.
#[derive(Debug, Default)]
pub(super) struct Failures {
    logged: AtomicU32,
}

impl Failures {
    /// Enough to see what is wrong, and to see that it goes on.
    const MOST: u32 = 32;

    pub(super) fn log(&self, message: fmt::Arguments<'_>) {
        let count = |logged: u32| (logged < Self::MOST).then_some(logged + 1);
        let relaxed = Ordering::Relaxed;
        match self.logged.fetch_update(relaxed, relaxed, count) {
            Err(_) => log::debug!("{message}"),
            Ok(before) => {
                log::error!("{message}");
                if before + 1 == Self::MOST {
                    log::error!("further failures are logged at debug level");
                }
            }
        }
    }
}
