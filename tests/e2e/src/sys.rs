// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system calls that the standard library lacks, as safe functions: the only `unsafe` of the
//! tests.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

use muser_uapi::{muser_attach, muser_next, muser_query, muser_trigger};
use vfio_bindings::bindings::vfio as vfio_abi;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A structure that an ioctl takes and returns.
///
/// # Safety
///
/// Every bit pattern is a value of the type, and an ioctl given one writes within its size.
pub unsafe trait IoctlArgument {}

// SAFETY: plain integers, written as a whole.
unsafe impl IoctlArgument for muser_attach {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_next {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_trigger {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_query {}
// SAFETY: plain integers; `argsz` bounds what the kernel writes.
unsafe impl IoctlArgument for vfio_abi::vfio_device_info {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_region_info {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_irq_info {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_group_status {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_device_bind_iommufd {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_device_attach_iommufd_pt {}
// SAFETY: a descriptor passed by pointer, as VFIO_GROUP_SET_CONTAINER takes it.
unsafe impl IoctlArgument for i32 {}

fn result(value: libc::c_int) -> io::Result<libc::c_int> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// Calls an ioctl with a structure of its type.
///
/// # Errors
///
/// The errno of the ioctl. The structure holds what the kernel wrote all the same.
pub fn ioctl<T: IoctlArgument>(
    file: impl AsFd,
    number: u32,
    argument: &mut T,
) -> io::Result<libc::c_int> {
    // SAFETY: `T` promises that the ioctl stays within the structure.
    result(unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            number.into(),
            std::ptr::from_mut(argument),
        )
    })
}

/// Calls an ioctl whose argument is a number, or which has none.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_value(file: impl AsFd, number: u32, value: i32) -> io::Result<libc::c_int> {
    // SAFETY: a number is not followed; an ioctl that takes it for an address finds it in the
    // first or the last pages, where nothing is mapped.
    result(unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            number.into(),
            libc::c_long::from(value),
        )
    })
}

/// Calls an ioctl with a string.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_string(
    file: impl AsFd,
    number: u32,
    string: &std::ffi::CStr,
) -> io::Result<libc::c_int> {
    // SAFETY: the ioctl reads a string that ends.
    result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.into(), string.as_ptr()) })
}

/// Calls an ioctl with any bytes, right or wrong, and copies back what the kernel wrote.
///
/// # Errors
///
/// The errno of the ioctl.
///
/// # Panics
///
/// When the kernel wrote behind the bytes: then nothing later can be believed.
pub fn ioctl_bytes(file: impl AsFd, number: u32, bytes: &mut [u8]) -> io::Result<libc::c_int> {
    const CANARY: u8 = 0xA5;
    const SLACK: usize = 64 << 10;
    let mut buffer = vec![u64::from_ne_bytes([CANARY; 8]); (bytes.len() + SLACK).div_ceil(8)];
    let room = buffer.as_mut_slice().as_mut_bytes();
    room[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the slack is larger than any structure of the ioctls that are tried.
    let value = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.into(), room.as_mut_ptr()) };
    let value = result(value);
    bytes.copy_from_slice(&room[..bytes.len()]);
    assert!(
        room[bytes.len()..].iter().all(|&byte| byte == CANARY),
        "ioctl {number:#x} wrote behind its argument of {} bytes",
        bytes.len()
    );
    value
}

/// Calls an ioctl with the address of a byte in `memory`, from which on the argument may run into
/// memory that is not there.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_at(
    file: impl AsFd,
    number: u32,
    memory: &Mapping,
    offset: usize,
) -> io::Result<libc::c_int> {
    let address = memory.address() + offset as u64;
    // SAFETY: the address is in a mapping which is only accessed through raw pointers, or behind
    // it where `Mapping::with_hole` made sure that nothing is.
    result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.into(), address) })
}

/// Memory shared with somebody else: a file's, the kernel's or a device's.
///
/// # Invariants
///
/// `start` is the start of `len` mapped bytes, which only this value unmaps.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: accesses are volatile copies through raw pointers, sound from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` of a file.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn new(
        file: impl AsFd,
        offset: u64,
        len: usize,
        protection: i32,
        flags: i32,
    ) -> io::Result<Self> {
        let offset = i64::from_ne_bytes(offset.to_ne_bytes());
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: the kernel picks an address where nothing is.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        // INVARIANT: mmap succeeded with this length.
        Ok(Self { start, len })
    }

    /// Maps for reading and writing, shared.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn shared(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        Self::new(
            file,
            offset,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
    }

    /// Maps fresh anonymous memory of `len` bytes, a multiple of the page size, and leaves a hole
    /// of a page behind it.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2) or mprotect(2).
    pub fn with_hole(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: anonymous, at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len + PAGE, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start: NonNull<u8> =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        // SAFETY: `len` is within what was mapped.
        let hole = unsafe { start.add(len) };
        // INVARIANT: the first `len` bytes stay mapped; the page behind them is never accessible.
        let mapping = Self { start, len };
        // SAFETY: the page was mapped above and nobody knows it.
        result(unsafe { libc::mprotect(hole.as_ptr().cast(), PAGE, libc::PROT_NONE) })?;
        Ok(mapping)
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Changes the protection of the whole.
    ///
    /// # Errors
    ///
    /// The errno of mprotect(2).
    pub fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: the mapping is ours; accesses through it are raw and may fault.
        result(unsafe { libc::mprotect(self.start.as_ptr().cast(), self.len, protection) })?;
        Ok(())
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        let end = offset.checked_add(size_of::<T>());
        assert!(
            end.is_some_and(|end| end <= self.len),
            "offset {offset:#x} is not mapped"
        );
        // SAFETY: within the mapping, as just checked.
        let pointer: NonNull<T> = unsafe { self.start.add(offset) }.cast();
        assert!(pointer.is_aligned(), "offset {offset:#x} is not aligned");
        pointer
    }

    /// Reads a value in one volatile access where the machine can.
    ///
    /// # Panics
    ///
    /// When it is not within the mapping or not aligned.
    pub fn read<T: FromBytes>(&self, offset: usize) -> T {
        // SAFETY: `at` checked bounds and alignment, and any bytes are a `T`.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Writes a value in one volatile access where the machine can.
    ///
    /// # Panics
    ///
    /// When it is not within the mapping or not aligned.
    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: T) {
        // SAFETY: `at` checked bounds and alignment.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    ///
    /// When they are not within the mapping.
    pub fn read_bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len)
            .map(|at| self.read::<u8>(at))
            .collect()
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// When they are not within the mapping.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        for (at, &byte) in (offset..).zip(bytes) {
            self.write(at, byte);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the type's invariant. A hole behind stays, as no accessible memory.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Bytes of a page: muser is built for x86-64 and arm64 with 4 KiB pages in the tests.
pub const PAGE: usize = 4096;

/// A counter that the kernel and processes signal: eventfd(2), non-blocking.
#[derive(Debug)]
pub struct EventFd(File);

impl EventFd {
    /// A new one, at 0.
    ///
    /// # Errors
    ///
    /// The errno of eventfd(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = result(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: a descriptor that was just made and that nobody else has.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Adds 1.
    ///
    /// # Errors
    ///
    /// The errno of write(2).
    pub fn signal(&self) -> io::Result<()> {
        use std::io::Write;
        (&self.0).write_all(&1u64.to_ne_bytes())
    }

    /// Takes the count without waiting: 0 when nobody signalled.
    ///
    /// # Errors
    ///
    /// The errno of read(2).
    pub fn take(&self) -> io::Result<u64> {
        use std::io::Read;
        let mut count = [0; 8];
        match (&self.0).read_exact(&mut count) {
            Ok(()) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Waits for a signal and takes the count: 0 when none came in time.
    ///
    /// # Errors
    ///
    /// The errno of poll(2) or read(2).
    pub fn wait(&self, time: Duration) -> io::Result<u64> {
        poll(&self.0, libc::POLLIN, time)?;
        self.take()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Waits for events of one file; 0 when none came in time.
///
/// # Errors
///
/// The errno of poll(2).
pub fn poll(file: impl AsFd, events: i16, time: Duration) -> io::Result<i16> {
    Ok(poll_many(&[(file.as_fd(), events)], time)?[0])
}

/// Waits for events of several files; all 0 when none came in time.
///
/// # Errors
///
/// The errno of poll(2).
pub fn poll_many(files: &[(BorrowedFd<'_>, i16)], time: Duration) -> io::Result<Vec<i16>> {
    let mut polled: Vec<_> = files
        .iter()
        .map(|&(fd, events)| libc::pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        })
        .collect();
    let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the array has as many elements as is said.
    let count = unsafe {
        libc::poll(
            polled.as_mut_ptr(),
            polled.len() as libc::nfds_t,
            milliseconds,
        )
    };
    result(count)?;
    Ok(polled.iter().map(|polled| polled.revents).collect())
}

/// Makes files that this thread creates or opens do so as another user and group, without the
/// rights of root.
pub fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: no memory is passed; these calls have no errors.
    unsafe { libc::setfsgid(gid) };
    // SAFETY: as above. The user is last, since with it goes the right to change the group.
    unsafe { libc::setfsuid(uid) };
}

/// Sends a signal to a process, or to a process group if negative.
///
/// # Errors
///
/// The errno of kill(2).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sends a signal to a thread of this process.
///
/// # Errors
///
/// The errno of tgkill(2).
pub fn kill_thread(tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let value = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, signal) };
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The kernel's id of this thread.
pub fn thread_id() -> i32 {
    // SAFETY: no memory is passed, and the call can't fail.
    unsafe { libc::gettid() }
}

/// Sets what this process does at a signal: nothing, but that a system call which waits is
/// interrupted, and goes on by itself if `restart`.
///
/// # Errors
///
/// The errno of sigaction(2).
pub fn catch_signal(signal: i32, restart: bool) -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: all zeroes are a sigaction with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = if restart { libc::SA_RESTART } else { 0 };
    // SAFETY: a handler that does nothing is safe at any point.
    result(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Makes children's orphans children of this process, so that it can reap them.
///
/// # Errors
///
/// The errno of prctl(2).
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: no memory is passed.
    result(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Has the kernel kill this process when its parent ends.
///
/// # Errors
///
/// The errno of prctl(2).
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: no memory is passed.
    result(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }).map(drop)
}

/// A descriptor that is readable once the process has ended.
///
/// # Errors
///
/// The errno of pidfd_open(2).
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    result(fd)?;
    // SAFETY: a descriptor that was just made and that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reaps whichever orphan has ended; `false` when there is none.
pub fn reap_one() -> bool {
    // SAFETY: a null status is allowed.
    unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 }
}

/// Takes ownership of a descriptor which an ioctl returned.
///
/// # Safety
///
/// Nothing else owns it.
pub unsafe fn own(fd: i32) -> File {
    // SAFETY: the caller's promise.
    unsafe { File::from_raw_fd(fd) }
}

/// Calls an ioctl with a string that returns a new descriptor, as VFIO_GROUP_GET_DEVICE_FD does.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_open(file: impl AsFd, number: u32, name: &std::ffi::CStr) -> io::Result<File> {
    let fd = ioctl_string(file, number, name)?;
    // SAFETY: the kernel has just made it for this call.
    Ok(unsafe { own(fd) })
}

/// Unloads a kernel module, without waiting.
///
/// # Errors
///
/// The errno of delete_module(2).
pub fn delete_module(name: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: the name is a string that ends.
    let value = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads from a file into memory that may end before the bytes do.
///
/// # Errors
///
/// The errno of pread(2).
pub fn pread_at(
    file: impl AsFd,
    memory: &Mapping,
    offset: usize,
    count: usize,
    position: u64,
) -> io::Result<usize> {
    let address = (memory.address() as usize + offset) as *mut libc::c_void;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the bytes lie in a mapping accessed through raw pointers only, or in its hole.
    let read = unsafe {
        libc::pread(
            fd,
            address,
            count,
            i64::from_ne_bytes(position.to_ne_bytes()),
        )
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Writes to a file from memory that may end before the bytes do.
///
/// # Errors
///
/// The errno of pwrite(2).
pub fn pwrite_at(
    file: impl AsFd,
    memory: &Mapping,
    offset: usize,
    count: usize,
    position: u64,
) -> io::Result<usize> {
    let address = (memory.address() as usize + offset) as *const libc::c_void;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the bytes lie in a mapping accessed through raw pointers only, or in its hole.
    let written = unsafe {
        libc::pwrite(
            fd,
            address,
            count,
            i64::from_ne_bytes(position.to_ne_bytes()),
        )
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// Sets or clears `O_NONBLOCK`.
///
/// # Errors
///
/// The errno of fcntl(2).
pub fn set_nonblocking(file: impl AsFd, on: bool) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: no memory is passed.
    let flags = result(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    let flags = if on {
        flags | libc::O_NONBLOCK
    } else {
        flags & !libc::O_NONBLOCK
    };
    // SAFETY: no memory is passed.
    result(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) }).map(drop)
}
