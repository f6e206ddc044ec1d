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

use libmuser::{
    Access, Bar, Bus, Device, Interrupts, Msi, PciBuilder, PciModel, Pin, Reset, Result, Width,
};

const OUT_0_7: u64 = 0;
const IN_0_7: u64 = 1;
const CLEAR_INTERRUPT: u64 = 1;
const ENABLE_IRQ: u64 = 2; // A read does; a write disables.
const DEACTIVATE_INPUT_FILTERS: u64 = 3;
const OUT_8_15: u64 = 4;
const IN_8_15: u64 = 5;
const INTERRUPT_STATUS: u64 = 6;
const STATUS_CHANGED: u64 = 1 << 2; // IDIO_16_REGMAP_IRQ in gpio-pci-idio-16.c
const READS_TO_TOGGLE: u64 = 3;

/// Describes the card, with the ids that the driver `gpio-pci-idio-16` binds to.
pub fn model() -> Result<PciModel> {
    PciBuilder::new(0x494f, 0x0dc8)
        .class(0x11, 0x80, 0x00) // PCI_CLASS_SP_OTHER: data acquisition
        .interrupt_pin(Pin::A)
        .bar(2, Bar::io(8).registers(Width::Byte))
        .msi(Msi::new(1))
        .build()
}

/// The card.
#[derive(Debug)]
pub struct Gpio {
    registers: Registers,
    interrupts: Interrupts,
}

/// What a reset returns to zero.
#[derive(Debug, Default)]
struct Registers {
    outputs: [u64; 2],
    input_reads: [u64; 2],
    irq_enabled: bool,
    status: u64,
}

impl Gpio {
    /// A card just powered on.
    pub fn new(bus: &Bus) -> Self {
        let (registers, interrupts) = (Registers::default(), bus.interrupts());
        Self {
            registers,
            interrupts,
        }
    }

    /// The inputs of one group: all low for three reads, all high for three, and so on.
    fn read_inputs(&mut self, group: usize) -> Result<u64> {
        let registers = &mut self.registers;
        let before = registers.input_reads[group];
        registers.input_reads[group] += 1;
        if registers.input_reads[group] % READS_TO_TOGGLE == 0 && registers.irq_enabled {
            registers.status = STATUS_CHANGED;
            self.interrupts.raise(0)?;
        }
        Ok(before / READS_TO_TOGGLE % 2 * 0xff)
    }

    fn clear_interrupt(&mut self) -> Result<()> {
        self.registers.status = 0;
        self.interrupts.lower(0)
    }
}

impl Device for Gpio {
    fn read(&mut self, access: Access) -> Result<u64> {
        match access.offset {
            OUT_0_7 => Ok(self.registers.outputs[0]),
            OUT_8_15 => Ok(self.registers.outputs[1]),
            IN_0_7 => self.read_inputs(0),
            IN_8_15 => self.read_inputs(1),
            ENABLE_IRQ => {
                self.registers.irq_enabled = true;
                Ok(0)
            }
            INTERRUPT_STATUS => Ok(self.registers.status),
            _ => access.unhandled_read(),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        match access.offset {
            OUT_0_7 => self.registers.outputs[0] = value,
            OUT_8_15 => self.registers.outputs[1] = value,
            CLEAR_INTERRUPT => self.clear_interrupt()?,
            ENABLE_IRQ => {
                self.registers.irq_enabled = false;
                self.clear_interrupt()?;
            }
            DEACTIVATE_INPUT_FILTERS => {} // Inputs that are not wired do not bounce.
            _ => access.unhandled_write(value)?,
        }
        Ok(())
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.registers = Registers::default();
        Ok(())
    }
}
