// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device author writes.

use std::ops::Range;
use std::sync::Arc;

use crate::dma::Dma;
use crate::error::Result;
use crate::irq::Interrupts;
use crate::memory::SharedMemory;
use crate::region::{Access, AreaKind, Region};
use crate::server::gate::{Gate, Quiesced};
use crate::state::State;
use crate::transport::AreaMemory;

/// A device: what its registers do.
///
/// The library serves configuration space, the MSI-X table, the expansion ROM and shared memory by
/// itself; what is left comes here, as naturally aligned accesses of 1, 2, 4 or 8 bytes (see
/// [`Access`]). Whatever else a device needs, it gets from its [`Bus`] when it is made.
///
/// # Threads
///
/// One thread calls, the one that runs the [`Server`](crate::Server), and one call at a time: a
/// call is over when the next begins. A device may have threads of its own; the handles which a
/// [`Bus`] gives out work from any of them.
///
/// # Errors
///
/// An error becomes the errno which the client gets ([`Error::errno`](crate::Error::errno)), and is
/// logged with region, offset and size (the first ones at error level, then at debug level: a client
/// can cause any number). The server goes on. So does it after a write that was not
/// understood, which hardware would not report either: the default drops it, and logs at debug
/// level.
///
/// # Panics
///
/// A device whose code panics can't be trusted any more: the client gets `EIO`, and the server ends
/// with an error ([`Error::is_panicked`](crate::Error::is_panicked)). In a program built with
/// `panic = "abort"` the process ends, and muser.ko keeps the request for the next one.
pub trait Device {
    /// Reads a register. Bits beyond the access's width are ignored.
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn read(&mut self, access: Access) -> Result<u64> {
        access.unhandled_read()
    }

    /// Writes a register.
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        access.unhandled_write(value)
    }

    /// Returns to the state after power-on. The library has reset configuration space and
    /// interrupts before: nothing is raised, nothing is pending.
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn reset(&mut self, reset: Reset) -> Result<()> {
        log::debug!("{reset:?} reset: the device has nothing to do");
        Ok(())
    }

    /// Lets go of memory which the client unmaps, and of which the device has used some: when this
    /// returns, it goes.
    ///
    /// No other call is in progress. What the device's own threads do with the memory should end
    /// here, and what it has queued for later, be dropped; ranges of [`Dma`] which it holds need no
    /// care: a use of one fails with `EFAULT` from now on, until the client maps something there
    /// again. A device that takes too long loses the memory all the same.
    ///
    /// The end of a range up to the last IOVA is `u64::MAX`.
    fn dma_unmapped(&mut self, iova: Range<u64>) {
        log::debug!("IOVA {iova:#x?} is unmapped: the device has nothing to do");
    }

    /// A client has written to a [doorbell](crate::Bar::doorbells), or may have: once or several
    /// times, anywhere in the area, and without waiting for this call. Also each server begins with
    /// one, for what was rung before it was there.
    ///
    /// # Errors
    ///
    /// Any: see [`Device`]. Where the client does not wait, it does not hear of it.
    fn doorbell(&mut self, doorbell: &Doorbell) -> Result<()> {
        log::debug!("{doorbell:?}: nobody listens");
        Ok(())
    }
}

/// A device which several threads serve at a time: the same as [`Device`], for `&self`.
///
/// A [`SharedServer`](crate::SharedServer) says what runs at the same time as what: accesses and
/// doorbells do; [`reset`](Self::reset) and [`dma_unmapped`](Self::dma_unmapped) run alone.
pub trait SharedDevice: Send + Sync {
    /// Reads a register: see [`Device::read`].
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn read(&self, access: Access) -> Result<u64> {
        access.unhandled_read()
    }

    /// Writes a register: see [`Device::write`].
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn write(&self, access: Access, value: u64) -> Result<()> {
        access.unhandled_write(value)
    }

    /// Returns to the state after power-on, alone: see [`Device::reset`].
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn reset(&self, reset: Reset) -> Result<()> {
        log::debug!("{reset:?} reset: the device has nothing to do");
        Ok(())
    }

    /// A client has rung, or may have: see [`Device::doorbell`].
    ///
    /// # Errors
    ///
    /// Any: see [`Device`].
    fn doorbell(&self, doorbell: &Doorbell) -> Result<()> {
        log::debug!("{doorbell:?}: nobody listens");
        Ok(())
    }

    /// Lets go of memory which the client unmaps, alone: see [`Device::dma_unmapped`].
    fn dma_unmapped(&self, iova: Range<u64>) {
        log::debug!("IOVA {iova:#x?} is unmapped: the device has nothing to do");
    }
}

/// A thread has a shared device to itself in the shape of a reference.
impl<S: SharedDevice + ?Sized> Device for &S {
    fn read(&mut self, access: Access) -> Result<u64> {
        S::read(self, access)
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        S::write(self, access, value)
    }

    fn reset(&mut self, reset: Reset) -> Result<()> {
        S::reset(self, reset)
    }

    fn doorbell(&mut self, doorbell: &Doorbell) -> Result<()> {
        S::doorbell(self, doorbell)
    }

    fn dma_unmapped(&mut self, iova: Range<u64>) {
        S::dma_unmapped(self, iova);
    }
}

/// Why a device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reset {
    /// The client asked for it (`VFIO_DEVICE_RESET`).
    Client,
    /// The last client has closed the device: what it left behind is not for the next.
    Close,
    /// The driver initiated a function level reset.
    FunctionLevel,
    /// The function came back from D3hot, where it lost its state.
    PowerUp,
}

/// What a device can reach: its interrupts, and the memory it shares with the client.
///
/// A handle: clone it, and use it from any thread.
#[derive(Clone, Debug)]
pub struct Bus {
    pub(crate) interrupts: Interrupts,
    pub(crate) memory: Arc<[AreaMemory]>,
    pub(crate) dma: Dma,
    pub(crate) gate: Arc<Gate>,
    pub(crate) state: State,
    pub(crate) recovered: bool,
}

impl Bus {
    /// The handle that raises the device's interrupts.
    #[must_use]
    pub fn interrupts(&self) -> Interrupts {
        self.interrupts.clone()
    }

    /// The handle that reaches the client's memory.
    #[must_use]
    pub fn dma(&self) -> Dma {
        self.dma.clone()
    }

    /// The device's own [state](crate::PciBuilder::state), which survives its process.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Whether an earlier process served this device, and its state is here: the function's
    /// configuration space, its interrupts, and [`state`](Self::state). Otherwise the device has just
    /// been powered on.
    #[must_use]
    pub fn is_recovered(&self) -> bool {
        self.recovered
    }

    /// The memory of the [mappable](crate::Bar::mappable) area which starts at `offset` of a BAR.
    #[must_use]
    pub fn memory(&self, region: Region, offset: u64) -> Option<SharedMemory> {
        self.area(AreaKind::Mappable, region, offset)
    }

    /// The [doorbell area](crate::Bar::doorbells) which starts at `offset` of a BAR.
    #[must_use]
    pub fn doorbell(&self, region: Region, offset: u64) -> Option<Doorbell> {
        let memory = self.area(AreaKind::Doorbell, region, offset)?;
        Some(Doorbell {
            region,
            offset,
            memory,
        })
    }

    fn area(&self, kind: AreaKind, region: Region, offset: u64) -> Option<SharedMemory> {
        let index = region.index();
        let mut areas = self.memory.iter().filter(|area| area.kind == kind);
        let area = areas.find(|area| area.region == index && area.offset == offset)?;
        Some(area.memory.clone())
    }

    /// Waits until no call of the device is running, and keeps further ones out until what is
    /// returned is dropped. Meanwhile requests wait; those that take nothing but the kernel or the
    /// transport (shared memory, doorbells, region and interrupt information) go on.
    ///
    /// For a thread of the device's own, or an operator's. The thread that serves must not be the
    /// one which holds what is returned: it would wait for itself.
    ///
    /// # Errors
    ///
    /// `EDEADLK`: this very thread is in a call of the device.
    pub fn quiesce(&self) -> Result<Quiesced> {
        self.gate.quiesce()
    }
}

/// A doorbell area: what clients last wrote to it, and where it is. A handle: clone it, and use it
/// from any thread.
#[derive(Clone, Debug)]
pub struct Doorbell {
    region: Region,
    offset: u64,
    memory: SharedMemory,
}

impl Doorbell {
    /// The region in which it is.
    #[must_use]
    pub fn region(&self) -> Region {
        self.region
    }

    /// Where in the region it starts.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The values. Each stays until it is written again, by a client or by the device; all are zero
    /// after the last client has closed the device.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }
}
