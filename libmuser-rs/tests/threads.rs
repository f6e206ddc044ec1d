// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers of several threads: how they end, and how they are kept out of the device.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{self, JoinHandle};

use libmuser::transport::memory::{self, Client, Host};
use libmuser::{
    Access, AttachOptions, Bar, Bus, Ended, Errno, PciBuilder, PciModel, Result, SharedDevice,
    SharedServer, Stop,
};

mod common;
use common::errno;

const THREADS: usize = 4;
/// Waits at the barrier with the test.
const WAIT: u64 = 0x08;
/// Panics.
const PANIC: u64 = 0x10;
/// Asks to quiesce the device, from inside.
const QUIESCE: u64 = 0x18;

/// A device whose accesses a test can hold.
#[derive(Clone)]
struct Held {
    bus: Arc<Mutex<Option<Bus>>>,
    barrier: Arc<Barrier>,
    accesses: Arc<AtomicU32>,
}

impl Held {
    fn new(parties: usize) -> Self {
        Self {
            bus: Arc::default(),
            barrier: Arc::new(Barrier::new(parties)),
            accesses: Arc::default(),
        }
    }

    fn bus(&self) -> Bus {
        self.bus.lock().unwrap().clone().unwrap()
    }
}

impl SharedDevice for Held {
    fn read(&self, access: Access) -> Result<u64> {
        self.accesses.fetch_add(1, Ordering::SeqCst);
        match access.offset {
            WAIT => {
                // Once to say that it is there, once more to go on.
                self.barrier.wait();
                self.barrier.wait();
                Ok(1)
            }
            PANIC => panic!("on purpose"),
            QUIESCE => Err(self.bus().quiesce().unwrap_err().errno().into()),
            _ => Ok(0),
        }
    }
}

fn model() -> PciModel {
    let bar = Bar::memory32(4096);
    PciBuilder::new(1, 2).bar(0, bar).build().unwrap()
}

type Serving = JoinHandle<Result<Ended>>;

fn serve(device: &Held, host: &Host, stop: &Stop) -> Serving {
    let device = device.clone();
    let mut server = SharedServer::new(model(), host.transport(), THREADS, |bus| {
        *device.bus.lock().unwrap() = Some(bus.clone());
        Ok(device.clone())
    })
    .unwrap();
    let stop = stop.clone();
    thread::spawn(move || server.run_until(&stop))
}

fn start(parties: usize) -> (Client, Held, Host, Stop, Serving) {
    let (host, stop) = (Host::new().unwrap(), Stop::new().unwrap());
    let device = Held::new(parties);
    let serving = serve(&device, &host, &stop);
    (host.open().unwrap(), device, host, stop, serving)
}

fn read(client: &Client, offset: u64) -> std::io::Result<u64> {
    let mut data = [0; 8];
    client.read(0, offset, &mut data)?;
    Ok(u64::from_le_bytes(data))
}

#[test]
fn stop_ends_all_threads_after_their_requests() {
    let (client, device, _host, stop, serving) = start(3);
    thread::scope(|scope| {
        let held = [(); 2].map(|()| scope.spawn(|| read(&client, WAIT)));
        device.barrier.wait();

        stop.stop();
        device.barrier.wait();

        for thread in held {
            assert_eq!(thread.join().unwrap().unwrap(), 1);
        }
    });
    assert_eq!(serving.join().unwrap().unwrap(), Ended::Stopped);
}

#[test]
fn panic_in_one_thread_ends_all() {
    let (client, device, host, _stop, serving) = start(2);
    thread::scope(|scope| {
        let held = scope.spawn(|| read(&client, WAIT));
        device.barrier.wait();

        assert_eq!(errno(read(&client, PANIC)), libc::EIO);
        device.barrier.wait();

        // Its request was begun before the panic, and is ended.
        assert_eq!(held.join().unwrap().unwrap(), 1);
    });
    assert!(serving.join().unwrap().unwrap_err().is_panicked());
    // The device is free for the next.
    let stop = Stop::new().unwrap();
    let serving = serve(&device, &host, &stop);
    assert_eq!(read(&client, 0).unwrap(), 0);
    stop.stop();
    assert_eq!(serving.join().unwrap().unwrap(), Ended::Stopped);
}

#[test]
fn removal_ends_all_threads() {
    let (client, _device, host, _stop, serving) = start(1);

    host.remove();

    assert_eq!(serving.join().unwrap().unwrap(), Ended::Removed);
    assert_eq!(errno(read(&client, 0)), libc::ENODEV);
}

#[test]
fn all_threads_hand_the_device_over() {
    let (client, device, host, _stop, serving) = start(2);
    let standby = AttachOptions::new().standby(true).threads(THREADS);
    thread::scope(|scope| {
        let held = scope.spawn(|| read(&client, WAIT));
        device.barrier.wait();
        let next = scope.spawn(|| {
            SharedServer::attach(model(), host.transport(), &standby, |_| Ok(Held::new(1)))
        });

        // It waits until the request which is held has been replied to.
        device.barrier.wait();

        assert_eq!(held.join().unwrap().unwrap(), 1);
        let mut next = next.join().unwrap().unwrap();
        assert_eq!(serving.join().unwrap().unwrap(), Ended::HandedOver);
        let reading = scope.spawn(|| read(&client, 0));
        while !reading.is_finished() {
            next.process().unwrap();
        }
        assert_eq!(reading.join().unwrap().unwrap(), 0);
    });
    assert_eq!(device.accesses.load(Ordering::SeqCst), 1);
}

#[test]
fn second_server_in_standby_is_refused() {
    let (client, device, host, stop, serving) = start(2);
    let standby = AttachOptions::new().standby(true);
    let attach = || {
        let made = |_: &Bus| Ok(Held::new(1));
        SharedServer::attach(model(), host.transport(), &standby, made)
    };
    thread::scope(|scope| {
        let held = scope.spawn(|| read(&client, WAIT));
        device.barrier.wait();
        let threads = [(); 2].map(|()| scope.spawn(attach));

        // The first of the two waits for the request that is held: so it is the other that ends.
        while !threads.iter().any(|thread| thread.is_finished()) {
            thread::yield_now();
        }
        device.barrier.wait();

        let attached = threads.map(|thread| thread.join().unwrap().map(drop));
        let refused = attached.iter().filter_map(|result| result.as_ref().err());
        let refused: Vec<_> = refused.collect();
        assert_eq!(refused.len(), 1);
        assert!(refused[0].is_busy() && refused[0].to_string().contains("standby"));
        assert_eq!(held.join().unwrap().unwrap(), 1);
    });
    stop.stop();
    assert_eq!(serving.join().unwrap().unwrap(), Ended::HandedOver);
}

#[test]
fn quiesced_device_is_left_alone() {
    let (client, device, _host, stop, serving) = start(2);
    thread::scope(|scope| {
        let held = scope.spawn(|| read(&client, WAIT));
        device.barrier.wait();
        let quiescing = scope.spawn(|| device.bus().quiesce().unwrap());
        // It waits for the access that is held.
        device.barrier.wait();
        let quiesced = quiescing.join().unwrap();
        assert_eq!(held.join().unwrap().unwrap(), 1);
        let before = device.accesses.load(Ordering::SeqCst);

        let reading = scope.spawn(|| read(&client, 0));
        thread::yield_now();
        assert_eq!(device.accesses.load(Ordering::SeqCst), before);
        drop(quiesced);

        assert_eq!(reading.join().unwrap().unwrap(), 0);
    });
    stop.stop();
    assert_eq!(serving.join().unwrap().unwrap(), Ended::Stopped);
}

#[test]
fn device_can_not_quiesce_itself_from_inside() {
    let (client, _device, _host, stop, serving) = start(1);

    assert_eq!(errno(read(&client, QUIESCE)), Errno::EDEADLK.number());

    stop.stop();
    assert_eq!(serving.join().unwrap().unwrap(), Ended::Stopped);
}

#[test]
fn handles_of_a_server_that_has_ended_are_of_no_use() {
    let (transport, host) = memory::pair().unwrap();
    let model = PciBuilder::new(1, 2)
        .interrupt_pin(libmuser::Pin::A)
        .state(8);
    let model = model.build().unwrap();
    let device = Held::new(1);
    let server = SharedServer::new(model.clone(), transport, 1, |_| Ok(device.clone())).unwrap();
    let bus = server.bus();
    bus.state().update(|bytes| bytes[0] = 1);

    drop(server);
    assert_eq!(
        bus.interrupts().raise(0).unwrap_err().errno(),
        Errno::ENODEV
    );
    bus.state().update(|bytes| bytes[0] = 2);

    let next = SharedServer::new(model, host.transport(), 1, |_| Ok(device)).unwrap();
    assert!(next.bus().is_recovered());
    assert_eq!(next.bus().state().read(|bytes| bytes[0]), 1);
}
