// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls with any arguments, right or wrong: the only `unsafe` of the fuzzer.
//!
//! Calls take numbers, not references, since most of what is passed is no memory of ours. What keeps
//! this process sound is that addresses which the kernel may write to lie in the [`arena`](Arena), in
//! a buffer whose owner reads it after the call only, or nowhere.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Bytes of the arena: windows of [`WINDOW`] bytes.
pub(crate) const ARENA: usize = WINDOW * WINDOWS;
/// Bytes of one window.
pub(crate) const WINDOW: usize = 1 << 20;
/// How many windows there are.
pub(crate) const WINDOWS: usize = 32;

/// Start of the arena of this process; 0 before there is one.
static START: AtomicUsize = AtomicUsize::new(0);
/// Accesses to the arena that faulted.
static FAULTS: AtomicU64 = AtomicU64::new(0);

fn checked(value: i64) -> io::Result<i64> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// A system call as it is. See the top of this file for what an address may be.
///
/// # Errors
///
/// Its errno.
pub(crate) fn call(number: i64, arguments: [u64; 6]) -> io::Result<u64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: addresses are of the kinds that the top of this file lists.
    let value = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    checked(value).map(CastUnsigned::cast_unsigned_)
}

/// `i64::cast_unsigned`, which Rust 1.85 lacks.
trait CastUnsigned {
    fn cast_unsigned_(self) -> u64;
}

impl CastUnsigned for i64 {
    fn cast_unsigned_(self) -> u64 {
        u64::from_ne_bytes(self.to_ne_bytes())
    }
}

/// ioctl(2).
pub(crate) fn ioctl(fd: i32, number: u64, argument: u64) -> io::Result<u64> {
    call(libc::SYS_ioctl, [int(fd), number, argument, 0, 0, 0])
}

/// An int as a system call's argument.
pub(crate) fn int(value: i32) -> u64 {
    i64::from(value).cast_unsigned_()
}

/// Milliseconds since some moment, the same for all processes.
pub(crate) fn milliseconds() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is ours, and the clock exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec * 1000 + time.tv_nsec / 1_000_000).unwrap_or(0)
}

/// Closes a descriptor of the fuzzer's.
pub(crate) fn close(fd: i32) -> io::Result<u64> {
    call(libc::SYS_close, [int(fd), 0, 0, 0, 0, 0])
}

/// A descriptor as the e2e tests' calls take it.
///
/// It may be closed, and its number may be that of another file by now: to be told so is what a
/// fuzzer calls for.
pub(crate) fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: what is done with it is passing its number to a system call.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.max(0)) }
}

/// Forks; this process has one thread only, or the child could not go on.
pub(crate) fn fork() -> io::Result<i32> {
    // SAFETY: a fuzzing process has no other threads whose locks a child could wait for.
    let pid = unsafe { libc::fork() };
    checked(pid.into()).map(|_| pid)
}

/// Ends this process at once.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: nothing needs to be done before.
    unsafe { libc::_exit(status) }
}

/// Part of the address space in which mappings come and go.
///
/// # Invariants
///
/// Every byte of it is mapped by this type, so that nobody else's memory gets there. Nothing but
/// its methods reads or writes it, all through raw pointers.
#[derive(Debug)]
pub(crate) struct Arena {
    start: usize,
}

impl Arena {
    /// Reserves it, and has faults in it mended.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), ARENA, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        START.store(start.addr(), Ordering::Relaxed);
        for signal in [libc::SIGBUS, libc::SIGSEGV] {
            // SAFETY: all zeroes are a sigaction with an empty mask.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = mend;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            // SAFETY: the handler makes system calls and touches atomics only.
            checked(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) }.into())?;
        }
        Ok(Self {
            start: start.addr(),
        })
    }

    /// Address of a window.
    pub(crate) fn window(&self, window: usize) -> u64 {
        (self.start + (window % WINDOWS) * WINDOW) as u64
    }

    /// Maps a file there, or anonymous memory; what was there is no more.
    pub(crate) fn map(
        &self,
        window: usize,
        len: usize,
        protection: i32,
        flags: i32,
        fd: i32,
        offset: u64,
    ) -> io::Result<u64> {
        let len = len.min(WINDOW).next_multiple_of(PAGE);
        let flags = int(flags | libc::MAP_FIXED);
        let start = self.window(window);
        // A fixed mapping within the arena.
        let arguments = [start, len as u64, int(protection), flags, int(fd), offset];
        let mapped = call(libc::SYS_mmap, arguments);
        // What was there before is gone as a whole: also where a mapping failed half-way.
        let left = if mapped.is_ok() { len } else { 0 };
        if left < WINDOW {
            reserve(start as usize + left, WINDOW - left);
        }
        mapped
    }

    /// Unmaps part of a window, and reserves it again.
    pub(crate) fn unmap(&self, window: usize, offset: usize, len: usize) -> io::Result<u64> {
        let (address, len) = self.part(window, offset, len);
        let unmapped = call(libc::SYS_munmap, [address, len as u64, 0, 0, 0, 0]);
        reserve(address as usize, len);
        unmapped
    }

    /// Changes the protection of part of a window.
    pub(crate) fn protect(
        &self,
        window: usize,
        offset: usize,
        len: usize,
        protection: i32,
    ) -> io::Result<u64> {
        let (address, len) = self.part(window, offset, len);
        let arguments = [address, len as u64, int(protection), 0, 0, 0];
        call(libc::SYS_mprotect, arguments)
    }

    /// madvise(2) of part of a window.
    pub(crate) fn advise(
        &self,
        window: usize,
        offset: usize,
        len: usize,
        advice: i32,
    ) -> io::Result<u64> {
        let (address, len) = self.part(window, offset, len);
        call(
            libc::SYS_madvise,
            [address, len as u64, int(advice), 0, 0, 0],
        )
    }

    /// mremap(2) of the first bytes of a window to another, or to another length.
    pub(crate) fn remap(
        &self,
        window: usize,
        old: usize,
        new: usize,
        to: usize,
    ) -> io::Result<u64> {
        let (old, new) = (old.min(WINDOW), new.min(WINDOW));
        let (from, to) = (self.window(window), self.window(to));
        let moved = from != to;
        let flags = if moved {
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED
        } else {
            0
        };
        let arguments = [from, old as u64, new as u64, int(flags), to, 0];
        let result = call(libc::SYS_mremap, arguments);
        if result.is_ok() && moved {
            reserve(from as usize, old);
        } else if result.is_ok() && new < old {
            reserve(from as usize + new, old - new);
        }
        if result.is_err() && moved {
            // It may have unmapped the target before it failed.
            reserve(to as usize, new);
        }
        result
    }

    fn part(&self, window: usize, offset: usize, len: usize) -> (u64, usize) {
        let offset = offset % WINDOW / PAGE * PAGE;
        let len = len.clamp(1, WINDOW - offset).next_multiple_of(PAGE);
        (self.window(window) + offset as u64, len)
    }

    /// Reads bytes, whatever is mapped there; `None` if some of it faulted.
    pub(crate) fn read(&self, window: usize, offset: usize, len: usize) -> Option<Vec<u8>> {
        let before = FAULTS.load(Ordering::Relaxed);
        let start = self.window(window) as usize + offset % (WINDOW - len);
        let bytes = (start..start + len)
            .map(|address| {
                let byte = ptr::with_exposed_provenance::<u8>(address);
                // SAFETY: in the arena, which is all mapped; the handler mends what can't be read.
                unsafe { byte.read_volatile() }
            })
            .collect();
        (FAULTS.load(Ordering::Relaxed) == before).then_some(bytes)
    }

    /// Writes bytes; whether none of it faulted.
    pub(crate) fn write(&self, window: usize, offset: usize, bytes: &[u8]) -> bool {
        let before = FAULTS.load(Ordering::Relaxed);
        let start = self.window(window) as usize + offset % (WINDOW - bytes.len());
        for (address, byte) in (start..).zip(bytes) {
            let to = ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: as in `read`.
            unsafe { to.write_volatile(*byte) };
        }
        FAULTS.load(Ordering::Relaxed) == before
    }
}

/// Maps what can't be accessed, in the place of whatever was in the arena.
fn reserve(address: usize, len: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let address = ptr::with_exposed_provenance_mut(address);
    // SAFETY: within the arena, as the callers have checked.
    unsafe { libc::mmap(address, len, libc::PROT_NONE, flags, -1, 0) };
}

/// Puts a page where an access to the arena faulted, so that the access goes on; a fault elsewhere
/// is a fault of the fuzzer's own, and ends it.
extern "C" fn mend(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes what SA_SIGINFO promises.
    let info = unsafe { &*info };
    // SAFETY: these signals carry an address.
    let address = unsafe { info.si_addr() }.addr();
    let start = START.load(Ordering::Relaxed);
    if start == 0 || !(start..start + ARENA).contains(&address) {
        exit(128 + signal);
    }
    FAULTS.fetch_add(1, Ordering::Relaxed);
    let page = ptr::with_exposed_provenance_mut(address / PAGE * PAGE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a page of the arena.
    let mapped = unsafe { libc::mmap(page, PAGE, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        exit(128 + signal);
    }
}

/// Has SIGALRM come every so many milliseconds, which does nothing but interrupt what waits.
pub(crate) fn interrupt_every(milliseconds: i64) -> io::Result<()> {
    muser_e2e::sys::catch_signal(libc::SIGALRM, false)?;
    let time = libc::timeval {
        tv_sec: milliseconds / 1000,
        tv_usec: milliseconds % 1000 * 1000,
    };
    let timer = libc::itimerval {
        it_interval: time,
        it_value: time,
    };
    // SAFETY: the timer is initialised; the old one is not asked for.
    checked(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) }.into())
        .map(drop)
}

/// Memory that this process shares with those that it starts, as words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    start: *const AtomicU64,
    len: usize,
}

impl Words {
    /// Maps a file of that many words for good.
    pub(crate) fn map(file: &std::fs::File, len: usize) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (bytes, fd) = (len * 8, file.as_raw_fd());
        // SAFETY: at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast_const().cast(),
            len,
        })
    }

    /// All of them.
    pub(crate) fn all(self) -> &'static [AtomicU64] {
        // SAFETY: mapped for good and aligned to a page, and everybody uses atomics.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}
