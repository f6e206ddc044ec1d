// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes: who serves a device, and who has it open.

use crate::sysfs::Roots;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// A process, as a person knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// `None` if it is gone or hidden.
    pub(crate) name: Option<String>,
}

impl Process {
    /// The process with this id.
    pub(crate) fn new(roots: &Roots, pid: u32) -> Self {
        let comm = roots.proc.join(pid.to_string()).join("comm");
        let name = std::fs::read_to_string(comm)
            .ok()
            .map(|name| name.trim_end().to_owned());
        Self { pid, name }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or("?");
        write!(f, "{name}, pid {}", self.pid)
    }
}

/// The processes that have one of `nodes` open, or a VFIO device file of the device at `device`.
///
/// Only those that we may look at: for all of them it takes root.
pub(crate) fn holders(roots: &Roots, nodes: &[PathBuf], device: &Path) -> Vec<Process> {
    let device = std::fs::canonicalize(device).ok();
    let mut pids: Vec<u32> = std::fs::read_dir(&roots.proc)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .collect();
    pids.sort_unstable();
    pids.into_iter()
        .filter(|pid| holds(&roots.proc.join(pid.to_string()), nodes, device.as_deref()))
        .map(|pid| Process::new(roots, pid))
        .collect()
}

fn holds(process: &Path, nodes: &[PathBuf], device: Option<&Path>) -> bool {
    std::fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| {
            let Ok(file) = std::fs::read_link(entry.path()) else {
                return false;
            };
            // The node of a device that is being removed is gone, and /proc says so.
            let file = match file
                .to_str()
                .and_then(|file| file.strip_suffix(" (deleted)"))
            {
                Some(deleted) => PathBuf::from(deleted),
                None => file,
            };
            // A file got from a group is anonymous; its fdinfo names the device (Linux 6.18).
            nodes.contains(&file)
                || file.as_os_str() == "anon_inode:[vfio-device]"
                    && device.is_some_and(|device| {
                        syspath(&process.join("fdinfo").join(entry.file_name()))
                            .is_some_and(|path| path == device)
                    })
        })
}

/// The device that a VFIO device file belongs to.
fn syspath(fdinfo: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(fdinfo).ok()?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    Some(PathBuf::from(path.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn holders_are_found_by_node_and_by_fdinfo() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            sysfs: dir.path().join("sys"),
            dev: dir.path().join("dev"),
            proc: dir.path().join("proc"),
        };
        let device = roots.sysfs.join("devices/a");
        std::fs::create_dir_all(&device).unwrap();
        for (pid, link) in [
            (11, "/dev/vfio/4"),
            (22, "anon_inode:[vfio-device]"),
            (33, "/dev/null"),
            (44, "/dev/vfio/devices/vfio0 (deleted)"),
        ] {
            let process = roots.proc.join(pid.to_string());
            std::fs::create_dir_all(process.join("fd")).unwrap();
            std::fs::create_dir_all(process.join("fdinfo")).unwrap();
            std::fs::write(process.join("comm"), format!("name{pid}\n")).unwrap();
            symlink(link, process.join("fd/3")).unwrap();
            let info = format!("pos:\t0\nvfio-device-syspath: {}\n", device.display());
            std::fs::write(process.join("fdinfo/3"), info).unwrap();
        }

        let nodes = ["/dev/vfio/4", "/dev/vfio/devices/vfio0"].map(PathBuf::from);
        let found = holders(&roots, &nodes, &device);

        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            ["name11, pid 11", "name22, pid 22", "name44, pid 44"]
        );
    }
}
