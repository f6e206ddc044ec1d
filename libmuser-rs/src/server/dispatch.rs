// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a request to whoever answers it: configuration space, MSI-X table, ROM, or the device.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::core::Core;
use super::gate::Passage;
use crate::device::{Device, Doorbell, Reset};
use crate::error::{Errno, Result};
use crate::model::Claim;
use crate::pci::function::Function;
use crate::pci::Effects;
use crate::region::{split, Access, Region, Width};
use crate::state::Key;
use crate::transport::{Operation, Reply, Request, Take};

/// A thread of a server: it takes requests, and has them answered.
pub(super) struct Worker<'a, D: ?Sized> {
    core: &'a Core,
    device: &'a mut D,
    /// Data of the request at hand, then of its reply.
    data: &'a mut Vec<u8>,
}

impl<'a, D: Device + ?Sized> Worker<'a, D> {
    pub(super) fn new(core: &'a Core, device: &'a mut D, data: &'a mut Vec<u8>) -> Self {
        Self { core, device, data }
    }

    /// Replies and takes.
    pub(super) fn turn(&mut self, reply: Option<Reply>, take: Take) -> Result<Option<Request>> {
        let store = self.core.shared.store();
        let replied = reply.map(|reply| reply.token.request());
        let _taking = (take != Take::Nothing).then(|| store.taking());
        let turned = self.core.transport.turn(reply, take, self.data);
        if let Ok(request) = &turned {
            let taken = request.map(|request| (request.token.request(), request.replay));
            store.turned(replied, taken);
        }
        turned
    }

    /// Has a request answered: the result, whose data is in the buffer.
    pub(super) fn dispatch(&mut self, request: Request) -> Reply {
        log::trace!("{request:?}");
        let _passage = self.passage(request.operation);
        // After a panic the device is not called again, so nobody sees it half changed.
        let work = AssertUnwindSafe(|| self.perform(request));
        let result = catch_unwind(work).unwrap_or_else(|panic| {
            self.core.set_panicked(panic_message(&*panic).into());
            Err(Errno::EIO)
        });
        Reply {
            token: request.token,
            result,
        }
    }

    /// Waits until the device can be called for this: with others, or alone for what may reset it.
    fn passage(&self, operation: Operation) -> Passage<'a> {
        let gate = &self.core.gate;
        match operation {
            Operation::Write { region, .. } if region == Region::Config.index() => {
                gate.enter_alone()
            }
            Operation::Read { .. } | Operation::Write { .. } | Operation::Doorbell { .. } => {
                gate.enter()
            }
            Operation::Reset { .. } | Operation::Unmap { .. } | Operation::Unknown => {
                gate.enter_alone()
            }
        }
    }

    fn perform(&mut self, request: Request) -> Result<(), Errno> {
        match request.operation {
            Operation::Read {
                region,
                offset,
                count,
            } => {
                self.data.clear();
                self.data.resize(count, 0);
                self.access(request, region, offset, false)
            }
            Operation::Write { region, offset } => self.access(request, region, offset, true),
            Operation::Reset { close } => {
                self.reset_function();
                self.reset_device(if close { Reset::Close } else { Reset::Client })
            }
            Operation::Doorbell { region, offset } => self.ring(region, offset),
            Operation::Unmap { iova, length } => {
                self.device.dma_unmapped(iova..iova.saturating_add(length));
                Ok(())
            }
            Operation::Unknown => {
                self.core
                    .failures
                    .log(format_args!("a request of an unknown kind was refused"));
                Err(Errno::EOPNOTSUPP)
            }
        }
    }

    /// Cuts an access where somebody else answers, and has each part answered.
    fn access(
        &mut self,
        request: Request,
        index: u32,
        offset: u64,
        write: bool,
    ) -> Result<(), Errno> {
        let size = self
            .core
            .model
            .description()
            .region(index)
            .map_or(0, |region| region.size);
        let end = offset
            .checked_add(self.data.len() as u64)
            .filter(|end| *end <= size);
        let (Some(region), Some(end)) = (Region::from_index(index), end) else {
            let message = format_args!("region {index} offset {offset:#x}: it is out of bounds");
            self.core.failures.log(message);
            return Err(Errno::EINVAL);
        };
        let mut data = std::mem::take(self.data);
        let mut at = offset;
        let mut result = Ok(());
        while at < end && result.is_ok() {
            let Some((claim, span)) = self.core.model.claim(region, at) else {
                result = Err(Errno::EINVAL);
                break;
            };
            let stop = span.end.min(end);
            let part = &mut data[index_of(at - offset)..index_of(stop - offset)];
            let place = Place {
                start: at,
                claimed: index_of(at - span.start),
            };
            result = match (claim, write) {
                (Claim::Device(region, width), _) => {
                    let accesses = split(place.start, part.len(), width);
                    self.access_device(accesses, region, request, part, write)
                }
                (_, true) => self.write_claimed(request, claim, place, part),
                (_, false) => self.read_claimed(claim, place, part),
            };
            at = stop;
        }
        *self.data = data;
        result
    }

    fn access_device(
        &mut self,
        accesses: impl Iterator<Item = (u64, Width)>,
        region: Region,
        request: Request,
        data: &mut [u8],
        write: bool,
    ) -> Result<(), Errno> {
        // PCI PM 1.2, 5.4.1: in D3hot, a function answers in configuration space only.
        let shared = &self.core.shared;
        if !shared.look(|function| function.config().is_powered()) {
            log::debug!("{region}: the function is in D3hot and does not answer");
            if !write {
                data.fill(0xff);
            }
            return Ok(());
        }
        let mut rest = data;
        for (offset, width) in accesses {
            let (bytes, after) = rest.split_at_mut(width.bytes());
            rest = after;
            let access = Access {
                region,
                offset,
                width,
                request: request.token.request(),
                replay: request.replay,
            };
            let mut value = [0; 8];
            let value = &mut value[..];
            let outcome = if write {
                value[..bytes.len()].copy_from_slice(bytes);
                let value = value.try_into().map_or(0, u64::from_le_bytes);
                self.device.write(access, value)
            } else {
                self.device.read(access).map(|value| {
                    bytes.copy_from_slice(&value.to_le_bytes()[..width.bytes()]);
                })
            };
            outcome.map_err(|error| {
                let verb = if write { "write" } else { "read" };
                self.core
                    .failures
                    .log(format_args!("{access}: the {verb} failed: {error}"));
                error.errno()
            })?;
        }
        Ok(())
    }

    fn read_claimed(&self, claim: Claim, place: Place, data: &mut [u8]) -> Result<(), Errno> {
        let at = place.claimed;
        let shared = &self.core.shared;
        match claim {
            Claim::Config => shared.look(|function| function.config().read(at, data)),
            Claim::MsixTable => shared.look(|function| function.read_msix_table(at, data)),
            Claim::MsixPba => shared.look(|function| function.read_msix_pba(at, data)),
            Claim::Rom => data.copy_from_slice(&self.core.model.rom()[at..at + data.len()]),
            Claim::Doorbell(region, start) => {
                let doorbell = self.doorbell(region, start)?;
                let memory = doorbell.memory();
                memory.read_bytes(at, data).map_err(|error| error.errno())?;
            }
            Claim::Device(..) => {}
        }
        Ok(())
    }

    fn write_claimed(
        &mut self,
        request: Request,
        claim: Claim,
        place: Place,
        data: &[u8],
    ) -> Result<(), Errno> {
        let at = place.claimed;
        match claim {
            Claim::Config => {
                // What the write made of configuration space is done once. So is the reset that it
                // asks for, unless it was cut short: a replay finds others' accesses behind it.
                let index = Region::Config.index();
                let key = Key::new(request.token.request(), index, place.start);
                let write = |function: &mut Function| function.write_config(at, data).bits();
                let (effects, rest) = self.core.shared.once(key, write);
                log_failed("a write to configuration space", rest);
                let effects = Effects::from_bits(effects);
                let reset = if effects.function_level_reset {
                    Reset::FunctionLevel
                } else if effects.power_up_reset {
                    Reset::PowerUp
                } else {
                    return Ok(());
                };
                let key = key.consequence();
                if self.core.shared.store().done(key).is_none() {
                    self.reset_device(reset)?;
                    let (_, rest) = self.core.shared.once(key, |_| 0);
                    log_failed("a reset by configuration space", rest);
                }
                Ok(())
            }
            Claim::MsixTable => {
                let work = self
                    .core
                    .shared
                    .with(|function| function.write_msix_table(at, data));
                log_failed("a write to the MSI-X table", work.1);
                Ok(())
            }
            // A transport without doorbells: what one with them would have done goes first.
            Claim::Doorbell(region, start) => {
                let doorbell = self.doorbell(region, start)?;
                let memory = doorbell.memory();
                memory
                    .write_bytes(at, data)
                    .map_err(|error| error.errno())?;
                self.ring(doorbell.region().index(), start)
            }
            Claim::Rom | Claim::MsixPba | Claim::Device(..) => Ok(()),
        }
    }

    fn doorbell(&self, region: Region, start: u64) -> Result<Doorbell, Errno> {
        let doorbell = self.core.bus.doorbell(region, start);
        doorbell.ok_or(Errno::EIO)
    }

    /// Tells the device of a doorbell.
    fn ring(&mut self, region: u32, start: u64) -> Result<(), Errno> {
        let region = Region::from_index(region).ok_or(Errno::EINVAL)?;
        let doorbell = self.doorbell(region, start)?;
        self.device.doorbell(&doorbell).map_err(|error| {
            let message = format_args!("{region} doorbell at {start:#x}: it failed: {error}");
            self.core.failures.log(message);
            error.errno()
        })
    }

    fn reset_function(&self) {
        let (_, rest) = self.core.shared.with(|function| function.reset());
        log_failed("a reset", rest);
    }

    fn reset_device(&mut self, reset: Reset) -> Result<(), Errno> {
        log::debug!("{reset:?} reset");
        self.device.reset(reset).map_err(|error| {
            self.core
                .failures
                .log(format_args!("the {reset:?} reset failed: {error}"));
            error.errno()
        })
    }
}

/// Where an access is: in the region, and in what claims that part of it.
#[derive(Clone, Copy)]
struct Place {
    start: u64,
    claimed: usize,
}

/// An offset within a buffer, which is small.
fn index_of(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// Logs what did not come of something that is done: an interrupt was not sent, or it is not kept.
fn log_failed(after: &str, rest: Result<()>) {
    if let Err(error) = rest {
        log::warn!("{after} is not complete: {error}");
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
