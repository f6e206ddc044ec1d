// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is known to be pinned, as far as nothing has gone away since.

use std::collections::BTreeMap;

use crate::transport::dma::{DmaAccess, IovaRange};

/// Ranges that are remembered; a device that touches more scattered places than this asks the kernel
/// again.
const MOST: usize = 4096;
/// What the kernel pins at a time.
const PAGE: u64 = 4096;

/// Pages that are pinned, for reading and for writing.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The generation for which all of it is true.
    generation: u64,
    readable: Ranges,
    writable: Ranges,
}

impl Known {
    /// Whether all of a range is pinned, if the generation is this.
    pub(super) fn has(&self, range: IovaRange, access: DmaAccess, generation: u64) -> bool {
        self.generation == generation
            && (!access.reads() || self.readable.contain(range))
            && (!access.writes() || self.writable.contain(range))
    }

    /// Notes that a range was pinned at that generation or later.
    pub(super) fn add(&mut self, range: IovaRange, access: DmaAccess, generation: u64) {
        if generation < self.generation {
            return;
        }
        if generation > self.generation {
            self.clear();
            self.generation = generation;
        }
        // The kernel pins for writing in addition to reading.
        self.readable.insert(range);
        if access.writes() {
            self.writable.insert(range);
        }
    }

    pub(super) fn clear(&mut self) {
        self.readable.0.clear();
        self.writable.0.clear();
    }
}

/// Whole pages: the last by the first of each run.
///
/// # Invariants
///
/// Runs neither overlap nor touch.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn contain(&self, range: IovaRange) -> bool {
        let (first, last) = pages(range);
        let run = self.0.range(..=first).next_back();
        run.is_some_and(|(_, end)| last <= *end)
    }

    fn insert(&mut self, range: IovaRange) {
        let (mut first, mut last) = pages(range);
        // Runs that overlap it or touch it become one with it: from the last one backwards.
        while let Some((&start, &end)) = self.0.range(..=last.saturating_add(1)).next_back() {
            if end.saturating_add(1) < first {
                break;
            }
            self.0.remove(&start);
            first = first.min(start);
            last = last.max(end);
        }
        if self.0.len() == MOST {
            self.0.clear();
        }
        self.0.insert(first, last);
    }
}

const fn pages(range: IovaRange) -> (u64, u64) {
    (range.first() / PAGE, range.last() / PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn range(first: u64, pages: u64) -> IovaRange {
        IovaRange::between(first * PAGE, (first + pages) * PAGE - 1)
    }

    #[test]
    fn generation_that_passed_is_forgotten() {
        let mut known = Known::default();
        known.add(range(0, 4), DmaAccess::ReadWrite, 3);

        known.add(range(9, 1), DmaAccess::ReadWrite, 2);
        assert!(known.has(range(0, 4), DmaAccess::Write, 3));
        assert!(!known.has(range(0, 4), DmaAccess::Write, 4));
        assert!(!known.has(range(9, 1), DmaAccess::Read, 2));

        known.add(range(9, 1), DmaAccess::Read, 4);
        assert!(!known.has(range(0, 1), DmaAccess::Read, 4));
        assert!(known.has(range(9, 1), DmaAccess::Read, 4));
        assert!(!known.has(range(9, 1), DmaAccess::Write, 4));
    }

    #[test]
    fn page_is_known_as_a_whole() {
        let mut known = Known::default();
        known.add(IovaRange::between(0x1ffe, 0x2001), DmaAccess::Write, 0);

        assert!(known.has(range(1, 2), DmaAccess::ReadWrite, 0));
        assert!(!known.has(IovaRange::between(0x1000, 0x3000), DmaAccess::Read, 0));
    }

    #[test]
    fn last_page_of_all_can_be_known() {
        let mut known = Known::default();
        let top = IovaRange::between(u64::MAX - 5, u64::MAX);

        known.add(top, DmaAccess::Read, 0);
        known.add(top, DmaAccess::Read, 0);

        assert!(known.has(top, DmaAccess::Read, 0));
    }

    #[test]
    fn scattered_places_are_not_remembered_without_end() {
        let mut known = Known::default();
        for place in 0..3 * MOST as u64 {
            known.add(range(2 * place, 1), DmaAccess::Read, 0);
        }

        assert!(known.readable.0.len() <= MOST);
    }

    proptest! {
        #[test]
        fn ranges_are_those_of_a_set(added in prop::collection::vec((0..60_u64, 1..9_u64), 0..30)) {
            let mut known = Known::default();
            let mut model = BTreeSet::new();
            for (first, count) in added {
                known.add(range(first, count), DmaAccess::Read, 0);
                model.extend(first..first + count);
            }
            for first in 0..64 {
                for count in 1..6 {
                    let expected = (first..first + count).all(|page| model.contains(&page));
                    prop_assert_eq!(known.has(range(first, count), DmaAccess::Read, 0), expected);
                }
            }
            let runs: Vec<_> = known.readable.0.into_iter().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
        }
    }
}
