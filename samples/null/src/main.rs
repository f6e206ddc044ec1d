// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The least that is a device: a PCI function with one BAR, as forgetful as `/dev/null`.
//!
//! Serve it, and a client (a VMM, a driver in userspace) finds it as it would find hardware:
//!
//! ```sh
//! UUID=$(cat /proc/sys/kernel/random/uuid)
//! echo $UUID > /sys/class/mdev_bus/muser/mdev_supported_types/muser-pci/create
//! null --uuid $UUID -vv
//! ```
//!
//! With `-vv` it says what it is asked.

use std::process::ExitCode;

use libmuser::{cli, Access, Bar, Device, PciBuilder, PciModel, Result};

/// What a guest sees before it has touched a register: the ids that its driver binds to, and 4 KiB
/// of memory-mapped registers. The library makes the rest of configuration space of it.
fn model() -> Result<PciModel> {
    PciBuilder::new(0x1234, 0x0001)
        .bar(0, Bar::memory32(4096))
        .build()
}

/// The device. It has nothing to remember, so it has no fields.
struct Null;

/// What its registers do. A device without these methods is a device too: their defaults read as
/// all ones, like an empty slot, and drop what is written.
impl Device for Null {
    /// An access is 1, 2, 4 or 8 bytes wide and aligned, whatever the client did.
    fn read(&mut self, _access: Access) -> Result<u64> {
        Ok(0)
    }

    fn write(&mut self, _access: Access, _value: u64) -> Result<()> {
        Ok(())
    }
}

/// The command line is the same for every device: try `null --help` and `--print-capabilities`.
fn main() -> ExitCode {
    let about = "Serves a device that does nothing";
    let version = env!("CARGO_PKG_VERSION");
    cli::run("null", version, about, model(), |_bus| Ok(Null))
}
