// SPDX-License-Identifier: GPL-2.0
//! Descriptions: each fault, where it is found, and what a description says of a region.

use crate::description::{segment, Arrays, Fault, Segment};
use crate::uapi::*;
use proptest::prelude::*;

const PAGE: u64 = 4096;

fn region(index: u32, size: u64, num_areas: u32) -> muser_region {
    muser_region {
        index,
        flags: MUSER_REGION_READ | MUSER_REGION_WRITE,
        size,
        num_areas,
        reserved: 0,
    }
}

fn area(offset: u64, size: u64) -> muser_area {
    muser_area {
        offset,
        size,
        flags: MUSER_AREA_MMAP,
        reserved: 0,
    }
}

fn irq(index: u32, count: u32) -> muser_irq {
    muser_irq {
        index,
        flags: MUSER_IRQ_EVENTFD,
        count,
        reserved: 0,
    }
}

/// A description of a PCI device that passes, to be spoilt.
#[derive(Clone)]
struct Sample {
    bus: u32,
    regions: Vec<muser_region>,
    areas: Vec<muser_area>,
    irqs: Vec<muser_irq>,
}

impl Sample {
    fn good() -> Self {
        Self {
            bus: MUSER_BUS_PCI,
            regions: vec![region(0, 4 * PAGE, 2), region(2, 100, 0), region(7, 256, 0)],
            areas: vec![area(0, PAGE), area(2 * PAGE, 2 * PAGE)],
            irqs: vec![irq(0, 1), irq(2, 2048)],
        }
    }

    fn check(&self) -> Result<(), Fault> {
        self.arrays().check()
    }

    fn arrays(&self) -> Arrays<'_> {
        Arrays {
            bus: self.bus,
            regions: &self.regions,
            areas: &self.areas,
            irqs: &self.irqs,
        }
    }
}

/// Spoils a good description, and expects the fault.
fn spoilt(spoil: impl FnOnce(&mut Sample), code: u32, index: usize) {
    let mut sample = Sample::good();
    spoil(&mut sample);
    assert_eq!(sample.check(), Err(Fault::new(code, index)));
}

#[test]
fn good_description_passes() {
    assert_eq!(Sample::good().check(), Ok(()));
}

#[test]
fn each_fault_is_found_where_it_is() {
    spoilt(|s| s.bus = 3, MUSER_FAULT_BUS, 0);
    spoilt(|s| s.regions[2].index = 9, MUSER_FAULT_REGION_INDEX, 2);
    spoilt(|s| s.regions[1].index = 0, MUSER_FAULT_REGION_INDEX, 1);
    spoilt(|s| s.regions[1].flags = 0, MUSER_FAULT_REGION_FLAGS, 1);
    spoilt(|s| s.regions[1].flags = 4, MUSER_FAULT_REGION_FLAGS, 1);
    spoilt(|s| s.regions[1].reserved = 1, MUSER_FAULT_REGION_FLAGS, 1);
    spoilt(|s| s.regions[1].size = 0, MUSER_FAULT_REGION_SIZE, 1);
    spoilt(|s| s.regions[2].size = 512, MUSER_FAULT_REGION_SIZE, 2);
    spoilt(
        |s| s.regions[1].size = (1 << 40) + 1,
        MUSER_FAULT_REGION_OVERFLOW,
        1,
    );
    spoilt(|s| s.regions[0].num_areas = 1, MUSER_FAULT_AREA_COUNT, 3);
    spoilt(|s| s.regions[1].num_areas = 1, MUSER_FAULT_AREA_COUNT, 1);
    spoilt(
        |s| s.regions[1].num_areas = u32::MAX,
        MUSER_FAULT_AREA_COUNT,
        1,
    );
    spoilt(|s| s.areas[1].flags = 0, MUSER_FAULT_AREA_FLAGS, 1);
    spoilt(|s| s.areas[1].flags = 3, MUSER_FAULT_AREA_FLAGS, 1);
    spoilt(|s| s.areas[1].reserved = 1, MUSER_FAULT_AREA_FLAGS, 1);
    spoilt(|s| s.areas[0].size = 0, MUSER_FAULT_AREA_ALIGN, 0);
    spoilt(|s| s.areas[0].size = 100, MUSER_FAULT_AREA_ALIGN, 0);
    spoilt(
        |s| s.areas[1].offset = 2 * PAGE + 8,
        MUSER_FAULT_AREA_ALIGN,
        1,
    );
    spoilt(|s| s.areas[1].size = 3 * PAGE, MUSER_FAULT_AREA_OVERFLOW, 1);
    spoilt(
        |s| s.areas[1].offset = u64::MAX - PAGE + 1,
        MUSER_FAULT_AREA_OVERFLOW,
        1,
    );
    spoilt(|s| s.areas[1].offset = 0, MUSER_FAULT_AREA_OVERLAP, 1);
    spoilt(|s| s.areas[0].size = 3 * PAGE, MUSER_FAULT_AREA_OVERLAP, 1);
    spoilt(|s| s.irqs[1].index = 5, MUSER_FAULT_IRQ_INDEX, 1);
    spoilt(|s| s.irqs[1].index = 0, MUSER_FAULT_IRQ_INDEX, 1);
    spoilt(|s| s.irqs[0].flags = 16, MUSER_FAULT_IRQ_FLAGS, 0);
    spoilt(
        |s| s.irqs[0].flags = MUSER_IRQ_AUTOMASKED,
        MUSER_FAULT_IRQ_FLAGS,
        0,
    );
    spoilt(|s| s.irqs[0].reserved = 1, MUSER_FAULT_IRQ_FLAGS, 0);
    spoilt(|s| s.irqs[0].count = 0, MUSER_FAULT_IRQ_COUNT, 0);
    spoilt(|s| s.irqs[1].count = 2049, MUSER_FAULT_IRQ_COUNT, 1);
    spoilt(|s| s.regions.truncate(2), MUSER_FAULT_NO_CONFIG, 2);
}

#[test]
fn platform_device_may_use_every_index() {
    let mut sample = Sample::good();
    sample.bus = MUSER_BUS_PLATFORM;
    sample.regions.push(region(31, 512, 0));
    sample.irqs.push(irq(31, 1));

    assert_eq!(sample.check(), Ok(()));
    assert_eq!(sample.arrays().visible_regions(), 32);
    assert_eq!(sample.arrays().visible_irqs(), 32);
}

#[test]
fn pci_device_shows_all_indexes_of_its_bus() {
    let sample = Sample::good();

    assert_eq!(sample.arrays().visible_regions(), 9);
    assert_eq!(sample.arrays().visible_irqs(), 5);
}

#[test]
fn different_device_is_told_by_array() {
    let good = Sample::good();
    let differs = |spoil: fn(&mut Sample)| {
        let mut other = Sample::good();
        spoil(&mut other);
        good.arrays().differs(&other.arrays())
    };

    assert_eq!(differs(|_| {}), Ok(()));
    assert_eq!(
        differs(|s| s.regions[1].size = 101),
        Err(Fault::new(MUSER_FAULT_DIFFERS, 0))
    );
    assert_eq!(
        differs(|s| s.areas[0].size = 1),
        Err(Fault::new(MUSER_FAULT_DIFFERS, 1))
    );
    assert_eq!(
        differs(|s| s.irqs[0].count = 2),
        Err(Fault::new(MUSER_FAULT_DIFFERS, 2))
    );
}

#[test]
fn memory_is_the_sum_of_mappable_areas() {
    assert_eq!(Sample::good().arrays().memory(), 3 * PAGE);
}

proptest! {
    /// Walking a region segment by segment reaches its end, and every byte is memory exactly where
    /// an area says so.
    #[test]
    fn segments_cover_region(
        cuts in prop::collection::btree_set(0..64u64, 0..12),
        start in 0..64 * PAGE,
    ) {
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let areas: Vec<muser_area> = cuts
            .chunks_exact(2)
            .map(|pair| area(pair[0] * PAGE, (pair[1] - pair[0]) * PAGE))
            .collect();
        let region = region(0, 64 * PAGE, areas.len() as u32);
        let mut at = start;
        while at < region.size {
            let (memory, len) = match segment(&region, &areas, at) {
                Segment::Memory(len) => (true, len),
                Segment::Forwarded(len) => (false, len),
            };
            prop_assert!(len > 0 && len <= region.size - at);
            for byte in [at, at + len / 2, at + len - 1] {
                let inside = areas.iter().any(|a| (a.offset..a.offset + a.size).contains(&byte));
                prop_assert_eq!(inside, memory);
            }
            at += len;
        }
        prop_assert_eq!(at, region.size);
    }

    /// No description, however odd, makes the checks panic; and what passes fits its limits.
    #[test]
    fn checks_never_panic(
        bus in 0..4u32,
        regions in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u64>(), 0..5u32), 0..8),
        areas in prop::collection::vec((any::<u64>(), any::<u64>(), 0..4u32), 0..8),
        irqs in prop::collection::vec((0..40u32, 0..32u32, 0..4096u32), 0..8),
    ) {
        let sample = Sample {
            bus,
            regions: regions
                .into_iter()
                .map(|(index, flags, size, num_areas)| muser_region {
                    index: index % 40, flags: flags % 5, size, num_areas, reserved: 0,
                })
                .collect(),
            areas: areas
                .into_iter()
                .map(|(offset, size, flags)| muser_area { offset, size, flags, reserved: 0 })
                .collect(),
            irqs: irqs
                .into_iter()
                .map(|(index, flags, count)| muser_irq { index, flags, count, reserved: 0 })
                .collect(),
        };
        if sample.check().is_ok() {
            prop_assert!(sample.arrays().visible_regions() <= MUSER_MAX_REGIONS);
            prop_assert!(sample.irqs.iter().all(|irq| irq.count <= MUSER_MAX_IRQ_VECTORS));
        }
    }
}
