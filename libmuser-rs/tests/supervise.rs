// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client behind a supervisor, whose servers come and go.

#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libmuser::client::{Client, ClientMemory, IrqAction, IrqData, Options, RegionWrite};
use libmuser::supervise::{Counters, Links, Supervisor};
use libmuser::transport::{ListenOptions, SocketTransport};
use libmuser::{
    Access, Bar, Bus, Device, DmaAccess, Ended, Moment, Msix, PciBuilder, PciModel, Region, Reset,
    Result, Server, State, Stop,
};
use nix::sys::eventfd::EventFd;

/// Adds what is written to a sum that it keeps, and raises an interrupt; `GO` adds what lies at an
/// IOVA.
struct Adder {
    state: State,
    bus: Bus,
}

const ADD: u64 = 0;
const GO: u64 = 8;

impl Device for Adder {
    fn read(&mut self, access: Access) -> Result<u64> {
        match (access.region, access.offset) {
            (Region::Bar(0), ADD) => Ok(self.state.read(sum)),
            _ => access.unhandled_read(),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        let addend = match (access.region, access.offset) {
            (Region::Bar(0), ADD) => value,
            (Region::Bar(0), GO) => {
                let mut bytes = [0; 8];
                self.bus.dma().read(value, &mut bytes)?;
                u64::from_le_bytes(bytes)
            }
            _ => return access.unhandled_write(value),
        };
        self.state.once(&access, |bytes| {
            let after = sum(bytes).wrapping_add(addend);
            bytes[..8].copy_from_slice(&after.to_le_bytes());
            after
        })?;
        self.bus.interrupts().raise(0)
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.state.update(|bytes| bytes.fill(0));
        Ok(())
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |sum| u64::from_le_bytes(*sum))
}

fn model(vectors: u16) -> PciModel {
    let builder = PciBuilder::new(1, 2).bar(0, Bar::memory32(0x1000));
    let builder = builder.bar(1, Bar::memory32(0x2000).mappable(0x1000..0x2000));
    let builder = builder.bar(2, Bar::memory32(0x1000));
    let msix = Msix::new(vectors).table(2, 0).pba(2, 0x800);
    builder.msix(msix).state(8).build().unwrap()
}

/// A server that can be ended in any way.
struct Life {
    stop: Stop,
    thread: JoinHandle<Result<Ended>>,
}

impl Life {
    fn begin(links: &Links) -> Self {
        let (link, stop) = (links.link().unwrap(), Stop::new().unwrap());
        let stopped = stop.clone();
        let thread = thread::spawn(move || serve(link, &stopped));
        Self { stop, thread }
    }

    fn join(self) -> Ended {
        self.thread.join().unwrap().unwrap()
    }

    fn end(self) {
        self.stop.stop();
        assert_eq!(self.join(), Ended::Stopped);
    }
}

fn serve(link: OwnedFd, stop: &Stop) -> Result<Ended> {
    let transport = SocketTransport::from_fd(link)?;
    let adder = |bus: &Bus| {
        let (state, bus) = (bus.state(), bus.clone());
        Ok(Adder { state, bus })
    };
    Server::new(model(2), transport, adder)?.run_until(stop)
}

/// Serves again and again, each server dying with its first request.
fn die_often(links: &Links, times: u32) {
    for _ in 0..times {
        let (link, stop) = (links.link().unwrap(), Stop::new().unwrap());
        stop.die_at(Moment::Taken);
        assert_eq!(serve(link, &stop).unwrap(), Ended::Abandoned);
    }
}

/// A supervisor in a thread of its own.
struct Supervised {
    links: Links,
    stop: Stop,
    thread: JoinHandle<(Counters, Ended)>,
}

impl Supervised {
    fn new(mut supervisor: Supervisor) -> Self {
        let (links, stop) = (supervisor.links(), Stop::new().unwrap());
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let ended = supervisor.run_until(&stopped).unwrap();
            (supervisor.counters(), ended)
        });
        Self {
            links,
            stop,
            thread,
        }
    }

    /// One for one client, with what is the client's of it.
    fn connected() -> (Self, OwnedFd) {
        let (own, other) = UnixStream::pair().unwrap();
        let supervisor = Supervisor::from_fd(own.into()).unwrap();
        (Self::new(supervisor), other.into())
    }

    fn end(self) -> Counters {
        self.stop.stop();
        self.thread.join().unwrap().0
    }
}

fn read(client: &Client) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(client.read(0, ADD, &mut bytes).unwrap(), 8);
    u64::from_le_bytes(bytes)
}

fn write(client: &Client, register: u64, value: u64) {
    let written = client.write(0, register, &value.to_le_bytes());
    assert_eq!(written.unwrap(), 8);
}

/// Lets the device master the bus.
fn enable(client: &Client) {
    client.write(7, 4, &[6, 0]).unwrap();
}

#[test]
fn client_works_as_without_a_supervisor() {
    let (supervised, socket) = Supervised::connected();
    let life = Life::begin(&supervised.links);

    let client = Options::new().open(socket).unwrap();
    write(&client, ADD, 5);

    assert_eq!(read(&client), 5);
    drop(client);
    assert_eq!(life.join(), Ended::Removed);
    assert_eq!(supervised.thread.join().unwrap().1, Ended::Removed);
}

#[test]
fn request_of_a_dead_server_is_done_once_by_the_next() {
    for moment in [Moment::Taken, Moment::Replying] {
        let (supervised, socket) = Supervised::connected();
        let first = Life::begin(&supervised.links);
        let client = Options::new().open(socket).unwrap();
        write(&client, ADD, 5);

        first.stop.die_at(moment);
        let links = supervised.links.clone();
        let second = thread::spawn(move || {
            assert_eq!(first.join(), Ended::Abandoned);
            Life::begin(&links)
        });
        write(&client, ADD, 7);

        assert_eq!(read(&client), 12, "{moment:?}");
        second.join().unwrap().end();
        let counters = supervised.end();
        assert_eq!((counters.attachments, counters.replays), (2, 1));
    }
}

#[test]
fn session_is_set_up_in_the_next_server() {
    let (supervised, socket) = Supervised::connected();
    let first = Life::begin(&supervised.links);
    let client = Options::new().open(socket).unwrap();
    enable(&client);
    let memory = ClientMemory::new(0x1000).unwrap();
    client
        .dma_map(0x10_0000, &memory, 0..0x1000, DmaAccess::ReadWrite)
        .unwrap();
    memory.write(0, &40_u64.to_le_bytes()).unwrap();
    let event = EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK).unwrap();
    let events = [Some(event.as_fd())];
    client
        .set_irqs(2, 0, IrqAction::Trigger, IrqData::EventFds(&events))
        .unwrap();
    client.write(7, 0x42, &[0, 0x80]).unwrap();
    let area = client.map(1, 0x1000).unwrap();
    area.write(8, 0x1234_u32).unwrap();
    write(&client, ADD, 2);
    first.end();

    let second = Life::begin(&supervised.links);
    write(&client, GO, 0x10_0000);

    assert_eq!(read(&client), 42);
    let mut word = [0; 4];
    client.read(1, 0x1008, &mut word).unwrap();
    assert_eq!(word, 0x1234_u32.to_le_bytes());
    second.end();
    supervised.end();
}

#[test]
fn memory_without_a_descriptor_is_reached_through_the_supervisor() {
    for twin in [false, true] {
        let (supervised, socket) = Supervised::connected();
        let first = Life::begin(&supervised.links);
        let client = Options::new().twin_socket(twin).open(socket).unwrap();
        assert_eq!(client.has_twin_socket(), twin);
        enable(&client);
        let memory = ClientMemory::new(0x1000).unwrap().unshared();
        memory.write(0, &3_u64.to_le_bytes()).unwrap();
        client
            .dma_map(0x10_0000, &memory, 0..0x1000, DmaAccess::ReadWrite)
            .unwrap();
        write(&client, GO, 0x10_0000);
        first.end();

        let second = Life::begin(&supervised.links);
        write(&client, GO, 0x10_0000);

        assert_eq!(read(&client), 6);
        second.end();
        supervised.end();
    }
}

/// A socket file that is gone with its folder.
fn listening() -> (Supervised, std::path::PathBuf) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("muser-supervise-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let supervisor = Supervisor::listen(&path, ListenOptions::new()).unwrap();
    (Supervised::new(supervisor), path)
}

#[test]
fn server_without_a_client_can_be_stopped_and_replaced() {
    let (supervised, path) = listening();
    let first = Life::begin(&supervised.links);
    let client = Client::connect(&path).unwrap();
    write(&client, ADD, 1);
    drop(client);
    // It is wound up by then.
    let client = Client::connect(&path).unwrap();
    assert_eq!(read(&client), 0);
    drop(client);

    first.end();
    let second = Life::begin(&supervised.links);
    assert_eq!(read(&Client::connect(&path).unwrap()), 0);
    second.end();
    supervised.end();
    assert!(!path.exists());
}

#[test]
fn several_and_posted_writes_are_done_once_each_and_in_order() {
    let (supervised, socket) = Supervised::connected();
    let first = Life::begin(&supervised.links);
    let client = Options::new().open(socket).unwrap();
    assert!(client.has_write_multi());
    let data = 1_u64.to_le_bytes();
    let one = RegionWrite {
        region: 0,
        offset: ADD,
        data: &data,
    };
    client.write_multi(&[one; 40]).unwrap();
    assert_eq!(read(&client), 40);

    first.stop.die_at(Moment::Replying);
    for _ in 0..10 {
        client.write_posted(0, ADD, &data).unwrap();
    }
    assert_eq!(first.join(), Ended::Abandoned);
    let links = supervised.links.clone();
    let second = thread::spawn(move || {
        die_often(&links, 3);
        Life::begin(&links)
    });
    client.write_multi(&[one; 300]).unwrap();

    assert_eq!(read(&client), 350);
    second.join().unwrap().end();
    supervised.end();
}

#[test]
fn request_that_ends_its_servers_is_refused_and_the_next_is_not() {
    let (supervised, socket) = Supervised::connected();
    let first = Life::begin(&supervised.links);
    let client = Options::new().open(socket).unwrap();
    first.end();

    let links = supervised.links.clone();
    let servers = thread::spawn(move || {
        die_often(&links, 64);
        Life::begin(&links)
    });
    let refused = client.write(0, ADD, &[1; 8]).unwrap_err();

    assert_eq!(refused.errno().number(), libc::EIO);
    let last = servers.join().unwrap();
    write(&client, ADD, 4);
    assert_eq!(read(&client), 4);
    last.end();
    supervised.end();
}

#[test]
fn request_that_nobody_answers_fails_in_time_and_the_session_goes_on() {
    let (own, other) = UnixStream::pair().unwrap();
    let mut supervisor = Supervisor::from_fd(own.into()).unwrap();
    supervisor.set_reattach_timeout(Duration::from_millis(50));
    let supervised = Supervised::new(supervisor);
    let first = Life::begin(&supervised.links);
    let client = Options::new().open(other.into()).unwrap();
    write(&client, ADD, 3);
    first.end();

    let began = Instant::now();
    let refused = client.write(0, ADD, &[1; 8]).unwrap_err();

    assert_eq!(refused.errno().number(), libc::ETIMEDOUT);
    assert!(began.elapsed() >= Duration::from_millis(50));
    let second = Life::begin(&supervised.links);
    // It may take longer to attach than requests wait.
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut bytes = [0; 8];
    while client.read(0, ADD, &mut bytes).is_err() {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(u64::from_le_bytes(bytes), 3);
    second.end();
    assert!(supervised.end().timeouts >= 1);
}

#[test]
fn server_of_another_device_is_refused_and_the_next_right_one_is_not() {
    let (supervised, socket) = Supervised::connected();
    let first = Life::begin(&supervised.links);
    let client = Options::new().open(socket).unwrap();
    write(&client, ADD, 3);
    first.end();

    let transport = SocketTransport::from_fd(supervised.links.link().unwrap()).unwrap();
    struct Null;
    impl Device for Null {}
    let other = PciBuilder::new(1, 2).bar(0, Bar::memory32(0x2000)).build();
    let refused = Server::new(other.unwrap(), transport, |_| Ok(Null)).unwrap_err();

    assert!(refused.is_refused(), "{refused}");
    assert_eq!(refused.errno().number(), libc::ESTALE);
    assert!(refused.to_string().contains("BAR 0"), "{refused}");
    let second = Life::begin(&supervised.links);
    let transport = SocketTransport::from_fd(supervised.links.link().unwrap()).unwrap();
    assert_eq!(read(&client), 3);
    let busy = Server::new(model(2), transport, |_| Ok(Null)).unwrap_err();
    assert!(busy.is_busy(), "{busy}");
    second.end();
    supervised.end();
}

#[test]
fn client_that_goes_while_no_server_is_there_is_wound_up_by_the_next() {
    let (supervised, path) = listening();
    let first = Life::begin(&supervised.links);
    let client = Client::connect(&path).unwrap();
    write(&client, ADD, 3);
    first.end();
    drop(client);

    let second = Life::begin(&supervised.links);

    assert_eq!(read(&Client::connect(&path).unwrap()), 0);
    second.end();
    supervised.end();
}

#[test]
fn second_client_is_turned_away_while_the_first_is_there() {
    let (supervised, path) = listening();
    let life = Life::begin(&supervised.links);
    let client = Client::connect(&path).unwrap();

    let refused = Client::connect(&path).unwrap_err();

    assert_eq!(refused.errno().number(), libc::EBUSY);
    write(&client, ADD, 3);
    assert_eq!(read(&client), 3);
    drop(client);
    drop(Client::connect(&path).unwrap());
    life.end();
    supervised.end();
}

/// Bytes of a message.
fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + payload.len()).unwrap();
    let mut bytes = [id.to_ne_bytes(), command.to_ne_bytes()].concat();
    bytes.extend([size, flags, 0].iter().flat_map(|word| word.to_ne_bytes()));
    bytes.extend(payload);
    bytes
}

#[test]
fn client_of_nonsense_is_sent_away_and_the_next_is_served() {
    use std::io::{Read, Write};
    let (supervised, path) = listening();
    let life = Life::begin(&supervised.links);
    let mut unaligned = message(0, 1, 0, &[0; 4]);
    unaligned[4] = 3;
    let nonsense = [
        unaligned,
        vec![0xff; 5000],
        message(0, 9, 0, &[]),
        message(1, 999, 0, &[7; 100]),
        [
            message(1, 1, 1, &[]),
            message(1, 11, 0, &[0; 16]),
            message(1, 12, 0x10, &[0; 3]),
        ]
        .concat(),
    ];
    for bytes in nonsense {
        // One that just goes away, and one that waits for what comes of it.
        for waits in [false, true] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(&bytes).unwrap();
            if waits {
                client.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                // It may be reset.
                let _ = client.read_to_end(&mut answer);
            }
        }
    }

    let client = Client::connect(&path).unwrap();
    write(&client, ADD, 3);
    assert_eq!(read(&client), 3);
    drop(client);
    life.end();
    supervised.end();
}

#[test]
fn server_of_nonsense_is_given_up_and_the_next_serves() {
    use nix::sys::socket::{send, MsgFlags};
    use std::os::fd::AsRawFd;
    let (supervised, socket) = Supervised::connected();
    let first = Life::begin(&supervised.links);
    let client = Options::new().open(socket).unwrap();
    write(&client, ADD, 3);
    first.end();

    for packet in [
        vec![0; 1],
        vec![0xff; 100],
        vec![1; 4000],
        [1_u32, 9, 0, 0, 0, 0].map(u32::to_ne_bytes).concat(),
    ] {
        let link = supervised.links.link().unwrap();
        send(link.as_raw_fd(), &packet, MsgFlags::empty()).unwrap();
        let mut refusal = [0; 4096];
        // It is refused, and its link closed.
        let mut ended = false;
        while !ended {
            ended = nix::unistd::read(&link, &mut refusal).unwrap() == 0;
        }
    }

    let second = Life::begin(&supervised.links);
    assert_eq!(read(&client), 3);
    second.end();
    supervised.end();
}
