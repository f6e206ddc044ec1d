// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients that go, or are dropped, while there is more for them than they receive: the next one is
//! served all the same.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::net::Shutdown;
use std::time::Instant;

use libmuser::vfio_user::wire::{payload, Command};
use libmuser::{Bar, Device, PciBuilder, PciModel};
use zerocopy::IntoBytes;

mod raw;

use raw::{access, Listening, RawClient, DEADLINE};

/// Its registers read as zeroes.
struct Null;

impl Device for Null {}

fn model() -> PciModel {
    let bar = Bar::memory32(0x2000).mappable(0x1000..0x2000);
    PciBuilder::new(0x1234, 0x5678).bar(0, bar).build().unwrap()
}

/// Asks for more than the socket holds, and receives nothing.
fn fill(client: &mut RawClient) {
    for _ in 0..400 {
        let page = access(0, 0x1000, 0x1000);
        client.send(Command::RegionRead, &[page.as_bytes()]);
    }
}

/// The next client. As long as the server has not found that the one before has gone, it is refused.
fn next(server: &Listening) -> RawClient {
    let begin = Instant::now();
    while begin.elapsed() < DEADLINE {
        let mut client = server.connect();
        let version = payload::Version::default();
        let reply = client.call(Command::Version, &[version.as_bytes(), b"{}\0"]);
        match reply.result() {
            Ok(()) => return client,
            Err(errno) => assert_eq!(errno, libc::EBUSY),
        }
    }
    panic!("the next client is never served");
}

#[test]
fn client_that_shuts_down_with_replies_kept_makes_room_for_the_next() {
    let server = Listening::start(model(), |_| Ok(Null));
    let mut client = server.client();
    fill(&mut client);

    client.socket.shutdown(Shutdown::Write).unwrap();

    // It stays as it is, and never receives.
    let mut next = next(&server);
    assert_eq!(next.read(0, 0x1000, 1), Ok(vec![0]));
    drop(client);
}

#[test]
fn client_that_goes_with_replies_kept_makes_room_for_the_next() {
    let server = Listening::start(model(), |_| Ok(Null));
    let mut client = server.client();
    fill(&mut client);

    drop(client);

    let mut next = next(&server);
    assert_eq!(next.read(0, 0x1000, 1), Ok(vec![0]));
}
