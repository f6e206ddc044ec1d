// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the blocks are: a file or a block device, or what a test puts in its place.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno as Number;
use nix::fcntl::{fallocate, FallocateFlags};

use crate::sys;
pub use crate::sys::Segments;

/// What blocks are kept in. Offsets are within its size; any number of threads may call.
pub trait Backing: Debug + Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Whether nothing can be written.
    fn is_read_only(&self) -> bool;

    /// Reads into what is behind the first `skip` bytes of `to`; how many, which may be too few, or
    /// none at the end.
    ///
    /// # Errors
    ///
    /// Whatever the medium says.
    fn read(&self, at: u64, to: &Segments, skip: usize) -> io::Result<usize>;

    /// Writes what is behind the first `skip` bytes of `from`, to the medium itself if it is to be
    /// `durable`; how many, which may be too few.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    fn write(&self, at: u64, from: &Segments, skip: usize, durable: bool) -> io::Result<usize>;

    /// Brings to the medium what was written.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    fn flush(&self) -> io::Result<()>;

    /// Makes zeroes of a range; with `deallocate`, so that it takes no room if that can be.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read). `EOPNOTSUPP`: zeroes must be written.
    fn zero(&self, range: Range<u64>, deallocate: bool) -> io::Result<()>;

    /// The file that all this is done to, if it is one and may be used directly.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A file or a block device.
#[derive(Debug)]
pub struct FileBacking {
    file: File,
    size: u64,
    read_only: bool,
}

impl FileBacking {
    /// Opens it. A regular file that is shorter than `size` grows.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is neither, or shorter than `size` and can't grow. Else those of open(2).
    pub fn open(path: &Path, read_only: bool, size: Option<u64>) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(invalid("it is neither a file nor a block device"));
        }
        // Of a block device, the end is the only thing that says how large it is.
        let there = file.seek(SeekFrom::End(0))?;
        let size = size.unwrap_or(there);
        if size > there {
            if read_only || !kind.is_file() {
                return Err(invalid("it is shorter than it should be, and can't grow"));
            }
            file.set_len(size)?;
        }
        Ok(Self {
            file,
            size,
            read_only,
        })
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

impl Backing for FileBacking {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, at: u64, to: &Segments, skip: usize) -> io::Result<usize> {
        sys::read(self.file.as_fd(), at, to, skip)
    }

    fn write(&self, at: u64, from: &Segments, skip: usize, durable: bool) -> io::Result<usize> {
        sys::write(self.file.as_fd(), at, from, skip, durable)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn zero(&self, range: Range<u64>, deallocate: bool) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let how = if deallocate {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        let too_far = |_| Number::EFBIG;
        let start = range.start.try_into().map_err(too_far)?;
        let len = (range.end - range.start).try_into().map_err(too_far)?;
        Ok(fallocate(&self.file, how | keep, start, len)?)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

/// Reads or writes all of something, by and by; `done` says how much is done already.
pub(crate) fn complete(
    len: usize,
    mut done: usize,
    mut step: impl FnMut(usize) -> io::Result<usize>,
) -> io::Result<()> {
    while done < len {
        match step(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done = done.saturating_add(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes zeroes of a range, written where the backing has no better way.
pub(crate) fn zero(
    backing: &dyn Backing,
    range: Range<u64>,
    deallocate: bool,
    durable: bool,
) -> io::Result<()> {
    const PART: u64 = 1 << 20;
    match backing.zero(range.clone(), deallocate) {
        Err(error) if is_unsupported(&error) => {}
        Ok(()) if durable => return backing.flush(),
        other => return other,
    }
    let part = usize::try_from(PART.min(range.end - range.start)).unwrap_or(0);
    let mut at = range.start;
    let mut zeroes = Segments::copy(vec![0; part]);
    while at < range.end {
        let len = usize::try_from(PART.min(range.end - at)).unwrap_or(0);
        if len < zeroes.len() {
            zeroes = Segments::copy(vec![0; len]);
        }
        complete(len, 0, |done| {
            backing.write(at + done as u64, &zeroes, done, durable)
        })?;
        at += len as u64;
    }
    Ok(())
}

/// Whether the backing has no way to do this, rather than that it failed.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}
