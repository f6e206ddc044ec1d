// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Regions: reading, writing, and mapping what can be mapped of them.

use zerocopy::IntoBytes;

use super::connection::Answer;
use super::description::fixed;
use super::{failure, Client};
use crate::error::{Errno, Error, Result};
use crate::memory::SharedMemory;
use crate::region::RegionInfo;
use crate::vfio_user::wire::payload::{RegionAccess, WriteMulti, WriteOne};
use crate::vfio_user::wire::{Command, AROUND_DATA};

/// Writes in one REGION_WRITE_MULTI: as many as fit beside data of any size that was negotiated.
const MOST_WRITES: usize = (AROUND_DATA - size_of::<WriteMulti>()) / size_of::<WriteOne>();

/// A small write to a region, one of [several](Client::write_multi).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionWrite<'a> {
    /// The region's index.
    pub region: u32,
    /// Bytes from the region's start.
    pub offset: u64,
    /// What is written: 8 bytes at most.
    pub data: &'a [u8],
}

impl Client {
    /// Reads from a region; tells how many bytes, fewer at the end of the region.
    ///
    /// # Errors
    ///
    /// `EINVAL`: no such region, it can't be read, or the offset is beyond its end. Else what the
    /// server returned, unless an earlier part of a long read was successful.
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<usize> {
        const COMMAND: Command = Command::RegionRead;
        let info = self.bounds(region, offset, |info| info.readable)?;
        let count = clamp(info, offset, data.len());
        in_parts(count, self.max_data(), |part| {
            let access = access(region, offset, &part)?;
            let answer = self.connection.call(COMMAND, &[access.as_bytes()], &[])?;
            let read = self.check(COMMAND, &access, &answer)?;
            if read.len() != part.len() {
                let (wanted, came) = (part.len(), read.len());
                let what = format!("{wanted} bytes of data were expected, and {came} came");
                return Err(failure::wrong(COMMAND, what));
            }
            data[part].copy_from_slice(read);
            self.connection.done(answer);
            Ok(())
        })
    }

    /// Writes to a region, and waits until the device has done it; tells how many bytes, fewer at
    /// the end of the region.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<usize> {
        const COMMAND: Command = Command::RegionWrite;
        let info = self.bounds(region, offset, |info| info.writable)?;
        let count = clamp(info, offset, data.len());
        in_parts(count, self.max_data(), |part| {
            let access = access(region, offset, &part)?;
            let payload = [access.as_bytes(), &data[part]];
            let answer = self.connection.call(COMMAND, &payload, &[])?;
            let rest = self.check(COMMAND, &access, &answer)?.len();
            if rest > 0 {
                let what = format!("no data was expected, and {rest} bytes came");
                return Err(failure::wrong(COMMAND, what));
            }
            self.connection.done(answer);
            Ok(())
        })
    }

    /// Writes to a region without waiting for the device: the write is done before anything that
    /// this thread asks for after it. Tells how many bytes, fewer at the end of the region.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), except that nobody hears what the device says to it.
    pub fn write_posted(&self, region: u32, offset: u64, data: &[u8]) -> Result<usize> {
        let info = self.bounds(region, offset, |info| info.writable)?;
        let count = clamp(info, offset, data.len());
        in_parts(count, self.max_data(), |part| {
            let access = access(region, offset, &part)?;
            let payload = [access.as_bytes(), &data[part]];
            self.connection.post(Command::RegionWrite, &payload)
        })
    }

    /// Writes several times, in this order, and waits until the device has done all of them. Where
    /// the server [can](Self::has_write_multi), they go in one message; else one by one.
    ///
    /// # Errors
    ///
    /// `EINVAL`: one of them has no data or more than 8 bytes, or is not in its region. Nothing is
    /// written then. Else what the server returned for one of them; those before it are done.
    pub fn write_multi(&self, writes: &[RegionWrite<'_>]) -> Result<()> {
        for write in writes {
            let info = self.bounds(write.region, write.offset, |info| info.writable)?;
            let len = write.data.len();
            if len == 0 || len > 8 || clamp(info, write.offset, len) < len {
                let message = format!(
                    "{len} bytes at offset {:#x} of region {} are none, more \
                    than 8, or beyond its end",
                    write.offset, write.region
                );
                return Err(Error::new(Errno::EINVAL, message));
            }
        }
        if !self.has_write_multi() {
            return writes.iter().try_for_each(|write| {
                self.write(write.region, write.offset, write.data).map(drop)
            });
        }
        writes
            .chunks(MOST_WRITES)
            .try_for_each(|writes| self.write_chunk(writes))
    }

    /// Writes as many as go in one message.
    fn write_chunk(&self, writes: &[RegionWrite<'_>]) -> Result<()> {
        const COMMAND: Command = Command::RegionWriteMulti;
        let expected = WriteMulti {
            count: writes.len() as u64,
        };
        let mut entries = Vec::with_capacity(writes.len());
        for write in writes {
            let mut data = [0; 8];
            data[..write.data.len()].copy_from_slice(write.data);
            entries.push(WriteOne {
                offset: write.offset,
                region: write.region,
                count: u32::try_from(write.data.len()).unwrap_or(0),
                data,
            });
        }
        let payload = [expected.as_bytes(), entries.as_bytes()];
        let answer = self.connection.call(COMMAND, &payload, &[])?;
        let (done, _) = fixed::<WriteMulti>(COMMAND, &answer)?;
        self.connection.done(answer);
        if done.count > expected.count {
            let what = format!(
                "{} writes were sent, and {} done",
                expected.count, done.count
            );
            return Err(failure::wrong(COMMAND, what));
        }
        if done.count < expected.count {
            let message = format!(
                "the device has done {} writes of {}",
                done.count, expected.count
            );
            return Err(Error::new(Errno::EIO, message));
        }
        Ok(())
    }

    /// Maps the mappable area which starts at `offset` of a region.
    ///
    /// # Errors
    ///
    /// `EINVAL`: no mappable area starts there. Else, the server's file can't be mapped so.
    pub fn map(&self, region: u32, offset: u64) -> Result<SharedMemory> {
        let area = self
            .region(region)
            .and_then(|info| info.areas.iter().find(|area| area.offset == offset));
        let file = self.layout.files.iter().find(|file| file.region == region);
        let Some((area, file)) = area.zip(file) else {
            let message =
                format!("no mappable area starts at offset {offset:#x} of region {region}");
            return Err(Error::new(Errno::EINVAL, message));
        };
        let failed = |errno: nix::errno::Errno| {
            let place = format!("mapping offset {offset:#x} of region {region}");
            Error::io(place, errno)
        };
        let mapping = file.file.map(file.start + offset, area.size);
        Ok(SharedMemory::of_peer(mapping.map_err(failed)?))
    }

    /// Checks what is the same in the replies to reads and writes, and returns the rest.
    fn check<'a>(
        &self,
        command: Command,
        expected: &RegionAccess,
        answer: &'a Answer,
    ) -> Result<&'a [u8]> {
        let (came, rest) = fixed::<RegionAccess>(command, answer)?;
        if came != *expected {
            let name = |access: &RegionAccess| {
                let RegionAccess {
                    offset,
                    region,
                    count,
                } = access;
                format!("{count} bytes at offset {offset:#x} of region {region}")
            };
            let what = format!(
                "{} were asked for, and {} came",
                name(expected),
                name(&came)
            );
            return Err(failure::wrong(command, what));
        }
        Ok(rest)
    }

    fn bounds(
        &self,
        region: u32,
        offset: u64,
        allowed: impl FnOnce(&RegionInfo) -> bool,
    ) -> Result<&RegionInfo> {
        let info = self
            .region(region)
            .filter(|info| offset < info.size && allowed(info));
        info.ok_or_else(|| {
            let message =
                format!("offset {offset:#x} of region {region} is nothing for this access");
            Error::new(Errno::EINVAL, message)
        })
    }
}

fn access(region: u32, offset: u64, part: &std::ops::Range<usize>) -> Result<RegionAccess> {
    Ok(RegionAccess {
        offset: offset + part.start as u64,
        region,
        // A message has less than 2^32 bytes.
        count: u32::try_from(part.len()).map_err(|_| Errno::EINVAL)?,
    })
}

fn clamp(region: &RegionInfo, offset: u64, count: usize) -> usize {
    usize::try_from(region.size - offset)
        .unwrap_or(usize::MAX)
        .min(count)
}

/// Does an access in parts of `most` bytes; tells how far it came.
fn in_parts(
    count: usize,
    most: usize,
    mut access: impl FnMut(std::ops::Range<usize>) -> Result<()>,
) -> Result<usize> {
    let mut done = 0;
    while done < count {
        let end = count.min(done.saturating_add(most));
        match access(done..end) {
            Ok(()) => done = end,
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done)
}
