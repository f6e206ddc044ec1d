// SPDX-License-Identifier: GPL-2.0
//! Doorbells: whom to tell that a client has rung.
//!
//! What it wrote is in device memory by then, and stays there. So nothing is lost when nobody listens:
//! who comes to listen is told at once, and looks.

use crate::vfio::eventfd::EventFd;
use kernel::{
    prelude::*,
    sync::{new_mutex, Mutex}, //
};

/// An eventfd, and the attachment that it came from.
struct Listener {
    owner: u64,
    eventfd: EventFd,
}

/// Who listens, by the place of the area among all.
#[pin_data]
pub(crate) struct Doorbells {
    #[pin]
    listeners: Mutex<KVec<Option<Listener>>>,
}

impl Doorbells {
    /// Nobody listens.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            listeners <- new_mutex!(KVec::new(), "muser_doorbells"),
        })
    }

    /// Says that a client has written to a doorbell.
    pub(crate) fn ring(&self, area: usize) {
        if let Some(Some(listener)) = self.listeners.lock().get(area) {
            listener.eventfd.signal();
        }
    }

    /// Has `owner` listen to a doorbell, or no longer, if `is_attached` says that it is attached. It is
    /// told at once, for a client may have rung before.
    ///
    /// # Errors
    ///
    /// That of `is_attached`, and `ENOMEM`.
    pub(crate) fn listen(
        &self,
        area: usize,
        owner: u64,
        eventfd: Option<EventFd>,
        is_attached: impl FnOnce() -> Result,
    ) -> Result {
        let mut listeners = self.listeners.lock();
        // Under the lock: an attachment ends first, and is forgotten here after that.
        is_attached()?;
        while listeners.len() <= area {
            listeners.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        if let Some(listener) = listeners.get_mut(area) {
            *listener = eventfd.map(|eventfd| {
                eventfd.signal();
                Listener { owner, eventfd }
            });
        }
        Ok(())
    }

    /// Forgets the eventfds of an attachment that has ended. Its successor may have set some already.
    pub(crate) fn forget(&self, owner: u64) {
        for listener in self.listeners.lock().iter_mut() {
            if listener
                .as_ref()
                .is_some_and(|listener| listener.owner == owner)
            {
                *listener = None;
            }
        }
    }
}
