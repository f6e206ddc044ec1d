// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which points of the module a task has passed: KCOV (`Documentation/dev-tools/kcov.rst`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use crate::shared::Shared;
use crate::sys::{self, Words};

const NODE: &str = "/sys/kernel/debug/kcov";
/// Words of the buffer: more points than one system call passes in muser.ko.
const WORDS: usize = 16 << 10;
/// `_IOR('c', 1, unsigned long)`.
const KCOV_INIT_TRACE: u64 = 0x8008_6301;
/// `_IO('c', 100)`.
const KCOV_ENABLE: u64 = 0x6364;
/// `KCOV_TRACE_PC`.
const TRACE_PC: u64 = 0;

/// The record of one task: the first word counts, program counters follow.
#[derive(Debug)]
pub(crate) struct Kcov {
    words: Words,
    /// Tracing ends when it is closed.
    _file: File,
}

impl Kcov {
    /// Has the kernel record what this task does from now on; `None` where it can't.
    ///
    /// # Errors
    ///
    /// The errno of a call, where there is KCOV.
    pub(crate) fn start() -> io::Result<Option<Self>> {
        let file = match File::options().read(true).write(true).open(NODE) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        sys::ioctl(file.as_raw_fd(), KCOV_INIT_TRACE, WORDS as u64)?;
        let words = Words::map(&file, WORDS)?;
        sys::ioctl(file.as_raw_fd(), KCOV_ENABLE, TRACE_PC)?;
        Ok(Some(Self { words, _file: file }))
    }

    /// Adds what was recorded to what all have covered, and empties the record.
    pub(crate) fn collect(&self, shared: &Shared) {
        let [count, points @ ..] = self.words.all() else {
            return;
        };
        let recorded = usize::try_from(count.load(Ordering::Relaxed)).unwrap_or(0);
        for point in points.iter().take(recorded) {
            shared.cover(point.load(Ordering::Relaxed));
        }
        count.store(0, Ordering::Relaxed);
    }
}
