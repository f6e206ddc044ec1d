// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls that the compiler can't check: ioctls of the muser node, and mappings. The only
//! `unsafe` of the library is here.

#![expect(unsafe_code, reason = "system calls have no safe wrapper here")]

pub(crate) mod ancillary;
pub(crate) mod event;

use std::ffi::c_ulong;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
#[cfg(feature = "cli")]
use std::{
    os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
};

use muser_uapi::{
    muser_area, muser_attach, muser_dma, muser_dma_copy, muser_dma_segment, muser_doorbell,
    muser_irq, muser_next, muser_region, muser_trigger, MUSER_ATTACH, MUSER_DETACH,
    MUSER_DMA_ACQUIRE, MUSER_DMA_COPY, MUSER_DMA_COPY_WRITE, MUSER_DMA_RELEASE, MUSER_DOORBELL,
    MUSER_MAX_SEGMENTS, MUSER_NEXT, MUSER_TRIGGER,
};
use nix::errno::Errno;
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
#[cfg(feature = "cli")]
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::VolatileSlice;

mod guard;

use guard::{Guard, Guarded};

/// Bytes of a page.
pub(crate) fn page_size() -> u64 {
    // SAFETY: `sysconf` has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// Shared memory, mapped until it is dropped.
///
/// # Invariants
///
/// `start` is the start of a mapping of `len` bytes that nothing else unmaps. It is readable, and
/// writable if it was made so.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
    /// Of one whose file can be cut short by somebody else.
    guard: Option<Guard>,
}

// SAFETY: The mapping belongs to the process, not to a thread, and it is accessed by volatile or
// atomic accesses only.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset` on.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        writable: bool,
    ) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let write = if writable {
            ProtFlags::PROT_WRITE
        } else {
            ProtFlags::empty()
        };
        let protection = ProtFlags::PROT_READ | write;
        // SAFETY: The address is for the kernel to choose, so no mapping is replaced.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, offset) }?;
        // INVARIANT: `mmap` has just made the mapping, and its only owner is this value.
        Ok(Self {
            start,
            len,
            guard: None,
        })
    }

    /// As [`new`](Self::new), of a file that somebody else can cut short at any time: what is gone
    /// reads as zeroes from then on, and what is written there is lost. `granule` are the bytes of a
    /// page of it, of which `len` and `offset` are multiples.
    pub(crate) fn guarded(
        file: &Arc<File>,
        offset: u64,
        len: usize,
        writable: bool,
        granule: usize,
    ) -> Result<Self, Errno> {
        if granule == 0 || len % granule != 0 {
            return Err(Errno::EINVAL);
        }
        let mut mapping = Self::new(file.as_fd(), offset, len, writable)?;
        let guarded = Guarded {
            start: mapping.start.as_ptr().expose_provenance(),
            len,
            offset,
            granule,
            writable,
        };
        mapping.guard = Some(Guard::new(Arc::clone(file), guarded)?);
        Ok(mapping)
    }

    /// Whether its file was found too short, so that there are zeroes instead.
    pub(crate) fn is_cut(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_cut)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The memory. Who writes to a mapping that is not writable gets a SIGSEGV.
    pub(crate) fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: By the invariant, `len` bytes from `start` on are mapped as long as `self` lives,
        // and so as long as the slice.
        unsafe { VolatileSlice::new(self.start.as_ptr().cast(), self.len) }
    }

    /// Some bytes of the memory, whose writes `log` records; `None` if they end beyond it. As for
    /// [`slice`](Self::slice).
    pub(crate) fn slice_with<B: BitmapSlice>(
        &self,
        bytes: Range<usize>,
        log: B,
    ) -> Option<VolatileSlice<'_, B>> {
        let len = bytes.end.checked_sub(bytes.start)?;
        if bytes.end > self.len {
            return None;
        }
        let start: *mut u8 = self.start.as_ptr().cast();
        // SAFETY: `bytes.start` is not beyond the end of the mapping.
        let start = unsafe { start.add(bytes.start) };
        // SAFETY: By the invariant, the memory is mapped as long as `self` lives; `len` bytes from
        // `start` on lie in it.
        Some(unsafe { VolatileSlice::with_bitmap(start, len, log, None) })
    }
}

impl Mapping {
    /// Maps another file at the same place, for reading and writing: at no moment is nothing there.
    /// Who accesses it meanwhile gets what is in one of the two.
    pub(crate) fn replace(&self, file: BorrowedFd<'_>, offset: u64) -> Result<(), Errno> {
        let length = NonZeroUsize::new(self.len).ok_or(Errno::EINVAL)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let address = NonZeroUsize::new(self.start.as_ptr().expose_provenance());
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: By the invariant all of the range is this mapping's, of which nobody has
        // references, but volatile and atomic accesses only.
        unsafe { mmap(address, length, protection, flags, file, offset) }?;
        // INVARIANT: There is a mapping of the same place and size, and it is writable.
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: what is mapped at this address next is nothing for the handler to touch.
        self.guard = None;
        // SAFETY: By the invariant this is a mapping of ours; a slice of it can't outlive `self`.
        // There is nothing to be done about an error, which would mean the invariant was broken.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// `MUSER_ATTACH`, with the arrays which `attach` counts.
pub(crate) fn attach(
    node: BorrowedFd<'_>,
    attach: &mut muser_attach,
    regions: &[muser_region],
    areas: &[muser_area],
    irqs: &[muser_irq],
) -> Result<(), Errno> {
    let count = |len: usize| u32::try_from(len).map_err(|_| Errno::ENOSPC);
    attach.num_regions = count(regions.len())?;
    attach.num_areas = count(areas.len())?;
    attach.num_irqs = count(irqs.len())?;
    attach.regions = regions.as_ptr().expose_provenance() as u64;
    attach.areas = areas.as_ptr().expose_provenance() as u64;
    attach.irqs = irqs.as_ptr().expose_provenance() as u64;
    // SAFETY: The ioctl takes a `muser_attach`, whose pointers lead to arrays with as many elements
    // as it says, which the kernel only reads.
    unsafe { ioctl(node, MUSER_ATTACH, attach) }
}

/// `MUSER_NEXT`.
pub(crate) fn next(node: BorrowedFd<'_>, next: &mut muser_next) -> Result<(), Errno> {
    // SAFETY: The ioctl takes a `muser_next`, which has no pointers. It writes to slots, which are
    // accessed by volatile accesses only.
    unsafe { ioctl(node, MUSER_NEXT, next) }
}

/// `MUSER_DETACH`.
pub(crate) fn detach(node: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: The ioctl takes no argument.
    unsafe { ioctl(node, MUSER_DETACH, &mut ()) }
}

/// `MUSER_DOORBELL`: joins an area with an eventfd.
pub(crate) fn doorbell(
    node: BorrowedFd<'_>,
    size: u32,
    area: u32,
    event: BorrowedFd<'_>,
) -> Result<(), Errno> {
    let mut doorbell = muser_doorbell {
        size,
        flags: 0,
        area,
        fd: event.as_raw_fd(),
    };
    // SAFETY: The ioctl takes a `muser_doorbell`, which has no pointers.
    unsafe { ioctl(node, MUSER_DOORBELL, &mut doorbell) }
}

/// `MUSER_TRIGGER`.
pub(crate) fn trigger(node: BorrowedFd<'_>, trigger: &mut muser_trigger) -> Result<(), Errno> {
    // SAFETY: The ioctl takes a `muser_trigger`, which has no pointers.
    unsafe { ioctl(node, MUSER_TRIGGER, trigger) }
}

/// `MUSER_DMA_ACQUIRE`.
pub(crate) fn dma_acquire(node: BorrowedFd<'_>, dma: &mut muser_dma) -> Result<(), Errno> {
    // SAFETY: The ioctl takes a `muser_dma`, which has no pointers. Pages that come into the window
    // by it are accessed by volatile or atomic accesses only.
    unsafe { ioctl(node, MUSER_DMA_ACQUIRE, dma) }
}

/// `MUSER_DMA_RELEASE`.
pub(crate) fn dma_release(node: BorrowedFd<'_>, dma: &mut muser_dma) -> Result<(), Errno> {
    // SAFETY: The ioctl takes a `muser_dma`, which has no pointers.
    unsafe { ioctl(node, MUSER_DMA_RELEASE, dma) }
}

/// `MUSER_DMA_COPY` from the client's memory, of as many parts as one call takes. Tells how many
/// bytes were copied, also with an error.
pub(crate) fn dma_read(
    node: BorrowedFd<'_>,
    parts: &mut [(u64, &mut [u8])],
) -> (u64, Result<(), Errno>) {
    let segment = |(iova, to): &mut (u64, &mut [u8])| muser_dma_segment {
        iova: *iova,
        address: to.as_mut_ptr().expose_provenance() as u64,
        length: to.len() as u64,
    };
    let most = MUSER_MAX_SEGMENTS as usize;
    let segments: Vec<_> = parts.iter_mut().take(most).map(segment).collect();
    let mut copy = muser_dma_copy::default();
    // SAFETY: The segments lead to memory of ours to which nobody else has a reference.
    let result = unsafe { dma_copy(node, &mut copy, &segments) };
    (copy.done, result)
}

/// `MUSER_DMA_COPY` to the client's memory, as [`dma_read`].
pub(crate) fn dma_write(node: BorrowedFd<'_>, parts: &[(u64, &[u8])]) -> (u64, Result<(), Errno>) {
    let segment = |(iova, from): &(u64, &[u8])| muser_dma_segment {
        iova: *iova,
        address: from.as_ptr().expose_provenance() as u64,
        length: from.len() as u64,
    };
    let most = MUSER_MAX_SEGMENTS as usize;
    let segments: Vec<_> = parts.iter().take(most).map(segment).collect();
    let mut copy = muser_dma_copy {
        flags: MUSER_DMA_COPY_WRITE,
        ..muser_dma_copy::default()
    };
    // SAFETY: The segments lead to memory which the kernel only reads.
    let result = unsafe { dma_copy(node, &mut copy, &segments) };
    (copy.done, result)
}

/// # Safety
///
/// The segments lead to memory that may be read, and without `MUSER_DMA_COPY_WRITE` be written.
unsafe fn dma_copy(
    node: BorrowedFd<'_>,
    copy: &mut muser_dma_copy,
    segments: &[muser_dma_segment],
) -> Result<(), Errno> {
    copy.size = u32::try_from(size_of::<muser_dma_copy>()).map_err(|_| Errno::E2BIG)?;
    copy.segments = segments.as_ptr().expose_provenance() as u64;
    copy.num_segments = u32::try_from(segments.len()).map_err(|_| Errno::E2BIG)?;
    // SAFETY: The ioctl takes a `muser_dma_copy` with as many segments as it says, and those are
    // as the contract of this function has them.
    unsafe { ioctl(node, MUSER_DMA_COPY, copy) }
}

/// The eventfd that a signal writes to, or -1.
#[cfg(feature = "cli")]
static TERMINATION: AtomicI32 = AtomicI32::new(-1);
/// Whether one of the signals has come.
#[cfg(feature = "cli")]
static TERMINATED: AtomicBool = AtomicBool::new(false);

/// Has SIGTERM and SIGINT write to a copy of `event`, an eventfd, the first time each comes.
#[cfg(feature = "cli")]
pub(crate) fn write_on_termination(event: BorrowedFd<'_>) -> std::io::Result<()> {
    // The copy is never closed: a signal may come at any time.
    let copy = event.try_clone_to_owned()?.into_raw_fd();
    TERMINATION.store(copy, Ordering::SeqCst);
    let flags = SaFlags::SA_RESTART | SaFlags::SA_RESETHAND;
    let action = SigAction::new(SigHandler::Handler(terminate), flags, SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: Beside atomic stores, the handler calls nothing but write(2), which
        // signal-safety(7) allows.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

#[cfg(feature = "cli")]
extern "C" fn terminate(_signal: libc::c_int) {
    TERMINATED.store(true, Ordering::SeqCst);
    let one = 1_u64;
    let before = Errno::last_raw();
    let event = TERMINATION.load(Ordering::SeqCst);
    // SAFETY: The pointer leads to the 8 bytes of `one`. A write to an eventfd that fails changes
    // nothing.
    unsafe { libc::write(event, std::ptr::from_ref(&one).cast(), size_of::<u64>()) };
    Errno::set_raw(before);
}

/// Whether a signal has come since [`write_on_termination`].
#[cfg(feature = "cli")]
pub(crate) fn is_terminated() -> bool {
    TERMINATED.load(Ordering::SeqCst)
}

/// Takes the descriptor of that number, which the process was started with; programs that it starts
/// don't get it. Of the standard ones a copy is taken, since the process goes on to use them.
#[cfg(feature = "cli")]
pub(crate) fn adopt(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `F_GETFD` on a number that is no descriptor is an error, and nothing else.
    Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    if number <= libc::STDERR_FILENO {
        // SAFETY: It is open, as was just seen, and stays so: nobody closes the standard ones.
        let standard = unsafe { BorrowedFd::borrow_raw(number) };
        let copy = standard.try_clone_to_owned();
        return copy.map_err(|_| Errno::EMFILE);
    }
    // SAFETY: It is open. Whoever started the process handed it over, so nobody else here has it;
    // that it is taken once is for the caller to see to, who parses it from the command line.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    nix::fcntl::fcntl(
        &fd,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )?;
    Ok(fd)
}

/// Bytes of address space that this process may have; `None` if nobody has said.
pub(crate) fn address_space_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_AS)
}

/// File descriptors that this process may have; `None` if nobody has said.
pub(crate) fn descriptor_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_NOFILE)
}

fn soft_limit(of: libc::__rlimit_resource_t) -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a `rlimit` to be written to.
    let result = unsafe { libc::getrlimit(of, &raw mut limit) };
    (result == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// # Safety
///
/// `request` takes a pointer to a `T`, and what the ioctl reads and writes through pointers in it
/// is there.
unsafe fn ioctl<T>(node: BorrowedFd<'_>, request: u32, argument: &mut T) -> Result<(), Errno> {
    let fd = node.as_fd().as_raw_fd();
    // SAFETY: By the contract of this function.
    let result = unsafe { libc::ioctl(fd, c_ulong::from(request), std::ptr::from_mut(argument)) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn two_mappings_of_a_file_show_the_same() {
        let file = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::empty());
        let file = File::from(file.unwrap());
        file.set_len(page_size()).unwrap();
        let len = usize::try_from(page_size()).unwrap();
        let writer = Mapping::new(file.as_fd(), 0, len, true).unwrap();
        let reader = Mapping::new(file.as_fd(), 0, len, false).unwrap();

        writer.slice().write_obj(0x1234_u16, 8).unwrap();

        assert_eq!(reader.slice().read_obj::<u16>(8).unwrap(), 0x1234);
    }

    #[test]
    fn empty_mapping_is_refused() {
        let file = File::open("/dev/null").unwrap();

        assert_eq!(
            Mapping::new(file.as_fd(), 0, 0, false).unwrap_err(),
            Errno::EINVAL
        );
    }
}
