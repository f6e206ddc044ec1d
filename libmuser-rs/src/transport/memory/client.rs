// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of a device in this process: what a VFIO device file offers, as methods.

use std::io;
use std::sync::Arc;

use muser_uapi::MUSER_SLOT_DATA;
use nix::errno::Errno as Number;

use super::queue::{Described, Queue};
use super::Removal;
use crate::memory::SharedMemory;
use crate::region::{Area, AreaKind, RegionInfo};
use crate::transport::irqs::{IrqAction, IrqData};
use crate::transport::{Description, IrqInfo, Operation};

/// A client that has the device open. It can be used from many threads at once.
///
/// Regions and interrupts have the indexes of `<linux/vfio.h>`. Errors are those that a VFIO
/// client gets.
#[derive(Debug)]
pub struct Client {
    device: Arc<Removal>,
    described: Described,
}

impl Client {
    pub(super) fn open(device: Arc<Removal>) -> io::Result<Self> {
        let described = device.0.open()?;
        Ok(Self { device, described })
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.device.0
    }

    /// The device's regions and interrupts.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.described.description
    }

    /// A region's size and flags, as `VFIO_DEVICE_GET_REGION_INFO` has them.
    #[must_use]
    pub fn region(&self, index: u32) -> Option<&RegionInfo> {
        self.description().region(index)
    }

    /// An interrupt's vectors and flags, as `VFIO_DEVICE_GET_IRQ_INFO` has them.
    #[must_use]
    pub fn irq(&self, index: u32) -> Option<&IrqInfo> {
        self.description().irq(index)
    }

    /// Reads from a region; tells how many bytes, fewer at the end of the region.
    ///
    /// # Errors
    ///
    /// `EINVAL`: no such region, it can't be read, or the offset is beyond its end. Else what the
    /// device returned, unless an earlier part of a long read was successful.
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        let info = self.bounds(region, offset, |info| info.readable)?;
        let count = clamp(info, offset, data.len());
        self.in_parts(info, offset, count, |at, part, memory| {
            let part = &mut data[part];
            if let Some((memory, offset)) = memory {
                return Ok(memory
                    .read_bytes(offset, part)
                    .map_err(|error| error.errno())?);
            }
            let operation = Operation::Read {
                region,
                offset: at,
                count: part.len(),
            };
            let answer = self.device.0.request(operation, Vec::new())?;
            let answer = answer.get(..part.len()).ok_or(Number::EIO)?;
            part.copy_from_slice(answer);
            Ok(())
        })
    }

    /// Writes to a region; tells how many bytes, fewer at the end of the region.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<usize> {
        let info = self.bounds(region, offset, |info| info.writable)?;
        let count = clamp(info, offset, data.len());
        self.in_parts(info, offset, count, |at, part, memory| {
            let part = &data[part];
            if let Some((memory, offset)) = memory {
                memory
                    .write_bytes(offset, part)
                    .map_err(|error| error.errno())?;
                let area = info.areas.iter().find(|area| holds(area, at));
                if let Some(area) = area.filter(|area| area.kind == AreaKind::Doorbell) {
                    self.device.0.ring(region, area.offset);
                }
                return Ok(());
            }
            let operation = Operation::Write { region, offset: at };
            self.device.0.request(operation, part.to_vec()).map(drop)
        })
    }

    /// Sets up interrupts, as `VFIO_DEVICE_SET_IRQS` does.
    ///
    /// # Errors
    ///
    /// `EINVAL`: no such index or vector, or an action that the index does not have.
    /// `EOPNOTSUPP`: masking by eventfd.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> io::Result<()> {
        self.device.0.irqs().set(index, start, action, data)
    }

    /// Resets the device, as `VFIO_DEVICE_RESET` does.
    ///
    /// # Errors
    ///
    /// What the device returned.
    pub fn reset(&self) -> io::Result<()> {
        self.device
            .0
            .request(Operation::Reset { close: false }, Vec::new())
            .map(drop)
    }

    /// Maps the mappable area which starts at `offset` of a region.
    ///
    /// # Errors
    ///
    /// `EINVAL`: no mappable area starts there.
    pub fn map(&self, region: u32, offset: u64) -> io::Result<SharedMemory> {
        let mut areas = self.described.memory.iter();
        let area = areas.find(|area| {
            area.region == region && area.offset == offset && area.kind == AreaKind::Mappable
        });
        Ok(area.ok_or(Number::EINVAL)?.memory.clone())
    }

    fn bounds(
        &self,
        region: u32,
        offset: u64,
        allowed: impl FnOnce(&RegionInfo) -> bool,
    ) -> io::Result<&RegionInfo> {
        let region = self
            .region(region)
            .filter(|region| offset < region.size && allowed(region));
        Ok(region.ok_or(Number::EINVAL)?)
    }

    /// Does an access in parts: shared memory each by itself, the rest as much as a request takes.
    fn in_parts(
        &self,
        region: &RegionInfo,
        offset: u64,
        count: usize,
        mut access: impl FnMut(
            u64,
            std::ops::Range<usize>,
            Option<(&SharedMemory, usize)>,
        ) -> io::Result<()>,
    ) -> io::Result<usize> {
        let posted = self.device.0.has_posted_doorbells();
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let area = region.areas.iter().find(|area| holds(area, at));
            let next = region
                .areas
                .iter()
                .map(|area| area.offset)
                .find(|start| *start > at);
            let in_memory = area.filter(|area| area.kind == AreaKind::Mappable || posted);
            let limit = match (area, next) {
                (Some(area), _) if in_memory.is_some() => area.end() - at,
                (Some(area), _) => (area.end() - at).min(MUSER_SLOT_DATA.into()),
                (None, next) => {
                    let gap = next.map_or(u64::MAX, |next| next - at);
                    gap.min(MUSER_SLOT_DATA.into())
                }
            };
            let len = usize::try_from(limit)
                .unwrap_or(usize::MAX)
                .min(count - done);
            let memory = in_memory.and_then(|area| {
                let mut memory = self.described.memory.iter();
                let memory =
                    memory.find(|m| m.region == region.index && m.offset == area.offset)?;
                Some((&memory.memory, usize::try_from(at - area.offset).ok()?))
            });
            match access(at, done..done + len, memory) {
                Ok(()) => done += len,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}

fn holds(area: &Area, offset: u64) -> bool {
    (area.offset..area.end()).contains(&offset)
}

fn clamp(region: &RegionInfo, offset: u64, count: usize) -> usize {
    usize::try_from(region.size - offset)
        .unwrap_or(usize::MAX)
        .min(count)
}

impl Drop for Client {
    fn drop(&mut self) {
        self.device.0.close();
    }
}
