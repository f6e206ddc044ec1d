// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a device's `raise` to a client's eventfd.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::os::fd::AsFd;
use std::sync::Barrier;
use std::thread;

use libmuser::transport::memory::{Client, IrqAction, IrqData};
use libmuser::{Bar, Errno, Express, Msi, Msix, PciBuilder, PciModel, Pin};
use nix::sys::eventfd::{EfdFlags, EventFd};

mod common;
use common::{count, errno, fired, Running, CONFIG, INTX, MSI, MSIX};

const MSIX_CONTROL: u64 = 0x52;
const VECTOR_CONTROL: u64 = 12;

fn model() -> PciModel {
    PciBuilder::new(1, 2)
        .interrupt_pin(Pin::A)
        .bar(0, Bar::memory32(0x1000))
        .msi(Msi::new(4))
        .msix(Msix::new(4))
        .build()
        .unwrap()
}

fn write(client: &Client, region: u32, offset: u64, value: u16) {
    client.write(region, offset, &value.to_le_bytes()).unwrap();
}

#[test]
fn line_fires_once_and_again_when_unmasked_while_up() {
    let (client, running) = Running::start(model());
    let counters = count(&client, INTX, 1);
    let interrupts = running.recorder.bus().interrupts();

    interrupts.raise(0).unwrap();
    interrupts.lower(0).unwrap();
    interrupts.raise(0).unwrap();
    assert_eq!(fired(&counters), [1]);

    client
        .set_irqs(INTX, 0, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired(&counters), [2]);

    interrupts.lower(0).unwrap();
    client
        .set_irqs(INTX, 0, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired(&counters), [2]);

    interrupts.raise(0).unwrap();
    assert_eq!(fired(&counters), [3]);
}

#[test]
fn masked_line_waits() {
    let (client, running) = Running::start(model());
    let counters = count(&client, INTX, 1);
    client
        .set_irqs(INTX, 0, IrqAction::Mask, IrqData::Bools(&[true]))
        .unwrap();

    running.recorder.bus().interrupts().raise(0).unwrap();
    assert_eq!(fired(&counters), [0]);

    client
        .set_irqs(INTX, 0, IrqAction::Unmask, IrqData::Bools(&[true]))
        .unwrap();
    assert_eq!(fired(&counters), [1]);
}

#[test]
fn line_already_up_fires_when_the_client_listens() {
    let (client, running) = Running::start(model());
    running.recorder.bus().interrupts().raise(0).unwrap();

    let counters = count(&client, INTX, 1);

    assert_eq!(fired(&counters), [1]);
}

#[test]
fn message_masked_by_the_client_waits_until_the_index_is_disabled() {
    let (client, running) = Running::start(model());
    let interrupts = running.recorder.bus().interrupts();
    let counters = count(&client, MSIX, 4);
    client
        .set_irqs(MSIX, 1, IrqAction::Mask, IrqData::None(2))
        .unwrap();
    interrupts.raise(1).unwrap();
    interrupts.raise(2).unwrap();
    assert_eq!(fired(&counters), [0; 4]);

    client
        .set_irqs(MSIX, 1, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired(&counters), [0, 1, 0, 0]);

    client
        .set_irqs(MSIX, 0, IrqAction::Trigger, IrqData::None(0))
        .unwrap();
    let counters = count(&client, MSIX, 4);
    client
        .set_irqs(MSIX, 2, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired(&counters), [0; 4]);
}

#[test]
fn messages_go_to_their_vectors() {
    let (client, running) = Running::start(model());
    let counters = count(&client, MSIX, 4);
    let interrupts = running.recorder.bus().interrupts();

    for vector in [0, 3, 3] {
        interrupts.raise(vector).unwrap();
    }

    assert_eq!(fired(&counters), [1, 0, 0, 2]);
}

#[test]
fn msi_with_fewer_eventfds_than_vectors_shares_them() {
    let (client, running) = Running::start(model());
    let counters = count(&client, MSI, 2);

    running.recorder.bus().interrupts().raise(3).unwrap();

    assert_eq!(fired(&counters), [0, 1]);
}

#[test]
fn masked_table_entry_is_pending_in_the_bar() {
    let (client, running) = Running::start(model());
    let counters = count(&client, MSIX, 4);
    write(&client, CONFIG, MSIX_CONTROL, 0x8000);
    write(&client, 0, 16 + VECTOR_CONTROL, 1);
    let mut pba = [0; 8];

    running.recorder.bus().interrupts().raise(1).unwrap();
    assert_eq!(fired(&counters), [0; 4]);
    client.read(0, 0x40, &mut pba).unwrap();
    assert_eq!(pba, [2, 0, 0, 0, 0, 0, 0, 0]);

    write(&client, 0, 16 + VECTOR_CONTROL, 0);
    assert_eq!(fired(&counters), [0, 1, 0, 0]);
    client.read(0, 0x40, &mut pba).unwrap();
    assert_eq!(pba, [0; 8]);
}

#[test]
fn eventfd_counts_messages() {
    let (client, running) = Running::start(model());
    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let eventfds = [None, Some(eventfd.as_fd())];
    client
        .set_irqs(MSIX, 1, IrqAction::Trigger, IrqData::EventFds(&eventfds))
        .unwrap();
    let interrupts = running.recorder.bus().interrupts();

    interrupts.raise(1).unwrap();
    interrupts.raise(2).unwrap();
    interrupts.raise(2).unwrap();
    assert_eq!(eventfd.read().unwrap(), 2);

    client
        .set_irqs(MSIX, 2, IrqAction::Trigger, IrqData::EventFds(&[None]))
        .unwrap();
    interrupts.raise(2).unwrap();
    assert!(eventfd.read().is_err());
}

#[test]
fn client_can_fire_for_itself() {
    let (client, _running) = Running::start(model());
    let counters = count(&client, MSIX, 4);

    client
        .set_irqs(MSIX, 1, IrqAction::Trigger, IrqData::None(2))
        .unwrap();
    client
        .set_irqs(
            MSIX,
            0,
            IrqAction::Trigger,
            IrqData::Bools(&[true, false, true]),
        )
        .unwrap();

    assert_eq!(fired(&counters), [1, 1, 2, 0]);
}

#[test]
fn disabled_index_is_silent() {
    let (client, running) = Running::start(model());
    let counters = count(&client, MSIX, 4);

    client
        .set_irqs(MSIX, 0, IrqAction::Trigger, IrqData::None(0))
        .unwrap();
    running.recorder.bus().interrupts().raise(0).unwrap();

    assert_eq!(fired(&counters), [0; 4]);
}

#[test]
fn malformed_setup_is_einval() {
    let (client, _running) = Running::start(model());
    let set = |index, start, action, data| errno(client.set_irqs(index, start, action, data));

    assert_eq!(
        set(3, 0, IrqAction::Trigger, IrqData::None(1)),
        libc::EINVAL
    );
    assert_eq!(
        set(9, 0, IrqAction::Trigger, IrqData::None(0)),
        libc::EINVAL
    );
    assert_eq!(
        set(MSIX, 4, IrqAction::Trigger, IrqData::None(1)),
        libc::EINVAL
    );
    assert_eq!(
        set(MSIX, 0, IrqAction::Trigger, IrqData::None(5)),
        libc::EINVAL
    );
    assert_eq!(
        set(
            MSIX,
            u32::MAX,
            IrqAction::Trigger,
            IrqData::None(usize::MAX)
        ),
        libc::EINVAL
    );
    assert_eq!(
        set(MSIX, 1, IrqAction::Trigger, IrqData::None(0)),
        libc::EINVAL
    );
    assert_eq!(
        set(MSIX, 0, IrqAction::Mask, IrqData::None(0)),
        libc::EINVAL
    );
    assert_eq!(
        set(MSIX, 0, IrqAction::Trigger, IrqData::Bools(&[])),
        libc::EINVAL
    );
    assert_eq!(set(4, 0, IrqAction::Mask, IrqData::None(1)), libc::EINVAL);
}

#[test]
fn vector_that_is_not_there_is_an_error_of_the_device() {
    let (_client, running) = Running::start(model());
    let interrupts = running.recorder.bus().interrupts();

    assert_eq!(interrupts.vectors(), 4);
    assert_eq!(interrupts.raise(4).unwrap_err().errno(), Errno::EINVAL);
    assert_eq!(interrupts.lower(4).unwrap_err().errno(), Errno::EINVAL);
}

#[test]
fn fatal_error_is_told_by_express_devices_only() {
    let (_client, running) = Running::start(model());
    let interrupts = running.recorder.bus().interrupts();
    assert_eq!(
        interrupts.raise_fatal_error().unwrap_err().errno(),
        Errno::EINVAL
    );

    let express = PciBuilder::new(1, 2)
        .express(Express::endpoint())
        .build()
        .unwrap();
    let (client, running) = Running::start(express);
    let counters = count(&client, 3, 1);
    running
        .recorder
        .bus()
        .interrupts()
        .raise_fatal_error()
        .unwrap();
    assert_eq!(fired(&counters), [1]);
}

#[test]
fn threads_that_raise_at_once_lose_nothing() {
    let (client, running) = Running::start(model());
    let counters = count(&client, MSIX, 4);
    let interrupts = running.recorder.bus().interrupts();
    let barrier = Barrier::new(4);

    thread::scope(|scope| {
        for vector in 0..4 {
            let (interrupts, barrier) = (interrupts.clone(), &barrier);
            scope.spawn(move || {
                barrier.wait();
                (0..500).for_each(|_| interrupts.raise(vector).unwrap());
            });
        }
    });

    assert_eq!(fired(&counters), [500; 4]);
}

#[test]
fn line_shaken_by_threads_ends_where_the_vectors_are() {
    let (client, running) = Running::start(model());
    let interrupts = running.recorder.bus().interrupts();
    thread::scope(|scope| {
        for vector in 0..4 {
            let interrupts = interrupts.clone();
            scope.spawn(move || {
                for _ in 0..300 {
                    interrupts.raise(vector).unwrap();
                    interrupts.lower(vector).unwrap();
                }
            });
        }
    });

    // Down: enabling and unmasking finds nothing.
    let counters = count(&client, INTX, 1);
    client
        .set_irqs(INTX, 0, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired(&counters), [0]);
    interrupts.raise(2).unwrap();
    assert_eq!(fired(&counters), [1]);
}
