// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Too much of everything, and peers that stand still.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::time::Instant;

use libmuser::vfio_user::wire::Kind;

mod hostile;
mod raw;

use hostile::{
    attack, device_reads, longs, many, message, wait_taken, words, CONFIG, DATA, IOVA, PAGE,
};
use raw::{RawClient, DEADLINE};

fn assert_in_step(client: &mut RawClient) {
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));
}

fn version() -> Vec<u8> {
    message(0, 1, &[&[0; 4][..], b"{}\0"].concat())
}

/// Sends bytes again and again until the other side takes no more, or so many were sent.
fn pour(client: &RawClient, bytes: &[u8], most: usize) -> usize {
    client.socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while sent < most {
        // A part of a message is as good as another here.
        match (&client.socket).write(&bytes[sent % bytes.len()..]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}"),
        }
    }
    client.socket.set_nonblocking(false).unwrap();
    sent
}

/// Memory that this process has, in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn flood_of_connections_disturbs_nobody_who_is_served() {
    attack(|target| {
        let mut client = target.client();
        let mut others = Vec::new();
        for round in 0..1000 {
            let other = target.connect();
            match round % 3 {
                0 => {}
                1 => other.send_bytes(&version()[..7], &[]),
                _ => {
                    let _may_be_closed = other.try_send(&version());
                }
            }
            others.push(other);
            if round % 50 == 0 {
                assert_in_step(&mut client);
            }
            if others.len() > 100 {
                others.drain(..50);
            }
        }
        assert_in_step(&mut client);
    });
}

#[test]
fn clients_that_only_come_and_go_leave_nothing() {
    attack(|target| {
        for _ in 0..2000 {
            drop(target.connect());
        }
    });
}

#[test]
fn second_client_is_told_that_it_is_turned_away() {
    attack(|target| {
        let mut client = target.client();
        for _ in 0..20 {
            let other = target.connect();
            other.send_bytes(&version(), &[]);
            let reply = other.receive();
            assert_eq!(reply.result(), Err(libc::EBUSY));
            other.wait_closed();
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn descriptors_of_clients_that_wait_are_closed() {
    attack(|target| {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mut client = target.client();
        let fds = many(1);
        let fds = vec![fds[0].as_fd(); 253];
        let others: Vec<_> = (0..16).map(|_| target.connect()).collect();
        let before = open();
        for other in &others {
            other.send_bytes(&version()[..1], &fds);
            wait_taken(&other.socket);
        }
        assert_in_step(&mut client);

        // Their own connections, and what one of them has sent just now.
        assert!(open() < before + 16 + 253, "{} after {before}", open());
    });
}

#[test]
fn descriptors_of_commands_that_wait_are_few() {
    attack(|target| {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mut client = target.client();
        asking(&mut client);
        let before = open();
        let fds = many(1);
        let fds = vec![fds[0].as_fd(); 16];
        let info = message(1, 7, &words(&[16, 0, 0, 0]));
        for _ in 0..200 {
            if !client.try_send(&info) {
                break;
            }
            let _may_be_closed = client.try_send_with(&info, &fds);
        }

        assert!(open() < before + 600, "{} after {before}", open());
    });
}

#[test]
fn client_that_stalls_in_a_message_keeps_nobody_waiting_without_an_answer() {
    attack(|target| {
        let client = target.client();
        let read = [longs(&[0]), words(&[CONFIG, 2])].concat();
        let stalled = message(3, 9, &read);
        client.send_bytes(&stalled[..21], &[]);

        let other = target.connect();
        other.send_bytes(&version(), &[]);
        assert_eq!(other.receive().result(), Err(libc::EBUSY));

        client.send_bytes(&stalled[21..], &[]);
        let reply = client.receive();
        assert_eq!((reply.header.id, reply.result()), (3, Ok(())));
    });
}

#[test]
fn client_that_never_reads_is_not_read_from_without_end() {
    attack(|target| {
        let client = target.client();
        let read = [longs(&[0]), words(&[0, 0x1000])].concat();
        let before = resident();

        let sent = pour(&client, &message(1, 9, &read), 256 << 20);

        assert!(sent < 64 << 20, "{sent} bytes of requests were taken");
        let more = resident().saturating_sub(before);
        assert!(more < 128 << 20, "{more} bytes are kept");
        // Others hear how it is.
        let other = target.connect();
        other.send_bytes(&version(), &[]);
        assert_eq!(other.receive().result(), Err(libc::EBUSY));
    });
}

#[test]
fn client_that_reads_late_gets_all_replies() {
    attack(|target| {
        let client = target.client();
        let read = [longs(&[0x2000]), words(&[0, 0x1000])].concat();
        let bytes = message(1, 9, &read);
        let sent = pour(&client, &bytes, 16 << 20);
        let whole = sent.div_ceil(bytes.len());
        let rest = whole * bytes.len() - sent;
        std::thread::scope(|scope| {
            scope.spawn(|| client.send_bytes(&bytes[bytes.len() - rest..], &[]));
            for number in 0..whole {
                let reply = client.receive();
                assert_eq!(reply.result(), Ok(()), "{number}");
                assert_eq!(reply.payload.len(), 16 + 0x1000, "{number}");
            }
        });
    });
}

#[test]
fn flood_of_posted_writes_is_worked_through() {
    attack(|target| {
        let mut client = target.client();
        let write = [longs(&[0]), words(&[0, 8]), longs(&[5])].concat();
        let mut posted = message(1, 10, &write);
        posted[8] = 0x10;
        for _ in 0..50 {
            client.send_bytes(&posted.repeat(200), &[]);
        }
        assert_eq!(client.read(0, 0, 8), Ok(longs(&[5])));
    });
}

#[test]
fn flood_of_descriptors_leaves_none() {
    attack(|target| {
        let mut client = target.client();
        let fds = many(253);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        for _ in 0..100 {
            client.send_bytes(&message(1, 7, &words(&[16, 0, 0, 0])), &fds);
            let _any = client.receive();
        }
        assert_in_step(&mut client);
    });
}

/// A device that is about to ask this client for memory.
fn asking(client: &mut RawClient) {
    assert_eq!(client.dma_map(0, PAGE, 3, None), Ok(()));
    assert_eq!(client.write(CONFIG, 4, &[4, 0]), Ok(2));
    assert_eq!(client.write(0, IOVA, &longs(&[8])), Ok(8));
    let read = [longs(&[DATA]), words(&[0, 8])].concat();
    client.send_bytes(&message(77, 9, &read), &[]);
    let asked = client.receive();
    assert_eq!((asked.header.command, asked.payload.len()), (11, 16));
    assert_eq!(asked.payload, longs(&[8, 8]));
}

#[test]
fn reply_to_the_device_that_is_wrong_is_an_error_for_the_device_only() {
    attack(|target| {
        let good = [longs(&[8, 8]), vec![9; 8]].concat();
        let wrong: [&[u8]; 6] = [
            &[],
            &good[..15],
            &good[..16],
            &good[..23],
            &[&good[..], &[1]].concat(),
            &[longs(&[16, 8]), vec![9; 8]].concat(),
        ];
        for reply in wrong {
            let mut client = target.client();
            asking(&mut client);
            let mut bytes = message(0, 11, reply);
            bytes[8] = 1;
            client.send_bytes(&bytes, &[]);
            let read = client.receive();
            assert_eq!(read.header.id, 77);
            assert!(read.result().is_err(), "{} bytes", reply.len());
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn replies_that_nobody_has_asked_for_do_not_reach_the_device() {
    attack(|target| {
        let mut client = target.client();
        asking(&mut client);
        let reply = [longs(&[8, 8]), vec![9; 8]].concat();
        for (id, command) in [(1, 11), (u16::MAX, 11), (0, 12), (0, 9)] {
            let mut bytes = message(id, command, &[longs(&[8, 8]), vec![0xee; 8]].concat());
            bytes[8] = 1;
            client.send_bytes(&bytes, &[]);
        }
        let mut bytes = message(0, 11, &reply);
        bytes[8] = 1;
        // The second one is one too many.
        client.send_bytes(&bytes.repeat(2), &[]);

        let read = client.receive();

        assert_eq!(read.header.id, 77);
        assert_eq!(read.payload[16..], [9; 8]);
        assert_in_step(&mut client);
    });
}

#[test]
fn client_that_goes_while_the_device_asks_is_forgotten() {
    attack(|target| {
        for _ in 0..20 {
            let mut client = target.client();
            asking(&mut client);
        }
    });
}

#[test]
fn client_that_does_not_answer_the_device_gets_an_error() {
    attack(|target| {
        let mut client = target.client();
        asking(&mut client);
        let began = Instant::now();

        let read = client.receive();

        assert_eq!((read.header.id, read.result()), (77, Err(libc::ETIMEDOUT)));
        assert!(began.elapsed() < DEADLINE);
        assert_in_step(&mut client);
    });
}

#[test]
fn commands_without_end_while_the_device_asks_end_the_session() {
    attack(|target| {
        let mut client = target.client();
        asking(&mut client);
        let before = resident();
        let data = vec![0; 1 << 20];
        let access = [longs(&[0x2000]), words(&[0, 1 << 20])].concat();
        let write = message(1, 10, &[access, data].concat());

        let mut sent = 0;
        while sent < 256 << 20 && client.try_send(&write) {
            sent += write.len();
        }

        assert!(sent < 128 << 20, "{sent} bytes were taken");
        let more = resident().saturating_sub(before);
        assert!(more < 256 << 20, "{more} bytes are kept");
        client.wait_closed();
    });
}

#[test]
fn commands_while_the_device_asks_are_done_after_it() {
    attack(|target| {
        let mut client = target.client();
        asking(&mut client);
        let read = [longs(&[0]), words(&[CONFIG, 2])].concat();
        for id in 100..200 {
            client.send_bytes(&message(id, 9, &read), &[]);
        }
        let mut reply = message(0, 11, &[longs(&[8, 8]), vec![9; 8]].concat());
        reply[8] = 1;
        client.send_bytes(&reply, &[]);

        for id in std::iter::once(77).chain(100..200) {
            let reply = client.receive();
            assert!(matches!(reply.header.kind(), Ok(Kind::Reply(Ok(())))));
            assert_eq!(reply.header.id, id);
        }
        let memory = raw::memfd(PAGE);
        assert_eq!(client.dma_map(0x8000, PAGE, 3, Some((&memory, 0))), Ok(()));
        assert_eq!(device_reads(&mut client, 0x8000), Ok(vec![0; 8]));
    });
}
