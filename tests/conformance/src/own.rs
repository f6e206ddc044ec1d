// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The suite's client in terms of libmuser's own clients: what those over memory and over a socket
//! have in common.

use libmuser::client::ClientMemory;
use libmuser::{AreaKind, DmaAccess, SharedMemory};

use crate::{Access, DmaMemory, Memory, RegionInfo};

impl From<&libmuser::RegionInfo> for RegionInfo {
    fn from(region: &libmuser::RegionInfo) -> Self {
        let areas = region.areas.iter();
        let mappable = areas.filter(|area| area.kind == AreaKind::Mappable);
        Self {
            size: region.size,
            readable: region.readable,
            writable: region.writable,
            areas: mappable.map(|area| (area.offset, area.size)).collect(),
        }
    }
}

impl From<Access> for DmaAccess {
    fn from(access: Access) -> Self {
        match access {
            Access::Read => Self::Read,
            Access::Both => Self::ReadWrite,
        }
    }
}

impl DmaMemory for ClientMemory {
    fn read(&self, offset: usize, to: &mut [u8]) {
        Self::read(self, offset as u64, to).expect("the bytes are in the memory");
    }

    fn write(&self, offset: usize, from: &[u8]) {
        Self::write(self, offset as u64, from).expect("the bytes are in the memory");
    }
}

impl Memory for SharedMemory {
    fn load(&self, offset: usize) -> u32 {
        Self::load(self, offset).expect("the offset is in the area")
    }

    fn store(&self, offset: usize, value: u32) {
        Self::store(self, offset, value).expect("the offset is in the area");
    }
}
