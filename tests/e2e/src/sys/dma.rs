// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `MUSER_DMA_COPY`, whose argument leads to memory of the caller by address.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use muser_uapi::{muser_dma_copy, muser_dma_segment, MUSER_DMA_COPY};

use super::{result, Mapping, PAGE};

/// A part of a copy, and the borrow of what it leads to.
///
/// # Invariants
///
/// The address leads to memory which is borrowed mutably, or which is accessed through raw
/// pointers only, or nowhere.
#[derive(Debug)]
pub struct Segment<'a> {
    raw: muser_dma_segment,
    borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> Segment<'a> {
    fn new(iova: u64, address: u64, length: u64) -> Self {
        Self {
            raw: muser_dma_segment {
                iova,
                address,
                length,
            },
            borrow: PhantomData,
        }
    }

    /// Bytes of it.
    pub fn len(&self) -> u64 {
        self.raw.length
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.raw.length == 0
    }

    /// Copies from or to a buffer.
    pub fn buffer(iova: u64, buffer: &'a mut [u8]) -> Self {
        let address = buffer.as_mut_ptr().expose_provenance() as u64;
        // INVARIANT: borrowed mutably.
        Self::new(iova, address, buffer.len() as u64)
    }

    /// Copies from or to a mapping, from `offset` on, and on behind its end if `length` says so:
    /// into its hole, where nothing else is.
    pub fn mapped(iova: u64, memory: &'a Mapping, offset: usize, length: u64) -> Self {
        // INVARIANT: a mapping is accessed through raw pointers only.
        Self::new(iova, memory.address() + offset as u64, length)
    }

    /// Copies from or to where no program has anything.
    ///
    /// # Panics
    ///
    /// When something could be there: above the first page and below the kernel's half.
    pub fn nowhere(iova: u64, address: u64, length: u64) -> Self {
        let nowhere = address.saturating_add(length) <= PAGE as u64 || address >= 1 << 63;
        assert!(nowhere, "something may be at {address:#x}");
        // INVARIANT: the first page can't be mapped, the upper half is not the process's.
        Self::new(iova, address, length)
    }
}

/// `MUSER_DMA_COPY`: bytes copied, which the module says also when it fails.
pub fn dma_copy(file: impl AsFd, flags: u32, segments: &[Segment<'_>]) -> (u64, io::Result<()>) {
    let raw: Vec<_> = segments.iter().map(|segment| segment.raw).collect();
    let mut copy = muser_dma_copy {
        size: size_of::<muser_dma_copy>() as u32,
        flags,
        segments: raw.as_ptr().expose_provenance() as u64,
        num_segments: raw.len() as u32,
        reserved: 0,
        // Seen again where the module does not write it.
        done: u64::MAX,
    };
    // SAFETY: the module writes the argument, and what the segments lead to as they promise.
    let value = unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            MUSER_DMA_COPY.into(),
            &raw mut copy,
        )
    };
    (copy.done, result(value).map(drop))
}
