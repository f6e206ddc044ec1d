// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Features of the device: the record of what it writes.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::description::{fixed, size};
use super::dma::aligned;
use super::{failure, Client};
use crate::error::{Errno, Error, Result};
use crate::transport::IovaRange;
use crate::vfio_user::wire::payload::{take, Feature, LoggingRange, LoggingReport, LoggingStart};
use crate::vfio_user::wire::{Command, AROUND_DATA};

const COMMAND: Command = Command::DeviceFeature;
/// Bytes for which there is one bit.
const PAGE: u64 = 4096;
/// Ranges in one message.
const MOST_RANGES: usize = (AROUND_DATA - 64) / size_of::<LoggingRange>();

/// # Features
impl Client {
    /// Whether the device has a feature of `<linux/vfio.h>` (`VFIO_DEVICE_FEATURE_*`), of which the
    /// data can be got, set, or both.
    ///
    /// # Errors
    ///
    /// The connection is at its end, or the server does not answer.
    pub fn has_feature(&self, index: u16, get: bool, set: bool) -> Result<bool> {
        let get = if get { Feature::GET } else { 0 };
        let set = if set { Feature::SET } else { 0 };
        match self.feature(
            Feature::PROBE | get | set | u32::from(index),
            &[],
            0,
            |_| Ok(()),
        ) {
            Ok(()) => Ok(true),
            Err(error)
                if error.is_disconnected() || error.is_timed_out() || error.is_protocol() =>
            {
                Err(error)
            }
            Err(_) => Ok(false),
        }
    }

    /// Starts to record to which pages of the ranges the device writes; of none at all, everywhere.
    /// Tells the bytes of a page that the server has chosen, when 4096 are wished for.
    ///
    /// # Errors
    ///
    /// `EINVAL`: a range is not of whole pages of 4096 bytes, or there are too many. Else what the
    /// server returned: `EBUSY` or `EINVAL` if it records already, `EOPNOTSUPP` if it can't.
    pub fn start_dirty_log(&self, ranges: &[Range<u64>]) -> Result<u64> {
        if ranges.len() > MOST_RANGES {
            let message = format!("{} ranges are more than {MOST_RANGES}", ranges.len());
            return Err(Error::new(Errno::EINVAL, message));
        }
        let start = LoggingStart {
            page_size: PAGE,
            num_ranges: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            reserved: 0,
        };
        let ranges = ranges.iter().map(|range| {
            let range = aligned(range.start, range.end.saturating_sub(range.start))?;
            Ok(LoggingRange {
                iova: range.first(),
                length: range.len(),
            })
        });
        let ranges = ranges.collect::<Result<Vec<_>>>()?;
        let data = [start.as_bytes(), ranges.as_bytes()].concat();
        let flags = Feature::SET | Feature::DMA_LOGGING_START;
        self.feature(flags, &data, data.len(), |came| {
            let (came, _) = take::<LoggingStart>(came)
                .map_err(|malformed| failure::wrong(COMMAND, malformed))?;
            if !came.page_size.is_power_of_two() {
                let what = format!("pages of {} bytes", came.page_size);
                return Err(failure::wrong(COMMAND, what));
            }
            Ok(came.page_size)
        })
    }

    /// Ends the record.
    ///
    /// # Errors
    ///
    /// What the server returned.
    pub fn stop_dirty_log(&self) -> Result<()> {
        let flags = Feature::SET | Feature::DMA_LOGGING_STOP;
        self.feature(flags, &[], 0, |_| Ok(()))
    }

    /// First IOVA of each page of 4096 bytes in a range to which the device has written since the
    /// record was started or somebody asked, ascending.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the range is not of whole pages, or nothing is recorded. Else what the server
    /// returned.
    pub fn dirty_pages(&self, iovas: Range<u64>) -> Result<Vec<u64>> {
        let range = aligned(iovas.start, iovas.end.saturating_sub(iovas.start))?;
        // As many as a bitmap in one message has bits for, in words of 64.
        let most = (self.max_data() as u64 / 8).max(1) * 64 * PAGE;
        let mut found = Vec::new();
        let mut at = range.first();
        loop {
            let left = range.last() - at;
            let len = left.saturating_add(1).min(most);
            let part = aligned(at, len)?;
            found.extend(self.report(part)?);
            if left < most {
                return Ok(found);
            }
            at += len;
        }
    }

    fn report(&self, range: IovaRange) -> Result<Vec<u64>> {
        let question = LoggingReport {
            iova: range.first(),
            length: range.len(),
            page_size: PAGE,
        };
        let bytes = usize::try_from(range.len().div_ceil(PAGE).div_ceil(64) * 8)
            .map_err(|_| Errno::EOVERFLOW)?;
        let flags = Feature::GET | Feature::DMA_LOGGING_REPORT;
        let room = size_of::<LoggingReport>() + bytes;
        self.feature(flags, question.as_bytes(), room, |came| {
            let report = take::<LoggingReport>(came).ok();
            let bits = report.filter(|(came, bits)| *came == question && bits.len() == bytes);
            let (_, bits) = bits.ok_or_else(|| {
                let what = format!("a bitmap of {bytes} bytes was expected");
                failure::wrong(COMMAND, what)
            })?;
            Ok(pages(range, bits))
        })
    }

    /// Does something with a feature, whose data in the reply has `room` bytes at most.
    fn feature<T>(
        &self,
        flags: u32,
        data: &[u8],
        room: usize,
        parse: impl FnOnce(&[u8]) -> Result<T>,
    ) -> Result<T> {
        let argsz = u32::try_from(room).map_err(|_| Errno::EOVERFLOW)?;
        let feature = Feature {
            argsz: argsz.saturating_add(size::<Feature>()),
            flags,
        };
        let payload = [feature.as_bytes(), data];
        let answer = self.connection.call(COMMAND, &payload, &[])?;
        let (came, rest) = fixed::<Feature>(COMMAND, &answer)?;
        if came.flags != flags {
            let what = format!("flags {flags:#x} were expected, and {:#x} came", came.flags);
            return Err(failure::wrong(COMMAND, what));
        }
        let parsed = parse(rest)?;
        self.connection.done(answer);
        Ok(parsed)
    }
}

/// First IOVA of each page of a range of which the bit is set.
pub(super) fn pages(range: IovaRange, bits: &[u8]) -> Vec<u64> {
    let mut found = Vec::new();
    let count = range.len().div_ceil(PAGE);
    for (word, bytes) in (0_u64..).zip(bits.chunks_exact(8)) {
        let bytes: [u8; 8] = bytes.try_into().unwrap_or_default();
        let mut bits = u64::from_ne_bytes(bytes);
        while bits != 0 {
            let page = word * 64 + u64::from(bits.trailing_zeros());
            // What is beyond the range is none of it, whatever its bits are.
            if page < count {
                found.push(range.first() + page * PAGE);
            }
            bits &= bits - 1;
        }
    }
    found
}
