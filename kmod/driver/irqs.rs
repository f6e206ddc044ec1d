// SPDX-License-Identifier: GPL-2.0
//! Interrupts: who is to be told when a vector fires, whether it may, and whether it would.
//!
//! All of it lives here, not in the process, so that a restart of the process loses none.

use crate::{
    uapi::*,
    vfio::{
        device::IrqInfo,
        errno::Errno,
        eventfd::{EventFd, Listener, Signalled},
        irq_set::{Action, Data, IrqSet},
        shared::SharedMemory, //
    },
};
use core::mem::{offset_of, size_of};
use kernel::{
    prelude::*,
    sync::{new_mutex, Arc, Mutex}, //
};

/// A vector's state.
///
/// # Invariants
///
/// An edge-triggered vector (one whose index is not automasked) is `raised` only while it is masked
/// and has a trigger: it is pending.
#[derive(Default)]
struct Vector {
    /// Signalled when the vector fires.
    trigger: Option<EventFd>,
    /// Masks when the client signals it.
    mask_on: Option<Listener<Gate>>,
    /// Unmasks when the client signals it: resampling of a level-triggered interrupt.
    unmask_on: Option<Listener<Gate>>,
    masked: bool,
    /// The line is up, or an edge is pending.
    raised: bool,
}

impl Vector {
    /// Fires if it would and may; says whether it did.
    fn deliver(&mut self, automasked: bool) -> bool {
        if !self.raised || self.masked {
            return false;
        }
        let Some(trigger) = &self.trigger else {
            return false;
        };
        trigger.signal();
        if automasked {
            self.masked = true;
        } else {
            self.raised = false;
        }
        true
    }
}

#[pin_data]
struct Index {
    irq: muser_irq,
    #[pin]
    vectors: Mutex<KVVec<Vector>>,
}

impl Index {
    fn is_automasked(&self) -> bool {
        self.irq.flags & MUSER_IRQ_AUTOMASKED != 0
    }

    fn is_maskable(&self) -> bool {
        self.irq.flags & MUSER_IRQ_MASKABLE != 0
    }
}

/// All interrupts of a device.
pub(crate) struct Irqs {
    indexes: KVec<Pin<KBox<Index>>>,
    status: Arc<SharedMemory>,
}

/// Masks or unmasks a vector when an eventfd of the client says so.
struct Gate {
    irqs: Arc<Irqs>,
    index: u32,
    vector: u32,
    action: Action,
}

impl Signalled for Gate {
    fn signalled(&self) {
        if let Some(index) = self.irqs.index(self.index) {
            if let Some(vector) = index.vectors.lock().get_mut(self.vector as usize) {
                vector.masked = self.action == Action::Mask;
                vector.deliver(index.is_automasked());
            }
        }
    }
}

impl Irqs {
    /// Makes the interrupts of a checked description. `status` tells the process of them.
    pub(crate) fn new(irqs: &[muser_irq], status: Arc<SharedMemory>) -> Result<Arc<Self>> {
        let mut indexes = KVec::with_capacity(irqs.len(), GFP_KERNEL_ACCOUNT)?;
        for irq in irqs {
            let mut vectors = KVVec::with_capacity(irq.count as usize, GFP_KERNEL_ACCOUNT)?;
            for _ in 0..irq.count {
                vectors.push(Vector::default(), GFP_KERNEL_ACCOUNT)?;
            }
            let index = KBox::pin_init(
                try_pin_init!(Index {
                    irq: *irq,
                    vectors <- new_mutex!(vectors, "muser_irqs"),
                }),
                GFP_KERNEL_ACCOUNT,
            )?;
            indexes.push(index, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Arc::new(Self { indexes, status }, GFP_KERNEL_ACCOUNT)?)
    }

    fn index(&self, index: u32) -> Option<&Index> {
        self.indexes
            .iter()
            .map(|index| &**index)
            .find(|candidate| candidate.irq.index == index)
    }

    /// What a client is told of an index.
    pub(crate) fn info(&self, index: u32) -> Option<IrqInfo> {
        let index = self.index(index)?;
        Some(IrqInfo {
            // The ABI has VFIO's bits.
            flags: index.irq.flags,
            count: index.irq.count,
        })
    }

    /// What the process is told of all indexes.
    pub(crate) fn states(&self) -> impl Iterator<Item = muser_irq_state> + '_ {
        self.indexes.iter().map(|index| {
            let vectors = index.vectors.lock();
            let count = |what: fn(&Vector) -> bool| {
                vectors.iter().filter(|vector| what(vector)).count() as u32
            };
            muser_irq_state {
                irq: index.irq,
                enabled: count(|vector| vector.trigger.is_some()),
                masked: count(|vector| vector.masked),
                pending: count(|vector| vector.raised),
                reserved: 0,
            }
        })
    }

    /// Does what a client asks by `VFIO_DEVICE_SET_IRQS`.
    pub(crate) fn set(self: &Arc<Self>, set: &IrqSet) -> Result {
        let index = self.index(set.index).ok_or(EINVAL)?;
        match (set.action, &set.data) {
            (Action::Trigger, Data::EventFd(fds)) => self.set_triggers(index, set.start, fds),
            (Action::Trigger, _) if set.count == 0 => {
                self.disable(index);
                Ok(())
            }
            (Action::Trigger, _) => {
                // A loop-back test of the client's: what would happen if the device fired.
                let vectors = index.vectors.lock();
                for vector in set.chosen() {
                    if let Some(trigger) = &vectors[vector as usize].trigger {
                        trigger.signal();
                    }
                }
                Ok(())
            }
            _ if !index.is_maskable() => Err(EINVAL),
            (action, Data::EventFd(fds)) => self.set_gates(index, action, set.start, fds),
            (action, _) => {
                let mut vectors = index.vectors.lock();
                for vector in set.chosen() {
                    let vector = &mut vectors[vector as usize];
                    vector.masked = action == Action::Mask;
                    vector.deliver(index.is_automasked());
                }
                Ok(())
            }
        }
    }

    fn set_triggers(&self, index: &Index, start: u32, fds: &[i32]) -> Result {
        if index.irq.flags & MUSER_IRQ_EVENTFD == 0 {
            return Err(EINVAL);
        }
        // All or none: every descriptor is looked up before the first one takes effect.
        let mut triggers = KVec::with_capacity(fds.len(), GFP_KERNEL_ACCOUNT)?;
        for &fd in fds {
            let trigger = if fd == -1 {
                None
            } else {
                Some(EventFd::from_fd(fd)?)
            };
            triggers.push(trigger, GFP_KERNEL_ACCOUNT)?;
        }
        let mut vectors = index.vectors.lock();
        let range = vectors.iter_mut().skip(start as usize);
        for (vector, trigger) in range.zip(triggers.iter_mut()) {
            core::mem::swap(&mut vector.trigger, trigger);
            if vector.trigger.is_none() && !index.is_automasked() {
                vector.raised = false;
            }
            vector.deliver(index.is_automasked());
        }
        self.tell(index, &vectors);
        drop(vectors);
        Ok(())
    }

    fn set_gates(
        self: &Arc<Self>,
        index: &Index,
        action: Action,
        start: u32,
        fds: &[i32],
    ) -> Result {
        let mut gates = KVec::with_capacity(fds.len(), GFP_KERNEL_ACCOUNT)?;
        for (vector, &fd) in (start..).zip(fds) {
            let gate = || Gate {
                irqs: self.clone(),
                index: index.irq.index,
                vector,
                action,
            };
            let gate = if fd == -1 {
                None
            } else {
                Some(Listener::new(fd, gate())?)
            };
            gates.push(gate, GFP_KERNEL_ACCOUNT)?;
        }
        let mut vectors = index.vectors.lock();
        let range = vectors.iter_mut().skip(start as usize);
        for (vector, gate) in range.zip(gates.iter_mut()) {
            let place = match action {
                Action::Mask => &mut vector.mask_on,
                Action::Unmask | Action::Trigger => &mut vector.unmask_on,
            };
            core::mem::swap(place, gate);
        }
        // A listener's drop waits for its call, which takes the lock: so the lock goes first.
        drop(vectors);
        drop(gates);
        Ok(())
    }

    /// Forgets everything a client set up for an index.
    fn disable(&self, index: &Index) {
        for i in 0..index.irq.count as usize {
            let mut vectors = index.vectors.lock();
            let vector = &mut vectors[i];
            let old = (
                vector.trigger.take(),
                vector.mask_on.take(),
                vector.unmask_on.take(),
            );
            vector.masked = false;
            vector.raised &= index.is_automasked();
            drop(vectors);
            drop(old);
        }
        self.tell(index, &index.vectors.lock());
    }

    /// Forgets everything a client set up, and what was raised for it: it is gone.
    pub(crate) fn disable_all(&self) {
        for index in &self.indexes {
            self.disable(index);
            for vector in index.vectors.lock().iter_mut() {
                vector.raised = false;
            }
        }
    }

    /// Writes to the status page how many vectors of an index are enabled.
    fn tell(&self, index: &Index, vectors: &[Vector]) {
        let enabled = vectors
            .iter()
            .filter(|vector| vector.trigger.is_some())
            .count();
        let offset =
            offset_of!(muser_status, irq_enabled) + index.irq.index as usize * size_of::<u32>();
        // The page holds the whole struct, so this can't fail.
        let _ = self.status.store(offset, enabled as u32);
    }

    /// Fires vectors, or lowers their lines, and returns those that were signalled.
    pub(crate) fn trigger(&self, trigger: &muser_trigger) -> Result<u64> {
        let index = self.index(trigger.index).ok_or(ENXIO)?;
        let lower = trigger.flags & MUSER_TRIGGER_LOWER != 0;
        if lower && !index.is_automasked() {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let highest = u64::BITS - trigger.vectors.leading_zeros();
        match trigger.start.checked_add(highest) {
            Some(end) if end <= index.irq.count => {}
            _ => return Err(ENOSPC),
        }
        let mut signalled = 0;
        let mut vectors = index.vectors.lock();
        for bit in (0..highest).filter(|bit| trigger.vectors & (1 << bit) != 0) {
            let vector = &mut vectors[(trigger.start + bit) as usize];
            vector.raised = !lower && (index.is_automasked() || vector.trigger.is_some());
            if vector.deliver(index.is_automasked()) {
                signalled |= 1 << bit;
            }
        }
        Ok(signalled)
    }
}
