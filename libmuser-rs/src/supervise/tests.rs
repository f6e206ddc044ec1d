// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hostile programs and clients. Everything is in one thread: the supervisor takes its turns until it
//! has nothing more to do, so what a turn leaves is what there is.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::*;
use crate::transport::Description;
use crate::vfio_user::capabilities::Capabilities;
use crate::vfio_user::control::{self, Attach, Packet, Received};
use crate::vfio_user::link::Prefix;
use crate::vfio_user::stream::{split, Limits, Receiver, Sender};
use crate::vfio_user::wire::payload::RegionAccess;
use crate::vfio_user::wire::{max_message, Command, Header, Kind};

const LIMITS: Limits = Limits {
    message: max_message(1 << 20),
    descriptors: 253,
    prefix: 0,
    backlog: usize::MAX,
};

/// A socket of a client or a program, in the hands of a test.
struct Peer {
    sender: Sender,
    receiver: Receiver,
    prefixed: bool,
}

impl Peer {
    fn new(socket: OwnedFd, prefixed: bool) -> Self {
        let prefix = if prefixed { Prefix::SIZE } else { 0 };
        let (sender, receiver) = split(socket, Limits { prefix, ..LIMITS });
        Self {
            sender,
            receiver,
            prefixed,
        }
    }

    fn send(&mut self, number: u64, header: Header, payload: &[u8]) {
        let prefix = Prefix { number, flags: 0 };
        let prefix = self.prefixed.then_some(prefix);
        link::send(&mut self.sender, prefix, header, payload, &[]).unwrap();
    }

    /// The next message: its number, header and payload.
    fn receive(&mut self) -> Option<(u64, Header, Vec<u8>)> {
        let message = self.receiver.receive().ok()??;
        let number = message.prefix().first_chunk().copied();
        let number = number.map_or(0, u64::from_ne_bytes);
        let header = Header::parse(message.header()).unwrap();
        Some((number, header, message.body().to_vec()))
    }

    fn is_closed(&mut self) -> bool {
        while let Ok(message) = self.receiver.receive() {
            if message.is_none() {
                return false;
            }
        }
        true
    }
}

/// A supervisor with its client, which has agreed upon a version with a first program.
struct Stage {
    supervisor: Supervisor,
    client: Peer,
    control: OwnedFd,
    program: Peer,
}

fn version() -> Vec<u8> {
    let mut payload = vec![0; 4];
    payload.extend(Capabilities::default().to_data());
    payload
}

fn attach() -> Attach {
    Attach {
        description: Description {
            regions: Vec::new(),
            irqs: Vec::new(),
            io_events: Vec::new(),
        },
        state_size: 1,
        state_tag: 7,
        standby: true,
    }
}

/// Lets the supervisor do all there is to do.
fn settle(supervisor: &mut Supervisor) {
    for _ in 0..20 {
        supervisor.turn(Some(Duration::ZERO), &[]).unwrap();
    }
}

/// A program that attaches, and answers what sets it up.
fn seat(supervisor: &mut Supervisor) -> (OwnedFd, Option<Peer>) {
    let control = supervisor.links().link().unwrap();
    control::send(control.as_fd(), &Packet::Attach(attach()), &[]).unwrap();
    settle(supervisor);
    let mut program = None;
    while let Received::Packet(packet, mut descriptors) = control::receive(control.as_fd()) {
        match packet {
            Packet::Attached(attached) if !attached.recovered => {
                let state = std::fs::File::open("/dev/null").unwrap();
                control::send(control.as_fd(), &Packet::Memory, &[state.as_fd()]).unwrap();
            }
            Packet::Attached(_) => {}
            Packet::Session { setup } => {
                let mut peer = Peer::new(descriptors.remove(0), true);
                settle(supervisor);
                for _ in 0..setup {
                    let (number, header, payload) = peer.receive().unwrap();
                    peer.send(number, header.reply(Ok(())), &payload);
                }
                program = Some(peer);
            }
            packet => panic!("{packet:?}"),
        }
    }
    settle(supervisor);
    (control, program)
}

impl Stage {
    fn new() -> Self {
        let (own, other) = UnixStream::pair().unwrap();
        let mut supervisor = Supervisor::from_fd(own.into()).unwrap();
        let mut client = Peer::new(other.into(), false);
        settle(&mut supervisor);
        let (control, program) = seat(&mut supervisor);
        let mut program = program.unwrap();
        client.send(0, Header::command(1, Command::Version), &version());
        settle(&mut supervisor);
        let (number, header, payload) = program.receive().unwrap();
        program.send(number, header.reply(Ok(())), &payload);
        settle(&mut supervisor);
        assert_eq!(client.receive().unwrap().2, version());
        Self {
            supervisor,
            client,
            control,
            program,
        }
    }

    /// The client asks for something.
    fn ask(&mut self, id: u16) {
        let access = RegionAccess {
            offset: 0,
            region: 7,
            count: 4,
        };
        let header = Header::command(id, Command::RegionRead);
        self.client.send(0, header, access.as_bytes());
        settle(&mut self.supervisor);
    }

    /// Another program answers what the client has asked for, and the client gets it.
    fn next_program_answers(&mut self, id: u16) {
        assert!(!self.supervisor.is_served());
        let (control, program) = seat(&mut self.supervisor);
        let mut program = program.unwrap();
        let (number, header, _) = program.receive().unwrap();
        program.send(number, header.reply(Ok(())), &[9; 20]);
        settle(&mut self.supervisor);
        let (_, header, payload) = self.client.receive().unwrap();
        assert_eq!((header.id, payload), (id, vec![9; 20]));
        self.control = control;
        self.program = program;
    }
}

#[test]
fn program_that_makes_no_sense_on_its_stream_is_replaced() {
    type Misdeed = fn(&mut Peer, u64, Header);
    let misdeeds: [Misdeed; 9] = [
        |program, number, header| program.send(number ^ 1, header.reply(Ok(())), &[]),
        |program, number, header| program.send(number + (1 << 16), header.reply(Ok(())), &[]),
        |program, _, header| program.send(0, header.reply(Ok(())), &[]),
        |program, number, header| {
            let header = Header::command(header.id, Command::DmaMap);
            program.send(number, header.reply(Ok(())), &[]);
        },
        |program, number, header| program.send(number, header, &[]),
        |program, _, header| {
            let header = Header { flags: 9, ..header };
            program.send(0, header, &[]);
        },
        |program, _, _| program.send(0, Header::command(0, Command::Version), &[]),
        |program, _, _| {
            for id in 0..1200 {
                program.send(0, Header::command(id, Command::DmaRead), &[0; 16]);
            }
        },
        |program, _, _| {
            let _ = program.sender.send(&[&[0xff; 64]], &[]).unwrap();
        },
    ];
    for (at, misdeed) in misdeeds.into_iter().enumerate() {
        let mut stage = Stage::new();
        stage.ask(5);
        let (number, header, _) = stage.program.receive().unwrap();

        misdeed(&mut stage.program, number, header);
        for _ in 0..20 {
            settle(&mut stage.supervisor);
            let _ = stage.program.sender.flush();
            // What a flood asks for is the client's to ignore.
            while stage.client.receive().is_some() {}
        }

        assert!(stage.program.is_closed(), "misdeed {at}");
        stage.next_program_answers(5);
    }
}

#[test]
fn program_that_makes_no_sense_on_its_control_socket_is_replaced() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let attached = control::Attached {
        recovered: false,
        closing: false,
        session: false,
    };
    for packet in [
        Packet::Memory,
        Packet::Attach(attach()),
        Packet::Attached(attached),
        Packet::Session { setup: 1 },
        Packet::Refused(1, String::new()),
    ] {
        let mut stage = Stage::new();
        stage.ask(5);

        control::send(stage.control.as_fd(), &packet, &[file.as_fd(); 3]).unwrap();
        settle(&mut stage.supervisor);

        assert!(stage.program.is_closed(), "{packet:?}");
        stage.next_program_answers(5);
    }
}

#[test]
fn dead_program_with_half_a_message_is_replaced() {
    for bytes in [1, 15, 20, 33] {
        let mut stage = Stage::new();
        stage.ask(5);
        let _ = stage
            .program
            .sender
            .send(&[&[32; 33][..bytes]], &[])
            .unwrap();
        let (gone, _other) = UnixStream::pair().unwrap();

        stage.program = Peer::new(gone.into(), true);
        stage.control = std::fs::File::open("/dev/null").unwrap().into();
        settle(&mut stage.supervisor);

        stage.next_program_answers(5);
    }
}

#[test]
fn program_that_does_not_take_over_what_is_set_up_is_replaced() {
    let mut stage = Stage::new();
    stage.ask(5);
    drop(stage.control);
    settle(&mut stage.supervisor);
    let control = stage.supervisor.links().link().unwrap();
    control::send(control.as_fd(), &Packet::Attach(attach()), &[]).unwrap();
    settle(&mut stage.supervisor);
    let mut refuses = None;
    while let Received::Packet(packet, mut descriptors) = control::receive(control.as_fd()) {
        if matches!(packet, Packet::Session { setup: 1 }) {
            refuses = Some(Peer::new(descriptors.remove(0), true));
        }
    }
    let mut refuses = refuses.unwrap();
    settle(&mut stage.supervisor);
    let (number, header, _) = refuses.receive().unwrap();

    refuses.send(number, header.reply(Ok(())), b"\0\0\0\0another version\0");
    settle(&mut stage.supervisor);

    assert!(refuses.is_closed());
    stage.control = control;
    stage.next_program_answers(5);
}

#[test]
fn flood_of_a_client_is_taken_as_far_as_there_is_room() {
    let mut stage = Stage::new();
    let payload = vec![7; 1 << 20];

    let mut sent = 0;
    for id in 0..100 {
        let header = Header::command(id, Command::RegionWrite);
        stage.client.send(0, header, &payload);
        settle(&mut stage.supervisor);
        sent += 1;
    }

    let kept = stage.supervisor.client.as_ref().unwrap().requests.cost();
    assert!(kept < 20 << 20, "{kept} bytes of {sent} MiB");
    // All of it is answered all the same.
    let mut answered = 0;
    for _ in 0..10_000 {
        settle(&mut stage.supervisor);
        let _ = stage.client.sender.flush().unwrap();
        if let Some((number, header, _)) = stage.program.receive() {
            stage.program.send(number, header.reply(Ok(())), &[0; 16]);
        }
        while let Some((_, header, _)) = stage.client.receive() {
            assert_eq!(
                (header.id, header.kind()),
                (answered, Ok(Kind::Reply(Ok(()))))
            );
            answered += 1;
        }
        if answered == sent {
            return;
        }
    }
    panic!("{answered} of {sent} are answered");
}

#[test]
fn client_that_does_not_answer_the_device_is_not_kept_forever() {
    let mut stage = Stage::new();
    stage
        .program
        .send(0, Header::command(3, Command::DmaRead), &[0; 16]);
    settle(&mut stage.supervisor);
    assert!(stage.client.receive().is_some());
    let payload = vec![7; 1 << 20];

    for id in 0..200 {
        let header = Header::command(id, Command::RegionWrite);
        stage.client.send(0, header, &payload);
        for _ in 0..20 {
            settle(&mut stage.supervisor);
            if !stage.supervisor.has_client() {
                assert!(id > 60, "{id}");
                return;
            }
            let _ = stage.client.sender.flush().unwrap();
        }
    }
    panic!("it is still there");
}

#[test]
fn answer_for_a_program_that_is_gone_reaches_nobody() {
    let mut stage = Stage::new();
    let asks = Header::command(3, Command::DmaRead);
    stage.program.send(0, asks, &[0; 16]);
    settle(&mut stage.supervisor);
    let (_, asked, _) = stage.client.receive().unwrap();
    drop(stage.control);
    settle(&mut stage.supervisor);
    let (control, program) = seat(&mut stage.supervisor);
    let mut program = program.unwrap();
    program.send(0, asks, &[0; 16]);
    settle(&mut stage.supervisor);
    let (_, again, _) = stage.client.receive().unwrap();
    assert_ne!(asked.id, again.id);

    stage.client.send(0, asked.reply(Ok(())), &[1; 24]);
    stage.client.send(0, again.reply(Ok(())), &[2; 24]);
    settle(&mut stage.supervisor);

    let (number, header, payload) = program.receive().unwrap();
    assert_eq!((number, header.id, payload), (0, 3, vec![2; 24]));
    assert!(program.receive().is_none());
    drop(control);
}

#[test]
fn replies_before_the_end_of_a_session_reach_the_client() {
    let mut stage = Stage::new();
    for id in 0..200 {
        stage.ask(id);
    }
    while let Some((number, header, _)) = stage.program.receive() {
        stage.program.send(number, header.reply(Ok(())), &[9; 20]);
    }

    control::send(stage.control.as_fd(), &Packet::Closed, &[]).unwrap();
    settle(&mut stage.supervisor);

    let mut answered = 0;
    while let Some((_, header, _)) = stage.client.receive() {
        assert_eq!(header.id, answered);
        answered += 1;
    }
    assert_eq!(answered, 200);
    assert!(!stage.supervisor.has_client());
}

#[test]
fn replies_of_a_program_that_dies_are_not_asked_for_again() {
    let mut stage = Stage::new();
    for id in 0..200 {
        stage.ask(id);
    }
    while let Some((number, header, _)) = stage.program.receive() {
        stage.program.send(number, header.reply(Ok(())), &[9; 20]);
    }
    let (gone, _other) = UnixStream::pair().unwrap();

    stage.program = Peer::new(gone.into(), true);
    stage.control = std::fs::File::open("/dev/null").unwrap().into();
    settle(&mut stage.supervisor);

    assert_eq!(stage.supervisor.counters().replays, 0);
    assert_eq!(std::iter::from_fn(|| stage.client.receive()).count(), 200);
}

#[test]
fn requests_of_a_client_that_has_gone_are_done_before_it_is_forgotten() {
    let mut stage = Stage::new();
    let header = Header::command(0, Command::RegionWrite);
    for _ in 0..150 {
        stage.client.send(0, header.unanswered(), &[0; 20]);
    }
    settle(&mut stage.supervisor);
    for _ in 0..150 {
        stage.client.send(0, header.unanswered(), &[0; 20]);
    }
    let (gone, _other) = UnixStream::pair().unwrap();

    stage.client = Peer::new(gone.into(), false);
    settle(&mut stage.supervisor);

    for _ in 0..300 {
        let (number, header, _) = stage.program.receive().unwrap();
        assert!(stage.supervisor.has_client());
        stage.program.send(number, header.reply(Ok(())), &[0; 16]);
        settle(&mut stage.supervisor);
    }
    assert!(!stage.supervisor.has_client());
    assert!(stage.program.is_closed());
}

#[test]
fn client_that_has_gone_and_is_asked_is_not_waited_for() {
    let mut stage = Stage::new();
    stage.ask(5);
    let asks = Header::command(3, Command::DmaRead);
    stage.program.send(0, asks, &[0; 16]);
    settle(&mut stage.supervisor);
    assert!(stage.supervisor.has_client());
    let (gone, _other) = UnixStream::pair().unwrap();

    stage.client = Peer::new(gone.into(), false);
    settle(&mut stage.supervisor);

    assert!(!stage.supervisor.has_client());
}

/// A program that attaches, and is told of the client by this stream.
fn seat_unset(supervisor: &mut Supervisor) -> (OwnedFd, Peer) {
    let control = supervisor.links().link().unwrap();
    control::send(control.as_fd(), &Packet::Attach(attach()), &[]).unwrap();
    settle(supervisor);
    while let Received::Packet(packet, mut descriptors) = control::receive(control.as_fd()) {
        if matches!(packet, Packet::Session { .. }) {
            return (control, Peer::new(descriptors.remove(0), true));
        }
    }
    panic!("no session");
}

#[test]
fn client_whose_set_up_no_program_takes_over_is_sent_away() {
    let mut stage = Stage::new();
    stage.ask(5);
    drop(stage.control);
    settle(&mut stage.supervisor);

    for life in 1.. {
        assert!(life < 20, "the client is still there");
        let (_control, mut program) = seat_unset(&mut stage.supervisor);
        let (_, header, _) = program.receive().unwrap();
        program.send(0, header.reply(Err(crate::Errno::EINVAL)), &[]);
        settle(&mut stage.supervisor);
        if !stage.supervisor.has_client() {
            assert!(life > 1);
            assert!(stage.supervisor.is_served());
            break;
        }
    }
    assert!(stage.client.is_closed());
}

#[test]
fn request_expires_though_a_program_that_is_not_set_up_is_there() {
    let mut stage = Stage::new();
    stage.supervisor.set_reattach_timeout(Duration::ZERO);
    stage.control = std::fs::File::open("/dev/null").unwrap().into();
    settle(&mut stage.supervisor);
    let (_control, mut program) = seat_unset(&mut stage.supervisor);

    stage.ask(5);

    let (_, header, _) = stage.client.receive().unwrap();
    assert!(matches!(header.kind(), Ok(Kind::Reply(Err(_)))));
    assert!(program.receive().is_some());
    assert!(program.receive().is_none());
}
