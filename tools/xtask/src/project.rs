// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where things are: the sources, the build output, and the tools beside xtask.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context as _, Result};
use serde_json::Value;

use crate::cli::Kernel;

/// The checkout that xtask was built from.
#[derive(Clone, Debug)]
pub(crate) struct Project {
    dir: PathBuf,
    target: PathBuf,
}

impl Project {
    /// Finds the checkout, and makes the directory for build output.
    pub(crate) fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = match manifest.ancestors().nth(2) {
            Some(dir) if dir.join("Cargo.toml").exists() => dir.canonicalize()?,
            _ => bail!(
                "the project is no longer at {}: run cargo xtask in its new place",
                manifest.display()
            ),
        };
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => dir.join(target),
            None => dir.join("target"),
        };
        let output = target.join("xtask");
        std::fs::create_dir_all(&output)
            .with_context(|| format!("cannot create {}", output.display()))?;
        let target = target.canonicalize()?;
        Ok(Self { dir, target })
    }

    /// The checkout.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of the checkout.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.dir.join(path)
    }

    /// Where build output goes.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where xtask's own build output goes.
    pub(crate) fn output(&self) -> PathBuf {
        self.target.join("xtask")
    }

    /// Where the build output for one kernel goes.
    pub(crate) fn output_for(&self, kernel: Kernel) -> PathBuf {
        self.output().join(kernel.name())
    }

    /// The log of the step of that name.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.output().join("log").join(format!("{name}.log"))
    }

    /// The cargo that runs xtask, to be run in the checkout.
    pub(crate) fn cargo(&self) -> Command {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(&self.dir);
        // What `cargo run` sets for xtask itself is not meant for what xtask runs.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                command.env_remove(&name);
            }
        }
        command
    }

    /// The workspace's packages whose programs belong in a guest or in the build root.
    pub(crate) fn guest_packages(&self) -> Result<Vec<Package>> {
        let output = self
            .cargo()
            .args(["metadata", "--no-deps", "--format-version=1"])
            .output()
            .context("cannot run cargo metadata")?;
        if !output.status.success() {
            bail!(
                "cargo metadata failed:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let metadata: Value = serde_json::from_slice(&output.stdout)?;
        let packages = metadata["packages"].as_array().into_iter().flatten();
        Ok(packages
            .filter_map(|package| self.guest_package(package))
            .collect())
    }

    fn guest_package(&self, package: &Value) -> Option<Package> {
        let manifest = Path::new(package["manifest_path"].as_str()?);
        let path = manifest.strip_prefix(&self.dir).ok()?;
        let wanted = path.starts_with("samples")
            || path.starts_with("tests/e2e")
            || path.starts_with("tests/fuzz")
            || path.starts_with("tests/vmm")
            || (path.starts_with("tools") && !path.starts_with("tools/xtask"));
        let programs: Vec<String> = package["targets"]
            .as_array()?
            .iter()
            .filter(|target| target["kind"][0] == "bin")
            .filter_map(|target| target["name"].as_str().map(str::to_owned))
            .collect();
        (wanted && !programs.is_empty()).then_some(Package {
            name: package["name"].as_str()?.to_owned(),
            programs,
        })
    }
}

/// A package of the workspace, and the programs that it makes.
#[derive(Clone, Debug)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) programs: Vec<String>,
}
