// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Regions of a device, and how an access of any size becomes register accesses.

use std::fmt;
use std::iter::FusedIterator;

use vfio_bindings::bindings::vfio;

use crate::transport::RequestId;

/// Part of a device which a client can address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Region {
    /// A base address register's memory or I/O space, from 0 to 5.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// PCI configuration space, which the library serves.
    Config,
}

impl Region {
    /// The region with this index in `<linux/vfio.h>` (`VFIO_PCI_*_REGION_INDEX`).
    #[must_use]
    pub fn from_index(index: u32) -> Option<Self> {
        match index {
            vfio::VFIO_PCI_BAR0_REGION_INDEX..=vfio::VFIO_PCI_BAR5_REGION_INDEX => {
                u8::try_from(index).ok().map(Self::Bar)
            }
            vfio::VFIO_PCI_ROM_REGION_INDEX => Some(Self::Rom),
            vfio::VFIO_PCI_CONFIG_REGION_INDEX => Some(Self::Config),
            _ => None,
        }
    }

    /// The index in `<linux/vfio.h>` (`VFIO_PCI_*_REGION_INDEX`).
    #[must_use]
    pub fn index(self) -> u32 {
        match self {
            Self::Bar(bar) => vfio::VFIO_PCI_BAR0_REGION_INDEX + u32::from(bar),
            Self::Rom => vfio::VFIO_PCI_ROM_REGION_INDEX,
            Self::Config => vfio::VFIO_PCI_CONFIG_REGION_INDEX,
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bar(bar) => write!(f, "BAR {bar}"),
            Self::Rom => f.write_str("expansion ROM"),
            Self::Config => f.write_str("config space"),
        }
    }
}

/// How wide a register access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Width {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes.
    Qword,
}

impl Width {
    /// Bytes of an access.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }

    /// A value with every bit of an access set.
    #[must_use]
    pub const fn ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }
}

/// One register access of a client, naturally aligned: `offset` is a multiple of the width.
///
/// A client may access any number of bytes at any offset. The library cuts that at multiples of
/// the access's size into the widest naturally aligned accesses that fit (not wider than the BAR's
/// registers, see [`Bar::registers`](crate::Bar::registers)) and makes them one after another, by
/// ascending offset: 7 bytes at offset 3 become a byte at 3, a dword at 4 and a word at 8. When
/// one of them fails, those after it are not made, and the client's access fails as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Access {
    /// What is accessed.
    pub region: Region,
    /// Where, in bytes from the region's start.
    pub offset: u64,
    /// How many bytes.
    pub width: Width,
    /// The client's request that the access is part of; a replay has the same.
    pub request: RequestId,
    /// Whether an earlier process took this access and went away before it had answered: what the
    /// access does may be done already.
    pub replay: bool,
}

impl Access {
    /// An access as a client would make it, for a device's own tests.
    #[must_use]
    pub const fn new(region: Region, offset: u64, width: Width) -> Self {
        Self {
            region,
            offset,
            width,
            request: RequestId::NONE,
            replay: false,
        }
    }

    /// Answers a read where the device has nothing: all ones, as an empty bus does.
    ///
    /// # Errors
    ///
    /// None; the type is that of [`Device::read`](crate::Device::read).
    pub fn unhandled_read(&self) -> crate::Result<u64> {
        log::debug!("{self}: nothing to read there, all ones returned");
        Ok(self.width.ones())
    }

    /// Drops a write where the device has nothing.
    ///
    /// # Errors
    ///
    /// None; the type is that of [`Device::write`](crate::Device::write).
    pub fn unhandled_write(&self, value: u64) -> crate::Result<()> {
        log::debug!("{self}: nothing to write there, {value:#x} dropped");
        Ok(())
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} offset {:#x} size {}",
            self.region,
            self.offset,
            self.width.bytes()
        )
    }
}

/// Cuts `len` bytes at `offset` into naturally aligned accesses, not wider than `widest`.
pub(crate) fn split(offset: u64, len: usize, widest: Width) -> Split {
    Split {
        offset,
        len,
        widest,
    }
}

/// Iterator over the accesses of [`split`], by ascending offset.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    offset: u64,
    len: usize,
    widest: Width,
}

impl Iterator for Split {
    type Item = (u64, Width);

    fn next(&mut self) -> Option<Self::Item> {
        let width = [Width::Qword, Width::Dword, Width::Word, Width::Byte]
            .into_iter()
            .filter(|width| *width <= self.widest && width.bytes() <= self.len)
            .find(|width| self.offset % width.bytes() as u64 == 0)?;
        let offset = self.offset;
        self.offset = offset.checked_add(width.bytes() as u64)?;
        self.len -= width.bytes();
        Some((offset, width))
    }
}

impl FusedIterator for Split {}

/// The kinds of [`Area`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AreaKind {
    /// Memory which client and device share, and may map.
    Mappable,
    /// Registers whose writes the client does not wait for: a [`Doorbell`](crate::Doorbell).
    Doorbell,
}

/// Part of a region which does not behave like the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Area {
    /// Bytes from the region's start: a multiple of the page size; of a doorbell, of 4.
    pub offset: u64,
    /// Bytes, a multiple of the same.
    pub size: u64,
    /// What is special.
    pub kind: AreaKind,
}

impl Area {
    /// The offset behind the area's last byte.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.size)
    }
}

/// A write that may come by eventfd: see [`Bar::ioeventfd`](crate::Bar::ioeventfd).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoEvent {
    /// The region's index.
    pub region: u32,
    /// Bytes from the region's start.
    pub offset: u64,
    /// How wide the write is.
    pub width: Width,
    /// Its value; any if there is none, and then the device is told 0.
    pub value: Option<u64>,
    /// Whether the region is I/O ports.
    pub ports: bool,
}

/// What a client is told about a region.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionInfo {
    /// The index in `<linux/vfio.h>`.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// Whether the client may read it.
    pub readable: bool,
    /// Whether the client may write it.
    pub writable: bool,
    /// Parts of it that are special, by ascending offset.
    pub areas: Vec<Area>,
}

impl RegionInfo {
    pub(crate) fn new(index: u32, size: u64) -> Self {
        Self {
            index,
            size,
            readable: true,
            writable: true,
            areas: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(offset: u64, len: usize, widest: Width) -> Vec<(u64, usize)> {
        split(offset, len, widest)
            .map(|(offset, width)| (offset, width.bytes()))
            .collect()
    }

    #[test]
    fn aligned_access_stays_whole() {
        for width in [Width::Byte, Width::Word, Width::Dword, Width::Qword] {
            assert_eq!(cut(16, width.bytes(), Width::Qword), [(16, width.bytes())]);
        }
    }

    #[test]
    fn seven_bytes_at_three_are_byte_dword_word() {
        assert_eq!(cut(3, 7, Width::Qword), [(3, 1), (4, 4), (8, 2)]);
    }

    #[test]
    fn dword_of_byte_registers_is_four_bytes() {
        assert_eq!(cut(4, 4, Width::Byte), [(4, 1), (5, 1), (6, 1), (7, 1)]);
    }

    #[test]
    fn nothing_is_no_access() {
        assert_eq!(cut(5, 0, Width::Qword), []);
    }

    #[test]
    fn region_index_returns_its_region() {
        for index in 0..8 {
            assert_eq!(Region::from_index(index).map(Region::index), Some(index));
        }
        assert_eq!(Region::from_index(8), None);
    }

    proptest! {
        #[test]
        fn any_split_covers_the_access_once(
            offset in 0_u64..1 << 41,
            len in 0_usize..200,
            widest in prop::sample::select(vec![
                Width::Byte, Width::Word, Width::Dword, Width::Qword,
            ]),
        ) {
            let mut at = offset;
            for (offset, width) in split(offset, len, widest) {
                prop_assert_eq!(offset, at);
                prop_assert_eq!(offset % width.bytes() as u64, 0);
                prop_assert!(width <= widest);
                at += width.bytes() as u64;
            }
            prop_assert_eq!(at, offset + len as u64);
        }

        #[test]
        fn no_two_neighbours_could_have_been_one(offset in 0_u64..64, len in 0_usize..64) {
            let parts = cut(offset, len, Width::Qword);
            for pair in parts.windows(2) {
                let ((at, first), (_, second)) = (pair[0], pair[1]);
                let mergeable = first == second && first < 8 && at % (2 * first as u64) == 0;
                prop_assert!(!mergeable);
            }
        }
    }
}
