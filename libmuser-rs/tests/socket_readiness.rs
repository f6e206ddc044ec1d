// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When the transport's descriptor is readable: when a turn would find something, and never while it
//! would not, so that nobody who waits for it turns in circles.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use libmuser::transport::{
    AttachOptions, Operation, Reply, Request, SocketTransport, Take, Token, Transport,
};
use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::Command;
use libmuser::{Bar, PciBuilder, Width};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use zerocopy::IntoBytes;

mod raw;

use raw::{access, Directory, RawClient};

/// A transport that is driven by hand, with a client.
struct Hand {
    transport: SocketTransport,
    data: Vec<u8>,
    directory: Directory,
}

impl Hand {
    fn new() -> Self {
        let directory = Directory::new();
        let path = directory.0.join("socket");
        let mut transport = SocketTransport::listen(&path, Default::default()).unwrap();
        let bar = Bar::memory32(0x4000)
            .ioeventfd(0x10, Width::Dword, None)
            .ioeventfd(0x20, Width::Dword, None);
        let model = PciBuilder::new(0x1234, 0x5678).bar(0, bar);
        let model = model.build().unwrap();
        transport
            .attach(model.description(), &AttachOptions::new())
            .unwrap();
        Self {
            transport,
            data: Vec::new(),
            directory,
        }
    }

    fn connect(&self) -> RawClient {
        RawClient::new(UnixStream::connect(self.directory.0.join("socket")).unwrap())
    }

    fn client(&mut self) -> RawClient {
        let mut client = self.connect();
        let data = b"{\"capabilities\":{\"max_msg_fds\":2}}\0";
        let version = payload::Version::default();
        client.send(Command::Version, &[version.as_bytes(), data]);
        self.settle();
        assert_eq!(client.receive().result(), Ok(()));
        client
    }

    fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.transport.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    fn take(&mut self) -> Option<Request> {
        self.transport
            .turn(None, Take::Ready, &mut self.data)
            .unwrap()
    }

    fn reply(&mut self, token: Token, len: usize) {
        self.data.clear();
        self.data.resize(len, 0);
        let reply = Reply {
            token,
            result: Ok(()),
        };
        let taken = self
            .transport
            .turn(Some(reply), Take::Nothing, &mut self.data);
        assert_eq!(taken.unwrap(), None);
    }

    /// Takes turns as long as the descriptor asks for it; nothing is to be had.
    fn settle(&mut self) {
        for _ in 0..100 {
            if !self.is_readable() {
                return;
            }
            assert_eq!(self.take(), None);
        }
        panic!("it is readable for ever");
    }

    fn expect(&mut self) -> Request {
        assert!(
            self.is_readable(),
            "there is something, and it does not say so"
        );
        (0..3).find_map(|_| self.take()).expect("nothing is there")
    }
}

fn read(client: &mut RawClient, len: usize) {
    client.send(Command::RegionRead, &[access(0, 0, len).as_bytes()]);
}

/// The eventfds which are writes to 0x10 and 0x20.
fn io_events(hand: &mut Hand, client: &mut RawClient) -> Vec<File> {
    let query = payload::RegionIoFds {
        argsz: 96,
        ..Default::default()
    };
    client.send(Command::DeviceGetRegionIoFds, &[query.as_bytes()]);
    hand.settle();
    let reply = client.receive();
    assert_eq!((reply.result(), reply.fds.len()), (Ok(()), 2));
    reply.fds.into_iter().map(File::from).collect()
}

fn signal(mut event: &File) {
    event.write_all(&1_u64.to_ne_bytes()).unwrap();
}

fn write(offset: u64) -> Operation {
    Operation::Write { region: 0, offset }
}

const RESET: Operation = Operation::Reset { close: false };

#[test]
fn signal_before_a_reset_is_a_write_before_it() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    let events = io_events(&mut hand, &mut client);

    signal(&events[0]);
    client.send(Command::DeviceReset, &[]);

    let first = hand.expect();
    assert_eq!(first.operation, write(0x10));
    hand.settle();
    hand.reply(first.token, 0);
    let second = hand.expect();
    assert_eq!(second.operation, RESET);
    hand.reply(second.token, 0);
    assert_eq!(client.receive().result(), Ok(()));
    hand.settle();
}

#[test]
fn reset_that_waits_is_not_passed_by_signals() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    let events = io_events(&mut hand, &mut client);
    signal(&events[0]);
    let first = hand.expect();
    client.send(Command::DeviceReset, &[]);
    hand.settle();

    signal(&events[1]);
    signal(&events[0]);
    hand.settle();
    hand.reply(first.token, 0);

    let reset = hand.expect();
    assert_eq!(reset.operation, RESET);
    hand.settle();
    hand.reply(reset.token, 0);
    let mut writes: Vec<_> = (0..2).map(|_| hand.expect().operation).collect();
    writes.sort_by_key(|operation| format!("{operation:?}"));
    assert_eq!(writes, [write(0x10), write(0x20)]);
    assert!(!hand.is_readable());
}

#[test]
fn client_that_says_nothing_is_nothing() {
    let mut hand = Hand::new();
    assert!(!hand.is_readable());

    let _client = hand.client();
    assert!(!hand.is_readable());
    let _silent = hand.connect();
    assert!(hand.is_readable());
    hand.settle();
}

#[test]
fn what_has_come_with_the_command_before_shows() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    read(&mut client, 4);
    read(&mut client, 4);

    hand.expect();
    hand.expect();
    assert!(!hand.is_readable());
}

#[test]
fn what_waits_for_a_posted_write_does_not_show_before_that_has_ended() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    client.post(0, 0, &[0; 4]);
    let write = hand.expect();

    for _ in 0..3 {
        read(&mut client, 4);
        hand.settle();
    }
    hand.reply(write.token, 0);

    for _ in 0..3 {
        hand.expect();
    }
    assert!(!hand.is_readable());
}

#[test]
fn what_waits_for_accesses_does_not_show_before_they_have_ended() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    read(&mut client, 4);
    read(&mut client, 4);
    let first = hand.expect();
    let second = hand.expect();

    client.send(Command::DeviceReset, &[]);
    hand.settle();
    read(&mut client, 4);
    hand.settle();
    hand.reply(first.token, 4);
    hand.settle();
    hand.reply(second.token, 4);

    let reset = hand.expect();
    assert_eq!(reset.operation, Operation::Reset { close: false });
    hand.settle();
    hand.reply(reset.token, 0);
    hand.expect();
}

#[test]
fn client_that_has_gone_does_not_show_before_its_accesses_have_ended() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    read(&mut client, 4);
    let first = hand.expect();
    drop(client);
    hand.settle();
    let mut next = hand.connect();
    next.send(Command::Version, &[payload::Version::default().as_bytes()]);
    hand.settle();

    hand.reply(first.token, 4);

    let reset = hand.expect();
    assert_eq!(reset.operation, Operation::Reset { close: true });
    hand.settle();
    hand.reply(reset.token, 0);
    assert!(hand.is_readable());
    hand.settle();
    assert_eq!(next.receive().result(), Ok(()));
}

#[test]
fn client_that_comes_when_another_one_goes_is_never_turned_away() {
    let mut hand = Hand::new();
    for round in 0..130 {
        let client = hand.client();
        for _ in 0..round % 64 {
            assert_eq!(hand.take(), None);
        }
        drop(client);
        let mut next = hand.connect();
        next.send(Command::Version, &[payload::Version::default().as_bytes()]);

        let reset = hand.expect();
        hand.reply(reset.token, 0);
        hand.settle();

        assert_eq!(next.receive().result(), Ok(()), "round {round}");
        drop(next);
        let reset = hand.expect();
        hand.reply(reset.token, 0);
        hand.settle();
    }
}

#[test]
fn client_that_has_gone_behind_a_posted_write_does_not_show() {
    let mut hand = Hand::new();
    let client = {
        let mut client = hand.client();
        client.post(0, 0, &[0; 4]);
        client.post(0, 4, &[0; 4]);
        client
    };
    let first = hand.expect();
    drop(client);
    hand.settle();

    hand.reply(first.token, 0);
    let second = hand.expect();
    hand.settle();
    hand.reply(second.token, 0);
    let reset = hand.expect();
    assert_eq!(reset.operation, Operation::Reset { close: true });
}

#[test]
fn client_that_does_not_receive_is_not_asked_and_not_lost() {
    let mut hand = Hand::new();
    let mut client = hand.client();
    let mut sent = 0;
    let mut replied = 0;
    // Until its socket takes no more.
    loop {
        read(&mut client, 0x4000);
        sent += 1;
        assert!(hand.is_readable());
        let Some(request) = hand.take() else {
            break;
        };
        hand.reply(request.token, 0x4000);
        replied += 1;
        assert!(replied < 10_000, "the replies go nowhere");
    }
    hand.settle();
    for _ in 0..10 {
        read(&mut client, 0x4000);
        sent += 1;
        hand.settle();
    }

    let receiver = RawClient::new(client.socket.try_clone().unwrap());
    let received = std::thread::spawn(move || {
        for _ in 0..sent {
            assert_eq!(receiver.receive().payload.len(), 16 + 0x4000);
        }
    });
    while replied < sent {
        let mut fds = [PollFd::new(hand.transport.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(raw::DEADLINE).unwrap();
        assert_eq!(poll(&mut fds, timeout), Ok(1), "{replied} of {sent}");
        if let Some(request) = hand.take() {
            hand.reply(request.token, 0x4000);
            replied += 1;
        }
    }
    while !received.is_finished() {
        hand.take();
    }
    received.join().unwrap();
}
