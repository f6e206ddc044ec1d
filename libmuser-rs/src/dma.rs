// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA: the client's memory, as a device reaches it by IOVA.
//!
//! A device gets a [`Dma`] from its [`Bus`](crate::Bus). Small things it copies
//! ([`read`](Dma::read), [`write_obj`](Dma::write_obj)); what it comes back to, a ring or a buffer,
//! it [maps](Dma::map) once and then uses in place.
//!
//! # What is checked, and when
//!
//! Every address comes from a guest. Each use checks, without a system call, that the guest lets
//! the device be a bus master (else `EPERM`), that the bytes lie in the range (else `EINVAL`), and
//! that the client has not unmapped memory since; if it has, the range is looked up again, and the
//! use reaches what is mapped at that IOVA now, or fails with `EFAULT`. What the client has mapped
//! for reading only can't be written (`EPERM`). Nothing here panics or faults for what a guest says.
//!
//! The client can change its memory at any time: a value that is checked must be read once. So there
//! are no references to it, but copies, and the volatile slices of [`vm_memory`].
//!
//! A range of no bytes can be had anywhere, and copies of no bytes do nothing.

use std::fmt;
use std::sync::Arc;

use vm_memory::ByteValued;

use crate::error::{Errno, Error, Result};
use crate::transport::{GuestMemory, IovaRange};

mod bus_master;
mod gather;
mod range;
mod slices;

pub(crate) use bus_master::{BusMaster, Mastering};
pub use gather::ScatterGather;
pub use range::DmaRange;
pub use slices::{DmaSlice, DmaSlices};

pub use crate::transport::{DirtyLog, DmaAccess};

/// Reaches the client's memory. A handle: clone it, and use it from any thread.
///
/// # Examples
///
/// A device that adds up what a guest points it to:
///
/// ```
/// use libmuser::transport::memory::{self, ClientMemory};
/// use libmuser::{Access, Bar, Device, Dma, DmaAccess, PciBuilder, Region, Result, Server};
///
/// struct Adder {
///     dma: Dma,
///     sum: u64,
/// }
///
/// impl Device for Adder {
///     fn read(&mut self, _access: Access) -> Result<u64> {
///         Ok(self.sum)
///     }
///
///     fn write(&mut self, _access: Access, iova: u64) -> Result<()> {
///         let [first, second] = self.dma.read_obj::<[u64; 2]>(iova)?;
///         self.sum = first.wrapping_add(second);
///         self.dma.write_obj(iova + 16, self.sum)
///     }
/// }
///
/// # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
/// let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
/// let (transport, host) = memory::pair()?;
/// let mut server = Server::new(model, transport, |bus| Ok(Adder { dma: bus.dma(), sum: 0 }))?;
/// std::thread::spawn(move || server.run());
///
/// let client = host.open()?;
/// let memory = ClientMemory::new(4096)?;
/// client.dma_map(0x10000, &memory, 0..4096, DmaAccess::ReadWrite)?;
/// client.write(7, 4, &[4, 0])?; // lets it be a bus master
/// memory.write(0, &[40, 0, 0, 0, 0, 0, 0, 0, 2])?;
/// client.write(0, 0, &0x10000_u64.to_le_bytes())?;
/// let mut sum = [0; 8];
/// memory.read(16, &mut sum)?;
/// assert_eq!(u64::from_le_bytes(sum), 42);
/// assert_eq!(client.dirty_pages(0..u64::MAX, false), [0x10000]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Dma {
    memory: Arc<dyn GuestMemory>,
    bus_master: Arc<BusMaster>,
}

impl Dma {
    pub(crate) const fn new(memory: Arc<dyn GuestMemory>, bus_master: Arc<BusMaster>) -> Self {
        Self { memory, bus_master }
    }

    /// Copies out of the client's memory.
    ///
    /// # Errors
    ///
    /// `EFAULT`: not all of it is mapped. `EPERM`: the device is no bus master, or the memory is not
    /// mapped for reading. `EOVERFLOW`: it ends beyond 2^64. `EDQUOT`, `ENOMEM`: the client's or the
    /// device's limit of pinned memory. What `to` holds after an error is not said.
    pub fn read(&self, iova: u64, to: &mut [u8]) -> Result<()> {
        self.read_vectored(&mut [(iova, to)])
    }

    /// Copies into the client's memory.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); `EPERM` also if it is mapped for reading only. After an error, some
    /// of it may have been written.
    pub fn write(&self, iova: u64, from: &[u8]) -> Result<()> {
        self.write_vectored(&[(iova, from)])
    }

    /// Copies several pieces out of the client's memory, each from its IOVA, one after the other. It
    /// takes a system call at most, where one call after the other may take one each.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_vectored(&self, parts: &mut [(u64, &mut [u8])]) -> Result<()> {
        self.bus_master.check()?;
        for (iova, to) in parts.iter() {
            IovaRange::new(*iova, to.len() as u64)?;
        }
        self.memory.read(parts)
    }

    /// Copies several pieces into the client's memory, each to its IOVA, one after the other; as
    /// [`read_vectored`](Self::read_vectored).
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_vectored(&self, parts: &[(u64, &[u8])]) -> Result<()> {
        self.bus_master.check()?;
        for (iova, from) in parts {
            IovaRange::new(*iova, from.len() as u64)?;
        }
        self.memory.write(parts)
    }

    /// Reads a value, which the client may change at the same time: it may be half old, half new.
    /// [`DmaRange::load`] is atomic.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_obj<T: ByteValued>(&self, iova: u64) -> Result<T> {
        let mut value = T::zeroed();
        self.read(iova, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes a value. [`DmaRange::store`] is atomic.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_obj<T: ByteValued>(&self, iova: u64, value: T) -> Result<()> {
        self.write(iova, value.as_slice())
    }

    /// Makes `len` bytes from `iova` on ready to be used in place.
    ///
    /// The memory is held until the client unmaps it or it is [released](Self::release). Since a
    /// guest may name any length, a device should know the most that makes sense.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read) and, if `access` writes, [`write`](Self::write).
    pub fn map(&self, iova: u64, len: usize, access: DmaAccess) -> Result<DmaRange> {
        DmaRange::new(self.clone(), iova, len, access)
    }

    /// Makes pieces of the client's memory, each an IOVA and a number of bytes, ready to be used in
    /// place as if they were one.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EOVERFLOW` also if their lengths add up to more than a `usize`.
    pub fn gather(&self, parts: &[(u64, usize)], access: DmaAccess) -> Result<ScatterGather> {
        ScatterGather::new(self, parts, access)
    }

    /// Lets go of what is held of a range, but for what a [`DmaRange`] is still there of.
    ///
    /// What a device maps stays held, so that using it again costs nothing; and what it does not use
    /// is let go of when a limit is hit. So this is for a device that knows better.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW`: it ends beyond 2^64. Others: the client can't be reached any more.
    pub fn release(&self, iova: u64, len: u64) -> Result<()> {
        IovaRange::new(iova, len)?.map_or(Ok(()), |range| self.memory.release(range))
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma")
            .field("bus_master", &self.bus_master)
            .finish_non_exhaustive()
    }
}

/// An offset that is not within a range.
fn outside(offset: usize, count: usize, len: usize) -> Error {
    let message = format!("{count:#x} bytes at offset {offset:#x} of {len:#x} bytes of DMA");
    Error::new(Errno::EINVAL, message)
}
