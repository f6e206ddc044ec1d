// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Gives the files of a device to the user who created it: what the udev rule runs, as root.
//!
//! The kernel makes `/dev/muser/UUID` its creator's by itself. The nodes of VFIO are VFIO's, and
//! `remove` is mdev's, so these start as root's. The kernel says in the attributes `uid` and `gid`
//! of a device who created it.
//!
//! The rule runs a moment after the device was made. Whoever may create devices may also remove
//! them as fast, and the next device, another user's, gets the same names. So a file is held
//! ([`Held`]) before its owner is looked up: it is then that device's or one of before, never one of
//! after. What was removed meanwhile can be given to anybody, for nobody finds it any more.

use crate::error::{Error, Result};
use crate::sysfs::{link_name, Roots};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{chown, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Drivers of the mdev bus that are muser's.
const DRIVERS: [&str; 2] = ["muser", "muser-platform"];
/// The attributes that are for the creator to write. The others are limits, and stay root's.
const ATTRIBUTES: [&str; 2] = ["remove", "reattach_timeout_ms"];

/// A device, by its directory in sysfs.
#[derive(Debug, PartialEq, Eq)]
struct Device(PathBuf);

/// Who created a device, and what its nodes are called.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    uid: u32,
    gid: u32,
    group: Option<String>,
    cdev: Option<String>,
}

/// Gives away the files of the device that `path` in sysfs is about: a mediated device, its VFIO
/// group, or its VFIO character device. Nothing happens if it is not one of muser's, or is not
/// ready, or is gone: udev says so of each in a later event.
///
/// # Errors
///
/// If a file that is there can't be given away.
pub(crate) fn give(roots: &Roots, path: &Path) -> Result<()> {
    let Some(device) = find(roots, path) else {
        return Ok(());
    };
    for name in ATTRIBUTES {
        let path = device.0.join(name);
        hand_over(&path, None, || {
            device.facts().map(|facts| (facts.uid, facts.gid))
        })?;
    }
    let Some(facts) = device.facts() else {
        return Ok(());
    };
    let owner_if = |same: fn(&Facts) -> &Option<String>, name: &str| {
        let facts = device.facts()?;
        (same(&facts).as_deref() == Some(name)).then_some((facts.uid, facts.gid))
    };
    if let Some(name) = &facts.group {
        let node = roots.dev.join("vfio").join(name);
        let number = roots.sysfs.join("class/vfio").join(name).join("dev");
        hand_over(&node, Some(&number), || {
            owner_if(|facts| &facts.group, name)
        })?;
    }
    if let Some(name) = &facts.cdev {
        let node = roots.dev.join("vfio/devices").join(name);
        let number = device.0.join("vfio-dev").join(name).join("dev");
        hand_over(&node, Some(&number), || owner_if(|facts| &facts.cdev, name))?;
    }
    Ok(())
}

/// The device of muser's that a directory in sysfs belongs to.
fn find(roots: &Roots, path: &Path) -> Option<Device> {
    let path = fs::canonicalize(path).ok()?;
    let device = match link_name(&path.join("subsystem"))?.as_str() {
        "mdev" => path,
        "vfio-dev" => path.parent()?.parent()?.to_owned(),
        "vfio" => {
            let group = roots.sysfs.join("kernel/iommu_groups");
            let members = group.join(path.file_name()?).join("devices");
            let mut members = fs::read_dir(members).ok()?.flatten();
            // A mediated device is alone in its group.
            match (members.next(), members.next()) {
                (Some(only), None) => fs::canonicalize(only.path()).ok()?,
                _ => return None,
            }
        }
        _ => return None,
    };
    let ours = link_name(&device.join("subsystem")).as_deref() == Some("mdev")
        && link_name(&device.join("driver")).is_some_and(|name| DRIVERS.contains(&name.as_str()));
    ours.then_some(Device(device))
}

impl Device {
    /// What sysfs says of it now; nothing before it is bound to its driver or after it is gone.
    fn facts(&self) -> Option<Facts> {
        let number = |name| {
            let text = fs::read_to_string(self.0.join(name)).ok()?;
            text.trim().parse().ok()
        };
        let cdevs = fs::read_dir(self.0.join("vfio-dev")).ok();
        let cdev = cdevs.and_then(|mut cdevs| cdevs.next()?.ok()?.file_name().into_string().ok());
        Some(Facts {
            uid: number("uid")?,
            gid: number("gid")?,
            group: link_name(&self.0.join("iommu_group")),
            cdev,
        })
    }
}

/// Gives a file to whom `owner` says, which is asked when the file is held. `number` is where the
/// kernel says the number of a node.
fn hand_over(
    path: &Path,
    number: Option<&Path>,
    owner: impl FnOnce() -> Option<(u32, u32)>,
) -> Result<()> {
    let held = match Held::take(path, number) {
        Ok(Some(held)) => held,
        // A kernel without cdevs has no node, and a device that was removed has nothing.
        Ok(None) => return Ok(()),
        Err(error) => return Err(Error::file("hold", path, &error)),
    };
    let Some((uid, gid)) = owner() else {
        return Ok(());
    };
    held.give(uid, gid)
        .map_err(|error| Error::file("give away", path, &error))
}

/// A file that is held by more than its name, and not opened: a VFIO group can be open only once.
#[derive(Debug)]
struct Held {
    file: File,
    is_node: bool,
}

impl Held {
    /// Holds what is at `path`; none if nothing is there, or not the node of that number.
    fn take(path: &Path, number: Option<&Path>) -> io::Result<Option<Self>> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(path);
        let file = match file {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(number) = number else {
            let is_node = false;
            return Ok(Some(Self { file, is_node }));
        };
        let found = file.metadata()?;
        let number = fs::read_to_string(number).unwrap_or_default();
        let device = found.rdev();
        let same = number.trim() == format!("{}:{}", libc::major(device), libc::minor(device));
        let is_node = found.file_type().is_char_device() && same;
        Ok(is_node.then_some(Self { file, is_node }))
    }

    fn give(&self, uid: u32, gid: u32) -> io::Result<()> {
        // The way to a file that is held: its name may be another's by now.
        let path = Path::new("/proc/self/fd").join(self.file.as_raw_fd().to_string());
        let given = if self.is_node {
            fs::set_permissions(&path, Permissions::from_mode(0o600))
        } else {
            Ok(())
        };
        let given = given.and_then(|()| chown(&path, Some(uid), Some(gid)));
        match given {
            // sysfs says so of an attribute whose device was removed meanwhile.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
                Ok(())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    const UUID: &str = "83b8f4f2-509f-482f-bc1e-e6bfe0fa1001";

    /// A made-up sysfs and /dev, with one device in group 7.
    struct Tree(TempDir);

    impl Tree {
        fn new(driver: &str) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            let device = tree.device();
            fs::create_dir_all(device.join("vfio-dev/vfio3")).unwrap();
            let group = tree.path("sys/kernel/iommu_groups/7/devices");
            fs::create_dir_all(&group).unwrap();
            fs::create_dir_all(tree.path("sys/class/vfio/7")).unwrap();
            fs::create_dir_all(tree.path("dev/vfio/devices")).unwrap();
            symlink(&device, group.join(UUID)).unwrap();
            symlink("../../bus/mdev", device.join("subsystem")).unwrap();
            symlink(format!("../drivers/{driver}"), device.join("driver")).unwrap();
            symlink(
                tree.path("sys/kernel/iommu_groups/7"),
                device.join("iommu_group"),
            )
            .unwrap();
            symlink(
                "../../class/vfio-dev",
                device.join("vfio-dev/vfio3/subsystem"),
            )
            .unwrap();
            let class = tree.path("sys/class/vfio");
            symlink(&class, class.join("7/subsystem")).unwrap();
            tree
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn device(&self) -> PathBuf {
            self.path("sys/devices/virtual/muser/muser").join(UUID)
        }

        fn roots(&self) -> Roots {
            Roots {
                sysfs: self.path("sys"),
                dev: self.path("dev"),
                proc: "/proc".into(),
            }
        }
    }

    #[test]
    fn device_is_found_by_itself_by_its_group_and_by_its_cdev() {
        let tree = Tree::new("muser");
        let device = Some(Device(tree.device().canonicalize().unwrap()));
        let group = tree.path("sys/class/vfio/7");
        for path in [tree.device(), group, tree.device().join("vfio-dev/vfio3")] {
            assert_eq!(find(&tree.roots(), &path), device, "{}", path.display());
        }
    }

    #[test]
    fn device_of_another_driver_is_not_found() {
        let tree = Tree::new("mtty");
        assert_eq!(find(&tree.roots(), &tree.device()), None);
        let cdev = tree.device().join("vfio-dev/vfio3");
        assert_eq!(find(&tree.roots(), &cdev), None);
    }

    #[test]
    fn group_of_two_devices_is_nobodys() {
        let tree = Tree::new("muser");
        let group = tree.path("sys/class/vfio/7");
        let other = tree.path("sys/kernel/iommu_groups/7/devices/0000:00:02.0");
        symlink(tree.path("sys"), other).unwrap();
        assert_eq!(find(&tree.roots(), &group), None);
    }

    #[test]
    fn device_that_is_not_bound_yet_keeps_its_files() {
        let tree = Tree::new("muser");
        fs::write(tree.device().join("remove"), "").unwrap();
        assert!(give(&tree.roots(), &tree.device()).is_ok());
        assert_eq!(Device(tree.device()).facts(), None);
    }

    #[test]
    fn file_in_a_nodes_place_is_not_taken_for_it() {
        let tree = Tree::new("muser");
        let node = tree.path("dev/vfio/7");
        fs::write(&node, "").unwrap();
        let number = tree.path("sys/class/vfio/7/dev");
        fs::write(&number, "0:0\n").unwrap();
        assert!(Held::take(&node, Some(&number)).unwrap().is_none());
    }

    #[test]
    fn node_of_another_number_is_not_taken_for_it() {
        let tree = Tree::new("muser");
        let number = tree.path("sys/class/vfio/7/dev");
        let null = Path::new("/dev/null");
        fs::write(&number, "1:3\n").unwrap();
        assert!(Held::take(null, Some(&number)).unwrap().is_some());
        fs::write(&number, "1:4\n").unwrap();
        assert!(Held::take(null, Some(&number)).unwrap().is_none());
    }

    #[test]
    fn link_in_a_nodes_place_is_not_followed() {
        let tree = Tree::new("muser");
        let node = tree.path("dev/vfio/7");
        symlink("/dev/null", &node).unwrap();
        let number = tree.path("sys/class/vfio/7/dev");
        fs::write(&number, "1:3\n").unwrap();
        assert!(Held::take(&node, Some(&number)).unwrap().is_none());
    }
}
