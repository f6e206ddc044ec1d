// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chip by the data sheet, without a line.

use super::*;

fn uart() -> Uart {
    let mut uart: Uart = zerocopy::FromZeros::new_zeroed();
    uart.reset();
    uart
}

fn with_fifo(trigger: u8) -> Uart {
    let mut uart = uart();
    uart.write(IIR_FCR, FCR_ENABLE | trigger << 6);
    uart.write(IER_DLM, IER_RDI);
    uart
}

fn iir(uart: &mut Uart) -> u8 {
    uart.read(IIR_FCR) & 0x0f
}

#[test]
fn power_on_is_idle() {
    let mut uart = uart();

    assert_eq!(uart.read(IIR_FCR), IIR_NO_INT);
    assert_eq!(uart.read(LSR), LSR_THRE | LSR_TEMT);
    assert_eq!(uart.read(MSR), MSR_CTS | MSR_DSR);
    assert!(!uart.demand().interrupt);
}

#[test]
fn divisor_hides_data_and_ier() {
    let mut uart = uart();
    uart.write(IER_DLM, 0x05);
    uart.write(LCR, LCR_DLAB | 3);
    uart.write(RBR_THR_DLL, 0x0c);
    uart.write(IER_DLM, 0x01);

    assert_eq!((uart.read(0), uart.read(1)), (0x0c, 0x01));
    uart.write(LCR, 3);

    assert_eq!(uart.read(IER_DLM), 0x05);
    assert_eq!(uart.demand().waiting, 0);
    // 10 bits at 115200 / 0x10c baud, four times.
    assert_eq!(uart.time_of_four(), 40 * 0x10c * 1_000_000_000 / 115_200);
}

#[test]
fn empty_transmitter_interrupts_when_enabled_and_until_heard_of() {
    let mut uart = uart();

    uart.write(IER_DLM, IER_THRI);

    assert!(uart.demand().interrupt);
    assert_eq!(iir(&mut uart), IIR_THRI);
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    // Enabling what is enabled is nothing new.
    uart.write(IER_DLM, IER_THRI);
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    uart.write(IER_DLM, 0);
    uart.write(IER_DLM, IER_THRI);
    assert_eq!(iir(&mut uart), IIR_THRI);
}

#[test]
fn transmitter_interrupts_when_the_last_byte_has_gone() {
    let mut uart = with_fifo(0);
    uart.write(IER_DLM, IER_THRI);
    iir(&mut uart);
    for byte in 0..3 {
        uart.write(RBR_THR_DLL, byte);
    }

    uart.gone(2);
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    assert_eq!(uart.read(LSR) & (LSR_THRE | LSR_TEMT), 0);
    assert_eq!(uart.going(), [2]);
    uart.gone(1);

    assert_eq!(uart.read(LSR), LSR_THRE | LSR_TEMT);
    assert_eq!(iir(&mut uart), IIR_THRI);
}

#[test]
fn write_to_the_transmitter_takes_the_interrupt_back() {
    let mut uart = uart();
    uart.write(IER_DLM, IER_THRI);

    uart.write(RBR_THR_DLL, b'a');

    assert_eq!(iir(&mut uart), IIR_NO_INT);
}

#[test]
fn byte_beyond_the_transmitter_is_lost_alone() {
    for (fifo, capacity) in [(0, 1), (FCR_ENABLE, FIFO)] {
        let mut uart = uart();
        uart.write(IIR_FCR, fifo);

        for byte in 0..20 {
            uart.write(RBR_THR_DLL, byte);
        }

        let expected: Vec<u8> = (0..20).take(capacity).collect();
        assert_eq!(uart.going(), expected);
    }
}

#[test]
fn receiver_interrupts_at_each_trigger_level() {
    for (trigger, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
        let mut uart = with_fifo(trigger);
        for count in 1..=level {
            assert!(!uart.demand().interrupt, "{count} of {level}");
            uart.come(&[small(count)]);
        }

        assert_eq!(iir(&mut uart), IIR_RDI, "{level}");
        assert_eq!(uart.read(RBR_THR_DLL), 1);
        assert_eq!(iir(&mut uart), IIR_NO_INT, "{level}");
    }
}

#[test]
fn bytes_below_the_trigger_time_out_once() {
    let mut uart = with_fifo(3);
    uart.come(b"ab");
    let timing = uart.demand().timing.unwrap();

    uart.time_out(timing.wrapping_sub(1));
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    uart.time_out(timing);

    assert_eq!(iir(&mut uart), IIR_RX_TIMEOUT);
    assert_eq!(uart.demand().timing, None);
    assert_eq!(uart.read(RBR_THR_DLL), b'a');
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    assert!(uart.demand().timing.is_some_and(|next| next != timing));
}

#[test]
fn overrun_is_said_once_and_keeps_what_was_there() {
    let mut uart = with_fifo(0);
    uart.write(IER_DLM, IER_RLSI | IER_RDI);

    uart.come(&[7; FIFO]);
    assert_eq!(iir(&mut uart), IIR_RDI);
    uart.come(&[8]);

    assert_eq!(iir(&mut uart), IIR_RLSI);
    assert_eq!(uart.read(LSR) & LSR_OE, LSR_OE);
    assert_eq!(uart.read(LSR) & LSR_OE, 0);
    for _ in 0..FIFO {
        assert_eq!(uart.read(RBR_THR_DLL), 7);
    }
    assert_eq!(uart.read(LSR) & LSR_DR, 0);
}

#[test]
fn room_is_what_the_receiver_has() {
    let mut uart = uart();
    assert_eq!(uart.demand().room, 1);
    uart.come(b"a");
    assert_eq!(uart.demand().room, 0);

    uart.write(IIR_FCR, FCR_ENABLE);
    assert_eq!(uart.demand().room, FIFO);
    uart.come(b"abc");

    assert_eq!(uart.demand().room, FIFO - 3);
}

#[test]
fn rts_taken_back_leaves_no_room() {
    let mut uart = with_fifo(0);
    uart.write(MCR, MCR_DTR);
    assert_eq!(uart.demand().room, FIFO);
    uart.write(MCR, MCR_DTR | MCR_RTS);
    assert_eq!(uart.demand().room, FIFO);

    uart.write(MCR, MCR_DTR);
    assert_eq!(uart.demand().room, 0);
    uart.write(MCR, MCR_RTS);

    assert_eq!(uart.demand().room, FIFO);
}

#[test]
fn clearing_fifos_is_for_each_alone() {
    let mut uart = with_fifo(0);
    uart.come(b"abc");
    uart.write(RBR_THR_DLL, b'x');

    uart.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RCVR);
    assert_eq!(uart.read(LSR) & LSR_DR, 0);
    assert_eq!(uart.going(), b"x");
    uart.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_XMIT);

    assert_eq!(uart.going(), b"");
    assert_eq!(uart.read(IIR_FCR) & IIR_FIFO_ENABLED, IIR_FIFO_ENABLED);
}

#[test]
fn loop_back_returns_bytes_and_lines() {
    let mut uart = with_fifo(0);
    uart.write(MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);

    assert_eq!(uart.read(MSR) & 0xf0, MSR_CTS | MSR_DCD);
    uart.write(RBR_THR_DLL, 0x5a);

    assert_eq!(uart.going(), b"");
    assert_eq!(uart.demand().room, 0);
    assert_eq!(uart.read(LSR), LSR_DR | LSR_THRE | LSR_TEMT);
    assert_eq!(uart.read(RBR_THR_DLL), 0x5a);
}

#[test]
fn modem_change_interrupts_until_read() {
    let mut uart = uart();
    uart.write(IER_DLM, IER_MSI);

    uart.set_carrier(true);

    assert_eq!(iir(&mut uart), IIR_MSI);
    assert_eq!(uart.read(MSR), MSR_CTS | MSR_DSR | MSR_DCD | 0x08);
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    uart.set_carrier(true);
    assert_eq!(iir(&mut uart), IIR_NO_INT);
    // Of the ring indicator only the end is seen.
    uart.write(MCR, MCR_LOOP | MCR_OUT1);
    uart.read(MSR);
    uart.write(MCR, MCR_LOOP);
    assert_eq!(uart.read(MSR) & 0x0f, MSR_TERI);
}

#[test]
fn any_bytes_are_a_chip_that_answers() {
    for fill in [0xff, 0x80, 0x55] {
        let bytes = [fill; Uart::SIZE];
        let mut uart: Uart = zerocopy::FromBytes::read_from_bytes(&bytes).unwrap();
        for register in 0..8 {
            uart.read(register);
            uart.write(register, fill);
            uart.come(&[1]);
            uart.gone(1);
        }
        assert!(uart.demand().room <= FIFO);
    }
}
