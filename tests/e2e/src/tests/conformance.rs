// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The conformance suite over the kernel's transport, on each road.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::Result;
use libmuser::transport::KernelTransport;
use muser_conformance::{cases, run, Access, Backend, Case, Client, DmaMemory, Memory, RegionInfo};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::sys::{Mapping, PAGE};
use muser_e2e::vfio::{self, IrqData, IrqSet, Road, DMA_BOTH, DMA_READ};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use crate::runner::{Body, Test};

/// The tests of this topic.
pub(super) fn tests() -> Vec<Test> {
    let on_road = |case: Case, road: Road| Test {
        name: format!("conformance::{}@{road}", case.name),
        body: Body::Case(road, case),
        lacking: match case.name {
            "dma::written_pages_are_recorded"
            | "dma::pages_written_through_slices_are_recorded" => vfio::logging_lacking,
            _ => || None,
        },
        patience: 1,
        pins: case.name.starts_with("dma::"),
        injects: false,
    };
    let roads = |case: &Case| match case.name.starts_with("dma::") {
        true => &Road::DMA[..],
        false => &Road::ALL[..],
    };
    cases()
        .flat_map(|case| roads(&case).iter().map(move |road| on_road(case, *road)))
        .collect()
}

/// Runs a case of the suite on a road.
pub(crate) fn run_case(case: &Case, road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    run(case, Kernel { mdev, road })
}

/// A device of the kernel's.
struct Kernel {
    mdev: Mdev,
    road: Road,
}

impl Backend for Kernel {
    type Transport = KernelTransport;

    fn transport(&self) -> libmuser::Result<KernelTransport> {
        KernelTransport::open_node(self.mdev.node())
    }

    fn open(&self) -> io::Result<Box<dyn Client>> {
        Ok(Box::new(Open(vfio::Client::open(&self.mdev, self.road)?)))
    }
}

#[derive(Debug)]
struct Open(vfio::Client);

impl Client for Open {
    fn region(&self, index: u32) -> io::Result<Option<RegionInfo>> {
        let info = self.0.region_info(index)?;
        let whole = (info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0).then_some((0, info.size));
        let areas = match info.areas {
            Some(areas) => areas.iter().map(|area| (area.offset, area.size)).collect(),
            None => whole.into_iter().collect(),
        };
        Ok((info.size > 0).then_some(RegionInfo {
            size: info.size,
            readable: info.flags & VFIO_REGION_INFO_FLAG_READ != 0,
            writable: info.flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
            areas,
        }))
    }

    fn vectors(&self, index: u32) -> io::Result<u32> {
        Ok(self.0.irq_info(index)?.count)
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.0.read(region, offset, data)
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<usize> {
        self.0.write(region, offset, data)
    }

    fn set_eventfds(
        &self,
        index: u32,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let fds = events
            .iter()
            .map(|event| event.map_or(-1, |event| event.as_raw_fd()));
        let data = IrqData::EventFd(fds.collect());
        self.0.set_irqs(&IrqSet::trigger(index, start, data))
    }

    fn disable(&self, index: u32) -> io::Result<()> {
        self.0.set_irqs(&IrqSet::disable(index))
    }

    fn set_mask(&self, index: u32, vector: u32, masked: bool) -> io::Result<()> {
        let make = if masked { IrqSet::mask } else { IrqSet::unmask };
        self.0.set_irqs(&make(index, vector, IrqData::None(1)))
    }

    fn fire(&self, index: u32, vector: u32) -> io::Result<()> {
        self.0
            .set_irqs(&IrqSet::trigger(index, vector, IrqData::None(1)))
    }

    fn reset(&self) -> io::Result<()> {
        self.0.reset()
    }

    fn map(&self, region: u32, offset: u64, len: usize) -> io::Result<Box<dyn Memory>> {
        Ok(Box::new(Mapped(self.0.map(region, offset, len)?)))
    }

    fn dma_map(&self, iova: u64, len: u64, access: Access) -> io::Result<Box<dyn DmaMemory>> {
        let memory = Mapping::anonymous(len as usize)?;
        let flags = match access {
            Access::Read => DMA_READ,
            Access::Both => DMA_BOTH,
        };
        self.0.dma_map(&memory, iova, flags)?;
        Ok(Box::new(Lent(memory)))
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<u64> {
        self.0.dma_unmap(iova, len)
    }

    fn dirty_start(&self, iova: u64, len: u64) -> io::Result<()> {
        self.0.log_start(&[(iova, len)], PAGE as u64).map(drop)
    }

    fn dirty_pages(&self, iova: u64, len: u64) -> io::Result<Vec<u64>> {
        Ok(self.0.log_report(iova, len, PAGE as u64)?.iovas)
    }
}

#[derive(Debug)]
struct Lent(Mapping);

impl DmaMemory for Lent {
    fn read(&self, offset: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.0.read_bytes(offset, to.len()));
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.0.write_bytes(offset, from);
    }
}

#[derive(Debug)]
struct Mapped(Mapping);

impl Memory for Mapped {
    fn load(&self, offset: usize) -> u32 {
        self.0.read(offset)
    }

    fn store(&self, offset: usize, value: u32) {
        self.0.write(offset, value);
    }
}
