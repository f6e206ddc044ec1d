// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's memory as a transport gives it: by IOVA, mapped here where that can be.
//!
//! A transport can always copy to and from the client's memory. Where it has the memory in this
//! process' address space too, an acquired range has [pieces](Piece) to touch without copies.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::sealed;
use crate::error::{Errno, Error, Result};

mod dirty;
mod files;
mod table;

pub use dirty::DirtyLog;
pub(crate) use dirty::DirtyPages;
pub(crate) use files::FileCache;
pub use table::RemoteMemory;
pub(crate) use table::{DmaTable, Mapped, Memory};

/// What a device does with a range of the client's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaAccess {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It reads and writes.
    ReadWrite,
}

impl DmaAccess {
    /// Whether it reads.
    #[must_use]
    pub const fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }

    /// Whether it writes.
    #[must_use]
    pub const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }

    /// Whether this allows all that `wanted` needs.
    #[must_use]
    pub const fn allows(self, wanted: Self) -> bool {
        (self.reads() || !wanted.reads()) && (self.writes() || !wanted.writes())
    }
}

/// A range of IOVA.
///
/// # Invariants
///
/// It has a byte at least, and ends at 2^64 at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IovaRange {
    first: u64,
    len: u64,
}

impl IovaRange {
    /// `len` bytes from `iova` on; `None` if that are none.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW`: it ends beyond 2^64.
    pub fn new(iova: u64, len: u64) -> Result<Option<Self>> {
        let Some(past_first) = len.checked_sub(1) else {
            return Ok(None);
        };
        if iova.checked_add(past_first).is_none() {
            let message = format!("{len:#x} bytes at IOVA {iova:#x} end beyond 2^64");
            return Err(Error::new(Errno::EOVERFLOW, message));
        }
        // INVARIANT: `len` is not 0, and the last byte has an address.
        Ok(Some(Self { first: iova, len }))
    }

    /// All but the very last IOVA, the number of which no length can say.
    pub(crate) const ALL: Self = Self {
        first: 0,
        len: u64::MAX,
    };

    /// The first byte's IOVA.
    #[must_use]
    pub const fn first(self) -> u64 {
        self.first
    }

    /// The last byte's IOVA.
    #[must_use]
    pub const fn last(self) -> u64 {
        // By the invariant neither wraps.
        self.first + (self.len - 1)
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub const fn len(self) -> u64 {
        self.len
    }

    pub(crate) const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last() && other.first <= self.last()
    }

    pub(crate) const fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last() <= self.last()
    }

    /// All IOVAs from the first to the last given.
    ///
    /// The caller gives them in order, and not all 2^64 of them.
    pub(crate) const fn between(first: u64, last: u64) -> Self {
        Self {
            first,
            len: last - first + 1,
        }
    }

    pub(crate) fn not_mapped(self) -> Error {
        let (first, last) = (self.first, self.last());
        let message = format!("the client has not mapped all of IOVA {first:#x} to {last:#x}");
        Error::new(Errno::EFAULT, message)
    }

    pub(crate) fn read_only(self) -> Error {
        let (first, last) = (self.first, self.last());
        let message =
            format!("the client has mapped IOVA {first:#x} to {last:#x} for reading only");
        Error::new(Errno::EPERM, message)
    }
}

/// The client's memory. The library implements it, and nobody else can.
pub trait GuestMemory: sealed::Sealed + Debug + Send + Sync {
    /// Changes whenever memory that was acquired has gone away. No system call.
    fn generation(&self) -> u64;

    /// Makes a range ready to be used.
    ///
    /// # Errors
    ///
    /// `EFAULT`: not all of it is mapped. `EPERM`: not for this access. `EDQUOT`, `ENOMEM`: no more
    /// of it can be held.
    fn acquire(&self, range: IovaRange, access: DmaAccess) -> Result<Acquired>;

    /// Copies out of the client's memory, part by part.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire); parts may have been copied before the one that fails.
    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<()>;

    /// Copies into the client's memory, part by part.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    fn write(&self, parts: &[(u64, &[u8])]) -> Result<()>;

    /// Gives up what was acquired of a range, where nobody uses it.
    ///
    /// # Errors
    ///
    /// The transport can't reach the client any more.
    fn release(&self, range: IovaRange) -> Result<()>;
}

/// A range that was acquired.
#[derive(Debug)]
pub struct Acquired {
    /// The generation at which it was: all of the range is there as long as that is the same.
    pub(crate) generation: u64,
    /// The range, in order and without gaps; none where the memory can only be copied.
    pub(crate) pieces: Option<Vec<Piece>>,
}

/// Part of an acquired range, of which the memory is contiguous in this process.
#[derive(Clone, Debug)]
pub struct Piece {
    pub(crate) backing: Arc<dyn Backing>,
    /// Which bytes of the backing.
    pub(crate) bytes: Range<usize>,
}

/// Memory of the client in this process' address space, which stays there as long as this lives.
pub(crate) trait Backing: Debug + Send + Sync {
    /// These bytes of the memory; `None` if there are not so many.
    fn slice(&self, bytes: Range<usize>) -> Option<VolatileSlice<'_, DirtyLog<'_>>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_range_is_none_anywhere() {
        assert_eq!(IovaRange::new(u64::MAX, 0).unwrap(), None);
    }

    #[test]
    fn range_up_to_the_end_of_addresses_is_one() {
        let range = IovaRange::new(u64::MAX - 9, 10).unwrap().unwrap();

        assert_eq!(range.last(), u64::MAX);
    }

    #[test]
    fn range_beyond_the_end_of_addresses_is_refused() {
        let error = IovaRange::new(u64::MAX - 9, 11).unwrap_err();

        assert_eq!(error.errno(), Errno::EOVERFLOW);
    }

    #[test]
    fn access_allows_what_it_includes() {
        use DmaAccess::{Read, ReadWrite, Write};
        for (granted, wanted, allowed) in [
            (Read, Read, true),
            (Read, Write, false),
            (Write, ReadWrite, false),
            (ReadWrite, Write, true),
        ] {
            assert_eq!(granted.allows(wanted), allowed, "{granted:?} {wanted:?}");
        }
    }
}
