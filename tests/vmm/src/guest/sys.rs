// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a device reaches: the only unsafe code of the tests in QEMU.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use vfio_ioctls::VfioContainer;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Memory that is mapped for a device, at an address of the device's; unmapped when dropped.
pub(crate) struct Shared {
    /// At the addresses that the device uses.
    memory: GuestMemoryMmap,
    container: Arc<VfioContainer>,
}

impl Shared {
    /// Maps so many bytes of zeroes at `iova`.
    pub(crate) fn map(container: &Arc<VfioContainer>, iova: u64, size: usize) -> Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(iova), size)])?;
        // SAFETY: The memory is mapped as long as `memory` lives, which unmaps it for the device
        // first; it is read and written by copies only, and nobody has a reference to it.
        let mapped = unsafe { container.vfio_map_guest_memory(&memory) };
        mapped.with_context(|| format!("cannot map memory at {iova:#x}"))?;
        Ok(Self {
            memory,
            container: Arc::clone(container),
        })
    }

    /// Reads a number at an address of the device's.
    pub(crate) fn get(&self, iova: u64) -> Result<u64> {
        Ok(self.memory.read_obj(GuestAddress(iova))?)
    }

    /// Writes a number at an address of the device's.
    pub(crate) fn set(&self, iova: u64, value: u64) -> Result<()> {
        Ok(self.memory.write_obj(value, GuestAddress(iova))?)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(error) = self.container.vfio_unmap_guest_memory(&self.memory) {
            // Without it the device would keep what is somebody else's next.
            eprintln!("cannot unmap the memory: {error}");
            std::process::abort();
        }
    }
}
