// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the client has mapped for the device, as the server reaches it by messages.
//!
//! A server may do so with memory of which it has the descriptor, too.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Errno;
use crate::transport::client_memory::ClientMemory;
use crate::transport::{DmaAccess, IovaRange};

/// What is mapped, by IOVA.
#[derive(Debug, Default)]
pub(super) struct LentMemory {
    mappings: RwLock<BTreeMap<u64, Lent>>,
}

/// One mapping.
#[derive(Clone, Debug)]
pub(super) struct Lent {
    pub(super) range: IovaRange,
    pub(super) memory: ClientMemory,
    /// Where in the memory it starts.
    pub(super) start: u64,
    pub(super) access: DmaAccess,
}

impl LentMemory {
    /// Puts a mapping in, where there is none yet; tells whether that is so.
    pub(super) fn insert(&self, lent: Lent) -> bool {
        let mut mappings = self.write_lock();
        let last = lent.range.last();
        let before = mappings.range(..=last).next_back();
        if before.is_some_and(|(_, before)| before.range.overlaps(lent.range)) {
            return false;
        }
        mappings.insert(lent.range.first(), lent);
        true
    }

    /// Takes the mapping which starts there out.
    pub(super) fn remove(&self, iova: u64) {
        self.write_lock().remove(&iova);
    }

    /// Takes all mappings out; tells how many bytes they had.
    pub(super) fn clear(&self) -> u64 {
        let mappings = std::mem::take(&mut *self.write_lock());
        let sizes = mappings.values().map(|lent| lent.range.len());
        sizes.fold(0, u64::saturating_add)
    }

    /// The mappings that lie in a range.
    ///
    /// # Errors
    ///
    /// `EINVAL`: of one, a part only does.
    pub(super) fn within(&self, range: IovaRange) -> Result<Vec<IovaRange>, Errno> {
        let mappings = self.read_lock();
        let from_end = mappings.range(..=range.last()).rev();
        let mut found = Vec::new();
        for (_, lent) in from_end.take_while(|(_, lent)| lent.range.overlaps(range)) {
            if !range.contains(lent.range) {
                return Err(Errno::EINVAL);
            }
            found.push(lent.range);
        }
        found.reverse();
        Ok(found)
    }

    /// Copies memory out for the server.
    ///
    /// # Errors
    ///
    /// `EFAULT`: not all of it is mapped. `EPERM`: not for reading. Else, what the memory says.
    pub(super) fn read(&self, iova: u64, to: &mut [u8]) -> Result<(), Errno> {
        self.in_parts(iova, to.len(), DmaAccess::Read, |lent, offset, bytes| {
            lent.memory.read(offset, &mut to[bytes])
        })
    }

    /// Copies memory in for the server.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), for writing.
    pub(super) fn write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        self.in_parts(iova, from.len(), DmaAccess::Write, |lent, offset, bytes| {
            lent.memory.write(offset, &from[bytes])
        })
    }

    /// Does an access mapping by mapping. The lock is not held meanwhile: an access may take as long
    /// as it likes, where the user says what the memory is.
    fn in_parts(
        &self,
        iova: u64,
        len: usize,
        wanted: DmaAccess,
        mut access: impl FnMut(&Lent, u64, std::ops::Range<usize>) -> std::io::Result<()>,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let at = iova.checked_add(done as u64).ok_or(Errno::EFAULT)?;
            let lent = self.find(at).ok_or(Errno::EFAULT)?;
            if !lent.access.allows(wanted) {
                return Err(Errno::EPERM);
            }
            let left = lent.range.last() - at;
            let part = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .saturating_add(1)
                .min(len - done);
            let offset = lent.start + (at - lent.range.first());
            access(&lent, offset, done..done + part).map_err(|error| {
                error
                    .raw_os_error()
                    .and_then(Errno::new)
                    .unwrap_or(Errno::EIO)
            })?;
            done += part;
        }
        Ok(())
    }

    fn find(&self, iova: u64) -> Option<Lent> {
        let mappings = self.read_lock();
        let (_, lent) = mappings.range(..=iova).next_back()?;
        (iova <= lent.range.last()).then(|| lent.clone())
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Lent>> {
        self.mappings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Lent>> {
        self.mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
