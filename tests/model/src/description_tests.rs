// SPDX-License-Identifier: GPL-2.0
//! Descriptions: each fault, where it is found, and what a description says of a region.

use crate::description::{pages, Arrays, Fault, Segment};
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

fn doorbell(offset: u64, size: u64) -> muser_area {
    muser_area {
        flags: MUSER_AREA_DOORBELL,
        ..area(offset, size)
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
fn different_device_is_told_by_its_first_difference() {
    let good = Sample::good();
    let differs = |spoil: fn(&mut Sample)| {
        let mut other = Sample::good();
        spoil(&mut other);
        good.arrays().differs(&other.arrays())
    };

    let at = |kind: usize, position| Err(Fault::new(MUSER_FAULT_DIFFERS, kind << 16 | position));

    assert_eq!(differs(|_| {}), Ok(()));
    assert_eq!(differs(|s| s.regions[0].flags = 1), at(0, 0));
    assert_eq!(differs(|s| s.regions[1].size = 101), at(0, 1));
    assert_eq!(differs(|s| s.regions.truncate(2)), at(0, 2));
    assert_eq!(differs(|s| s.regions.push(region(8, 1, 0))), at(0, 3));
    assert_eq!(differs(|s| s.areas[0].size = 1), at(1, 0));
    assert_eq!(differs(|s| s.areas[1].offset = PAGE), at(1, 1));
    assert_eq!(differs(|s| s.areas.clear()), at(1, 0));
    assert_eq!(differs(|s| s.irqs[0].count = 2), at(2, 0));
    assert_eq!(differs(|s| s.irqs[1].flags = 0), at(2, 1));
    assert_eq!(differs(|s| s.irqs.push(irq(4, 1))), at(2, 2));
    // The first of several.
    let several = |s: &mut Sample| {
        s.irqs.clear();
        s.areas[1].size = PAGE;
    };
    assert_eq!(differs(several), at(1, 1));
}

#[test]
fn memory_is_the_sum_of_mappable_areas() {
    assert_eq!(Sample::good().arrays().memory(), 3 * PAGE);
}

/// A good description with these areas in region 0, of 4 pages.
fn with_areas(areas: Vec<muser_area>) -> Sample {
    let mut sample = Sample::good();
    sample.regions[0].num_areas = areas.len() as u32;
    sample.areas = areas;
    sample
}

#[test]
fn doorbells_lie_anywhere_at_multiples_of_4() {
    let areas = vec![
        area(0, PAGE),
        doorbell(PAGE, 4),
        doorbell(PAGE + 4, PAGE),
        doorbell(4 * PAGE - 4, 4),
    ];
    assert_eq!(with_areas(areas).check(), Ok(()));

    let faulty = |area, code| {
        let sample = with_areas(vec![doorbell(0, 8), area]);
        assert_eq!(sample.check(), Err(Fault::new(code, 1)));
    };
    faulty(doorbell(10, 4), MUSER_FAULT_AREA_ALIGN);
    faulty(doorbell(12, 2), MUSER_FAULT_AREA_ALIGN);
    faulty(doorbell(12, 0), MUSER_FAULT_AREA_ALIGN);
    faulty(doorbell(4, 8), MUSER_FAULT_AREA_OVERLAP);
    faulty(doorbell(4 * PAGE - 4, 8), MUSER_FAULT_AREA_OVERFLOW);
    faulty(doorbell(u64::MAX - 3, 4), MUSER_FAULT_AREA_OVERFLOW);
    // What is mapped is mapped by pages, also behind a doorbell.
    faulty(area(8, PAGE), MUSER_FAULT_AREA_ALIGN);
}

#[test]
fn doorbells_in_one_page_need_one_page() {
    let memory = |areas| with_areas(areas).arrays().memory();

    assert_eq!(memory(vec![doorbell(PAGE + 8, 4)]), PAGE);
    assert_eq!(memory(vec![doorbell(8, 4), doorbell(16, 4)]), PAGE);
    assert_eq!(memory(vec![doorbell(PAGE - 4, 8)]), 2 * PAGE);
    assert_eq!(
        memory(vec![
            doorbell(8, 4),
            doorbell(PAGE - 4, 8),
            doorbell(PAGE + 4, 4)
        ]),
        2 * PAGE
    );
    assert_eq!(memory(vec![area(0, PAGE), doorbell(PAGE, 4)]), 2 * PAGE);
}

#[test]
fn pages_of_a_region_without_whole_pages_reach_beyond_it() {
    assert_eq!(pages(&doorbell(4, 8)), 0..PAGE);
    assert_eq!(pages(&doorbell(PAGE - 4, 8)), 0..2 * PAGE);
    assert_eq!(pages(&area(PAGE, PAGE)), PAGE..2 * PAGE);
}

proptest! {
    /// Walking a region segment by segment reaches its end, and every byte is what its area says.
    #[test]
    fn segments_cover_region(
        cuts in prop::collection::btree_set(0..64u64, 0..12),
        kinds in prop::collection::vec(any::<bool>(), 6),
        start in 0..64 * PAGE,
    ) {
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let own: Vec<muser_area> = cuts
            .chunks_exact(2)
            .zip(kinds)
            .map(|(pair, ring)| match ring {
                false => area(pair[0] * PAGE, (pair[1] - pair[0]) * PAGE),
                true => doorbell(pair[0] * PAGE + 4, (pair[1] - pair[0]) * PAGE - 8),
            })
            .collect();
        // Two areas of another region come first.
        let mut sample = Sample::good();
        sample.regions[1] = region(2, 64 * PAGE, own.len() as u32);
        sample.areas.extend(&own);
        prop_assert_eq!(sample.check(), Ok(()));
        let arrays = sample.arrays();
        let region = arrays.region(2).unwrap();
        let mut at = start;
        while at < region.described.size {
            let (flags, len) = match region.segment(at) {
                Segment::Memory(len) => (Some(MUSER_AREA_MMAP), len),
                Segment::Doorbell(len, place) => {
                    prop_assert!(arrays.areas[place].offset <= at);
                    prop_assert_eq!(arrays.areas[place].offset + arrays.areas[place].size, at + len);
                    prop_assert!(place >= 2);
                    (Some(MUSER_AREA_DOORBELL), len)
                }
                Segment::Forwarded(len) => (None, len),
            };
            prop_assert!(len > 0 && len <= region.described.size - at);
            for byte in [at, at + len / 2, at + len - 1] {
                let inside = own.iter().find(|a| (a.offset..a.offset + a.size).contains(&byte));
                prop_assert_eq!(inside.map(|area| area.flags), flags);
            }
            at += len;
        }
        prop_assert_eq!(at, region.described.size);
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
