// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `DEVICE_SET_IRQS`: which descriptors are signalled when the device interrupts, and with which the
//! client masks.
//!
//! An eventfd for masking or unmasking is one that the client (in truth KVM, when the guest has
//! looked) signals, and this side waits for, as in VFIO.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno as Number;

use super::commands::Refusal;
use super::events::{Source, Watch};
use super::hub::{Hub, State};
use crate::error::{Errno, Error};
use crate::sys::event;
use crate::transport::irqs::{IrqAction, IrqData};
use crate::vfio_user::wire::request;

/// Descriptors with which the client masks and unmasks vectors.
#[derive(Debug, Default)]
pub(super) struct Gates {
    gates: BTreeMap<u32, Gate>,
    next: u32,
}

#[derive(Debug)]
struct Gate {
    event: OwnedFd,
    index: u32,
    vector: u32,
    action: IrqAction,
}

impl Gates {
    fn add(&mut self, hub: &Hub, gate: Gate) -> Result<(), Error> {
        let free = |number: &u32| !self.gates.contains_key(number);
        // There are as many as vectors at most, twice.
        let number = (self.next..=u32::MAX).chain(0..self.next).find(free);
        let number = number.unwrap_or_default();
        self.next = number.wrapping_add(1);
        hub.events
            .add(&gate.event, Source::Gate(number), Watch::RECEIVE)?;
        self.gates.insert(number, gate);
        Ok(())
    }

    fn remove(&mut self, hub: &Hub, goes: impl Fn(&Gate) -> bool) {
        self.gates.retain(|_, gate| {
            let goes = goes(gate);
            if goes {
                hub.events.remove(&gate.event);
            }
            !goes
        });
    }
}

impl State {
    pub(super) fn set_irqs(
        &mut self,
        hub: &Hub,
        asked: request::SetIrqs<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let count = asked.count as usize;
        let action = match asked.action {
            request::IrqAction::Mask => IrqAction::Mask,
            request::IrqAction::Unmask => IrqAction::Unmask,
            request::IrqAction::Trigger => IrqAction::Trigger,
        };
        if !fds.is_empty() && asked.data != request::IrqData::EventFds {
            let why = "it came with descriptors, and says that there are none";
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        if fds
            .iter()
            .any(|fd| event::is_event(fd.as_fd()) == Some(false))
        {
            let why = "a descriptor is no eventfd";
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        // Not more vectors than there are, so that none are made room for that are not.
        let served = self.served.as_ref();
        let irq = served.and_then(|served| served.description.irq(asked.index));
        let vectors = irq.map_or(0, |irq| irq.count);
        if irq.is_none() || asked.start.saturating_add(asked.count) > vectors {
            let why = format!("interrupt index {} has not so many vectors", asked.index);
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let is_maskable = irq.is_some_and(|irq| irq.maskable);
        let failed = |error: std::io::Error| {
            let error = Error::io("setting up interrupts", error);
            Refusal::from(error)
        };
        let set = |data: IrqData<'_>| self.irqs.set(asked.index, asked.start, action, data);
        match asked.data {
            request::IrqData::None => {
                set(IrqData::None(count)).map_err(failed)?;
                if count == 0 {
                    // All of the index is disabled.
                    self.gates.remove(hub, |gate| gate.index == asked.index);
                }
                Ok(())
            }
            request::IrqData::Bools(bools) => {
                let chosen: Vec<bool> = bools.iter().map(|byte| *byte != 0).collect();
                set(IrqData::Bools(&chosen)).map_err(failed)
            }
            request::IrqData::EventFds => {
                if count == 0 || (!fds.is_empty() && fds.len() != count) {
                    let why = format!("{count} vectors have {} descriptors", fds.len());
                    return Err(Refusal::new(Errno::EINVAL, why));
                }
                if action != IrqAction::Trigger {
                    if !is_maskable {
                        let why = format!("interrupt index {} can't be masked", asked.index);
                        return Err(Refusal::new(Errno::EINVAL, why));
                    }
                    return self.set_gates(hub, asked, action, fds);
                }
                let borrowed: Vec<_> = if fds.is_empty() {
                    vec![None; count]
                } else {
                    fds.iter().map(|fd| Some(fd.as_fd())).collect()
                };
                set(IrqData::EventFds(&borrowed)).map_err(failed)
            }
        }
    }

    /// Each vector gets an eventfd that masks or unmasks it, or none any more.
    fn set_gates(
        &mut self,
        hub: &Hub,
        asked: request::SetIrqs<'_>,
        action: IrqAction,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let vectors = asked.start..asked.start.saturating_add(asked.count);
        self.gates.remove(hub, |gate| {
            let same = (gate.index, gate.action) == (asked.index, action);
            same && vectors.contains(&gate.vector)
        });
        for (vector, event) in vectors.zip(fds) {
            let gate = Gate {
                event,
                index: asked.index,
                vector,
                action,
            };
            self.gates.add(hub, gate)?;
        }
        Ok(())
    }

    /// The client has signalled one of them.
    pub(super) fn pass_gate(&mut self, hub: &Hub, number: u32) {
        let Some(gate) = self.gates.gates.get(&number) else {
            return;
        };
        match event::take(gate.event.as_fd()) {
            Ok(_) => {
                let (index, vector, action) = (gate.index, gate.vector, gate.action);
                if let Err(error) = self.irqs.set(index, vector, action, IrqData::None(1)) {
                    log::debug!("vector {vector} of index {index} is not masked: {error}");
                }
            }
            Err(Number::EAGAIN | Number::EINTR) => {}
            Err(errno) => {
                log::warn!("a descriptor to mask with can't be read any more: {errno}");
                hub.events.remove(&gate.event);
                self.gates.gates.remove(&number);
            }
        }
    }

    /// The client has gone.
    pub(super) fn drop_gates(&mut self, hub: &Hub) {
        self.gates.remove(hub, |_| true);
    }
}
