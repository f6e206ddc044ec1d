// SPDX-License-Identifier: GPL-2.0
//! What changes in a device: requests, and who serves them.
//!
//! A file is attached when its attachment is the one in [`State::attachment`]; nothing else says so.

use crate::{
    driver::{
        description::Fault,
        queue::{Entry, Holder, Id, Queue, Taken},
        request::{Kind, Request},
        users::Reserved, //
    },
    uapi::*,
    vfio::{
        errno::Errno,
        process::Process,
        wait::Moment, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Slots of an attachment: which of them hold a request.
pub(crate) struct Slots {
    used: [u64; MUSER_MAX_SLOTS.div_ceil(u64::BITS) as usize],
    count: u32,
}

impl Slots {
    /// `count` free slots, at most [`MUSER_MAX_SLOTS`].
    pub(crate) fn new(count: u32) -> Self {
        Self {
            used: [0; MUSER_MAX_SLOTS.div_ceil(u64::BITS) as usize],
            count,
        }
    }

    /// A slot that is free, and stays so until it is claimed.
    fn free(&self) -> Option<u32> {
        let (word, bits) = (0..).zip(self.used).find(|(_, bits)| *bits != u64::MAX)?;
        let slot = word * u64::BITS + bits.trailing_ones();
        (slot < self.count).then_some(slot)
    }

    fn claim(&mut self, slot: u32) {
        if let Some(word) = self.used.get_mut((slot / u64::BITS) as usize) {
            *word |= 1 << (slot % u64::BITS);
        }
    }

    fn release(&mut self, slot: u32) {
        if let Some(word) = self.used.get_mut((slot / u64::BITS) as usize) {
            *word &= !(1 << (slot % u64::BITS));
        }
    }
}

/// A process that serves a device, or waits to.
pub(crate) struct Attachment {
    /// Number of the attachment: the owner of the requests it took.
    pub(crate) owner: u64,
    /// Its slots.
    pub(crate) slots: Slots,
    /// Bytes of state it asked for.
    pub(crate) state_size: u32,
    /// What it makes of the state, or 0.
    pub(crate) state_tag: u64,
    /// Memory set aside for it, until it is the present one.
    pub(crate) reserved: Option<Reserved>,
    /// Who it is.
    pub(crate) process: Process,
}

/// A request in the slot that it was taken into.
pub(crate) struct Claim {
    /// The slot.
    pub(crate) slot: u32,
    /// The request.
    pub(crate) taken: Taken<Arc<Request>>,
    /// Whether another one can be taken.
    pub(crate) more: bool,
}

/// Requests in flight.
type Requests = Queue<Arc<Request>, KVVec<Option<Entry<Arc<Request>>>>>;

/// What changes.
pub(crate) struct State {
    /// Requests in flight.
    pub(crate) requests: Requests,
    /// Who serves the device.
    pub(crate) attachment: Option<Attachment>,
    /// Who takes over as soon as that one goes; there is none without that one.
    pub(crate) standby: Option<Attachment>,
    /// Number of the next attachment.
    pub(crate) next_owner: u64,
    /// Since when nobody serves it; meaningless while somebody does.
    pub(crate) detached_since: Moment,
    /// Bytes of state that there are: as many as any attachment asked for.
    pub(crate) state_size: u32,
    /// What processes make of the state: the first tag that an attachment had, or 0.
    pub(crate) state_tag: u64,
    /// The device was removed.
    pub(crate) removed: bool,
    /// A client has it open.
    pub(crate) client: bool,
}

impl State {
    /// The attachment `owner`, if it is the present one.
    pub(crate) fn serving(&mut self, owner: u64) -> Option<&mut Attachment> {
        self.attachment
            .as_mut()
            .filter(|attachment| attachment.owner == owner)
    }

    /// Makes an attachment the present one; without one, whoever waits in standby.
    pub(crate) fn serve(&mut self, attachment: Option<Attachment>) {
        self.attachment = attachment.or_else(|| self.standby.take());
        if let Some(attachment) = &mut self.attachment {
            self.state_size = self.state_size.max(attachment.state_size);
            if self.state_tag == 0 {
                self.state_tag = attachment.state_tag;
            }
            if let Some(reserved) = attachment.reserved.take() {
                reserved.keep();
            }
        }
    }

    /// Says whether a process with this tag can make sense of the state.
    pub(crate) fn check_tag(&self, tag: u64) -> Result<(), Fault> {
        if tag == 0 || self.state_tag == 0 || tag == self.state_tag {
            return Ok(());
        }
        Err(Fault::new(MUSER_FAULT_STATE_DIFFERS, 0))
    }

    /// `MUSER_STATE_*` as far as a process sees them without asking.
    pub(crate) fn shown(&self) -> u32 {
        let mut flags = 0;
        if self.client {
            flags |= MUSER_STATE_CLIENT;
        }
        if self.standby.is_some() {
            flags |= MUSER_STATE_STANDBY;
        }
        flags
    }

    /// Queues a request; `None` if there is no room.
    pub(crate) fn queue(&mut self, request: &Arc<Request>) -> Option<Id> {
        match request.kind() {
            Kind::Reset { .. } => self.requests.push_barrier(request.clone()),
            Kind::Read(_) | Kind::Write(_) | Kind::Unmap { .. } => {
                self.requests.push(request.clone())
            }
        }
    }

    /// Gives the next request to the attachment `owner`; `None` if it has to wait for one.
    ///
    /// # Errors
    ///
    /// `ENODEV`, `ENOTCONN` and `ESHUTDOWN` as in the ABI.
    pub(crate) fn take(&mut self, owner: u64) -> Option<Result<Claim>> {
        if self.removed {
            return Some(Err(ENODEV));
        }
        let handing_over = self.standby.is_some();
        let Some(attachment) = self.serving(owner) else {
            return Some(Err(Errno::ENOTCONN.into()));
        };
        if handing_over {
            return Some(Err(Errno::ESHUTDOWN.into()));
        }
        let slot = attachment.slots.free()?;
        let taken = self.requests.take(Holder { owner, slot })?;
        self.serving(owner)?.slots.claim(slot);
        Some(Ok(Claim {
            slot,
            taken,
            more: self.requests.is_takable(),
        }))
    }

    /// Whether [`State::take`] would say something else than to wait.
    pub(crate) fn is_ready(&mut self, owner: u64) -> bool {
        let takable = self.requests.is_takable();
        let decided = self.removed || self.standby.is_some();
        match self.serving(owner) {
            Some(attachment) => decided || (takable && attachment.slots.free().is_some()),
            None => true,
        }
    }

    /// Frees the slot of a holder, if its attachment is the present one.
    pub(crate) fn release(&mut self, holder: Holder) {
        if let Some(attachment) = self.serving(holder.owner) {
            attachment.slots.release(holder.slot);
        }
    }
}
