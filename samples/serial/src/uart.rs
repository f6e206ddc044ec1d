// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A 16550A and nothing around it: what its registers do to it, and what the line does.
//!
//! Numbers are those of National Semiconductor's data sheet of the PC16550D, and have the names of
//! `<linux/serial_reg.h>`. The chip is plain bytes, so that it can lie in the device's state as it is.

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of each FIFO.
pub(crate) const FIFO: usize = 16;

// Offsets. The first three are other registers while DLAB is set, or when written.
const RBR_THR_DLL: u64 = 0;
const IER_DLM: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RDI: u8 = 0x01;
const IER_THRI: u8 = 0x02;
const IER_RLSI: u8 = 0x04;
const IER_MSI: u8 = 0x08;

const IIR_MSI: u8 = 0x00;
const IIR_NO_INT: u8 = 0x01;
const IIR_THRI: u8 = 0x02;
const IIR_RDI: u8 = 0x04;
const IIR_RLSI: u8 = 0x06;
const IIR_RX_TIMEOUT: u8 = 0x0c;
const IIR_FIFO_ENABLED: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RCVR: u8 = 0x02;
const FCR_CLEAR_XMIT: u8 = 0x04;

const LCR_DLAB: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
const MCR_ALL: u8 = 0x1f;

const LSR_DR: u8 = 0x01;
const LSR_OE: u8 = 0x02;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;

const MSR_TERI: u8 = 0x04;
const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;

/// The divisor's input clock, over 16 (`base_baud` of `pbn_default` in Linux' `8250_pci.c`).
const BASE_BAUD: u32 = 115_200;

/// The chip. All zeroes are one that has no power yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Uart {
    powered: u8,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    dll: u8,
    dlm: u8,
    /// An overrun that nobody has read of.
    overrun: u8,
    /// The lower half of MSR: what changed since it was read.
    msr_delta: u8,
    /// The line's end: whether somebody is there.
    carrier: u8,
    /// Whether the transmitter has become empty, or was enabled when it was, since somebody heard of it.
    thre_pending: u8,
    /// Whether bytes have lain in the FIFO for too long.
    rx_timeout: u8,
    /// Whether the driver has ever said that it is ready to receive.
    ready_once: u8,
    /// Counts what concerns the time-out.
    activity: u8,
    rx: Fifo,
    tx: Fifo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Fifo {
    len: u8,
    bytes: [u8; FIFO],
}

impl Fifo {
    const EMPTY: Self = Self {
        len: 0,
        bytes: [0; FIFO],
    };

    fn len(&self) -> usize {
        usize::from(self.len).min(FIFO)
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len()]
    }

    /// Whether there was room.
    fn push(&mut self, byte: u8) -> bool {
        let len = self.len();
        let Some(place) = self.bytes.get_mut(len) else {
            return false;
        };
        *place = byte;
        self.len += 1;
        true
    }

    fn drop_first(&mut self, count: usize) {
        let count = count.min(self.len());
        let end = self.len();
        self.bytes.copy_within(count..end, 0);
        self.len = self.len.saturating_sub(small(count));
    }

    fn pop(&mut self) -> Option<u8> {
        let first = self.bytes().first().copied()?;
        self.drop_first(1);
        Some(first)
    }
}

/// What the one who moves the data must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// How many bytes may come in.
    pub(crate) room: usize,
    /// How many are to go out.
    pub(crate) waiting: usize,
    /// Set while bytes wait for the time-out: a number which changes with each byte that comes or
    /// goes.
    pub(crate) timing: Option<u8>,
    /// Whether the interrupt is raised.
    pub(crate) interrupt: bool,
}

impl Uart {
    pub(crate) const SIZE: usize = size_of::<Self>();

    /// As after a master reset, with the line's end as it is.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            powered: 1,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            dll: 1,
            dlm: 0,
            overrun: 0,
            msr_delta: 0,
            carrier: self.carrier,
            thre_pending: 0,
            rx_timeout: 0,
            ready_once: 0,
            activity: 0,
            rx: Fifo::EMPTY,
            tx: Fifo::EMPTY,
        };
    }

    pub(crate) fn is_powered(&self) -> bool {
        self.powered != 0
    }

    /// Whether a read of this register changes something.
    pub(crate) fn read_changes(&self, register: u64) -> bool {
        match register {
            RBR_THR_DLL => !self.dlab(),
            IIR_FCR | LSR | MSR => true,
            _ => false,
        }
    }

    pub(crate) fn read(&mut self, register: u64) -> u8 {
        match register {
            RBR_THR_DLL if self.dlab() => self.dll,
            IER_DLM if self.dlab() => self.dlm,
            RBR_THR_DLL => self.receive(),
            IER_DLM => self.ier,
            IIR_FCR => {
                let source = self.source();
                if source == IIR_THRI {
                    self.thre_pending = 0;
                }
                let fifo = if self.fifo() { IIR_FIFO_ENABLED } else { 0 };
                fifo | source
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => {
                let ready = if self.rx.len() > 0 { LSR_DR } else { 0 };
                let error = if self.overrun != 0 { LSR_OE } else { 0 };
                let empty = match self.tx.len() {
                    0 => LSR_THRE | LSR_TEMT,
                    _ => 0,
                };
                self.overrun = 0;
                ready | error | empty
            }
            MSR => self.msr() | std::mem::take(&mut self.msr_delta),
            SCR => self.scr,
            _ => 0xff,
        }
    }

    pub(crate) fn write(&mut self, register: u64, value: u8) {
        match register {
            RBR_THR_DLL if self.dlab() => self.dll = value,
            IER_DLM if self.dlab() => self.dlm = value,
            RBR_THR_DLL => self.transmit(value),
            IER_DLM => {
                let enabled = value & !self.ier;
                self.ier = value & (IER_RDI | IER_THRI | IER_RLSI | IER_MSI);
                if enabled & IER_THRI != 0 && self.tx.len() == 0 {
                    self.thre_pending = 1;
                }
            }
            IIR_FCR => self.control_fifos(value),
            LCR => self.lcr = value,
            MCR => {
                let before = self.msr();
                self.mcr = value & MCR_ALL;
                if self.is_ready() {
                    self.ready_once = 1;
                }
                self.note_modem(before);
            }
            SCR => self.scr = value,
            _ => {} // LSR and MSR: tests of the factory's.
        }
    }

    pub(crate) fn demand(&self) -> Demand {
        let timing = self.fifo() && self.rx.len() > 0 && self.rx_timeout == 0;
        let capacity = if self.fifo() { FIFO } else { 1 };
        // A driver that takes back RTS has no room left. One that never gave it does not use it.
        let held = self.ready_once != 0 && !self.is_ready();
        let room = if held || self.loops() {
            0
        } else {
            capacity.saturating_sub(self.rx.len())
        };
        Demand {
            room,
            waiting: self.tx.len(),
            timing: (timing && self.rx.len() < self.trigger()).then_some(self.activity),
            interrupt: self.source() != IIR_NO_INT,
        }
    }

    /// Bytes came in, not more than there was room for.
    pub(crate) fn come(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.put(*byte);
        }
    }

    /// What is to go out, in order.
    pub(crate) fn going(&self) -> &[u8] {
        self.tx.bytes()
    }

    /// The first bytes of those have gone.
    pub(crate) fn gone(&mut self, count: usize) {
        let before = self.tx.len();
        self.tx.drop_first(count);
        if before > 0 && self.tx.len() == 0 {
            self.thre_pending = 1;
        }
    }

    /// Nothing has come or gone for the time of four characters, since the demand with this number.
    pub(crate) fn time_out(&mut self, timing: u8) {
        if self.demand().timing == Some(timing) {
            self.rx_timeout = 1;
        }
    }

    /// Somebody is at the other end, or nobody is any more.
    pub(crate) fn set_carrier(&mut self, carrier: bool) {
        let before = self.msr();
        self.carrier = carrier.into();
        self.note_modem(before);
    }

    /// How long four characters take, in nanoseconds: the receiver's time-out.
    pub(crate) fn time_of_four(&self) -> u64 {
        let bits = 1 + 5 + u64::from(self.lcr & 3) + u64::from(self.lcr >> 3 & 1) + 1;
        let divisor = u64::from(u16::from_le_bytes([self.dll, self.dlm]).max(1));
        4 * bits * divisor * 1_000_000_000 / u64::from(BASE_BAUD)
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn fifo(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn loops(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn is_ready(&self) -> bool {
        self.mcr & MCR_RTS != 0 && !self.loops()
    }

    /// How many bytes make an interrupt.
    fn trigger(&self) -> usize {
        match (self.fifo(), self.fcr >> 6) {
            (false, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        }
    }

    /// The interrupt of the highest priority.
    fn source(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(IER_RLSI) && self.overrun != 0 {
            IIR_RLSI
        } else if enabled(IER_RDI) && self.rx.len() >= self.trigger() {
            IIR_RDI
        } else if enabled(IER_RDI) && self.rx_timeout != 0 {
            IIR_RX_TIMEOUT
        } else if enabled(IER_THRI) && self.thre_pending != 0 {
            IIR_THRI
        } else if enabled(IER_MSI) && self.msr_delta != 0 {
            IIR_MSI
        } else {
            IIR_NO_INT
        }
    }

    /// The upper half of MSR. The line's end is always ready to receive; looped back, it is the outputs
    /// that are seen.
    fn msr(&self) -> u8 {
        if !self.loops() {
            let carrier = if self.carrier != 0 { MSR_DCD } else { 0 };
            return MSR_CTS | MSR_DSR | carrier;
        }
        let wires = [
            (MCR_DTR, MSR_DSR),
            (MCR_RTS, MSR_CTS),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ];
        let seen = wires.iter().filter(|(output, _)| self.mcr & output != 0);
        seen.fold(0, |status, (_, input)| status | input)
    }

    fn note_modem(&mut self, before: u8) {
        let after = self.msr();
        // Of RI, only the end counts.
        let changed = (before ^ after) >> 4 & !MSR_TERI;
        let ended = (before & !after & MSR_RI) >> 4;
        self.msr_delta |= changed | ended;
    }

    fn receive(&mut self) -> u8 {
        self.activity = self.activity.wrapping_add(1);
        self.rx_timeout = 0;
        // What an empty receiver has nobody should want to know.
        self.rx.pop().unwrap_or(0)
    }

    fn put(&mut self, byte: u8) {
        self.activity = self.activity.wrapping_add(1);
        self.rx_timeout = 0;
        let room = self.fifo() || self.rx.len() == 0;
        if !room || !self.rx.push(byte) {
            self.overrun = 1;
        }
    }

    fn transmit(&mut self, byte: u8) {
        self.thre_pending = 0;
        if self.loops() {
            self.put(byte);
            self.thre_pending = 1;
        } else if self.fifo() || self.tx.len() == 0 {
            // A byte too many is lost, as the data sheet has it: THRE said that there was no room.
            self.tx.push(byte);
        }
    }

    fn control_fifos(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & FCR_ENABLE != 0;
        // Without the enable bit, the others are not programmed.
        let value = if value & FCR_ENABLE != 0 { value } else { 0 };
        self.fcr = value & !(FCR_CLEAR_RCVR | FCR_CLEAR_XMIT);
        if toggled || value & FCR_CLEAR_RCVR != 0 {
            self.rx = Fifo::EMPTY;
            self.rx_timeout = 0;
            self.activity = self.activity.wrapping_add(1);
        }
        if toggled || value & FCR_CLEAR_XMIT != 0 {
            let waiting = self.tx.len();
            self.gone(waiting);
        }
    }
}

/// A number of bytes of a FIFO.
fn small(count: usize) -> u8 {
    u8::try_from(count).unwrap_or(u8::MAX)
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
