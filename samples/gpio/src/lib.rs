// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ACCES PCI-IDIO-16: a card with 16 digital outputs and 16 digital inputs.
//!
//! BAR 2 has eight byte-wide registers, as Linux' `drivers/gpio/gpio-idio-16.c` expects them.
//! Each group of eight inputs inverts on every third read, and a change raises an interrupt.
//!
//! | offset | read                      | write               |
//! |--------|---------------------------|---------------------|
//! | 0      | outputs 0 to 7            | outputs 0 to 7      |
//! | 1      | inputs 0 to 7             | clears an interrupt |
//! | 2      | enables the interrupt     | disables it         |
//! | 3      | nothing                   | filters off         |
//! | 4      | outputs 8 to 15           | outputs 8 to 15     |
//! | 5      | inputs 8 to 15            | nothing             |
//! | 6      | interrupt status in bit 2 | nothing             |
//!
//! All that the card knows is [`State`], six bytes of it: who kills this process and starts it again
//! finds the outputs as they were, and no read of the inputs counted twice.

use libmuser::{
    Access, Bar, Bus, Device, Interrupts, Msi, PciBuilder, PciModel, Pin, Reset, Result, State,
    Width,
};

const OUT_0_7: u64 = 0;
const IN_0_7: u64 = 1;
const CLEAR_INTERRUPT: u64 = 1;
const ENABLE_IRQ: u64 = 2; // A read does; a write disables.
const DEACTIVATE_INPUT_FILTERS: u64 = 3;
const OUT_8_15: u64 = 4;
const IN_8_15: u64 = 5;
const INTERRUPT_STATUS: u64 = 6;
const STATUS_CHANGED: u8 = 1 << 2; // IDIO_16_REGMAP_IRQ in gpio-pci-idio-16.c
const READS_TO_TOGGLE: u8 = 3;

/// Where in the state what is: of outputs and reads, a byte for each group.
const OUTPUTS: usize = 0;
const READS: usize = 2;
const IRQ_ENABLED: usize = 4;
const STATUS: usize = 5;
const STATE_SIZE: usize = 6;

/// Describes the card, with the ids that the driver `gpio-pci-idio-16` binds to.
pub fn model() -> Result<PciModel> {
    PciBuilder::new(0x494f, 0x0dc8)
        .class(0x11, 0x80, 0x00) // PCI_CLASS_SP_OTHER: data acquisition
        .interrupt_pin(Pin::A)
        .bar(2, Bar::io(8).registers(Width::Byte))
        .msi(Msi::new(1))
        .state(STATE_SIZE)
        .build()
}

/// The card.
#[derive(Debug)]
pub struct Gpio {
    state: State,
    interrupts: Interrupts,
}

impl Gpio {
    /// The card, just powered on or as an earlier process left it: here that is the same.
    pub fn new(bus: &Bus) -> Self {
        Self {
            state: bus.state(),
            interrupts: bus.interrupts(),
        }
    }

    fn kept(&self, which: usize) -> u64 {
        self.state.read(|bytes| bytes[which].into())
    }

    fn keep(&self, which: usize, value: u8) {
        self.state.update(|bytes| bytes[which] = value);
    }

    /// The inputs of one group: all low for three reads, all high for three, and so on.
    fn read_inputs(&self, access: &Access, group: usize) -> Result<u64> {
        let reads = self.state.once(access, |bytes| {
            let reads = bytes[READS + group];
            bytes[READS + group] = (reads + 1) % (2 * READS_TO_TOGGLE);
            if bytes[READS + group] % READS_TO_TOGGLE == 0 && bytes[IRQ_ENABLED] != 0 {
                bytes[STATUS] = STATUS_CHANGED;
            }
            reads.into()
        })?;
        let toggle = u64::from(READS_TO_TOGGLE);
        if (reads + 1) % toggle == 0 && self.kept(STATUS) != 0 {
            self.interrupts.raise(0)?;
        }
        Ok(reads / toggle * 0xff)
    }

    /// Sets one group of outputs, and tells the operator who wants to know (`-v`) what all are now.
    fn drive(&self, group: usize, byte: u8) {
        let outputs = self.state.update(|bytes| {
            bytes[OUTPUTS + group] = byte;
            u16::from_le_bytes([bytes[OUTPUTS], bytes[OUTPUTS + 1]])
        });
        log::debug!("outputs: {outputs:#06x}");
    }

    fn clear_interrupt(&self) -> Result<()> {
        self.keep(STATUS, 0);
        self.interrupts.lower(0)
    }
}

impl Device for Gpio {
    fn read(&mut self, access: Access) -> Result<u64> {
        match access.offset {
            OUT_0_7 => Ok(self.kept(OUTPUTS)),
            OUT_8_15 => Ok(self.kept(OUTPUTS + 1)),
            IN_0_7 => self.read_inputs(&access, 0),
            IN_8_15 => self.read_inputs(&access, 1),
            ENABLE_IRQ => {
                self.keep(IRQ_ENABLED, 1);
                Ok(0)
            }
            INTERRUPT_STATUS => Ok(self.kept(STATUS)),
            _ => access.unhandled_read(),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        let [byte, ..] = value.to_le_bytes();
        match access.offset {
            OUT_0_7 => self.drive(0, byte),
            OUT_8_15 => self.drive(1, byte),
            CLEAR_INTERRUPT => self.clear_interrupt()?,
            ENABLE_IRQ => {
                self.keep(IRQ_ENABLED, 0);
                self.clear_interrupt()?;
            }
            DEACTIVATE_INPUT_FILTERS => {} // Inputs that are not wired do not bounce.
            _ => access.unhandled_write(value)?,
        }
        Ok(())
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.state.update(|bytes| bytes.fill(0));
        Ok(())
    }
}
