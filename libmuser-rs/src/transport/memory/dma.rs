// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA, on the client's side: what it maps for the device, as with `VFIO_IOMMU_MAP_DMA`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::sys::memfd::{memfd_create, MFdFlags};
use vm_memory::{Bytes, VolatileSlice};

use super::Client;
use crate::sys::Mapping;
use crate::transport::dma::{Mapped, Memory};
use crate::transport::{DmaAccess, RemoteMemory};

/// Memory of a client, for the device to reach once it is [mapped](Client::dma_map). A handle: clone
/// it, and use it from any thread.
#[derive(Clone, Debug)]
pub struct ClientMemory {
    source: Source,
    writable: bool,
}

#[derive(Clone, Debug)]
enum Source {
    Direct(Arc<Mapping>),
    Remote(Arc<dyn RemoteMemory>, u64),
}

impl ClientMemory {
    /// New memory of so many bytes, which are zeroes.
    ///
    /// # Errors
    ///
    /// `EINVAL`: none at all. Else, the process can't have more.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("muser-client", MFdFlags::MFD_CLOEXEC)?);
        let size = u64::try_from(len).map_err(|_| Number::EINVAL)?;
        file.set_len(size)?;
        Self::map_file(file.as_fd(), 0, len, true)
    }

    /// `len` bytes of a file from `offset` on. A file that is cut short while it is mapped takes
    /// the process with it (SIGBUS).
    ///
    /// # Errors
    ///
    /// Those of `mmap`: the offset is not a multiple of the page size, or the file is not open for
    /// this.
    pub fn map_file(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        writable: bool,
    ) -> io::Result<Self> {
        let mapping = Mapping::new(file, offset, len, writable)?;
        Ok(Self {
            source: Source::Direct(Arc::new(mapping)),
            writable,
        })
    }

    /// `len` bytes that can't be mapped here: the device reaches them through calls.
    pub fn remote(memory: Arc<dyn RemoteMemory>, len: u64) -> Self {
        Self {
            source: Source::Remote(memory, len),
            writable: true,
        }
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there are no empty mappings")]
    pub fn len(&self) -> u64 {
        match &self.source {
            Source::Direct(mapping) => mapping.len() as u64,
            Source::Remote(_, len) => *len,
        }
    }

    /// The memory, where it is in this process.
    #[must_use]
    pub fn slice(&self) -> Option<VolatileSlice<'_>> {
        match &self.source {
            Source::Direct(mapping) => Some(mapping.slice()),
            Source::Remote(..) => None,
        }
    }

    /// Reads what is there now.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the memory. Else, what [`RemoteMemory`] says.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let at = self.check(offset, to.len())?;
        match &self.source {
            Source::Direct(mapping) => Ok(mapping
                .slice()
                .read_slice(to, at)
                .map_err(|_| Number::EINVAL)?),
            Source::Remote(remote, _) => remote.read(offset, to),
        }
    }

    /// Writes for the device to see.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and `EPERM` for a file mapped for reading only.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let at = self.check(offset, from.len())?;
        match &self.source {
            Source::Direct(_) if !self.writable => Err(Number::EPERM.into()),
            Source::Direct(mapping) => Ok(mapping
                .slice()
                .write_slice(from, at)
                .map_err(|_| Number::EINVAL)?),
            Source::Remote(remote, _) => remote.write(offset, from),
        }
    }

    fn check(&self, offset: u64, count: usize) -> io::Result<usize> {
        let end = offset.checked_add(count as u64);
        let fits = end.is_some_and(|end| end <= self.len());
        let at = usize::try_from(offset).ok().filter(|_| fits);
        Ok(at.ok_or(Number::EINVAL)?)
    }
}

/// # DMA
///
/// The clients that have a device open share one set of mappings, as those of one VFIO container
/// do; it is emptied when the last of them closes the device.
impl Client {
    /// Maps bytes of `memory` at an IOVA, for the device to use as `access` says.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the IOVA or the length is not a multiple of 4096, the length is 0, or there are not
    /// so many bytes. `EOVERFLOW`: it ends beyond 2^64. `EEXIST`: something is mapped there.
    /// `EPERM`: memory that can be read only, for the device to write to. `ENOSPC`: there are too
    /// many mappings.
    pub fn dma_map(
        &self,
        iova: u64,
        memory: &ClientMemory,
        bytes: Range<u64>,
        access: DmaAccess,
    ) -> io::Result<()> {
        let len = bytes.end.checked_sub(bytes.start).ok_or(Number::EINVAL)?;
        if bytes.end > memory.len() {
            return Err(Number::EINVAL.into());
        }
        if access.writes() && !memory.writable {
            return Err(Number::EPERM.into());
        }
        let memory = match &memory.source {
            Source::Direct(mapping) => {
                let start = usize::try_from(bytes.start).map_err(|_| Number::EINVAL)?;
                Memory::Direct(Arc::clone(mapping), start)
            }
            Source::Remote(remote, _) => Memory::Remote(Arc::clone(remote), bytes.start),
        };
        Ok(self.queue().dma().map(iova, len, access, memory)?)
    }

    /// Unmaps all that lies in a range; tells how many bytes that were.
    ///
    /// Of memory that it has used, the device is told before, and has
    /// [a while](super::Host::set_unmap_timeout) to finish.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the IOVA or the length is not a multiple of 4096, the length is 0, or a part only
    /// of some mapping lies in the range. `EOVERFLOW`: it ends beyond 2^64.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<u64> {
        let going = self.queue().dma().leave(iova, len)?;
        Ok(self.unmap(&going))
    }

    /// Unmaps everything, as `VFIO_DMA_UNMAP_FLAG_ALL` does; tells how many bytes that were.
    pub fn dma_unmap_all(&self) -> u64 {
        let going = self.queue().dma().leave_all();
        self.unmap(&going)
    }

    /// First IOVA of each page of 4096 bytes in a range which the device has written to since it was
    /// mapped, or since somebody asked with `clear`. Of memory that was unmapped there is no record.
    #[must_use]
    pub fn dirty_pages(&self, iovas: Range<u64>, clear: bool) -> Vec<u64> {
        self.queue().dma().dirty_pages(iovas, clear)
    }

    fn unmap(&self, going: &[Arc<Mapped>]) -> u64 {
        for mapped in going.iter().filter(|mapped| mapped.is_used()) {
            let range = mapped.range();
            self.queue().announce_unmap(range.first(), range.len());
        }
        self.queue().dma().remove(going)
    }
}
