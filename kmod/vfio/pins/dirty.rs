// SPDX-License-Identifier: GPL-2.0
//! Which pages of the client's memory were written to, for a client that asks.
//!
//! A write by copy is recorded when it is done. A write through a window is recorded when the page
//! becomes writable there, which is a page fault; a report takes the page out of all windows, so that
//! the next write is another.
//!
//! C headers: `struct vfio_log_ops` in `include/linux/vfio.h`, `include/linux/iova_bitmap.h`.

use super::{Pages, Pins, BATCH, PAGE_SIZE};
use crate::vfio::{bindings, tree::Tree};
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed}, //
};

/// Pages for which one number of `Log::gone` stands, a bit each.
const WORD: usize = 32;
/// Numbers that it may have. A client that makes more of them is told that all was written to.
const MAX_WORDS: u64 = 65_536;

/// What is kept besides the marks in the tree of pins. It changes under `client` only.
#[pin_data]
pub(super) struct Log {
    on: Atomic<bool>,
    /// Written pages that are not pinned any more.
    #[pin]
    gone: Tree,
    words: Atomic<u64>,
    /// One of them could not be kept: all that is asked for is reported.
    lost: Atomic<bool>,
}

impl Log {
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            on: Atomic::new(false),
            gone <- Tree::new(),
            words: Atomic::new(0),
            lost: Atomic::new(false),
        })
    }

    /// Records a write to a page which is in the tree. The caller holds `shown`.
    pub(super) fn record(&self, tree: &Tree, page: usize) {
        if self.on.load(Relaxed) {
            tree.mark(page);
        }
    }

    /// Keeps the record of a page which is not in the tree any more.
    pub(super) fn keep(&self, page: usize) {
        if !self.on.load(Relaxed) {
            return;
        }
        let before = self.gone.load(page / WORD);
        let words = self.words.load(Relaxed) + u64::from(before.is_none());
        let bits = before.unwrap_or(0) | 1 << (page % WORD);
        if words > MAX_WORDS || self.gone.store(page / WORD, bits).is_err() {
            self.lost.store(true, Relaxed);
            return;
        }
        self.words.store(words, Relaxed);
    }

    pub(super) fn stop(&self) {
        self.on.store(false, Relaxed);
        self.lost.store(false, Relaxed);
        while let Some((index, _)) = self.gone.first(0, usize::MAX) {
            self.gone.erase(index);
        }
        self.words.store(0, Relaxed);
    }

    /// Takes the records of pages of a word that lie in a range.
    fn take(&self, word: usize, bits: u64, pages: Pages) -> u64 {
        let inside = (0..WORD).filter(|bit| {
            let page = word * WORD + bit;
            pages.first <= page && page <= pages.last
        });
        let mask = inside.fold(0, |mask, bit| mask | 1 << bit);
        match bits & !mask {
            0 => {
                self.gone.erase(word);
                self.words.fetch_sub(1, Relaxed);
            }
            // An entry is there, so nothing has to be allocated.
            rest => drop(self.gone.store(word, rest)),
        }
        bits & mask
    }
}

/// Where a client wants to be told of written pages.
///
/// # Invariants
///
/// The pointer is valid.
pub(in crate::vfio) struct Report(*mut bindings::iova_bitmap);

impl Report {
    /// # Safety
    ///
    /// `bitmap` must be valid as long as the value is used.
    pub(in crate::vfio) unsafe fn new(bitmap: *mut bindings::iova_bitmap) -> Self {
        // INVARIANT: By the caller.
        Self(bitmap)
    }

    fn set(&self, page: usize, count: usize) {
        let iova = page * PAGE_SIZE;
        // SAFETY: By the invariant. Pages outside of the bitmap are left out there.
        unsafe { bindings::muser_set_dirty(self.0, iova, count * PAGE_SIZE) };
    }
}

impl Pins {
    /// Starts to record which pages are written to.
    ///
    /// # Errors
    ///
    /// `EBUSY`: it has been started.
    pub(in crate::vfio) fn start_log(&self) -> Result {
        let _client = self.client.write_killable()?;
        if self.log.on.load(Relaxed) {
            return Err(EBUSY);
        }
        let _shown = self.shown.write();
        while let Some((index, _)) = self.tree.first_marked(0, usize::MAX) {
            self.tree.unmark(index);
        }
        self.log.on.store(true, Relaxed);
        // What is writable in a window was made so before.
        self.zap(0, Pages::ALL.last);
        Ok(())
    }

    /// Stops it, and forgets what was recorded.
    pub(in crate::vfio) fn stop_log(&self) -> Result {
        let _client = self.client.write_killable()?;
        self.log.stop();
        Ok(())
    }

    /// Reports which pages of a range were written to since the last report, or since the start.
    ///
    /// # Errors
    ///
    /// `EINVAL`: nothing is recorded.
    pub(in crate::vfio) fn report_log(&self, pages: Pages, report: &Report) -> Result {
        let _client = self.client.write_killable()?;
        if !self.log.on.load(Relaxed) {
            return Err(EINVAL);
        }
        if self.log.lost.load(Relaxed) {
            report.set(pages.first, pages.last - pages.first + 1);
        }
        let mut next = pages.first;
        while next <= pages.last {
            let mut batch = [0; BATCH];
            let mut count = 0;
            {
                let _shown = self.shown.write();
                while count < BATCH && next <= pages.last {
                    let Some((index, _)) = self.tree.first_marked(next, pages.last) else {
                        next = pages.last + 1;
                        break;
                    };
                    self.tree.unmark(index);
                    batch[count] = index;
                    count += 1;
                    next = index + 1;
                }
                if let (Some(&first), Some(&last)) = (batch.first(), batch[..count].last()) {
                    self.zap(first, last);
                }
            }
            // The client's bitmap may have to be brought in, which `shown` must not see.
            batch[..count].iter().for_each(|page| report.set(*page, 1));
        }
        let mut word = pages.first / WORD;
        while let Some((found, bits)) = self.log.gone.first(word, pages.last / WORD) {
            let bits = self.log.take(found, bits, pages);
            for bit in (0..WORD).filter(|bit| bits & (1 << bit) != 0) {
                report.set(found * WORD + bit, 1);
            }
            word = found + 1;
        }
        Ok(())
    }
}
