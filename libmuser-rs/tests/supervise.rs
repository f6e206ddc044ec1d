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

    /// Dies with the next request.
    fn dying(links: &Links, moment: Moment) -> Self {
        let life = Self::begin(links);
        life.stop.die_at(moment);
        life
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
