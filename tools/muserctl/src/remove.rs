// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Removal of a device, which lasts as long as a VFIO client has it open.
//!
//! The write to `remove` does not return before that, and once a signal has reached it the kernel
//! lets no further one through: who writes can't be interrupted. So a child process writes, in a
//! process group of its own which ctrl-C does not reach, and we stay free to leave.

use crate::device::Device;
use crate::error::{reason, Error, Result};
use crate::process::{holders, Process};
use crate::sysfs::{self, refused, Entry, Roots};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long a removal may take before we say what it waits for.
const PATIENCE: Duration = Duration::from_millis(300);

/// Removes a device, and waits for its client, but not longer than `timeout`.
pub(crate) fn remove(roots: &Roots, entry: &Entry, timeout: Option<Duration>) -> Result<()> {
    let start = Instant::now();
    let path = entry.path.join("remove");
    if entry.removing {
        return Err(going(entry));
    }
    // Before the removal begins: from then on the device can't be looked at.
    let before = Device::look(roots, entry);
    let nodes = before.client_nodes();
    let cause = |verb: &str| match (
        &holders(roots, &nodes, &entry.path)[..],
        before.summary.client,
    ) {
        ([], Some(false)) => "the kernel has not finished".to_owned(),
        (clients, _) => format!("a VFIO client {verb} the device open{}", named(clients)),
    };
    let mut child = Command::new("/proc/self/exe")
        .arg("write-remove")
        .arg(&path)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Error::new(format!("can't start a process: {}", reason(&error))))?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait()));

    let limit = timeout.unwrap_or(Duration::MAX);
    let status = receiver
        .recv_timeout(PATIENCE.min(limit))
        .or_else(|error| match error {
            RecvTimeoutError::Timeout => {
                eprintln!(
                    "muserctl: waiting: {}; ctrl-C ends the waiting, not the removal",
                    cause("has")
                );
                receiver.recv_timeout(limit.saturating_sub(start.elapsed()))
            }
            RecvTimeoutError::Disconnected => Err(error),
        });
    match status {
        Ok(Ok(status)) => outcome(entry, &path, status),
        Ok(Err(error)) => Err(Error::new(format!(
            "can't wait for a process: {}",
            reason(&error)
        ))),
        Err(_) => Err(Error::new(format!(
            "{}; {} will be removed as soon as that ends",
            cause("still has"),
            entry.uuid
        ))),
    }
}

/// The child's part: writes, and returns the errno, or 0.
pub(crate) fn write(path: &Path) -> u8 {
    match sysfs::write(path, "1") {
        Ok(()) => 0,
        Err(error) => error
            .raw_os_error()
            .and_then(|errno| u8::try_from(errno).ok())
            .unwrap_or(u8::MAX),
    }
}

fn outcome(entry: &Entry, path: &Path, status: ExitStatus) -> Result<()> {
    let uuid = &entry.uuid;
    let errno = match (status.code(), status.signal()) {
        (Some(0), _) => return Ok(()),
        (Some(errno), _) => errno,
        (None, signal) => {
            return Err(Error::new(format!(
                "the process that removes {uuid} was killed by signal {}",
                signal.unwrap_or_default()
            )));
        }
    };
    match errno {
        // The attribute goes away first, the device last.
        libc::ENOENT | libc::ENODEV | libc::EAGAIN => Err(going(entry)),
        libc::EBUSY => Err(Error::new(format!(
            "{uuid} is busy: `muserctl show {uuid}` tells who uses it"
        ))),
        errno => Err(refused(path, "1", &io::Error::from_raw_os_error(errno))),
    }
}

fn going(entry: &Entry) -> Error {
    Error::new(format!(
        "{} is being removed already, which waits for its client to close it",
        entry.uuid
    ))
}

fn named(clients: &[Process]) -> String {
    if clients.is_empty() {
        return String::new();
    }
    let names: Vec<String> = clients.iter().map(ToString::to_string).collect();
    format!(" ({})", names.join("; "))
}
