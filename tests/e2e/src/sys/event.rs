// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting: eventfds, poll(2), files that do not wait.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::result;

/// A counter that the kernel and processes signal: eventfd(2), non-blocking.
#[derive(Debug)]
pub struct EventFd(File);

impl EventFd {
    /// A new one, at 0.
    ///
    /// # Errors
    ///
    /// The errno of eventfd(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = result(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: a descriptor that was just made and that nobody else has.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Adds 1.
    ///
    /// # Errors
    ///
    /// The errno of write(2).
    pub fn signal(&self) -> io::Result<()> {
        use std::io::Write;
        (&self.0).write_all(&1u64.to_ne_bytes())
    }

    /// Takes the count without waiting: 0 when nobody signalled.
    ///
    /// # Errors
    ///
    /// The errno of read(2).
    pub fn take(&self) -> io::Result<u64> {
        use std::io::Read;
        let mut count = [0; 8];
        match (&self.0).read_exact(&mut count) {
            Ok(()) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Waits for a signal and takes the count: 0 when none came in time.
    ///
    /// # Errors
    ///
    /// The errno of poll(2) or read(2).
    pub fn wait(&self, time: Duration) -> io::Result<u64> {
        poll(&self.0, libc::POLLIN, time)?;
        self.take()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Waits for events of one file; 0 when none came in time.
///
/// # Errors
///
/// The errno of poll(2).
pub fn poll(file: impl AsFd, events: i16, time: Duration) -> io::Result<i16> {
    Ok(poll_many(&[(file.as_fd(), events)], time)?[0])
}

/// Waits for events of several files; all 0 when none came in time.
///
/// # Errors
///
/// The errno of poll(2).
pub fn poll_many(files: &[(BorrowedFd<'_>, i16)], time: Duration) -> io::Result<Vec<i16>> {
    let mut polled: Vec<_> = files
        .iter()
        .map(|&(fd, events)| libc::pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        })
        .collect();
    let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the array has as many elements as is said.
    let count = unsafe {
        libc::poll(
            polled.as_mut_ptr(),
            polled.len() as libc::nfds_t,
            milliseconds,
        )
    };
    result(count)?;
    Ok(polled.iter().map(|polled| polled.revents).collect())
}

/// Sets or clears `O_NONBLOCK`.
///
/// # Errors
///
/// The errno of fcntl(2).
pub fn set_nonblocking(file: impl AsFd, on: bool) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: no memory is passed.
    let flags = result(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    let flags = if on {
        flags | libc::O_NONBLOCK
    } else {
        flags & !libc::O_NONBLOCK
    };
    // SAFETY: no memory is passed.
    result(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) }).map(drop)
}
