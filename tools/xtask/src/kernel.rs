// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernels: Debian's own, and two built here. Each ends as a build
//! directory for modules, a bootable image, and modules for the guest.

mod own;
mod source;
mod stock;

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cli::Kernel;
use crate::root::Root;
use crate::workbench::Workbench;

/// A kernel that modules can be built for and that can be booted.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    pub(crate) kernel: Kernel,
    /// What `uname -r` says.
    pub(crate) release: String,
    /// The build directory: a module build's KDIR.
    pub(crate) build: PathBuf,
    /// The source that the build directory refers to.
    pub(crate) source: PathBuf,
    /// What the boot loader loads.
    pub(crate) image: PathBuf,
    /// The directory of its modules, `…/lib/modules/RELEASE`.
    pub(crate) modules: PathBuf,
    /// The compiler, as arguments for make.
    compiler: Vec<String>,
}

impl Tree {
    /// The kernel, made if it is not in the cache.
    pub(crate) fn prepare(bench: &Workbench, kernel: Kernel) -> Result<Self> {
        match kernel {
            Kernel::Stock => stock::prepare(bench),
            Kernel::Small | Kernel::Debug => own::prepare(bench, kernel),
        }
    }

    /// Its build system, to be given a target and an M=.
    pub(crate) fn make(&self, root: &Root) -> Command {
        make(root, &self.build, &self.compiler)
    }
}

fn make(root: &Root, dir: &std::path::Path, compiler: &[String]) -> Command {
    let mut command = root.command_in(dir, "make");
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    command.arg(format!("-j{jobs}")).args(compiler);
    // So that the same sources make the same kernel, and name nobody's machine.
    command.env("KBUILD_BUILD_USER", "muser");
    command.env("KBUILD_BUILD_HOST", "muser");
    command.env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970");
    command
}
