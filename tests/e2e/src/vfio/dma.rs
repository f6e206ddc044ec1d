// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client's IOVAs lead to: memory that it maps and unmaps, by type1's ioctls or iommufd's.

use std::fs::File;
use std::io;
use std::ops::Range;

use iommufd_bindings::{
    iommu_ioas_map, iommu_ioas_unmap, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use vfio_bindings::bindings::vfio::{
    vfio_iommu_type1_dma_map, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL,
};
use zerocopy::IntoBytes;

use super::abi;
use crate::sys::{self, Mapping};

/// The device may read the memory.
pub const DMA_READ: u32 = VFIO_DMA_MAP_FLAG_READ;
/// The device may write the memory.
pub const DMA_WRITE: u32 = VFIO_DMA_MAP_FLAG_WRITE;
/// It may do both.
pub const DMA_BOTH: u32 = DMA_READ | DMA_WRITE;

/// An address space of IOVAs.
#[derive(Debug)]
pub enum AddressSpace {
    /// A container, or an iommufd that stands for one.
    Container(File),
    /// An IOAS of an iommufd, by its id.
    Ioas(File, u32),
}

impl AddressSpace {
    /// Maps a part of `memory` at `iova`. Parts and addresses which the kernel must refuse can be
    /// asked for too.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn map(
        &self,
        memory: &Mapping,
        part: Range<usize>,
        iova: u64,
        flags: u32,
    ) -> io::Result<()> {
        let address = memory.address() + part.start as u64;
        let length = part.len() as u64;
        match self {
            Self::Container(container) => {
                let mut map = vfio_iommu_type1_dma_map {
                    argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
                    flags,
                    vaddr: address,
                    iova,
                    size: length,
                };
                sys::ioctl(container, abi::VFIO_IOMMU_MAP_DMA, &mut map)?;
            }
            Self::Ioas(iommu, id) => {
                let mut map = iommu_ioas_map {
                    size: size_of::<iommu_ioas_map>() as u32,
                    flags: iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA | ioas_flags(flags),
                    ioas_id: *id,
                    user_va: address,
                    length,
                    iova,
                    ..Default::default()
                };
                sys::ioctl(iommu, abi::IOMMU_IOAS_MAP, &mut map)?;
            }
        }
        Ok(())
    }

    /// Unmaps what lies in a range; bytes unmapped.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn unmap(&self, iova: u64, length: u64) -> io::Result<u64> {
        match self {
            Self::Container(container) => type1_unmap(container, 0, iova, length),
            Self::Ioas(iommu, id) => ioas_unmap(iommu, *id, iova, length),
        }
    }

    /// Unmaps everything; bytes unmapped.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn unmap_all(&self) -> io::Result<u64> {
        match self {
            Self::Container(container) => type1_unmap(container, VFIO_DMA_UNMAP_FLAG_ALL, 0, 0),
            Self::Ioas(iommu, id) => ioas_unmap(iommu, *id, 0, u64::MAX),
        }
    }
}

fn ioas_flags(flags: u32) -> u32 {
    let both = [
        (DMA_READ, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE),
        (DMA_WRITE, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE),
    ];
    let set = both.iter().filter(|(bit, _)| flags & bit != 0);
    set.fold(0, |flags, (_, bit)| flags | bit)
}

fn type1_unmap(container: &File, flags: u32, iova: u64, length: u64) -> io::Result<u64> {
    // `struct vfio_iommu_type1_dma_unmap`: argsz, flags, iova, size; its data is for another flag.
    let mut unmap = [0u64, iova, length];
    unmap[0] = u64::from_ne_bytes(words(size_of_val(&unmap) as u32, flags));
    sys::ioctl_bytes(container, abi::VFIO_IOMMU_UNMAP_DMA, unmap.as_mut_bytes())?;
    Ok(unmap[2])
}

/// Two 32-bit fields as they lie in memory.
fn words(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    bytes
}

fn ioas_unmap(iommu: &File, id: u32, iova: u64, length: u64) -> io::Result<u64> {
    let mut unmap = iommu_ioas_unmap {
        size: size_of::<iommu_ioas_unmap>() as u32,
        ioas_id: id,
        iova,
        length,
    };
    sys::ioctl(iommu, abi::IOMMU_IOAS_UNMAP, &mut unmap)?;
    Ok(unmap.length)
}
