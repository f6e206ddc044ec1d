// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eventfds that a peer has too, and so can do with what it likes.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

/// Takes what was signalled, without waiting, whatever the other side has set for the descriptor.
///
/// # Errors
///
/// `EAGAIN`: nothing was. Else, it is no eventfd.
pub(crate) fn take(event: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut count = [0_u8; 8];
    let slice = libc::iovec {
        iov_base: count.as_mut_ptr().cast(),
        iov_len: count.len(),
    };
    // SAFETY: `slice` leads to the 8 bytes of `count`, of which nobody else has a reference. The
    // offset -1 is that of a file without positions.
    let read =
        unsafe { libc::preadv2(event.as_raw_fd(), &raw const slice, 1, -1, libc::RWF_NOWAIT) };
    match Errno::result(read)? {
        8 => Ok(u64::from_ne_bytes(count)),
        _ => Err(Errno::EIO),
    }
}

/// Signals it. One whose counter is full is signalled already, which is all that there is to tell.
pub(crate) fn signal(event: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(event, PollFlags::POLLOUT)];
    let has_room = |fds: &[PollFd<'_>]| {
        let found = fds[0].revents().unwrap_or(PollFlags::empty());
        found.contains(PollFlags::POLLOUT)
    };
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) && has_room(&fds) {
        // The other side may fill the counter between the look and the write, which then must not
        // wait for somebody to read it. The flag is the open file's, of which the other side is an
        // owner too: only one that takes it away again just here, and fills the counter as well, can
        // still have the write wait.
        let flags = fcntl(event, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        if let Some(flags) = flags
            .ok()
            .filter(|flags| !flags.contains(OFlag::O_NONBLOCK))
        {
            let _ = fcntl(event, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK));
        }
        // What fails has no one to tell.
        let _ = nix::unistd::write(event, &1_u64.to_ne_bytes());
    }
}

/// Whether it is an eventfd; `None` where that can't be found out.
pub(crate) fn is_event(fd: BorrowedFd<'_>) -> Option<bool> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    Some(link.as_os_str() == "anon_inode:[eventfd]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;

    #[test]
    fn blocking_eventfd_without_a_signal_does_not_block() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();

        assert_eq!(take(event.as_fd()), Err(Errno::EAGAIN));
        signal(event.as_fd());
        signal(event.as_fd());
        assert_eq!(take(event.as_fd()), Ok(2));
    }

    #[test]
    fn blocking_eventfd_does_not_block_after_a_signal() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();

        signal(event.as_fd());
        let flags = fcntl(event.as_fd(), FcntlArg::F_GETFL).unwrap();

        assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn full_blocking_eventfd_does_not_block() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        event.write(u64::MAX - 1).unwrap();

        signal(event.as_fd());

        assert_eq!(take(event.as_fd()), Ok(u64::MAX - 1));
    }

    #[test]
    fn eventfd_is_told_from_other_files() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        let (pipe, _writer) = nix::unistd::pipe().unwrap();

        assert_ne!(is_event(event.as_fd()), Some(false));
        assert_ne!(is_event(pipe.as_fd()), Some(true));
    }
}
