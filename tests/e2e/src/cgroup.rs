// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A memory cgroup with a limit, which pays for what is made in it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::process::Process;
use crate::time;

const ROOT: &str = "/sys/fs/cgroup";

/// Why there is no such thing in this kernel.
pub fn lacking() -> Option<String> {
    let controllers = fs::read_to_string(format!("{ROOT}/cgroup.subtree_control"));
    let there =
        controllers.is_ok_and(|names| names.split_whitespace().any(|name| name == "memory"));
    (!there).then(|| format!("no memory cgroups at {ROOT}"))
}

/// A cgroup of this test; removed when dropped.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one whose tasks may have so many bytes.
    ///
    /// # Errors
    ///
    /// Says what can't be made or set.
    pub fn new(limit: u64) -> Result<Self> {
        let path = format!("{ROOT}/e2e-{}", std::process::id());
        fs::create_dir(&path).with_context(|| format!("making {path}"))?;
        let group = Self(path.into());
        group.limit(limit)?;
        Ok(group)
    }

    /// Changes how many bytes its tasks may have.
    ///
    /// # Errors
    ///
    /// Says what can't be set.
    pub fn limit(&self, bytes: u64) -> Result<()> {
        let path = self.0.join("memory.max");
        fs::write(&path, bytes.to_string()).with_context(|| format!("{}", path.display()))
    }

    /// Acts with this process in it. What the process touched before is paid for elsewhere.
    ///
    /// # Errors
    ///
    /// Says what failed.
    pub fn within<T>(&self, act: impl FnOnce() -> T) -> Result<T> {
        let enter = |path: PathBuf| {
            fs::write(&path, "0").with_context(|| format!("entering {}", path.display()))
        };
        enter(self.0.join("cgroup.procs"))?;
        let done = act();
        enter(PathBuf::from(ROOT).join("cgroup.procs"))?;
        Ok(done)
    }

    /// Moves another process into it.
    ///
    /// # Errors
    ///
    /// Says what can't be written.
    pub fn add(&self, process: &Process) -> Result<()> {
        let path = self.0.join("cgroup.procs");
        fs::write(&path, process.id().to_string()).with_context(|| format!("{}", path.display()))
    }

    /// Bytes that it pays for.
    ///
    /// # Errors
    ///
    /// Says what can't be read.
    pub fn current(&self) -> Result<u64> {
        let path = self.0.join("memory.current");
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// How often its limit had something killed.
    ///
    /// # Errors
    ///
    /// Says what can't be read.
    pub fn out_of_memory(&self) -> Result<u64> {
        let path = self.0.join("memory.events");
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("no oom_kill")?.parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A test that failed in it has its process there, which ends now.
        let _ = time::until("the cgroup going", || fs::remove_dir(&self.0).is_ok());
    }
}
