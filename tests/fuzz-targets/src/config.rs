// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI configuration space: any device, and accesses of any width, alignment and order.
//!
//! Each input declares a device and accesses it. What it then has must be, byte by byte and after
//! every access, what a second implementation from the specifications has, which has no masks to
//! share with the first.

use libmuser::{
    Bar, Express, Msi, Msix, PciBuilder, PowerManagement, VendorCapability, VendorExtended,
};

use crate::Input;

mod model;

use model::Model;

/// What a device is declared with; the builder and the model are both made from it.
#[derive(Clone, Debug, Default)]
struct Declared {
    ids: [u16; 4],
    class: [u8; 3],
    revision: u8,
    pin: bool,
    bars: Vec<(u8, DeclaredBar)>,
    rom: Option<u8>,
    caps: Vec<Cap>,
    extended: Vec<Ext>,
}

/// The kind of a BAR, and its size as a power of two.
#[derive(Clone, Copy, Debug)]
enum DeclaredBar {
    Memory32 { log2: u8, prefetchable: bool },
    Memory64 { log2: u8, prefetchable: bool },
    Io { log2: u8 },
}

#[derive(Clone, Debug)]
enum Cap {
    Power {
        soft_reset: bool,
    },
    Express {
        flr: bool,
    },
    Msi {
        log2: u8,
        maskable: bool,
    },
    /// In the memory BAR of this number, with so many vectors.
    Msix {
        bar: u8,
        vectors: u16,
    },
    Vendor {
        data: Vec<u8>,
        writable: Vec<u8>,
    },
}

#[derive(Clone, Debug)]
enum Ext {
    Serial(u64),
    Vendor {
        id: u16,
        revision: u8,
        data: Vec<u8>,
    },
}

impl Declared {
    fn take(input: &mut Input<'_>) -> Self {
        let mut declared = Self {
            ids: [(); 4].map(|()| input.u16()),
            class: input.array(),
            revision: input.u8(),
            pin: input.flag(),
            ..Self::default()
        };
        declared.take_bars(input);
        declared.rom = input.flag().then(|| input.below(20));
        for _ in 0..input.below(8) {
            declared.take_capability(input);
        }
        let express = declared
            .caps
            .iter()
            .any(|cap| matches!(cap, Cap::Express { .. }));
        for _ in 0..if express { input.below(4) } else { 0 } {
            declared.take_extended(input);
        }
        declared
    }

    fn take_bars(&mut self, input: &mut Input<'_>) {
        let mut number = 0;
        while number < 6 {
            let prefetchable = input.flag();
            match input.below(4) {
                1 => {
                    let log2 = 4 + input.below(28);
                    let bar = DeclaredBar::Memory32 { log2, prefetchable };
                    self.bars.push((number, bar));
                }
                2 if number < 5 => {
                    let log2 = 4 + input.below(36);
                    let bar = DeclaredBar::Memory64 { log2, prefetchable };
                    self.bars.push((number, bar));
                    number += 1;
                }
                3 => {
                    let log2 = 2 + input.below(7);
                    self.bars.push((number, DeclaredBar::Io { log2 }));
                }
                _ => {}
            }
            number += 1;
        }
    }

    fn take_capability(&mut self, input: &mut Input<'_>) {
        let cap = match input.below(5) {
            0 => Cap::Power {
                soft_reset: input.flag(),
            },
            1 => Cap::Express { flr: input.flag() },
            2 => Cap::Msi {
                log2: input.below(6),
                maskable: input.flag(),
            },
            3 => {
                let vectors = 1 + input.u16() % 2048;
                let Some(bar) = self.bar_for_msix() else {
                    return;
                };
                Cap::Msix { bar, vectors }
            }
            _ => {
                let len = usize::from(input.below(80));
                let data = input.bytes(len).to_vec();
                let masked = usize::from(input.u8()).min(data.len());
                let writable = input.bytes(masked).to_vec();
                Cap::Vendor { data, writable }
            }
        };
        let same = |other: &Cap| std::mem::discriminant(other) == std::mem::discriminant(&cap);
        // There is one of each, but of the vendor's.
        if matches!(cap, Cap::Vendor { .. }) || !self.caps.iter().any(same) {
            self.caps.push(cap);
        }
    }

    /// A memory BAR with room for the largest table, and for the pending bits behind it.
    fn bar_for_msix(&self) -> Option<u8> {
        let fits = |bar: &DeclaredBar| match bar {
            DeclaredBar::Memory32 { log2, .. } | DeclaredBar::Memory64 { log2, .. } => *log2 >= 16,
            DeclaredBar::Io { .. } => false,
        };
        let found = self.bars.iter().find(|(_, bar)| fits(bar));
        found.map(|(number, _)| *number)
    }

    fn take_extended(&mut self, input: &mut Input<'_>) {
        let ext = if input.flag() {
            Ext::Serial(input.u64())
        } else {
            let (id, revision) = (input.u16(), input.below(16));
            let len = usize::from(input.u16() % 1500);
            let data = input.bytes(len).to_vec();
            Ext::Vendor { id, revision, data }
        };
        let serial = |ext: &Ext| matches!(ext, Ext::Serial(_));
        if !serial(&ext) || !self.extended.iter().any(serial) {
            self.extended.push(ext);
        }
    }

    fn builder(&self) -> PciBuilder {
        let [vendor, device, subsystem_vendor, subsystem] = self.ids;
        let [base, subclass, interface] = self.class;
        let mut builder = PciBuilder::new(vendor, device)
            .subsystem(subsystem_vendor, subsystem)
            .class(base, subclass, interface)
            .revision(self.revision);
        if self.pin {
            builder = builder.interrupt_pin(libmuser::Pin::C);
        }
        for (number, bar) in &self.bars {
            let (bar, prefetchable) = match *bar {
                DeclaredBar::Memory32 { log2, prefetchable } => {
                    (Bar::memory32(1 << log2), prefetchable)
                }
                DeclaredBar::Memory64 { log2, prefetchable } => {
                    (Bar::memory64(1 << log2), prefetchable)
                }
                DeclaredBar::Io { log2 } => (Bar::io(1 << log2), false),
            };
            let bar = if prefetchable {
                bar.prefetchable()
            } else {
                bar
            };
            builder = builder.bar(*number, bar);
        }
        if let Some(log2) = self.rom {
            builder = builder.rom(vec![0x55; 1 << log2]);
        }
        let builder = self.caps.iter().fold(builder, Cap::declare);
        self.extended.iter().fold(builder, Ext::declare)
    }
}

impl Cap {
    fn declare(builder: PciBuilder, cap: &Self) -> PciBuilder {
        match cap {
            Self::Power { soft_reset: true } => {
                builder.power_management(PowerManagement::new().soft_reset())
            }
            Self::Power { soft_reset: false } => builder.power_management(PowerManagement::new()),
            Self::Express { flr: true } => builder.express(Express::endpoint()),
            Self::Express { flr: false } => builder.express(Express::endpoint().without_flr()),
            Self::Msi { log2, maskable } => {
                let msi = Msi::new(1 << log2);
                builder.msi(if *maskable { msi.maskable() } else { msi })
            }
            Self::Msix { bar, vectors } => {
                builder.msix(Msix::new(*vectors).table(*bar, 0).pba(*bar, model::PBA))
            }
            Self::Vendor { data, writable } => builder
                .vendor_capability(VendorCapability::new(data.clone()).writable(writable.clone())),
        }
    }
}

impl Ext {
    fn declare(builder: PciBuilder, ext: &Self) -> PciBuilder {
        match ext {
            Self::Serial(serial) => builder.serial_number(*serial),
            Self::Vendor { id, revision, data } => {
                builder.vendor_extended(VendorExtended::new(*id, *revision, data.clone()))
            }
        }
    }
}

/// Declares a device and accesses it.
///
/// # Panics
///
/// It does not do what the model does.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let declared = Declared::take(&mut input);
    let built = declared.builder().build();
    let Some(mut model) = Model::new(&declared) else {
        assert!(built.is_err(), "there is no room for {declared:?}");
        return;
    };
    let mut config = built.expect("there is room").config_space();
    compare(&config, &model);
    check_chain(&config, &declared);
    while !input.is_empty() {
        match input.below(8) {
            0 => {
                let (offset, len) = (offset(&mut input), usize::from(input.u8()));
                let mut seen = vec![0; len];
                config.read(offset, &mut seen);
                assert_eq!(seen, model.read(offset, len), "{len} bytes at {offset:#x}");
            }
            1 => {
                config.reset();
                model.reset();
            }
            2 => size_bar(&mut config, &mut model, &declared, &mut input),
            _ => {
                let offset = offset(&mut input);
                let len = usize::from(input.below(17));
                let data = input.bytes(len);
                let effects = config.write(offset, data);
                let expected = model.write(offset, data);
                let seen = [
                    effects.function_level_reset,
                    effects.power_up_reset,
                    effects.msix_disabled,
                ];
                assert_eq!(seen, expected, "{data:x?} written at {offset:#x}");
            }
        }
        compare(&config, &model);
    }
}

/// Mostly where something is.
fn offset(input: &mut Input<'_>) -> usize {
    match input.below(16) {
        0 => input.u64().try_into().unwrap_or(usize::MAX),
        1 | 2 => usize::from(input.u16() % 0x1010),
        _ => usize::from(input.u8()),
    }
}

fn compare(config: &libmuser::pci::ConfigSpace, model: &Model) {
    let mut seen = vec![0; config.len()];
    config.read(0, &mut seen);
    let expected = model.read(0, config.len());
    let differs = seen.iter().zip(&expected).position(|(a, b)| a != b);
    if let Some(at) = differs {
        let (seen, expected) = (seen[at], expected[at]);
        panic!("byte {at:#x} is {seen:#x}, not {expected:#x}");
    }
    assert_eq!(config.len(), model.len());
}

/// Walks the capabilities as a driver does, which trusts nothing.
fn check_chain(config: &libmuser::pci::ConfigSpace, declared: &Declared) {
    let byte = |at: u8| {
        let mut byte = [0];
        config.read(at.into(), &mut byte);
        byte[0]
    };
    let mut found = Vec::new();
    let mut at = byte(0x34);
    while at != 0 {
        assert!(at >= 0x40 && at % 4 == 0, "a capability at {at:#x}");
        assert!(found.len() < 48, "the chain has no end");
        found.push(byte(at));
        at = byte(at + 1);
    }
    let ids = declared.caps.iter().map(|cap| match cap {
        Cap::Power { .. } => 0x01,
        Cap::Msi { .. } => 0x05,
        Cap::Vendor { .. } => 0x09,
        Cap::Express { .. } => 0x10,
        Cap::Msix { .. } => 0x11,
    });
    assert_eq!(found, ids.collect::<Vec<_>>());
    assert_eq!(byte(0x06) & 0x10 != 0, !found.is_empty());
}

/// Sizes a BAR as an operating system does, in pieces of 1, 2 or 4 bytes.
fn size_bar(
    config: &mut libmuser::pci::ConfigSpace,
    model: &mut Model,
    declared: &Declared,
    input: &mut Input<'_>,
) {
    let width = 1 << input.below(3);
    let number = input.below(6);
    let at = 0x10 + 4 * usize::from(number);
    let Some((_, bar)) = declared
        .bars
        .iter()
        .find(|(declared, _)| *declared == number)
    else {
        return;
    };
    let (log2, bytes, flags) = match bar {
        DeclaredBar::Memory32 { log2, .. } => (*log2, 4, 0xf),
        DeclaredBar::Memory64 { log2, .. } => (*log2, 8, 0xf),
        DeclaredBar::Io { log2 } => (*log2, 4, 0x3),
    };
    for piece in (at..at + bytes).step_by(width) {
        config.write(piece, &[0xff; 4][..width]);
        model.write(piece, &[0xff; 4][..width]);
    }
    let mut seen = [0xff; 8];
    config.read(at, &mut seen[..bytes]);
    let mask = u64::from_le_bytes(seen) & !flags;
    // Of a 32-bit BAR the upper half was not read, and is ones.
    assert_eq!(mask.wrapping_neg(), 1 << log2, "BAR {number}");
}
