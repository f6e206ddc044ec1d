// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which interrupt leaves a function, and when.

use proptest::prelude::*;

use super::*;
use crate::pci::regs::*;
use crate::{Bar, Msi, Msix, PciBuilder, Pin, PowerManagement};

const PM: usize = 0x40;
const MSI: usize = 0x48;
const MSIX: usize = 0x60;
const NONE: Eventfds = Eventfds { msi: 0, msix: 0 };

/// A function with power management, 4 maskable MSI vectors and 8 of MSI-X.
fn function() -> Function {
    let model = PciBuilder::new(1, 2)
        .interrupt_pin(Pin::A)
        .bar(0, Bar::memory32(0x1000))
        .power_management(PowerManagement::new())
        .msi(Msi::new(4).maskable())
        .msix(Msix::new(8))
        .build();
    model.unwrap().function()
}

fn signals(function: &mut Function) -> Vec<Signal> {
    function.take_signals().collect()
}

fn set_word(function: &mut Function, offset: usize, value: u16) {
    function.write_config(offset, &value.to_le_bytes());
}

fn enable_msi(function: &mut Function, log2_vectors: u16) {
    let control = PCI_MSI_FLAGS_ENABLE | log2_vectors << 4;
    set_word(function, MSI + usize::from(PCI_MSI_FLAGS), control);
}

fn set_msix(function: &mut Function, control: u16) {
    set_word(function, MSIX + usize::from(PCI_MSIX_FLAGS), control);
}

fn mask_entry(function: &mut Function, vector: usize, masked: bool) {
    function.write_msix_table(16 * vector + 12, &[masked.into(), 0, 0, 0]);
}

fn mask_msi(function: &mut Function, mask: u8) {
    function.write_config(MSI + usize::from(PCI_MSI_MASK_64), &[mask]);
}

fn pba(function: &Function) -> u8 {
    let mut bits = [0];
    function.read_msix_pba(0, &mut bits);
    bits[0]
}

fn status(function: &Function) -> bool {
    function.config().word(PCI_STATUS) & PCI_STATUS_INTERRUPT != 0
}

#[test]
fn line_follows_the_first_raise_and_the_last_lower() {
    let mut function = function();

    function.raise(0, NONE);
    function.raise(3, NONE);
    assert_eq!(signals(&mut function), [Signal::Line(true)]);
    assert!(status(&function));

    function.lower(0);
    assert_eq!(signals(&mut function), []);

    function.lower(3);
    assert_eq!(signals(&mut function), [Signal::Line(false)]);
    assert!(!status(&function));
}

#[test]
fn interrupt_disable_lowers_the_line_and_keeps_the_status() {
    let mut function = function();
    function.raise(0, NONE);

    set_word(&mut function, PCI_COMMAND.into(), PCI_COMMAND_INTX_DISABLE);
    assert_eq!(
        signals(&mut function),
        [Signal::Line(true), Signal::Line(false)]
    );
    assert!(status(&function));

    set_word(&mut function, PCI_COMMAND.into(), 0);
    assert_eq!(signals(&mut function), [Signal::Line(true)]);
}

#[test]
fn line_goes_down_while_msi_is_enabled() {
    let mut function = function();
    function.raise(0, NONE);

    enable_msi(&mut function, 0);
    assert_eq!(
        signals(&mut function),
        [Signal::Line(true), Signal::Line(false)]
    );
    assert!(!status(&function));

    set_word(&mut function, MSI + 2, 0);
    assert_eq!(signals(&mut function), [Signal::Line(true)]);
}

#[test]
fn function_without_pin_never_drives_a_line() {
    let mut function = PciBuilder::new(1, 2)
        .msi(Msi::new(1))
        .build()
        .unwrap()
        .function();

    function.raise(0, NONE);

    assert_eq!(signals(&mut function), []);
    assert!(!status(&function));
}

#[test]
fn msix_comes_before_msi() {
    let mut function = function();
    enable_msi(&mut function, 2);
    set_msix(&mut function, PCI_MSIX_FLAGS_ENABLE);

    function.raise(2, NONE);

    assert_eq!(signals(&mut function), [Signal::Msix(2)]);
}

#[test]
fn eventfds_alone_enable_messages() {
    let mut function = function();

    function.raise(2, Eventfds { msi: 4, msix: 0 });
    function.raise(2, Eventfds { msi: 0, msix: 1 });

    assert_eq!(
        signals(&mut function),
        [Signal::Line(true), Signal::Msi(2), Signal::Msix(2)]
    );
}

#[test]
fn msi_vectors_beyond_those_granted_share_a_message() {
    let mut function = function();
    enable_msi(&mut function, 1);

    for vector in 0..4 {
        function.raise(vector, NONE);
    }

    let messages = [0, 1, 0, 1].map(Signal::Msi);
    assert_eq!(signals(&mut function), messages);
}

#[test]
fn msix_vectors_beyond_the_table_share_a_message() {
    let builder = PciBuilder::new(1, 2).bar(0, Bar::memory32(0x1000));
    let model = builder.msi(Msi::new(8)).msix(Msix::new(2)).build();
    let mut function = model.unwrap().function();

    function.raise(5, Eventfds { msi: 0, msix: 2 });

    assert_eq!(signals(&mut function), [Signal::Msix(1)]);
}

#[test]
fn masked_msi_vector_is_pending_until_unmasked() {
    let mut function = function();
    enable_msi(&mut function, 2);
    mask_msi(&mut function, 0b0010);

    function.raise(1, NONE);
    function.raise(2, NONE);
    assert_eq!(signals(&mut function), [Signal::Msi(2)]);
    let pending = PCI_MSI_PENDING_64 + u16::try_from(MSI).unwrap();
    assert_eq!(function.config().dword(pending), 0b0010);

    mask_msi(&mut function, 0);
    assert_eq!(signals(&mut function), [Signal::Msi(1)]);
    assert_eq!(function.config().dword(pending), 0);
}

#[test]
fn disabled_msi_forgets_what_is_pending() {
    let mut function = function();
    enable_msi(&mut function, 2);
    mask_msi(&mut function, 0b0001);
    function.raise(0, NONE);
    function.lower(0);

    set_word(&mut function, MSI + 2, 0);
    mask_msi(&mut function, 0);

    assert_eq!(signals(&mut function), []);
}

#[test]
fn masked_msix_vector_is_pending_until_unmasked() {
    let mut function = function();
    set_msix(&mut function, PCI_MSIX_FLAGS_ENABLE);
    mask_entry(&mut function, 3, true);

    function.raise(3, NONE);
    function.raise(3, NONE);
    function.raise(4, NONE);
    assert_eq!(signals(&mut function), [Signal::Msix(4)]);
    assert_eq!(pba(&function), 1 << 3);

    mask_entry(&mut function, 3, false);
    assert_eq!(signals(&mut function), [Signal::Msix(3)]);
    assert_eq!(pba(&function), 0);
}

#[test]
fn function_mask_holds_everything_back() {
    let mut function = function();
    set_msix(
        &mut function,
        PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL,
    );
    mask_entry(&mut function, 1, false);
    mask_entry(&mut function, 2, true);

    for vector in 0..3 {
        function.raise(vector, NONE);
    }
    assert_eq!(signals(&mut function), []);
    assert_eq!(pba(&function), 0b111);

    set_msix(&mut function, PCI_MSIX_FLAGS_ENABLE);
    assert_eq!(signals(&mut function), [Signal::Msix(0), Signal::Msix(1)]);
    assert_eq!(pba(&function), 0b100);
}

#[test]
fn disabled_msix_forgets_what_is_pending() {
    let mut function = function();
    set_msix(
        &mut function,
        PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL,
    );
    function.raise(0, NONE);
    function.lower(0);

    set_msix(&mut function, 0);

    assert_eq!(signals(&mut function), []);
    assert_eq!(pba(&function), 0);
}

#[test]
fn nothing_leaves_in_d3hot() {
    let mut function = function();
    set_msix(&mut function, PCI_MSIX_FLAGS_ENABLE);
    set_word(&mut function, PM + usize::from(PCI_PM_CTRL), 3);

    function.raise(0, NONE);
    assert_eq!(signals(&mut function), []);

    set_word(&mut function, PM + usize::from(PCI_PM_CTRL), 0);
    assert_eq!(signals(&mut function), [Signal::Msix(0)]);
}

#[test]
fn line_is_down_in_d3hot() {
    let mut function = function();
    function.raise(0, NONE);

    set_word(&mut function, PM + usize::from(PCI_PM_CTRL), 3);

    assert_eq!(
        signals(&mut function),
        [Signal::Line(true), Signal::Line(false)]
    );
}

#[test]
fn msi_without_masks_is_lost_in_d3hot() {
    let builder = PciBuilder::new(1, 2).power_management(PowerManagement::new());
    let mut function = builder.msi(Msi::new(1)).build().unwrap().function();
    set_word(&mut function, PM + usize::from(PCI_PM_CTRL), 3);

    function.raise(0, Eventfds { msi: 1, msix: 0 });
    set_word(&mut function, PM + usize::from(PCI_PM_CTRL), 0);

    assert_eq!(signals(&mut function), []);
}

#[test]
fn reset_lowers_the_line_and_forgets() {
    let mut function = function();
    function.raise(0, NONE);
    set_msix(
        &mut function,
        PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL,
    );
    function.raise(5, NONE);
    set_msix(&mut function, 0);
    signals(&mut function);

    function.reset();

    assert_eq!(signals(&mut function), [Signal::Line(false)]);
    assert_eq!(pba(&function), 0);
    function.lower(0);
    assert_eq!(signals(&mut function), []);
}

#[derive(Clone, Debug)]
enum Step {
    Raise(u16),
    MaskEntry(usize, bool),
    MaskAll(bool),
    Power(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u16..8).prop_map(Step::Raise),
        3 => (0_usize..8, any::<bool>()).prop_map(|(vector, mask)| Step::MaskEntry(vector, mask)),
        1 => any::<bool>().prop_map(Step::MaskAll),
        1 => any::<bool>().prop_map(Step::Power),
    ]
}

proptest! {
    /// The simple model: a vector is pending if it was raised while held back and not let go since.
    #[test]
    fn msix_delivers_like_a_simple_model(steps in prop::collection::vec(step(), 1..60)) {
        let mut function = function();
        set_msix(&mut function, PCI_MSIX_FLAGS_ENABLE);
        let (mut masked, mut pending) = ([false; 8], [false; 8]);
        let (mut mask_all, mut asleep) = (false, false);
        for step in steps {
            let mut expected = Vec::new();
            match step {
                Step::Raise(vector) => {
                    let index = usize::from(vector);
                    function.raise(vector, NONE);
                    if masked[index] || mask_all || asleep {
                        pending[index] = true;
                    } else {
                        expected.push(Signal::Msix(vector));
                    }
                }
                Step::MaskEntry(vector, mask) => {
                    mask_entry(&mut function, vector, mask);
                    masked[vector] = mask;
                }
                Step::MaskAll(mask) => {
                    let mask_bit = if mask { PCI_MSIX_FLAGS_MASKALL } else { 0 };
                    set_msix(&mut function, PCI_MSIX_FLAGS_ENABLE | mask_bit);
                    mask_all = mask;
                }
                Step::Power(off) => {
                    let state = if off { 3 } else { 0 };
                    set_word(&mut function, PM + usize::from(PCI_PM_CTRL), state);
                    asleep = off;
                }
            }
            if !mask_all && !asleep {
                for vector in 0..8_u16 {
                    let index = usize::from(vector);
                    if !masked[index] && std::mem::take(&mut pending[index]) {
                        expected.push(Signal::Msix(vector));
                    }
                }
            }
            prop_assert_eq!(signals(&mut function), expected);
            let bits = (0..8).filter(|vector| pending[*vector]).map(|vector| 1_u8 << vector);
            prop_assert_eq!(pba(&function), bits.sum::<u8>());
        }
    }
}
