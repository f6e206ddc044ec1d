// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes that come by eventfd, as `DEVICE_GET_REGION_IO_FDS` gives them.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{self, Receiver, Sender};

use libmuser::vfio_user::wire::payload::{self, IoEventFd};
use libmuser::vfio_user::wire::Command;
use libmuser::{Access, Bar, Device, PciBuilder, Result, Width};
use zerocopy::{FromBytes, IntoBytes};

mod raw;

use raw::{Listening, Message, RawClient, DEADLINE};

/// Tells which registers are written.
struct Told(Sender<(u64, Width, u64)>);

impl Device for Told {
    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        self.0.send((access.offset, access.width, value)).unwrap();
        Ok(())
    }
}

fn start() -> (RawClient, Receiver<(u64, Width, u64)>, Listening) {
    let model = PciBuilder::new(0x1234, 0x5678)
        .bar(
            0,
            Bar::memory32(0x1000)
                .ioeventfd(0x10, Width::Word, Some(3))
                .ioeventfd(0x10, Width::Word, Some(4))
                .ioeventfd(0x20, Width::Qword, None),
        )
        .bar(1, Bar::io(32).ioeventfd(4, Width::Dword, None))
        .build();
    let (sender, written) = mpsc::channel();
    let server = Listening::start(model.unwrap(), |_| Ok(Told(sender)));
    (server.client(), written, server)
}

fn io_fds(client: &mut RawClient, index: u32, argsz: u32) -> Message {
    let query = payload::RegionIoFds {
        argsz,
        index,
        ..Default::default()
    };
    client.call(Command::DeviceGetRegionIoFds, &[query.as_bytes()])
}

fn entries(reply: &Message) -> Vec<IoEventFd> {
    let rest = reply.rest::<payload::RegionIoFds>();
    <[IoEventFd]>::ref_from_bytes(rest).unwrap().to_vec()
}

fn signal(fd: &std::os::fd::OwnedFd, count: u64) {
    let mut file = File::from(fd.try_clone().unwrap());
    file.write_all(&count.to_ne_bytes()).unwrap();
}

#[test]
fn question_without_room_is_answered_with_how_much_it_takes() {
    let (mut client, _written, _server) = start();

    let reply = io_fds(&mut client, 0, 16);

    let fixed: payload::RegionIoFds = reply.fixed();
    assert_eq!((fixed.argsz, fixed.count, fixed.index), (136, 3, 0));
    assert_eq!((reply.payload.len(), reply.fds.len()), (16, 0));
}

#[test]
fn signal_is_a_write_of_its_value() {
    let (mut client, written, _server) = start();
    let reply = io_fds(&mut client, 0, 136);
    let entries = entries(&reply);
    assert_eq!(reply.fds.len(), 3);
    let entry = |offset, size, fd_index, flags, datamatch| IoEventFd {
        offset,
        size,
        fd_index,
        kind: IoEventFd::EVENTFD,
        flags,
        padding: 0,
        datamatch,
    };
    let matches = IoEventFd::DATAMATCH;
    assert_eq!(
        entries,
        [
            entry(0x10, 2, 0, matches, 3),
            entry(0x10, 2, 1, matches, 4),
            entry(0x20, 8, 2, 0, 0)
        ]
    );

    for (fd, write) in reply.fds.iter().zip([
        (0x10, Width::Word, 3),
        (0x10, Width::Word, 4),
        (0x20, Width::Qword, 0),
    ]) {
        signal(fd, 5);
        assert_eq!(written.recv_timeout(DEADLINE), Ok(write));
    }
    // What was signalled several times was one write.
    client.read(0, 0, 4).unwrap();
    assert!(written.try_recv().is_err());
    assert_eq!(client.write(0, 0x10, &[9, 0]), Ok(2));
    assert_eq!(written.recv_timeout(DEADLINE), Ok((0x10, Width::Word, 9)));
}

#[test]
fn eventfds_are_the_same_when_they_are_asked_for_again() {
    let (mut client, written, _server) = start();
    let first = io_fds(&mut client, 1, 56);
    assert_eq!(entries(&first)[0].flags, IoEventFd::PIO);
    let again = io_fds(&mut client, 1, 56);

    signal(&first.fds[0], 1);
    assert_eq!(written.recv_timeout(DEADLINE), Ok((4, Width::Dword, 0)));
    signal(&again.fds[0], 1);
    assert_eq!(written.recv_timeout(DEADLINE), Ok((4, Width::Dword, 0)));
}

#[test]
fn region_without_eventfds_has_none() {
    let (mut client, _written, _server) = start();

    let reply = io_fds(&mut client, 2, 16);

    assert_eq!(reply.fixed::<payload::RegionIoFds>().count, 0);
    assert!(reply.fds.is_empty());
    assert_eq!(io_fds(&mut client, 9, 16).result(), Err(libc::EINVAL));
}

#[test]
fn eventfds_of_a_client_that_has_gone_write_nothing() {
    let (mut client, written, server) = start();
    let reply = io_fds(&mut client, 0, 136);
    drop(client);
    let mut client = server.client();
    client.read(0, 0, 4).unwrap();

    signal(&reply.fds[2], 1);
    client.read(0, 0, 4).unwrap();

    assert!(written.try_recv().is_err());
}

#[test]
fn client_is_given_as_many_as_it_takes() {
    let (client, _written, server) = start();
    drop(client);
    let mut client = server.connect();
    client.negotiate_with(r#"{"capabilities":{"max_msg_fds":2}}"#);

    let reply = io_fds(&mut client, 0, 136);

    assert_eq!((entries(&reply).len(), reply.fds.len()), (2, 2));
}

#[test]
fn eventfd_of_what_is_no_register_is_refused() {
    let refused = |bar: Bar| {
        let built = PciBuilder::new(0x1234, 0x5678).bar(0, bar).build();
        built.unwrap_err().is_model()
    };
    let bar = || Bar::memory32(0x4000);

    assert!(refused(bar().ioeventfd(1, Width::Word, None)));
    assert!(refused(bar().ioeventfd(0x4000, Width::Word, None)));
    assert!(refused(bar().ioeventfd(u64::MAX - 3, Width::Dword, None)));
    assert!(refused(bar().ioeventfd(0, Width::Byte, Some(256))));
    let twice = bar().ioeventfd(0, Width::Byte, Some(1));
    assert!(refused(twice.clone().ioeventfd(0, Width::Byte, None)));
    assert!(refused(twice.ioeventfd(0, Width::Byte, Some(1))));
    let area = bar().mappable(0x1000..0x2000);
    assert!(refused(area.ioeventfd(0x1ffc, Width::Dword, None)));
}
