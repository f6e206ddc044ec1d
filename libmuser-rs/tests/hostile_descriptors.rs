// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of the wrong number and the wrong kind, and memory that goes away.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use nix::fcntl::{fcntl, FcntlArg, OFlag, SealFlag};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{memfd_create, MFdFlags};

mod hostile;
mod raw;

use hostile::{
    attack, device_reads, good_messages, longs, many, message, words, CONFIG, DATA, EINVAL, FIRE,
    IOVA, PAGE,
};
use raw::{memfd, RawClient};

fn assert_in_step(client: &mut RawClient) {
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));
}

fn borrow(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

fn sealed(seals: SealFlag) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("sealed", flags).unwrap());
    file.set_len(2 * PAGE).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

fn open(path: &str, flags: i32) -> OwnedFd {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
        .into()
}

/// One of everything that is not memory.
fn no_memory() -> Vec<OwnedFd> {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    vec![
        reader,
        writer,
        socket.into(),
        EventFd::new().unwrap().into(),
        open("/", 0),
        open("/dev/null", 0),
        open("/dev/zero", 0),
        open("/", libc::O_PATH),
        open("/proc/self/status", 0),
    ]
}

#[test]
fn descriptors_that_no_command_wants_are_closed() {
    attack(|target| {
        let mut client = target.client();
        for count in [1, 2, 16, 253] {
            let fds = many(count);
            for (command, payload) in good_messages() {
                client.send_bytes(&message(1, command, &payload), &borrow(&fds));
                let _any = client.receive();
            }
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn descriptors_with_a_version_or_before_it_are_closed() {
    attack(|target| {
        for count in [1, 253] {
            let fds = many(count);
            let version = message(0, 1, &[&[0; 4][..], b"{}\0"].concat());
            for bytes in [&version[..], &version[..5], &message(1, 4, &[0; 16])] {
                let client = target.connect();
                client.send_bytes(bytes, &borrow(&fds));
            }
        }
    });
}

#[test]
fn descriptors_within_a_message_belong_to_nobody() {
    attack(|target| {
        let mut client = target.client();
        let fds = many(1);
        let payload = [words(&[32, 3]), longs(&[0, 0x5000, PAGE])].concat();
        let map = message(4, 2, &payload);
        client.send_bytes(&map[..20], &[]);
        client.send_bytes(&map[20..], &borrow(&fds));

        // It was not the descriptor of this mapping, so it is refused, or memory reached by messages.
        let reply = client.receive();
        assert_eq!(reply.header.id, 4);
        assert_in_step(&mut client);
    });
}

#[test]
fn descriptors_of_a_message_that_never_ends_are_closed() {
    attack(|target| {
        for _ in 0..50 {
            let client = target.client();
            let fds = many(10);
            client.send_bytes(&message(4, 2, &[0; 32])[..30], &borrow(&fds));
        }
    });
}

#[test]
fn mapping_with_several_descriptors_is_refused() {
    attack(|target| {
        let mut client = target.client();
        for count in [2, 3, 100, 253] {
            let fds = many(count);
            let map = [words(&[32, 3]), longs(&[0, 0x5000, PAGE])].concat();
            client.send_bytes(&message(4, 2, &map), &borrow(&fds));
            assert_eq!(client.receive().result(), Err(EINVAL), "{count}");
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn mapping_of_what_is_no_memory_is_refused() {
    attack(|target| {
        let mut client = target.client();
        for (number, fd) in no_memory().into_iter().enumerate() {
            let file = File::from(fd);
            for flags in [1, 2, 3] {
                let mapped = client.dma_map(0x5000, PAGE, flags, Some((&file, 0)));
                assert!(mapped.is_err(), "{number} {flags}");
            }
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn mapping_for_more_than_the_file_allows_is_refused() {
    attack(|target| {
        let mut client = target.client();
        let file = memfd(PAGE);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let reading = File::from(open(&path, 0));

        assert_eq!(
            client.dma_map(0, PAGE, 3, Some((&reading, 0))),
            Err(libc::EACCES)
        );
        assert_eq!(
            client.dma_map(0, PAGE, 2, Some((&reading, 0))),
            Err(libc::EACCES)
        );
        assert_eq!(client.dma_map(0, PAGE, 1, Some((&reading, 0))), Ok(()));
        for seal in [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_FUTURE_WRITE] {
            let sealed = sealed(seal);
            let mapped = client.dma_map(0x5000, PAGE, 3, Some((&sealed, 0)));
            assert_eq!(mapped, Err(libc::EPERM), "{seal:?}");
        }
    });
}

#[test]
fn mapping_of_bytes_that_can_not_be_is_refused() {
    attack(|target| {
        let mut client = target.client();
        let file = memfd(4 * PAGE);
        let most = u64::MAX;
        for (address, size, offset) in [
            (0, 0, 0),
            (1, PAGE, 0),
            (0, PAGE + 1, 0),
            (0, PAGE - 1, 0),
            (most - PAGE + 1, 2 * PAGE, 0),
            (most, PAGE, 0),
            (0, most, 0),
            (0, 1 << 63, 0),
            (0, 5 * PAGE, 0),
            (0, PAGE, 4 * PAGE),
            (0, PAGE, 3 * PAGE + 1),
            (0, PAGE, most),
            (0, PAGE, most - PAGE + 1),
        ] {
            let mapped = client.dma_map(address, size, 3, Some((&file, offset)));
            let what = format!("{address:#x} {size:#x} {offset:#x}");
            assert!(mapped.is_err(), "{what}");
            let unmapped = client.dma_unmap(address, size);
            assert!(unmapped.is_err(), "{what}");
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn mappings_that_overlap_or_are_unmapped_in_part_are_refused() {
    attack(|target| {
        let mut client = target.client();
        let file = memfd(8 * PAGE);
        let map = |client: &mut RawClient, address, pages| {
            client.dma_map(address, pages * PAGE, 3, Some((&file, 0)))
        };
        assert_eq!(map(&mut client, 0x10000, 4), Ok(()));
        for (address, pages) in [
            (0x10000, 4),
            (0xf000, 2),
            (0x13000, 2),
            (0xf000, 8),
            (0x11000, 1),
        ] {
            let mapped = map(&mut client, address, pages);
            assert_eq!(mapped, Err(libc::EEXIST), "{address:#x} {pages}");
        }
        for (address, pages) in [(0x10000, 1), (0x11000, 3), (0xf000, 2), (0x12000, 8)] {
            let unmapped = client.dma_unmap(address, pages * PAGE);
            assert_eq!(unmapped, Err(EINVAL), "{address:#x} {pages}");
        }
        assert_eq!(client.dma_unmap(0x10000, 4 * PAGE), Ok(()));
        assert_eq!(client.dma_unmap(0x10000, 4 * PAGE), Err(libc::ENOENT));
    });
}

#[test]
fn file_cut_short_under_a_mapping_is_zeroes() {
    attack(|target| {
        let mut client = target.client();
        let file = memfd(4 * PAGE);
        file.write_all_at(&[0x77; 8], 8).unwrap();
        file.write_all_at(&[0x77; 8], 3 * PAGE).unwrap();
        assert_eq!(client.dma_map(0, 4 * PAGE, 3, Some((&file, 0))), Ok(()));
        assert_eq!(device_reads(&mut client, 3 * PAGE), Ok(vec![0x77; 8]));

        file.set_len(PAGE).unwrap();

        assert_eq!(device_reads(&mut client, 3 * PAGE), Ok(vec![0; 8]));
        assert_eq!(client.write(0, DATA, &[1; 8]), Ok(8));
        assert_eq!(
            device_reads(&mut client, 8),
            Ok(vec![0x77; 8]),
            "what is left is left"
        );
        file.set_len(0).unwrap();
        assert_eq!(device_reads(&mut client, 8), Ok(vec![0; 8]));
    });
}

#[test]
fn file_cut_short_at_every_moment_harms_nobody() {
    attack(|target| {
        let mut client = target.client();
        let file = memfd(4 * PAGE);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Acquire) {
                    file.set_len(0).unwrap();
                    file.set_len(4 * PAGE).unwrap();
                }
            });
            for round in 0..300_u64 {
                // The file may be too short at the moment.
                let mapped = client.dma_map(0, 4 * PAGE, 3, Some((&file, 0)));
                if mapped.is_ok() {
                    let _any = device_reads(&mut client, round % 4 * PAGE).unwrap();
                    assert_eq!(client.write(0, DATA, &[1; 8]), Ok(8));
                    assert_eq!(client.dma_unmap(0, 4 * PAGE), Ok(()));
                } else {
                    assert_eq!(mapped, Err(EINVAL));
                }
            }
            done.store(true, std::sync::atomic::Ordering::Release);
        });
    });
}

#[test]
fn as_many_mappings_as_there_can_be_and_one_more() {
    attack(|target| {
        let mut client = target.client();
        let file = memfd(PAGE);
        for number in 0..65_535 {
            let map = [words(&[32, 3]), longs(&[0, number * PAGE, PAGE])].concat();
            let mut bytes = message(1, 2, &map);
            // Nobody waits for the replies but to the last one of every thousand.
            if number % 1000 != 0 {
                bytes[8] |= 0x10;
            }
            client.send_bytes(&bytes, &[file.as_fd()]);
            if number % 1000 == 0 {
                assert_eq!(client.receive().result(), Ok(()), "{number}");
            }
        }

        let more = client.dma_map(65_535 * PAGE, PAGE, 3, Some((&file, 0)));

        assert_eq!(more, Err(libc::ENOSPC));
        file.write_all_at(&[0x42; 8], 0).unwrap();
        assert_eq!(device_reads(&mut client, 65_534 * PAGE), Ok(vec![0x42; 8]));
        assert_eq!(client.write(0, IOVA, &0_u64.to_ne_bytes()), Ok(8));
    });
}

#[test]
fn interrupts_with_the_wrong_descriptors_are_refused() {
    attack(|target| {
        let mut client = target.client();
        let events: Vec<OwnedFd> = (0..6).map(|_| EventFd::new().unwrap().into()).collect();
        for (count, given) in [(1, 2), (1, 6), (0, 1)] {
            let set = client.set_irqs(0x24, (2, 0, count), &[], &borrow(&events[..given]));
            assert!(set.is_err(), "{count} wanted, {given} there");
            assert_in_step(&mut client);
        }
        for (flags, data) in [(0x21, &[][..]), (0x22, &[1])] {
            let set = client.set_irqs(flags, (2, 0, 1), data, &borrow(&events[..1]));
            assert!(set.is_err(), "{flags:#x} has no descriptors");
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn interrupts_by_what_is_no_eventfd_harm_nobody() {
    attack(|target| {
        let mut client = target.client();
        for (number, fd) in no_memory().iter().enumerate() {
            let _any = client.set_irqs(0x24, (2, 0, 1), &[], &[fd.as_fd()]);
            let fired = client.write(0, FIRE, &0_u64.to_ne_bytes());
            assert_eq!(fired, Ok(8), "{number}");
            assert_in_step(&mut client);
        }
    });
}

#[test]
fn full_pipe_for_an_interrupt_stops_nobody() {
    attack(|target| {
        let mut client = target.client();
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        // Blocking, and full: whoever writes to it waits.
        fill(&writer);
        if client
            .set_irqs(0x24, (2, 0, 1), &[], &[writer.as_fd()])
            .is_ok()
        {
            let _any = client.write(0, FIRE, &0_u64.to_ne_bytes());
        }
        assert_in_step(&mut client);
    });
}

#[test]
fn full_eventfd_for_an_interrupt_stops_nobody() {
    attack(|target| {
        let mut client = target.client();
        let event = EventFd::new().unwrap();
        event.write(u64::MAX - 1).unwrap();
        assert_eq!(client.write(CONFIG, 4, &[4, 0]), Ok(2));
        assert_eq!(
            client.set_irqs(0x24, (2, 0, 1), &[], &[event.as_fd()]),
            Ok(())
        );
        // MSI-X is enabled, and its vector not masked.
        let msix = client.read(CONFIG, 0x34, 1).unwrap()[0];
        client
            .write(CONFIG, u64::from(msix) + 2, &[0, 0x80])
            .unwrap();
        client.write(1, 12, &[0; 4]).unwrap();

        for _ in 0..3 {
            let _any = client.write(0, FIRE, &0_u64.to_ne_bytes());
        }

        assert_in_step(&mut client);
    });
}

/// Writes to a pipe until it takes no more.
fn fill(pipe: &OwnedFd) {
    fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(pipe, &[0; 4096]).is_ok() {}
    fcntl(pipe, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
}
