// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The conformance suite over the memory transport: both sides in this process.

use std::io;
use std::os::fd::BorrowedFd;
use std::process::ExitCode;

use libmuser::transport::memory::{self, ClientMemory, IrqAction, IrqData, MemoryTransport};
use libtest_mimic::{Arguments, Trial};
use muser_conformance::{cases, run_with, Access, Backend, Client, DmaMemory, Memory, RegionInfo};

fn main() -> ExitCode {
    let trials = cases().flat_map(|case| {
        // The device is the same with several threads, and with doorbells that are not posted.
        let ways = [
            ("", 1, true),
            ("@threads", 4, true),
            ("@unposted", 1, false),
        ];
        ways.map(|(way, threads, posted)| {
            Trial::test(format!("{}{way}", case.name), move || {
                let host = memory::Host::new()?;
                host.set_posted_doorbells(posted);
                run_with(&case, InProcess(host), threads.max(case.threads))
                    .map_err(|error| format!("{error:#}").into())
            })
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

struct InProcess(memory::Host);

impl Backend for InProcess {
    type Transport = MemoryTransport;

    fn transport(&self) -> libmuser::Result<MemoryTransport> {
        Ok(self.0.transport())
    }

    fn open(&self) -> io::Result<Box<dyn Client>> {
        Ok(Box::new(Open(self.0.open()?)))
    }
}

#[derive(Debug)]
struct Open(memory::Client);

impl Client for Open {
    fn region(&self, index: u32) -> io::Result<Option<RegionInfo>> {
        Ok(self.0.region(index).map(RegionInfo::from))
    }

    fn vectors(&self, index: u32) -> io::Result<u32> {
        Ok(self.0.irq(index).map_or(0, |irq| irq.count))
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
        let data = IrqData::EventFds(events);
        self.0.set_irqs(index, start, IrqAction::Trigger, data)
    }

    fn disable(&self, index: u32) -> io::Result<()> {
        self.0
            .set_irqs(index, 0, IrqAction::Trigger, IrqData::None(0))
    }

    fn set_mask(&self, index: u32, vector: u32, masked: bool) -> io::Result<()> {
        let action = if masked {
            IrqAction::Mask
        } else {
            IrqAction::Unmask
        };
        self.0.set_irqs(index, vector, action, IrqData::None(1))
    }

    fn fire(&self, index: u32, vector: u32) -> io::Result<()> {
        self.0
            .set_irqs(index, vector, IrqAction::Trigger, IrqData::None(1))
    }

    fn reset(&self) -> io::Result<()> {
        self.0.reset()
    }

    fn map(&self, region: u32, offset: u64, _len: usize) -> io::Result<Box<dyn Memory>> {
        Ok(Box::new(self.0.map(region, offset)?))
    }

    fn dma_map(&self, iova: u64, len: u64, access: Access) -> io::Result<Box<dyn DmaMemory>> {
        let memory = ClientMemory::new(usize::try_from(len).unwrap_or(usize::MAX))?;
        self.0.dma_map(iova, &memory, 0..len, access.into())?;
        Ok(Box::new(memory))
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<u64> {
        self.0.dma_unmap(iova, len)
    }

    fn dirty_start(&self, iova: u64, len: u64) -> io::Result<()> {
        // It is always recorded: what was is forgotten.
        self.dirty_pages(iova, len).map(drop)
    }

    fn dirty_pages(&self, iova: u64, len: u64) -> io::Result<Vec<u64>> {
        Ok(self.0.dirty_pages(iova..iova + len, true))
    }
}
