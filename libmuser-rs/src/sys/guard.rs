// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings that survive it when their file is cut short.
//!
//! Who maps a file of somebody else's and touches a page beyond its present end gets a SIGBUS, and
//! the other side can move that end at any time. So there is a handler for the signal, installed
//! with the first mapping that needs it. It finds the mapping, puts zeroes where the file has none
//! any more, and the access goes on. Every other SIGBUS is for whoever was there before.
//!
//! The handler may come in the middle of anything, also of an allocation or of a lock's change, so
//! it allocates nothing and takes no lock. What it needs it reads from a table of atomics, whose
//! memory is never given back.

use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::ptr;
use std::sync::atomic::{
    fence, AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering,
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::unistd::ftruncate;

/// A mapping that the handler knows, as long as this lives. Whoever has it keeps the mapping in
/// place meanwhile.
#[derive(Debug)]
pub(super) struct Guard {
    slot: &'static Slot,
    index: usize,
    /// Whose size the handler asks for.
    _file: Arc<File>,
}

/// What the handler must know of a mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guarded {
    /// Address of its first byte.
    pub(super) start: usize,
    /// Bytes, a multiple of `granule`.
    pub(super) len: usize,
    /// Where it starts in the file.
    pub(super) offset: u64,
    /// Bytes which can only be replaced together: those of a page, which may be a huge one.
    pub(super) granule: usize,
    /// Whether it can be written to.
    pub(super) writable: bool,
}

impl Guard {
    /// Has the handler know a mapping of `file`, before anybody touches it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: there are too many. Else, what `sigaction` has to say.
    pub(super) fn new(file: Arc<File>, mapping: Guarded) -> Result<Self, Errno> {
        install()?;
        let index = take_place()?;
        let slot = slot(index).ok_or(Errno::ENOMEM)?;
        slot.fill(file.as_raw_fd(), &mapping);
        Ok(Self {
            slot,
            index,
            _file: file,
        })
    }

    /// Whether the file was found too short once, so that there are zeroes in its place.
    pub(super) fn is_cut(&self) -> bool {
        self.slot.cut.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.forget_spare();
        self.slot.empty();
        give_place_back(self.index);
    }
}

/// One mapping. A thread that faults holds on to the mapping which it touches, so of the one that
/// the handler is after nothing changes meanwhile. All others may, at any time.
///
/// # Invariants
///
/// `turn` is odd while the others are being changed, and another one after every change.
#[derive(Debug)]
struct Slot {
    turn: AtomicUsize,
    start: AtomicUsize,
    /// 0: there is no mapping.
    len: AtomicUsize,
    offset: AtomicU64,
    granule: AtomicUsize,
    writable: AtomicBool,
    file: AtomicI32,
    cut: AtomicBool,
    /// From which byte on the spare file is there; past the end if it is not.
    spare: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        Self {
            turn: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            offset: AtomicU64::new(0),
            granule: AtomicUsize::new(0),
            writable: AtomicBool::new(false),
            file: AtomicI32::new(-1),
            cut: AtomicBool::new(false),
            spare: AtomicUsize::new(usize::MAX),
        }
    }

    fn fill(&self, file: i32, mapping: &Guarded) {
        self.change(|| {
            self.start.store(mapping.start, Ordering::Relaxed);
            self.len.store(mapping.len, Ordering::Relaxed);
            self.offset.store(mapping.offset, Ordering::Relaxed);
            self.granule.store(mapping.granule, Ordering::Relaxed);
            self.writable.store(mapping.writable, Ordering::Relaxed);
            self.file.store(file, Ordering::Relaxed);
            self.cut.store(false, Ordering::Relaxed);
            self.spare.store(usize::MAX, Ordering::Relaxed);
        });
    }

    fn empty(&self) {
        self.change(|| {
            self.len.store(0, Ordering::Relaxed);
            self.file.store(-1, Ordering::Relaxed);
        });
    }

    /// What was written to the spare file is for nobody to find who is mapped at these addresses next.
    fn forget_spare(&self) {
        let spare = self.spare.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Relaxed).saturating_sub(spare);
        if len == 0 {
            return;
        }
        let start = self.start.load(Ordering::Relaxed) + spare;
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let file = SPARE.load(Ordering::Acquire);
        let (start, len) = (to_offset(start), to_offset(len));
        // SAFETY: `fallocate` leads to no memory of this process.
        unsafe { libc::fallocate(file, flags, start, len) };
    }

    /// Only the one to whom the place belongs changes it.
    fn change(&self, store: impl FnOnce()) {
        // INVARIANT: Odd from here on, even after the stores.
        self.turn.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        store();
        self.turn.fetch_add(1, Ordering::Release);
    }

    /// The mapping with its file, if it has this address.
    fn find(&self, address: usize) -> Option<(Guarded, i32)> {
        let turn = self.turn.load(Ordering::Acquire);
        let found = Guarded {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            offset: self.offset.load(Ordering::Relaxed),
            granule: self.granule.load(Ordering::Relaxed),
            writable: self.writable.load(Ordering::Relaxed),
        };
        let file = self.file.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        // One that has changed meanwhile is not the one that is being touched.
        let whole = turn % 2 == 0 && turn == self.turn.load(Ordering::Relaxed);
        let inside = address
            .checked_sub(found.start)
            .is_some_and(|at| at < found.len);
        (whole && inside && found.granule != 0).then_some((found, file))
    }
}

/// A process can have 65,530 mappings (`vm.max_map_count`), unless its administrator wants more.
const CHUNKS: usize = 1024;
const SLOTS: usize = 512;

type Chunk = [Slot; SLOTS];

/// All places, in pieces that stay for ever once they are made: a signal may look at them at any
/// time.
static TABLE: [OnceLock<Box<Chunk>>; CHUNKS] = [const { OnceLock::new() }; CHUNKS];
/// Places up to the last that was ever used.
static PLACES: AtomicUsize = AtomicUsize::new(0);
/// Those of them that are free.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

fn slot(index: usize) -> Option<&'static Slot> {
    TABLE.get(index / SLOTS)?.get()?.get(index % SLOTS)
}

fn take_place() -> Result<usize, Errno> {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(index) = free.pop() {
        return Ok(index);
    }
    let index = PLACES.load(Ordering::Relaxed);
    let chunk = TABLE.get(index / SLOTS).ok_or(Errno::ENOMEM)?;
    chunk.get_or_init(|| Box::new([const { Slot::new() }; SLOTS]));
    PLACES.store(index + 1, Ordering::Release);
    Ok(index)
}

fn give_place_back(index: usize) {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    free.push(index);
}

/// What handled the signal before.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// A file of memory with room for every address, of which no part is in use at first; -1 if there
/// could be none.
static SPARE: AtomicI32 = AtomicI32::new(-1);

fn make_spare() -> Result<(), Errno> {
    const SIZE: libc::off_t = 1 << 47;
    let file = memfd_create("muser-spare", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&file, SIZE)?;
    // It stays for ever: the handler may need it at any time.
    SPARE.store(file.into_raw_fd(), Ordering::Release);
    Ok(())
}

/// As the kernel takes it. Nothing of the address space has a larger number.
fn to_offset(number: usize) -> libc::off_t {
    libc::off_t::try_from(number).unwrap_or(libc::off_t::MAX)
}

/// The result of installing the handler.
static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();

fn install() -> Result<(), Errno> {
    *INSTALLED.get_or_init(|| {
        // Without it, there is less to fall back on.
        let _ = make_spare();
        // What is there now must be known before it is replaced.
        remember(action(None)?);
        // SAFETY: A `sigaction` is made of integers and a set of them, for which zeroes are good.
        let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        new.sa_sigaction = handler as libc::sighandler_t;
        // On the stack for signals, if the thread has one, since the handler before may need it.
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        remember(action(Some(&new))?);
        Ok(())
    })
}

/// The copy stays for ever: the handler may look at it at any time.
fn remember(before: libc::sigaction) {
    BEFORE.store(Box::leak(Box::new(before)), Ordering::Release);
}

/// What handles SIGBUS, and from now on does, if anything is to.
fn action(new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    // SAFETY: As in `install`.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or leads to an action whose handler is async-signal-safe, or was the
    // process' own before. `old` is to be written to.
    let result = unsafe { libc::sigaction(libc::SIGBUS, new, &raw mut old) };
    Errno::result(result).map(|_| old)
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let number = Errno::last_raw();
    if !mend(info) {
        pass_on(signal, info, context);
    }
    Errno::set_raw(number);
}

/// Puts zeroes where the signal says that there is nothing; tells whether it has.
fn mend(info: *const libc::siginfo_t) -> bool {
    // SAFETY: The kernel gives a handler with `SA_SIGINFO` a `siginfo_t`.
    let info = unsafe { &*info };
    // Memory that has gone bad in hardware has another code, and is nobody's truncation.
    if info.si_code != libc::BUS_ADRERR {
        return false;
    }
    // SAFETY: A SIGBUS with this code has an address.
    let address = unsafe { info.si_addr() }.addr();
    let places = PLACES.load(Ordering::Acquire);
    let found = (0..places).find_map(|index| {
        let slot = slot(index)?;
        slot.find(address)
            .map(|(mapping, file)| (slot, mapping, file))
    });
    let Some((slot, mapping, file)) = found else {
        return false;
    };
    slot.cut.store(true, Ordering::Release);
    let page = (address - mapping.start) / mapping.granule * mapping.granule;
    // All pages from the file's end on are gone with the one that was touched. A page before its end
    // could not be had (a file system is full), and others may be there.
    let beyond = size(file).is_none_or(|size| mapping.offset.saturating_add(page as u64) >= size);
    let len = if beyond {
        mapping.len - page
    } else {
        mapping.granule
    };
    // The whole of it is one mapping for another, and so succeeds where there can't be more.
    zeroes(&mapping, page, len, None)
        || zeroes(&mapping, 0, mapping.len, None)
        || spare(slot, &mapping, page)
}

/// Puts the spare file there, where memory of its own is too much for this process (`RLIMIT_DATA`,
/// `vm.overcommit_memory`): it counts by the page, and only when it is written to.
fn spare(slot: &Slot, mapping: &Guarded, page: usize) -> bool {
    let file = SPARE.load(Ordering::Acquire);
    // There is not even a page of it.
    let failed = slot.spare.load(Ordering::Acquire) <= page;
    if file < 0 || failed || !zeroes(mapping, page, mapping.len - page, Some(file)) {
        return false;
    }
    slot.spare.fetch_min(page, Ordering::AcqRel);
    true
}

/// `fstat` is async-signal-safe.
fn size(file: i32) -> Option<u64> {
    // SAFETY: A `stat` is made of integers, for which zeroes are good.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is to be written to; a descriptor that is none is an error.
    let result = unsafe { libc::fstat(file, &raw mut stat) };
    u64::try_from(stat.st_size).ok().filter(|_| result == 0)
}

/// Replaces a part of a mapping by memory of its own, or by the part of the spare file that has the
/// number of its address; tells whether that was done. `mmap` is a system call and no more.
fn zeroes(mapping: &Guarded, at: usize, len: usize, file: Option<i32>) -> bool {
    let start = ptr::with_exposed_provenance_mut(mapping.start + at);
    let write = if mapping.writable {
        libc::PROT_WRITE
    } else {
        0
    };
    let kind = match file {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let flags = kind | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let offset = file.map_or(0, |_| to_offset(mapping.start + at));
    let file = file.unwrap_or(-1);
    // SAFETY: The part lies in a mapping of files that somebody holds on to, to whom it does not
    // matter what is there: it can change at any time anyway, and is read by volatile or atomic
    // accesses.
    let result = unsafe { libc::mmap(start, len, libc::PROT_READ | write, flags, file, offset) };
    result != libc::MAP_FAILED
}

/// Does what would have been done without the handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let before = BEFORE.load(Ordering::Acquire);
    if before.is_null() {
        return default(signal, info);
    }
    // SAFETY: It is not null, and so leads to a copy that nobody changes or frees.
    let before = unsafe { &*before };
    match before.sa_sigaction {
        libc::SIG_DFL => default(signal, info),
        // What was not sent but caused can't be ignored.
        libc::SIG_IGN if is_sent(info) => {}
        libc::SIG_IGN => default(signal, info),
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: Who installed it promised a function of this type.
            let handler: Handler = unsafe { std::mem::transmute(handler) };
            masked(before, || handler(signal, info, context));
        }
        handler => {
            // SAFETY: As above, without `SA_SIGINFO`.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            masked(before, || handler(signal));
        }
    }
}

/// Runs a handler with those signals blocked that it wants blocked.
fn masked(action: &libc::sigaction, handler: impl FnOnce()) {
    // SAFETY: A set of signals is made of integers, for which zeroes are good.
    let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: Both lead to sets, of which the second is to be written to.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const action.sa_mask, &raw mut before) };
    handler();
    // SAFETY: `before` is the set that was there.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
}

/// Whether somebody sent the signal, rather than an access caused it.
fn is_sent(info: *const libc::siginfo_t) -> bool {
    // SAFETY: The kernel gives a handler with `SA_SIGINFO` a `siginfo_t`.
    let info = unsafe { &*info };
    !matches!(
        info.si_code,
        libc::BUS_ADRALN | libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR
    )
}

/// Ends the process with the signal, as without a handler.
fn default(signal: libc::c_int, info: *const libc::siginfo_t) {
    // SAFETY: A `sigaction` is made of integers and a set of them; zeroes say `SIG_DFL`.
    let default: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `sigaction` is async-signal-safe, and the default needs no handler.
    unsafe { libc::sigaction(signal, &raw const default, ptr::null_mut()) };
    // An access is made again and fails again, so that its address can be seen in a core dump.
    if is_sent(info) {
        // SAFETY: `raise` has no preconditions and is async-signal-safe.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
