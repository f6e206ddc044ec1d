// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's memory through `muser.ko`: copies, by the kernel.

use std::os::fd::AsFd;
use std::sync::Arc;

use muser_uapi::*;
use nix::errno::Errno as Number;

use super::{size_of_u32, Node};
use crate::error::{Errno, Error, Result};
use crate::sys;
use crate::transport::dma::{Acquired, DmaAccess, GuestMemory, IovaRange};
use crate::transport::sealed;

/// The client's memory.
#[derive(Debug)]
pub(in crate::transport) struct ClientDma {
    node: Arc<Node>,
}

impl ClientDma {
    pub(super) const fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    fn pin(&self, range: IovaRange, access: DmaAccess) -> Result<u64> {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let mut dma = muser_dma {
            size: size_of_u32::<muser_dma>(),
            flags: flag(access.reads(), MUSER_DMA_READ) | flag(access.writes(), MUSER_DMA_WRITE),
            iova: range.first(),
            length: range.len(),
            ..muser_dma::default()
        };
        loop {
            return match sys::dma_acquire(self.node.file.as_fd(), &mut dma) {
                Ok(()) => Ok(dma.generation),
                Err(Number::EINTR) => continue,
                Err(errno) => Err(failed(range, errno)),
            };
        }
    }
}

/// What an errno of the DMA calls means for a range.
fn failed(range: IovaRange, errno: Number) -> Error {
    let limit = |what: &str| {
        let (first, last) = (range.first(), range.last());
        let errno = Errno::new(errno as i32).unwrap_or(Errno::EIO);
        let message = format!("holding IOVA {first:#x} to {last:#x} would exceed {what}");
        Error::new(errno, message)
    };
    match errno {
        Number::EFAULT => range.not_mapped(),
        Number::EPERM => range.read_only(),
        Number::EDQUOT => limit("the device's max_pinned"),
        Number::ENOMEM => limit("what the client may pin"),
        Number::ENODEV => Error::removed(),
        errno => Error::io("the client's memory", errno),
    }
}

impl sealed::Sealed for ClientDma {}

impl GuestMemory for ClientDma {
    fn generation(&self) -> u64 {
        self.node.dma_generation()
    }

    fn acquire(&self, range: IovaRange, access: DmaAccess) -> Result<Acquired> {
        let generation = self.pin(range, access)?;
        Ok(Acquired {
            generation,
            pieces: None,
        })
    }

    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<()> {
        for part in parts.chunks_mut(MUSER_MAX_SEGMENTS as usize) {
            let (_, result) = sys::dma_read(self.node.file.as_fd(), part);
            result.map_err(|errno| Error::io("reading the client's memory", errno))?;
        }
        Ok(())
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<()> {
        for part in parts.chunks(MUSER_MAX_SEGMENTS as usize) {
            let (_, result) = sys::dma_write(self.node.file.as_fd(), part);
            result.map_err(|errno| Error::io("writing the client's memory", errno))?;
        }
        Ok(())
    }

    fn release(&self, range: IovaRange) -> Result<()> {
        let mut dma = muser_dma {
            size: size_of_u32::<muser_dma>(),
            iova: range.first(),
            length: range.len(),
            ..muser_dma::default()
        };
        loop {
            return match sys::dma_release(self.node.file.as_fd(), &mut dma) {
                Ok(()) => Ok(()),
                Err(Number::EINTR) => continue,
                Err(errno) => Err(failed(range, errno)),
            };
        }
    }
}
