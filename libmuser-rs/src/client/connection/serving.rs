// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the server asks for, answered: reads and writes of the memory which it was lent.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::IntoBytes;

use super::channel::send_reply;
use super::{Channel, Connection, Goal};
use crate::client::failure::{self, Failure};
use crate::error::Errno;
use crate::vfio_user::stream::StreamError;
use crate::vfio_user::wire::payload::DmaAccess;
use crate::vfio_user::wire::request::ServerRequest;
use crate::vfio_user::wire::{Command, Header};

impl Connection {
    /// Does what the server asks for.
    pub(super) fn answer(
        &self,
        channel: &Channel,
        header: Header,
        body: &[u8],
        has_descriptors: bool,
        no_reply: bool,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        scratch.clear();
        let done = self.perform(header, body, has_descriptors, scratch);
        if let Err(errno) = &done {
            // A server may ask for nonsense for as long as it likes.
            let count = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
            if count <= 16 || count.is_power_of_two() {
                let what = failure::refusing(&header, *errno);
                log::warn!("{what} (number {count} that is refused)");
            }
        }
        if no_reply {
            return Ok(());
        }
        // There was room before the command was taken.
        let sent = match &done {
            Ok(access) => {
                let payload = [access.as_bytes(), scratch.as_slice()];
                send_reply(channel, header.reply(Ok(())), &payload)
            }
            Err(errno) => send_reply(channel, header.reply(Err(*errno)), &[]),
        };
        sent.map_err(Failure::from)
    }

    /// Reads or writes memory for the server; what was read is in `read`.
    fn perform(
        &self,
        header: Header,
        body: &[u8],
        has_descriptors: bool,
        read: &mut Vec<u8>,
    ) -> Result<DmaAccess, Errno> {
        let command = Command::new(header.command).ok_or(Errno::EOPNOTSUPP)?;
        let request = ServerRequest::parse(command, body).map_err(|bad| bad.errno())?;
        let request = request.ok_or(Errno::EOPNOTSUPP)?;
        let (ServerRequest::DmaRead(access) | ServerRequest::DmaWrite(access, _)) = request;
        let count = usize::try_from(access.count).unwrap_or(usize::MAX);
        if has_descriptors || count > self.data {
            return Err(Errno::EINVAL);
        }
        match request {
            ServerRequest::DmaRead(_) => {
                read.resize(count, 0);
                self.lent.read(access.address, read)?;
            }
            ServerRequest::DmaWrite(_, data) => self.lent.write(access.address, data)?,
        }
        Ok(DmaAccess {
            address: access.address,
            count: access.count,
        })
    }

    /// Serves the twin socket only, until the end.
    pub(super) fn serve_twin(&self, twin: &Channel) -> Result<(), Failure> {
        while !self.ended.load(Ordering::Acquire) {
            self.drain(twin, Goal::End, None)?;
            self.flush(twin, None)?;
            let kept = !self.flush(&self.main, None)?;
            if !kept {
                self.wake_flushing();
            }
            let mut polled = [
                PollFd::new(self.end.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stir.as_fd(), PollFlags::POLLIN),
                PollFd::new(twin.as_fd(), twin.wanted()),
                PollFd::new(self.main.as_fd(), PollFlags::POLLOUT),
            ];
            // Replies on the other socket are for those who wait for them.
            let count = if kept { 4 } else { 3 };
            match poll(&mut polled[..count], PollTimeout::NONE) {
                Ok(_) | Err(Number::EINTR) => {}
                Err(error) => return Err(StreamError::Socket(error).into()),
            }
            let is_stirred = polled[1].any().unwrap_or(false);
            if is_stirred {
                let _ = self.stir.read();
            }
        }
        Ok(())
    }
}
