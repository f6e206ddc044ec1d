// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The counters over the memory transport, with servers that die.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use counter::Counter;
use libmuser::transport::memory::{Client, ClientMemory, Host, IrqAction, IrqData};
use libmuser::{DmaAccess, Ended, Moment, SharedServer, Stop};

const MSIX: u32 = 2;
const ADD: u64 = 0x00;
const VALUE: u64 = 0x08;
const FETCH_ADD: u64 = 0x10;
const ADDRESS: u64 = 0x18;
const GO: u64 = 0x20;
const BELL: u64 = 0x28;

/// A device whose server is started again whenever it dies.
struct Device {
    host: Host,
    stop: Stop,
    serving: Option<JoinHandle<()>>,
}

impl Device {
    fn new(threads: usize) -> (Client, Self) {
        let (stop, host) = (Stop::new().unwrap(), Host::new().unwrap());
        let serve = move |host: &Host| {
            let model = counter::model().unwrap();
            SharedServer::new(model, host.transport(), threads, Counter::new).unwrap()
        };
        let mut server = serve(&host);
        let (again, stopped) = (host.clone(), stop.clone());
        let serving = thread::spawn(move || {
            while server.run_until(&stopped).unwrap() == Ended::Abandoned {
                drop(server);
                server = serve(&again);
            }
        });
        let serving = Some(serving);
        let client = host.open().unwrap();
        let device = Self {
            host,
            stop,
            serving,
        };
        (client, device)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.serving.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
    }
}

fn read(client: &Client, lane: u64, register: u64) -> u64 {
    let mut value = [0; 8];
    let len = if register == BELL { 4 } else { 8 };
    client
        .read(0, lane * 0x40 + register, &mut value[..len])
        .unwrap();
    u64::from_le_bytes(value)
}

fn add(client: &Client, lane: u64, value: u32) {
    client
        .write(0, lane * 0x40 + ADD, &value.to_le_bytes())
        .unwrap();
}

/// Memory of the client at an IOVA, and the lane's address set to it.
fn block(client: &Client, lane: u64) -> ClientMemory {
    let memory = ClientMemory::new(4096).unwrap();
    let iova = 0x10_0000 + lane * 0x1000;
    client
        .dma_map(iova, &memory, 0..4096, DmaAccess::ReadWrite)
        .unwrap();
    client.write(7, 4, &[4, 0]).unwrap();
    let address = iova.to_le_bytes();
    client.write(0, lane * 0x40 + ADDRESS, &address).unwrap();
    memory
}

fn go(client: &Client, lane: u64, memory: &ClientMemory, addend: u64, sequence: u64) -> [u64; 2] {
    let ask = [addend, sequence].map(u64::to_le_bytes);
    memory.write(0, ask.as_flattened()).unwrap();
    client.write(0, lane * 0x40 + GO, &[1, 0, 0, 0]).unwrap();
    let mut answer = [[0; 8]; 2];
    memory.read(16, answer.as_flattened_mut()).unwrap();
    answer.map(u64::from_le_bytes)
}

#[test]
fn lanes_count_each_for_itself() {
    let (client, _device) = Device::new(1);

    add(&client, 0, 5);
    add(&client, 0, u32::MAX);
    add(&client, 15, 7);

    assert_eq!(read(&client, 0, VALUE), 5 + u64::from(u32::MAX));
    assert_eq!(read(&client, 15, VALUE), 7);
    assert_eq!(read(&client, 1, VALUE), 0);
    assert_eq!(read(&client, 15, FETCH_ADD), 7);
    assert_eq!(read(&client, 15, VALUE), 8);
}

#[test]
fn block_is_answered_with_an_interrupt() {
    let (client, _device) = Device::new(2);
    let fired = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&fired);
    let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let calls = IrqData::Calls(vec![Some(call)]);
    client.set_irqs(MSIX, 3, IrqAction::Trigger, calls).unwrap();
    let memory = block(&client, 3);

    assert_eq!(go(&client, 3, &memory, 40, 1), [40, 1]);
    assert_eq!(go(&client, 3, &memory, 2, 2), [42, 2]);

    assert_eq!(fired.load(Ordering::SeqCst), 2);
    assert_eq!(read(&client, 3, VALUE), 42);
}

#[test]
fn block_that_can_not_be_answered_is_not_counted() {
    let (client, _device) = Device::new(1);
    let memory = ClientMemory::new(4096).unwrap();
    client
        .dma_map(0, &memory, 0..4096, DmaAccess::Read)
        .unwrap();
    client.write(7, 4, &[4, 0]).unwrap();
    memory.write(0, &[1]).unwrap();

    let error = client.write(0, GO, &[1, 0, 0, 0]).unwrap_err();

    assert_eq!(error.raw_os_error(), Some(1));
    assert_eq!(read(&client, 0, VALUE), 0);
}

#[test]
fn block_at_an_odd_address_is_not_counted() {
    let (client, _device) = Device::new(1);
    let memory = block(&client, 0);
    memory.write(4, &[1; 32]).unwrap();
    let address = 0x10_0004_u64.to_le_bytes();
    client.write(0, ADDRESS, &address).unwrap();

    let error = client.write(0, GO, &[1, 0, 0, 0]).unwrap_err();

    assert_eq!(error.raw_os_error(), Some(22));
    assert_eq!(read(&client, 0, VALUE), 0);
    let mut after = [0; 32];
    memory.read(4, &mut after).unwrap();
    assert_eq!(after, [1; 32]);
}

#[test]
fn doorbell_is_seen_at_once() {
    for posted in [true, false] {
        let (client, device) = Device::new(1);
        device.host.set_posted_doorbells(posted);

        client.write(0, 0x1000 + 4 * 2, &[1, 2, 3, 4]).unwrap();

        assert_eq!(read(&client, 2, BELL), 0x0403_0201, "posted: {posted}");
        assert_eq!(read(&client, 1, BELL), 0);
    }
}

#[test]
fn death_at_any_moment_counts_once() {
    let (client, device) = Device::new(1);
    let memory = block(&client, 2);
    let mut expected = [0; 3];
    for round in 1..=30 {
        for moment in [Moment::Taken, Moment::Replying] {
            device.stop.die_at(moment);
            match round % 3 {
                0 => add(&client, 0, 10),
                1 => assert_eq!(read(&client, 1, FETCH_ADD), expected[1]),
                _ => {
                    let sum = expected[2] + round;
                    assert_eq!(go(&client, 2, &memory, round, round), [sum, round]);
                }
            }
            let lane = usize::try_from(round % 3).unwrap();
            expected[lane] += [10, 1, round][lane];
        }
    }
    let counted = [0, 1, 2].map(|lane| read(&client, lane, VALUE));

    assert_eq!(counted, expected);
}

#[test]
fn everything_kept_outlives_the_server() {
    let (client, device) = Device::new(1);
    let _memory = block(&client, 1);
    add(&client, 1, 9);
    client.write(0, 0x1000 + 4, &[7, 0, 0, 0]).unwrap();

    device.stop.die_at(Moment::Taken);

    assert_eq!(read(&client, 1, VALUE), 9);
    assert_eq!(read(&client, 1, ADDRESS), 0x10_1000);
    assert_eq!(read(&client, 1, BELL), 7);
}

#[test]
fn reset_clears_everything() {
    let (client, device) = Device::new(1);
    let _memory = block(&client, 1);
    add(&client, 1, 9);
    client.write(0, 0x1000 + 4, &[7, 0, 0, 0]).unwrap();

    device.stop.die_at(Moment::Replying);
    client.reset().unwrap();

    for register in [VALUE, ADDRESS, BELL] {
        assert_eq!(read(&client, 1, register), 0, "{register:#x}");
    }
}

#[test]
fn many_threads_lose_nothing_while_servers_die() {
    const CLIENTS: u64 = 6;
    const ROUNDS: u64 = 200;
    let (client, device) = Device::new(4);
    let client = &client;
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                scope.spawn(move || {
                    let mut last = None;
                    for _ in 0..ROUNDS {
                        add(client, 0, 1);
                        let before = read(client, 1, FETCH_ADD);
                        assert!(last < Some(before), "{number}: {last:?}, {before}");
                        last = Some(before);
                    }
                })
            })
            .collect();
        let mut deaths = 0;
        while clients.iter().any(|client| !client.is_finished()) {
            let moment = [Moment::Taken, Moment::Replying][deaths % 2];
            device.stop.die_at(moment);
            deaths += 1;
            thread::yield_now();
        }
    });

    assert_eq!(read(client, 0, VALUE), CLIENTS * ROUNDS);
    assert_eq!(read(client, 1, VALUE), CLIENTS * ROUNDS);
}
