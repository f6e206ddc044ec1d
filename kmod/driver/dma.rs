// SPDX-License-Identifier: GPL-2.0
//! DMA: what the process asks of the client's memory, and what becomes of it when the client unmaps
//! it.

use crate::{
    driver::{
        attach::read_array,
        device::{Complaint, Device},
        node::{Argument, NodeFile},
        request::Request, //
    },
    uapi::*,
    vfio::{
        page::PAGE_SIZE,
        pins::{Pages, Rights}, //
    },
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    uaccess::UserPtr, //
};

impl NodeFile {
    /// `MUSER_DMA_ACQUIRE`.
    pub(super) fn acquire(&self, argument: UserPtr) -> Result {
        let mut dma = muser_dma::read(argument)?;
        let rights = match dma.flags {
            MUSER_DMA_READ => Rights::Read,
            flags if flags & !(MUSER_DMA_READ | MUSER_DMA_WRITE) == 0 && flags != 0 => {
                Rights::Write
            }
            _ => return Err(EINVAL),
        };
        let pages = Pages::of(dma.iova, dma.length)?;
        self.serving()?;
        // Before the first page is there: what goes away from now on makes it grow.
        dma.generation = self.device.pins.generation();
        let limit = self.device.max_pinned_pages();
        let (count, result) = self.device.pins.acquire(pages, rights, limit);
        let bytes = (count as u64 * PAGE_SIZE as u64).saturating_sub(dma.iova % PAGE_SIZE as u64);
        dma.done = bytes.min(dma.length);
        dma.write(argument)?;
        result
    }

    /// `MUSER_DMA_RELEASE`.
    pub(super) fn release(&self, argument: UserPtr) -> Result {
        let mut dma = muser_dma::read(argument)?;
        if dma.flags != 0 {
            return Err(EINVAL);
        }
        let pages = Pages::of(dma.iova, dma.length)?;
        self.serving()?;
        dma.done = self.device.pins.release(pages)? * PAGE_SIZE as u64;
        dma.generation = self.device.pins.generation();
        dma.write(argument)
    }

    /// `MUSER_DMA_COPY`.
    pub(super) fn copy(&self, argument: UserPtr) -> Result {
        let mut copy = muser_dma_copy::read(argument)?;
        if copy.flags & !MUSER_DMA_COPY_WRITE != 0 || copy.reserved != 0 {
            return Err(EINVAL);
        }
        if copy.num_segments > MUSER_MAX_SEGMENTS {
            return Err(E2BIG);
        }
        self.serving()?;
        let rights = if copy.flags & MUSER_DMA_COPY_WRITE != 0 {
            Rights::Write
        } else {
            Rights::Read
        };
        let segments = read_array::<muser_dma_segment>(copy.segments, copy.num_segments)?;
        copy.done = 0;
        let result = segments
            .iter()
            .try_for_each(|segment| self.copy_segment(segment, rights, &mut copy.done));
        copy.write(argument)?;
        result
    }

    fn copy_segment(&self, segment: &muser_dma_segment, rights: Rights, total: &mut u64) -> Result {
        if segment.length == 0 {
            return Ok(());
        }
        let pages = Pages::of(segment.iova, segment.length)?;
        let limit = self.device.max_pinned_pages();
        let user = UserPtr::from_addr(usize::try_from(segment.address)?);
        let mut done = 0;
        while done < segment.length {
            let iova = segment.iova + done;
            let first = iova as usize / PAGE_SIZE;
            let ahead = Pages { first, ..pages };
            let part = self.device.pins.copy(
                iova,
                user.wrapping_byte_add(done as usize),
                (segment.length - done) as usize,
                rights,
                ahead,
                limit,
            )?;
            done += part as u64;
            *total = total.saturating_add(part as u64);
            // A second time would be another copy: the process is told how far this one came.
            if kernel::current!().signal_pending() && done < segment.length {
                return Err(EINTR);
            }
        }
        Ok(())
    }
}

impl Device {
    fn max_pinned_pages(&self) -> u64 {
        self.max_pinned.load(Relaxed) / PAGE_SIZE as u64
    }

    /// Tells the process that a range goes away, and waits until it has let go of it, but not for
    /// long: one that did not answer the last time is not waited for, unless it was heard of since.
    pub(super) fn announce_unmap(&self, iova: u64, len: u64) {
        self.counters.unmaps.add(1);
        let ms = self.unmap_timeout_ms.load(Relaxed);
        let owner = self.state.lock().attachment.as_ref().map(|now| now.owner);
        let owner = owner.filter(|owner| self.deaf.load(Relaxed) != *owner);
        if let (Some(owner), Ok(request)) = (owner, Request::unmap(iova, len)) {
            match self.perform_within(&request, ms) {
                Ok(()) => return,
                Err(error) if error == ETIMEDOUT => {
                    self.deaf.store(owner, Relaxed);
                    if self.complaints.is_first(Complaint::Unmap) {
                        pr_warn!(
                            "{}: the process did not let go of memory that its client unmaps\n",
                            self.name()
                        );
                    }
                }
                // It refused, or is gone; or the client is.
                Err(_) => {}
            }
        }
        self.counters.unmaps_forced.add(1);
    }

    /// Notes that the attachment `owner` answers again.
    pub(super) fn hears(&self, owner: u64) {
        if self.deaf.load(Relaxed) == owner {
            self.deaf.store(0, Relaxed);
        }
    }
}
