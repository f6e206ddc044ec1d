// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client can do with a device, whatever carries it.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

/// A region as a client is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes.
    pub size: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// Offset and size of each mappable area.
    pub areas: Vec<(u64, u64)>,
}

/// Memory of the device that the client has mapped.
pub trait Memory: Debug {
    /// Loads the 4 bytes at a multiple of 4.
    fn load(&self, offset: usize) -> u32;
    /// Stores 4 bytes at a multiple of 4.
    fn store(&self, offset: usize, value: u32);
}

/// What the device may do with memory of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read and write it.
    Both,
}

/// Memory of the client that the device can reach.
pub trait DmaMemory: Debug {
    /// Reads all of `to`; it ends in the memory.
    fn read(&self, offset: usize, to: &mut [u8]);
    /// Writes all of `from`; it ends in the memory.
    fn write(&self, offset: usize, from: &[u8]);

    /// So many bytes of it.
    fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }
}

/// A client that has the device open. Indexes are those of `<linux/vfio.h>`; errors carry the errno
/// that a VFIO client gets.
///
/// Threads can share it.
pub trait Client: Debug + Send + Sync {
    /// A region; `None` where the device has none.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn region(&self, index: u32) -> io::Result<Option<RegionInfo>>;

    /// Vectors of an interrupt index; 0 where the device has none.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn vectors(&self, index: u32) -> io::Result<u32>;

    /// Reads; tells how many bytes, fewer at the region's end.
    ///
    /// # Errors
    ///
    /// Those of the device, and `EINVAL` for what is no part of it.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<usize>;

    /// Writes; tells how many bytes, fewer at the region's end.
    ///
    /// # Errors
    ///
    /// As for a read.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<usize>;

    /// Gives vectors from `start` an eventfd, or takes it away.
    ///
    /// # Errors
    ///
    /// `EINVAL` for vectors that the index does not have.
    fn set_eventfds(
        &self,
        index: u32,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()>;

    /// Disables all vectors of an index.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn disable(&self, index: u32) -> io::Result<()>;

    /// Masks or unmasks one vector.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn set_mask(&self, index: u32, vector: u32, masked: bool) -> io::Result<()>;

    /// Fires one vector from the client's side, as a test of the way to it.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn fire(&self, index: u32, vector: u32) -> io::Result<()>;

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn reset(&self) -> io::Result<()>;

    /// Maps the mappable area of `len` bytes that starts at `offset` of a region.
    ///
    /// # Errors
    ///
    /// `EINVAL` where no such area is.
    fn map(&self, region: u32, offset: u64, len: usize) -> io::Result<Box<dyn Memory>>;

    /// Lets the device reach new memory, zeroed, at an IOVA. It stays mapped when it is dropped, but
    /// not longer than the client is there.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn dma_map(&self, iova: u64, len: u64, access: Access) -> io::Result<Box<dyn DmaMemory>>;

    /// Takes all memory in a range away from the device; tells how many bytes that were.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<u64>;

    /// Starts to record to which pages in a range the device writes.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn dirty_start(&self, iova: u64, len: u64) -> io::Result<()>;

    /// The first IOVA of each page of 4096 bytes to which the device wrote since the record was
    /// started or last asked for, ascending.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn dirty_pages(&self, iova: u64, len: u64) -> io::Result<Vec<u64>>;
}
