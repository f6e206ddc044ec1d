// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A socket of a connection, of which both halves are used by any thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno as Number;
use nix::poll::PollFlags;
use zerocopy::IntoBytes;

use crate::vfio_user::stream::{Progress, Receiver, Sender, StreamError};
use crate::vfio_user::wire::{self, Header};

/// One socket with both of its halves.
#[derive(Debug)]
pub(in crate::client) struct Channel {
    sender: Mutex<Sender>,
    pub(super) inbound: Mutex<Inbound>,
    pub(super) socket: Arc<OwnedFd>,
    /// Whether there are whole messages which nobody has taken yet.
    pub(super) left: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) receiver: Receiver,
    /// What a DMA_READ is answered with.
    pub(super) scratch: Vec<u8>,
}

impl Channel {
    pub(in crate::client) fn new(sender: Sender, receiver: Receiver) -> Self {
        Self {
            socket: Arc::clone(sender.socket()),
            sender: Mutex::new(sender),
            inbound: Mutex::new(Inbound {
                receiver,
                scratch: Vec::new(),
            }),
            left: AtomicBool::new(false),
        }
    }

    /// What is worth waiting for. Nothing is received from a server which asks for more and more,
    /// and takes nothing of it, until it does.
    pub(super) fn wanted(&self) -> PollFlags {
        let sender = self.sender();
        match (sender.has_backlog(), sender.is_full()) {
            (_, true) => PollFlags::POLLOUT,
            (true, false) => PollFlags::POLLIN | PollFlags::POLLOUT,
            (false, false) => PollFlags::POLLIN,
        }
    }

    pub(super) fn sender(&self) -> MutexGuard<'_, Sender> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Has a channel's sender take a message.
pub(super) fn send(
    channel: &Channel,
    header: Header,
    payload: &[&[u8]],
    descriptors: &[BorrowedFd<'_>],
) -> Result<Progress, StreamError> {
    let header = sized(header, payload)?;
    channel.sender().send(&parts(&header, payload), descriptors)
}

/// Has it take a reply, whatever it keeps already.
pub(super) fn send_reply(
    channel: &Channel,
    header: Header,
    payload: &[&[u8]],
) -> Result<(), StreamError> {
    let header = sized(header, payload)?;
    let sent = channel.sender().insist(&parts(&header, payload));
    match sent {
        Ok(Progress::Sent | Progress::Kept | Progress::Full) => Ok(()),
        // That it has gone is found behind what came before.
        Err(error) if error.is_closed() => Ok(()),
        Err(error) => Err(error),
    }
}

/// A header with the size of its message.
fn sized(header: Header, payload: &[&[u8]]) -> Result<Header, StreamError> {
    let size = wire::HEADER + payload.iter().map(|part| part.len()).sum::<usize>();
    let size = u32::try_from(size).map_err(|_| StreamError::Socket(Number::EMSGSIZE))?;
    Ok(Header { size, ..header })
}

fn parts<'a>(header: &'a Header, payload: &[&'a [u8]]) -> [&'a [u8]; 4] {
    let [first, second, third] = std::array::from_fn(|at| payload.get(at).copied().unwrap_or(&[]));
    [header.as_bytes(), first, second, third]
}
