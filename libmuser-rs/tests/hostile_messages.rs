// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages as nobody should send them.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::net::Shutdown;

use libmuser::vfio_user::wire::{Command, Kind, HEADER};

mod hostile;
mod raw;

use hostile::{attack, good_messages, longs, message, wait_taken, words, CONFIG, SCRATCH};
use raw::RawClient;

/// A header of any command, size and flags.
fn header(id: u16, command: u16, size: u32, flags: u32) -> Vec<u8> {
    let ids = [id, command].map(u16::to_ne_bytes).concat();
    [ids, words(&[size, flags, 0])].concat()
}

/// Whether the server is in step: the reply to what is asked for is the next that comes.
fn assert_in_step(client: &mut RawClient) {
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));
}

/// The next reply's errno; 0 if there is none.
fn errno(client: &RawClient, id: u16) -> i32 {
    let reply = client.receive();
    assert_eq!(reply.header.id, id);
    assert!(
        matches!(reply.header.kind(), Ok(Kind::Reply(_))),
        "{reply:?}"
    );
    reply.result().err().unwrap_or(0)
}

fn version() -> Vec<u8> {
    message(0, 1, &[&[0; 4][..], b"{\"capabilities\":{}}\0"].concat())
}

#[test]
fn message_cut_off_at_every_byte_ends_the_session_only() {
    attack(|target| {
        let version = version();
        for cut in 0..version.len() {
            target.connect().send_bytes(&version[..cut], &[]);
        }
        for (command, payload) in good_messages() {
            let message = message(1, command, &payload);
            for cut in 1..message.len() {
                let client = target.client();
                client.send_bytes(&message[..cut], &[]);
                client.socket.shutdown(Shutdown::Write).unwrap();
                client.wait_closed();
            }
        }
    });
}

#[test]
fn message_split_at_every_byte_is_one_message() {
    attack(|target| {
        let client = target.client();
        for (command, payload) in good_messages() {
            let message = message(7, command, &payload);
            for cut in 1..message.len() {
                client.send_bytes(&message[..cut], &[]);
                wait_taken(&client.socket);
                client.send_bytes(&message[cut..], &[]);
                let result = errno(&client, 7);
                // Every second map and unmap has nothing to do.
                let allowed = match command {
                    2 => [0, libc::EEXIST],
                    3 => [0, libc::ENOENT],
                    _ => [0, 0],
                };
                assert!(allowed.contains(&result), "command {command}: {result}");
            }
        }
    });
}

#[test]
fn session_byte_by_byte_is_a_session() {
    attack(|target| {
        let client = target.connect();
        let messages = std::iter::once(version());
        let rest = good_messages()
            .into_iter()
            .map(|(command, payload)| message(0, command, &payload));
        for message in messages.chain(rest) {
            for byte in message {
                client.send_bytes(&[byte], &[]);
            }
            assert_eq!(errno(&client, 0), 0);
        }
    });
}

#[test]
fn many_messages_at_once_are_answered_in_order() {
    attack(|target| {
        let client = target.client();
        let messages = (0..200).map(|id| message(id, 7, &words(&[16, 0, 0, 0])));
        let all: Vec<u8> = messages.flatten().collect();

        client.send_bytes(&all, &[]);

        for id in 0..200 {
            assert_eq!(errno(&client, id), 0);
        }
    });
}

#[test]
fn size_that_can_not_be_closes_the_connection() {
    attack(|target| {
        let sizes = (0..16).chain([0x20_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX]);
        for size in sizes {
            for known in [true, false] {
                let client = if known {
                    target.client()
                } else {
                    target.connect()
                };
                client.send_bytes(&header(1, if known { 4 } else { 1 }, size, 0), &[]);
                client.wait_closed();
            }
        }
    });
}

#[test]
fn largest_message_is_taken_and_answered() {
    attack(|target| {
        let mut client = target.client();
        // Beyond the end of the region all the same.
        let data = vec![0x5a; 1 << 20];

        // As `pwrite` to a device has it: as much as there is.
        assert_eq!(client.write(0, 0x2000, &data), Ok(0x2000));
        assert_in_step(&mut client);
        assert_eq!(
            client.read(0, 0x2000, 1 << 20).map(|data| data.len()),
            Ok(0x2000)
        );
        assert_in_step(&mut client);
    });
}

#[test]
fn command_before_the_version_does_nothing() {
    attack(|target| {
        for (command, payload) in good_messages() {
            let client = target.connect();
            client.send_bytes(&message(3, command, &payload), &[]);
            match client.try_receive() {
                None => {}
                Some(reply) => {
                    assert_eq!(reply.header.id, 3);
                    assert!(reply.result().is_err(), "command {command}");
                }
            }
        }
    });
}

#[test]
fn second_version_is_refused() {
    attack(|target| {
        let client = target.client();
        client.send_bytes(&version(), &[]);

        match client.try_receive() {
            None => {}
            Some(reply) => assert!(reply.result().is_err()),
        }
    });
}

#[test]
fn command_that_does_not_exist_is_refused_and_the_session_goes_on() {
    attack(|target| {
        let mut client = target.client();
        // 11 and 12 are the server's to send.
        for command in [0, 11, 12, 14, 19, 20, 255, 256, 0x7fff, u16::MAX] {
            client.send_bytes(&message(5, command, &[0; 24]), &[]);
            assert_ne!(errno(&client, 5), 0, "command {command}");
            assert_in_step(&mut client);
        }
        for command in [17, 18] {
            client.send_bytes(&message(5, command, &words(&[8, 0])), &[]);
            assert_eq!(errno(&client, 5), libc::EOPNOTSUPP, "command {command}");
        }
    });
}

#[test]
fn reply_that_nobody_waits_for_is_no_command() {
    attack(|target| {
        for flags in [1, 0x21, 0x31, 2, 0xf, 0xffff_ffff] {
            for command in [1, 9, 10, 11, 12, 13, 99] {
                let mut client = target.client();
                client.send_bytes(&header(1, command, 16, flags), &[]);
                // It may be closed for that, but it gets no reply.
                let request = client.header(Command::DeviceReset);
                let mut bytes = Vec::new();
                libmuser::vfio_user::wire::put(&mut bytes, request, &[]).unwrap();
                client.try_send(&bytes);
                if let Some(reply) = client.try_receive() {
                    let got = (reply.header.id, reply.header.command);
                    // What has no type may be refused.
                    let refused = flags & 0xf != 1 && reply.result().is_err();
                    assert!(
                        refused || got == (request.id, 13),
                        "{flags:#x} {command}: {reply:?}"
                    );
                }
            }
        }
    });
}

#[test]
fn payload_of_any_length_is_answered() {
    attack(|target| {
        let mut client = target.client();
        for byte in [0, 0xff, 0x10] {
            for command in (2..=18).filter(|command| ![11, 12, 13, 14].contains(command)) {
                for len in 0..80 {
                    client.send_bytes(&message(9, command, &vec![byte; len]), &[]);
                    let _any = errno(&client, 9);
                }
                assert_in_step(&mut client);
            }
        }
    });
}

#[test]
fn command_without_reply_has_none() {
    attack(|target| {
        let mut client = target.client();
        for command in (0..=18).filter(|command| *command != 1) {
            for payload in [&[][..], &[0xff; 40], &[0; 24]] {
                let size = u32::try_from(HEADER + payload.len()).unwrap();
                client.send_bytes(
                    &[header(3, command, size, 0x10), payload.to_vec()].concat(),
                    &[],
                );
            }
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn reserved_bits_and_errors_in_a_command_harm_nobody() {
    attack(|target| {
        let mut client = target.client();
        for flags in [0x20, 0x40, 0x8000_0000, 0xffff_ffe0 & !0x10] {
            let mut bytes = header(3, 7, 32, flags);
            bytes[12..16].copy_from_slice(&u32::MAX.to_ne_bytes());
            client.send_bytes(&[bytes, words(&[16, 0, 0, 0])].concat(), &[]);
            let _any = errno(&client, 3);
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn messages_in_any_order_are_answered_each() {
    attack(|target| {
        let messages = good_messages();
        for first in 0..messages.len() {
            let client = target.client();
            for step in 0..messages.len() {
                // Every number is prime to 13, of which there are 12 below.
                let at = (first + step * 5) % messages.len();
                let (command, payload) = &messages[at];
                client.send_bytes(&message(2, *command, payload), &[]);
                let result = errno(&client, 2);
                let allowed = [0, libc::ENOENT, libc::EEXIST];
                assert!(allowed.contains(&result), "command {command}: {result}");
            }
        }
    });
}

#[test]
fn access_beyond_what_there_is_is_refused() {
    attack(|target| {
        let mut client = target.client();
        let most = u64::MAX;
        for (region, offset, count) in [
            (0, 0x4000, 1),
            (0, most, 1),
            (0, most - 3, 8),
            (0, 0, u32::MAX),
            (0, 1 << 63, 4),
            (3, 0, 4),
            (8, 0, 4),
            (9, 0, 4),
            (u32::MAX, 0, 4),
            (CONFIG, 0x100, 1),
            (CONFIG, most, 4),
        ] {
            let read = client.read(region, offset, count);
            assert!(read.is_err(), "{region} {offset:#x} {count:#x}: {read:?}");
            let few = usize::try_from(count).unwrap().min(16);
            if u32::try_from(few) == Ok(count) {
                let written = client.write(region, offset, &vec![1; few]);
                assert!(written.is_err(), "{region} {offset:#x} {count:#x}");
            }
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn access_across_the_end_reaches_what_is_before_it() {
    attack(|target| {
        let mut client = target.client();
        for (region, end) in [(0, 0x4000), (CONFIG, 0x100)] {
            assert_eq!(
                client.read(region, end - 1, 2).map(|data| data.len()),
                Ok(1)
            );
            assert_eq!(client.write(region, end - 1, &[0; 8]), Ok(1));
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn access_that_says_another_count_than_it_has_is_refused() {
    attack(|target| {
        let mut client = target.client();
        for (count, len) in [(0_u32, 4), (4, 0), (4, 3), (4, 5), (u32::MAX, 4), (8, 4)] {
            let access = [longs(&[SCRATCH]), words(&[0, count]), vec![1; len]].concat();
            client.send_bytes(&message(1, 10, &access), &[]);
            assert_ne!(errno(&client, 1), 0, "{count} said, {len} there");
            assert_in_step(&mut client);
        }
        assert_eq!(
            client.read(0, SCRATCH, 8),
            Ok(vec![0; 8]),
            "nothing was written"
        );
    });
}

#[test]
fn writes_of_which_the_number_is_wrong_are_refused() {
    attack(|target| {
        let mut client = target.client();
        let one = [longs(&[SCRATCH]), words(&[0, 4]), vec![1; 8]].concat();
        for (count, there) in [
            (0, 1),
            (2, 1),
            (1, 0),
            (u64::MAX, 1),
            (1 << 61, 3),
            (1 << 32, 1),
        ] {
            let payload = [longs(&[count]), one.repeat(there)].concat();
            client.send_bytes(&message(1, 15, &payload), &[]);
            assert_ne!(errno(&client, 1), 0, "{count} said, {there} there");
            assert_in_step(&mut client);
        }
        for wrong in [9, 16, u32::MAX] {
            let one = [longs(&[SCRATCH]), words(&[0, wrong]), vec![1; 8]].concat();
            client.send_bytes(&message(1, 15, &[longs(&[1]), one].concat()), &[]);
            assert_ne!(errno(&client, 1), 0, "{wrong} bytes");
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn interrupts_that_do_not_exist_are_refused() {
    attack(|target| {
        let mut client = target.client();
        for (flags, index, start, count) in [
            (0x21, 9, 0, 1),
            (0x21, u32::MAX, 0, 0),
            (0x21, 2, 4, 1),
            (0x21, 2, 1, u32::MAX),
            (0x21, 2, u32::MAX, 2),
            (0x27, 2, 0, 1),
            (0x39, 2, 0, 1),
            (0x01, 2, 0, 1),
            (0x20, 2, 0, 1),
            (u32::MAX, 2, 0, 1),
            (0x22, 2, 0, 4),
        ] {
            let set = client.set_irqs(flags, (index, start, count), &[], &[]);
            assert!(set.is_err(), "{flags:#x} {index} {start} {count}");
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn every_id_may_be_the_same() {
    attack(|target| {
        let client = target.client();
        let read = [longs(&[0]), words(&[CONFIG, 2])].concat();
        for _ in 0..100 {
            client.send_bytes(&message(0, 9, &read), &[]);
        }
        for _ in 0..100 {
            let reply = client.receive();
            assert_eq!((reply.header.id, reply.result()), (0, Ok(())));
        }
    });
}
