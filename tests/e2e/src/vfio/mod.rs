// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO client as a driver in userspace is one, on each road into the kernel.
//!
//! `vfio-ioctls` opens muser's devices too, which a test shows; but it logs and drops what tests
//! must see (the errno and the length of each access), so this client calls the ioctls itself,
//! with the types of `vfio-bindings`.

mod abi;
mod client;
mod dirty;
mod dma;
mod irq;
mod road;

pub use abi::*;
pub use client::{Area, Client, IrqInfo, RegionInfo};
pub use dirty::{log_start, logging_lacking, DirtyPages};
pub use dma::{AddressSpace, DMA_BOTH, DMA_READ, DMA_WRITE};
pub use irq::{IrqData, IrqSet};
pub use road::{open_rw, Road};
