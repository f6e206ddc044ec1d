// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bytes from a socket together with the descriptors that ride on them.
//!
//! `nix` can do this too, but gives no access to what came where the kernel could not install all
//! descriptors of a message, and so leaks those that it did.

use std::io::IoSliceMut;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;

/// The most descriptors that one call of `sendmsg` can send (`SCM_MAX_FD`, `include/net/scm.h`).
pub(crate) const MOST: usize = 253;
/// Bytes of a control message with as many.
const ROOM: usize = {
    const DATA: u32 = 253 * (RawFd::BITS / 8);
    assert!(DATA as usize == MOST * size_of::<RawFd>());
    // SAFETY: `CMSG_SPACE` computes, and touches no memory.
    unsafe { libc::CMSG_SPACE(DATA) as usize }
};

/// A buffer for control messages, aligned as their headers are.
#[repr(C)]
union Control {
    _header: libc::cmsghdr,
    bytes: [MaybeUninit<u8>; ROOM],
}

/// What [`receive`] found beside descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Bytes; 0 at the end of the stream.
    pub(crate) bytes: usize,
    /// Whether descriptors were lost, because this process can't have more.
    pub(crate) truncated: bool,
}

/// Receives bytes into `buffer`, without waiting for any, and puts the descriptors that came with
/// them behind what is in `descriptors`. They are closed at an exec.
///
/// # Errors
///
/// Those of `recvmsg`: `EAGAIN`, when there is nothing.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Received, Errno> {
    let mut control = Control {
        bytes: [MaybeUninit::uninit(); ROOM],
    };
    let mut slice = IoSliceMut::new(buffer);
    // SAFETY: All zeroes are a `msghdr`, whose pointers are null and whose lengths are 0.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = ptr::from_mut(&mut slice).cast();
    message.msg_iovlen = 1;
    message.msg_control = ptr::from_mut(&mut control).cast();
    message.msg_controllen = ROOM;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: `message` leads to one `iovec` (which an `IoSliceMut` is) over memory that nobody else
    // has a reference to, and to `ROOM` bytes for control messages.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let bytes = Errno::result(result)?;
    // SAFETY: The kernel has just written `message` and the control messages that it leads to.
    unsafe { adopt(&message, descriptors) };
    Ok(Received {
        bytes: usize::try_from(bytes).unwrap_or_default(),
        truncated: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Takes the descriptors out of the control messages of `message`.
///
/// # Safety
///
/// `message` is as `recvmsg` left it, its control messages too, and nobody has taken descriptors
/// out of them before.
unsafe fn adopt(message: &libc::msghdr, descriptors: &mut Vec<OwnedFd>) {
    // SAFETY: By the contract, `message` leads to control messages, or to none.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !next.is_null() {
        // SAFETY: `CMSG_FIRSTHDR` and `CMSG_NXTHDR` return a whole header, or null.
        let header = unsafe { *next };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: `CMSG_LEN` computes, and touches no memory.
            let start = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = header.cmsg_len.saturating_sub(start) / size_of::<RawFd>();
            // SAFETY: `next` leads to a whole header, behind which its data is.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(next) }.cast();
            for at in 0..count {
                // SAFETY: The kernel has put `count` numbers there.
                let place = unsafe { data.add(at) };
                // SAFETY: As above; nothing says that it is aligned.
                let number = unsafe { place.read_unaligned() };
                // SAFETY: The kernel has opened it for this call, and nobody else knows of it.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: As for `CMSG_FIRSTHDR`.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
}
