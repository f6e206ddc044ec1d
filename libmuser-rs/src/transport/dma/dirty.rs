// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pages of the client's memory the device has written to.
//!
//! A page is marked by the slice through which it is written, after the write: whoever takes a mark
//! away and then looks at the page sees what was written before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// Bytes for which there is one mark.
pub(crate) const PAGE: u64 = 4096;
const PAGE_SHIFT: u32 = PAGE.trailing_zeros();

/// The marks of one mapping. Room is made for them as they are set.
#[derive(Debug, Default)]
pub(crate) struct DirtyPages {
    blocks: Box<[OnceLock<Box<Block>>]>,
}

const WORDS: usize = 512;
const PAGES_OF_WORD: usize = u64::BITS as usize;
const PAGES_OF_BLOCK: usize = WORDS * PAGES_OF_WORD;

type Block = [AtomicU64; WORDS];

impl DirtyPages {
    /// Marks for so many bytes, none of which is set.
    pub(crate) fn new(len: u64) -> Self {
        let pages = usize::try_from(len.div_ceil(PAGE)).unwrap_or(usize::MAX);
        let blocks = (0..pages.div_ceil(PAGES_OF_BLOCK)).map(|_| OnceLock::new());
        Self {
            blocks: blocks.collect(),
        }
    }

    /// Marks the pages in which these bytes lie.
    pub(crate) fn mark(&self, offset: usize, len: usize) {
        let Some(past_first) = len.checked_sub(1) else {
            return;
        };
        let last = offset.saturating_add(past_first) >> PAGE_SHIFT;
        let mut page = offset >> PAGE_SHIFT;
        while page <= last {
            let bit = page % PAGES_OF_WORD;
            let count = (last - page + 1).min(PAGES_OF_WORD - bit);
            let Some(block) = self.blocks.get(page / PAGES_OF_BLOCK) else {
                return;
            };
            let block = block.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            // A read-modify-write, also where the bit is set already: what was written before it is
            // seen by whoever clears the bit after it.
            block[page / PAGES_OF_WORD % WORDS].fetch_or(mask(bit, count), Ordering::Release);
            page += count;
        }
    }

    /// Hands out the pages which are marked among those from `first` to `last`, by number, and
    /// takes the marks away if `clear` says so.
    pub(crate) fn harvest(
        &self,
        first: usize,
        last: usize,
        clear: bool,
        mut found: impl FnMut(usize),
    ) {
        let mut page = first;
        while page <= last {
            let number = page / PAGES_OF_BLOCK;
            let Some(block) = self.blocks.get(number) else {
                return;
            };
            let Some(block) = block.get() else {
                page = (number + 1) * PAGES_OF_BLOCK;
                continue;
            };
            let bit = page % PAGES_OF_WORD;
            let count = (last - page + 1).min(PAGES_OF_WORD - bit);
            let word = &block[page / PAGES_OF_WORD % WORDS];
            let wanted = mask(bit, count);
            let bits = if clear {
                word.fetch_and(!wanted, Ordering::Acquire)
            } else {
                word.load(Ordering::Acquire)
            };
            let mut bits = bits & wanted;
            while bits != 0 {
                found(page - bit + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
            page += count;
        }
    }

    fn is_marked(&self, offset: usize) -> bool {
        let mut marked = false;
        let page = offset >> PAGE_SHIFT;
        self.harvest(page, page, false, |_| marked = true);
        marked
    }
}

/// `count` ones from bit `start` on. They are one at least, and end within the word.
const fn mask(start: usize, count: usize) -> u64 {
    (u64::MAX >> (PAGES_OF_WORD - count)) << start
}

/// What a [`VolatileSlice`](vm_memory::VolatileSlice) of the client's memory marks when it is
/// written to.
///
/// With some transports that is nothing, since the other end records the writes itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct DirtyLog<'a> {
    pages: Option<&'a DirtyPages>,
    /// Where the slice starts in the mapping.
    start: usize,
}

impl<'a> DirtyLog<'a> {
    /// For memory of which the other end records the writes.
    pub(crate) const ELSEWHERE: DirtyLog<'static> = DirtyLog {
        pages: None,
        start: 0,
    };

    pub(crate) const fn new(pages: &'a DirtyPages, start: usize) -> Self {
        Self {
            pages: Some(pages),
            start,
        }
    }
}

impl<'a> WithBitmapSlice<'_> for DirtyLog<'a> {
    type S = DirtyLog<'a>;
}

impl BitmapSlice for DirtyLog<'_> {}

impl<'a> Bitmap for DirtyLog<'a> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(pages) = self.pages {
            pages.mark(self.start.saturating_add(offset), len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages
            .is_some_and(|pages| pages.is_marked(self.start.saturating_add(offset)))
    }

    fn slice_at(&self, offset: usize) -> DirtyLog<'a> {
        DirtyLog {
            pages: self.pages,
            start: self.start.saturating_add(offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: usize = 3 * PAGES_OF_BLOCK / 2;

    fn marks(pages: &DirtyPages, clear: bool) -> Vec<usize> {
        let mut found = Vec::new();
        pages.harvest(0, usize::MAX - 1, clear, |page| found.push(page));
        found
    }

    #[test]
    fn bytes_mark_the_pages_they_touch() {
        let pages = DirtyPages::new(PAGE * PAGES as u64);

        pages.mark(4095, 2);

        assert_eq!(marks(&pages, true), [0, 1]);
        assert!(marks(&pages, true).is_empty());
    }

    #[test]
    fn nothing_written_marks_nothing() {
        let pages = DirtyPages::new(PAGE * 2);

        pages.mark(0, 0);
        pages.mark(usize::MAX, 0);

        assert!(marks(&pages, false).is_empty());
    }

    #[test]
    fn bytes_beyond_the_end_are_no_matter() {
        let pages = DirtyPages::new(PAGE);

        pages.mark(usize::MAX - 1, usize::MAX);
        pages.mark(PAGES_OF_BLOCK << PAGE_SHIFT, 1);

        assert!(marks(&pages, false).is_empty());
    }

    proptest! {
        #[test]
        fn marks_are_those_of_a_set(
            steps in prop::collection::vec((0..PAGES, 0..200_usize, any::<bool>()), 1..40)
        ) {
            let pages = DirtyPages::new(PAGE * PAGES as u64);
            let mut model = BTreeSet::new();
            for (first, count, mark) in steps {
                let end = (first + count).min(PAGES);
                if mark {
                    pages.mark(first << PAGE_SHIFT, (end - first) << PAGE_SHIFT);
                    model.extend(first..end);
                } else if end > first {
                    let mut found = Vec::new();
                    pages.harvest(first, end - 1, true, |page| found.push(page));
                    let expected: Vec<_> = model.range(first..end).copied().collect();
                    prop_assert_eq!(found, expected);
                    model.retain(|page| !(first..end).contains(page));
                }
                let expected: Vec<_> = model.iter().copied().collect();
                prop_assert_eq!(marks(&pages, false), expected);
            }
        }
    }
}
