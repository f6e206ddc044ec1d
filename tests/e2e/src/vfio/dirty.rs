// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty logging, which a client asks for before it migrates: `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`.

use std::io;
use std::os::fd::AsFd;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET,
};

use super::{abi, Client};
use crate::sys::{self, Mapping, PAGE};

/// Why no device can log on this kernel.
pub fn logging_lacking() -> Option<String> {
    // The bitmap that a report goes into; VFIO has only a stub of it then.
    let symbols = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    let lacking = !symbols.contains(" iova_bitmap_set");
    lacking.then(|| "this kernel has no IOMMUFD_DRIVER, so VFIO can't log DMA".to_owned())
}

/// The pages of a range that were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// IOVAs of the pages, ascending.
    pub iovas: Vec<u64>,
}

impl Client {
    /// Whether the device can log at all.
    pub fn can_log(&self) -> bool {
        let start = VFIO_DEVICE_FEATURE_DMA_LOGGING_START | VFIO_DEVICE_FEATURE_SET;
        feature(self, VFIO_DEVICE_FEATURE_PROBE | start, &[]).is_ok()
    }

    /// Starts to log writes to the ranges, each an IOVA and a length, by pages of that many bytes;
    /// the page size that the device chose.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn log_start(&self, ranges: &[(u64, u64)], page_size: u64) -> io::Result<u64> {
        log_start(self, ranges, page_size)
    }

    /// The pages of a range that were written since the log began or since the last report.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl, or of mapping memory for the bitmap.
    pub fn log_report(&self, iova: u64, length: u64, page_size: u64) -> io::Result<DirtyPages> {
        let pages = length.div_ceil(page_size) as usize;
        let words = pages.div_ceil(64);
        let bitmap = Mapping::anonymous((words * 8).next_multiple_of(PAGE))?;
        // `struct vfio_device_feature_dma_logging_report`: iova, length, page_size, bitmap.
        let report = [iova, length, page_size, bitmap.address()];
        let get = VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT | VFIO_DEVICE_FEATURE_GET;
        feature(self, get, &report)?;
        let set = |page: &usize| bitmap.read::<u64>(page / 64 * 8) >> (page % 64) & 1 == 1;
        let iovas = (0..words * 64)
            .filter(set)
            .map(|page| iova + page as u64 * page_size)
            .collect();
        Ok(DirtyPages { iovas })
    }

    /// Ends the log.
    ///
    /// # Errors
    ///
    /// The errno of the ioctl.
    pub fn log_stop(&self) -> io::Result<()> {
        let stop = VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP | VFIO_DEVICE_FEATURE_SET;
        feature(self, stop, &[]).map(drop)
    }
}

/// [`Client::log_start`] of a device that another process may have opened.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn log_start(device: impl AsFd, ranges: &[(u64, u64)], page_size: u64) -> io::Result<u64> {
    let table: Vec<u64> = ranges
        .iter()
        .flat_map(|&(iova, length)| [iova, length])
        .collect();
    // `struct vfio_device_feature_dma_logging_control`: page_size, num_ranges, reserved, ranges.
    let control = [
        page_size,
        ranges.len() as u64,
        table.as_ptr().expose_provenance() as u64,
    ];
    let start = VFIO_DEVICE_FEATURE_DMA_LOGGING_START | VFIO_DEVICE_FEATURE_SET;
    Ok(feature(device, start, &control)?[0])
}

/// `VFIO_DEVICE_FEATURE` with data; the data as the kernel left it.
fn feature(client: impl AsFd, flags: u32, data: &[u64]) -> io::Result<Vec<u64>> {
    // `struct vfio_device_feature`: argsz, flags, then the data.
    let mut bytes = vec![0; 8 + data.len() * 8];
    let size = bytes.len() as u32;
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    for (to, word) in bytes[8..].chunks_exact_mut(8).zip(data) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    sys::ioctl_bytes(client, abi::VFIO_DEVICE_FEATURE, &mut bytes)?;
    let words = bytes[8..].chunks_exact(8).map(|word| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        u64::from_ne_bytes(bytes)
    });
    Ok(words.collect())
}
