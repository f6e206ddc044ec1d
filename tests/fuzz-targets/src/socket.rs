// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sending on a UNIX socket, with descriptors.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};

/// Sends bytes with descriptors, as far as the socket takes them.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights: &[_] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let bytes = [IoSlice::new(bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &bytes, rights, flags, None)
}
