// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the client has mapped for the device, as the server reaches it by messages.
//!
//! A server may do so with memory of which it has the descriptor, too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Errno;
use crate::transport::client_memory::ClientMemory;
use crate::transport::{DmaAccess, IovaRange};

/// What is mapped, by IOVA.
#[derive(Debug, Default)]
pub(super) struct LentMemory {
    mappings: RwLock<BTreeMap<u64, Entry>>,
    next: AtomicU64,
}

/// Which of all mappings that ever were: another one at the same IOVA is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Serial {
    iova: u64,
    number: u64,
}

/// A mapping that the client knows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) range: IovaRange,
    pub(super) serial: Serial,
    /// Whether the server may have it or not.
    pub(super) doubtful: bool,
}

#[derive(Debug)]
struct Entry {
    lent: Lent,
    serial: Serial,
    /// Whether the server has not answered yet that it has it.
    mapping: bool,
    /// Whether the server was asked for something, and has not answered, so that it may have the
    /// mapping or not.
    doubtful: bool,
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
    /// Puts a mapping in that the server is going to be told of; `None` if there is one already.
    pub(super) fn insert(&self, lent: Lent) -> Option<Serial> {
        let mut mappings = self.write_lock();
        let last = lent.range.last();
        let before = mappings.range(..=last).next_back();
        if before.is_some_and(|(_, before)| before.lent.range.overlaps(lent.range)) {
            return None;
        }
        let serial = Serial {
            iova: lent.range.first(),
            number: self.next.fetch_add(1, Ordering::Relaxed),
        };
        let entry = Entry {
            serial,
            mapping: true,
            doubtful: false,
            lent,
        };
        mappings.insert(entry.lent.range.first(), entry);
        Some(serial)
    }

    /// The server has answered that it has the mapping.
    pub(super) fn confirm(&self, serial: Serial) {
        self.change(serial, |entry| entry.mapping = false);
    }

    /// The server has not answered, so it may have the mapping or not.
    pub(super) fn doubt(&self, serial: Serial) {
        self.change(serial, |entry| {
            entry.mapping = false;
            entry.doubtful = true;
        });
    }

    /// Takes a mapping out; tells how many bytes it had, if it was there.
    pub(super) fn remove(&self, serial: Serial) -> u64 {
        let mut mappings = self.write_lock();
        let found = mappings.get(&serial.iova);
        if found.is_none_or(|entry| entry.serial != serial) {
            return 0;
        }
        let removed = mappings.remove(&serial.iova);
        removed.map_or(0, |entry| entry.lent.range.len())
    }

    /// The mappings that the server has, before it is told to drop all. Of those that it is just
    /// being told of nobody can say which comes first: they stay, and are in doubt.
    pub(super) fn settled(&self) -> Vec<Serial> {
        let mut mappings = self.write_lock();
        let mut settled = Vec::new();
        for entry in mappings.values_mut() {
            if entry.mapping {
                entry.doubtful = true;
            } else {
                settled.push(entry.serial);
            }
        }
        settled
    }

    /// The mappings that lie in a range.
    ///
    /// # Errors
    ///
    /// `EINVAL`: of one, a part only does.
    pub(super) fn within(&self, range: IovaRange) -> Result<Vec<Known>, Errno> {
        let mappings = self.read_lock();
        let from_end = mappings.range(..=range.last()).rev();
        let mut found = Vec::new();
        for (_, entry) in from_end.take_while(|(_, entry)| entry.lent.range.overlaps(range)) {
            if !range.contains(entry.lent.range) {
                return Err(Errno::EINVAL);
            }
            found.push(Known {
                range: entry.lent.range,
                serial: entry.serial,
                doubtful: entry.doubtful,
            });
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
        let (_, entry) = mappings.range(..=iova).next_back()?;
        (iova <= entry.lent.range.last()).then(|| entry.lent.clone())
    }

    fn change(&self, serial: Serial, change: impl FnOnce(&mut Entry)) {
        let mut mappings = self.write_lock();
        let found = mappings.get_mut(&serial.iova);
        if let Some(entry) = found.filter(|entry| entry.serial == serial) {
            change(entry);
        }
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Entry>> {
        self.mappings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Entry>> {
        self.mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
