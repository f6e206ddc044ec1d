// SPDX-License-Identifier: GPL-2.0
//! muser: device emulation in a process of its own, behind VFIO.
//!
//! `echo UUID > …/muser-pci/create` makes a VFIO device and `/dev/muser/UUID`; the process that
//! attaches to the latter emulates the device. See the README for the picture.
//!
//! Read on in the order of a register read: [`vfio`] (what a client's system call comes in by),
//! [`driver`] (what becomes of it), [`uapi`] (what the process sees of it).

mod driver;
#[path = "uapi/src/muser.rs"]
mod uapi;
mod vfio;

use kernel::prelude::*;

module! {
    type: Muser,
    name: "muser",
    authors: ["The muser developers"],
    description: "Device emulation in userspace, behind VFIO mediated devices",
    license: "GPL",
}

/// The loaded module. Dropping it unregisters everything.
struct Muser {
    _driver: driver::Driver,
}

impl kernel::Module for Muser {
    fn init(module: &'static ThisModule) -> Result<Self> {
        Ok(Self {
            _driver: driver::Driver::new(module)?,
        })
    }
}
