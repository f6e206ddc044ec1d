// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fixed parts of payloads, byte for byte.
//!
//! `argsz` is, in a request, how many bytes of payload the reply may have; in a reply, how many a
//! whole one would have.

#![expect(missing_docs, reason = "the fields are those of the specification")]
#![expect(
    missing_debug_implementations,
    reason = "the derives of zerocopy make types of their own"
)]

use zerocopy::FromBytes;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Malformed;

/// Takes a fixed part off the front of a payload.
///
/// # Errors
///
/// The payload is shorter.
pub fn take<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Malformed> {
    T::read_from_prefix(payload).map_err(|_| Malformed("the payload is too short"))
}

/// Makes a structure of the protocol: its size, which the specification says, is checked.
macro_rules! structure {
    (
        $(#[$attribute:meta])*
        $name:ident: $size:literal { $( $(#[$field_attribute:meta])* $field:ident: $type:ty, )* }
    ) => {
        $(#[$attribute])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[repr(C)]
        pub struct $name {
            $( $(#[$field_attribute])* pub $field: $type, )*
        }

        const _: () = assert!(size_of::<$name>() == $size);
    };
}

structure! {
    /// `VERSION`, both ways; the capabilities follow, as JSON with a NUL behind.
    Version: 4 {
        major: u16,
        minor: u16,
    }
}

structure! {
    /// `DMA_MAP`; its `argsz` is the size of this structure.
    DmaMap: 32 {
        argsz: u32,
        flags: u32,
        offset: u64,
        address: u64,
        size: u64,
    }
}

impl DmaMap {
    /// The device may read.
    pub const READ: u32 = 1 << 0;
    /// The device may write.
    pub const WRITE: u32 = 1 << 1;
}

structure! {
    /// `DMA_UNMAP`, both ways. Where the dirty bitmap is asked for a [`Bitmap`] follows.
    DmaUnmap: 24 {
        argsz: u32,
        flags: u32,
        address: u64,
        size: u64,
    }
}

impl DmaUnmap {
    /// The reply has the pages which the device has written to (`VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`).
    pub const DIRTY_BITMAP: u32 = 1 << 0;
    /// Everything is unmapped; address and size are 0 (`VFIO_DMA_UNMAP_FLAG_ALL`).
    pub const ALL: u32 = 1 << 1;
}

structure! {
    /// What a bitmap of dirty pages is to be like; in a reply, its bytes follow.
    Bitmap: 16 {
        pgsize: u64,
        size: u64,
    }
}

structure! {
    /// `DEVICE_GET_INFO`, both ways.
    DeviceInfo: 16 {
        argsz: u32,
        flags: u32,
        num_regions: u32,
        num_irqs: u32,
    }
}

impl DeviceInfo {
    /// `DEVICE_RESET` works.
    pub const RESET: u32 = 1 << 0;
    /// It is a PCI device.
    pub const PCI: u32 = 1 << 1;
}

structure! {
    /// `DEVICE_GET_REGION_INFO`, both ways; in a reply capabilities follow.
    RegionInfo: 32 {
        argsz: u32,
        flags: u32,
        index: u32,
        cap_offset: u32,
        size: u64,
        offset: u64,
    }
}

impl RegionInfo {
    /// The client may read it.
    pub const READ: u32 = 1 << 0;
    /// The client may write it.
    pub const WRITE: u32 = 1 << 1;
    /// The client may map it, or its areas, with the descriptors of the reply.
    pub const MMAP: u32 = 1 << 2;
    /// There are capabilities at `cap_offset`.
    pub const CAPS: u32 = 1 << 3;
}

structure! {
    /// The start of each capability of a region.
    CapHeader: 8 {
        id: u16,
        version: u16,
        /// Where in the payload the next one is; 0 if there is none.
        next: u32,
    }
}

impl CapHeader {
    /// A [`SparseMmap`] follows (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`).
    pub const SPARSE_MMAP: u16 = 1;
}

structure! {
    /// Behind a [`CapHeader`]; as many [`SparseArea`]s follow as it says.
    SparseMmap: 8 {
        nr_areas: u32,
        reserved: u32,
    }
}

structure! {
    /// An area that can be mapped.
    SparseArea: 16 {
        offset: u64,
        size: u64,
    }
}

structure! {
    /// `DEVICE_GET_REGION_IO_FDS`, both ways; in a reply, as many [`IoEventFd`]s follow as it says.
    RegionIoFds: 16 {
        argsz: u32,
        flags: u32,
        index: u32,
        count: u32,
    }
}

structure! {
    /// Writes that may come by an eventfd.
    IoEventFd: 40 {
        offset: u64,
        size: u64,
        /// Which descriptor of the message.
        fd_index: u32,
        kind: u32,
        flags: u32,
        padding: u32,
        datamatch: u64,
    }
}

impl IoEventFd {
    /// The kind of an eventfd (`VFIO_USER_IO_FD_TYPE_IOEVENTFD`).
    pub const EVENTFD: u32 = 0;
    /// Only writes of the value `datamatch` (`KVM_IOEVENTFD_FLAG_DATAMATCH`).
    pub const DATAMATCH: u32 = 1 << 0;
    /// I/O ports (`KVM_IOEVENTFD_FLAG_PIO`).
    pub const PIO: u32 = 1 << 1;
}

structure! {
    /// `DEVICE_GET_IRQ_INFO`, both ways.
    IrqInfo: 16 {
        argsz: u32,
        flags: u32,
        index: u32,
        count: u32,
    }
}

impl IrqInfo {
    /// Eventfds can be given.
    pub const EVENTFD: u32 = 1 << 0;
    /// Vectors can be masked.
    pub const MASKABLE: u32 = 1 << 1;
    /// It masks itself when it fires.
    pub const AUTOMASKED: u32 = 1 << 2;
    /// Vectors are set up all at once.
    pub const NORESIZE: u32 = 1 << 3;
}

structure! {
    /// `DEVICE_SET_IRQS`; booleans follow, or descriptors ride on the message.
    IrqSet: 20 {
        argsz: u32,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
    }
}

impl IrqSet {
    /// No data.
    pub const DATA_NONE: u32 = 1 << 0;
    /// A byte a vector.
    pub const DATA_BOOL: u32 = 1 << 1;
    /// A descriptor a vector, or none at all.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// Mask.
    pub const MASK: u32 = 1 << 3;
    /// Unmask.
    pub const UNMASK: u32 = 1 << 4;
    /// Trigger.
    pub const TRIGGER: u32 = 1 << 5;
}

structure! {
    /// `REGION_READ` and `REGION_WRITE`, both ways; data follows, but that of a read in the reply
    /// only, and of a write in the request only.
    RegionAccess: 16 {
        offset: u64,
        region: u32,
        count: u32,
    }
}

structure! {
    /// `DMA_READ` and `DMA_WRITE`, both ways, with data as [`RegionAccess`].
    DmaAccess: 16 {
        address: u64,
        count: u64,
    }
}

structure! {
    /// `REGION_WRITE_MULTI`, both ways; in a request as many [`WriteOne`]s follow as it says.
    WriteMulti: 8 {
        count: u64,
    }
}

structure! {
    /// One write of several.
    WriteOne: 24 {
        offset: u64,
        region: u32,
        /// Bytes of `data`.
        count: u32,
        data: [u8; 8],
    }
}

structure! {
    /// `DEVICE_FEATURE`, both ways; data of the feature follows.
    Feature: 8 {
        argsz: u32,
        flags: u32,
    }
}

impl Feature {
    /// The feature's index.
    pub const INDEX: u32 = 0xffff;
    /// Asks for its data.
    pub const GET: u32 = 1 << 16;
    /// Sets its data.
    pub const SET: u32 = 1 << 17;
    /// Asks whether the others would work.
    pub const PROBE: u32 = 1 << 18;

    /// What migration the device can.
    pub const MIGRATION: u32 = 1;
    /// The state of a migration.
    pub const MIG_DEVICE_STATE: u32 = 2;
    /// Begins to record what the device writes.
    pub const DMA_LOGGING_START: u32 = 6;
    /// Ends that.
    pub const DMA_LOGGING_STOP: u32 = 7;
    /// What the device has written.
    pub const DMA_LOGGING_REPORT: u32 = 8;
}

structure! {
    /// Data of [`Feature::DMA_LOGGING_START`]; as many [`LoggingRange`]s follow as it says.
    LoggingStart: 16 {
        page_size: u64,
        num_ranges: u32,
        reserved: u32,
    }
}

structure! {
    /// What is to be recorded.
    LoggingRange: 16 {
        iova: u64,
        length: u64,
    }
}

structure! {
    /// Data of [`Feature::DMA_LOGGING_REPORT`]; in a reply, the bitmap follows.
    LoggingReport: 24 {
        iova: u64,
        length: u64,
        page_size: u64,
    }
}

structure! {
    /// `MIG_DATA_READ` and `MIG_DATA_WRITE`.
    MigrationData: 8 {
        argsz: u32,
        size: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_payload_is_refused() {
        assert!(take::<DmaMap>(&[0; 31]).is_err());
    }

    #[test]
    fn rest_of_a_payload_follows_its_fixed_part() {
        let mut payload = vec![0; 8];
        payload[0] = 1;
        payload.extend([5, 6]);

        let (fixed, rest) = take::<WriteMulti>(&payload).unwrap();

        assert_eq!(fixed.count.to_ne_bytes()[0], 1);
        assert_eq!(rest, [5, 6]);
    }
}
