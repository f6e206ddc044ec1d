// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many devices in one thread.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use libmuser::transport::memory::{self, Host};
use libmuser::{
    Access, AttachOptions, Bar, Device, Ended, Member, PciBuilder, PciModel, Poller, Result,
    Server, SharedDevice, SharedServer, Stop,
};

mod common;
use common::{errno, DEADLINE};

/// Answers with its number, but panics at offset 8.
struct Numbered(u64);

impl Device for Numbered {
    fn read(&mut self, access: Access) -> Result<u64> {
        SharedDevice::read(self, access)
    }
}

impl SharedDevice for Numbered {
    fn read(&self, access: Access) -> Result<u64> {
        assert_ne!(access.offset, 8, "on purpose");
        Ok(self.0)
    }
}

fn model() -> PciModel {
    let bar = Bar::memory32(4096);
    PciBuilder::new(1, 2).bar(0, bar).build().unwrap()
}

fn server(number: u64) -> (Host, Server<Numbered>) {
    let (transport, host) = memory::pair().unwrap();
    let server = Server::new(model(), transport, |_| Ok(Numbered(number))).unwrap();
    (host, server)
}

fn number(host: &Host) -> u64 {
    let mut data = [0; 8];
    host.open().unwrap().read(0, 0, &mut data).unwrap();
    u64::from_le_bytes(data)
}

type End = (Member, Result<Ended>);

/// A poller that runs in a thread of its own.
struct Running {
    poller: Poller,
    stop: Stop,
    thread: Option<JoinHandle<Result<()>>>,
    ended: Receiver<End>,
}

impl Running {
    fn start() -> Self {
        let (poller, stop) = (Poller::new().unwrap(), Stop::new().unwrap());
        let (sender, ended) = mpsc::channel();
        let (serving, stopped) = (poller.clone(), stop.clone());
        let run = move || {
            serving.run_until(&stopped, |member, end| {
                sender.send((member, end)).unwrap();
            })
        };
        Self {
            poller,
            stop,
            thread: Some(thread::spawn(run)),
            ended,
        }
    }

    fn ended(&self) -> End {
        self.ended.recv_timeout(DEADLINE).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

#[test]
fn hundred_devices_are_served_at_once() {
    let running = Running::start();
    let hosts: Vec<_> = (0..100)
        .map(|number| {
            let (host, server) = server(number);
            running.poller.add(server).unwrap();
            host
        })
        .collect();

    thread::scope(|scope| {
        for part in hosts.chunks(25) {
            let first = number(&part[0]);
            scope.spawn(move || {
                for _ in 0..5 {
                    for (expected, host) in (first..).zip(part) {
                        assert_eq!(number(host), expected);
                    }
                }
            });
        }
    });

    assert_eq!(running.poller.len(), 100);
}

#[test]
fn both_kinds_are_served() {
    let running = Running::start();
    let (host, one) = server(1);
    let (transport, shared_host) = memory::pair().unwrap();
    let shared = SharedServer::new(model(), transport, 4, |_| Ok(Numbered(2))).unwrap();

    running.poller.add(one).unwrap();
    running.poller.add(shared).unwrap();

    assert_eq!((number(&host), number(&shared_host)), (1, 2));
}

#[test]
fn removed_device_ends_alone() {
    let running = Running::start();
    let (first, one) = server(1);
    let (second, other) = server(2);
    let member = running.poller.add(one).unwrap();
    running.poller.add(other).unwrap();

    first.remove();

    let (ended, how) = running.ended();
    assert_eq!((ended, how.unwrap()), (member, Ended::Removed));
    assert_eq!(number(&second), 2);
    assert_eq!(running.poller.len(), 1);
}

#[test]
fn device_that_panics_ends_alone() {
    let running = Running::start();
    let (first, one) = server(1);
    let (second, other) = server(2);
    let member = running.poller.add(one).unwrap();
    running.poller.add(other).unwrap();

    let client = first.open().unwrap();
    assert_eq!(errno(client.read(0, 8, &mut [0])), libc::EIO);

    let (ended, how) = running.ended();
    assert_eq!(ended, member);
    assert!(how.unwrap_err().is_panicked());
    assert_eq!(number(&second), 2);
}

#[test]
fn server_taken_out_leaves_its_device_to_the_next() {
    let running = Running::start();
    let (host, one) = server(1);
    let member = running.poller.add(one).unwrap();
    assert_eq!(number(&host), 1);

    assert!(running.poller.remove(member));
    assert!(!running.poller.remove(member));

    let next = Server::new(model(), host.transport(), |_| Ok(Numbered(7))).unwrap();
    running.poller.add(next).unwrap();
    assert_eq!(number(&host), 7);
}

#[test]
fn device_is_handed_over_between_pollers() {
    let (old, new) = (Running::start(), Running::start());
    let (host, one) = server(1);
    let member = old.poller.add(one).unwrap();
    assert_eq!(number(&host), 1);

    let standby = AttachOptions::new().standby(true);
    let next = Server::attach(model(), host.transport(), &standby, |_| Ok(Numbered(2)));
    new.poller.add(next.unwrap()).unwrap();

    let (ended, how) = old.ended();
    assert_eq!((ended, how.unwrap()), (member, Ended::HandedOver));
    assert_eq!(number(&host), 2);
}

#[test]
fn poller_that_was_stopped_goes_on() {
    let (host, one) = server(3);
    let poller = Poller::new().unwrap();
    poller.add(one).unwrap();
    let stop = Stop::new().unwrap();
    stop.stop();
    poller.run_until(&stop, |_, _| {}).unwrap();

    let stop = Stop::new().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| poller.run_until(&stop, |_, _| {}).unwrap());
        assert_eq!(number(&host), 3);
        stop.stop();
    });
}
