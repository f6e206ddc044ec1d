// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbers of `<linux/vfio.h>` and `<linux/iommufd.h>` which bindgen can't make from their macros.

/// `_IO(VFIO_TYPE, VFIO_BASE + nr)`.
const fn vfio(nr: u32) -> u32 {
    ((b';' as u32) << 8) | (100 + nr)
}

/// `VFIO_SET_IOMMU`.
pub const VFIO_SET_IOMMU: u32 = vfio(2);
/// `VFIO_GROUP_GET_STATUS`.
pub const VFIO_GROUP_GET_STATUS: u32 = vfio(3);
/// `VFIO_GROUP_SET_CONTAINER`.
pub const VFIO_GROUP_SET_CONTAINER: u32 = vfio(4);
/// `VFIO_GROUP_GET_DEVICE_FD`.
pub const VFIO_GROUP_GET_DEVICE_FD: u32 = vfio(6);
/// `VFIO_DEVICE_GET_INFO`.
pub const VFIO_DEVICE_GET_INFO: u32 = vfio(7);
/// `VFIO_DEVICE_GET_REGION_INFO`.
pub const VFIO_DEVICE_GET_REGION_INFO: u32 = vfio(8);
/// `VFIO_DEVICE_GET_IRQ_INFO`.
pub const VFIO_DEVICE_GET_IRQ_INFO: u32 = vfio(9);
/// `VFIO_DEVICE_SET_IRQS`.
pub const VFIO_DEVICE_SET_IRQS: u32 = vfio(10);
/// `VFIO_DEVICE_RESET`.
pub const VFIO_DEVICE_RESET: u32 = vfio(11);
/// `VFIO_IOMMU_MAP_DMA`.
pub const VFIO_IOMMU_MAP_DMA: u32 = vfio(13);
/// `VFIO_IOMMU_UNMAP_DMA`.
pub const VFIO_IOMMU_UNMAP_DMA: u32 = vfio(14);
/// `VFIO_DEVICE_FEATURE`.
pub const VFIO_DEVICE_FEATURE: u32 = vfio(17);
/// `VFIO_DEVICE_BIND_IOMMUFD`.
pub const VFIO_DEVICE_BIND_IOMMUFD: u32 = vfio(18);
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
pub const VFIO_DEVICE_ATTACH_IOMMUFD_PT: u32 = vfio(19);
/// `IOMMU_IOAS_ALLOC`: `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_ALLOC)`.
pub const IOMMU_IOAS_ALLOC: u32 = ((b';' as u32) << 8) | 0x81;
/// `IOMMU_IOAS_MAP`: `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_MAP)`.
pub const IOMMU_IOAS_MAP: u32 = ((b';' as u32) << 8) | 0x85;
/// `IOMMU_IOAS_UNMAP`: `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_UNMAP)`.
pub const IOMMU_IOAS_UNMAP: u32 = ((b';' as u32) << 8) | 0x86;
/// The first ioctl number that VFIO does not use for devices.
pub const VFIO_UNKNOWN: u32 = vfio(99);

/// Regions lie 2^40 bytes apart in muser's device files.
pub const REGION_SHIFT: u32 = muser_uapi::MUSER_MMAP_REGION_SHIFT;
