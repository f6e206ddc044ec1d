// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An open VFIO device: information, regions, interrupts, reset.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio::{
    vfio_device_info, vfio_irq_info, vfio_region_info, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS,
};

use super::{abi, AddressSpace, IrqData, IrqSet, Road};
use crate::mdev::Mdev;
use crate::sys::{self, EventFd, Mapping};

/// A VFIO device that this process has open.
#[derive(Debug)]
pub struct Client {
    /// The device's file, then those that must outlive it.
    files: Vec<File>,
    /// What its IOVAs lead to. Last: it must outlive the device as well.
    space: AddressSpace,
}

/// The answer of `VFIO_DEVICE_GET_REGION_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Bytes.
    pub size: u64,
    /// Where the region starts in the device's file.
    pub offset: u64,
    /// Mappable areas of the sparse-mmap capability; `None` without one.
    pub areas: Option<Vec<Area>>,
}

/// An area of a region which can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// The answer of `VFIO_DEVICE_GET_IRQ_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// Vectors.
    pub count: u32,
}

impl Client {
    /// Opens a device on one of the roads.
    ///
    /// # Errors
    ///
    /// The errno of the call that failed.
    pub fn open(mdev: &Mdev, road: Road) -> io::Result<Self> {
        let (files, space) = road.open(mdev)?;
        Ok(Self { files, space })
    }

    /// Opens a device in the container of another client's, which is of type1 or stands for one.
    ///
    /// # Errors
    ///
    /// The errno of the call that failed; `Unsupported` where the other has no container.
    pub fn open_beside(mdev: &Mdev, other: &Self) -> io::Result<Self> {
        let AddressSpace::Container(container) = &other.space else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let (files, space) = super::road::group(mdev, container.try_clone()?, false)?;
        Ok(Self { files, space })
    }

    /// The device's file.
    pub fn file(&self) -> &File {
        &self.files[0]
    }

    /// What its IOVAs lead to.
    pub fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// Lets the device reach the whole of `memory` at `iova`: `flags` are [`super::DMA_READ`] and
    /// [`super::DMA_WRITE`], from the device's side.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl: those of type1 and of iommufd differ.
    pub fn dma_map(&self, memory: &Mapping, iova: u64, flags: u32) -> io::Result<()> {
        self.space.map(memory, 0..memory.len(), iova, flags)
    }

    /// Unmaps what lies in a range of IOVA; bytes unmapped.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl. Of a range in which nothing is mapped, iommufd says `ENOENT`, and
    /// type1 that it unmapped 0 bytes.
    pub fn dma_unmap(&self, iova: u64, length: u64) -> io::Result<u64> {
        self.space.unmap(iova, length)
    }

    /// Unmaps everything; bytes unmapped.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn dma_unmap_all(&self) -> io::Result<u64> {
        self.space.unmap_all()
    }

    /// `VFIO_DEVICE_GET_INFO`.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn info(&self) -> io::Result<vfio_device_info> {
        let mut info = vfio_device_info {
            argsz: size_of::<vfio_device_info>() as u32,
            ..Default::default()
        };
        sys::ioctl(self, abi::VFIO_DEVICE_GET_INFO, &mut info)?;
        Ok(info)
    }

    /// `VFIO_DEVICE_GET_REGION_INFO`, asked twice where there are capabilities.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl; `InvalidData` for capabilities that contradict themselves.
    pub fn region_info(&self, index: u32) -> io::Result<RegionInfo> {
        let mut info = vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            index,
            ..Default::default()
        };
        sys::ioctl(self, abi::VFIO_DEVICE_GET_REGION_INFO, &mut info)?;
        let mut areas = None;
        if info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
            let mut bytes = vec![0; info.argsz as usize];
            bytes[0..4].copy_from_slice(&info.argsz.to_ne_bytes());
            bytes[8..12].copy_from_slice(&index.to_ne_bytes());
            sys::ioctl_bytes(self, abi::VFIO_DEVICE_GET_REGION_INFO, &mut bytes)?;
            areas = Some(sparse_areas(&bytes).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "the capability chain is broken")
            })?);
        }
        Ok(RegionInfo {
            flags: info.flags,
            size: info.size,
            offset: info.offset,
            areas,
        })
    }

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn irq_info(&self, index: u32) -> io::Result<IrqInfo> {
        let mut info = vfio_irq_info {
            argsz: size_of::<vfio_irq_info>() as u32,
            index,
            ..Default::default()
        };
        sys::ioctl(self, abi::VFIO_DEVICE_GET_IRQ_INFO, &mut info)?;
        Ok(IrqInfo {
            flags: info.flags,
            count: info.count,
        })
    }

    /// `VFIO_DEVICE_SET_IRQS`.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn set_irqs(&self, set: &IrqSet) -> io::Result<()> {
        sys::ioctl_bytes(self, abi::VFIO_DEVICE_SET_IRQS, &mut set.bytes()).map(drop)
    }

    /// Gives `count` vectors from `start` an eventfd each.
    ///
    /// # Errors
    ///
    /// The errno of eventfd(2) or the ioctl.
    pub fn enable_irqs(&self, index: u32, start: u32, count: u32) -> io::Result<Vec<EventFd>> {
        let events = (0..count)
            .map(|_| EventFd::new())
            .collect::<io::Result<Vec<_>>>()?;
        let fds = events.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
        self.set_irqs(&IrqSet::trigger(index, start, IrqData::EventFd(fds)))?;
        Ok(events)
    }

    /// Gives one vector an eventfd.
    ///
    /// # Errors
    ///
    /// The errno of eventfd(2) or the ioctl.
    pub fn enable_irq(&self, index: u32, vector: u32) -> io::Result<EventFd> {
        let event = EventFd::new()?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&event);
        self.set_irqs(&IrqSet::trigger(index, vector, IrqData::EventFd(vec![fd])))?;
        Ok(event)
    }

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn reset(&self) -> io::Result<()> {
        sys::ioctl_value(self, abi::VFIO_DEVICE_RESET, 0).map(drop)
    }

    /// Where an offset of a region is in the device's file.
    pub fn position(region: u32, offset: u64) -> u64 {
        (u64::from(region) << abi::REGION_SHIFT) + offset
    }

    /// One pread(2); may be short.
    ///
    /// # Errors
    ///
    /// The errno of pread(2).
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.file().read_at(data, Self::position(region, offset))
    }

    /// One pwrite(2); may be short.
    ///
    /// # Errors
    ///
    /// The errno of pwrite(2).
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<usize> {
        self.file().write_at(data, Self::position(region, offset))
    }

    /// Reads exactly `count` bytes by one pread(2).
    ///
    /// # Errors
    ///
    /// The errno of pread(2); `UnexpectedEof` when it was short.
    pub fn read_vec(&self, region: u32, offset: u64, count: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; count];
        let read = self.read(region, offset, &mut data)?;
        if read != count {
            let message = format!("read {read} of {count} bytes");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        Ok(data)
    }

    /// Reads 4 bytes.
    ///
    /// # Errors
    ///
    /// As [`Client::read_vec`].
    pub fn read_u32(&self, region: u32, offset: u64) -> io::Result<u32> {
        let mut data = [0; 4];
        data.copy_from_slice(&self.read_vec(region, offset, 4)?);
        Ok(u32::from_le_bytes(data))
    }

    /// Writes all bytes by one pwrite(2).
    ///
    /// # Errors
    ///
    /// The errno of pwrite(2); `WriteZero` when it was short.
    pub fn write_all(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = self.write(region, offset, data)?;
        if written != data.len() {
            let message = format!("wrote {written} of {} bytes", data.len());
            return Err(io::Error::new(io::ErrorKind::WriteZero, message));
        }
        Ok(())
    }

    /// Maps part of a region, for reading and writing.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub fn map(&self, region: u32, offset: u64, len: usize) -> io::Result<Mapping> {
        Mapping::shared(self, Self::position(region, offset), len)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }
}

/// Walks the capability chain of a region for the sparse-mmap capability.
fn sparse_areas(info: &[u8]) -> Option<Vec<Area>> {
    let word = |at: usize| {
        info.get(at..at + 4)?
            .try_into()
            .ok()
            .map(u32::from_ne_bytes)
    };
    let long = |at: usize| {
        info.get(at..at + 8)?
            .try_into()
            .ok()
            .map(u64::from_ne_bytes)
    };
    let mut at = word(12)? as usize;
    // A chain that visits more headers than there is room for has a loop.
    for _ in 0..=info.len() / 8 {
        if at == 0 {
            return Some(Vec::new());
        }
        let id = word(at)? & 0xFFFF;
        if id == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = word(at + 8)? as usize;
            return (0..count)
                .map(|i| {
                    let area = at + 16 + i * 16;
                    Some(Area {
                        offset: long(area)?,
                        size: long(area + 8)?,
                    })
                })
                .collect();
        }
        at = word(at + 4)? as usize;
    }
    None
}
