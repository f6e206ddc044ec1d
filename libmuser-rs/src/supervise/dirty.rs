// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program knew of dirty pages when it died is lost: so whatever it could have written to is
//! reported as dirty, once.

use zerocopy::FromBytes;

use crate::vfio_user::wire::payload::{
    self, Bitmap, DmaUnmap, Feature, LoggingRange, LoggingReport, LoggingStart,
};

/// Ranges more than this are one, from the first to the last.
const MOST: usize = 4096;

/// Where pages may be dirty of which nobody knows.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// First and last IOVA of each range.
    ranges: Vec<(u64, u64)>,
}

impl Lost {
    /// A program is gone that recorded, as the payload of this command told it to.
    pub(super) fn add(&mut self, start: &[u8]) {
        self.ranges = ranges(start).unwrap_or_else(|| vec![(0, u64::MAX)]);
        if self.ranges.len() > MOST {
            let first = self.ranges.iter().map(|(first, _)| *first).min();
            let last = self.ranges.iter().map(|(_, last)| *last).max();
            self.ranges = vec![(first.unwrap_or(0), last.unwrap_or(u64::MAX))];
        }
    }

    /// Nothing is recorded any more.
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Adds what is lost to the reply to a report, which the client knows then.
    pub(super) fn report(&mut self, reply: &mut [u8]) {
        if self.ranges.is_empty() {
            return;
        }
        let Some((fixed, bitmap)) = reply.split_at_mut_checked(size_of::<Feature>()) else {
            return;
        };
        let index = Feature::read_from_bytes(fixed).map(|fixed| fixed.flags & Feature::INDEX);
        if index != Ok(payload::Feature::DMA_LOGGING_REPORT) {
            return;
        }
        let Some((fixed, bitmap)) = bitmap.split_at_mut_checked(size_of::<LoggingReport>()) else {
            return;
        };
        let Ok(report) = LoggingReport::read_from_bytes(fixed) else {
            return;
        };
        self.mark(report.iova, report.length, report.page_size, bitmap);
    }

    /// Adds what is lost to the reply to DMA_UNMAP, if the client wanted a bitmap.
    pub(super) fn unmapped(&mut self, reply: &mut [u8]) {
        if self.ranges.is_empty() {
            return;
        }
        let Ok((unmap, _)) = DmaUnmap::read_from_prefix(reply) else {
            return;
        };
        if unmap.flags & DmaUnmap::DIRTY_BITMAP == 0 {
            return;
        }
        let Some(rest) = reply.get_mut(size_of::<DmaUnmap>()..) else {
            return;
        };
        let Some((fixed, bitmap)) = rest.split_at_mut_checked(size_of::<Bitmap>()) else {
            return;
        };
        if let Ok(fixed) = Bitmap::read_from_bytes(fixed) {
            self.mark(unmap.address, unmap.size, fixed.pgsize, bitmap);
        }
    }

    /// Marks the pages of a bitmap that may be dirty.
    fn mark(&mut self, iova: u64, length: u64, page: u64, bitmap: &mut [u8]) {
        let Some(last) = length
            .checked_sub(1)
            .and_then(|last| iova.checked_add(last))
        else {
            return;
        };
        if page == 0 {
            return;
        }
        for (from, to) in &self.ranges {
            let (from, to) = ((*from).max(iova), (*to).min(last));
            if from > to {
                continue;
            }
            let pages = (from - iova) / page..=(to - iova) / page;
            for number in pages {
                let byte = usize::try_from(number / 8).unwrap_or(usize::MAX);
                let Some(byte) = bitmap.get_mut(byte) else {
                    break;
                };
                *byte |= 1 << (number % 8);
            }
        }
        self.known(iova, last);
    }

    /// The client knows of these.
    fn known(&mut self, first: u64, last: u64) {
        let ranges = std::mem::take(&mut self.ranges);
        for (from, to) in ranges {
            if to < first || from > last {
                self.ranges.push((from, to));
                continue;
            }
            if from < first {
                self.ranges.push((from, first - 1));
            }
            if to > last {
                self.ranges.push((last + 1, to));
            }
        }
    }
}

/// What was to be recorded; `None` if that is everything.
fn ranges(start: &[u8]) -> Option<Vec<(u64, u64)>> {
    let (_, rest) = Feature::read_from_prefix(start).ok()?;
    let (fixed, rest) = LoggingStart::read_from_prefix(rest).ok()?;
    let count = usize::try_from(fixed.num_ranges).ok()?;
    let ranges = rest.chunks_exact(size_of::<LoggingRange>()).take(count);
    let ranges = ranges.filter_map(|range| {
        let range = LoggingRange::read_from_bytes(range).ok()?;
        let last = range.length.checked_sub(1)?;
        Some((range.iova, range.iova.saturating_add(last)))
    });
    let ranges: Vec<_> = ranges.collect();
    (!ranges.is_empty()).then_some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn start(all: &[(u64, u64)]) -> Vec<u8> {
        let fixed = LoggingStart {
            page_size: 4096,
            num_ranges: u32::try_from(all.len()).unwrap(),
            reserved: 0,
        };
        let mut bytes = vec![0; size_of::<Feature>()];
        bytes.extend(fixed.as_bytes());
        for (iova, length) in all {
            let (iova, length) = (*iova, *length);
            bytes.extend(LoggingRange { iova, length }.as_bytes());
        }
        bytes
    }

    #[test]
    fn lost_pages_are_dirty_once() {
        let mut lost = Lost::default();
        lost.add(&start(&[(0x1000, 0x3000)]));

        let mut bitmap = [0; 1];
        lost.mark(0, 0x3000, 0x1000, &mut bitmap);
        assert_eq!(bitmap, [0b110]);
        let mut bitmap = [0; 1];
        lost.mark(0, 0x8000, 0x1000, &mut bitmap);
        assert_eq!(bitmap, [0b1000]);
        let mut bitmap = [0; 1];
        lost.mark(0, 0x8000, 0x1000, &mut bitmap);
        assert_eq!(bitmap, [0]);
    }

    #[test]
    fn reply_to_a_report_is_marked() {
        let mut lost = Lost::default();
        lost.add(&start(&[]));
        let feature = Feature {
            argsz: 40,
            flags: Feature::GET | Feature::DMA_LOGGING_REPORT,
        };
        let report = LoggingReport {
            iova: 0x10_0000,
            length: 0x2000,
            page_size: 0x1000,
        };
        let mut reply = [feature.as_bytes(), report.as_bytes(), &[0; 8]].concat();

        lost.report(&mut reply);

        assert_eq!(reply[reply.len() - 8..], [0b11, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn report_of_any_shape_does_not_panic() {
        let mut lost = Lost::default();
        for (iova, length, page) in [
            (u64::MAX, u64::MAX, 0),
            (0, u64::MAX, 1),
            (u64::MAX, 1, u64::MAX),
            (1, 0, 4096),
        ] {
            lost.add(&start(&[(0, u64::MAX), (u64::MAX, 1)]));
            lost.mark(iova, length, page, &mut [0; 3]);
        }
        lost.report(&mut [0; 3]);
        lost.report(&mut [0xff; 40]);
    }

    #[test]
    fn lost_pages_are_dirty_in_the_bitmap_of_an_unmapping() {
        let mut lost = Lost::default();
        lost.add(&start(&[(0x1000, 0x2000)]));
        let reply = |flags| {
            let unmap = DmaUnmap {
                argsz: 41,
                flags,
                address: 0,
                size: 0x8000,
            };
            let bitmap = Bitmap {
                pgsize: 4096,
                size: 1,
            };
            [unmap.as_bytes(), bitmap.as_bytes(), &[0x80]].concat()
        };

        let mut without = reply(0);
        lost.unmapped(&mut without);
        assert_eq!(without, reply(0));
        let mut with = reply(DmaUnmap::DIRTY_BITMAP);
        lost.unmapped(&mut with);
        assert_eq!(with.last(), Some(&0x86));
        lost.unmapped(&mut [0xff; 30]);
    }
}
