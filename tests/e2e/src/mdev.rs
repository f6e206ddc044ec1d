// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! muser's devices in sysfs: types, `create`, `remove`, attributes and nodes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::Process;
use crate::{module, time};

/// Where sysfs has the devices.
pub const DEVICES: &str = "/sys/bus/mdev/devices";

/// A type of devices that muser makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// `muser-pci`.
    Pci,
    /// `muser-platform`.
    Platform,
}

impl Type {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Pci, Self::Platform];

    /// Name of the type's directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pci => "muser-pci",
            Self::Platform => "muser-platform",
        }
    }

    /// The type's `device_api`.
    pub fn api(self) -> &'static str {
        match self {
            Self::Pci => "vfio-pci",
            Self::Platform => "vfio-platform",
        }
    }

    /// The type's directory in sysfs.
    pub fn directory(self) -> PathBuf {
        let parent = match self {
            Self::Pci => "muser",
            Self::Platform => "muser-platform",
        };
        Path::new("/sys/class/mdev_bus")
            .join(parent)
            .join("mdev_supported_types")
            .join(self.name())
    }

    /// An attribute of the type, without the line's end.
    ///
    /// # Errors
    ///
    /// The errno of reading it.
    pub fn attribute(self, name: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.directory().join(name))?
            .trim_end()
            .to_owned())
    }

    /// Writes to the type's `create`, as a shell's `echo` does.
    ///
    /// # Errors
    ///
    /// The errno of the write.
    pub fn create_raw(self, text: &str) -> io::Result<()> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.directory().join("create"))
            .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
    }
}

/// A UUID that no device has.
///
/// # Errors
///
/// The errno of reading `/proc`.
pub fn random_uuid() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/uuid")?
        .trim()
        .to_owned())
}

/// A device, removed when dropped.
#[derive(Debug)]
pub struct Mdev {
    uuid: String,
}

impl Mdev {
    /// Creates a device of a random UUID; loads the module first where it is not.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn create(kind: Type) -> Result<Self> {
        module::load()?;
        let uuid = random_uuid()?;
        kind.create_raw(&uuid)
            .with_context(|| format!("writing {uuid} to {}'s create", kind.name()))?;
        Ok(Self { uuid })
    }

    /// The device of that UUID, which somebody else created; it is removed when dropped.
    pub fn adopt(uuid: &str) -> Self {
        Self {
            uuid: uuid.to_owned(),
        }
    }

    /// The UUIDs of all devices of the mdev bus.
    pub fn list() -> Vec<String> {
        let Ok(entries) = fs::read_dir(DEVICES) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Its UUID.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Its directory in sysfs.
    pub fn directory(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.uuid)
    }

    /// Its node for a device process, `/dev/muser/UUID`.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev/muser").join(&self.uuid)
    }

    /// Whether sysfs has it.
    pub fn exists(&self) -> bool {
        self.directory().exists()
    }

    /// Its group's node, `/dev/vfio/N`.
    ///
    /// # Errors
    ///
    /// The errno of reading the link in sysfs.
    pub fn group_node(&self) -> io::Result<PathBuf> {
        let group = fs::read_link(self.directory().join("iommu_group"))?;
        let number = group
            .file_name()
            .ok_or_else(|| io::Error::other("a link to nothing"))?;
        Ok(Path::new("/dev/vfio").join(number))
    }

    /// Its cdev, `/dev/vfio/devices/vfioN`.
    ///
    /// # Errors
    ///
    /// The errno of reading sysfs; `NotFound` where the kernel has no cdevs.
    pub fn cdev_node(&self) -> io::Result<PathBuf> {
        let mut entries = fs::read_dir(self.directory().join("vfio-dev"))?;
        let entry = entries.next().ok_or(io::ErrorKind::NotFound)??;
        let node = Path::new("/dev/vfio/devices").join(entry.file_name());
        // The directory is there on kernels without cdevs too.
        if !node.exists() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(node)
    }

    /// Reads an attribute of muser's, without the line's end.
    ///
    /// # Errors
    ///
    /// The errno of reading it.
    pub fn attribute(&self, name: &str) -> io::Result<String> {
        let path = self.directory().join(name);
        Ok(fs::read_to_string(path)?.trim_end().to_owned())
    }

    /// Writes an attribute of muser's.
    ///
    /// # Errors
    ///
    /// The errno of the write.
    pub fn set_attribute(&self, name: &str, value: &str) -> io::Result<()> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.directory().join(name))
            .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
    }

    /// Removes it: waits for its client.
    ///
    /// # Errors
    ///
    /// The errno of the write to `remove`.
    pub fn remove(&self) -> io::Result<()> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.directory().join("remove"))
            .and_then(|mut file| io::Write::write_all(&mut file, b"1"))
    }

    /// Waits until sysfs and devtmpfs have forgotten it.
    ///
    /// # Errors
    ///
    /// When they don't in time.
    pub fn wait_gone(&self) -> Result<()> {
        time::until("the device leaving sysfs and /dev/muser", || {
            !self.exists() && !self.node().exists()
        })
    }
}

impl Drop for Mdev {
    /// Removes the device by another process: a removal waits for the client, unkillably once it
    /// was signalled, and the client may well be a file of this process that is closed only later.
    fn drop(&mut self) {
        if !self.exists() {
            return;
        }
        let write = format!("echo 1 >{}/remove", self.directory().display());
        let removal = Process::start(Command::new("sh").args(["-c", &write]));
        match removal.and_then(|mut removal| Ok((removal.wait_within(time::patience())?, removal)))
        {
            Ok((Some(_), _)) => {}
            Ok((None, removal)) => {
                eprintln!(
                    "the removal of {} waits: does a client have it open?",
                    self.uuid
                );
                std::mem::forget(removal);
            }
            Err(error) => eprintln!("{} was not removed: {error:#}", self.uuid),
        }
    }
}
