// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel shows of muser without a device node being opened: mdev types and devices.

use crate::error::{reason, Error, Result};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Attributes of a device that can be set, all of them numbers.
const ATTRIBUTES: [&str; 7] = [
    "max_memory",
    "max_pinned",
    "max_requests",
    "max_state",
    "max_vectors",
    "reattach_timeout_ms",
    "unmap_timeout_ms",
];

/// Where sysfs, devtmpfs and procfs are mounted; elsewhere in tests.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    /// `/sys`
    pub(crate) sysfs: PathBuf,
    /// `/dev`
    pub(crate) dev: PathBuf,
    /// `/proc`
    pub(crate) proc: PathBuf,
}

/// A type of device that muser offers.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Type {
    /// Name of its directory: `muser-pci` or `muser-platform`.
    pub(crate) name: String,
    /// The mdev parent that offers it.
    pub(crate) parent: String,
    /// Its `name` attribute, for people.
    pub(crate) label: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) device_api: Option<String>,
    pub(crate) available_instances: Option<u64>,
    /// UUIDs of its devices.
    pub(crate) devices: Vec<String>,
    #[serde(skip)]
    pub(crate) path: PathBuf,
}

/// A device, by its directory in sysfs.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// In lower case.
    pub(crate) uuid: String,
    pub(crate) path: PathBuf,
    /// Name of its type.
    pub(crate) kind: String,
    /// Its removal has begun, and waits for a client.
    pub(crate) removing: bool,
    /// Directory of its type.
    type_path: PathBuf,
    /// The mdev parent.
    pub(crate) parent: String,
}

impl Roots {
    /// The types that muser offers.
    ///
    /// # Errors
    ///
    /// If there are none, since the module is not loaded.
    pub(crate) fn types(&self) -> Result<Vec<Type>> {
        let parents = self.sysfs.join("class/mdev_bus");
        let mut types = Vec::new();
        for parent in names(&parents)? {
            let dir = parents.join(&parent).join("mdev_supported_types");
            for name in names(&dir)?.into_iter().filter(|name| is_ours(name)) {
                let path = dir.join(&name);
                types.push(Type {
                    label: text(&path.join("name")),
                    description: text(&path.join("description")),
                    device_api: text(&path.join("device_api")),
                    available_instances: text(&path.join("available_instances"))
                        .and_then(|number| number.parse().ok()),
                    devices: names(&path.join("devices"))?,
                    parent: parent.clone(),
                    name,
                    path,
                });
            }
        }
        if types.is_empty() {
            return Err(Error::new(format!(
                "the module muser is not loaded: {} offers no type muser-pci; \
                 load it with `modprobe muser`",
                parents.display()
            )));
        }
        types.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(types)
    }

    /// muser's devices by UUID. Those of other mdev drivers are left out.
    ///
    /// # Errors
    ///
    /// If sysfs can't be read. A device that goes away meanwhile is none.
    pub(crate) fn devices(&self) -> Result<Vec<Entry>> {
        let dir = self.mdev_devices();
        Ok(names(&dir)?
            .into_iter()
            .filter_map(|uuid| entry(dir.join(&uuid), uuid))
            .filter(|device| is_ours(&device.kind))
            .collect())
    }

    /// The one device whose UUID begins with `prefix`, which is hex and dashes.
    ///
    /// # Errors
    ///
    /// If there is none or more than one; the sentence lists those there are.
    pub(crate) fn device(&self, prefix: &str) -> Result<Entry> {
        let prefix = prefix.to_ascii_lowercase();
        let devices = self.devices()?;
        let mut found = devices
            .iter()
            .filter(|device| device.uuid.starts_with(&prefix));
        match (found.next(), found.next()) {
            (Some(device), None) => Ok(device.clone()),
            (Some(_), Some(_)) => Err(Error::new(format!(
                "{prefix} is ambiguous; these devices begin so:\n{}",
                lines(
                    devices
                        .iter()
                        .filter(|device| device.uuid.starts_with(&prefix))
                )
            ))),
            _ => Err(self.absent(&prefix, &devices)),
        }
    }

    fn absent(&self, prefix: &str, devices: &[Entry]) -> Error {
        let path = self.mdev_devices().join(prefix);
        if let Some(other) = entry(path, prefix.to_owned()) {
            return Error::new(format!(
                "{prefix} is an mdev device of type {}, not one of muser's",
                other.kind
            ));
        }
        if devices.is_empty() {
            // Says so if the module isn't loaded, which explains more.
            return match self.types() {
                Err(error) => error,
                Ok(_) => Error::new(format!(
                    "there is no muser device {prefix}, nor any other; \
                     make one with `muserctl create`"
                )),
            };
        }
        Error::new(format!(
            "there is no muser device {prefix}; there are:\n{}",
            lines(devices.iter())
        ))
    }

    fn mdev_devices(&self) -> PathBuf {
        self.sysfs.join("bus/mdev/devices")
    }
}

impl Entry {
    /// Number of its IOMMU group, where it has one.
    pub(crate) fn iommu_group(&self) -> Option<u64> {
        link_name(&self.path.join("iommu_group"))?.parse().ok()
    }

    /// Name of its VFIO character device, where the kernel has those.
    pub(crate) fn cdev(&self) -> Option<String> {
        let dir = self.path.join("vfio-dev");
        let name = names(&dir).ok()?.into_iter().next()?;
        // Without CONFIG_VFIO_DEVICE_CDEV the device is there but has no number.
        dir.join(&name).join("dev").exists().then_some(name)
    }

    /// `device_api` of its type.
    pub(crate) fn device_api(&self) -> Option<String> {
        text(&self.type_path.join("device_api"))
    }

    /// The attributes that muser gives a device, as far as this module has them.
    pub(crate) fn attributes(&self) -> BTreeMap<String, u64> {
        ATTRIBUTES
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), text(&self.path.join(name))?.parse().ok()?)))
            .collect()
    }

    /// The user and the group who created it.
    pub(crate) fn creator(&self) -> Option<(u32, u32)> {
        let id = |name: &str| text(&self.path.join(name))?.parse().ok();
        Some((id("uid")?, id("gid")?))
    }

    /// Where one of the attributes is.
    ///
    /// # Errors
    ///
    /// If muser, or this module, has no attribute of this name. Others in the same directory, such
    /// as `remove`, are not ours to set.
    pub(crate) fn attribute(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        if ATTRIBUTES.contains(&name) && path.exists() {
            return Ok(path);
        }
        let names: Vec<String> = self.attributes().into_keys().collect();
        Err(Error::new(format!(
            "{} has no attribute {name}; it has {}",
            self.uuid,
            names.join(", ")
        )))
    }
}

impl Type {
    /// A limit of each user, for all devices of muser: a file beside the parent.
    pub(crate) fn user_limit(&self, name: &str) -> Option<(PathBuf, u64)> {
        // They are beside one of the parents, and hold for both.
        let parents = self.path.ancestors().nth(3)?;
        let path = parents.join("muser").join(name);
        let value = text(&path)?.parse().ok()?;
        Some((path, value))
    }
}

/// Writes to an attribute, in one `write` and without creating a file.
pub(crate) fn write(path: &Path, value: &str) -> io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// The target of a link, by its last component.
pub(crate) fn link_name(path: &Path) -> Option<String> {
    let target = std::fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn is_ours(kind: &str) -> bool {
    kind.starts_with("muser-")
}

fn entry(path: PathBuf, uuid: String) -> Option<Entry> {
    let parent = std::fs::canonicalize(&path).ok()?.parent()?.to_owned();
    let types = parent.join("mdev_supported_types");
    let linked = link_name(&path.join("mdev_type"));
    let removing = linked.is_none();
    // mdev takes the link away at the beginning of a removal. muser's parents have one type each.
    let kind = linked.or_else(|| match &names(&types).ok()?[..] {
        [only] => Some(only.clone()),
        _ => None,
    })?;
    Some(Entry {
        uuid,
        path,
        parent: parent.file_name()?.to_str()?.to_owned(),
        removing,
        type_path: types.join(&kind),
        kind,
    })
}

#[cfg(test)]
impl Entry {
    /// A device of the parent `muser` which has no directory.
    pub(crate) fn imaginary(uuid: &str) -> Self {
        Self {
            uuid: uuid.to_owned(),
            path: "/nonexistent".into(),
            kind: "muser-pci".to_owned(),
            parent: "muser".to_owned(),
            removing: false,
            type_path: "/nonexistent".into(),
        }
    }
}

fn lines<'a>(devices: impl Iterator<Item = &'a Entry>) -> String {
    devices
        .map(|device| format!("  {}  {}", device.uuid, device.kind))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Names in a directory; none if there is no such directory.
fn names(dir: &Path) -> Result<Vec<String>> {
    let fail = |error: &io::Error| Error::file("list", dir, error);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(&error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| fail(&error))?.file_name();
        found.extend(name.into_string());
    }
    found.sort();
    Ok(found)
}

/// The text of an attribute, without its newline; `None` if it can't be read.
fn text(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The sentence for a write that the kernel refused in a way which no caller explains better.
pub(crate) fn refused(path: &Path, value: &str, error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => Error::file("write to", path, error),
        _ => Error::new(format!(
            "the kernel refused {value} in {}: {}; `dmesg` may say more",
            path.display(),
            reason(error)
        )),
    }
}
