// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that can't exist, and what is said about them; and what answers where.

use super::*;
use crate::model::Claim;
use crate::region::{AreaKind, Width};

fn fault(builder: PciBuilder) -> String {
    let error = builder.build().unwrap_err();
    assert!(error.is_model(), "{error:?}");
    error.to_string()
}

fn device() -> PciBuilder {
    PciBuilder::new(1, 2)
}

fn memory(size: u64) -> PciBuilder {
    device().bar(0, Bar::memory32(size))
}

#[test]
fn bar_faults_name_the_bar_and_the_reason() {
    let page = Bar::memory32(0x4000);
    let cases = [
        (
            device().bar(6, Bar::io(4)),
            "BAR 6: there are BARs 0 to 5 only",
        ),
        (
            device().bar(255, Bar::memory64(16)),
            "BAR 255: there are BARs 0 to 5 only",
        ),
        (
            device().bar(5, Bar::memory64(16)),
            "BAR 5: no BAR after it for its upper half",
        ),
        (memory(16).bar(0, Bar::io(4)), "BAR 0 is declared twice"),
        (
            device().bar(0, Bar::memory64(16)).bar(1, Bar::io(4)),
            "BAR 1 is taken by the upper half of BAR 0",
        ),
        (
            device().bar(1, Bar::io(4)).bar(0, Bar::memory64(16)),
            "BAR 0: its upper half is taken by BAR 1",
        ),
        (memory(100), "BAR 0: its size 0x64 is not a power of two"),
        (memory(0), "BAR 0: its size 0x0 is not a power of two"),
        (
            memory(8),
            "BAR 0: its size 0x8 is not between 0x10 and 0x80000000",
        ),
        (
            memory(1 << 32),
            "BAR 0: its size 0x100000000 is not between 0x10 and 0x80000000",
        ),
        (
            device().bar(3, Bar::io(512)),
            "BAR 3: its size 0x200 is not between 0x4 and 0x100",
        ),
        (
            device().bar(3, Bar::io(4).prefetchable()),
            "BAR 3: I/O ports can't be prefetchable",
        ),
        (
            device().bar(3, Bar::io(256).mappable(0..4096)),
            "BAR 3: I/O ports can't be mapped",
        ),
        (
            device().bar(0, page.clone().mappable(0x1000..0x1000)),
            "BAR 0: its mappable area 0x1000..0x1000 is empty",
        ),
        (
            device().bar(0, page.clone().mappable(0x10..0x1010)),
            "BAR 0: its mappable area 0x10..0x1010 is not made of whole pages of 4096 bytes",
        ),
        (
            device().bar(0, page.clone().mappable(0x3000..0x5000)),
            "BAR 0: its mappable area 0x3000..0x5000 ends beyond its size 0x4000",
        ),
        (
            device().bar(0, page.mappable(0x1000..0x3000).mappable(0..0x2000)),
            "BAR 0: its mappable area 0x1000..0x3000 overlaps 0x0..0x2000",
        ),
    ];
    for (builder, expected) in cases {
        assert_eq!(fault(builder), expected);
    }
}

#[test]
fn capability_faults_name_the_capability_and_the_reason() {
    let cases = [
        (device().msi(Msi::new(3)), "MSI capability: 3 vectors, where 1, 2, 4, 8, 16 or 32 can be"),
        (device().msi(Msi::new(64)), "MSI capability: 64 vectors, where 1, 2, 4, 8, 16 or 32 can be"),
        (device().msi(Msi::new(0)), "MSI capability: 0 vectors, where 1, 2, 4, 8, 16 or 32 can be"),
        (memory(4096).msix(Msix::new(0)), "MSI-X capability: 0 vectors, where 1 to 2048 can be"),
        (memory(1 << 20).msix(Msix::new(2049)), "MSI-X capability: 2049 vectors, where 1 to 2048 can be"),
        (device().msi(Msi::new(1)).msi(Msi::new(2)), "MSI capability: it is declared twice"),
        (
            device().vendor_capability(VendorCapability::new([1]).writable([1, 2])),
            "vendor-specific capability: a write mask of 2 bytes for 1 bytes of data",
        ),
        (
            device().vendor_capability(VendorCapability::new([0; 190])),
            "vendor-specific capability: no room is left in the first 256 bytes of configuration space",
        ),
        (
            device()
                .vendor_capability(VendorCapability::new([0; 180]))
                .power_management(PowerManagement::new())
                .msi(Msi::new(1)),
            "MSI capability: no room is left in the first 256 bytes of configuration space",
        ),
        (
            device().serial_number(1),
            "device serial number capability: only a PCI Express device has room for it: add `express`",
        ),
        (
            device().express(Express::endpoint()).serial_number(1).serial_number(2),
            "device serial number capability: it is declared twice",
        ),
        (
            device().express(Express::endpoint()).vendor_extended(VendorExtended::new(1, 16, [])),
            "vendor-specific extended capability: revision 16, where 0 to 15 can be",
        ),
        (
            device()
                .express(Express::endpoint())
                .vendor_extended(VendorExtended::new(1, 0, [0; 3840])),
            "vendor-specific extended capability: no room is left in the 4096 bytes of configuration space",
        ),
    ];
    for (builder, expected) in cases {
        assert_eq!(fault(builder), expected);
    }
}

#[test]
fn msix_faults_name_the_structure_and_the_reason() {
    let mappable = device().bar(0, Bar::memory32(0x4000).mappable(0x1000..0x2000));
    let msix = Msix::new(16);
    let cases = [
        (device().msix(msix), "MSI-X table: there is no BAR 0"),
        (
            device().bar(0, Bar::io(256)).msix(Msix::new(1)),
            "MSI-X table: BAR 0 is not memory",
        ),
        (
            memory(0x1000).msix(msix.pba(1, 0)),
            "MSI-X pending bit array: there is no BAR 1",
        ),
        (
            memory(0x1000).msix(msix.table(0, 4)),
            "MSI-X table: its offset 0x4 is not a multiple of 8",
        ),
        (
            memory(0x1000).msix(msix.table(0, 0xff8)),
            "MSI-X table: its end 0x10f8 is beyond BAR 0's size 0x1000",
        ),
        (
            memory(0x1000).msix(msix.pba(0, 0xf8)),
            "MSI-X pending bit array: at 0xf8 it overlaps the table at 0x0",
        ),
        (
            mappable.clone().msix(msix.table(0, 0xff8)),
            "MSI-X table: it overlaps BAR 0's mappable area 0x1000..0x2000",
        ),
        (
            mappable.msix(msix.pba(0, 0x1ff8)),
            "MSI-X pending bit array: it overlaps BAR 0's mappable area 0x1000..0x2000",
        ),
    ];
    for (builder, expected) in cases {
        assert_eq!(fault(builder), expected);
    }
}

#[test]
fn rom_without_bytes_is_refused() {
    assert!(fault(device().rom([])).starts_with("expansion ROM: its image has 0 bytes"));
}

#[test]
fn capabilities_that_just_fit_are_accepted() {
    let full = device().vendor_capability(VendorCapability::new([0; 189]));
    let extended = VendorExtended::new(1, 15, [0; 3832]);
    assert!(full.build().is_ok());
    assert!(device()
        .express(Express::endpoint())
        .vendor_extended(extended)
        .build()
        .is_ok());
}

#[test]
fn capability_after_an_odd_one_is_aligned() {
    let odd = VendorCapability::new([0; 2]);
    let config = device()
        .vendor_capability(odd.clone())
        .vendor_capability(odd);
    let config = config.build().unwrap().config_space();
    let extended = device()
        .express(Express::endpoint())
        .vendor_extended(VendorExtended::new(1, 0, [0; 3]))
        .serial_number(1);
    let extended = extended.build().unwrap().config_space();

    assert_eq!(config.word(0x40), 0x4809);
    assert_eq!(extended.dword(0x100) >> 20, 0x10c);
}

#[test]
fn msix_structures_may_touch_one_another_and_an_area() {
    let page = Bar::memory32(0x4000).mappable(0x1000..0x2000);
    let builder = device().bar(0, page);
    let places = [(8, 0), (0xfe0, 0xfd8), (0x2000, 0xff8), (0x2008, 0x2000)];
    for (table, pba) in places {
        let msix = Msix::new(2).table(0, table).pba(0, pba);
        assert!(
            builder.clone().msix(msix).build().is_ok(),
            "{table:#x} {pba:#x}"
        );
    }
}

#[test]
fn description_has_regions_and_interrupts() {
    let model = device()
        .interrupt_pin(Pin::A)
        .bar(
            4,
            Bar::memory64(0x4000)
                .mappable(0x2000..0x3000)
                .mappable(0..0x1000),
        )
        .rom([1])
        .express(Express::endpoint())
        .msi(Msi::new(4))
        .msix(Msix::new(8).table(4, 0x1000).pba(4, 0x3000))
        .build()
        .unwrap();

    let description = model.description();
    let regions = description.regions.iter();
    let regions: Vec<_> = regions.map(|region| (region.index, region.size)).collect();
    assert_eq!(regions, [(4, 0x4000), (6, 2048), (7, 4096)]);
    let areas = [0, 0x2000].map(|offset| Area {
        offset,
        size: 0x1000,
        kind: AreaKind::Mappable,
    });
    assert_eq!(description.regions[0].areas, areas);
    assert!(!description.regions[1].writable);
    let irqs: Vec<_> = description
        .irqs
        .iter()
        .map(|irq| (irq.index, irq.count))
        .collect();
    assert_eq!(irqs, [(0, 1), (1, 4), (2, 8), (3, 1), (4, 1)]);
    assert!(description.irqs[0].automasked && description.irqs[0].maskable);
    assert_eq!(model.vectors(), 8);
}

#[test]
fn claims_cover_a_bar_without_gap_or_overlap() {
    let msix = Msix::new(2).table(0, 0x40).pba(0, 0x80);
    let model = memory(0x100).msix(msix).build().unwrap();
    let mut found = Vec::new();

    let mut at = 0;
    while at < 0x100 {
        let (claim, span) = model.claim(Region::Bar(0), at).unwrap();
        assert_eq!(span.start, at);
        for inside in span.clone() {
            assert_eq!(
                model.claim(Region::Bar(0), inside),
                Some((claim, span.clone()))
            );
        }
        found.push((claim, span.end));
        at = span.end;
    }

    let own = Claim::Device(Region::Bar(0), Width::Qword);
    let expected = [
        (own, 0x40),
        (Claim::MsixTable, 0x60),
        (own, 0x80),
        (Claim::MsixPba, 0x88),
        (own, 0x100),
    ];
    assert_eq!(found, expected);
}

#[test]
fn region_that_is_not_there_has_no_claim() {
    assert_eq!(memory(16).build().unwrap().claim(Region::Bar(1), 0), None);
}
