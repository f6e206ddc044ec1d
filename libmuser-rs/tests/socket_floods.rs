// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients that send without end, and what comes in one piece with something else: nobody is kept
//! from what he waits for.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use libmuser::transport::{AttachOptions, ListenOptions, SocketTransport};
use libmuser::vfio_user::wire::{payload, put, Command};
use libmuser::{
    Access, Bar, Bus, Device, Ended, PciBuilder, PciModel, Result, SharedDevice, SharedServer,
};
use zerocopy::IntoBytes;

mod raw;

use raw::{access, Directory, Listening, RawClient, DEADLINE};

/// Its registers read as zeroes.
struct Null;

impl Device for Null {}

fn model() -> PciModel {
    let bar = Bar::memory32(0x1000);
    PciBuilder::new(0x1234, 0x5678).bar(0, bar).build().unwrap()
}

/// Sends the same again and again until it is told to stop.
fn assert_stopped_during(client: &RawClient, server: &Listening, bytes: Vec<u8>) {
    let over = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&over);
    let mut socket = client.socket.try_clone().unwrap();
    let flood =
        thread::spawn(
            move || {
                while !told.load(Ordering::SeqCst) && socket.write_all(&bytes).is_ok() {}
            },
        );
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(200) {
        thread::yield_now();
    }

    server.stop.stop();

    let ended = server.ended.recv_timeout(DEADLINE / 4);
    over.store(true, Ordering::SeqCst);
    flood.join().unwrap();
    assert!(matches!(ended, Ok(Ok(Ended::Stopped))), "{ended:?}");
}

#[test]
fn server_is_stopped_while_commands_come_that_the_device_need_not_know() {
    let server = Listening::start(model(), |_| Ok(Null));
    let mut client = server.client();
    let feature = |flags, argsz| payload::Feature {
        argsz,
        flags: flags | payload::Feature::SET,
    };
    let start = payload::LoggingStart {
        page_size: 4096,
        num_ranges: 0,
        reserved: 0,
    };
    let reply = client.call(
        Command::DeviceFeature,
        &[feature(6, 24).as_bytes(), start.as_bytes()],
    );
    assert_eq!(reply.result(), Ok(()));
    let asked = payload::Feature {
        argsz: 2 << 20,
        flags: 8 | payload::Feature::GET,
    };
    // Its answer is a bitmap of a MiB.
    let report = payload::LoggingReport {
        iova: 0,
        length: 1 << 35,
        page_size: 4096,
    };
    let header = client.header(Command::DeviceFeature).unanswered();
    let mut bytes = Vec::new();
    for _ in 0..4000 {
        put(&mut bytes, header, &[asked.as_bytes(), report.as_bytes()]).unwrap();
    }

    assert_stopped_during(&client, &server, bytes);
}

#[test]
fn server_is_stopped_while_replies_come_that_nobody_waits_for() {
    let server = Listening::start(model(), |_| Ok(Null));
    let mut client = server.client();
    let header = client.header(Command::DmaRead).reply(Ok(()));
    let mut bytes = Vec::new();
    for _ in 0..10_000 {
        put(&mut bytes, header, &[]).unwrap();
    }

    assert_stopped_during(&client, &server, bytes);
}

/// Reads the client's memory when a register is read.
struct Reads(Bus);

impl SharedDevice for Reads {
    fn read(&self, _access: Access) -> Result<u64> {
        self.0.dma().read_obj::<u32>(0x10000).map(u64::from)
    }
}

#[test]
fn reply_that_comes_along_with_a_command_is_for_who_waits() {
    /// What a read of memory that takes as long was not woken for.
    const LONG: Duration = Duration::from_secs(4);
    let directory = Directory::new();
    let path = directory.0.join("socket");
    let transport = SocketTransport::listen(&path, ListenOptions::new()).unwrap();
    let options = AttachOptions::new().threads(2);
    let server = SharedServer::attach(model(), transport, &options, |bus| Ok(Reads(bus.clone())));
    let mut server = server.unwrap();
    thread::spawn(move || server.run());
    let mut client = RawClient::new(UnixStream::connect(&path).unwrap());
    client.negotiate();
    // Writes of the command register are alone in the device.
    client.write(7, 4, &[6, 0]).unwrap();
    client.dma_map(0x10000, 4096, 3, None).unwrap();

    let start = Instant::now();
    let mut round = 0;
    while start.elapsed() < Duration::from_secs(2) {
        let begin = Instant::now();
        client.send(Command::RegionRead, &[access(0, 0, 4).as_bytes()]);
        let asked = client.receive();
        assert_eq!(asked.header.command, Command::DmaRead.number());
        let info = payload::DeviceInfo {
            argsz: 16,
            ..Default::default()
        };
        let query = client.header(Command::DeviceGetInfo).unanswered();
        let mut first = Vec::new();
        for _ in 0..round % 60 {
            put(&mut first, query, &[info.as_bytes()]).unwrap();
        }
        let mut bytes = Vec::new();
        let write = client.header(Command::RegionWrite);
        put(&mut bytes, write, &[access(7, 4, 2).as_bytes(), &[6, 0]]).unwrap();
        let reply = asked.header.reply(Ok(()));
        put(&mut bytes, reply, &[&asked.payload, &[1, 2, 3, 4]]).unwrap();
        // The first have the server awake when the others come.
        client.send_bytes(&first, &[]);
        client.send_bytes(&bytes, &[]);
        client.receive();
        client.receive();
        assert!(begin.elapsed() < LONG, "round {round}");
        round += 1;
    }
}
