// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients come and go; one is served at a time, and nothing of it is left for the next.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::Instant;

use libmuser::transport::{ListenOptions, SocketTransport};
use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::{max_message, Command, Header};
use libmuser::{Bar, Device, Ended, PciBuilder, PciModel, Region, Reset, Server};
use zerocopy::IntoBytes;

mod common;
mod raw;

use common::{Event, Recorder};
use raw::{access, memfd, Directory, Listening, RawClient, DEADLINE};

struct Null;
impl Device for Null {}

fn model() -> PciModel {
    let bar = Bar::memory32(0x2000).mappable(0x1000..0x2000);
    PciBuilder::new(0x1234, 0x5678).bar(0, bar).build().unwrap()
}

fn start() -> (Recorder, Listening) {
    let recorder = Recorder::default();
    let device = recorder.clone();
    let server = Listening::start(model(), move |bus| {
        *device.bus.lock().unwrap() = Some(bus.clone());
        Ok(device)
    });
    (recorder, server)
}

fn region_file(client: &mut RawClient) -> File {
    let query = payload::RegionInfo {
        argsz: 32,
        ..Default::default()
    };
    let mut reply = client.call(Command::DeviceGetRegionInfo, &[query.as_bytes()]);
    File::from(reply.fds.remove(0))
}

#[test]
fn client_that_goes_leaves_a_device_that_is_reset() {
    let (recorder, server) = start();
    let mut client = server.client();
    client.write(0, 0x1000, &[7]).unwrap();
    client
        .dma_map(0x10000, 4096, 3, Some((&memfd(4096), 0)))
        .unwrap();
    let old = region_file(&mut client);
    drop(client);

    let mut client = server.client();

    assert_eq!(client.read(0, 0x1000, 1), Ok(vec![0]));
    assert_eq!(recorder.take_events(), [Event::Reset(Reset::Close)]);
    assert!(client.dma_unmap(0x10000, 4096).is_err());
    // What the old client has kept is not what the new one has.
    old.write_all_at(&[9], 0x1000).unwrap();
    assert_eq!(client.read(0, 0x1000, 1), Ok(vec![0]));
    client.write(0, 0x1001, &[5]).unwrap();
    let mut bytes = [0; 2];
    old.read_exact_at(&mut bytes, 0x1000).unwrap();
    assert_eq!(bytes, [9, 0]);
    region_file(&mut client)
        .read_exact_at(&mut bytes, 0x1000)
        .unwrap();
    assert_eq!(bytes, [0, 5]);
    let memory = recorder.bus().memory(Region::Bar(0), 0x1000).unwrap();
    assert_eq!(memory.read::<u8>(1).unwrap(), 5);
}

#[test]
fn writes_that_were_posted_before_the_end_are_made() {
    let (recorder, server) = start();
    let mut client = server.client();
    for at in 0..100 {
        client.post(0, 0x10, &[at; 4]);
    }
    drop(client);

    let mut client = server.client();
    client.read(0, 0, 1).unwrap();

    let events = recorder.take_events();
    assert_eq!(events.len(), 102);
    assert_eq!(events[100], Event::Reset(Reset::Close));
}

#[test]
fn who_connects_and_goes_without_a_word_resets_nothing() {
    let (recorder, server) = start();
    for _ in 0..3 {
        drop(server.connect());
    }

    server.client().read(0, 0x20, 1).unwrap();

    assert_eq!(recorder.take_events(), [Event::Read(0x20, 1)]);
}

#[test]
fn second_client_is_told_that_there_is_one() {
    let (_recorder, server) = start();
    let mut first = server.client();

    for _ in 0..3 {
        let mut second = server.connect();
        let version = payload::Version::default();
        let reply = second.call(Command::Version, &[version.as_bytes()]);
        assert_eq!(reply.result(), Err(libc::EBUSY));
        second.wait_closed();
    }

    assert!(first.read(0, 0, 1).is_ok());
    drop(first);
    assert!(server.client().read(0, 0, 1).is_ok());
}

#[test]
fn silent_second_clients_keep_nobody_out() {
    let (_recorder, server) = start();
    let mut first = server.client();
    let silent: Vec<_> = (0..40).map(|_| server.connect()).collect();

    let mut second = server.connect();
    let version = payload::Version::default();
    let reply = second.call(Command::Version, &[version.as_bytes()]);

    assert_eq!(reply.result(), Err(libc::EBUSY));
    assert!(first.read(0, 0, 1).is_ok());
    drop((first, silent));
    assert!(server.client().read(0, 0, 1).is_ok());
}

#[test]
fn message_out_of_step_is_the_end_of_its_session_only() {
    let (_recorder, server) = start();
    for size in [
        0,
        15,
        u32::try_from(max_message(1 << 20)).unwrap() + 1,
        u32::MAX,
    ] {
        let mut client = server.client();
        let header = Header {
            size,
            ..client.header(Command::RegionRead)
        };
        client.send_bytes(header.as_bytes(), &[]);
        client.wait_closed();
    }
    assert!(server.client().read(0, 0, 1).is_ok());
}

#[test]
fn message_of_single_bytes_and_messages_in_one_piece_are_the_same() {
    let (recorder, server) = start();
    let mut client = server.client();
    let mut bytes = Vec::new();
    for at in 0..3 {
        let header = client.header(Command::RegionRead);
        libmuser::vfio_user::wire::put(&mut bytes, header, &[access(0, at, 1).as_bytes()]).unwrap();
    }

    client.send_bytes(&bytes, &[]);
    for _ in 0..3 {
        assert_eq!(client.receive().result(), Ok(()));
    }
    for byte in bytes {
        client.send_bytes(&[byte], &[]);
    }
    for _ in 0..3 {
        assert_eq!(client.receive().result(), Ok(()));
    }

    let read = [Event::Read(0, 1), Event::Read(1, 1), Event::Read(2, 1)];
    assert_eq!(recorder.take_events(), [read.clone(), read].concat());
}

#[test]
fn largest_messages_in_both_directions_do_not_wait_for_each_other() {
    let (_recorder, server) = start();
    let mut client = server.client();
    let data = vec![7; 0x2000];
    let rounds = 500;

    // Nothing is received before all is sent: the replies are more than any socket takes.
    let sender = RawClient::new(client.socket.try_clone().unwrap());
    let (done, sent) = mpsc::channel();
    std::thread::spawn(move || {
        let mut sender = sender;
        for _ in 0..rounds {
            sender.send(
                Command::RegionWrite,
                &[access(0, 0, 0x2000).as_bytes(), &data],
            );
            sender.send(Command::RegionRead, &[access(0, 0, 0x2000).as_bytes()]);
        }
        done.send(()).unwrap();
    });
    sent.recv_timeout(DEADLINE).unwrap();

    for _ in 0..rounds {
        assert_eq!(client.receive().payload.len(), 16);
        assert_eq!(client.receive().payload.len(), 16 + 0x2000);
    }
    assert!(client.read(0, 0, 1).is_ok());
}

#[test]
fn socket_file_has_its_mode_and_goes_with_the_server() {
    let directory = Directory::new();
    let path = directory.0.join("socket");
    let options = ListenOptions::new().mode(0o660);
    let transport = SocketTransport::listen(&path, options).unwrap();
    let server = Server::new(model(), transport, |_| Ok(Null)).unwrap();

    let mode = path.symlink_metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn socket_file_of_another_server_stays() {
    let directory = Directory::new();
    let path = directory.0.join("socket");
    let transport = SocketTransport::listen(&path, ListenOptions::new()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    let inode = path.symlink_metadata().unwrap().ino();

    drop(transport);

    assert_eq!(path.symlink_metadata().unwrap().ino(), inode);
}

#[test]
fn stale_socket_file_is_replaced_and_others_are_refused() {
    let directory = Directory::new();
    let path = directory.0.join("socket");
    drop(UnixListener::bind(&path).unwrap());
    let transport = SocketTransport::listen(&path, ListenOptions::new()).unwrap();

    let error = SocketTransport::listen(&path, ListenOptions::new()).unwrap_err();
    assert!(error.is_refused(), "{error}");
    drop(transport);

    std::fs::write(&path, "something").unwrap();
    let error = SocketTransport::listen(&path, ListenOptions::new()).unwrap_err();
    assert!(error.is_refused(), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"something");

    let long = directory.0.join("x".repeat(200));
    assert!(SocketTransport::listen(&long, ListenOptions::new()).is_err());
}

#[test]
fn connection_that_was_handed_over_is_served_to_its_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let transport = SocketTransport::from_fd(theirs.into()).unwrap();
    let recorder = Recorder::default();
    let device = recorder.clone();
    let mut server = Server::new(model(), transport, |_| Ok(device)).unwrap();
    let (sender, ended) = mpsc::channel();
    std::thread::spawn(move || sender.send(server.run()));

    let mut client = RawClient::new(ours);
    client.negotiate();
    assert!(client.read(0, 0x20, 1).is_ok());
    drop(client);

    let ended = ended.recv_timeout(DEADLINE).unwrap();
    assert_eq!(ended.unwrap(), Ended::Removed);
    let close = Event::Reset(Reset::Close);
    assert_eq!(recorder.take_events(), [Event::Read(0x20, 1), close]);
}

#[test]
fn listening_socket_that_was_handed_over_is_served() {
    let directory = Directory::new();
    let path = directory.0.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let transport = SocketTransport::from_fd(listener.into()).unwrap();
    let mut server = Server::new(model(), transport, |_| Ok(Null)).unwrap();
    std::thread::spawn(move || server.run());

    for _ in 0..2 {
        let mut client = RawClient::new(UnixStream::connect(&path).unwrap());
        client.negotiate();
        assert!(client.read(0, 0, 1).is_ok());
    }
    assert!(path.exists());
}

#[test]
fn descriptor_that_is_no_such_socket_is_refused() {
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let fds: [OwnedFd; 3] = [memfd(10).into(), datagram.into(), tcp.into()];
    for fd in fds {
        let error = SocketTransport::from_fd(fd).unwrap_err();
        assert!(error.is_refused(), "{error}");
    }
}

#[test]
fn server_without_a_client_has_nothing_to_do() {
    let directory = Directory::new();
    let path = directory.0.join("socket");
    let transport = SocketTransport::listen(&path, ListenOptions::new()).unwrap();
    let mut server = Server::new(model(), transport, |_| Ok(Null)).unwrap();
    let readable = |server: &Server<Null>| {
        use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
        let mut fds = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    };
    assert!(!readable(&server));
    let process = |server: &mut Server<Null>| {
        let deadline = Instant::now() + DEADLINE;
        while readable(server) {
            assert!(Instant::now() < deadline, "it has something to do for ever");
            server.process().unwrap();
        }
    };

    // Three that are answered here, and one that the device is asked, in one piece.
    let mut client = RawClient::new(UnixStream::connect(&path).unwrap());
    assert!(readable(&server));
    let version = payload::Version::default();
    client.send(Command::Version, &[version.as_bytes()]);
    for _ in 0..3 {
        client.send(Command::RegionRead, &[access(0, 0, 1).as_bytes()]);
    }
    process(&mut server);
    for _ in 0..4 {
        assert_eq!(client.receive().result(), Ok(()));
    }
    drop(client);
    assert!(readable(&server));
    process(&mut server);
}
