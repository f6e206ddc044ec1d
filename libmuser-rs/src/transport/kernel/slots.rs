// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Slots: the memory in which requests and replies travel.

use std::os::fd::BorrowedFd;

use muser_uapi::*;
use nix::errno::Errno as Number;
use vm_memory::Bytes;
use zerocopy::FromBytes;

use super::to_usize;
use crate::error::{Error, Result};
use crate::sys::{self, Mapping};

/// The slots of the attachment.
#[derive(Debug)]
pub(super) struct Slots {
    mapping: Mapping,
    stride: usize,
}

impl Slots {
    const HEAD: usize = size_of::<muser_slot>();

    pub(super) fn map(node: BorrowedFd<'_>, attach: &muser_attach) -> Result<Self> {
        let stride = attach.slot_stride as usize;
        let len = stride.saturating_mul(attach.slots as usize);
        let len = len.next_multiple_of(to_usize(sys::page_size()));
        let mapping = Mapping::new(node, MUSER_MMAP_SLOTS, len, true)
            .map_err(|errno| Error::io("mapping the slots", errno))?;
        Ok(Self { mapping, stride })
    }

    pub(super) fn head(&self, slot: u32) -> Result<muser_slot> {
        let mut bytes = [0; Self::HEAD];
        self.copy(
            self.mapping
                .slice()
                .read_slice(&mut bytes, self.offset(slot)),
        )?;
        muser_slot::read_from_bytes(&bytes).map_err(|_| Error::io("reading a slot", Number::EPROTO))
    }

    pub(super) fn data(&self, slot: u32, data: &mut [u8]) -> Result<()> {
        let offset = self.offset(slot).saturating_add(Self::HEAD);
        self.copy(self.mapping.slice().read_slice(data, offset))
    }

    pub(super) fn put(&self, slot: u32, result: i32, data: &[u8]) -> Result<()> {
        let slice = self.mapping.slice();
        let offset = self.offset(slot);
        let field = offset.saturating_add(std::mem::offset_of!(muser_slot, result));
        self.copy(slice.write_obj(result, field))?;
        self.copy(slice.write_slice(data, offset.saturating_add(Self::HEAD)))
    }

    fn offset(&self, slot: u32) -> usize {
        self.stride.saturating_mul(slot as usize)
    }

    fn copy(&self, result: Result<(), vm_memory::VolatileMemoryError>) -> Result<()> {
        result.map_err(|_| Error::io("a slot lies beyond the mapping", Number::EPROTO))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::sys::memfd::{memfd_create, MFdFlags};
    use zerocopy::IntoBytes;

    use super::*;

    const STRIDE: u32 = 4096 + 64;

    /// Two slots in memory which is not the kernel's, and that memory.
    fn slots() -> (Slots, Mapping) {
        let file = File::from(memfd_create("slots", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(3 * 4096).unwrap();
        let attach = muser_attach {
            slots: 2,
            slot_stride: STRIDE,
            ..muser_attach::default()
        };
        let kernel = Mapping::new(file.as_fd(), 0, 3 * 4096, true).unwrap();
        (Slots::map(file.as_fd(), &attach).unwrap(), kernel)
    }

    #[test]
    fn slot_is_read_where_the_stride_puts_it() {
        let (slots, kernel) = slots();
        let head = muser_slot {
            id: 7,
            kind: MUSER_REQUEST_WRITE,
            count: 3,
            ..Default::default()
        };
        kernel
            .slice()
            .write_slice(head.as_bytes(), STRIDE as usize)
            .unwrap();
        kernel
            .slice()
            .write_slice(&[1, 2, 3], STRIDE as usize + 64)
            .unwrap();
        let mut data = [0; 3];

        slots.data(1, &mut data).unwrap();

        assert_eq!(slots.head(1).unwrap(), head);
        assert_eq!(data, [1, 2, 3]);
        assert_eq!(slots.head(0).unwrap(), muser_slot::default());
    }

    #[test]
    fn reply_changes_result_and_data_alone() {
        let (slots, kernel) = slots();
        let head = muser_slot {
            id: 7,
            kind: 1,
            flags: 2,
            offset: 3,
            ..Default::default()
        };
        kernel
            .slice()
            .write_slice(head.as_bytes(), STRIDE as usize)
            .unwrap();

        slots.put(1, -5, &[9, 8]).unwrap();

        assert_eq!(slots.head(1).unwrap(), muser_slot { result: -5, ..head });
        assert_eq!(
            kernel
                .slice()
                .read_obj::<[u8; 2]>(STRIDE as usize + 64)
                .unwrap(),
            [9, 8]
        );
    }

    #[test]
    fn slot_beyond_the_mapping_is_an_error() {
        let (slots, _kernel) = slots();

        assert!(slots.head(3).is_err());
        assert!(slots.head(u32::MAX).is_err());
        assert!(slots.data(2, &mut [0; 4096]).is_err());
    }
}
