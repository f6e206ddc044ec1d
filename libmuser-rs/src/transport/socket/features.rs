// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `DEVICE_FEATURE`: the record of what the device has written.
//!
//! It is always kept, for each page of 4096 bytes; a client that starts it begins with an empty one.

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::commands::Refusal;
use super::hub::State;
use super::infos::size_of_u32;
use super::session::{ReplyTo, MAX_DATA};
use crate::error::Errno;
use crate::transport::dma::DmaTable;
use crate::vfio_user::wire::payload::{self, take};
use crate::vfio_user::wire::request::Feature;

/// Bytes for which there is a mark.
const PAGE: u64 = 4096;
/// Bits of a word of a bitmap.
const WORD: u64 = 64;

fn wrong(why: &str) -> Refusal {
    Refusal::new(Errno::EINVAL, why)
}

impl State {
    pub(super) fn feature(&mut self, to: ReplyTo, asked: Feature<'_>) -> Result<(), Refusal> {
        let (gets, sets) = match u32::from(asked.index) {
            payload::Feature::DMA_LOGGING_START | payload::Feature::DMA_LOGGING_STOP => {
                (false, true)
            }
            payload::Feature::DMA_LOGGING_REPORT => (true, false),
            index => {
                let why = format!("there is no feature {index}");
                return Err(Refusal::new(Errno::EOPNOTSUPP, why));
            }
        };
        if (asked.get && !gets) || (asked.set && !sets) {
            return Err(wrong("the feature can't be got, or can't be set"));
        }
        let mut flags = u32::from(asked.index);
        for (is, flag) in [
            (asked.get, payload::Feature::GET),
            (asked.set, payload::Feature::SET),
            (asked.probe, payload::Feature::PROBE),
        ] {
            flags |= if is { flag } else { 0 };
        }
        if asked.probe {
            return self.reply_feature(to, flags, asked.argsz, asked.data, &[]);
        }
        match u32::from(asked.index) {
            payload::Feature::DMA_LOGGING_START => {
                let start = self.start_logging(asked.data)?;
                let ranges = &asked.data[size_of::<payload::LoggingStart>()..];
                self.reply_feature(to, flags, asked.argsz, start.as_bytes(), ranges)
            }
            payload::Feature::DMA_LOGGING_STOP => {
                self.logging = false;
                self.reply_feature(to, flags, asked.argsz, asked.data, &[])
            }
            _ => self.report(to, flags, asked),
        }
    }

    fn start_logging(&mut self, data: &[u8]) -> Result<payload::LoggingStart, Refusal> {
        let malformed = |_| wrong("the ranges to be recorded are not all there");
        let (start, ranges) = take::<payload::LoggingStart>(data).map_err(malformed)?;
        let ranges = <[payload::LoggingRange]>::ref_from_bytes(ranges);
        let ranges = ranges.map_err(|_| wrong("the ranges to be recorded are not all there"))?;
        if ranges.len() as u64 != u64::from(start.num_ranges) {
            return Err(wrong("there are not as many ranges as it counts"));
        }
        if !start.page_size.is_power_of_two() || start.reserved != 0 {
            return Err(wrong("the page size is no power of two"));
        }
        let end = |range: &payload::LoggingRange| range.iova.checked_add(range.length);
        if ranges
            .iter()
            .any(|range| range.length == 0 || end(range).is_none())
        {
            return Err(wrong(
                "a range to be recorded is empty, or ends beyond 2^64",
            ));
        }
        if !self.logging {
            // What is outside of the ranges is recorded too, which no client is told of.
            let _ = self.dma.dirty_pages(0..u64::MAX, true);
            self.logging = true;
        }
        Ok(payload::LoggingStart {
            page_size: PAGE,
            ..start
        })
    }

    fn report(&mut self, to: ReplyTo, flags: u32, asked: Feature<'_>) -> Result<(), Refusal> {
        let malformed = |_| wrong("it does not say which range it is about");
        let (report, rest) = take::<payload::LoggingReport>(asked.data).map_err(malformed)?;
        if !self.logging {
            return Err(wrong("nothing was recorded"));
        }
        if !rest.is_empty() {
            return Err(wrong("there is more than a range"));
        }
        let payload::LoggingReport {
            iova,
            length,
            page_size,
        } = report;
        let end = iova.checked_add(length).filter(|_| length > 0);
        let end = end.ok_or_else(|| wrong("the range is empty, or ends beyond 2^64"))?;
        let size = bitmap_size(length, page_size)?;
        let around = size_of::<payload::Feature>() + size_of::<payload::LoggingReport>();
        let has_room = asked.argsz as usize >= around + size;
        let bitmap = if has_room {
            // What is reported is not dirty any more.
            bitmap(&self.dma, iova..end, page_size, size)
        } else {
            Vec::new()
        };
        let full = u32::try_from(around + size).unwrap_or(u32::MAX);
        self.reply_feature(to, flags, full, report.as_bytes(), &bitmap)
    }

    fn reply_feature(
        &mut self,
        to: ReplyTo,
        flags: u32,
        argsz: u32,
        data: &[u8],
        more: &[u8],
    ) -> Result<(), Refusal> {
        let fixed = payload::Feature { argsz, flags };
        self.reply_to(to, Ok(&[fixed.as_bytes(), data, more]));
        Ok(())
    }

    /// The bitmap of memory that is unmapped, as far as the client wants one and has room for it.
    pub(super) fn check_bitmap(
        &self,
        wanted: payload::Bitmap,
        argsz: u32,
        length: u64,
    ) -> Result<(), Refusal> {
        let size = bitmap_size(length, wanted.pgsize)? as u64;
        let around = size_of_u32::<payload::DmaUnmap>() + size_of_u32::<payload::Bitmap>();
        let room = u64::from(argsz).saturating_sub(around.into());
        if wanted.size < size || room < size {
            return Err(wrong("the bitmap of dirty pages has no room in the reply"));
        }
        Ok(())
    }
}

/// Bytes of the bitmap of a range.
pub(super) fn bitmap_size(length: u64, page_size: u64) -> Result<usize, Refusal> {
    if !page_size.is_power_of_two() {
        return Err(wrong("the page size is no power of two"));
    }
    let bytes = length.div_ceil(page_size).div_ceil(WORD).checked_mul(8);
    let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
    let bytes = bytes.filter(|bytes| *bytes <= MAX_DATA);
    bytes.ok_or_else(|| {
        let why = "the bitmap of dirty pages is larger than a message";
        Refusal::new(Errno::new(libc::E2BIG).unwrap_or(Errno::EINVAL), why)
    })
}

/// The bitmap of a range, of so many bytes; the marks are taken away.
pub(super) fn bitmap(dma: &DmaTable, range: Range<u64>, page_size: u64, size: usize) -> Vec<u8> {
    let mut words = vec![0_u64; size / 8];
    for page in dma.dirty_pages(range.clone(), true) {
        // A page may lie in the range with a part of it only.
        let first = page.max(range.start) - range.start;
        let last = page.saturating_add(PAGE - 1).min(range.end - 1) - range.start;
        for bit in first / page_size..=last / page_size {
            let word = usize::try_from(bit / WORD).unwrap_or(usize::MAX);
            if let Some(word) = words.get_mut(word) {
                *word |= 1 << (bit % WORD);
            }
        }
    }
    words.as_bytes().to_vec()
}
