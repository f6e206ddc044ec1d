// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The first message, and what two sides agree upon.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use libmuser::vfio_user::capabilities::Capabilities;
use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::request::Version;
use libmuser::vfio_user::wire::Command;
use libmuser::{Bar, Device, PciBuilder};
use zerocopy::IntoBytes;

mod raw;

use raw::{access, Listening, Message};

struct Null;
impl Device for Null {}

fn start() -> Listening {
    let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096));
    Listening::start(model.build().unwrap(), |_| Ok(Null))
}

fn said(reply: &Message) -> (u16, u16, Capabilities) {
    let version = Version::parse(&reply.payload).unwrap();
    let capabilities = Capabilities::parse(version.data).unwrap();
    (version.major, version.minor, capabilities)
}

fn propose(server: &Listening, major: u16, minor: u16, data: &[u8]) -> Message {
    let mut client = server.connect();
    let version = payload::Version { major, minor };
    let reply = client.call(Command::Version, &[version.as_bytes(), data]);
    if reply.result().is_err() {
        client.wait_closed();
    }
    reply
}

#[test]
fn qemu_gets_what_it_has_proposed() {
    let server = start();

    let (major, minor, agreed) = said(&server.connect().negotiate());

    assert_eq!((major, minor), (0, 0));
    assert_eq!(agreed.max_msg_fds, Some(16));
    assert_eq!(agreed.max_data_xfer_size, Some(1 << 20));
    assert_eq!(agreed.max_dma_maps, Some(65_535));
    assert_eq!(agreed.pgsizes, Some(4096));
    assert_eq!(agreed.write_multiple, Some(true));
    assert_eq!((agreed.twin_socket, agreed.migration), (None, None));
}

#[test]
fn nothing_proposed_is_agreed_upon_with_the_limits_only() {
    let server = start();
    for data in [&b""[..], b"\0", b"{}\0"] {
        let (_, _, agreed) = said(&propose(&server, 0, 0, data));
        assert_eq!(agreed.write_multiple, None);
        assert_eq!(agreed.twin_socket, None);
        assert_eq!(agreed.data(), 1 << 20);
        assert!(agreed.fds() >= 1);
    }
}

#[test]
fn minor_version_is_the_smaller_one() {
    let server = start();
    for (proposed, agreed) in [(0, 0), (1, 1), (2, 1), (u16::MAX, 1)] {
        assert_eq!(said(&propose(&server, 0, proposed, b"")).1, agreed);
    }
}

#[test]
fn limits_are_the_smaller_ones() {
    let server = start();
    let data = br#"{"capabilities":{"max_msg_fds":3,"max_data_xfer_size":4096,"max_dma_maps":7}}"#;
    let (_, _, agreed) = said(&propose(&server, 0, 0, &[data.as_slice(), &[0]].concat()));
    assert_eq!(
        (agreed.fds(), agreed.data(), agreed.dma_maps()),
        (3, 4096, 7)
    );

    let data = br#"{"capabilities":{"max_msg_fds":5000,"max_data_xfer_size":99999999999}}"#;
    let (_, _, agreed) = said(&propose(&server, 0, 0, &[data.as_slice(), &[0]].concat()));
    assert_eq!((agreed.fds(), agreed.data()), (253, 1 << 20));
}

#[test]
fn what_can_not_be_agreed_upon_is_an_error_and_the_end() {
    let server = start();
    for (major, data) in [
        (1, &b"{}\0"[..]),
        (0, b"{\0"),
        (0, b"{}"),
        (0, b"[]\0"),
        (0, b"{\"capabilities\":{\"max_msg_fds\":-1}}\0"),
        (0, b"{\"capabilities\":{\"pgsizes\":8192}}\0"),
        (0, b"\xff\xfe\0"),
    ] {
        let reply = propose(&server, major, 0, data);
        assert_eq!(reply.result(), Err(libc::EINVAL), "{data:?}");
    }
    assert!(server.client().read(0, 0, 4).is_ok());
}

#[test]
fn first_message_of_another_kind_is_an_error_and_the_end() {
    let server = start();
    let mut client = server.connect();

    let reply = client.call(Command::RegionRead, &[access(0, 0, 4).as_bytes()]);

    assert_eq!(reply.result(), Err(libc::EINVAL));
    client.wait_closed();
    assert!(server.client().read(0, 0, 4).is_ok());
}

#[test]
fn second_version_is_an_error_and_the_session_goes_on() {
    let server = start();
    let mut client = server.client();
    let version = payload::Version::default();

    let reply = client.call(Command::Version, &[version.as_bytes()]);

    assert_eq!(reply.result(), Err(libc::EINVAL));
    assert!(client.read(0, 0, 4).is_ok());
}

#[test]
fn descriptors_beyond_the_agreed_number_are_refused() {
    use std::os::fd::AsFd;
    let server = start();
    let mut client = server.connect();
    client.negotiate_with(r#"{"capabilities":{"max_msg_fds":2}}"#);
    let file = raw::memfd(4096);
    let map = payload::DmaMap {
        argsz: 32,
        flags: 3,
        offset: 0,
        address: 0,
        size: 4096,
    };

    let reply = client.call_with(Command::DmaMap, &[map.as_bytes()], &[file.as_fd(); 3]);

    assert_eq!(reply.result(), Err(libc::EINVAL));
    assert!(client.read(0, 0, 4).is_ok());
}
