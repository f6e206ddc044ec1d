// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kinds of memory that a client may have.

use std::ffi::CStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, FromRawFd};

use super::{result, Mapping, PAGE};

/// Bytes of a huge page of x86-64 and of arm64 with 4 KiB pages.
pub const HUGE_PAGE: usize = 2 << 20;

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Anonymous and private: what `malloc` gives.
    Anonymous,
    /// Anonymous and shared, so shmem.
    Shared,
    /// A memfd: what a VMM uses that shares its guest.
    Memfd,
    /// Huge pages of hugetlb.
    Huge,
    /// A private mapping of a file, whose pages become anonymous when written.
    File,
}

impl Memory {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::Anonymous,
        Self::Shared,
        Self::Memfd,
        Self::Huge,
        Self::File,
    ];

    /// Maps that many bytes of it, for reading and writing, as zeroes.
    ///
    /// # Errors
    ///
    /// The errno of the system call that failed.
    pub fn map(self, len: usize) -> io::Result<Mapping> {
        match self {
            Self::Anonymous => Mapping::anonymous(len),
            Self::Shared => Mapping::without_file(len, libc::MAP_SHARED),
            Self::Memfd => Mapping::shared(memfd(len)?, 0, len),
            Self::Huge => {
                reserve_huge_pages(len.div_ceil(HUGE_PAGE))?;
                let len = len.next_multiple_of(HUGE_PAGE);
                Mapping::without_file(len, libc::MAP_PRIVATE | libc::MAP_HUGETLB)
            }
            Self::File => {
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                Mapping::new(file(len)?, 0, len, protection, libc::MAP_PRIVATE)
            }
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous memory",
            Self::Shared => "shared anonymous memory",
            Self::Memfd => "a memfd",
            Self::Huge => "huge pages",
            Self::File => "a private file mapping",
        })
    }
}

/// A memfd of that many bytes.
///
/// # Errors
///
/// The errno of memfd_create(2) or ftruncate(2).
pub fn memfd(len: usize) -> io::Result<File> {
    const NAME: &CStr = c"client";
    // SAFETY: the name is a string that ends.
    let fd = result(unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) })?;
    // SAFETY: a descriptor that was just made and that nobody else has.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64)?;
    Ok(file)
}

/// A file without a name, of that many bytes.
///
/// # Errors
///
/// The errno of creating it.
pub fn file(len: usize) -> io::Result<File> {
    let path = std::env::temp_dir().join(format!("client-{}", super::thread_id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    file.set_len(len as u64)?;
    Ok(file)
}

/// Makes sure that so many huge pages are free.
///
/// # Errors
///
/// `OutOfMemory` when the kernel can't make them, else the errno of the file in `/proc`.
fn reserve_huge_pages(count: usize) -> io::Result<()> {
    const TOTAL: &str = "/proc/sys/vm/nr_hugepages";
    let total: usize = fs::read_to_string(TOTAL)?.trim().parse().unwrap_or(0);
    let free = free_huge_pages()?;
    if free < count {
        fs::write(TOTAL, (total + count - free).to_string())?;
    }
    if free_huge_pages()? < count {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(())
}

fn free_huge_pages() -> io::Result<usize> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"));
    Ok(line
        .and_then(|line| line.trim().parse().ok())
        .unwrap_or_default())
}

/// Why this kernel can give no huge page, if it can't.
pub fn huge_pages_lacking() -> Option<String> {
    reserve_huge_pages(1)
        .err()
        .map(|error| format!("no huge page can be had: {error}"))
}

/// Whether a child made by fork(2) has anything mapped where `memory` is.
///
/// # Errors
///
/// The errno of fork(2) or waitpid(2).
pub fn child_has(memory: &Mapping) -> io::Result<bool> {
    let address = memory.address() as *mut libc::c_void;
    // SAFETY: the child does nothing but two system calls, which are safe after a fork.
    let child = result(unsafe { libc::fork() })?;
    if child == 0 {
        // SAFETY: msync looks at the range only, and fails with ENOMEM where nothing is mapped.
        let there = unsafe { libc::msync(address, PAGE, libc::MS_ASYNC) } == 0;
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(there)) };
    }
    let mut status = 0;
    // SAFETY: `status` is written as a whole.
    result(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1)
}

/// The signal that ends a child made by fork(2) when it writes a byte to `memory`; `None` if it can.
///
/// # Errors
///
/// The errno of fork(2) or waitpid(2).
pub fn child_touches(memory: &Mapping, offset: usize) -> io::Result<Option<i32>> {
    assert!(offset < memory.len());
    let byte = (memory.address() as usize + offset) as *mut u8;
    // SAFETY: the child does nothing but a store and a system call, which are safe after a fork.
    let child = result(unsafe { libc::fork() })?;
    if child == 0 {
        // SAFETY: the address is in the mapping; the test has asked for the signal there may be.
        unsafe { byte.write_volatile(1) };
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: `status` is written as a whole.
    result(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    Ok(libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)))
}

/// Bounds what an unprivileged part of this process may lock, and so pin.
///
/// # Errors
///
/// The errno of setrlimit(2).
pub fn limit_locked_memory(bytes: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the limit is read only.
    result(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }).map(drop)
}

/// Takes the file's space above `len` away from whoever has it mapped.
///
/// # Errors
///
/// The errno of ftruncate(2).
pub fn truncate(file: impl AsFd, len: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let len = i64::from_ne_bytes(len.to_ne_bytes());
    // SAFETY: no memory is passed.
    result(unsafe { libc::ftruncate(file.as_fd().as_raw_fd(), len) }).map(drop)
}
