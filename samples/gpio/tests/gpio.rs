// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The card as Linux' driver sees it, over the memory transport.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;

use gpio::Gpio;
use libmuser::transport::memory::{self, Client, Host, IrqAction, IrqData};
use libmuser::Server;

const BAR2: u32 = 2;
const CONFIG: u32 = 7;
const INTX: u32 = 0;
const MSI: u32 = 1;

fn card() -> (Client, Host) {
    let (transport, host) = memory::pair().unwrap();
    let model = gpio::model().unwrap();
    let mut server = Server::new(model, transport, |bus| Ok(Gpio::new(bus))).unwrap();
    thread::spawn(move || server.run());
    (host.open().unwrap(), host)
}

fn read(client: &Client, offset: u64) -> u8 {
    let mut byte = [0];
    assert_eq!(client.read(BAR2, offset, &mut byte).unwrap(), 1);
    byte[0]
}

fn write(client: &Client, offset: u64, value: u8) {
    assert_eq!(client.write(BAR2, offset, &[value]).unwrap(), 1);
}

/// Counts interrupts of an index.
fn count(client: &Client, index: u32) -> Arc<AtomicU32> {
    let fired = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&fired);
    let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    client
        .set_irqs(
            index,
            0,
            IrqAction::Trigger,
            IrqData::Calls(vec![Some(call)]),
        )
        .unwrap();
    fired
}

#[test]
fn ids_are_those_that_the_driver_binds_to() {
    let (client, _host) = card();
    let mut ids = [0; 4];

    client.read(CONFIG, 0, &mut ids).unwrap();

    assert_eq!(ids, [0x4f, 0x49, 0xc8, 0x0d]);
}

#[test]
fn outputs_read_back() {
    let (client, _host) = card();

    write(&client, 0, 0xa5);
    write(&client, 4, 0x5a);

    assert_eq!((read(&client, 0), read(&client, 4)), (0xa5, 0x5a));
}

#[test]
fn outputs_can_be_written_all_at_once() {
    let (client, _host) = card();

    client.write(BAR2, 0, &[1, 0, 0, 0, 2]).unwrap();

    assert_eq!((read(&client, 0), read(&client, 4)), (1, 2));
}

#[test]
fn inputs_invert_every_three_reads() {
    let (client, _host) = card();

    let values: Vec<u8> = (0..9).map(|_| read(&client, 1)).collect();

    assert_eq!(values, [0, 0, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    assert_eq!(read(&client, 5), 0);
}

#[test]
fn change_raises_the_line_until_cleared() {
    let (client, _host) = card();
    let fired = count(&client, INTX);
    write(&client, 1, 0);
    read(&client, 2);

    for _ in 0..3 {
        read(&client, 5);
    }

    assert_eq!(fired.load(Ordering::Relaxed), 1);
    assert_eq!(read(&client, 6), 4);
    // Still up: it fires again as soon as it is unmasked.
    client
        .set_irqs(INTX, 0, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired.load(Ordering::Relaxed), 2);
    write(&client, 1, 0);
    assert_eq!(read(&client, 6), 0);
    client
        .set_irqs(INTX, 0, IrqAction::Unmask, IrqData::None(1))
        .unwrap();
    assert_eq!(fired.load(Ordering::Relaxed), 2);
}

#[test]
fn change_sends_a_message_where_msi_is_on() {
    let (client, _host) = card();
    let fired = count(&client, MSI);
    read(&client, 2);

    for _ in 0..6 {
        read(&client, 1);
    }

    assert_eq!(fired.load(Ordering::Relaxed), 2);
}

#[test]
fn change_while_disabled_is_silent() {
    let (client, _host) = card();
    let fired = count(&client, INTX);
    read(&client, 2);
    write(&client, 2, 0);

    for _ in 0..3 {
        read(&client, 1);
    }

    assert_eq!(fired.load(Ordering::Relaxed), 0);
    assert_eq!(read(&client, 6), 0);
}

#[test]
fn reset_returns_everything_to_zero() {
    let (client, _host) = card();
    write(&client, 0, 0xff);
    read(&client, 1);
    read(&client, 2);

    client.reset().unwrap();

    assert_eq!(read(&client, 0), 0);
    let fired = count(&client, INTX);
    let values: Vec<u8> = (0..4).map(|_| read(&client, 1)).collect();
    assert_eq!(values, [0, 0, 0, 0xff]);
    assert_eq!(fired.load(Ordering::Relaxed), 0);
}
