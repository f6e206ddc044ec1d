// SPDX-License-Identifier: GPL-2.0
//! The client's side of a device: what the VFIO device file does.

use crate::{
    driver::{
        description::{pages, Segment},
        device::Device,
        memory::{locate, ClientPager},
        request::{Place, Request}, //
    },
    uapi::*,
    vfio::{
        device::{
            self,
            Info,
            IrqInfo,
            RegionInfo,
            FLAGS_PCI,
            FLAGS_PLATFORM,
            FLAGS_RESET,
            PCI_REQ_IRQ,
            REGION_MMAP,
            REGION_READ,
            REGION_WRITE, //
        },
        irq_set::IrqSet,
        page::PAGE_SIZE,
        pins::Pins,
        vm::NewVma, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc,
    uaccess::UserPtr, //
};

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// Who maps device memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// A client, by the VFIO device file.
    Client,
    /// The process, by the node.
    Process,
}

impl Device {
    /// Performs a read or write of the device file, part by part: what areas back is copied
    /// here, the rest is asked of the process.
    ///
    /// Returns what was done before the first error, or the error if it is the first thing.
    fn access(
        &self,
        direction: Direction,
        position: u64,
        user: UserPtr,
        len: usize,
    ) -> Result<usize> {
        let index = (position >> MUSER_MMAP_REGION_SHIFT) as u32;
        let offset = position & (MUSER_MAX_REGION_SIZE - 1);
        let arrays = self.described()?.arrays();
        let region = arrays.region(index).ok_or(EINVAL)?;
        let described = region.described;
        let needed = match direction {
            Direction::Read => MUSER_REGION_READ,
            Direction::Write => MUSER_REGION_WRITE,
        };
        if described.flags & needed == 0 || offset >= described.size {
            return Err(EINVAL);
        }
        let len = len.min(usize::try_from(described.size - offset)?);
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let left = (len - done) as u64;
            let to = user.wrapping_byte_add(done);
            let part = match region.segment(at) {
                Segment::Memory(size) => {
                    let part = left.min(size) as usize;
                    self.copy(direction, index, at, to, part).map(|()| part)
                }
                Segment::Doorbell(size, area) => {
                    let part = left.min(size) as usize;
                    self.ring(direction, index, at, to, part, area)
                        .map(|()| part)
                }
                Segment::Forwarded(size) => {
                    let count = left.min(size).min(u64::from(MUSER_SLOT_DATA)) as u32;
                    let place = Place {
                        region: index,
                        offset: at,
                        count,
                    };
                    self.forward(direction, place, to).map(|()| count as usize)
                }
            };
            match part {
                Ok(part) => done += part,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn copy(
        &self,
        direction: Direction,
        region: u32,
        offset: u64,
        user: UserPtr,
        len: usize,
    ) -> Result {
        match direction {
            Direction::Read => {
                self.counters.memory_reads.add(1);
                self.memory.read(region, offset, user, len)
            }
            Direction::Write => {
                self.counters.memory_writes.add(1);
                self.memory.write(region, offset, user, len)
            }
        }
    }

    /// Accesses a doorbell: as memory, but that the process hears of a write.
    fn ring(
        &self,
        direction: Direction,
        region: u32,
        offset: u64,
        user: UserPtr,
        len: usize,
        area: usize,
    ) -> Result {
        if direction == Direction::Read {
            return self.copy(direction, region, offset, user, len);
        }
        let written = self.memory.write(region, offset, user, len);
        // A write that failed may have changed something before it did.
        self.doorbells.ring(area);
        written?;
        self.counters.doorbells.add(1);
        Ok(())
    }

    fn forward(&self, direction: Direction, place: Place, user: UserPtr) -> Result {
        match direction {
            Direction::Read => {
                let request = Request::read(place)?;
                self.perform(&request)?;
                request.copy_to_user(user)
            }
            Direction::Write => self.perform(&Request::write(place, user)?),
        }
    }
}

impl device::Operations for Device {
    const NAME: &'static CStr = c"muser";

    fn open(&self) -> Result {
        self.described()?;
        self.set_client(true);
        Ok(())
    }

    fn close(&self) {
        if let Ok(described) = self.described() {
            described.irqs.disable_all();
            // The kernel serves this memory without the process: it can't wait for its reset.
            self.memory.renew(&described.arrays(), self.pins.inode());
        }
        self.set_client(false);
        // The next client finds the device as if it had been switched on. Without memory for the
        // request it finds the registers as the last one left them.
        match Request::reset(true) {
            Ok(request) => self.perform_later(&request),
            Err(_) => pr_warn!(
                "{}: no memory to reset the device after its client\n",
                self.name()
            ),
        }
    }

    fn info(&self) -> Result<Info> {
        let arrays = self.described()?.arrays();
        let bus = match arrays.bus {
            MUSER_BUS_PCI => FLAGS_PCI,
            _ => FLAGS_PLATFORM,
        };
        Ok(Info {
            flags: bus | FLAGS_RESET,
            regions: arrays.visible_regions(),
            irqs: arrays.visible_irqs(),
        })
    }

    fn region_info(&self, index: u32, answer: &mut dyn FnMut(RegionInfo<'_>) -> Result) -> Result {
        let arrays = self.described()?.arrays();
        if index >= arrays.visible_regions() {
            return Err(EINVAL);
        }
        let offset = u64::from(index) << MUSER_MMAP_REGION_SHIFT;
        let Some(region) = arrays.region(index) else {
            return answer(RegionInfo {
                flags: 0,
                size: 0,
                offset,
                sparse: &mut core::iter::empty(),
            });
        };
        let mut flags = 0;
        for (ours, theirs) in [
            (MUSER_REGION_READ, REGION_READ),
            (MUSER_REGION_WRITE, REGION_WRITE),
        ] {
            if region.described.flags & ours != 0 {
                flags |= theirs;
            }
        }
        if region.mappable().next().is_some() {
            flags |= REGION_MMAP;
        }
        let size = region.described.size;
        answer(RegionInfo {
            flags,
            size,
            offset,
            // What can be mapped as a whole needs no list.
            sparse: &mut region
                .mappable()
                .map(|area| (area.offset, area.size))
                .filter(|area| *area != (0, size)),
        })
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let described = self.described()?;
        match described.irqs.info(index) {
            Some(info) => Ok(info),
            None if index < described.arrays().visible_irqs() => Ok(IrqInfo { flags: 0, count: 0 }),
            None => Err(EINVAL),
        }
    }

    fn set_irqs(&self, set: &IrqSet) -> Result {
        self.described()?.irqs.set(set)
    }

    fn reset(&self) -> Result {
        self.perform(&Request::reset(false)?)
    }

    fn read(&self, position: u64, to: UserPtr, len: usize) -> Result<usize> {
        self.access(Direction::Read, position, to, len)
    }

    fn write(&self, position: u64, from: UserPtr, len: usize) -> Result<usize> {
        self.access(Direction::Write, position, from, len)
    }

    fn mmap(&self, vma: &NewVma<'_>) -> Result {
        self.check_mapping(vma, vma.offset(), Side::Client)?;
        vma.fill::<ClientPager>(self.memory.clone());
        Ok(())
    }

    fn request(&self, count: u32) {
        if self.bus != MUSER_BUS_PCI {
            return;
        }
        let trigger = muser_trigger {
            index: PCI_REQ_IRQ,
            vectors: 1,
            ..muser_trigger::default()
        };
        let asked = self
            .described()
            .and_then(|described| described.irqs.trigger(&trigger));
        if count == 0 && !matches!(asked, Ok(1)) {
            pr_info!(
                "{}: its client can't be asked to close it; waiting\n",
                self.name()
            );
        }
    }

    fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    fn dma_unmap(&self, iova: u64, len: u64) {
        self.announce_unmap(iova, len);
    }
}

impl Device {
    /// Checks that a mapping of pages from `first`, as the VFIO device file counts them, lies in one
    /// mappable area and has no rights that the region has not. The process may also map the pages in
    /// which a doorbell lies.
    ///
    /// # Errors
    ///
    /// `EINVAL`, and `EACCES` for the rights.
    pub(crate) fn check_mapping(&self, vma: &NewVma<'_>, first: usize, who: Side) -> Result {
        let (index, offset) = locate(first);
        let arrays = self.described()?.arrays();
        let region = arrays.region(index).ok_or(EINVAL)?;
        let len = (vma.pages() as u64)
            .checked_mul(PAGE_SIZE as u64)
            .ok_or(EINVAL)?;
        let end = offset.checked_add(len).ok_or(EINVAL)?;
        let found = region.areas.iter().any(|area| {
            let pages = pages(area);
            let may = area.flags & MUSER_AREA_MMAP != 0 || who == Side::Process;
            may && pages.start <= offset && end <= pages.end
        });
        if !found || vma.is_private() {
            return Err(EINVAL);
        }
        if who == Side::Process {
            // Of what it may do the region says nothing: it fills what the client only reads.
            return Ok(());
        }
        let flags = region.described.flags;
        if vma.is_readable() && flags & MUSER_REGION_READ == 0 {
            return Err(EACCES);
        }
        if flags & MUSER_REGION_WRITE == 0 {
            if vma.is_writable() {
                return Err(EACCES);
            }
            vma.forbid_writing()?;
        }
        Ok(())
    }
}
