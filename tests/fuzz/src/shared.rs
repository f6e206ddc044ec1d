// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What all fuzzing processes write down together: what they called and how often it succeeded,
//! where they are, which points of the module they passed.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::Words;

/// Most kinds of operation.
pub(crate) const KINDS: usize = 64;
/// Most workers.
pub(crate) const WORKERS: usize = 16;
/// Most bytes of module text of which points are remembered, a bit a byte.
const TEXT: usize = 1 << 20;

const OK: usize = KINDS;
const ERRNO: usize = 2 * KINDS;
const PLACE: usize = 3 * KINDS;
/// Address of the module's text, its bytes, what the module can do, and how much was found.
const BASE: usize = PLACE + 2 * WORKERS;
const COVERED: usize = BASE + 4;
const LEN: usize = COVERED + TEXT / 64;

/// The memory in which it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared(Words);

impl Shared {
    /// Makes the file, or joins it.
    pub(crate) fn open(path: &str) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_len((LEN * 8) as u64)?;
        Words::map(&file, LEN).map(Self)
    }

    fn word(&self, at: usize) -> &'static AtomicU64 {
        &self.0.all()[at]
    }

    /// Notes what a worker is about to do, and since when.
    pub(crate) fn begin(&self, worker: usize, kind: usize, now: u64) {
        self.word(PLACE + 2 * worker + 1)
            .store(kind as u64, Ordering::Relaxed);
        self.word(PLACE + 2 * worker).store(now, Ordering::Relaxed);
    }

    /// Since when a worker does what it does, and what that is.
    pub(crate) fn place(&self, worker: usize) -> (u64, usize) {
        let since = self.word(PLACE + 2 * worker).load(Ordering::Relaxed);
        let kind = self.word(PLACE + 2 * worker + 1).load(Ordering::Relaxed);
        (since, usize::try_from(kind).unwrap_or(0))
    }

    /// Counts an operation.
    pub(crate) fn count(&self, kind: usize, result: &io::Result<u64>) {
        self.word(kind).fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(_) => {
                self.word(OK + kind).fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                let errno = muser_e2e::check::errno_of(error).unsigned_abs();
                self.word(ERRNO + kind)
                    .store(errno.into(), Ordering::Relaxed);
            }
        }
    }

    /// How an operation failed when it last did, or 0.
    pub(crate) fn errno(&self, kind: usize) -> i32 {
        i32::try_from(self.word(ERRNO + kind).load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// How often an operation was tried, and how often it succeeded.
    pub(crate) fn counts(&self, kind: usize) -> (u64, u64) {
        let load = |at| self.word(at).load(Ordering::Relaxed);
        (load(kind), load(OK + kind))
    }

    /// Says where the module's text is.
    pub(crate) fn set_text(&self, start: u64, len: u64) {
        self.word(BASE + 1)
            .store(len.min(TEXT as u64), Ordering::Relaxed);
        self.word(BASE).store(start, Ordering::Relaxed);
    }

    /// Says what the module can do.
    pub(crate) fn set_ability(&self, bits: u64) {
        self.word(BASE + 2).store(bits, Ordering::Relaxed);
    }

    /// What the module can do.
    pub(crate) fn ability(&self) -> u64 {
        self.word(BASE + 2).load(Ordering::Relaxed)
    }

    /// Notes that the kernel did what it must not.
    pub(crate) fn find(&self) {
        self.word(BASE + 3).fetch_add(1, Ordering::Relaxed);
    }

    /// How often it did.
    pub(crate) fn findings(&self) -> u64 {
        self.word(BASE + 3).load(Ordering::Relaxed)
    }

    /// Notes that a task passed this address.
    pub(crate) fn cover(&self, address: u64) {
        let start = self.word(BASE).load(Ordering::Relaxed);
        let offset = address.wrapping_sub(start);
        if offset < self.word(BASE + 1).load(Ordering::Relaxed) {
            let word = self.word(COVERED + (offset / 64) as usize);
            let bit = 1 << (offset % 64);
            // Most are set already, and a load costs the other processes nothing.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether a task passed this offset of the module's text.
    pub(crate) fn is_covered(&self, offset: u64) -> bool {
        offset < TEXT as u64
            && self
                .word(COVERED + (offset / 64) as usize)
                .load(Ordering::Relaxed)
                & 1 << (offset % 64)
                != 0
    }
}
