// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is in the device at the same time over the socket, and what waits for what; many devices in
//! one thread.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use libmuser::transport::{ListenOptions, SocketTransport};
use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::Command;
use libmuser::{
    Access, Bar, Device, Ended, PciBuilder, PciModel, Poller, Reset, Result, Server, SharedDevice,
    SharedServer, Stop,
};
use zerocopy::IntoBytes;

mod raw;

use raw::{access, Directory, RawClient, DEADLINE};

/// What happens in the device, and up to where it may go.
#[derive(Default)]
struct Scene {
    events: Mutex<Vec<Event>>,
    changed: Condvar,
    open: Mutex<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Begin(u64),
    End(u64),
    Reset,
}

/// An access from this offset on stays in the device until the scene is opened.
const STAYS: u64 = 0x800;
/// Reads of this offset wait for each other.
const MEETS: u64 = 0x400;

impl Scene {
    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        self.changed.notify_all();
    }

    fn wait_for(&self, event: Event) {
        let events = self.events.lock().unwrap();
        let absent = |events: &mut Vec<Event>| !events.contains(&event);
        let waited = self.changed.wait_timeout_while(events, DEADLINE, absent);
        let timeout = waited.unwrap().1;
        assert!(!timeout.timed_out(), "{event:?} did not happen");
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn happened(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}

struct Actor {
    scene: Arc<Scene>,
    meeting: Barrier,
}

impl Actor {
    fn act(&self, offset: u64) {
        self.scene.note(Event::Begin(offset));
        if offset == MEETS {
            self.meeting.wait();
        }
        if offset >= STAYS {
            let open = self.scene.open.lock().unwrap();
            let shut = |open: &mut bool| !*open;
            let waited = self.scene.changed.wait_timeout_while(open, DEADLINE, shut);
            assert!(!waited.unwrap().1.timed_out());
        }
        self.scene.note(Event::End(offset));
    }
}

impl SharedDevice for Actor {
    fn read(&self, access: Access) -> Result<u64> {
        self.act(access.offset);
        Ok(access.offset)
    }

    fn write(&self, access: Access, _value: u64) -> Result<()> {
        self.act(access.offset);
        Ok(())
    }

    fn reset(&self, _reset: Reset) -> Result<()> {
        self.scene.note(Event::Reset);
        Ok(())
    }
}

fn model() -> PciModel {
    let bar = Bar::memory32(0x1000);
    PciBuilder::new(0x1234, 0x5678).bar(0, bar).build().unwrap()
}

struct Stage {
    scene: Arc<Scene>,
    stop: Stop,
    serving: Option<thread::JoinHandle<Result<Ended>>>,
    _directory: Directory,
    path: std::path::PathBuf,
}

impl Stage {
    fn new(threads: usize) -> (RawClient, Self) {
        let scene = Arc::new(Scene::default());
        let actor = Actor {
            scene: Arc::clone(&scene),
            meeting: Barrier::new(2),
        };
        let directory = Directory::new();
        let path = directory.0.join("socket");
        let transport = SocketTransport::listen(&path, ListenOptions::new()).unwrap();
        let mut server = SharedServer::new(model(), transport, threads, |_| Ok(actor)).unwrap();
        let stop = Stop::new().unwrap();
        let stopped = stop.clone();
        let stage = Self {
            scene,
            stop,
            serving: Some(thread::spawn(move || server.run_until(&stopped))),
            _directory: directory,
            path,
        };
        (stage.client(), stage)
    }

    fn client(&self) -> RawClient {
        let mut client = RawClient::new(UnixStream::connect(&self.path).unwrap());
        client.negotiate();
        client
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.scene.open();
        self.stop.stop();
        if let Some(serving) = self.serving.take() {
            let ended = serving.join().unwrap().unwrap();
            assert_eq!(ended, Ended::Stopped);
        }
    }
}

fn read(client: &mut RawClient, offset: u64) -> u16 {
    client.send(Command::RegionRead, &[access(0, offset, 4).as_bytes()])
}

/// Waits until the other side has received everything that was sent.
fn wait_received(client: &RawClient) {
    use std::os::fd::AsRawFd;
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut left: libc::c_int = 0;
        // SAFETY: The ioctl writes an `int` to where the pointer leads.
        let result =
            unsafe { libc::ioctl(client.socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
        assert_eq!(result, 0);
        if left == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{left} bytes are not received");
        thread::yield_now();
    }
}

#[test]
fn accesses_of_one_client_are_in_the_device_at_the_same_time() {
    let (mut client, _stage) = Stage::new(3);

    // Neither comes back without the other.
    let ids = [read(&mut client, MEETS), read(&mut client, MEETS)];

    let mut replies = [client.receive().header.id, client.receive().header.id];
    replies.sort_unstable();
    assert_eq!(replies, ids);
}

#[test]
fn replies_come_as_the_device_has_them() {
    let (mut client, stage) = Stage::new(2);

    let first = read(&mut client, STAYS);
    stage.scene.wait_for(Event::Begin(STAYS));
    let second = read(&mut client, 0x10);

    assert_eq!(client.receive().header.id, second);
    stage.scene.open();
    assert_eq!(client.receive().header.id, first);
}

#[test]
fn nothing_behind_a_posted_write_begins_before_it_has_ended() {
    let (mut client, stage) = Stage::new(4);

    client.post(0, STAYS, &[0; 4]);
    client.post(0, 0x20, &[0; 4]);
    read(&mut client, 0x10);
    stage.scene.wait_for(Event::Begin(STAYS));
    wait_received(&client);
    assert_eq!(stage.scene.happened(), [Event::Begin(STAYS)]);
    stage.scene.open();
    client.receive();

    let [one, two, three] = [STAYS, 0x20, 0x10].map(|at| [Event::Begin(at), Event::End(at)]);
    assert_eq!(stage.scene.happened(), [one, two, three].concat());
}

#[test]
fn reset_begins_when_what_was_before_has_ended_and_nothing_passes_it() {
    let (mut client, stage) = Stage::new(4);

    let first = read(&mut client, STAYS);
    let reset = client.send(Command::DeviceReset, &[]);
    let last = read(&mut client, 0x10);
    stage.scene.wait_for(Event::Begin(STAYS));
    wait_received(&client);
    stage.scene.open();

    let ids = [(); 3].map(|()| client.receive().header.id);
    assert_eq!(ids, [first, reset, last]);
    let [one, two] = [STAYS, 0x10].map(|at| [Event::Begin(at), Event::End(at)]);
    assert_eq!(
        stage.scene.happened(),
        [&one[..], &[Event::Reset], &two].concat()
    );
}

#[test]
fn mappings_and_interrupts_are_changed_when_what_was_before_has_ended() {
    let (mut client, stage) = Stage::new(4);
    let map = payload::DmaMap {
        argsz: 32,
        flags: 3,
        offset: 0,
        address: 0,
        size: 4096,
    };
    let unmap = payload::DmaUnmap {
        argsz: 24,
        flags: 0,
        address: 0,
        size: 4096,
    };

    let mut ids = vec![read(&mut client, STAYS)];
    ids.push(client.send(Command::DmaMap, &[map.as_bytes()]));
    ids.push(client.send(Command::DmaUnmap, &[unmap.as_bytes()]));
    ids.push(client.send(Command::DeviceSetIrqs, &[&[0; 20]]));
    ids.push(read(&mut client, 0x10));
    stage.scene.wait_for(Event::Begin(STAYS));
    wait_received(&client);
    stage.scene.open();

    let replies: Vec<_> = ids.iter().map(|_| client.receive().header.id).collect();
    assert_eq!(replies, ids);
}

#[test]
fn client_that_goes_is_wound_up_when_its_accesses_have_ended() {
    let (mut client, stage) = Stage::new(3);
    read(&mut client, STAYS);
    stage.scene.wait_for(Event::Begin(STAYS));
    drop(client);

    // It waits, rather than being turned away.
    let mut next = RawClient::new(UnixStream::connect(&stage.path).unwrap());
    let version = payload::Version::default();
    next.send(Command::Version, &[version.as_bytes()]);
    stage.scene.open();

    assert_eq!(next.receive().result(), Ok(()));
    let happened = stage.scene.happened();
    assert_eq!(
        happened,
        [Event::Begin(STAYS), Event::End(STAYS), Event::Reset]
    );
}

#[test]
fn many_threads_and_a_client_that_never_waits_lose_nothing() {
    let (mut client, _stage) = Stage::new(4);
    const ROUNDS: u64 = 300;
    for _ in 0..3 {
        let mut ids: Vec<_> = (0..ROUNDS)
            .map(|at| match at % 7 {
                3 => client.send(Command::DeviceReset, &[]),
                _ => read(&mut client, at % 0x100 * 4),
            })
            .collect();
        let mut replies: Vec<_> = ids.iter().map(|_| client.receive().header.id).collect();
        ids.sort_unstable();
        replies.sort_unstable();
        assert_eq!(replies, ids);
    }
}

/// Answers with a number of its own.
struct Numbered(u64);

impl Device for Numbered {
    fn read(&mut self, _access: Access) -> Result<u64> {
        Ok(self.0)
    }
}

#[test]
fn one_thread_serves_many_sockets() {
    const DEVICES: u64 = 120;
    let poller = Poller::new().unwrap();
    let stop = Stop::new().unwrap();
    let mut clients = Vec::new();
    for number in 0..DEVICES {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let transport = SocketTransport::from_fd(theirs.into()).unwrap();
        let server = Server::new(model(), transport, |_| Ok(Numbered(number))).unwrap();
        poller.add(server).unwrap();
        clients.push(RawClient::new(ours));
    }
    let (serving, stopped) = (poller.clone(), stop.clone());
    let (sender, ends) = std::sync::mpsc::channel();
    let thread =
        thread::spawn(move || serving.run_until(&stopped, |_, ended| sender.send(ended).unwrap()));

    for client in &mut clients {
        client.negotiate();
    }
    // More than one turn's worth at each, all at once.
    for client in &mut clients {
        for _ in 0..50 {
            read(client, 0);
        }
    }
    for (client, number) in clients.iter_mut().zip(0_u64..) {
        for _ in 0..50 {
            let reply = client.receive();
            assert_eq!(reply.payload[16..], number.to_le_bytes()[..4]);
        }
    }
    drop(clients);

    for _ in 0..DEVICES {
        let ended = ends.recv_timeout(DEADLINE).unwrap().unwrap();
        assert_eq!(ended, Ended::Removed);
    }
    assert!(poller.is_empty());
    stop.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn server_that_is_polled_busily_answers() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let transport = SocketTransport::from_fd(theirs.into()).unwrap();
    let mut server = Server::new(model(), transport, |_| Ok(Numbered(7))).unwrap();
    let polling = thread::spawn(move || loop {
        match server.process() {
            Ok(_) => std::hint::spin_loop(),
            Err(error) => return error.is_removed(),
        }
    });

    let mut client = RawClient::new(ours);
    client.negotiate();
    for _ in 0..100 {
        assert_eq!(client.read(0, 0, 1), Ok(vec![7]));
    }
    drop(client);

    assert!(polling.join().unwrap());
}
