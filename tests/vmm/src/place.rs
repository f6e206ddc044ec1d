// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where xtask put what the tests work with: it says so in the environment.

use std::path::PathBuf;

use anyhow::{ensure, Context as _, Result};

/// A program of the project's.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let path = variable("MUSER_VMM_PROGRAMS")?.join(name);
    ensure!(path.exists(), "there is no program {}", path.display());
    Ok(path)
}

/// The kernel that guests boot: Debian's own.
pub(crate) fn kernel() -> Result<PathBuf> {
    variable("MUSER_VMM_KERNEL")
}

/// What guests boot from: busybox, `guest/init`, `vmm-guest`, and the kernel's modules.
pub(crate) fn initramfs() -> Result<PathBuf> {
    variable("MUSER_VMM_INITRAMFS")
}

/// A file for what a program says. xtask looks into those of guests' consoles for complaints of the
/// kernel's.
pub(crate) fn log(name: &str) -> Result<PathBuf> {
    Ok(variable("MUSER_VMM_LOGS")?.join(format!("{name}.log")))
}

fn variable(name: &str) -> Result<PathBuf> {
    let value = std::env::var_os(name);
    let value = value.with_context(|| format!("{name} is not set: run `cargo xtask test`"))?;
    Ok(value.into())
}
