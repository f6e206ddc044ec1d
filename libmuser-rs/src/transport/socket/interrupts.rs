// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `DEVICE_SET_IRQS`: which descriptors are signalled when the device interrupts.

use std::os::fd::{AsFd, OwnedFd};

use super::commands::Refusal;
use super::hub::{Hub, State};
use crate::error::{Errno, Error};
use crate::transport::irqs::{IrqAction, IrqData};
use crate::vfio_user::wire::request;

impl State {
    pub(super) fn set_irqs(
        &mut self,
        _hub: &Hub,
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
        // Not more vectors than there are, so that none are made room for that are not.
        let served = self.served.as_ref();
        let irq = served.and_then(|served| served.description.irq(asked.index));
        let vectors = irq.map_or(0, |irq| irq.count);
        if asked.start.saturating_add(asked.count) > vectors {
            let why = format!("interrupt index {} has not so many vectors", asked.index);
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let failed = |error: std::io::Error| {
            let error = Error::io("setting up interrupts", error);
            Refusal::from(error)
        };
        match asked.data {
            request::IrqData::None => {
                let data = IrqData::None(count);
                self.irqs.set(asked.index, asked.start, action, data)
            }
            request::IrqData::Bools(bools) => {
                let chosen: Vec<bool> = bools.iter().map(|byte| *byte != 0).collect();
                let data = IrqData::Bools(&chosen);
                self.irqs.set(asked.index, asked.start, action, data)
            }
            request::IrqData::EventFds => {
                if !fds.is_empty() && fds.len() != count {
                    let why = format!("{count} vectors have {} descriptors", fds.len());
                    return Err(Refusal::new(Errno::EINVAL, why));
                }
                let borrowed: Vec<_> = if fds.is_empty() {
                    vec![None; count]
                } else {
                    fds.iter().map(|fd| Some(fd.as_fd())).collect()
                };
                let data = IrqData::EventFds(&borrowed);
                self.irqs.set(asked.index, asked.start, action, data)
            }
        }
        .map_err(failed)
    }
}
