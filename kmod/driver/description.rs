// SPDX-License-Identifier: GPL-2.0
//! What a device is made of, checked once when the first process attaches and never changed after.
//!
//! The checks are plain functions over slices, without anything of the kernel, so that the host
//! can test this very file (`tests/model`).

use crate::uapi::*;
use core::ops::Range;

/// What is wrong with a description, as it goes into `muser_attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// `MUSER_FAULT_*`.
    pub(crate) code: u32,
    /// The element of the array which the fault is about.
    pub(crate) index: u32,
}

impl Fault {
    /// A fault of element `index`.
    pub(crate) const fn new(code: u32, index: usize) -> Self {
        // Every array is at most 256 long when its elements are looked at.
        Self {
            code,
            index: index as u32,
        }
    }
}

/// Regions and interrupt indexes of a PCI device: `VFIO_PCI_NUM_REGIONS`, `VFIO_PCI_NUM_IRQS`.
const PCI_REGIONS: u32 = 9;
const PCI_IRQS: u32 = 5;
/// `VFIO_PCI_CONFIG_REGION_INDEX`.
pub(crate) const PCI_CONFIG_REGION: u32 = 7;
/// Bytes of config space: PCI 3.0, 6.1, and PCI Express 5.0, 7.2.
const PCI_CONFIG_SIZES: [u64; 2] = [256, 4096];

/// Bytes of a page: the unit of mappable areas.
pub(crate) const PAGE_SIZE: u64 = 4096;
/// The unit of doorbells, in bytes.
const DOORBELL_SIZE: u64 = 4;

/// The arrays of a description.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrays<'a> {
    /// `MUSER_BUS_*`.
    pub(crate) bus: u32,
    /// Regions by ascending index.
    pub(crate) regions: &'a [muser_region],
    /// Areas, those of the first region first.
    pub(crate) areas: &'a [muser_area],
    /// Interrupt indexes, ascending.
    pub(crate) irqs: &'a [muser_irq],
}

/// A region and what belongs to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region<'a> {
    /// The region.
    pub(crate) described: &'a muser_region,
    /// Its areas.
    pub(crate) areas: &'a [muser_area],
    /// Place of the first of them among all areas.
    pub(crate) first_area: usize,
}

/// Which part of a region an offset is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Kernel pages back the next so many bytes.
    Memory(u64),
    /// So do they, and the process is to hear of a write; with the place among all areas.
    Doorbell(u64, usize),
    /// The process serves the next so many bytes.
    Forwarded(u64),
}

impl<'a> Arrays<'a> {
    /// How many regions a client sees: those of the bus, or one more than the highest index.
    pub(crate) fn visible_regions(&self) -> u32 {
        match self.bus {
            MUSER_BUS_PCI => PCI_REGIONS,
            _ => self.regions.last().map_or(0, |region| region.index + 1),
        }
    }

    /// How many interrupt indexes a client sees.
    pub(crate) fn visible_irqs(&self) -> u32 {
        match self.bus {
            MUSER_BUS_PCI => PCI_IRQS,
            _ => self.irqs.last().map_or(0, |irq| irq.index + 1),
        }
    }

    /// All regions.
    pub(crate) fn each_region(self) -> impl Iterator<Item = Region<'a>> {
        let mut first_area = 0;
        self.regions.iter().map_while(move |described| {
            let end = first_area + described.num_areas as usize;
            let region = Region {
                described,
                areas: self.areas.get(first_area..end)?,
                first_area,
            };
            first_area = end;
            Some(region)
        })
    }

    /// The region with an index.
    pub(crate) fn region(&self, index: u32) -> Option<Region<'a>> {
        self.each_region()
            .find(|region| region.described.index == index)
    }

    /// Bytes of device memory that the areas can come to hold, in pages.
    pub(crate) fn memory(&self) -> u64 {
        let mut sum = 0u64;
        for region in self.each_region() {
            // Doorbells can share a page.
            let mut counted = 0;
            for area in region.areas {
                let pages = pages(area);
                sum = sum.saturating_add(pages.end - pages.start.max(counted));
                counted = pages.end;
            }
        }
        sum
    }

    /// Finds the first thing that is wrong.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        if !matches!(self.bus, MUSER_BUS_PCI | MUSER_BUS_PLATFORM) {
            return Err(Fault::new(MUSER_FAULT_BUS, 0));
        }
        let (regions, irqs) = match self.bus {
            MUSER_BUS_PCI => (PCI_REGIONS, PCI_IRQS),
            _ => (MUSER_MAX_REGIONS, MUSER_MAX_IRQ_INDEXES),
        };
        self.check_regions(regions)?;
        self.check_irqs(irqs)
    }

    fn check_regions(&self, limit: u32) -> Result<(), Fault> {
        let mut lowest = 0;
        let mut areas = self.areas;
        for (i, region) in self.regions.iter().enumerate() {
            if region.index < lowest || region.index >= limit {
                return Err(Fault::new(MUSER_FAULT_REGION_INDEX, i));
            }
            lowest = region.index + 1;
            let known = MUSER_REGION_READ | MUSER_REGION_WRITE;
            if region.flags == 0 || region.flags & !known != 0 || region.reserved != 0 {
                return Err(Fault::new(MUSER_FAULT_REGION_FLAGS, i));
            }
            if region.size > MUSER_MAX_REGION_SIZE {
                return Err(Fault::new(MUSER_FAULT_REGION_OVERFLOW, i));
            }
            let config = self.bus == MUSER_BUS_PCI && region.index == PCI_CONFIG_REGION;
            if region.size == 0 || (config && !PCI_CONFIG_SIZES.contains(&region.size)) {
                return Err(Fault::new(MUSER_FAULT_REGION_SIZE, i));
            }
            let count = region.num_areas as usize;
            let (own, rest) = areas
                .split_at_checked(count)
                .ok_or(Fault::new(MUSER_FAULT_AREA_COUNT, i))?;
            check_areas(region, own, self.areas.len() - areas.len())?;
            areas = rest;
        }
        if !areas.is_empty() {
            return Err(Fault::new(MUSER_FAULT_AREA_COUNT, self.regions.len()));
        }
        if self.bus == MUSER_BUS_PCI && self.region(PCI_CONFIG_REGION).is_none() {
            return Err(Fault::new(MUSER_FAULT_NO_CONFIG, self.regions.len()));
        }
        Ok(())
    }

    fn check_irqs(&self, limit: u32) -> Result<(), Fault> {
        let mut lowest = 0;
        for (i, irq) in self.irqs.iter().enumerate() {
            if irq.index < lowest || irq.index >= limit {
                return Err(Fault::new(MUSER_FAULT_IRQ_INDEX, i));
            }
            lowest = irq.index + 1;
            let known =
                MUSER_IRQ_EVENTFD | MUSER_IRQ_MASKABLE | MUSER_IRQ_AUTOMASKED | MUSER_IRQ_NORESIZE;
            let automasked = irq.flags & MUSER_IRQ_AUTOMASKED != 0;
            let maskable = irq.flags & MUSER_IRQ_MASKABLE != 0;
            if irq.flags & !known != 0 || irq.reserved != 0 || (automasked && !maskable) {
                return Err(Fault::new(MUSER_FAULT_IRQ_FLAGS, i));
            }
            if irq.count == 0 || irq.count > MUSER_MAX_IRQ_VECTORS {
                return Err(Fault::new(MUSER_FAULT_IRQ_COUNT, i));
            }
        }
        Ok(())
    }

    /// Says whether a client could tell this device from `other`, and by which element of `other`.
    pub(crate) fn differs(&self, other: &Arrays<'_>) -> Result<(), Fault> {
        let arrays = [
            first_difference(self.regions, other.regions),
            first_difference(self.areas, other.areas),
            first_difference(self.irqs, other.irqs),
        ];
        for (kind, position) in arrays.into_iter().enumerate() {
            if let Some(position) = position {
                return Err(Fault::new(MUSER_FAULT_DIFFERS, kind << 16 | position));
            }
        }
        Ok(())
    }
}

/// Where two arrays first differ: at the end of the shorter one, if not before.
fn first_difference<T: PartialEq>(one: &[T], other: &[T]) -> Option<usize> {
    let differing = one.iter().zip(other).position(|(one, other)| one != other);
    let shorter = one.len().min(other.len());
    differing.or((one.len() != other.len()).then_some(shorter))
}

/// Checks the areas of one region; `first` is the place of the first one in the whole array.
fn check_areas(region: &muser_region, areas: &[muser_area], first: usize) -> Result<(), Fault> {
    let mut lowest = 0;
    for (i, area) in areas.iter().enumerate() {
        let fault = |code| Fault::new(code, first + i);
        let unit = match area.flags {
            MUSER_AREA_MMAP => PAGE_SIZE,
            MUSER_AREA_DOORBELL => DOORBELL_SIZE,
            _ => return Err(fault(MUSER_FAULT_AREA_FLAGS)),
        };
        if area.reserved != 0 {
            return Err(fault(MUSER_FAULT_AREA_FLAGS));
        }
        if area.size == 0 || (area.offset | area.size) % unit != 0 {
            return Err(fault(MUSER_FAULT_AREA_ALIGN));
        }
        let end = area
            .offset
            .checked_add(area.size)
            .filter(|end| *end <= region.size)
            .ok_or(fault(MUSER_FAULT_AREA_OVERFLOW))?;
        if area.offset < lowest {
            return Err(fault(MUSER_FAULT_AREA_OVERLAP));
        }
        lowest = end;
    }
    Ok(())
}

/// The pages in which a checked area lies, as offsets in its region.
pub(crate) fn pages(area: &muser_area) -> Range<u64> {
    let start = area.offset - area.offset % PAGE_SIZE;
    start..(area.offset + area.size).next_multiple_of(PAGE_SIZE)
}

impl<'a> Region<'a> {
    /// The areas which a client can map.
    pub(crate) fn mappable(&self) -> impl Iterator<Item = &'a muser_area> {
        self.areas
            .iter()
            .filter(|area| area.flags & MUSER_AREA_MMAP != 0)
    }

    /// Says what serves the region at `offset`, and for how many bytes.
    ///
    /// `offset` must be below the region's size.
    pub(crate) fn segment(&self, offset: u64) -> Segment {
        for (area, place) in self.areas.iter().zip(self.first_area..) {
            if offset < area.offset {
                return Segment::Forwarded(area.offset - offset);
            }
            let end = area.offset + area.size;
            if offset < end && area.flags & MUSER_AREA_DOORBELL != 0 {
                return Segment::Doorbell(end - offset, place);
            }
            if offset < end {
                return Segment::Memory(end - offset);
            }
        }
        Segment::Forwarded(self.described.size.saturating_sub(offset))
    }
}
