// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA, on the client's side: what it maps for the device, as with `VFIO_IOMMU_MAP_DMA`.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno as Number;

use super::{Client, ClientMemory};
use crate::transport::client_memory::Source;
use crate::transport::dma::{Mapped, Memory};
use crate::transport::DmaAccess;

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
        if access.writes() && !memory.is_writable() {
            return Err(Number::EPERM.into());
        }
        let memory = match memory.source() {
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
