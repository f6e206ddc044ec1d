// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files that the other side of a socket has handed over, to be used as memory.
//!
//! A descriptor from a peer can be anything, and what it leads to can change while it is used. So it
//! is looked at once, where it comes in: only a regular file is memory, opened for what it is wanted
//! for. From then on its size is the only thing that can change, of which a mapping
//! [survives](Mapping::guarded) that it shrinks.
//!
//! What all peers together have mapped into this process is bounded, since without addresses not
//! even an allocation succeeds.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::fcntl::{fcntl, FcntlArg, OFlag, SealFlag};
use nix::sys::stat::{fstat, SFlag};
use nix::sys::statfs::{fstatfs, FUSE_SUPER_MAGIC, HUGETLBFS_MAGIC};

use crate::sys::{self, Mapping};

/// Bytes that all peers of this process can have mapped: half of what a process can address.
const MOST_BYTES: u64 = 1 << 46;
/// Mappings that they can have: a quarter of `vm.max_map_count`, since each may become two.
const MOST_MAPPINGS: u64 = 1 << 14;

static BYTES: Budget = Budget::new();
static MAPPINGS: Budget = Budget::new();
static FILES: Budget = Budget::new();

/// What tells one file from another, as long as it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
    writable: bool,
}

/// A file that a peer has handed over, and can still do with what it likes.
#[derive(Debug)]
pub(crate) struct PeerFile {
    file: Arc<File>,
    id: FileId,
    granule: u64,
    /// Whether what is written goes to its end, wherever it should go.
    appends: bool,
    _share: Share,
}

impl PeerFile {
    /// Looks at a descriptor, of which the file is to be read, and written to if `writable`.
    ///
    /// # Errors
    ///
    /// Those that `mmap` has. `ENODEV`: it can't be memory, since it is not a regular file or is
    /// one of FUSE, where each access waits for whoever serves it as long as he likes. `EACCES`: it
    /// is not open for this. `EPERM`: it was sealed against being written to. `EBADF`: it is open
    /// for nothing at all (`O_PATH`). `EMFILE`: peers have half of the descriptors that this process
    /// may have.
    pub(crate) fn new(file: OwnedFd, writable: bool) -> Result<Self, Number> {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_PATH) {
            return Err(Number::EBADF);
        }
        let stat = fstat(&file)?;
        let system = fstatfs(&file)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFREG || system.filesystem_type() == FUSE_SUPER_MAGIC {
            return Err(Number::ENODEV);
        }
        match flags & OFlag::O_ACCMODE {
            OFlag::O_RDWR => {}
            OFlag::O_RDONLY if !writable => {}
            _ => return Err(Number::EACCES),
        }
        // Only files that live in memory have seals.
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        let seals = SealFlag::from_bits_retain(seals);
        if writable && seals.intersects(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE) {
            return Err(Number::EPERM);
        }
        let granule = if system.filesystem_type() == HUGETLBFS_MAGIC {
            u64::try_from(system.block_size()).map_err(|_| Number::EINVAL)?
        } else {
            sys::page_size()
        };
        let most = sys::descriptor_limit().map_or(u64::MAX, |limit| limit / 2);
        Ok(Self {
            file: Arc::new(file.into()),
            id: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
                writable,
            },
            granule,
            appends: flags.contains(OFlag::O_APPEND),
            _share: FILES.take(1, most).ok_or(Number::EMFILE)?,
        })
    }

    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// Bytes of a page of it, of which offset and length of a mapping are multiples.
    pub(crate) fn granule(&self) -> u64 {
        self.granule
    }

    /// Whether what is written to it would go to its end.
    pub(crate) fn appends(&self) -> bool {
        self.appends
    }

    /// Bytes that it has now.
    pub(crate) fn size(&self) -> Result<u64, Number> {
        let stat = fstat(&self.file)?;
        u64::try_from(stat.st_size).map_err(|_| Number::EINVAL)
    }

    /// Maps bytes of it. Those that are not there, or go, are as
    /// [guarded](Mapping::guarded) mappings have them.
    ///
    /// # Errors
    ///
    /// `ENOSPC`: peers have mapped too much already. `ENODEV`: it can only be read and written. Else,
    /// what `mmap` has to say.
    pub(crate) fn map(&self, offset: u64, len: u64) -> Result<PeerMapping, Number> {
        let most = sys::address_space_limit().map_or(MOST_BYTES, |limit| MOST_BYTES.min(limit / 2));
        let bytes = BYTES.take(len, most).ok_or(Number::ENOSPC)?;
        let count = MAPPINGS.take(1, MOST_MAPPINGS).ok_or(Number::ENOSPC)?;
        let len = usize::try_from(len).map_err(|_| Number::ENOMEM)?;
        let writable = self.id.writable;
        let granule = usize::try_from(self.granule).map_err(|_| Number::EINVAL)?;
        // Also of a file that can't shrink: a page may not be had even where the file has it.
        let mapping = Mapping::guarded(&self.file, offset, len, writable, granule);
        Ok(PeerMapping {
            mapping: mapping?,
            shares: Shares {
                _shares: [bytes, count],
            },
        })
    }

    /// Reads all of `to` from `offset` on.
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.check(offset, to.len())?;
        self.file.read_exact_at(to, offset)
    }

    /// Writes all of `from` to `offset` on. It does not grow by that, unless its owner makes it
    /// shorter at the same moment.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check(offset, from.len())?;
        self.file.write_all_at(from, offset)
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), Number> {
        let end = offset.checked_add(len as u64).ok_or(Number::EFAULT)?;
        if end > self.size()? {
            return Err(Number::EFAULT);
        }
        Ok(())
    }
}

/// A part of a peer's file, mapped.
#[derive(Debug)]
pub(crate) struct PeerMapping {
    // First, so that the shares are given back when it has gone.
    mapping: Mapping,
    shares: Shares,
}

/// What a mapping has of the budget of this process, until it is dropped.
#[derive(Debug)]
pub(crate) struct Shares {
    _shares: [Share; 2],
}

impl PeerMapping {
    /// The mapping, and what is to be dropped after it.
    pub(crate) fn into_parts(self) -> (Mapping, Shares) {
        (self.mapping, self.shares)
    }
}

impl Deref for PeerMapping {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

/// How much of something peers have.
#[derive(Debug)]
struct Budget(AtomicU64);

impl Budget {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Takes so much, if they have no more than `most` then.
    fn take(&'static self, amount: u64, most: u64) -> Option<Share> {
        let more = |taken: u64| taken.checked_add(amount).filter(|taken| *taken <= most);
        let order = Ordering::Relaxed;
        self.0.fetch_update(order, order, more).ok()?;
        Some(Share {
            budget: self,
            amount,
        })
    }
}

/// What was taken from a budget, until it is dropped.
#[derive(Debug)]
struct Share {
    budget: &'static Budget,
    amount: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_is_never_exceeded_and_comes_back() {
        static BUDGET: Budget = Budget::new();
        let first = BUDGET.take(7, 10).unwrap();

        assert!(BUDGET.take(4, 10).is_none());
        assert!(BUDGET.take(u64::MAX, u64::MAX).is_none());
        drop(first);
        assert!(BUDGET.take(10, 10).is_some());
    }
}
