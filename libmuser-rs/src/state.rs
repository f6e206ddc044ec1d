// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! State that survives the process: what a device keeps, and what the library keeps of its function.
//!
//! It lies in memory which the transport holds and the next process finds. All changes go through
//! a [journal], so that a kill at any instruction leaves the state before a change or the one
//! after; with a change goes the [entry](once) which says that an access is done.

use std::ops::Range;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::{Errno, Error, Result};
use crate::memory::SharedMemory;
use crate::region::Access;
use crate::transport::RequestId;

mod journal;
mod once;
#[cfg(test)]
mod tests;

pub(crate) use journal::Parts;
pub(crate) use once::Key;

use journal::Journal;
use once::{Found, Held};

/// All state of a device.
#[derive(Debug)]
pub(crate) struct Store {
    inner: Mutex<Inner>,
    /// Held by a thread that takes a request, as long as there may be replays: so that this knows
    /// of all of them when the first new request is taken.
    taking: Mutex<()>,
    expects_replays: AtomicBool,
    /// Held, shared, from the look whether it is sealed to the end of a change that counts on it.
    sealing: RwLock<()>,
}

#[derive(Debug)]
struct Inner {
    journal: Journal,
    held: Held,
}

impl Store {
    /// Takes over what is in the memory, or begins with `initial` in the library's part; tells which.
    pub(crate) fn open(memory: SharedMemory, parts: Parts, initial: &[u8]) -> Result<(Self, bool)> {
        let (journal, recovered) = Journal::open(memory, parts, initial)?;
        let inner = Mutex::new(Inner {
            journal,
            held: Held::new(recovered),
        });
        let store = Self {
            inner,
            taking: Mutex::default(),
            expects_replays: AtomicBool::new(recovered),
            sealing: RwLock::default(),
        };
        Ok((store, recovered))
    }

    /// The library's part.
    pub(crate) fn library(&self) -> Vec<u8> {
        let inner = self.lock();
        inner.journal.home()[..inner.journal.parts().library].to_vec()
    }

    /// Saves the library's part, and that something is done.
    pub(crate) fn save_library(&self, new: &[u8], done: Option<(Key, u64)>) -> Result<()> {
        self.lock().save(0, new, done)
    }

    /// The result of what is done already.
    pub(crate) fn done(&self, key: Key) -> Option<u64> {
        let inner = self.lock();
        match inner.find(key) {
            Found::Done(result) => Some(result),
            Found::Free(_) | Found::Full => None,
        }
    }

    /// To be called before a request is taken; what it gives is kept until [`turned`](Self::turned)
    /// was told.
    pub(crate) fn taking(&self) -> Option<MutexGuard<'_, ()>> {
        let expected = self.expects_replays.load(Ordering::SeqCst);
        expected.then(|| self.taking.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The reply to one request was accepted, and another was taken; that may be a replay.
    pub(crate) fn turned(&self, ended: Option<RequestId>, taken: Option<(RequestId, bool)>) {
        let mut inner = self.lock();
        if let Some(request) = ended {
            inner.held.end(request);
        }
        // A ring is not a request, and comes at any time.
        let requests = taken.filter(|(request, _)| *request != RequestId::NONE);
        if let Some((request, replay)) = requests {
            inner.held.take(request, replay);
            let expected = inner.held.expects_replays();
            self.expects_replays.store(expected, Ordering::SeqCst);
        }
    }

    /// From now on nothing is saved: the next server may have the memory.
    pub(crate) fn seal(&self) {
        let _alone = self.sealing.write().unwrap_or_else(PoisonError::into_inner);
        self.lock().journal.seal();
    }

    pub(crate) fn is_sealed(&self) -> bool {
        self.lock().journal.is_sealed()
    }

    fn author(&self) -> Vec<u8> {
        let inner = self.lock();
        let parts = *inner.journal.parts();
        inner.journal.home()[parts.at_author()..][..parts.author].to_vec()
    }

    /// Saves parts of the author's part, each with where in it it starts.
    fn save_author_parts(&self, parts: &[(usize, &[u8])]) -> Result<()> {
        let mut inner = self.lock();
        let author = inner.journal.parts().at_author();
        let parts: Vec<_> = parts.iter().map(|(at, new)| (author + at, *new)).collect();
        inner.journal.commit(&parts)
    }

    fn save_author(&self, new: &[u8], done: Option<(Key, u64)>) -> Result<()> {
        let mut inner = self.lock();
        let at = inner.journal.parts().at_author();
        inner.save(at, new, done)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn find(&self, key: Key) -> Found {
        let table = &self.journal.home()[self.journal.parts().at_table()..];
        once::find(table, &self.held, key)
    }

    fn save(&mut self, at: usize, new: &[u8], done: Option<(Key, u64)>) -> Result<()> {
        let Some((key, result)) = done else {
            return self.journal.commit(&[(at, new)]);
        };
        match self.find(key) {
            Found::Free(free) => {
                let entry = self.journal.parts().at_table() + free;
                self.journal
                    .commit(&[(at, new), (entry, &key.entry(result))])
            }
            Found::Done(_) => Err(Error::new(Errno::EINVAL, TWICE)),
            Found::Full => Err(Error::new(Errno::ENOSPC, FULL)),
        }
    }
}

const ENDED: &str = "the server has ended, and the device's state belongs to the next";
const TWICE: &str = "one access can do only one thing once";
const FULL: &str = "too many accesses of too long requests are in flight to do each of them once";

/// What a device keeps beyond the life of its process. A handle: clone it, and use it from any
/// thread.
///
/// The bytes, as many as the device [asked for](crate::PciBuilder::state), start as zeroes when the
/// device is created. They stay when the process dies, at any moment, and when a client closes the
/// device; a device that wants them gone at a [reset](crate::Device::reset) clears them there. They
/// go with the device.
///
/// What they mean is the device's affair. A later version of a program finds what an earlier one
/// has left, if both want the same number of bytes (else it is refused): a version number in the
/// first bytes does no harm.
///
/// A change costs as much as comparing and copying all the bytes, so this is for what a device must
/// not forget. What is large, and may tear, can be in [shared memory](crate::Bar::mappable).
///
/// # Examples
///
/// A counter that counts each write once, whatever happens to its process:
///
/// ```
/// # use libmuser::{Access, Device, Result, State};
/// struct Counter {
///     state: State,
/// }
///
/// impl Device for Counter {
///     fn write(&mut self, access: Access, value: u64) -> Result<()> {
///         self.state.once(&access, |bytes| {
///             bytes[0] = bytes[0].wrapping_add(value as u8);
///             0
///         })?;
///         Ok(())
///     }
/// }
/// ```
#[derive(Clone, Debug)]
pub struct State {
    inner: Arc<Author>,
}

#[derive(Debug)]
struct Author {
    store: Arc<Store>,
    /// What a closure may change. Otherwise, it is what is saved.
    bytes: Mutex<Vec<u8>>,
}

impl State {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        let bytes = Mutex::new(store.author());
        Self {
            inner: Arc::new(Author { store, bytes }),
        }
    }

    /// Looks at the bytes. The closure must not use the state, or it waits for itself.
    pub fn read<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        look(&self.lock())
    }

    /// Changes the bytes: a kill leaves all of what the closure did, or nothing of it. A closure that
    /// panics has done nothing. It must not use the state, or it waits for itself.
    ///
    /// After the server has ended, the bytes are the next one's: the closure is called, and what it
    /// changes is seen by this process alone, and not kept.
    pub fn update<R>(&self, work: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut bytes = self.lock();
        if self.inner.store.is_sealed() {
            log::warn!("the device's state changes after the end of the server: it is not kept");
        }
        let result = self.work(&mut bytes, work);
        if let Err(error) = self.inner.store.save_author(&bytes, None) {
            log::error!("the device's state could not be saved: {error}");
        }
        result
    }

    /// Changes some parts of the bytes, all at once as [`update`](Self::update) does, at the cost of
    /// those parts however many bytes there are. For a device that keeps much and changes little of
    /// it often; and for one whose own threads must not do what nobody will remember: the end of the
    /// server waits for a closure that was called.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the parts are not within the bytes, or not one after the other. `ENODEV`: the server
    /// has ended, so nothing is kept any more. In both cases the closure was not called.
    pub fn update_parts<const N: usize, R>(
        &self,
        parts: [Range<usize>; N],
        work: impl FnOnce([&mut [u8]; N]) -> R,
    ) -> Result<R> {
        let store = &self.inner.store;
        let mut bytes = self.lock();
        let sealing = store.sealing.read();
        let _kept = sealing.unwrap_or_else(PoisonError::into_inner);
        if store.is_sealed() {
            return Err(Error::new(Errno::ENODEV, ENDED));
        }
        let mut rest = 0;
        for part in &parts {
            if part.start < rest || part.end < part.start || part.end > bytes.len() {
                let message = format!("no part {part:?} of the state, behind {rest}");
                return Err(Error::new(Errno::EINVAL, message));
            }
            rest = part.end;
        }
        let result = self.work(&mut bytes, |bytes| {
            let (mut rest, mut at) = (bytes, 0);
            work(std::array::from_fn(|number| {
                let part = &parts[number];
                let (_, after) = std::mem::take(&mut rest).split_at_mut(part.start - at);
                let (part_bytes, after) = after.split_at_mut(part.len());
                (rest, at) = (after, part.end);
                part_bytes
            }))
        });
        let changed = parts.map(|part| (part.start, &bytes[part]));
        let saved = store.save_author_parts(&changed);
        if saved.is_err() {
            bytes.copy_from_slice(&store.author());
        }
        saved.map(|()| result)
    }

    /// Does something exactly once for an access, however often it is replayed: changes the bytes
    /// and remembers, in one atomic step, that this access is done and with what result. For a
    /// replay of an access that is done, the closure is not called, and the result is that of then.
    ///
    /// An access may do one thing once. What else it does (an interrupt, a copy to the client's
    /// memory) a replay does again: so do it after this, and let it depend on the result and on
    /// nothing that may have changed.
    ///
    /// # Errors
    ///
    /// `EINVAL`: this access has done its one thing. `ENOSPC`: more than 512 accesses in flight are
    /// not the first ones of their requests, as a client can have it which makes many long accesses at
    /// a time; while replays are still to come, those of an earlier server count. `ENODEV`: the server has ended, so nothing is kept any more.
    pub fn once(&self, access: &Access, work: impl FnOnce(&mut [u8]) -> u64) -> Result<u64> {
        let store = &self.inner.store;
        let mut bytes = self.lock();
        if store.is_sealed() {
            return Err(Error::new(Errno::ENODEV, ENDED));
        }
        // What is not a request, as in a device's own tests, is never replayed.
        let key = (access.request != RequestId::NONE)
            .then(|| Key::new(access.request, access.region.index(), access.offset));
        if let Some(result) = key.and_then(|key| store.done(key)) {
            if access.replay {
                return Ok(result);
            }
            return Err(Error::new(Errno::EINVAL, TWICE));
        }
        let result = self.work(&mut bytes, work);
        let saved = store.save_author(&bytes, key.map(|key| (key, result)));
        saved.inspect_err(|_| bytes.copy_from_slice(&store.author()))?;
        Ok(result)
    }

    /// Runs a closure on the bytes, which are as before if it panics.
    fn work<R>(&self, bytes: &mut [u8], work: impl FnOnce(&mut [u8]) -> R) -> R {
        catch_unwind(AssertUnwindSafe(|| work(bytes))).unwrap_or_else(|panic| {
            bytes.copy_from_slice(&self.inner.store.author());
            resume_unwind(panic)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        let bytes = self.inner.bytes.lock();
        bytes.unwrap_or_else(PoisonError::into_inner)
    }
}
