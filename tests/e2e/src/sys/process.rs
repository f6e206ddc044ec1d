// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes, threads, signals, credentials, and the module.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::result;

/// Makes files that this thread creates or opens do so as another user and group, without the
/// rights of root.
pub fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: no memory is passed; these calls have no errors.
    unsafe { libc::setfsgid(gid) };
    // SAFETY: as above. The user is last, since with it goes the right to change the group.
    unsafe { libc::setfsuid(uid) };
}

/// Makes this process another user's, for good and without the rights of root.
///
/// # Errors
///
/// The errno of setresuid(2).
pub fn become_user(uid: u32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    result(unsafe { libc::setresuid(uid, uid, uid) })?;
    // SAFETY: as above. What the kernel forgot with the user: /proc/PID is the parent's to read.
    result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }).map(drop)
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

/// Has programs that are started from now on get a descriptor.
///
/// # Errors
///
/// The errno of fcntl(2).
pub fn inherit(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: fcntl with F_SETFD takes a number.
    result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }).map(drop)
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

/// Has every ioctl of this thread fail with `EPERM` from now on.
///
/// # Errors
///
/// The errno of `prctl`.
pub fn forbid_ioctls() -> io::Result<()> {
    // <linux/seccomp.h>: the filter sees `struct seccomp_data`, with the call's number at its start.
    let statement = |code: u32, k: u32, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_ioctl as u32,
            0,
            1,
        ),
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            0,
            0,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the option takes plain integers.
    let mut result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if result == 0 {
        let mode = libc::SECCOMP_MODE_FILTER;
        // SAFETY: the program's pointer leads to as many instructions as it says.
        result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    }
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Traces another process, stops it wherever it waits, `while_stopped`, and lets it go again.
///
/// # Errors
///
/// The errno of ptrace(2) or waitpid(2).
pub fn trace_stop(pid: i32, while_stopped: impl FnOnce()) -> io::Result<()> {
    let trace = |request: libc::c_uint| {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: none of the requests used here follows an address.
        let value = unsafe { libc::ptrace(request, pid, none, none) };
        if value < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    trace(libc::PTRACE_SEIZE)?;
    trace(libc::PTRACE_INTERRUPT)?;
    while_stopped();
    // A process whose wait only a kill ends stops when that is over.
    // SAFETY: a null status is allowed.
    result(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) })?;
    trace(libc::PTRACE_DETACH)
}
