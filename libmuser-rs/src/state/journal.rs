// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that changes as a whole or not at all, though the process may be killed between any two
//! instructions.
//!
//! # Layout
//!
//! Integers have the host's byte order. The kernel makes nothing of it.
//!
//! | offset | bytes | what it is                                                              |
//! |--------|-------|-------------------------------------------------------------------------|
//! | 0      | 8     | magic, `MUSERSTA`; 0: never used                                        |
//! | 8      | 4     | version of the layout, [`VERSION`]                                      |
//! | 12     | 4     | zero                                                                    |
//! | 16     | 8     | bytes of the library's part                                             |
//! | 24     | 8     | bytes of the author's part                                              |
//! | 32     | 8     | fingerprint of the device                                               |
//! | 40     | 8     | commit: bytes of the log that are still to be applied, or 0             |
//! | 48     | 16    | zero                                                                    |
//! | 64     | …     | home: the library's part, the [table](super::once), the author's part   |
//! | …      | …     | log: records of offset in home, length (8 bytes each), and the new bytes |
//!
//! # Atomicity
//!
//! A change is written to the log, then committed by one store to the commit word, then applied to
//! home, and then forgotten by another store. Who finds a commit word that is not zero applies the
//! log once more. A process's stores become visible to the next one in the order in which they were
//! made: by the release stores among the process's own, and because a killed process runs no more.

use std::sync::atomic::{fence, Ordering};

use crate::error::{Errno, Error, Result};
use crate::hash::hash;
use crate::memory::SharedMemory;

use super::once;

const MAGIC: u64 = u64::from_ne_bytes(*b"MUSERSTA");
/// Raised whenever memory written by an earlier version of the library can't be understood.
pub(super) const VERSION: u32 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_LIBRARY: usize = 16;
const AT_AUTHOR: usize = 24;
const AT_FINGERPRINT: usize = 32;
const AT_COMMIT: usize = 40;
const HEADER: usize = 64;

/// Changes are found in blocks of this many bytes.
const BLOCK: usize = 64;
/// Offset and length.
const RECORD: usize = 16;

/// What a device keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Bytes of the library's part.
    pub(crate) library: usize,
    /// Bytes of the author's part.
    pub(crate) author: usize,
    /// What the device is: memory of another is refused.
    pub(crate) fingerprint: u64,
}

impl Parts {
    /// Bytes of memory that it takes.
    pub(crate) fn size(&self) -> usize {
        HEADER + self.home() + self.log()
    }

    /// A number that tells parts from others, and never 0: a server with others is refused before it
    /// has the device, and not only when it finds the memory.
    pub(crate) fn tag(&self) -> u64 {
        let sizes = [self.library as u64, self.author as u64];
        let words = [u64::from(VERSION), sizes[0], sizes[1], self.fingerprint];
        hash(words.map(u64::to_le_bytes).as_flattened().iter()).max(1)
    }

    pub(super) fn at_table(&self) -> usize {
        self.library.next_multiple_of(8)
    }

    pub(super) fn at_author(&self) -> usize {
        self.at_table() + once::SIZE
    }

    fn home(&self) -> usize {
        (self.at_author() + self.author).next_multiple_of(8)
    }

    /// Enough for a change of all but the table, of which one entry changes at a time. Records of
    /// neighbouring blocks are one, so there are at most half as many as blocks.
    fn log(&self) -> usize {
        let blocks = self.library.div_ceil(BLOCK) + self.author.div_ceil(BLOCK) + 2;
        blocks * (BLOCK + RECORD / 2) + 2 * RECORD + once::ENTRY
    }
}

/// A change: new bytes at an offset in home.
pub(super) type Change<'a> = (usize, &'a [u8]);

/// # Invariants
///
/// `home` is what the memory's home has, whenever no commit is under way.
#[derive(Debug)]
pub(super) struct Journal {
    memory: SharedMemory,
    parts: Parts,
    home: Vec<u8>,
    log: Vec<u8>,
    /// Whether changes are kept from the memory, which belongs to somebody else by now.
    sealed: bool,
    #[cfg(test)]
    pub(super) observer: Option<super::tests::Observer>,
}

impl Journal {
    /// Takes over what is in the memory, or begins with `initial` in the library's part and zeroes
    /// in the rest; tells which. A commit that was under way is finished.
    ///
    /// # Errors
    ///
    /// [`Error::is_refused`]: there is something else in it.
    pub(super) fn open(memory: SharedMemory, parts: Parts, initial: &[u8]) -> Result<(Self, bool)> {
        Self::new(memory, parts).start(initial)
    }

    /// As [`open`](Self::open), with somebody who looks at the memory after each store.
    #[cfg(test)]
    pub(super) fn open_observed(
        memory: SharedMemory,
        parts: Parts,
        initial: &[u8],
        observer: super::tests::Observer,
    ) -> Result<(Self, bool)> {
        let mut journal = Self::new(memory, parts);
        journal.observer = Some(observer);
        journal.start(initial)
    }

    fn new(memory: SharedMemory, parts: Parts) -> Self {
        Self {
            memory,
            parts,
            home: vec![0; parts.home()],
            log: Vec::new(),
            sealed: false,
            #[cfg(test)]
            observer: None,
        }
    }

    fn start(mut self, initial: &[u8]) -> Result<(Self, bool)> {
        let (len, size) = (self.memory.len(), self.parts.size());
        if len < size {
            return Err(refused(format!("it has {len} bytes of {size}")));
        }
        match self.word(AT_MAGIC)? {
            0 => self.format(initial).map(|()| (self, false)),
            MAGIC => {
                self.check()?;
                self.recover()?;
                Ok((self, true))
            }
            _ => Err(refused("it is not libmuser's".into())),
        }
    }

    pub(super) fn home(&self) -> &[u8] {
        &self.home
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(super) fn seal(&mut self) {
        self.sealed = true;
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Makes changes, all at once. Those of a sealed journal are lost.
    pub(super) fn commit(&mut self, changes: &[Change<'_>]) -> Result<()> {
        if self.sealed {
            return Ok(());
        }
        let mut log = std::mem::take(&mut self.log);
        log.clear();
        for (at, new) in changes {
            let old = &self.home[*at..*at + new.len()];
            for (start, end) in differences(old, new) {
                log.extend(((at + start) as u64).to_ne_bytes());
                log.extend(((end - start) as u64).to_ne_bytes());
                log.extend(&new[start..end]);
            }
        }
        if log.len() > self.parts.log() {
            let message = "a change of more parts than there is room to remember";
            return Err(Error::new(Errno::EINVAL, message));
        }
        if !log.is_empty() {
            self.put(HEADER + self.home.len(), &log)?;
            self.put_word(AT_COMMIT, log.len() as u64)?;
            self.apply(&log)?;
        }
        self.log = log;
        Ok(())
    }

    /// Brings what the log says to its place, and forgets it.
    fn apply(&mut self, log: &[u8]) -> Result<()> {
        let mut rest = log;
        while !rest.is_empty() {
            let (at, bytes, after) = record(rest).ok_or_else(damaged)?;
            let end = at.checked_add(bytes.len()).ok_or_else(damaged)?;
            let home = self.home.get_mut(at..end).ok_or_else(damaged)?;
            home.copy_from_slice(bytes);
            self.put(HEADER + at, bytes)?;
            rest = after;
        }
        self.put_word(AT_COMMIT, 0)
    }

    fn format(&mut self, initial: &[u8]) -> Result<()> {
        self.home[..initial.len()].copy_from_slice(initial);
        self.put(HEADER, &self.home)?;
        self.put(AT_VERSION, &u64::from(VERSION).to_ne_bytes())?;
        self.put_word(AT_LIBRARY, self.parts.library as u64)?;
        self.put_word(AT_AUTHOR, self.parts.author as u64)?;
        self.put_word(AT_FINGERPRINT, self.parts.fingerprint)?;
        self.put_word(AT_COMMIT, 0)?;
        self.put_word(AT_MAGIC, MAGIC)
    }

    fn check(&self) -> Result<()> {
        let version = self.memory.read::<u32>(AT_VERSION)?;
        if version != VERSION {
            let message = format!("it has layout {version}, this program knows {VERSION}");
            return Err(refused(message));
        }
        let (author, wanted) = (self.word(AT_AUTHOR)?, self.parts.author);
        if author != wanted as u64 {
            let message = format!("the device kept {author} bytes, this program wants {wanted}");
            return Err(refused(message));
        }
        let same = self.word(AT_LIBRARY)? == self.parts.library as u64
            && self.word(AT_FINGERPRINT)? == self.parts.fingerprint;
        let differs = || refused("the device had another configuration space".into());
        same.then_some(()).ok_or_else(differs)
    }

    fn recover(&mut self) -> Result<()> {
        self.memory.read_bytes(HEADER, &mut self.home)?;
        let committed = self.word(AT_COMMIT)?;
        if committed == 0 {
            return Ok(());
        }
        let len = usize::try_from(committed).map_err(|_| damaged())?;
        if len > self.parts.log() {
            return Err(damaged());
        }
        let mut log = vec![0; len];
        self.memory.read_bytes(HEADER + self.home.len(), &mut log)?;
        self.apply(&log)
    }

    fn word(&self, at: usize) -> Result<u64> {
        self.memory.load(at)
    }

    /// Stores a word after all stores before, and before all after.
    fn put_word(&self, at: usize, value: u64) -> Result<()> {
        self.memory.store(at, value)?;
        fence(Ordering::SeqCst);
        self.observe();
        Ok(())
    }

    fn put(&self, at: usize, bytes: &[u8]) -> Result<()> {
        if cfg!(test) {
            // A kill between any two of these is a test's.
            for (number, part) in bytes.chunks(8).enumerate() {
                self.memory.write_bytes(at + 8 * number, part)?;
                self.observe();
            }
            return Ok(());
        }
        self.memory.write_bytes(at, bytes)
    }

    fn observe(&self) {
        #[cfg(test)]
        if let Some(observer) = &self.observer {
            observer.see(&self.memory);
        }
    }
}

/// The first record of a log, and the rest.
fn record(log: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let (at, rest) = log.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let len = usize::try_from(u64::from_ne_bytes(*len)).ok()?;
    let (bytes, rest) = rest.split_at_checked(len)?;
    let at = usize::try_from(u64::from_ne_bytes(*at)).ok()?;
    Some((at, bytes, rest))
}

/// Where two slices of the same length differ: runs of blocks.
fn differences<'a>(old: &'a [u8], new: &'a [u8]) -> impl Iterator<Item = (usize, usize)> + 'a {
    let mut blocks = (0..)
        .step_by(BLOCK)
        .zip(old.chunks(BLOCK).zip(new.chunks(BLOCK)));
    std::iter::from_fn(move || {
        let (start, (_, block)) = blocks.find(|(_, (old, new))| old != new)?;
        let mut end = start + block.len();
        for (_, (old, new)) in blocks.by_ref() {
            if old == new {
                break;
            }
            end += new.len();
        }
        Some((start, end))
    })
}

fn refused(what: String) -> Error {
    let message =
        format!("its state can't be recovered: {what}; remove the device and create it again");
    Error::refused(libc::ESTALE, message)
}

fn damaged() -> Error {
    refused("it is damaged".into())
}
