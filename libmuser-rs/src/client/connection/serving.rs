// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the server asks for, answered: reads and writes of the memory which it was lent.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::IntoBytes;

use super::{send, Channel, Connection, Goal};
use crate::client::failure::{self, Failure};
use crate::error::Errno;
use crate::vfio_user::stream::{self, Progress, Ready, StreamError};
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
            log::warn!("{}", failure::refusing(&header, *errno));
        }
        if no_reply {
            return Ok(());
        }
        let deadline = Instant::now().checked_add(self.timeout);
        loop {
            let sent = match &done {
                Ok(access) => {
                    let payload = [access.as_bytes(), scratch.as_slice()];
                    send(channel, header.reply(Ok(())), &payload, &[])
                }
                Err(errno) => send(channel, header.reply(Err(*errno)), &[], &[]),
            };
            if sent? != Progress::Full {
                return Ok(());
            }
            // It asks for more and more, and takes nothing of it: nothing more is received from it
            // until it does.
            let wanted = Ready {
                receive: false,
                send: true,
            };
            if !stream::wait(channel.as_fd(), wanted, deadline)?.send {
                return Err(Failure::late(format!(
                    "the server has not received what it asked for in {:?}",
                    self.timeout
                )));
            }
        }
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
            let mut wanted = PollFlags::POLLIN;
            if twin.sender().flush()? == Progress::Kept {
                wanted |= PollFlags::POLLOUT;
            }
            let end = PollFd::new(self.end.as_fd(), PollFlags::POLLIN);
            let mut polled = [end, PollFd::new(twin.as_fd(), wanted)];
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(Number::EINTR) => {}
                Err(error) => return Err(StreamError::Socket(error).into()),
            }
        }
        Ok(())
    }
}
