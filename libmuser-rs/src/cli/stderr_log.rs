// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A log on standard error, for programs that have none.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

/// A log on standard error: a line each, which starts with the level.
struct StderrLog;

/// Makes standard error the log of the process, down to a level, unless the program has a log.
pub fn log_to_stderr(level: LevelFilter) {
    if log::set_logger(&StderrLog).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for StderrLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            // With standard error closed there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "{level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}
