// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA as a device process does it: acquires, releases, copies, the window.

use std::io;

use muser_uapi::*;

use super::{Node, Request, Server};
use crate::sys::{self, Mapping, Segment};

/// What an acquire or a release said.
#[derive(Debug)]
pub struct Pinning {
    /// Bytes acquired or unpinned, said also with an error.
    pub done: u64,
    /// The generation at which the range can be used.
    pub generation: u64,
    /// Whether the whole was done.
    pub result: io::Result<()>,
}

/// A request of a client that unmaps pinned pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmap {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}

impl Request {
    /// What is unmapped, if it is a request for that.
    pub fn unmap(&self) -> Option<Unmap> {
        (self.head.kind == MUSER_REQUEST_UNMAP).then_some(Unmap {
            iova: self.head.offset,
            length: self.head.length,
        })
    }
}

impl Node {
    /// `MUSER_DMA_ACQUIRE` or `MUSER_DMA_RELEASE`, with what the module wrote.
    pub fn pinning(&self, number: u32, iova: u64, length: u64, flags: u32) -> Pinning {
        let mut dma = muser_dma {
            size: size_of::<muser_dma>() as u32,
            flags,
            iova,
            length,
            // Seen again where the module does not write it.
            done: u64::MAX,
            generation: u64::MAX,
        };
        let result = sys::ioctl(self, number, &mut dma).map(drop);
        Pinning {
            done: dma.done,
            generation: dma.generation,
            result,
        }
    }

    /// Pins a range; the generation at which it can be used.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl; `InvalidData` if it succeeded without all of the range.
    pub fn dma_acquire(&self, iova: u64, length: u64, flags: u32) -> io::Result<u64> {
        let pinning = self.pinning(MUSER_DMA_ACQUIRE, iova, length, flags);
        pinning.result?;
        if pinning.done != length {
            let message = format!("acquired {:#x} of {length:#x} bytes", pinning.done);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(pinning.generation)
    }

    /// Unpins a range; bytes unpinned.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn dma_release(&self, iova: u64, length: u64) -> io::Result<u64> {
        let pinning = self.pinning(MUSER_DMA_RELEASE, iova, length, 0);
        pinning.result.map(|()| pinning.done)
    }

    /// Copies between the client's memory and the segments; bytes copied, and whether all were.
    pub fn dma_copy(&self, flags: u32, segments: &[Segment<'_>]) -> (u64, io::Result<()>) {
        sys::dma_copy(self, flags, segments)
    }

    /// Copies from the client's memory.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn dma_read(&self, iova: u64, to: &mut [u8]) -> io::Result<()> {
        let length = to.len() as u64;
        whole(length, self.dma_copy(0, &[Segment::buffer(iova, to)]))
    }

    /// Copies to the client's memory.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn dma_write(&self, iova: u64, from: &[u8]) -> io::Result<()> {
        let mut from = from.to_vec();
        let segment = Segment::buffer(iova, &mut from);
        let length = segment.len();
        whole(length, self.dma_copy(MUSER_DMA_COPY_WRITE, &[segment]))
    }

    /// Maps a part of the window, for reading and writing.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn window(&self, iova: u64, len: usize) -> io::Result<Mapping> {
        Mapping::shared(self, MUSER_MMAP_WINDOW + iova, len)
    }

    /// Pages of the client's memory that are pinned now.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn pinned(&self) -> io::Result<u64> {
        Ok(self.query()?.pinned_pages)
    }
}

impl Server {
    /// The present generation, from a mapping of the status page.
    pub fn generation(status: &Mapping) -> u64 {
        status.read(std::mem::offset_of!(muser_status, dma_generation))
    }

    /// Waits for the request of a client that unmaps, and takes it.
    ///
    /// # Errors
    ///
    /// `TimedOut` if no request comes, `InvalidData` if another one does.
    pub fn take_unmap(&self) -> io::Result<(Request, Unmap)> {
        let request = self.take()?;
        match request.unmap() {
            Some(unmap) => Ok((request, unmap)),
            None => {
                let message = format!("{:?} came, expected an unmap", request.head);
                Err(io::Error::new(io::ErrorKind::InvalidData, message))
            }
        }
    }
}

/// Of a copy that succeeded, all bytes must be done.
fn whole(length: u64, (done, result): (u64, io::Result<()>)) -> io::Result<()> {
    result?;
    if done != length {
        let message = format!("copied {done:#x} of {length:#x} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(())
}
