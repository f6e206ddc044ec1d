// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `DEVICE_SET_IRQS` over the socket: every action, with every kind of data.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use libmuser::vfio_user::wire::payload::IrqSet;
use libmuser::{Bar, Bus, Msix, PciBuilder, Pin};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

mod common;
mod raw;

use common::{Recorder, CONFIG, INTX, MSIX};
use raw::{Listening, RawClient, DEADLINE};

const EINVAL: i32 = libc::EINVAL;
const NONE: u32 = IrqSet::DATA_NONE;
const BOOL: u32 = IrqSet::DATA_BOOL;
const EVENTFD: u32 = IrqSet::DATA_EVENTFD;
const MASK: u32 = IrqSet::MASK;
const UNMASK: u32 = IrqSet::UNMASK;
const TRIGGER: u32 = IrqSet::TRIGGER;

fn start() -> (RawClient, Bus, Listening) {
    let model = PciBuilder::new(0x1234, 0x5678)
        .bar(1, Bar::memory32(0x4000))
        .interrupt_pin(Pin::A)
        .msix(Msix::new(4).table(1, 0).pba(1, 0x1000))
        .build();
    let recorder = Recorder::default();
    let device = recorder.clone();
    let server = Listening::start(model.unwrap(), move |bus| {
        *device.bus.lock().unwrap() = Some(bus.clone());
        Ok(device)
    });
    let mut client = server.client();
    // Bus master, and MSI-X on with every vector let through.
    client.write(CONFIG, 4, &[4, 0]).unwrap();
    (client, recorder.bus(), server)
}

fn enable_msix(client: &mut RawClient) {
    let mut at = u64::from(client.read(CONFIG, 0x34, 1).unwrap()[0]);
    while client.read(CONFIG, at, 1).unwrap() != [0x11] {
        at = client.read(CONFIG, at + 1, 1).unwrap()[0].into();
    }
    client.write(CONFIG, at + 2, &[0, 0x80]).unwrap();
    for vector in 0..4 {
        client.write(1, vector * 16 + 12, &[0; 4]).unwrap();
    }
}

fn events(count: usize) -> Vec<EventFd> {
    let flags = EfdFlags::EFD_NONBLOCK;
    (0..count)
        .map(|_| EventFd::from_flags(flags).unwrap())
        .collect()
}

fn fds(events: &[EventFd]) -> Vec<BorrowedFd<'_>> {
    events.iter().map(AsFd::as_fd).collect()
}

/// How often it was signalled since it was looked at.
fn signals(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

fn wait_for(event: &EventFd) -> u64 {
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut fds, timeout), Ok(1), "it was not signalled");
    signals(event)
}

#[test]
fn device_signals_the_eventfd_of_its_vector() {
    let (mut client, bus, _server) = start();
    enable_msix(&mut client);
    let events = events(2);
    let set = client.set_irqs(EVENTFD | TRIGGER, (MSIX, 1, 2), &[], &fds(&events));
    assert_eq!(set, Ok(()));

    bus.interrupts().raise(2).unwrap();
    bus.interrupts().raise(3).unwrap();

    assert_eq!((signals(&events[0]), signals(&events[1])), (0, 1));
}

#[test]
fn no_descriptors_take_those_away() {
    let (mut client, bus, _server) = start();
    enable_msix(&mut client);
    let events = events(4);
    client
        .set_irqs(EVENTFD | TRIGGER, (MSIX, 0, 4), &[], &fds(&events))
        .unwrap();

    client
        .set_irqs(EVENTFD | TRIGGER, (MSIX, 0, 2), &[], &[])
        .unwrap();
    for vector in 0..4 {
        bus.interrupts().raise(vector).unwrap();
    }
    assert_eq!(events.iter().map(signals).collect::<Vec<_>>(), [0, 0, 1, 1]);

    client
        .set_irqs(NONE | TRIGGER, (MSIX, 0, 0), &[], &[])
        .unwrap();
    bus.interrupts().raise(3).unwrap();
    assert_eq!(signals(&events[3]), 0);
}

#[test]
fn client_triggers_those_it_means() {
    let (mut client, _bus, _server) = start();
    let events = events(4);
    client
        .set_irqs(EVENTFD | TRIGGER, (MSIX, 0, 4), &[], &fds(&events))
        .unwrap();

    client
        .set_irqs(NONE | TRIGGER, (MSIX, 0, 2), &[], &[])
        .unwrap();
    client
        .set_irqs(BOOL | TRIGGER, (MSIX, 1, 3), &[1, 0, 7], &[])
        .unwrap();

    assert_eq!(events.iter().map(signals).collect::<Vec<_>>(), [1, 2, 0, 1]);
}

#[test]
fn line_masks_itself_until_the_client_unmasks_it() {
    let (mut client, bus, _server) = start();
    let events = events(1);
    client
        .set_irqs(EVENTFD | TRIGGER, (INTX, 0, 1), &[], &fds(&events))
        .unwrap();

    bus.interrupts().raise(0).unwrap();
    assert_eq!(signals(&events[0]), 1);
    client
        .set_irqs(NONE | UNMASK, (INTX, 0, 1), &[], &[])
        .unwrap();
    assert_eq!(signals(&events[0]), 1);
    client
        .set_irqs(BOOL | UNMASK, (INTX, 0, 1), &[0], &[])
        .unwrap();
    assert_eq!(signals(&events[0]), 0);
    bus.interrupts().lower(0).unwrap();
    client
        .set_irqs(BOOL | UNMASK, (INTX, 0, 1), &[1], &[])
        .unwrap();
    assert_eq!(signals(&events[0]), 0);

    client
        .set_irqs(NONE | MASK, (INTX, 0, 1), &[], &[])
        .unwrap();
    bus.interrupts().raise(0).unwrap();
    assert_eq!(signals(&events[0]), 0);
    client
        .set_irqs(NONE | UNMASK, (INTX, 0, 1), &[], &[])
        .unwrap();
    assert_eq!(signals(&events[0]), 1);
}

#[test]
fn eventfd_of_the_client_unmasks_and_masks_without_a_message() {
    let (mut client, bus, _server) = start();
    let events = events(3);
    let [trigger, unmask, mask] = &events[..] else {
        panic!()
    };
    client
        .set_irqs(EVENTFD | TRIGGER, (INTX, 0, 1), &[], &[trigger.as_fd()])
        .unwrap();
    client
        .set_irqs(EVENTFD | UNMASK, (INTX, 0, 1), &[], &[unmask.as_fd()])
        .unwrap();
    client
        .set_irqs(EVENTFD | MASK, (INTX, 0, 1), &[], &[mask.as_fd()])
        .unwrap();

    bus.interrupts().raise(0).unwrap();
    assert_eq!(wait_for(trigger), 1);
    unmask.write(1).unwrap();
    assert_eq!(wait_for(trigger), 1);

    // It stays quiet when it is masked, whatever the order of the two.
    bus.interrupts().lower(0).unwrap();
    unmask.write(1).unwrap();
    wait_taken(unmask);
    mask.write(1).unwrap();
    wait_taken(mask);
    client.read(CONFIG, 0, 1).unwrap();
    bus.interrupts().raise(0).unwrap();
    assert_eq!(signals(trigger), 0);

    // Nobody listens to it any more.
    client
        .set_irqs(EVENTFD | UNMASK, (INTX, 0, 1), &[], &[])
        .unwrap();
    unmask.write(1).unwrap();
    client.read(CONFIG, 0, 1).unwrap();
    assert_eq!(signals(trigger), 0);
    assert_eq!(signals(unmask), 1);
}

/// Waits until the other side has taken what was signalled.
fn wait_taken(event: &EventFd) {
    let deadline = Instant::now() + DEADLINE;
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::ZERO).unwrap() > 0 {
        assert!(Instant::now() < deadline, "nobody has taken it");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_there_is_not_is_einval() {
    let (mut client, _bus, _server) = start();
    let events = events(2);
    let fds = fds(&events);
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    let mut set = |flags, vectors, data: &[u8], fds: &[BorrowedFd<'_>]| {
        client.set_irqs(flags, vectors, data, fds)
    };

    for flags in [
        0,
        NONE,
        TRIGGER,
        NONE | BOOL | TRIGGER,
        NONE | TRIGGER | MASK,
        1 << 6,
    ] {
        assert_eq!(
            set(flags, (MSIX, 0, 1), &[], &[]),
            Err(EINVAL),
            "{flags:#x}"
        );
    }
    for vectors in [
        (MSIX, 4, 1),
        (MSIX, 0, 5),
        (MSIX, u32::MAX, 1),
        (9, 0, 1),
        (1, 0, 1),
    ] {
        for flags in [NONE | TRIGGER, EVENTFD | TRIGGER] {
            assert_eq!(set(flags, vectors, &[], &[]), Err(EINVAL), "{vectors:?}");
        }
    }
    assert_eq!(set(BOOL | TRIGGER, (MSIX, 0, 2), &[1], &[]), Err(EINVAL));
    assert_eq!(set(NONE | TRIGGER, (MSIX, 1, 0), &[], &[]), Err(EINVAL));
    assert_eq!(set(NONE | MASK, (MSIX, 0, 0), &[], &[]), Err(EINVAL));
    assert_eq!(set(EVENTFD | TRIGGER, (MSIX, 0, 0), &[], &[]), Err(EINVAL));
    assert_eq!(set(EVENTFD | TRIGGER, (MSIX, 0, 3), &[], &fds), Err(EINVAL));
    assert_eq!(set(EVENTFD | TRIGGER, (MSIX, 0, 1), &[], &fds), Err(EINVAL));
    assert_eq!(set(NONE | TRIGGER, (MSIX, 0, 2), &[], &fds), Err(EINVAL));
    let pipe = [pipe.as_fd()];
    assert_eq!(
        set(EVENTFD | TRIGGER, (MSIX, 0, 1), &[], &pipe),
        Err(EINVAL)
    );
    assert_eq!(set(EVENTFD | UNMASK, (INTX, 0, 1), &[], &pipe), Err(EINVAL));
}

#[test]
fn all_vectors_of_one_message_are_as_many_as_the_kernel_carries() {
    let model = PciBuilder::new(0x1234, 0x5678)
        .bar(1, Bar::memory32(0x10000))
        .msix(Msix::new(253).table(1, 0).pba(1, 0x8000))
        .build();
    let server = Listening::start(model.unwrap(), |_| Ok(Recorder::default()));
    let mut client = server.connect();
    client.negotiate_with(r#"{"capabilities":{"max_msg_fds":253}}"#);
    let events = events(253);

    let set = client.set_irqs(EVENTFD | TRIGGER, (MSIX, 0, 253), &[], &fds(&events));

    assert_eq!(set, Ok(()));
    client
        .set_irqs(NONE | TRIGGER, (MSIX, 252, 1), &[], &[])
        .unwrap();
    assert_eq!(signals(&events[252]), 1);
}

#[test]
fn interrupts_of_a_client_end_with_it() {
    let (mut client, bus, server) = start();
    let events = events(2);
    client
        .set_irqs(EVENTFD | TRIGGER, (INTX, 0, 1), &[], &fds(&events[..1]))
        .unwrap();
    client
        .set_irqs(EVENTFD | UNMASK, (INTX, 0, 1), &[], &fds(&events[1..]))
        .unwrap();
    drop(client);
    let mut client = server.client();
    client.read(CONFIG, 0, 1).unwrap();

    bus.interrupts().raise(0).unwrap();
    events[1].write(1).unwrap();
    client.read(CONFIG, 0, 1).unwrap();

    assert_eq!((signals(&events[0]), signals(&events[1])), (0, 1));
}
