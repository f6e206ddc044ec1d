// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loading and unloading `muser.ko`.

use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{bail, Context, Result};

/// Whether the module is loaded.
pub fn is_loaded() -> bool {
    Path::new("/sys/module/muser").exists()
}

/// Loads the module and what it depends on; nothing happens if it is there.
///
/// # Errors
///
/// What modprobe said.
pub fn load() -> Result<()> {
    if is_loaded() {
        return Ok(());
    }
    let output = Command::new("modprobe")
        .arg("muser")
        .output()
        .context("running modprobe")?;
    if !output.status.success() || !is_loaded() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("modprobe muser: {} {}", output.status, said.trim());
    }
    Ok(())
}

/// Unloads the module, as `rmmod` does: by delete_module(2) with O_NONBLOCK.
///
/// # Errors
///
/// The errno: `EWOULDBLOCK` (what the kernel answers where rmmod says "in use").
pub fn unload() -> io::Result<()> {
    crate::sys::delete_module(c"muser")
}

/// Number of references to the module, as lsmod shows it.
///
/// # Errors
///
/// The errno of reading sysfs.
pub fn references() -> Result<i64> {
    let text = std::fs::read_to_string("/sys/module/muser/refcnt").context("reading refcnt")?;
    text.trim().parse().context("parsing refcnt")
}

/// The kernel's taint bits.
///
/// # Errors
///
/// The errno of reading `/proc`.
pub fn taint() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/sys/kernel/tainted").context("reading taint")?;
    text.trim().parse().context("parsing taint")
}
