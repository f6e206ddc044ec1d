// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: `VFIO_DEVICE_SET_IRQS` in messages.

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::{Client, IrqAction, IrqData};
use crate::error::{Errno, Error, Result};
use crate::vfio_user::wire::payload::IrqSet;
use crate::vfio_user::wire::{Command, AROUND_DATA, MAX_FDS};

/// Booleans in one message.
const MOST_BOOLS: usize = AROUND_DATA - size_of::<IrqSet>();

impl Client {
    /// Sets up interrupts, as `VFIO_DEVICE_SET_IRQS` does.
    ///
    /// A message has an eventfd for each of its vectors or for none, and not more than the server
    /// takes. So eventfds with gaps, and many of them, go in several messages, by ascending vector:
    /// if one fails, those before it are set up.
    ///
    /// # Errors
    ///
    /// `EINVAL`: no such index or vector, or an action that the index does not have.
    /// `EOPNOTSUPP`: [`IrqData::Calls`], which no socket can carry. Else what the server returned.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> Result<()> {
        let action = match action {
            IrqAction::Mask => IrqSet::MASK,
            IrqAction::Unmask => IrqSet::UNMASK,
            IrqAction::Trigger => IrqSet::TRIGGER,
        };
        let set = |flags: u32, at: usize, count: usize, bools: &[u8], fds: &[BorrowedFd<'_>]| {
            let start = u32::try_from(at)
                .ok()
                .and_then(|at| start.checked_add(at))
                .ok_or_else(out_of_range)?;
            let set = IrqSet {
                argsz: u32::try_from(size_of::<IrqSet>() + bools.len())
                    .map_err(|_| out_of_range())?,
                flags: flags | action,
                index,
                start,
                count: u32::try_from(count).map_err(|_| out_of_range())?,
            };
            let payload = [set.as_bytes(), bools];
            let answer = self
                .connection
                .call(Command::DeviceSetIrqs, &payload, fds)?;
            self.finish(Command::DeviceSetIrqs, answer)
        };
        match data {
            IrqData::None(count) => set(IrqSet::DATA_NONE, 0, count, &[], &[]),
            IrqData::Bools([]) => set(IrqSet::DATA_BOOL, 0, 0, &[], &[]),
            IrqData::Bools(chosen) => {
                let bytes: Vec<u8> = chosen.iter().copied().map(u8::from).collect();
                let mut chunks = bytes.chunks(MOST_BOOLS).enumerate();
                chunks.try_for_each(|(number, chunk)| {
                    let at = number * MOST_BOOLS;
                    set(IrqSet::DATA_BOOL, at, chunk.len(), chunk, &[])
                })
            }
            IrqData::EventFds([]) => set(IrqSet::DATA_EVENTFD, 0, 0, &[], &[]),
            IrqData::EventFds(events) => {
                let most = self.agreement.server.fds().clamp(1, MAX_FDS);
                runs(events, most).try_for_each(|(at, run)| {
                    let fds: Vec<_> = run.iter().flatten().copied().collect();
                    set(IrqSet::DATA_EVENTFD, at, run.len(), &[], &fds)
                })
            }
            IrqData::Calls(_) => {
                let message = "a function can't be called over a socket";
                Err(Error::new(Errno::EOPNOTSUPP, message))
            }
        }
    }
}

fn out_of_range() -> Error {
    Error::new(Errno::EINVAL, "there are no vectors beyond 2^32")
}

type Events<'a> = [Option<BorrowedFd<'a>>];

/// Cuts eventfds into runs that all are there, `most` of them at a time, or all are not; each with
/// where it starts.
fn runs<'a, 'b>(
    events: &'a Events<'b>,
    most: usize,
) -> impl Iterator<Item = (usize, &'a Events<'b>)> {
    let runs = events.chunk_by(|one, next| one.is_some() == next.is_some());
    let cut = runs.flat_map(move |run| match run.first() {
        Some(Some(_)) => run.chunks(most),
        _ => run.chunks(run.len().max(1)),
    });
    cut.scan(0, |at, run| {
        let start = *at;
        *at += run.len();
        Some((start, run))
    })
}
