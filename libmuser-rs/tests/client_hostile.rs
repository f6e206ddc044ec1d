// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client makes of servers that do not follow the protocol: an error that says so, in time,
//! and nothing that stays behind.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

use libmuser::client::{Client, ClientMemory, IrqAction, IrqData, RegionWrite};
use libmuser::transport::RemoteMemory;
use libmuser::{DmaAccess, Error};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use proptest::prelude::*;

mod script;
use script::*;

/// Something a client does, with the command that it sends for it.
type Deed = (u16, fn(&Client) -> Result<(), Error>);

const DEEDS: [Deed; 11] = [
    (REGION_READ, |client| {
        let mut data = [0; 4];
        client.read(0, 0, &mut data)?;
        assert_eq!(data, [0, 1, 2, 3]);
        Ok(())
    }),
    (REGION_WRITE, |client| client.write(0, 0, &[1, 2]).map(drop)),
    (WRITE_MULTI, |client| {
        let write = RegionWrite {
            region: 0,
            offset: 4,
            data: &[1],
        };
        client.write_multi(&[write, write])
    }),
    (SET_IRQS, |client| {
        client.set_irqs(0, 0, IrqAction::Mask, IrqData::None(1))
    }),
    (RESET, Client::reset),
    (DMA_MAP, map),
    (DMA_UNMAP, |client| {
        map(client)?;
        client.dma_unmap(0x1000, 0x1000).map(drop)
    }),
    (DMA_UNMAP, |client| client.dma_unmap_all().map(drop)),
    (FEATURE, Client::stop_dirty_log),
    (FEATURE, |client| client.dirty_pages(0..0x1_0000).map(drop)),
    (IO_FDS, |client| client.io_eventfds(0).map(drop)),
];

/// Commands that are sent while a client connects.
const GREETINGS: [u16; 4] = [VERSION, GET_INFO, REGION_INFO, IRQ_INFO];

fn map(client: &Client) -> Result<(), Error> {
    let memory = ClientMemory::new(0x1000).map_err(Error::from)?;
    client.dma_map(0x1000, &memory, 0..0x1000, DmaAccess::Read)
}

fn read(client: &Client) -> Result<(), Error> {
    DEEDS[0].1(client)
}

/// Spoils the first reply to `command`, which would be `good`.
fn spoil(
    command: u16,
    spoiled: impl Fn(&Asked, Answer) -> Answer + Send + 'static,
) -> impl FnMut(&std::os::unix::net::UnixStream, &Asked) -> Option<Answer> + Send + 'static {
    let mut done = false;
    move |_, asked| {
        if asked.command != command || done {
            return None;
        }
        done = true;
        Some(spoiled(asked, good(asked)))
    }
}

/// What a client finds that connects to a server whose reply to `command` is spoiled, or does the
/// deed for it. A client that lives is returned as well.
fn meet(
    deed: &Deed,
    spoiled: impl Fn(&Asked, Answer) -> Answer + Send + 'static,
    timeout: std::time::Duration,
) -> (Result<(), Error>, Client, Served) {
    let (client, served) = client(timeout, spoil(deed.0, spoiled));
    let started = Instant::now();
    let result = deed.1(&client);
    assert!(started.elapsed() < DEADLINE, "it hangs");
    (result, client, served)
}

fn greet(
    command: u16,
    spoiled: impl Fn(&Asked, Answer) -> Answer + Send + 'static,
) -> Result<(), Error> {
    let (socket, _served) = serve(spoil(command, spoiled));
    let started = Instant::now();
    let result = options(SHORT).open(socket);
    assert!(started.elapsed() < DEADLINE, "it hangs");
    result.map(drop)
}

/// Flips bits of the header at an offset.
fn flip(at: usize, bits: u8) -> impl Fn(&Asked, Answer) -> Answer + Send + Clone + 'static {
    move |_, mut answer| {
        answer.bytes[at] ^= bits;
        answer
    }
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (File::from(reader), writer)
}

/// Whether every copy of the pipe's writing end is closed, or will be at once.
fn is_closed(reader: &File) -> bool {
    let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::from(5000_u16)).unwrap();
    polled[0].revents().unwrap().contains(PollFlags::POLLHUP)
}

#[test]
fn good_server_is_no_trouble() {
    for deed in DEEDS {
        let (result, client, _served) = meet(&deed, |_, good| good, DEADLINE);
        result.unwrap();
        read(&client).unwrap();
        drop(client);
    }
    for command in GREETINGS {
        greet(command, |_, good| good).unwrap();
    }
}

#[test]
fn reply_with_another_id_ends_the_connection() {
    for deed in DEEDS {
        let (result, client, _served) = meet(&deed, flip(1, 0x40), DEADLINE);
        let error = result.unwrap_err();
        assert!(error.is_protocol(), "{error}");
        assert!(error.to_string().contains("for which nobody waits"));
        assert!(read(&client).unwrap_err().is_protocol());
        drop(client);
    }
    assert!(
        GREETINGS.map(|command| greet(command, flip(1, 0x40)).unwrap_err().is_protocol())
            == [true; 4]
    );
}

#[test]
fn reply_to_another_command_ends_the_connection() {
    for deed in DEEDS {
        let (result, client, _served) = meet(&deed, flip(3, 0x40), DEADLINE);
        let error = result.unwrap_err();
        assert!(error.is_protocol(), "{error}");
        assert!(read(&client).unwrap_err().is_protocol());
        drop(client);
    }
    assert!(
        GREETINGS.map(|command| greet(command, flip(3, 0x40)).unwrap_err().is_protocol())
            == [true; 4]
    );
}

#[test]
fn message_of_no_type_ends_the_connection() {
    for deed in DEEDS {
        let (result, client, _served) = meet(&deed, flip(8, 0x02), DEADLINE);
        assert!(result.unwrap_err().is_protocol());
        assert!(read(&client).unwrap_err().is_protocol());
        drop(client);
    }
    assert!(greet(VERSION, flip(8, 0x02)).unwrap_err().is_protocol());
}

#[test]
fn command_instead_of_a_reply_is_refused_and_waited_out() {
    for deed in DEEDS {
        let (result, client, _served) = meet(&deed, flip(8, 0x01), SHORT);
        let error = result.unwrap_err();
        assert!(error.is_timed_out(), "{error}");
        read(&client).unwrap();
        drop(client);
    }
    assert!(greet(VERSION, flip(8, 0x01)).unwrap_err().is_protocol());
}

#[test]
fn reply_of_a_size_that_can_not_be_ends_the_connection() {
    for bytes in [0_u32, 1, 15, (1 << 20) + 4113, u32::MAX] {
        let wrong = move |_: &Asked, mut answer: Answer| {
            answer.bytes[4..8].copy_from_slice(&bytes.to_ne_bytes());
            answer
        };
        for deed in DEEDS {
            let (result, client, _served) = meet(&deed, wrong, DEADLINE);
            let error = result.unwrap_err();
            assert!(error.is_protocol(), "{bytes}: {error}");
            drop(client);
        }
        assert!(greet(VERSION, wrong).unwrap_err().is_protocol());
    }
}

/// Cuts or lengthens the payload.
fn resize(len: usize) -> impl Fn(&Asked, Answer) -> Answer + Send + Clone + 'static {
    move |asked, answer| {
        let mut body = answer.bytes[16..].to_vec();
        body.resize(len, 0xaa);
        reply(asked, &body).with(answer.fds)
    }
}

/// Bytes of payload in the good reply to a deed.
fn payload(deed: &Deed) -> usize {
    let found = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&found);
    let look = move |_: &Asked, answer: Answer| {
        seen.store(answer.bytes.len() - 16, Ordering::SeqCst);
        answer
    };
    let (result, client, served) = meet(deed, look, DEADLINE);
    result.unwrap();
    drop((client, served));
    found.load(Ordering::SeqCst)
}

#[test]
fn short_payload_is_told_and_the_connection_goes_on() {
    for deed in DEEDS {
        for len in 0..payload(&deed) {
            let (result, client, _served) = meet(&deed, resize(len), DEADLINE);
            let error = result.unwrap_err();
            assert!(error.is_protocol(), "{}: {len}: {error}", deed.0);
            read(&client).unwrap();
            drop(client);
        }
    }
}

#[test]
fn data_that_nobody_asked_for_is_told_and_the_connection_goes_on() {
    for deed in DEEDS {
        let strict = [REGION_READ, REGION_WRITE, SET_IRQS, RESET, DMA_MAP];
        for more in [1, 8, 100_000] {
            let (result, client, _served) = meet(&deed, resize(payload(&deed) + more), DEADLINE);
            match result {
                Ok(()) => assert!(!strict.contains(&deed.0), "{}", deed.0),
                Err(error) => assert!(error.is_protocol(), "{error}"),
            }
            read(&client).unwrap();
            drop(client);
        }
    }
}

#[test]
fn error_reply_is_its_errno_and_the_connection_goes_on() {
    for deed in DEEDS {
        let refuse = |asked: &Asked, _| error(asked, 28);
        let (result, client, _served) = meet(&deed, refuse, DEADLINE);
        let error = result.unwrap_err();
        assert_eq!(error.errno().number(), 28, "{error}");
        assert!(!error.is_protocol() && !error.is_timed_out() && !error.is_disconnected());
        read(&client).unwrap();
        drop(client);
    }
    let error = greet(VERSION, |asked, _| error(asked, 22)).unwrap_err();
    assert_eq!(error.errno().number(), 22);
}

#[test]
fn error_reply_without_an_errno_is_eio() {
    for errno in [0, 5000, u32::MAX] {
        let refuse = move |asked: &Asked, _| error(asked, errno);
        let (result, client, _served) = meet(&DEEDS[0], refuse, DEADLINE);
        assert_eq!(result.unwrap_err().errno().number(), 5);
        drop(client);
    }
}

#[test]
fn silence_ends_at_the_deadline_and_the_late_reply_is_ignored() {
    for deed in DEEDS {
        let mut late: Option<Answer> = None;
        let mut done = false;
        let (client, _served) = client(SHORT, move |mut stream, asked| {
            if asked.command == deed.0 && !done {
                done = true;
                late = Some(good(asked));
                return Some(Answer::silence());
            }
            // With the next command comes what the first one was waiting for.
            if let Some(late) = late.take() {
                stream.write_all(&late.bytes).unwrap();
            }
            None
        });
        let started = Instant::now();
        let error = deed.1(&client).unwrap_err();
        assert!(error.is_timed_out(), "{error}");
        assert!(started.elapsed() >= SHORT && started.elapsed() < DEADLINE);
        read(&client).unwrap();
        drop(client);
    }
    for command in GREETINGS {
        let error = greet(command, |_, _| Answer::silence()).unwrap_err();
        assert!(error.is_timed_out(), "{error}");
    }
}

/// Memory of which the server gets no descriptor.
#[derive(Debug)]
struct RemoteBytes;

impl RemoteBytes {
    fn memory(len: u64) -> ClientMemory {
        ClientMemory::remote(Arc::new(Self), len)
    }
}

impl RemoteMemory for RemoteBytes {
    fn read(&self, _offset: u64, to: &mut [u8]) -> std::io::Result<()> {
        to.fill(7);
        Ok(())
    }

    fn write(&self, _offset: u64, _from: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a server sends that asks for this many bytes of memory, this often.
fn asking(times: u16, bytes: u64) -> Vec<u8> {
    let ask = |id| message(id, DMA_READ, 0, 0, &longs(&[0x1000, bytes]));
    (0..times).flat_map(ask).collect()
}

#[test]
fn server_that_asks_and_does_not_receive_holds_nobody() {
    let (tell, over) = std::sync::mpsc::channel::<()>();
    let (client, _served) = client(SHORT, move |mut stream, asked| {
        if asked.command == REGION_READ {
            stream.write_all(&asking(400, 1 << 20)).unwrap();
            let _ = over.recv_timeout(DEADLINE);
            return Some(Answer::silence().and_close());
        }
        None
    });
    let memory = RemoteBytes::memory(1 << 20);
    client
        .dma_map(0x1000, &memory, 0..1 << 20, DmaAccess::Read)
        .unwrap();
    let started = Instant::now();

    assert!(read(&client).unwrap_err().is_timed_out());
    client.serve().unwrap();
    drop(client);

    assert!(started.elapsed() < DEADLINE / 4, "{:?}", started.elapsed());
    drop(tell);
}

#[test]
fn answer_that_is_left_over_makes_the_descriptor_ready() {
    const BYTES: u64 = 1 << 20;
    let (tell, received) = std::sync::mpsc::channel();
    let (start, started) = std::sync::mpsc::channel::<()>();
    let (socket, _served) = serve(move |mut stream, asked| {
        if asked.command == REGION_READ {
            // What it asks for is before the reply, so the call returns with an answer left over.
            stream.write_all(&asking(1, BYTES)).unwrap();
            stream.write_all(&good(asked).bytes).unwrap();
            started.recv_timeout(DEADLINE).unwrap();
            tell.send(receive(stream).unwrap().body.len()).unwrap();
            return Some(Answer::silence());
        }
        None
    });
    let client = options(DEADLINE)
        .serving_thread(false)
        .open(socket)
        .unwrap();
    let memory = RemoteBytes::memory(BYTES);
    client
        .dma_map(0x1000, &memory, 0..BYTES, DmaAccess::Read)
        .unwrap();
    read(&client).unwrap();
    start.send(()).unwrap();

    let deadline = Instant::now() + DEADLINE;
    let came = loop {
        if let Ok(came) = received.try_recv() {
            break came;
        }
        assert!(Instant::now() < deadline, "the rest is not sent");
        let mut polled = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(100_u16)).unwrap() > 0 {
            client.serve().unwrap();
        }
    };

    assert_eq!(came as u64, 16 + BYTES);
    drop(client);
}

#[test]
fn server_that_is_slow_with_each_answer_is_not_waited_for_again_and_again() {
    const PART: std::time::Duration = std::time::Duration::from_millis(200);
    let (socket, _served) = serve(move |_, asked| {
        if asked.command == GET_INFO {
            return Some(reply(asked, &words(&[16, 3, 200, 200])));
        }
        if asked.command == VERSION {
            return None;
        }
        let (_tell, never) = std::sync::mpsc::channel::<()>();
        let _ = never.recv_timeout(PART / 4);
        // There is none of this index.
        Some(error(asked, 22))
    });
    let started = Instant::now();

    let error = options(PART).open(socket).unwrap_err();

    assert!(error.is_timed_out(), "{error}");
    assert!(started.elapsed() < PART * 5, "{:?}", started.elapsed());
}

/// Memory that reads a register of the device.
#[derive(Debug, Default)]
struct Recursive {
    client: std::sync::OnceLock<std::sync::Weak<Client>>,
    errno: std::sync::atomic::AtomicI32,
}

impl RemoteMemory for Recursive {
    fn read(&self, _offset: u64, _to: &mut [u8]) -> std::io::Result<()> {
        let client = self.client.get().unwrap().upgrade().unwrap();
        let error = read(&client).unwrap_err();
        self.errno.store(error.errno().number(), Ordering::SeqCst);
        Err(nix::errno::Errno::EIO.into())
    }

    fn write(&self, _offset: u64, _from: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn memory_that_waits_for_its_own_reader_is_told_so() {
    let (socket, _served) = serve(|mut stream, asked| {
        if asked.command == RESET {
            stream.write_all(&asking(1, 8)).unwrap();
        }
        None
    });
    let client = options(DEADLINE).serving_thread(false).open(socket);
    let client = Arc::new(client.unwrap());
    let recursive = Arc::new(Recursive::default());
    recursive.client.set(Arc::downgrade(&client)).unwrap();
    let memory = ClientMemory::remote(Arc::clone(&recursive) as _, 0x1000);
    client
        .dma_map(0x1000, &memory, 0..0x1000, DmaAccess::Read)
        .unwrap();

    client.reset().unwrap();

    // EDEADLK
    assert_eq!(recursive.errno.load(Ordering::SeqCst), 35);
    drop(client);
}

#[test]
fn mapping_in_doubt_goes_when_the_server_does_not_have_it() {
    let mut unmapped = 0;
    let (client, _served) = client(SHORT, move |_, asked| {
        (asked.command == DMA_UNMAP).then(|| {
            unmapped += 1;
            match unmapped {
                // It is done, but nobody hears of it.
                1 => Answer::silence(),
                // No such mapping.
                2 => error(asked, 2),
                _ => good(asked),
            }
        })
    });
    map(&client).unwrap();
    assert!(client.dma_unmap(0x1000, 0x1000).unwrap_err().is_timed_out());
    assert_eq!(map(&client).unwrap_err().errno().number(), 17);

    assert_eq!(client.dma_unmap(0x1000, 0x1000).unwrap(), 0x1000);

    map(&client).unwrap();
    assert_eq!(client.dma_unmap(0x1000, 0x1000).unwrap(), 0x1000);
    drop(client);
}

#[test]
fn mapping_made_while_all_are_unmapped_stays() {
    let (tell, unmapping) = std::sync::mpsc::channel();
    let mut late: Option<Answer> = None;
    let (client, _served) = client(DEADLINE, move |mut stream, asked| {
        if asked.command == DMA_UNMAP && late.is_none() && word(&asked.body, 4) == 2 {
            late = Some(good(asked));
            tell.send(()).unwrap();
            return Some(Answer::silence());
        }
        if asked.command == DMA_MAP && late.is_some() {
            // The other mapping is there first, then all of before is gone.
            stream.write_all(&good(asked).bytes).unwrap();
            return late.take();
        }
        None
    });
    map(&client).unwrap();

    let (all, other) = std::thread::scope(|scope| {
        let all = scope.spawn(|| client.dma_unmap_all());
        unmapping.recv_timeout(DEADLINE).unwrap();
        let memory = ClientMemory::new(0x1000).unwrap();
        let other = client.dma_map(0x8000, &memory, 0..0x1000, DmaAccess::Read);
        (all.join().unwrap(), other)
    });

    other.unwrap();
    assert_eq!(all.unwrap(), 0x1000);
    assert_eq!(client.dma_unmap(0x8000, 0x1000).unwrap(), 0x1000);
    drop(client);
}

#[test]
fn connection_closed_at_any_byte_is_told() {
    for deed in DEEDS {
        for len in 0..payload(&deed) + 16 {
            let cut = move |_: &Asked, mut answer: Answer| {
                answer.bytes.truncate(len);
                answer.and_close()
            };
            let (result, client, _served) = meet(&deed, cut, DEADLINE);
            let error = result.unwrap_err();
            assert!(error.is_disconnected(), "{len}: {error}");
            assert!(read(&client).unwrap_err().is_disconnected());
            drop(client);
        }
    }
    for command in GREETINGS {
        for len in 0..16 {
            let cut = move |_: &Asked, mut answer: Answer| {
                answer.bytes.truncate(len);
                answer.and_close()
            };
            assert!(greet(command, cut).unwrap_err().is_disconnected());
        }
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    for deed in DEEDS {
        let (reader, writer) = pipe();
        let writer = File::from(writer);
        let add = move |_: &Asked, mut answer: Answer| {
            for _ in 0..100 {
                answer.fds.push(writer.try_clone().unwrap().into());
            }
            answer
        };
        let (result, client, served) = meet(&deed, add, DEADLINE);
        assert!(result.is_ok() || result.unwrap_err().is_protocol());
        read(&client).unwrap();
        // The server's own go with its script.
        drop((client, served));
        assert!(is_closed(&reader));
    }
}

#[test]
fn reply_to_which_no_command_was_sent_ends_the_connection() {
    let (client, _served) = client(DEADLINE, |mut stream, asked| {
        if asked.command == REGION_READ {
            let stray = message(asked.id.wrapping_add(1), REGION_READ, 1, 0, &[]);
            stream.write_all(&stray).unwrap();
        }
        None
    });

    assert!(read(&client).unwrap_err().is_protocol());
    drop(client);
}

#[test]
fn second_reply_ends_the_connection() {
    let (client, _served) = client(DEADLINE, |mut stream, asked| {
        if asked.command == REGION_READ {
            stream.write_all(&good(asked).bytes).unwrap();
        }
        None
    });

    let results = [read(&client), read(&client)];

    assert!(results
        .into_iter()
        .any(|result| result.is_err_and(|error| error.is_protocol())));
    drop(client);
}

#[test]
fn reply_about_something_else_is_told() {
    for at in [16, 24, 28] {
        for deed in &DEEDS[..2] {
            let (result, client, _served) = meet(deed, flip(at, 1), DEADLINE);
            let error = result.unwrap_err();
            assert!(error.is_protocol(), "{error}");
            assert!(error.to_string().contains("were asked for"), "{error}");
            read(&client).unwrap();
            drop(client);
        }
    }
}

#[test]
fn more_writes_done_than_sent_is_told() {
    let (result, client, _served) = meet(&DEEDS[2], flip(16, 1), DEADLINE);
    assert!(result.unwrap_err().is_protocol());
    drop(client);
}

#[test]
fn fewer_writes_done_than_sent_is_an_error() {
    let (result, client, _served) = meet(&DEEDS[2], flip(16, 3), DEADLINE);
    assert_eq!(result.unwrap_err().errno().number(), 5);
    drop(client);
}

#[test]
fn version_that_can_not_be_is_refused() {
    for (payload, what) in [
        (vec![], "too short"),
        (vec![0, 0, 0], "too short"),
        (vec![1, 0, 0, 0], "1.0 came"),
        (vec![0, 0, 2, 0], "0.2 came"),
        (vec![0, 0, 0, 0, b'{'], "NUL"),
        (version("{"), "JSON"),
        (version("[]"), "object"),
        (
            version(r#"{"capabilities":{"max_data_xfer_size":0}}"#),
            "max_data_xfer_size",
        ),
        (
            version(r#"{"capabilities":{"max_msg_fds":"x"}}"#),
            "max_msg_fds",
        ),
        (version(&"[".repeat(4000)), "JSON"),
        (
            version(r#"{"capabilities":{"twin_socket":{"supported":true}}}"#),
            "fd_index",
        ),
        (
            version(r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#),
            "descriptor 0, and 0 came",
        ),
        (
            version(
                r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":18446744073709551615}}}"#,
            ),
            "descriptor",
        ),
    ] {
        let bad = payload.clone();
        let error = greet(VERSION, move |asked, _| reply(asked, &bad)).unwrap_err();
        assert!(error.is_protocol(), "{error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn twin_socket_that_is_none_is_refused() {
    let json = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
    let datagrams = || std::os::unix::net::UnixDatagram::pair().unwrap().0.into();
    let kinds: [fn() -> OwnedFd; 2] = [|| memfd(1), || pipe().1];
    for kind in kinds {
        let error = greet(VERSION, move |asked, _| {
            reply(asked, &version(json)).with(vec![kind()])
        });
        assert!(error.unwrap_err().is_protocol());
    }
    let error = greet(VERSION, move |asked, _| {
        reply(asked, &version(json)).with(vec![datagrams()])
    });
    assert!(error.unwrap_err().is_protocol());
}

#[test]
fn twin_socket_for_which_nobody_asked_is_refused() {
    let (socket, _served) = serve(spoil(VERSION, |asked, _| {
        let json = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
        let twin = std::os::unix::net::UnixStream::pair().unwrap().0;
        reply(asked, &version(json)).with(vec![twin.into()])
    }));

    let error = options(DEADLINE)
        .twin_socket(false)
        .open(socket)
        .unwrap_err();

    assert!(error.is_protocol(), "{error}");
}

#[test]
fn more_regions_or_interrupts_than_can_be_are_refused() {
    for counts in [[u32::MAX, 0], [0, u32::MAX], [257, 0]] {
        let info = words(&[16, 0, counts[0], counts[1]]);
        let error = greet(GET_INFO, move |asked, _| reply(asked, &info)).unwrap_err();
        assert!(error.is_protocol(), "{error}");
    }
}

/// Connects to a server that says this of region 0.
fn with_region(
    info: Vec<u8>,
    file: fn() -> Vec<OwnedFd>,
) -> Result<(Client, Served), (Error, Served)> {
    let (socket, served) = serve(move |_, asked| {
        let is_first = asked.command == REGION_INFO && word(&asked.body, 8) == 0;
        is_first.then(|| {
            let shown = info.len().min(word(&asked.body, 0) as usize);
            reply(asked, &info[..shown]).with(file())
        })
    });
    match options(DEADLINE).open(socket) {
        Ok(client) => Ok((client, served)),
        Err(error) => Err((error, served)),
    }
}

#[test]
fn areas_that_can_not_be_are_refused() {
    for areas in [
        vec![(0x3000, 1)],
        vec![(0x1000, 0x2001)],
        vec![(u64::MAX, 2)],
        vec![(0, u64::MAX)],
        vec![(0, 0x1000), (0xfff, 0x1000)],
        vec![(0x1000, 0x1000), (0x1000, 0x1000)],
    ] {
        let result = with_region(region_info(0x3000, &areas), || vec![memfd(0x3000)]);
        let error = result.map(drop).unwrap_err().0;
        assert!(error.is_protocol(), "{areas:?}: {error}");
    }
}

#[test]
fn capabilities_that_can_not_be_are_refused() {
    let good = region_info(0x3000, &[(0, 0x1000)]);
    let change = |at: usize, value: u32| {
        let mut info = good.clone();
        info[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        info
    };
    for (info, what) in [
        (change(12, 1), "in the fixed part"),
        (change(12, 31), "in the fixed part"),
        (change(12, 57), "ends beyond"),
        (change(12, u32::MAX), "ends beyond"),
        (change(36, 32), "a loop"),
        (change(36, 39), "inside of itself"),
        (change(36, u32::MAX), "ends beyond"),
        (change(40, 2), "more areas than bytes"),
        (change(40, u32::MAX), "more areas than bytes"),
        (change(0, u32::MAX), "too many bytes"),
        (change(8, 1), "another region"),
    ] {
        let result = with_region(info, || vec![memfd(0x3000)]);
        let error = result.map(drop).unwrap_err().0;
        assert!(error.is_protocol(), "{what}: {error}");
    }
}

#[test]
fn region_without_a_file_to_map_works_without() {
    let files: [fn() -> Vec<OwnedFd>; 3] = [
        Vec::new,
        || vec![pipe().1],
        || vec![File::open("/dev/null").unwrap().into()],
    ];
    for file in files {
        let result = with_region(region_info(0x3000, &[(0x1000, 0x1000)]), file);
        let (client, _served) = result.map_err(|(error, _)| error).unwrap();
        assert_eq!(client.region(0).unwrap().areas, []);
        assert_eq!(client.map(0, 0x1000).unwrap_err().errno().number(), 22);
        drop(client);
    }
}

#[test]
fn mapped_file_that_shrinks_reads_as_zeroes() {
    let (kept, server) = (memfd(0x3000), std::sync::Mutex::new(None));
    let file = File::from(kept);
    file.set_len(0x3000).unwrap();
    *server.lock().unwrap() = Some(OwnedFd::from(file.try_clone().unwrap()));
    let (client, _served) = client(DEADLINE, move |_, asked| {
        let is_first = asked.command == REGION_INFO && word(&asked.body, 8) == 0;
        is_first.then(|| {
            let mut answer = good(asked);
            let server = server.lock().unwrap();
            answer.fds = vec![server.as_ref().unwrap().try_clone().unwrap()];
            answer
        })
    });
    let memory = client.map(0, 0x1000).unwrap();
    memory.write(0, 0x1234_u32).unwrap();
    assert_eq!(memory.read::<u32>(0).unwrap(), 0x1234);

    file.set_len(0).unwrap();

    assert_eq!(memory.read::<u32>(0).unwrap(), 0);
    memory.write(0, 1_u32).unwrap();
    drop(client);
}

#[test]
fn eventfds_of_writes_that_can_not_be_are_refused() {
    let entry = |offset: u64, size: u64, fd: u32| {
        [longs(&[offset, size]), words(&[fd, 0, 0, 0]), longs(&[0])].concat()
    };
    let with = |argsz: u32, index: u32, count: u32, entry: Vec<u8>| {
        [words(&[argsz, 0, index, count]), entry].concat()
    };
    for (info, what) in [
        (with(56, 0, 1, entry(0x3000, 1, 0)), "beyond the region"),
        (with(56, 0, 1, entry(0x2fff, 2, 0)), "across its end"),
        (with(56, 0, 1, entry(u64::MAX, u64::MAX, 0)), "overflow"),
        (with(56, 0, 1, entry(0, 4, 1)), "no such descriptor"),
        (with(56, 0, 2, entry(0, 4, 0)), "more entries than bytes"),
        (
            with(56, 0, u32::MAX, entry(0, 4, 0)),
            "more entries than bytes",
        ),
        (with(56, 1, 1, entry(0, 4, 0)), "another region"),
        (with(u32::MAX, 0, 1, entry(0, 4, 0)), "too many bytes"),
    ] {
        let (client, _served) = client(DEADLINE, move |_, asked| {
            (asked.command == IO_FDS).then(|| {
                let shown = info.len().min(word(&asked.body, 0) as usize);
                reply(asked, &info[..shown]).with(vec![memfd(1)])
            })
        });
        let error = client.io_eventfds(0).unwrap_err();
        assert!(error.is_protocol(), "{what}: {error}");
        drop(client);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever a server sends, calls return in time.
    #[test]
    fn any_change_of_replies_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        command in prop::sample::select(vec![
            VERSION, GET_INFO, REGION_INFO, IRQ_INFO, REGION_READ, REGION_WRITE, DMA_UNMAP,
            SET_IRQS, FEATURE, IO_FDS, WRITE_MULTI,
        ]),
    ) {
        let (socket, served) = serve(move |_, asked| {
            (asked.command == command).then(|| {
                let mut answer = good(asked);
                for (at, byte) in &changes {
                    let at = at.index(answer.bytes.len());
                    answer.bytes[at] = *byte;
                }
                answer
            })
        });
        let started = Instant::now();
        if let Ok(client) = options(SHORT).open(socket) {
            for deed in DEEDS.iter().skip(1) {
                let _ = deed.1(&client);
            }
            let mut data = [0; 16];
            let _ = client.read(0, 0, &mut data);
        }
        prop_assert!(started.elapsed() < DEADLINE);
        drop(served);
    }

    /// So they do when it is no protocol at all.
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
        let (socket, served) = serve(move |_, asked| {
            (asked.command == REGION_READ).then(|| Answer::bytes(bytes.clone()))
        });
        let client = options(SHORT).open(socket).unwrap();
        let mut data = [0; 4];
        let _ = client.read(0, 0, &mut data);
        let _ = client.read(0, 0, &mut data);
        drop(client);
        drop(served);
    }
}
