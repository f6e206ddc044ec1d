// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI serial port: a 16550A behind eight I/O ports, as Linux' `8250_pci` knows it by its class.
//!
//! `uart` is the chip, `line` what it is joined to (a pseudo-terminal, a socket, or the program's
//! own input and output), and `mover` the thread that carries bytes between them.
//!
//! # No byte is lost
//!
//! Bytes come in only as far as the receiver's FIFO has room, so whoever sends waits; the transmitter
//! counts as empty only once the line has taken its bytes, so the driver waits. A driver that takes
//! back RTS stops the input. Where nobody is at the line's other end, what is sent goes nowhere, as
//! it does into a cable that ends in the air: a console does not wait for a reader.
//!
//! # Restart
//!
//! All of the chip is [`State`]: who kills this process and starts it again finds registers and
//! FIFOs as they were. An access that reads a byte, or writes one, does so once
//! ([`State::once`]). The line knows no transactions: bytes that it took in the very moment of the
//! kill go out again, so that none is missing.
//!
//! A program that ends by SIGTERM first lets the thread finish what it is at.

use std::sync::{Arc, Mutex, PoisonError};

use libmuser::{
    Access, Bar, Bus, Device, Interrupts, PciBuilder, PciModel, Pin, Region, Reset, Result, State,
    Width,
};
use nix::sys::eventfd::{EfdFlags, EventFd};
use zerocopy::FromBytes;

pub mod line;
mod mover;
mod uart;

use line::Line;
use mover::Mover;
use uart::{Demand, Uart};

/// Describes the port: what `serial_pci_guess_board` of `8250_pci.c` takes for one port, the class
/// and eight I/O ports in BAR 0. The ids are those of QEMU's `pci-serial`, which is the same device
/// (its docs/specs/pci-ids.rst), so that a machine's list of devices has a name for it.
pub fn model() -> Result<PciModel> {
    PciBuilder::new(0x1b36, 0x0002)
        .class(0x07, 0x00, 0x02) // serial controller, compatible with 16550
        .revision(1)
        .interrupt_pin(Pin::A)
        .bar(0, Bar::io(8).registers(Width::Byte))
        .state(Uart::SIZE)
        .build()
}

/// The port.
#[derive(Debug)]
pub struct Serial {
    port: Arc<Port>,
    _mover: Mover,
}

/// What the device and its mover have in common.
#[derive(Debug)]
struct Port {
    state: State,
    interrupts: Interrupts,
    /// Whether the interrupt is raised, as far as the library was told.
    raised: Mutex<Option<bool>>,
    /// Wakes the mover.
    wake: EventFd,
}

impl Serial {
    /// The port, just powered on or as an earlier process left it, with a line.
    pub fn new(bus: &Bus, line: Line) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let port = Port {
            state: bus.state(),
            interrupts: bus.interrupts(),
            raised: Mutex::default(),
            wake: EventFd::from_value_and_flags(0, flags).map_err(std::io::Error::from)?,
        };
        port.state.update(|bytes| {
            with(bytes, |uart| {
                if !uart.is_powered() {
                    uart.reset();
                }
            });
        });
        port.settle()?;
        let port = Arc::new(port);
        let mover = Mover::start(Arc::clone(&port), line)?;
        Ok(Self {
            port,
            _mover: mover,
        })
    }

    /// Does something to the chip, once for an access, and what follows from it.
    fn access(&self, access: &Access, work: impl FnOnce(&mut Uart) -> u8) -> Result<u64> {
        let mut wakes = false;
        let value = self.port.state.once(access, |bytes| {
            with(bytes, |uart| {
                let before = uart.demand();
                let value = work(uart);
                wakes = needs_mover(&before, &uart.demand());
                value.into()
            })
        })?;
        // What a replay left undone is not known.
        if wakes || access.replay {
            self.port.wake();
        }
        self.port.settle()?;
        Ok(value)
    }
}

impl Device for Serial {
    fn read(&mut self, access: Access) -> Result<u64> {
        let register = access.offset;
        if access.region != Region::Bar(0) {
            return access.unhandled_read();
        }
        // A driver reads registers all the time: what changes nothing needs no record.
        let plain = self.port.state.read(|bytes| {
            let mut uart = Uart::read_from_bytes(bytes).ok()?;
            (!uart.read_changes(register)).then(|| uart.read(register))
        });
        match plain {
            Some(value) => Ok(value.into()),
            None => self.access(&access, |uart| uart.read(register)),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        let [byte, ..] = value.to_le_bytes();
        if access.region != Region::Bar(0) {
            return access.unhandled_write(value);
        }
        self.access(&access, |uart| {
            uart.write(access.offset, byte);
            0
        })?;
        Ok(())
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.port
            .state
            .update(|bytes| with(bytes, |uart| uart.reset()));
        self.port.wake();
        self.port.settle()
    }
}

/// Whether a change of the chip is one for which the mover must not go on waiting.
fn needs_mover(before: &Demand, after: &Demand) -> bool {
    before.room == 0 && after.room > 0
        || before.waiting == 0 && after.waiting > 0
        || before.timing.is_none() && after.timing.is_some()
}

impl Port {
    fn look<R>(&self, look: impl FnOnce(&Uart) -> R) -> Option<R> {
        self.state
            .read(|bytes| Uart::ref_from_bytes(bytes).ok().map(look))
    }

    /// Changes the chip for the mover.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the server has ended, and nothing was done.
    fn change<R>(&self, work: impl FnOnce(&mut Uart) -> R) -> Result<R> {
        let whole = 0..Uart::SIZE;
        self.state
            .update_parts([whole], |[bytes]| with(bytes, work))
    }

    /// Brings the interrupt to where the chip has it.
    fn settle(&self) -> Result<()> {
        // Under the lock, so that of two threads the one with the later chip is the later.
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.look(|uart| uart.demand().interrupt);
        if wanted == *raised {
            return Ok(());
        }
        match wanted {
            Some(true) => self.interrupts.raise(0)?,
            _ => self.interrupts.lower(0)?,
        }
        *raised = wanted;
        Ok(())
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.wake.write(1);
    }
}

/// The chip in the state's bytes, which are as many.
fn with<R>(bytes: &mut [u8], work: impl FnOnce(&mut Uart) -> R) -> R {
    match Uart::mut_from_bytes(bytes) {
        Ok(uart) => work(uart),
        // INVARIANT of the model: this many bytes were asked for.
        Err(_) => unreachable!("the state has the size of the chip"),
    }
}
