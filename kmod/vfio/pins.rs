// SPDX-License-Identifier: GPL-2.0
//! Pages of the client's memory, pinned and kept by IOVA, and the window which shows them.
//!
//! VFIO tells an emulated device of unmaps only. So pages are pinned when somebody asks for them,
//! kept in a tree, and dropped when the client unmaps them or closes the device.
//!
//! # Locks
//!
//! - `client` covers pinning, unpinning and what is in the tree. VFIO's locks are taken inside of it,
//!   and with them the client's `mmap_lock`: so it is never taken in a page fault.
//! - `shown` covers a look into the tree together with the use of what was found (a copy, an entry in
//!   a page table) against taking it away. It is taken in page faults, under the toucher's
//!   `mmap_lock`; so nothing that may fault or wait happens inside of it.
//!
//! Order: `client`, then `shown`, then the address space's `i_mmap_rwsem`; and `mmap_lock`, then
//! `shown`.
//!
//! # Unmapping
//!
//! Once a range is dropped it must not be pinned anew before the client's unmap is over: type1 asks
//! its devices ten times to unpin, and then takes the whole kernel down. VFIO does not say when an
//! unmap is over, but it is when the task that called it leaves the kernel. Until then the range is
//! held ([`Pins::drop_unmapped`]), and who wants to pin in it is told that it is not mapped. A device
//! that has nothing pinned there holds it as well: type1 counts for all devices of a container.
//!
//! C header: `include/linux/vfio.h`.

use super::{
    bindings,
    departure::drop_at_departure,
    errno::Errno,
    inode::Inode,
    page::{Charge, SharedPage, PAGE_SIZE},
    rwlock::RwLock,
    shared::SharedMemory,
    tree::Tree,
    wait::{Moment, Timeout}, //
};
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{Acquire, Atomic, Relaxed, Release},
        Arc, //
    },
};

mod copy;
mod dirty;
mod window;

use dirty::Log;
pub(super) use dirty::Report;

/// Pages that are pinned or unpinned before others get the lock.
const BATCH: usize = 32;
/// Milliseconds for which nothing is pinned if there is no memory to hold a range by itself: longer
/// than other devices of the container may take for the same unmap.
const HOLD_ALL_MS: u32 = 30_000;

/// What may be done to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

/// A range of pages of IOVA, which is not empty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    /// Number of the first page.
    pub(crate) first: usize,
    /// Number of the last page.
    pub(crate) last: usize,
}

impl Pages {
    /// All that there can be.
    pub(crate) const ALL: Self = Self {
        first: 0,
        last: usize::MAX / PAGE_SIZE,
    };

    /// Those in which `len` bytes from `iova` on lie.
    ///
    /// # Errors
    ///
    /// `EINVAL` for no bytes, `EOVERFLOW` if they end beyond 2^64.
    pub(crate) fn of(iova: u64, len: u64) -> Result<Self> {
        let last = len.checked_sub(1).ok_or(EINVAL)?;
        let last = iova.checked_add(last).ok_or(EOVERFLOW)?;
        Ok(Self {
            first: iova as usize / PAGE_SIZE,
            last: last as usize / PAGE_SIZE,
        })
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// A pinned page, as the tree has it.
#[derive(Clone, Copy)]
struct Pin {
    /// Number of the page frame, of memory that has an address in the kernel.
    frame: u64,
    writable: bool,
}

impl Pin {
    fn from_number(number: u64) -> Self {
        Self {
            frame: number >> 1,
            writable: number & 1 != 0,
        }
    }

    fn number(self) -> u64 {
        self.frame << 1 | u64::from(self.writable)
    }
}

/// What `client` covers.
struct Client {
    /// The VFIO device, while a client has it open.
    vdev: Option<NonNull<bindings::vfio_device>>,
    /// Pages pinned.
    pinned: u64,
    /// Ranges whose unmap is not over, each with the task that unmaps it.
    holds: KVec<(Unmapper, Pages)>,
    /// Tasks which have a [`Departure`].
    departing: KVec<Unmapper>,
    /// Until when everything is held.
    all_held: Option<Moment>,
}

// SAFETY: The device may be used from any thread, as long as it is open.
unsafe impl Send for Client {}
// SAFETY: As above.
unsafe impl Sync for Client {}

impl Client {
    fn is_held(&mut self, pages: &Pages) -> bool {
        if let Some(start) = self.all_held {
            if !Timeout::until(start, HOLD_ALL_MS).is_over() {
                return true;
            }
            self.all_held = None;
        }
        self.holds.iter().any(|(_, held)| held.overlaps(pages))
    }
}

/// Pinned pages of a device's client.
#[pin_data]
pub(crate) struct Pins {
    #[pin]
    client: RwLock<Client>,
    #[pin]
    shown: RwLock<()>,
    #[pin]
    tree: Tree,
    #[pin]
    log: Log,
    /// What all windows are mappings of.
    inode: Inode,
    /// Takes writes to pages that are not pinned.
    discard: SharedPage,
    /// Page of the files at which the windows show IOVA 0.
    window: usize,
    /// Changes only under `client`.
    generation: Atomic<u64>,
    status: Arc<SharedMemory>,
    generation_offset: usize,
    pins: Atomic<u64>,
    unpins: Atomic<u64>,
}

impl Pins {
    /// Makes an empty set. Windows are mappings of `inode`, in which IOVA 0 is at page `window`. The
    /// generation is told in `status`.
    pub(crate) fn new(
        inode: Inode,
        window: usize,
        status: Arc<SharedMemory>,
        generation_offset: usize,
    ) -> Result<Arc<Self>> {
        let client = Client {
            vdev: None,
            pinned: 0,
            holds: KVec::new(),
            departing: KVec::new(),
            all_held: None,
        };
        Arc::pin_init(
            try_pin_init!(Self {
                client <- RwLock::new(client, c"muser_client", static_lock_class!()),
                shown <- RwLock::new((), c"muser_shown", static_lock_class!()),
                tree <- Tree::new(),
                log <- Log::new(),
                inode,
                discard: SharedPage::new(&Charge::current())?,
                window,
                generation: Atomic::new(0),
                status,
                generation_offset,
                pins: Atomic::new(0),
                unpins: Atomic::new(0),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Pages pinned and unpinned, since the beginning.
    pub(crate) fn counts(&self) -> (u64, u64) {
        // In this order, so that no more are unpinned than were pinned.
        let unpins = self.unpins.load(Relaxed);
        (self.pins.load(Relaxed).max(unpins), unpins)
    }

    /// What all files are to have their mappings belong to.
    pub(crate) fn inode(&self) -> &Inode {
        &self.inode
    }

    /// Whether any page of a range is pinned.
    fn any(&self, pages: Pages) -> bool {
        // What VFIO has pinned already is in the tree only when the lock is free.
        let _client = self.client.read();
        self.tree.first(pages.first, pages.last).is_some()
    }

    /// What the status page shows: it grows whenever pinned pages go.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    /// Says that a client has opened the device.
    ///
    /// # Safety
    ///
    /// `vdev` must be open until [`Pins::closed`] is called.
    pub(super) unsafe fn opened(&self, vdev: NonNull<bindings::vfio_device>) {
        self.client.write().vdev = Some(vdev);
    }

    /// Unpins everything: the client is closing the device.
    pub(super) fn closed(&self) {
        let mut client = self.client.write();
        self.drop_pages(&mut client, Pages::ALL);
        self.log.stop();
        client.vdev = None;
    }

    /// Pins all pages of a range which are not pinned yet, up to `limit` pages in all. Returns with
    /// the result how many of them, from the first on, are pinned in any case.
    ///
    /// # Errors
    ///
    /// `EFAULT`: not mapped, or being unmapped, or no memory. `EPERM`: to be written, but mapped for
    /// reading only. `EDQUOT`: over the limit. `ENOMEM`: over the client's. `EINTR`: the task is
    /// being killed. `ERESTARTSYS`: a signal came, after at least one page.
    pub(crate) fn acquire(&self, pages: Pages, rights: Rights, limit: u64) -> (usize, Result) {
        let mut next = pages.first;
        loop {
            while next <= pages.last && self.is_pinned(next, rights) {
                next += 1;
            }
            if next > pages.last {
                return (next - pages.first, Ok(()));
            }
            if kernel::current!().signal_pending() && next > pages.first {
                return (next - pages.first, Err(ERESTARTSYS));
            }
            let last = pages.last.min(next + BATCH - 1);
            // Between two batches the lock is free: an unmap need not wait for all of the range.
            let done = self.client.write_killable().and_then(|mut client| {
                self.acquire_batch(&mut client, Pages { first: next, last }, rights, limit)
            });
            match done {
                Ok(done) => next += done,
                Err(error) => return (next - pages.first, Err(error)),
            }
        }
    }

    fn is_pinned(&self, index: usize, rights: Rights) -> bool {
        let pin = self.tree.load(index).map(Pin::from_number);
        pin.is_some_and(|pin| pin.writable || rights == Rights::Read)
    }

    /// Does some of a short range: at least its first page, whose error is the result.
    fn acquire_batch(
        &self,
        client: &mut Client,
        pages: Pages,
        rights: Rights,
        limit: u64,
    ) -> Result<usize> {
        let vdev = client.vdev.ok_or(EFAULT)?;
        let first = Pages {
            last: pages.first,
            ..pages
        };
        if client.is_held(&first) {
            return Err(EFAULT);
        }
        if let Some(number) = self.tree.load(pages.first) {
            if rights == Rights::Write && !Pin::from_number(number).writable {
                return Err(EPERM);
            }
            return Ok(1);
        }
        let present = self.tree.first(pages.first, pages.last);
        let end = match present {
            _ if client.is_held(&pages) => pages.first + 1,
            Some((index, _)) => index,
            None => pages.last + 1,
        };
        let room = limit.saturating_sub(client.pinned);
        if room == 0 {
            return Err(Errno::EDQUOT.into());
        }
        let wanted = (end - pages.first).min(room as usize);
        // A page that the client lets be written is pinned for writing, whatever it is wanted for
        // first. What can't be done for all is tried for one.
        let attempts = [(wanted, true), (1, true), (1, false)];
        let mut frames = [0; BATCH];
        for (count, writable) in attempts {
            // SAFETY: The device is open as long as `client.vdev` says so, which the lock covers.
            let pinned = unsafe { pin(vdev, pages.first, &mut frames[..count], writable) };
            match pinned {
                Ok(()) => {
                    let batch = Batch {
                        pins: self,
                        vdev,
                        first: pages.first,
                        frames: &frames[..count],
                        writable,
                    };
                    batch.publish(client)?;
                    return Ok(count);
                }
                // A single page that is read-only for the client: it can be pinned for reading.
                Err(error) if error == EPERM && count == 1 && writable => {
                    if rights == Rights::Write {
                        return Err(EPERM);
                    }
                }
                Err(error) if count == 1 => return Err(error),
                Err(_) => {}
            }
        }
        Err(EFAULT)
    }

    /// Unpins what is pinned of a range; says how many pages that were.
    pub(crate) fn release(&self, pages: Pages) -> Result<u64> {
        let mut client = self.client.write_killable()?;
        Ok(self.drop_pages(&mut client, pages))
    }

    /// Unpins what is pinned of a range which the client is unmapping, and lets nobody pin in it
    /// until the current task leaves the kernel. `announce` is called before, if anything is pinned.
    pub(super) fn drop_unmapped(self: &Arc<Self>, pages: Pages, announce: impl FnOnce()) {
        // First what may fail, so that it does when there is still time.
        let departing = self.depart();
        if self.any(pages) {
            announce();
        }
        let mut client = self.client.write();
        let held =
            departing.and_then(|task| Ok(client.holds.push((task, pages), GFP_KERNEL_ACCOUNT)?));
        if held.is_err() {
            client.all_held = Some(Moment::now());
        }
        self.drop_pages(&mut client, pages);
    }

    /// Sees to it that what the current task holds is let go of when it leaves the kernel.
    fn depart(self: &Arc<Self>) -> Result<Unmapper> {
        let task = Unmapper::current();
        {
            let mut client = self.client.write();
            if client.departing.contains(&task) {
                return Ok(task);
            }
            client.departing.push(task, GFP_KERNEL_ACCOUNT)?;
        }
        drop_at_departure(Departure {
            pins: self.clone(),
            task,
        })?;
        Ok(task)
    }

    fn drop_pages(&self, client: &mut Client, pages: Pages) -> u64 {
        let mut dropped = 0;
        let mut next = pages.first;
        let mut batch = [0; BATCH];
        let mut dirty = [false; BATCH];
        loop {
            let mut count = 0;
            while count < BATCH && next <= pages.last {
                let Some((index, _)) = self.tree.first(next, pages.last) else {
                    break;
                };
                batch[count] = index;
                count += 1;
                next = index + 1;
            }
            let batch = &batch[..count];
            let (Some(&first), Some(&last)) = (batch.first(), batch.last()) else {
                return dropped;
            };
            {
                let _shown = self.shown.write();
                for (&index, dirty) in batch.iter().zip(&mut dirty) {
                    *dirty = self.tree.is_marked(index);
                    self.tree.erase(index);
                }
                // Who sees the new generation finds the pages gone, and who still finds one has the
                // old generation; who has used a window looks again afterwards, so it comes first.
                self.bump_generation();
                self.zap(first, last);
            }
            for (&index, _) in batch.iter().zip(dirty).filter(|(_, dirty)| *dirty) {
                self.log.keep(index);
            }
            if let Some(vdev) = client.vdev {
                for run in batch.chunk_by(|a, b| a + 1 == *b) {
                    // SAFETY: The device is open, and the pages are pinned: they were in the tree.
                    unsafe { unpin(vdev, run[0], run.len()) };
                }
            }
            client.pinned -= count as u64;
            self.unpins.fetch_add(count as u64, Relaxed);
            dropped += count as u64;
        }
    }

    fn bump_generation(&self) {
        let generation = self.generation.load(Relaxed) + 1;
        self.generation.store(generation, Release);
        // The page holds the whole struct, so this can't fail.
        let _ = self.status.store_long(self.generation_offset, generation);
    }
}

/// Pages that are pinned, but not in the tree yet.
struct Batch<'a> {
    pins: &'a Pins,
    vdev: NonNull<bindings::vfio_device>,
    first: usize,
    frames: &'a [u64],
    writable: bool,
}

impl Batch<'_> {
    /// Puts them into the tree. If it can't, it unpins them.
    fn publish(&self, client: &mut Client) -> Result {
        let count = self.frames.len();
        let last = self.first + count - 1;
        let mut result = Ok(());
        for (index, &frame) in (self.first..).zip(self.frames) {
            let pin = Pin {
                frame,
                writable: self.writable,
            };
            result = result.and_then(|()| self.pins.tree.store(index, pin.number()));
        }
        {
            // Who looked before that may still be about to show something else in their place.
            let _shown = self.pins.shown.write();
            if result.is_err() {
                (self.first..=last).for_each(|index| self.pins.tree.erase(index));
            }
            self.pins.zap(self.first, last);
        }
        if result.is_err() {
            // SAFETY: The device is open, and the pages were just pinned.
            unsafe { unpin(self.vdev, self.first, count) };
            return result;
        }
        client.pinned += count as u64;
        self.pins.pins.fetch_add(count as u64, Relaxed);
        Ok(())
    }
}

/// A task in a system call that unmaps. The address is not used again before the task has left it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Unmapper(usize);

impl Unmapper {
    fn current() -> Self {
        Self(kernel::current!().as_ptr() as usize)
    }
}

/// Lets go of what a task holds when it is dropped.
struct Departure {
    pins: Arc<Pins>,
    task: Unmapper,
}

impl Drop for Departure {
    fn drop(&mut self) {
        let mut client = self.pins.client.write();
        client.departing.retain(|task| *task != self.task);
        client.holds.retain(|(task, _)| *task != self.task);
    }
}

/// Pins as many pages as there is room for in `frames`, or none.
///
/// # Errors
///
/// As [`Pins::acquire`].
///
/// # Safety
///
/// `vdev` must be open.
unsafe fn pin(
    vdev: NonNull<bindings::vfio_device>,
    first: usize,
    frames: &mut [u64],
    writable: bool,
) -> Result {
    // SAFETY: By the caller, and there is room for as many frames as are asked for.
    let done = unsafe {
        bindings::muser_pin(
            vdev.as_ptr(),
            first as u64,
            frames.len(),
            writable,
            frames.as_mut_ptr(),
        )
    };
    match done {
        0 => Ok(()),
        // type1 and IOMMUFD: not mapped, not mapped any more, or mapped by a process that is gone.
        error if [EINVAL, ENOENT, ENODEV, EFAULT, EBUSY].contains(&Error::from_errno(error)) => {
            Err(EFAULT)
        }
        error => Err(Error::from_errno(error)),
    }
}

/// # Safety
///
/// `vdev` must be open, and the pages pinned.
unsafe fn unpin(vdev: NonNull<bindings::vfio_device>, first: usize, count: usize) {
    // SAFETY: By the caller.
    unsafe { bindings::muser_unpin(vdev.as_ptr(), first as u64, count) };
}
