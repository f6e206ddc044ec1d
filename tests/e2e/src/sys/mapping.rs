// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that somebody else sees as well, or that ends where an argument does not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::ptr::NonNull;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::result;

/// Bytes of a page: muser is built for x86-64 and arm64 with 4 KiB pages in the tests.
pub const PAGE: usize = 4096;

/// Memory shared with somebody else: a file's, the kernel's or a device's.
///
/// # Invariants
///
/// `start` is the start of `len` mapped bytes, which only this value unmaps.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: accesses are volatile copies through raw pointers, sound from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` of a file.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn new(
        file: impl AsFd,
        offset: u64,
        len: usize,
        protection: i32,
        flags: i32,
    ) -> io::Result<Self> {
        let offset = i64::from_ne_bytes(offset.to_ne_bytes());
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: the kernel picks an address where nothing is.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        // INVARIANT: mmap succeeded with this length.
        Ok(Self { start, len })
    }

    /// Puts `len` bytes, at most those of a page, into a pipe without a copy: what comes out is what
    /// the page has by then. Returns the end to read from.
    ///
    /// # Errors
    ///
    /// The errno of pipe(2) or vmsplice(2).
    pub fn splice(&self, offset: usize, len: usize) -> io::Result<File> {
        assert!(offset + len <= self.len);
        let mut ends = [-1; 2];
        // SAFETY: there is room for both ends.
        result(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
        // SAFETY: the pipe was just made, and nobody else has its ends.
        let [reader, writer] = ends.map(|end| unsafe { File::from_raw_fd(end) });
        let part = libc::iovec {
            iov_base: self.start.as_ptr().wrapping_add(offset).cast(),
            iov_len: len,
        };
        // SAFETY: the bytes are mapped, and only read.
        let moved = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const part, 1, 0) };
        if usize::try_from(moved).is_ok_and(|moved| moved == len) {
            return Ok(reader);
        }
        Err(io::Error::last_os_error())
    }

    /// Maps for reading and writing, shared.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn shared(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        Self::new(
            file,
            offset,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
    }

    /// Maps fresh anonymous memory, private, for reading and writing.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::without_file(len, libc::MAP_PRIVATE)
    }

    /// Maps fresh anonymous memory, for reading and writing, with `MAP_SHARED` or `MAP_PRIVATE` and
    /// whatever else is in `flags`.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn without_file(len: usize, flags: i32) -> io::Result<Self> {
        let flags = flags | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: anonymous, at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        // INVARIANT: mmap succeeded with this length.
        Ok(Self { start, len })
    }

    /// Maps fresh anonymous memory of `len` bytes, a multiple of the page size, and leaves a hole
    /// of a page behind it.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2) or mprotect(2).
    pub fn with_hole(len: usize) -> io::Result<Self> {
        let mut mapping = Self::anonymous(len + PAGE)?;
        // INVARIANT: the first `len` bytes stay mapped; the page behind them is never accessible.
        mapping.len = len;
        // SAFETY: `len` is within what was mapped.
        let hole = unsafe { mapping.start.add(len) };
        // SAFETY: the page was mapped above and nobody knows it.
        result(unsafe { libc::mprotect(hole.as_ptr().cast(), PAGE, libc::PROT_NONE) })?;
        Ok(mapping)
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Changes the protection of the whole.
    ///
    /// # Errors
    ///
    /// The errno of mprotect(2).
    pub fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: the mapping is ours; accesses through it are raw and may fault.
        result(unsafe { libc::mprotect(self.start.as_ptr().cast(), self.len, protection) })?;
        Ok(())
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        let end = offset.checked_add(size_of::<T>());
        assert!(
            end.is_some_and(|end| end <= self.len),
            "offset {offset:#x} is not mapped"
        );
        // SAFETY: within the mapping, as just checked.
        let pointer: NonNull<T> = unsafe { self.start.add(offset) }.cast();
        assert!(pointer.is_aligned(), "offset {offset:#x} is not aligned");
        pointer
    }

    /// Reads a value in one volatile access where the machine can.
    ///
    /// # Panics
    ///
    /// When it is not within the mapping or not aligned.
    pub fn read<T: FromBytes>(&self, offset: usize) -> T {
        // SAFETY: `at` checked bounds and alignment, and any bytes are a `T`.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Writes a value in one volatile access where the machine can.
    ///
    /// # Panics
    ///
    /// When it is not within the mapping or not aligned.
    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: T) {
        // SAFETY: `at` checked bounds and alignment.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Unmaps a part, in pages, and leaves a hole.
    ///
    /// # Errors
    ///
    /// The errno of munmap(2) or mmap(2).
    ///
    /// # Panics
    ///
    /// When it is not within the mapping.
    pub fn punch(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len, "nothing to punch at {offset:#x}");
        // SAFETY: within the mapping, as just checked.
        let start = unsafe { self.start.add(offset) };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: replaces memory of this mapping by memory without access, so that nothing else
        // gets the address; accesses through the mapping are raw and may fault.
        let hole = unsafe { libc::mmap(start.as_ptr().cast(), len, libc::PROT_NONE, flags, -1, 0) };
        if hole == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Writes to each 8-byte word what `word` says of its offset.
    pub fn fill(&self, word: impl Fn(usize) -> u64) {
        for offset in (0..self.len).step_by(8) {
            self.write(offset, word(offset));
        }
    }

    /// The offset of the first 8-byte word which is not what `word` says, and what it is.
    pub fn differs(&self, word: impl Fn(usize) -> u64) -> Option<(usize, u64)> {
        (0..self.len).step_by(8).find_map(|offset| {
            let found = self.read::<u64>(offset);
            (found != word(offset)).then_some((offset, found))
        })
    }

    /// Copies bytes out.
    ///
    /// # Panics
    ///
    /// When they are not within the mapping.
    pub fn read_bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len)
            .map(|at| self.read::<u8>(at))
            .collect()
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// When they are not within the mapping.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        for (at, &byte) in (offset..).zip(bytes) {
            self.write(at, byte);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the type's invariant. A hole behind stays, as no accessible memory.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Reads from a file into memory that may end before the bytes do.
///
/// # Errors
///
/// The errno of pread(2).
pub fn pread_at(
    file: impl AsFd,
    memory: &Mapping,
    offset: usize,
    count: usize,
    position: u64,
) -> io::Result<usize> {
    let address = (memory.address() as usize + offset) as *mut libc::c_void;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the bytes lie in a mapping accessed through raw pointers only, or in its hole.
    let read = unsafe {
        libc::pread(
            fd,
            address,
            count,
            i64::from_ne_bytes(position.to_ne_bytes()),
        )
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Writes to a file from memory that may end before the bytes do.
///
/// # Errors
///
/// The errno of pwrite(2).
pub fn pwrite_at(
    file: impl AsFd,
    memory: &Mapping,
    offset: usize,
    count: usize,
    position: u64,
) -> io::Result<usize> {
    let address = (memory.address() as usize + offset) as *const libc::c_void;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the bytes lie in a mapping accessed through raw pointers only, or in its hole.
    let written = unsafe {
        libc::pwrite(
            fd,
            address,
            count,
            i64::from_ne_bytes(position.to_ne_bytes()),
        )
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}
