// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI model: configuration space, base address registers, capabilities, MSI and MSI-X.
//!
//! Everything here is pure: bytes in, bytes and effects out. It knows no transport and no device.

pub(crate) mod bar;
pub(crate) mod caps;
pub(crate) mod config;
pub(crate) mod function;
pub(crate) mod msi;
pub(crate) mod msix;
pub mod regs;

pub use bar::Bar;
pub use caps::{Express, PowerManagement, VendorCapability, VendorExtended};
pub use config::{ConfigSpace, Effects};
pub use msi::Msi;
pub use msix::Msix;
