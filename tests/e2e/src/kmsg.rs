// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's log, read record by record, so that a warning is blamed on the test that ran.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

/// What a line of the kernel's log says when something is wrong with it.
const SPLATS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "BUG ",
    "KASAN:",
    "UBSAN:",
    "INFO: task",
    "INFO: trying to register non-static key",
    "possible recursive locking",
    "possible circular locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "suspicious RCU usage",
    "sleeping function called from invalid context",
    "general protection fault",
    "Oops",
    "RIP: 0010",
    "refcount_t:",
    "unreferenced object",
    "rust_kernel: panicked",
    "rcu: INFO",
    "soft lockup",
];

/// A reader of `/dev/kmsg`.
#[derive(Debug)]
pub struct Log(File);

impl Log {
    /// Starts reading behind what was logged so far.
    ///
    /// # Errors
    ///
    /// The errno of open(2) or read(2).
    pub fn from_now() -> io::Result<Self> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        let mut log = Self(file);
        log.lines()?;
        Ok(log)
    }

    /// What was logged since the last call.
    ///
    /// # Errors
    ///
    /// The errno of read(2).
    pub fn lines(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = vec![0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]);
                    let message = text.split_once(';').map_or(&*text, |(_, message)| message);
                    lines.extend(message.lines().next().map(str::to_owned));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(lines),
                // Records were overwritten before they were read; what follows is still there.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The first line that tells of a fault of the kernel, and those that follow it.
pub fn splat(lines: &[String]) -> Option<&[String]> {
    let first = lines
        .iter()
        .position(|line| SPLATS.iter().any(|splat| line.contains(splat)))?;
    Some(&lines[first..lines.len().min(first + 60)])
}

#[cfg(test)]
mod tests {
    use super::splat;

    #[test]
    fn ordinary_lines_are_no_splat() {
        let lines = ["muser: device created".to_owned(), "vfio: debug".to_owned()];
        assert!(splat(&lines).is_none());
    }

    #[test]
    fn warning_is_a_splat_with_what_follows() {
        let lines = [
            "fine".to_owned(),
            "WARNING: CPU: 1 PID: 2 at x".to_owned(),
            "stack".to_owned(),
        ];
        assert_eq!(splat(&lines).map(<[String]>::len), Some(2));
    }
}
