// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The link to a supervisor: through it clients come, and it keeps what outlives this server.
//!
//! The supervisor ([`crate::supervise`]) is the process which has started this one, or a part of this
//! one; it is trusted as the kernel is over the other transport.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::sys::socket::{shutdown, Shutdown};
use nix::sys::stat::fstat;

use super::areas::make_file;
use super::door::{Door, Knock};
use super::keeper::{Keeper, Kept};
use crate::error::{Error, Result};
use crate::transport::{AttachOptions, Description};
use crate::vfio_user::control::{self, Attach, Packet, Received};
use crate::vfio_user::stream::{wait, Ready};

/// A link to a supervisor. A handle: clone it.
#[derive(Clone, Debug)]
pub(super) struct Link {
    control: Arc<OwnedFd>,
}

impl Link {
    pub(super) fn new(control: OwnedFd) -> Self {
        let control = Arc::new(control);
        Self { control }
    }

    fn tell(&self, packet: &Packet, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        control::send(self.control.as_fd(), packet, descriptors).map_err(failed)
    }

    /// The next packet, for which it waits.
    fn hear(&self) -> Result<(Packet, Vec<OwnedFd>)> {
        let readable = Ready {
            receive: true,
            send: false,
        };
        loop {
            match control::receive(self.control.as_fd()) {
                Received::Packet(packet, descriptors) => return Ok((packet, descriptors)),
                Received::Nothing => drop(
                    wait(self.control.as_fd(), readable, None).map_err(|_| failed(Number::EIO))?,
                ),
                Received::Closed => {
                    return Err(Error::refused(libc::ENOTCONN, "the supervisor has gone"))
                }
                Received::Malformed(malformed) => {
                    let message = format!("the supervisor does not make sense: {malformed}");
                    return Err(Error::refused(libc::EPROTO, message));
                }
            }
        }
    }
}

impl Keeper for Link {
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Kept> {
        let attach = Attach {
            description: description.clone(),
            state_size: options.state_size as u64,
            state_tag: options.state_tag,
            standby: options.standby,
        };
        self.tell(&Packet::Attach(attach), &[])?;
        let (attached, descriptors) = match self.hear()? {
            (Packet::Attached(attached), descriptors) => (attached, descriptors),
            (Packet::Refused(errno, sentence), _) => return Err(Error::refused(errno, sentence)),
            _ => return Err(unexpected()),
        };
        let mut files = descriptors.into_iter();
        let (state, areas) = if attached.recovered {
            let state = files.next().ok_or_else(unexpected)?;
            check_size(&state, options.state_size)?;
            (state, Some(files.collect()))
        } else {
            (make_file(options.state_size.max(1) as u64)?, None)
        };
        let session = if attached.session && !attached.closing {
            match self.hear()? {
                (Packet::Session { setup }, descriptors) => {
                    let stream = descriptors.into_iter().next();
                    Some((stream.ok_or_else(unexpected)?, setup))
                }
                _ => return Err(unexpected()),
            }
        } else {
            None
        };
        Ok(Kept {
            areas,
            state: Some(state),
            recovered: attached.recovered,
            closing: attached.closing,
            session,
        })
    }

    fn make_file(&self, _region: u32, size: u64) -> Result<OwnedFd> {
        make_file(size)
    }

    fn made(&self, state: BorrowedFd<'_>, areas: &[BorrowedFd<'_>]) -> Result<()> {
        self.tell(&Packet::Memory, &[&[state], areas].concat())
    }

    fn wound_up(&self, areas: &[BorrowedFd<'_>]) {
        if let Err(error) = self.tell(&Packet::Closed, areas) {
            log::debug!("{error}");
        }
    }

    fn detach(&self) {
        // Handles which the device has given away may have it for longer than the server lives.
        let _ = shutdown(self.control.as_raw_fd(), Shutdown::Both);
    }
}

impl Door for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    fn accept(&self) -> Result<Knock> {
        match control::receive(self.control.as_fd()) {
            Received::Nothing => Ok(Knock::Nobody),
            Received::Packet(Packet::Session { setup: 0 }, descriptors) => Ok(descriptors
                .into_iter()
                .next()
                .map_or(Knock::Closed, Knock::Client)),
            Received::Packet(..) | Received::Malformed(_) => {
                log::error!("the supervisor does not make sense");
                Ok(Knock::Closed)
            }
            Received::Closed => Ok(Knock::Closed),
        }
    }

    fn refuses(&self) -> bool {
        // There is no other client before the one before is wound up.
        false
    }
}

/// Whether all of the state can be mapped: what is behind the end of a file can't be touched.
fn check_size(state: &OwnedFd, size: usize) -> Result<()> {
    let found = fstat(state).map_err(failed)?.st_size;
    if u64::try_from(found).is_ok_and(|found| found >= size as u64) {
        return Ok(());
    }
    Err(unexpected())
}

fn unexpected() -> Error {
    Error::refused(libc::EPROTO, "the supervisor says something unexpected")
}

fn failed(errno: Number) -> Error {
    Error::io("talking to the supervisor", errno)
}
