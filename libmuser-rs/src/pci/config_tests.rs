// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space against the specification, and against a simple model.

use proptest::prelude::*;

use super::*;
use crate::{Bar, Express, Msi, Msix, PciBuilder, PciModel, Pin, PowerManagement};
use crate::{VendorCapability, VendorExtended};

const PM: u16 = 0x40;
const EXPRESS: u16 = 0x48;
const MSI: u16 = 0x84;
const MSIX: u16 = 0x9c;
const VENDOR: u16 = 0xa8;

fn builder() -> PciBuilder {
    PciBuilder::new(0x1af4, 0x1042)
        .class(0x01, 0x08, 0x02)
        .revision(0x07)
        .subsystem(0x1234, 0x5678)
        .interrupt_pin(Pin::A)
        .bar(0, Bar::memory64(1 << 34).prefetchable())
        .bar(2, Bar::memory32(0x4000))
        .bar(3, Bar::io(0x20))
        .rom(vec![0x55, 0xaa])
}

fn full_model() -> PciModel {
    builder()
        .power_management(PowerManagement::new().soft_reset())
        .express(Express::endpoint())
        .msi(Msi::new(8).maskable())
        .msix(Msix::new(32).table(2, 0).pba(2, 0x800))
        .vendor_capability(VendorCapability::new([1, 2, 3]).writable([0, 0xf0]))
        .serial_number(0x1122_3344_5566_7788)
        .vendor_extended(VendorExtended::new(0xbeef, 3, [9; 6]))
        .build()
        .unwrap()
}

fn full() -> ConfigSpace {
    full_model().config_space()
}

fn write_word(config: &mut ConfigSpace, offset: u16, value: u16) -> Effects {
    config.write(offset.into(), &value.to_le_bytes())
}

fn write_dword(config: &mut ConfigSpace, offset: u16, value: u32) -> Effects {
    config.write(offset.into(), &value.to_le_bytes())
}

#[test]
fn header_has_what_was_declared() {
    let config = full();

    assert_eq!(config.dword(PCI_VENDOR_ID), 0x1042_1af4);
    assert_eq!(config.dword(PCI_REVISION_ID), 0x0108_0207);
    assert_eq!(config.dword(PCI_SUBSYSTEM_VENDOR_ID), 0x5678_1234);
    assert_eq!(config.word(PCI_INTERRUPT_LINE), 0x0100);
    assert_eq!(config.word(PCI_COMMAND), 0);
    assert_eq!(config.word(PCI_STATUS), PCI_STATUS_CAP_LIST);
}

#[test]
fn conventional_device_has_256_bytes() {
    assert_eq!(builder().build().unwrap().config_space().len(), 256);
    assert_eq!(full().len(), 4096);
}

#[test]
fn all_ones_in_bars_read_back_as_size_masks() {
    let mut config = full();

    for bar in 0..6 {
        write_dword(&mut config, PCI_BASE_ADDRESS_0 + 4 * bar, !0);
    }
    write_dword(&mut config, PCI_ROM_ADDRESS, !0);

    let bars = [0, 1, 2, 3, 4, 5].map(|bar| config.dword(PCI_BASE_ADDRESS_0 + 4 * bar));
    assert_eq!(
        bars,
        [0x0000_000c, 0xffff_fffc, 0xffff_c000, 0xffff_ffe1, 0, 0]
    );
    assert_eq!(config.dword(PCI_ROM_ADDRESS), 0xffff_f801);
}

#[test]
fn address_in_bar_keeps_its_flags() {
    let mut config = full();

    write_dword(&mut config, PCI_BASE_ADDRESS_0 + 8, 0xfebc_1234);
    write_dword(&mut config, PCI_BASE_ADDRESS_0 + 12, 0x0000_c0a7);

    assert_eq!(config.dword(PCI_BASE_ADDRESS_0 + 8), 0xfebc_0000);
    assert_eq!(config.dword(PCI_BASE_ADDRESS_0 + 12), 0x0000_c0a1);
}

#[test]
fn capabilities_are_chained_in_order() {
    let config = full();
    let mut found = Vec::new();

    let mut at = config.word(PCI_CAPABILITY_LIST) & 0xff;
    while at != 0 {
        let [id, next] = config.word(at).to_le_bytes();
        found.push((at, id));
        at = next.into();
    }

    let ids = [
        PCI_CAP_ID_PM,
        PCI_CAP_ID_EXP,
        PCI_CAP_ID_MSI,
        PCI_CAP_ID_MSIX,
        PCI_CAP_ID_VNDR,
    ];
    let places = [PM, EXPRESS, MSI, MSIX, VENDOR];
    assert_eq!(found, places.into_iter().zip(ids).collect::<Vec<_>>());
}

#[test]
fn extended_capabilities_are_chained_in_order() {
    let config = full();

    let serial = config.dword(0x100);
    assert_eq!(serial & 0xf_ffff, 0x1_0003);
    assert_eq!(
        (config.dword(0x104), config.dword(0x108)),
        (0x5566_7788, 0x1122_3344)
    );
    let at = u16::try_from(serial >> 20).unwrap();
    assert_eq!(config.dword(at), 0x0001_000b);
    assert_eq!(config.dword(at + 4), 14 << 20 | 3 << 16 | 0xbeef);
    assert_eq!(config.dword(at + 8), 0x0909_0909);
}

#[test]
fn express_device_without_extended_capabilities_has_an_empty_chain() {
    let model = builder().express(Express::endpoint()).build().unwrap();

    assert_eq!(model.config_space().dword(0x100), 0);
}

#[test]
fn vendor_capability_has_its_length_and_write_mask() {
    let mut config = full();

    write_dword(&mut config, VENDOR + 3, !0);

    let mut bytes = [0; 6];
    config.read(VENDOR.into(), &mut bytes);
    assert_eq!(bytes, [PCI_CAP_ID_VNDR, 0, 6, 1, 0xf2, 3]);
}

#[test]
fn reset_bit_written_initiates_reset_and_reads_zero() {
    let mut config = full();

    let effects = write_word(
        &mut config,
        EXPRESS + PCI_EXP_DEVCTL,
        PCI_EXP_DEVCTL_BCR_FLR,
    );

    assert!(effects.function_level_reset);
    assert_eq!(
        config.word(EXPRESS + PCI_EXP_DEVCTL) & PCI_EXP_DEVCTL_BCR_FLR,
        0
    );
}

#[test]
fn reset_bit_is_found_in_any_width() {
    for (offset, data) in [
        (9, &[0x80][..]),
        (8, &[0, 0x80, 0, 0]),
        (6, &[0, 0, 0, 0x80]),
    ] {
        let effects = full().write(usize::from(EXPRESS) + offset, data);

        assert!(effects.function_level_reset, "{offset}");
    }
    assert!(
        !full()
            .write(usize::from(EXPRESS) + 8, &[0x80])
            .function_level_reset
    );
    assert!(
        !full()
            .write(usize::from(EXPRESS) + 10, &[0x80, 0x80])
            .function_level_reset
    );
}

#[test]
fn reset_bit_does_nothing_where_reset_is_not_offered() {
    let model = builder()
        .express(Express::endpoint().without_flr())
        .build()
        .unwrap();
    let mut config = model.config_space();

    let effects = write_word(&mut config, 0x40 + PCI_EXP_DEVCTL, PCI_EXP_DEVCTL_BCR_FLR);

    assert_eq!(effects, Effects::default());
}

#[test]
fn way_back_from_d3hot_resets() {
    let mut config = full();

    assert_eq!(
        write_word(&mut config, PM + PCI_PM_CTRL, 3),
        Effects::default()
    );
    assert!(!config.is_powered());

    assert!(write_word(&mut config, PM + PCI_PM_CTRL, 0).power_up_reset);
    assert!(config.is_powered());
}

#[test]
fn way_back_from_d3hot_keeps_state_where_promised() {
    let model = builder()
        .power_management(PowerManagement::new())
        .build()
        .unwrap();
    let mut config = model.config_space();
    write_word(&mut config, PM + PCI_PM_CTRL, 3);

    let effects = write_word(&mut config, PM + PCI_PM_CTRL, 0);

    assert_eq!(effects, Effects::default());
    assert_eq!(config.word(PM + PCI_PM_CTRL), PCI_PM_CTRL_NO_SOFT_RESET);
}

#[test]
fn state_not_supported_is_discarded() {
    for before in [0, 3] {
        for state in [1, 2] {
            let mut config = full();
            write_word(&mut config, PM + PCI_PM_CTRL, before);

            write_word(&mut config, PM + PCI_PM_CTRL, state);

            assert_eq!(config.word(PM + PCI_PM_CTRL), before);
        }
    }
}

#[test]
fn status_written_back_clears_nothing_that_is_fixed() {
    let mut config = full();
    config.set_word(
        PCI_STATUS,
        config.word(PCI_STATUS) | PCI_STATUS_REC_MASTER_ABORT,
    );

    write_word(&mut config, PCI_STATUS, !PCI_STATUS_REC_MASTER_ABORT);
    assert_eq!(
        config.word(PCI_STATUS),
        PCI_STATUS_CAP_LIST | PCI_STATUS_REC_MASTER_ABORT
    );

    write_word(&mut config, PCI_STATUS, !0);
    assert_eq!(config.word(PCI_STATUS), PCI_STATUS_CAP_LIST);
}

#[test]
fn command_enables_what_the_device_decodes() {
    let mut config = PciBuilder::new(1, 2)
        .bar(0, Bar::io(4))
        .build()
        .unwrap()
        .config_space();

    write_word(&mut config, PCI_COMMAND, !0);

    let expected = PCI_COMMAND_IO
        | PCI_COMMAND_MASTER
        | PCI_COMMAND_PARITY
        | PCI_COMMAND_SERR
        | PCI_COMMAND_INTX_DISABLE;
    assert_eq!(config.word(PCI_COMMAND), expected);
}

#[test]
fn more_msi_vectors_than_offered_are_not_granted() {
    let mut config = full();

    write_word(&mut config, MSI + PCI_MSI_FLAGS, 5 << 4);
    assert_eq!(config.msi_granted(), 8);

    write_word(&mut config, MSI + PCI_MSI_FLAGS, 1 << 4);
    assert_eq!(config.msi_granted(), 2);
}

#[test]
fn msi_masks_exist_for_the_vectors_there_are() {
    let mut config = full();

    write_dword(&mut config, MSI + PCI_MSI_MASK_64, !0);
    write_dword(&mut config, MSI + PCI_MSI_PENDING_64, !0);

    assert_eq!(config.dword(MSI + PCI_MSI_MASK_64), 0xff);
    assert_eq!(config.dword(MSI + PCI_MSI_PENDING_64), 0);
}

#[test]
fn reset_returns_to_power_on() {
    let mut config = full();
    for at in 0..4096 {
        config.write(at, &[0xa5]);
    }
    assert_ne!(config, full());

    config.reset();

    assert_eq!(config, full());
}

#[test]
fn beyond_the_end_reads_ones_and_writes_nothing() {
    let mut config = full();
    let mut data = [0; 4];

    config.write(4094, &[0xff; 8]);
    config.write(usize::MAX, &[0xff; 8]);
    config.read(4094, &mut data);

    assert_eq!(data, [0, 0, 0xff, 0xff]);
    assert_eq!(config, full());
}

/// The bits of the device above that can be written, by hand from the specification:
/// offset, and mask of a dword.
const WRITABLE: &[(u16, u32)] = &[
    (0x04, 0x0000_0547),
    (0x0c, 0x0000_00ff),
    (0x10, 0x0000_0000),
    (0x14, 0xffff_fffc),
    (0x18, 0xffff_c000),
    (0x1c, 0xffff_ffe0),
    (0x30, 0xffff_f801),
    (0x3c, 0x0000_00ff),
    // Power state (not plain bits: D1 and D2 are discarded)
    (0x44, 0x0000_0003),
    // Device Control, Link Control, Device Control 2, Link Control 2
    (0x50, 0x0000_78ff),
    (0x58, 0x0000_00cb),
    (0x70, 0x0000_0010),
    (0x78, 0x0000_000f),
    // MSI: control (bits 4 to 6 are limited to 3), address, data, masks
    (0x84, 0x0071_0000),
    (0x88, 0xffff_fffc),
    (0x8c, 0xffff_ffff),
    (0x90, 0x0000_ffff),
    (0x94, 0x0000_00ff),
    // MSI-X control
    (0x9c, 0xc000_0000),
    // Vendor
    (0xac, 0x0000_00f0),
];

/// Bytes whose bits depend on one another.
const SPECIAL: &[usize] = &[0x44, 0x86];

fn writable_bits() -> Vec<u8> {
    let mut bits = vec![0; 4096];
    for (offset, mask) in WRITABLE {
        let at = usize::from(*offset);
        bits[at..at + 4].copy_from_slice(&mask.to_le_bytes());
    }
    bits
}

#[test]
fn bits_that_can_be_written_are_those_of_the_specification() {
    let writable = writable_bits();
    for at in (0..4096).filter(|at| !SPECIAL.contains(at)) {
        let (mut zeroes, mut ones) = (full(), full());
        zeroes.write(at, &[0]);
        ones.write(at, &[0xff]);

        let changed = zeroes.bytes[at] ^ ones.bytes[at];
        assert_eq!(changed, writable[at], "offset {at:#x}");
    }
}

fn write_anything() -> impl Strategy<Value = (usize, Vec<u8>)> {
    let offset = prop_oneof![4 => 0_usize..0x140, 1 => 0_usize..5000];
    (offset, prop::collection::vec(any::<u8>(), 0..24))
}

proptest! {
    /// The simple model: a byte changes in its writable bits, one byte at a time.
    #[test]
    fn any_writes_do_what_a_simple_model_does(
        writes in prop::collection::vec(write_anything(), 1..40),
    ) {
        let writable = writable_bits();
        let mut config = full();
        let mut model = full().bytes;
        for (offset, data) in &writes {
            config.write(*offset, data);
            for (at, value) in (*offset..).zip(data).take_while(|(at, _)| *at < 4096) {
                model[at] = (model[at] & !writable[at]) | (value & writable[at]);
            }
        }
        for at in (0..model.len()).filter(|at| !SPECIAL.contains(at)) {
            prop_assert_eq!(config.bytes[at], model[at], "offset {:#x}", at);
        }
        let state = config.word(PM + PCI_PM_CTRL) & PCI_PM_CTRL_STATE_MASK;
        prop_assert!(state == 0 || state == 3);
        prop_assert!(config.msi_granted() <= 8);
    }

    #[test]
    fn wide_read_is_its_bytes(
        writes in prop::collection::vec(write_anything(), 0..10),
        offset in 0_usize..4200,
        len in 0_usize..64,
    ) {
        let mut config = full();
        for (offset, data) in &writes {
            config.write(*offset, data);
        }
        let mut wide = vec![0; len];
        config.read(offset, &mut wide);
        for (at, value) in (offset..).zip(wide) {
            let mut byte = [0];
            config.read(at, &mut byte);
            prop_assert_eq!(byte[0], value);
        }
    }

    #[test]
    fn write_of_what_was_read_changes_nothing(
        writes in prop::collection::vec(write_anything(), 0..10),
        offset in 0_usize..4200,
        len in 0_usize..64,
    ) {
        let mut config = full();
        for (offset, data) in &writes {
            config.write(*offset, data);
        }
        let before = config.clone();
        let mut data = vec![0; len];
        config.read(offset, &mut data);
        let effects = config.write(offset, &data);
        prop_assert_eq!(effects, Effects::default());
        prop_assert_eq!(config, before);
    }
}
