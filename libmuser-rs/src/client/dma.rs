// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory for the device: mapping, unmapping, and what the device wrote to.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::description::{fixed, size};
use super::features::pages;
use super::lent::{Known, Lent, Serial};
use super::{failure, Client, ClientMemory};
use crate::error::{Errno, Error, Result};
use crate::transport::{DmaAccess, IovaRange};
use crate::vfio_user::wire::payload::{take, Bitmap, DmaMap, DmaUnmap};
use crate::vfio_user::wire::Command;

/// Bytes of which the IOVA and the length of a mapping are multiples.
const PAGE: u64 = 4096;

/// # DMA
impl Client {
    /// Maps bytes of `memory` at an IOVA, for the device to use as `access` says.
    ///
    /// The server gets the memory's descriptor, if it has one, and reaches with it all of the file:
    /// for [what it can do with that](ClientMemory::unshared) it is trusted. Else it asks for each
    /// access, which the client answers.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the IOVA or the length is not a multiple of 4096, the length is 0, or there are not
    /// so many bytes. `EOVERFLOW`: it ends beyond 2^64. `EEXIST`: something is mapped there.
    /// `EPERM`: memory that can be read only, for the device to write to. Else what the server
    /// returned, such as `ENOSPC` for too many mappings. If it has not answered in time, the mapping
    /// is there or not; unmap it before you map anything else there.
    pub fn dma_map(
        &self,
        iova: u64,
        memory: &ClientMemory,
        bytes: Range<u64>,
        access: DmaAccess,
    ) -> Result<()> {
        const COMMAND: Command = Command::DmaMap;
        let len = bytes.end.checked_sub(bytes.start);
        let len = len.filter(|_| bytes.end <= memory.len());
        let len = len.ok_or_else(|| {
            let (start, end) = (bytes.start, bytes.end);
            let message = format!("there are no bytes {start:#x} to {end:#x} of memory");
            Error::new(Errno::EINVAL, message)
        })?;
        let range = aligned(iova, len)?;
        if access.writes() && !memory.is_writable() {
            let message = "the memory can't be written to, but the device is to";
            return Err(Error::new(Errno::EPERM, message));
        }
        let file = memory.file();
        let offset = match file {
            Some((_, start)) => start.checked_add(bytes.start).ok_or(Errno::EOVERFLOW)?,
            None => 0,
        };
        if file.is_none() {
            self.have_served()?;
        }
        let lent = Lent {
            range,
            memory: memory.clone(),
            start: bytes.start,
            access,
        };
        // Before the server hears of it: it may use the memory before the reply has come.
        let serial = self.connection.lent().insert(lent).ok_or_else(|| {
            let message = format!("something is mapped at IOVA {iova:#x} or behind it");
            let exists = Errno::new(libc::EEXIST).unwrap_or(Errno::EINVAL);
            Error::new(exists, message)
        })?;
        let map = DmaMap {
            argsz: size::<DmaMap>(),
            flags: flags(access),
            offset,
            address: iova,
            size: len,
        };
        let fds: Vec<_> = file.iter().map(|(file, _)| *file).collect();
        let mapped = self.connection.call(COMMAND, &[map.as_bytes()], &fds);
        let mapped = mapped.and_then(|answer| self.finish(COMMAND, answer));
        let lent = self.connection.lent();
        match &mapped {
            Ok(()) => lent.confirm(serial),
            // A server that has not answered may use it yet.
            Err(error) if error.is_timed_out() => lent.doubt(serial),
            Err(_) => drop(lent.remove(serial)),
        }
        mapped
    }

    /// Unmaps all that lies in a range; tells how many bytes that were. Once it has returned, the
    /// device uses nothing of it any more.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the IOVA or the length is not a multiple of 4096, the length is 0, or a part only
    /// of some mapping lies in the range. `EOVERFLOW`: it ends beyond 2^64. Else what the server
    /// returned for one of the mappings; those before it are unmapped. If it has not answered in
    /// time, the mapping is there or not; unmap it again before you map anything else there.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> Result<u64> {
        let mut unmapped = 0;
        // The protocol unmaps what was mapped, one by one.
        for known in self.mapped(iova, len)? {
            self.unmap(known, None)?;
            unmapped += known.range.len();
        }
        Ok(unmapped)
    }

    /// Unmaps a range as [`dma_unmap`](Self::dma_unmap) does; tells the first IOVA of each page of
    /// 4096 bytes in it to which the device has written since that was
    /// [recorded](Self::start_dirty_log).
    ///
    /// # Errors
    ///
    /// As [`dma_unmap`](Self::dma_unmap). `EOPNOTSUPP`, `EINVAL`: the server can't tell, or has not
    /// recorded it.
    pub fn dma_unmap_dirty(&self, iova: u64, len: u64) -> Result<Vec<u64>> {
        let mut dirty = Vec::new();
        for known in self.mapped(iova, len)? {
            let range = known.range;
            let words = range.len().div_ceil(PAGE).div_ceil(64);
            let bytes = words.checked_mul(8);
            let bytes = bytes.filter(|bytes| *bytes <= self.max_data() as u64);
            let bytes = bytes.ok_or_else(|| {
                let message = format!(
                    "the bitmap of {:#x} bytes is larger than the {} that a message can have",
                    range.len(),
                    self.max_data()
                );
                Error::new(Errno::EOVERFLOW, message)
            })?;
            let bitmap = Bitmap {
                pgsize: PAGE,
                size: bytes,
            };
            dirty.extend(self.unmap(known, Some(bitmap))?);
        }
        Ok(dirty)
    }

    /// Unmaps everything; tells how many bytes that were. What other threads are just mapping may be
    /// mapped after it.
    ///
    /// # Errors
    ///
    /// What the server returned.
    pub fn dma_unmap_all(&self) -> Result<u64> {
        const COMMAND: Command = Command::DmaUnmap;
        let unmap = DmaUnmap {
            argsz: size::<DmaUnmap>(),
            flags: DmaUnmap::ALL,
            ..DmaUnmap::default()
        };
        let lent = self.connection.lent();
        let settled: Vec<Serial> = lent.settled();
        let answer = self.connection.call(COMMAND, &[unmap.as_bytes()], &[]);
        let answer = answer.inspect_err(|error| {
            if error.is_timed_out() {
                settled.iter().for_each(|serial| lent.doubt(*serial));
            }
        })?;
        fixed::<DmaUnmap>(COMMAND, &answer)?;
        self.connection.done(answer);
        let sizes = settled.into_iter().map(|serial| lent.remove(serial));
        Ok(sizes.fold(0, u64::saturating_add))
    }

    /// The mappings in a range.
    fn mapped(&self, iova: u64, len: u64) -> Result<Vec<Known>> {
        let range = aligned(iova, len)?;
        self.connection.lent().within(range).map_err(|errno| {
            let message = format!("a part of a mapping only lies in {len:#x} bytes at {iova:#x}");
            Error::new(errno, message)
        })
    }

    /// Unmaps one mapping; tells which of its pages are dirty, if that is wanted.
    fn unmap(&self, known: Known, bitmap: Option<Bitmap>) -> Result<Vec<u64>> {
        const COMMAND: Command = Command::DmaUnmap;
        let Known { range, serial, .. } = known;
        let lent = self.connection.lent();
        let extra = bitmap.map_or(0, |bitmap| bitmap.size + u64::from(size::<Bitmap>()));
        let unmap = DmaUnmap {
            argsz: u32::try_from(extra + u64::from(size::<DmaUnmap>()))
                .map_err(|_| Errno::EOVERFLOW)?,
            flags: bitmap.map_or(0, |_| DmaUnmap::DIRTY_BITMAP),
            address: range.first(),
            size: range.len(),
        };
        let payload = [
            unmap.as_bytes(),
            bitmap.as_ref().map_or(&[], Bitmap::as_bytes),
        ];
        let answer = match self.connection.call(COMMAND, &payload, &[]) {
            Ok(answer) => answer,
            // It was mapped, or unmapped, by a command to which the server did not answer in time.
            Err(error) if known.doubtful && is_missing(error.errno()) => {
                lent.remove(serial);
                return Ok(Vec::new());
            }
            Err(error) => {
                if error.is_timed_out() {
                    lent.doubt(serial);
                }
                return Err(error);
            }
        };
        let (came, rest) = fixed::<DmaUnmap>(COMMAND, &answer)?;
        if (came.address, came.size) != (unmap.address, unmap.size) {
            let what = format!(
                "{:#x} bytes at {:#x} were to be unmapped, and {:#x} at {:#x} were",
                unmap.size, unmap.address, came.size, came.address
            );
            return Err(failure::wrong(COMMAND, what));
        }
        let dirty = match bitmap {
            Some(bitmap) => {
                let bits = take::<Bitmap>(rest).ok();
                let bits =
                    bits.filter(|(came, bits)| *came == bitmap && bits.len() as u64 == bitmap.size);
                let (_, bits) = bits.ok_or_else(|| {
                    let what = format!("a bitmap of {} bytes was expected", bitmap.size);
                    failure::wrong(COMMAND, what)
                })?;
                pages(range, bits)
            }
            None => Vec::new(),
        };
        self.connection.done(answer);
        lent.remove(serial);
        Ok(dirty)
    }
}

/// Whether a server that answers an unmap with this may mean that nothing is mapped there.
fn is_missing(errno: Errno) -> bool {
    [libc::ENOENT, libc::EINVAL].contains(&errno.number())
}

fn flags(access: DmaAccess) -> u32 {
    let read = if access.reads() { DmaMap::READ } else { 0 };
    let write = if access.writes() { DmaMap::WRITE } else { 0 };
    read | write
}

/// A range of whole pages.
pub(super) fn aligned(iova: u64, len: u64) -> Result<IovaRange> {
    if iova % PAGE != 0 || len % PAGE != 0 {
        let message = format!("{len:#x} bytes at IOVA {iova:#x} are not whole pages of {PAGE}");
        return Err(Error::new(Errno::EINVAL, message));
    }
    let range = IovaRange::new(iova, len)?;
    range.ok_or_else(|| Error::new(Errno::EINVAL, "a range of no bytes is no mapping"))
}
