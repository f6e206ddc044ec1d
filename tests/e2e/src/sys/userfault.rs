// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory whose faults somebody must answer: userfaultfd(2), by somebody who does not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::time::Duration;

use super::{poll, result, Mapping};

/// `UFFDIO_API`: `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: u32 = 0xC018_AA3F;
/// `UFFDIO_REGISTER`: `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: u32 = 0xC020_AA00;
/// `UFFDIO_UNREGISTER`: `_IOR(0xAA, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: u32 = 0x8010_AA01;
/// `UFFD_API`.
const API: u64 = 0xAA;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;

/// Anonymous memory, whose first touch of each page waits until it is answered or this goes.
#[derive(Debug)]
pub struct Unanswered {
    // First: with it closed, the memory is like any other.
    fault: File,
    memory: Mapping,
}

impl Unanswered {
    /// So many bytes of it.
    ///
    /// # Errors
    ///
    /// The errno of userfaultfd(2), its ioctls or mmap(2).
    pub fn new(len: usize) -> io::Result<Self> {
        let memory = Mapping::anonymous(len)?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = result(i32::try_from(fd).unwrap_or(-1))?;
        // SAFETY: a descriptor that was just made and that nobody else has.
        let fault = unsafe { File::from_raw_fd(fd) };
        // `struct uffdio_api`: api, features, ioctls.
        let mut api = [API, 0, 0];
        // SAFETY: the ioctl reads and writes three words.
        result(unsafe { libc::ioctl(fault.as_raw_fd(), UFFDIO_API.into(), &raw mut api) })?;
        // `struct uffdio_register`: start, len, mode, ioctls.
        let mut register = [memory.address(), len as u64, MISSING, 0];
        // SAFETY: the ioctl reads and writes four words, and the range is a mapping that is
        // accessed through raw pointers only.
        let registered =
            unsafe { libc::ioctl(fault.as_raw_fd(), UFFDIO_REGISTER.into(), &raw mut register) };
        result(registered)?;
        Ok(Self { fault, memory })
    }

    /// The memory. To touch it is to wait.
    pub fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// Waits until somebody touches the memory, and so waits: whether that came in time.
    ///
    /// # Errors
    ///
    /// The errno of poll(2).
    pub fn wait_for_touch(&self, time: Duration) -> io::Result<bool> {
        Ok(poll(self, libc::POLLIN, time)? & libc::POLLIN != 0)
    }

    /// Makes it memory like any other: who waits goes on, and finds zeroes.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn answer(&self) -> io::Result<()> {
        // `struct uffdio_range`: start, len.
        let mut range = [self.memory.address(), self.memory.len() as u64];
        // SAFETY: the ioctl reads two words.
        let ended = unsafe {
            libc::ioctl(
                self.fault.as_raw_fd(),
                UFFDIO_UNREGISTER.into(),
                &raw mut range,
            )
        };
        result(ended).map(drop)
    }
}

impl AsFd for Unanswered {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }
}
