// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams between two ends of a socket pair, of which one is sometimes a plain socket.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    message: 1 << 20,
    descriptors: 4,
    prefix: 0,
    backlog: 1 << 16,
};

fn message(tag: u8, body: usize) -> Vec<u8> {
    let size = u32::try_from(HEADER + body).unwrap();
    let mut bytes = vec![tag; HEADER + body];
    bytes[SIZE].copy_from_slice(&size.to_ne_bytes());
    bytes
}

fn receiver(limits: Limits) -> (UnixStream, Receiver) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, split(theirs.into(), limits).1)
}

fn pair(limits: Limits) -> ((Sender, Receiver), (Sender, Receiver)) {
    let (one, other) = UnixStream::pair().unwrap();
    (split(one.into(), limits), split(other.into(), limits))
}

/// The header's tag, the body's length and the descriptors of the next message.
fn next(receiver: &mut Receiver) -> Option<(u8, usize, Descriptors)> {
    let message = receiver.receive().unwrap()?;
    assert!(message
        .body()
        .iter()
        .all(|byte| *byte == message.header()[0]));
    Some((
        message.header()[0],
        message.body().len(),
        message.descriptors,
    ))
}

fn send_with(socket: &UnixStream, bytes: &[u8], descriptors: &[&OwnedFd]) {
    let numbers: Vec<_> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &rights,
        MsgFlags::empty(),
        None,
    );
    assert_eq!(sent, Ok(bytes.len()));
}

/// Something to send, and what reads the end of file when nobody has it any more.
fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (File::from(reader), writer)
}

/// Whether every copy of the pipe's writing end is closed.
fn is_closed(reader: &File) -> bool {
    let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).unwrap();
    polled[0].revents().unwrap().contains(PollFlags::POLLHUP)
}

fn same_file(one: &impl AsFd, other: &impl AsFd) -> bool {
    let id = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    id(one.as_fd()).unwrap() == id(other.as_fd()).unwrap()
}

#[test]
fn nothing_sent_is_no_message() {
    let (_ours, mut theirs) = receiver(LIMITS);

    assert!(next(&mut theirs).is_none());
    assert!(!theirs.is_ready());
}

#[test]
fn message_in_single_bytes_comes_whole() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    let bytes = message(7, 5);

    for byte in &bytes[..bytes.len() - 1] {
        ours.write_all(&[*byte]).unwrap();
        assert!(next(&mut theirs).is_none());
    }
    ours.write_all(&bytes[bytes.len() - 1..]).unwrap();

    let (tag, body, descriptors) = next(&mut theirs).unwrap();
    assert_eq!((tag, body), (7, 5));
    assert!(descriptors.is_empty());
}

#[test]
fn messages_of_one_write_come_one_by_one() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    let third = message(3, 9);
    ours.write_all(&[message(1, 0), message(2, 100), third[..20].to_vec()].concat())
        .unwrap();

    assert_eq!(next(&mut theirs).unwrap().1, 0);
    assert!(theirs.is_ready());
    assert_eq!(next(&mut theirs).unwrap().1, 100);
    assert!(!theirs.is_ready());
    assert!(next(&mut theirs).is_none());
    ours.write_all(&third[20..]).unwrap();
    assert_eq!(next(&mut theirs).unwrap().1, 9);
}

#[test]
fn prefix_comes_with_its_message() {
    let limits = Limits {
        prefix: 9,
        ..LIMITS
    };
    let (mut ours, mut theirs) = receiver(limits);
    ours.write_all(&[b"123456789", message(1, 3).as_slice()].concat())
        .unwrap();

    let message = theirs.receive().unwrap().unwrap();

    assert_eq!(message.prefix(), b"123456789");
    assert_eq!(message.body(), [1; 3]);
}

#[test]
fn descriptors_come_with_the_message_on_whose_first_byte_they_ride() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    let (_reader, writer) = pipe();
    let second = message(2, 50);
    ours.write_all(&message(1, 8)).unwrap();
    send_with(&ours, &second[..1], &[&writer]);
    ours.write_all(&second[1..]).unwrap();
    ours.write_all(&message(3, 0)).unwrap();

    assert!(next(&mut theirs).unwrap().2.is_empty());
    let (tag, _, descriptors) = next(&mut theirs).unwrap();
    assert_eq!(tag, 2);
    assert_eq!(descriptors.kept().len(), 1);
    assert!(same_file(&descriptors.kept()[0], &writer));
    assert!(next(&mut theirs).unwrap().2.is_empty());
}

#[test]
fn received_descriptor_is_closed_at_exec() {
    let (ours, mut theirs) = receiver(LIMITS);
    send_with(&ours, &message(1, 0), &[&pipe().1]);

    let descriptors = next(&mut theirs).unwrap().2;

    let flags = fcntl(&descriptors.kept()[0], FcntlArg::F_GETFD).unwrap();
    assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
}

#[test]
fn descriptors_beyond_the_limit_are_closed_and_counted() {
    let limits = Limits {
        descriptors: 1,
        ..LIMITS
    };
    let (ours, mut theirs) = receiver(limits);
    let ((kept, first), (lost, second)) = (pipe(), pipe());
    send_with(&ours, &message(1, 0), &[&first, &second, &second]);
    drop((first, second));

    let descriptors = next(&mut theirs).unwrap().2;

    assert_eq!(descriptors.kept().len(), 1);
    assert_eq!(descriptors.lost(), 2);
    assert!(is_closed(&lost));
    assert!(!is_closed(&kept));
    drop(descriptors);
    assert!(is_closed(&kept));
}

#[test]
fn descriptors_inside_a_message_are_closed_and_counted() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    let (reader, writer) = pipe();
    let bytes = message(1, 8);
    ours.write_all(&bytes[..20]).unwrap();
    assert!(next(&mut theirs).is_none());
    send_with(&ours, &bytes[20..], &[&writer]);
    drop(writer);

    let descriptors = next(&mut theirs).unwrap().2;

    assert!(descriptors.kept().is_empty());
    assert_eq!(descriptors.lost(), 1);
    assert!(is_closed(&reader));
}

#[test]
fn descriptors_of_a_message_that_never_ends_are_closed_with_the_stream() {
    let (ours, mut theirs) = receiver(LIMITS);
    let (reader, writer) = pipe();
    send_with(&ours, &message(1, 8)[..20], &[&writer]);
    drop(writer);
    assert!(next(&mut theirs).is_none());
    assert!(!is_closed(&reader));
    drop(ours);

    let error = theirs.receive().unwrap_err();

    assert_eq!(error, StreamError::ClosedInside { had: 20 });
    assert!(error.is_closed());
    assert!(is_closed(&reader));
}

#[test]
fn end_between_messages_is_told_after_them() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    ours.write_all(&message(1, 8)).unwrap();
    drop(ours);

    assert_eq!(next(&mut theirs).unwrap().1, 8);
    assert_eq!(theirs.receive().unwrap_err(), StreamError::Closed);
    assert_eq!(theirs.receive().unwrap_err(), StreamError::Closed);
    assert!(theirs.is_ready());
}

#[test]
fn size_below_the_header_ends_the_stream_after_the_message_before() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    let mut bad = message(2, 0);
    bad[SIZE].copy_from_slice(&15_u32.to_ne_bytes());
    ours.write_all(&[message(1, 8), bad, message(3, 0)].concat())
        .unwrap();

    assert_eq!(next(&mut theirs).unwrap().1, 8);
    let error = theirs.receive().unwrap_err();
    assert_eq!(error, StreamError::Short { size: 15 });
    assert_eq!(theirs.receive().unwrap_err(), error);
}

#[test]
fn size_beyond_the_limit_ends_the_stream_before_its_body_comes() {
    let limits = Limits {
        message: 64,
        ..LIMITS
    };
    let (mut ours, mut theirs) = receiver(limits);
    ours.write_all(&message(1, 48)).unwrap();
    ours.write_all(&message(1, 49)[..8]).unwrap();

    assert_eq!(next(&mut theirs).unwrap().1, 48);
    let error = theirs.receive().unwrap_err();
    assert_eq!(
        error,
        StreamError::Long {
            size: 65,
            limit: 64
        }
    );
    assert!(!error.is_closed());
}

#[test]
fn full_socket_keeps_the_rest_until_it_is_flushed() {
    let ((mut sender, _keep), (_also, mut receiver)) = pair(Limits {
        backlog: 1 << 21,
        ..LIMITS
    });
    let (reader, writer) = pipe();
    let large = message(1, 1_000_000);

    assert_eq!(sender.send(&[&large], &[]), Ok(Progress::Kept));
    let second = message(2, 3);
    assert_eq!(
        sender.send(&[&second[..16], &second[16..]], &[writer.as_fd()]),
        Ok(Progress::Kept)
    );
    drop(writer);
    assert_eq!(sender.send(&[&message(3, 0)], &[]), Ok(Progress::Kept));
    let mut received = Vec::new();
    while received.len() < 3 {
        received.extend(next(&mut receiver));
        let _ = sender.flush().unwrap();
    }

    assert!(!sender.has_backlog());
    let sizes: Vec<_> = received
        .iter()
        .map(|(tag, body, _)| (*tag, *body))
        .collect();
    assert_eq!(sizes, [(1, 1_000_000), (2, 3), (3, 0)]);
    let counts: Vec<_> = received
        .iter()
        .map(|(_, _, fds)| fds.kept().len())
        .collect();
    assert_eq!(counts, [0, 1, 0]);
    assert!(!is_closed(&reader));
    drop(received);
    assert!(is_closed(&reader));
}

#[test]
fn backlog_beyond_the_limit_takes_nothing() {
    let ((mut sender, _keep), (_also, mut receiver)) = pair(LIMITS);
    assert_eq!(
        sender.send(&[&message(1, 1_000_000)], &[]),
        Ok(Progress::Kept)
    );

    assert_eq!(sender.send(&[&message(2, 0)], &[]), Ok(Progress::Full));

    while next(&mut receiver).is_none() {
        let _ = sender.flush().unwrap();
    }
    assert!(next(&mut receiver).is_none());
    assert_eq!(sender.send(&[&message(2, 0)], &[]), Ok(Progress::Sent));
    assert_eq!(next(&mut receiver).unwrap().0, 2);
}

#[test]
fn more_descriptors_than_can_be_sent_take_nothing() {
    let ((mut sender, _keep), (_also, mut receiver)) = pair(LIMITS);
    let (_reader, writer) = pipe();

    let error = sender.send(&[&message(1, 0)], &vec![writer.as_fd(); 254]);

    assert_eq!(error, Err(StreamError::Socket(Errno::EINVAL)));
    let most = vec![writer.as_fd(); 253];
    assert_eq!(sender.send(&[&message(2, 0)], &most), Ok(Progress::Sent));
    let (tag, _, descriptors) = next(&mut receiver).unwrap();
    assert_eq!((tag, descriptors.kept().len()), (2, 4));
    assert_eq!(descriptors.lost(), 249);
}

#[test]
fn sending_to_a_peer_which_has_gone_is_an_end() {
    let ((mut sender, _keep), other) = pair(LIMITS);
    drop(other);

    let error = sender.send(&[&message(1, 0)], &[]).unwrap_err();

    assert!(error.is_closed());
    assert_eq!(sender.flush(), Err(error));
}

#[test]
fn peers_that_both_send_first_do_not_wait_for_each_other() {
    fn work((sender, mut receiver): (Sender, Receiver), tag: u8) -> Vec<u8> {
        const MESSAGES: usize = 8;
        let deadline = Some(Instant::now() + Duration::from_secs(30));
        let sender = Mutex::new(sender);
        let mut tags = Vec::new();
        let mut take = || -> Result<(), StreamError> {
            while let Some(message) = receiver.receive()? {
                assert_eq!(message.body().len(), 1_000_000);
                tags.push(message.header()[0]);
            }
            Ok(())
        };
        for _ in 0..MESSAGES {
            let sent = sender
                .lock()
                .unwrap()
                .send(&[&message(tag, 1_000_000)], &[]);
            assert_ne!(sent, Ok(Progress::Full));
            assert_eq!(drain(&sender, deadline, &mut take), Ok(true));
        }
        let socket = Arc::clone(sender.lock().unwrap().socket());
        let wanted = Ready {
            receive: true,
            send: false,
        };
        while tags.len() < MESSAGES {
            match receiver.receive().unwrap() {
                Some(message) => tags.push(message.header()[0]),
                None => assert!(wait(socket.as_fd(), wanted, deadline).unwrap().receive),
            }
        }
        tags
    }
    let (one, other) = pair(LIMITS);

    let thread = std::thread::spawn(|| work(one, 1));
    let tags = work(other, 2);

    assert_eq!(tags, [1; 8]);
    assert_eq!(thread.join().unwrap(), [2; 8]);
}

#[test]
fn deadline_without_a_peer_that_receives_passes() {
    let ((sender, _keep), _other) = pair(LIMITS);
    let sender = Mutex::new(sender);
    let sent = sender.lock().unwrap().send(&[&message(1, 1_000_000)], &[]);
    assert_eq!(sent, Ok(Progress::Kept));
    let deadline = Instant::now() + Duration::from_millis(20);

    let drained = drain(&sender, Some(deadline), || Ok::<_, StreamError>(()));

    assert_eq!(drained, Ok(false));
    assert!(Instant::now() >= deadline);
}

#[test]
fn memory_is_not_allocated_for_a_size_alone() {
    let (mut ours, mut theirs) = receiver(LIMITS);
    ours.write_all(&message(1, 1_000_000)[..100]).unwrap();

    assert!(next(&mut theirs).is_none());

    assert!(theirs.buffer_size() < 100_000);
}

proptest! {
    #[test]
    fn any_messages_in_any_pieces_come_as_they_were_sent(
        messages in prop::collection::vec((0_usize..40_000, 0_usize..4), 1..12),
        cuts in prop::collection::vec(1_usize..30_000, 1..20),
    ) {
        let (ours, mut theirs) = receiver(LIMITS);
        let expected: Vec<_> = messages.iter().enumerate().map(|(tag, (body, count))| {
            (u8::try_from(tag).unwrap(), *body, *count, 0)
        }).collect();
        let sent = expected.clone();
        let thread = std::thread::spawn(move || {
            let (_reader, writer) = pipe();
            let mut cuts = cuts.iter().cycle();
            for (tag, body, count, _) in sent {
                let bytes = message(tag, body);
                let mut rest = bytes.as_slice();
                let mut descriptors = vec![&writer; count];
                while !rest.is_empty() {
                    let (piece, behind) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                    match descriptors.is_empty() {
                        true => (&ours).write_all(piece).unwrap(),
                        false => send_with(&ours, piece, &descriptors),
                    }
                    descriptors.clear();
                    rest = behind;
                }
            }
        });

        let mut received = Vec::new();
        let deadline = Some(Instant::now() + Duration::from_secs(30));
        let wanted = Ready { receive: true, send: false };
        'all: while wait(theirs.as_fd(), wanted, deadline).unwrap().receive {
            loop {
                match theirs.receive() {
                    Ok(None) => break,
                    Err(StreamError::Closed) => break 'all,
                    Err(error) => panic!("{error}"),
                    Ok(Some(message)) => {
                        let (tag, fds) = (message.header()[0], &message.descriptors);
                        prop_assert!(message.body().iter().all(|byte| *byte == tag));
                        received.push((tag, message.body().len(), fds.kept().len(), fds.lost()));
                    }
                }
            }
        }
        thread.join().unwrap();
        prop_assert_eq!(received, expected);
    }
}

#[test]
fn pipe_of_the_tests_ends_when_its_writers_are_closed() {
    let (mut reader, writer) = pipe();
    assert!(!is_closed(&reader));
    drop(writer);

    assert!(is_closed(&reader));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}
