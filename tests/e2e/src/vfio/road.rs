// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The roads to a VFIO device: a group with a type1 container, a cdev with an iommufd, and a group
//! with an iommufd as its container.
//!
//! The third differs from the first two in nothing but DMA, so most tests leave it out.

use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, VFIO_TYPE1v2_IOMMU,
};
use zerocopy::IntoBytes;

use super::{abi, AddressSpace};
use crate::mdev::Mdev;
use crate::sys;

/// How a client comes to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Road {
    /// `/dev/vfio/GROUP` in a container of type1.
    Group,
    /// `/dev/vfio/devices/vfioN` bound to an iommufd.
    Cdev,
    /// `/dev/vfio/GROUP` with `/dev/iommu` for its container, which answers as type1 would.
    Compat,
}

impl Road {
    /// Those that differ in how a device is opened and in what is said about it.
    pub const ALL: [Self; 2] = [Self::Group, Self::Cdev];

    /// Those that differ in DMA: all there are.
    pub const DMA: [Self; 3] = [Self::Group, Self::Cdev, Self::Compat];

    /// The name in test names and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Cdev => "cdev",
            Self::Compat => "compat",
        }
    }

    /// The road of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::DMA.into_iter().find(|road| road.name() == name)
    }

    /// Why this kernel lacks the road; `None` if it has it.
    pub fn lacking(self) -> Option<String> {
        let (node, why) = match self {
            Self::Group => ("/dev/vfio/vfio", "no VFIO container"),
            Self::Cdev => ("/dev/iommu", "no iommufd, so no VFIO cdev"),
            Self::Compat => ("/dev/iommu", "no iommufd"),
        };
        (!Path::new(node).exists()).then(|| format!("this kernel has {why} ({node} is missing)"))
    }

    /// Why DMA can't be tested on this road in this kernel, through no fault of muser's.
    ///
    /// Upstream's type1 takes `iommu->lock` before `device_list_lock` where it registers a device,
    /// and holds `device_list_lock` while it tells a device of an unmap, which unpins and so takes
    /// `iommu->lock`: `vfio_iommu_type1_register_device`, `vfio_notify_dma_unmap`. Lockdep reports
    /// any driver that unpins there, as all do, and then turns itself off; what it would say of
    /// everything later is worth more than this road, which two other kernels run.
    pub fn spoiled_for_dma(self) -> Option<String> {
        let validated = Path::new("/proc/lockdep_stats").exists();
        (self == Self::Group && validated).then(|| {
            "type1's own lock inversion would turn lockdep off (vfio_notify_dma_unmap)".to_owned()
        })
    }

    /// Opens the files that lead to the device; the device's own is the first, and the others
    /// must outlive it.
    pub(super) fn open(self, mdev: &Mdev) -> io::Result<(Vec<File>, AddressSpace)> {
        match self {
            Self::Group => group(mdev, open_rw("/dev/vfio/vfio")?, true),
            Self::Compat => group(mdev, open_rw("/dev/iommu")?, true),
            Self::Cdev => {
                let iommu = open_rw("/dev/iommu")?;
                let device = open_rw(mdev.cdev_node()?)?;
                let ioas = bind(&device, &iommu)?;
                Ok((vec![device], AddressSpace::Ioas(iommu, ioas)))
            }
        }
    }
}

impl fmt::Display for Road {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Opens a node for reading and writing.
///
/// # Errors
///
/// The errno of open(2).
pub fn open_rw(path: impl AsRef<Path>) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Opens a device by its group, in a container which gets its type now if it is `new`.
pub(super) fn group(
    mdev: &Mdev,
    container: File,
    new: bool,
) -> io::Result<(Vec<File>, AddressSpace)> {
    let group = open_rw(mdev.group_node()?)?;
    let mut fd = std::os::fd::AsRawFd::as_raw_fd(&container);
    sys::ioctl(&group, abi::VFIO_GROUP_SET_CONTAINER, &mut fd)?;
    if new {
        let type1 = i32::try_from(VFIO_TYPE1v2_IOMMU).unwrap_or(0);
        sys::ioctl_value(&container, abi::VFIO_SET_IOMMU, type1)?;
    }
    let name = CString::new(mdev.uuid()).map_err(io::Error::other)?;
    let device = sys::ioctl_open(&group, abi::VFIO_GROUP_GET_DEVICE_FD, &name)?;
    Ok((vec![device, group], AddressSpace::Container(container)))
}

/// Binds a cdev to an iommufd, and attaches it to a new address space, whose id is returned.
fn bind(device: &File, iommu: &File) -> io::Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>() as u32,
        iommufd: std::os::fd::AsRawFd::as_raw_fd(iommu),
        ..Default::default()
    };
    sys::ioctl(device, abi::VFIO_DEVICE_BIND_IOMMUFD, &mut bind)?;
    // `struct iommu_ioas_alloc` of <linux/iommufd.h>: size, flags, out_ioas_id.
    let mut alloc = [12u32, 0, 0];
    sys::ioctl_bytes(iommu, abi::IOMMU_IOAS_ALLOC, alloc.as_mut_bytes())?;
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
        pt_id: alloc[2],
        ..Default::default()
    };
    sys::ioctl(device, abi::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach)?;
    Ok(alloc[2])
}
