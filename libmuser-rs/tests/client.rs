// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client sends, and what it does for a server that asks.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libmuser::client::{Client, ClientMemory, IrqAction, IrqData, RegionWrite};
use libmuser::transport::RemoteMemory;
use libmuser::{DmaAccess, Error};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    bind, listen as listen_at, socket, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
};

mod script;
use script::*;

/// A client of a server that does nothing wrong, and the commands which that gets.
fn listen(json: &'static str) -> (Client, Receiver<Asked>, Served) {
    let (tell, asked) = mpsc::channel();
    let (client, served) = client(DEADLINE, move |_, asked| {
        if asked.command == VERSION {
            return Some(reply(asked, &version(json)));
        }
        tell.send(asked.clone()).unwrap();
        None
    });
    (client, asked, served)
}

/// The next command of this kind.
fn next(asked: &Receiver<Asked>, command: u16) -> Asked {
    loop {
        let next = asked.recv_timeout(DEADLINE).unwrap();
        if next.command == command {
            return next;
        }
    }
}

fn data(asked: &Asked) -> (u64, u32, &[u8]) {
    (
        long(&asked.body, 0),
        word(&asked.body, 8),
        &asked.body[16..],
    )
}

#[test]
fn version_and_capabilities_are_proposed_first() {
    let (tell, proposed) = mpsc::channel();
    let (client, _served) = client(DEADLINE, move |_, asked| {
        let _ = tell.send(asked.clone());
        None
    });

    let first = proposed.recv_timeout(DEADLINE).unwrap();

    assert_eq!((first.id, first.command, first.flags), (0, VERSION, 0));
    assert_eq!(&first.body[..4], [0, 0, 1, 0]);
    let (nul, json) = first.body[4..].split_last().unwrap();
    assert_eq!(*nul, 0);
    let json = std::str::from_utf8(json).unwrap();
    for capability in [
        r#""max_msg_fds":64"#,
        r#""max_data_xfer_size":1048576"#,
        r#""max_dma_maps":65535"#,
        r#""pgsizes":4096"#,
        r#""write_multiple":true"#,
        r#""twin_socket":{"supported":true}"#,
    ] {
        assert!(json.contains(capability), "{json}");
    }
    assert_eq!(client.version(), (0, 1));
    drop(client);
}

#[test]
fn long_accesses_are_cut_to_what_the_server_takes() {
    let (client, asked, _served) = listen(r#"{"capabilities":{"max_data_xfer_size":10}}"#);
    let mut read = [0; 25];

    assert_eq!(client.read(0, 7, &mut read).unwrap(), 25);
    assert_eq!(client.write(0, 7, &read).unwrap(), 25);

    assert!((7..).zip(read).all(|(at, byte)| byte == at));
    for (offset, count) in [(7, 10), (17, 10), (27, 5)] {
        let part = next(&asked, REGION_READ);
        assert_eq!((long(&part.body, 0), word(&part.body, 12)), (offset, count));
    }
    for (offset, at) in [(7, 0), (17, 10), (27, 20)] {
        let part = next(&asked, REGION_WRITE);
        assert_eq!(data(&part), (offset, 0, &read[at..25.min(at + 10)]));
    }
    drop(client);
}

#[test]
fn access_across_the_end_is_short_and_beyond_it_is_refused() {
    let (client, _asked, _served) = listen("{}");
    let mut data = [0xee; 16];

    assert_eq!(client.read(1, 250, &mut data).unwrap(), 6);
    assert_eq!(data[6..], [0xee; 10]);
    assert_eq!(client.write(1, 250, &data).unwrap(), 6);
    assert_eq!(client.write_posted(1, 250, &data).unwrap(), 6);
    for region in [1, 2] {
        let error = client.read(region, 256, &mut data).unwrap_err();
        assert_eq!(error.errno().number(), 22);
        assert!(client.write(region, 256, &data).is_err());
    }
    drop(client);
}

#[test]
fn posted_write_is_not_answered_and_is_before_what_follows() {
    let (client, asked, _served) = listen("{}");

    client.write_posted(1, 8, &[1, 2]).unwrap();
    client.read(1, 0, &mut [0; 4]).unwrap();

    let write = next(&asked, REGION_WRITE);
    assert_eq!(write.flags, 0x10);
    assert_eq!(data(&write), (8, 1, &[1, 2][..]));
    next(&asked, REGION_READ);
    drop(client);
}

#[test]
fn several_writes_go_in_messages_of_what_fits() {
    let (client, asked, _served) = listen(r#"{"capabilities":{"write_multiple":true}}"#);
    let bytes: Vec<[u8; 2]> = (0..200).map(|at| [at, 0xff]).collect();
    let writes: Vec<_> = (0..200_u64)
        .map(|at| RegionWrite {
            region: 1,
            offset: at,
            data: &bytes[usize::try_from(at).unwrap()],
        })
        .collect();

    client.write_multi(&writes).unwrap();

    let mut count = 0;
    while count < 200 {
        let message = next(&asked, WRITE_MULTI);
        let entries = &message.body[8..];
        assert_eq!(long(&message.body, 0), entries.len() as u64 / 24);
        for entry in entries.chunks(24) {
            assert_eq!(
                (long(entry, 0), word(entry, 8), word(entry, 12)),
                (count, 1, 2)
            );
            assert_eq!(
                entry[16..],
                [count.to_le_bytes()[0], 0xff, 0, 0, 0, 0, 0, 0]
            );
            count += 1;
        }
    }
    let too_long = RegionWrite {
        region: 1,
        offset: 0,
        data: &[0; 9],
    };
    assert_eq!(
        client
            .write_multi(&[too_long])
            .unwrap_err()
            .errno()
            .number(),
        22
    );
    drop(client);
}

#[test]
fn several_writes_go_one_by_one_where_the_server_takes_no_more() {
    let (client, asked, _served) = listen("{}");
    let write = |offset| RegionWrite {
        region: 1,
        offset,
        data: &[9],
    };

    client.write_multi(&[write(1), write(2)]).unwrap();

    for offset in [1, 2] {
        assert_eq!(data(&next(&asked, REGION_WRITE)), (offset, 1, &[9][..]));
    }
    drop(client);
}

#[test]
fn interrupts_are_set_up_in_all_forms() {
    const FLAGS: [(IrqAction, u32); 3] = [
        (IrqAction::Mask, 8),
        (IrqAction::Unmask, 16),
        (IrqAction::Trigger, 32),
    ];
    let (client, asked, _served) = listen(r#"{"capabilities":{"max_msg_fds":2}}"#);
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let fd = Some(event.as_fd());
    for (action, flag) in FLAGS {
        client.set_irqs(0, 1, action, IrqData::None(3)).unwrap();
        client
            .set_irqs(0, 1, action, IrqData::Bools(&[true, false]))
            .unwrap();
        let events = [fd, fd, fd, None, None];
        client
            .set_irqs(0, 1, action, IrqData::EventFds(&events))
            .unwrap();
        for (data, start, count, bools) in [
            (1, 1, 3, vec![]),
            (2, 1, 2, vec![1, 0]),
            (4, 1, 2, vec![]),
            (4, 3, 1, vec![]),
            (4, 4, 2, vec![]),
        ] {
            let set = next(&asked, SET_IRQS).body;
            let expected = [
                u32::try_from(set.len()).unwrap(),
                flag | data,
                0,
                start,
                count,
            ];
            assert_eq!(set, [words(&expected), bools].concat());
        }
    }
    let calls = IrqData::Calls(vec![None]);
    let error = client
        .set_irqs(0, 0, IrqAction::Trigger, calls)
        .unwrap_err();
    assert_eq!(error.errno().number(), 95);
    drop(client);
}

#[test]
fn mappings_are_refused_that_can_not_be() {
    let (client, _asked, _served) = listen("{}");
    let memory = ClientMemory::new(0x4000).unwrap();
    let map = |iova, bytes| client.dma_map(iova, &memory, bytes, DmaAccess::ReadWrite);
    map(0x1_0000, 0..0x2000).unwrap();

    for (iova, bytes, errno) in [
        (0x800, 0..0x1000, 22),
        (0x1000, 0..0x800, 22),
        (0x1000, 0..0, 22),
        (0x1000, 0x1000..0x5000, 22),
        (u64::MAX - 0xfff, 0..0x2000, 75),
        (0x1_1000, 0..0x1000, 17),
        (0xf000, 0..0x4000, 17),
    ] {
        let error = map(iova, bytes).unwrap_err();
        assert_eq!(error.errno().number(), errno, "{iova:#x}: {error}");
    }
    assert_eq!(
        client
            .dma_unmap(0x1_1000, 0x1000)
            .unwrap_err()
            .errno()
            .number(),
        22
    );
    assert_eq!(client.dma_unmap(0x2_0000, 0x1000).unwrap(), 0);
    map(0x1_2000, 0..0x1000).unwrap();
    assert_eq!(client.dma_unmap(0, 1 << 40).unwrap(), 0x3000);
    map(0x1_0000, 0..0x1000).unwrap();
    assert_eq!(client.dma_unmap_all().unwrap(), 0x1000);
    map(0x1_0000, 0..0x1000).unwrap();
    drop(client);
}

#[test]
fn mapping_that_the_server_refuses_is_none() {
    let mut refused = false;
    let (client, _served) = client(DEADLINE, move |_, asked| {
        let refuse = asked.command == DMA_MAP && !std::mem::replace(&mut refused, true);
        refuse.then(|| error(asked, 28))
    });
    let memory = ClientMemory::new(0x1000).unwrap();
    let map = || client.dma_map(0, &memory, 0..0x1000, DmaAccess::Read);

    assert_eq!(map().unwrap_err().errno().number(), 28);
    map().unwrap();
    drop(client);
}

#[test]
fn dirty_pages_are_those_of_the_bitmap() {
    let (client, asked, _served) = listen(r#"{"capabilities":{"max_data_xfer_size":16}}"#);
    let memory = ClientMemory::new(0x7000).unwrap();
    client
        .dma_map(0, &memory, 0..0x7000, DmaAccess::ReadWrite)
        .unwrap();

    // Bits beyond the range are none of it.
    let dirty = client.dma_unmap_dirty(0, 0x7000).unwrap();
    assert_eq!(dirty, (0..7).map(|page| page * 4096).collect::<Vec<_>>());
    let unmap = next(&asked, DMA_UNMAP).body;
    assert_eq!((word(&unmap, 0), word(&unmap, 4)), (24 + 16 + 8, 1));
    assert_eq!((long(&unmap, 24), long(&unmap, 32)), (4096, 8));

    // A message has 128 bits, of which the server sets two in each 64.
    let base = 0x10_0000;
    let pages = client.dirty_pages(base..base + 200 * 4096).unwrap();
    let expected = [0, 2, 64, 66, 128, 130, 192, 194].map(|page| base + page * 4096);
    assert_eq!(pages, expected);
    drop(client);
}

/// A server that asks `commands` when the client resets the device, and tells what is replied to
/// each before it answers.
fn asks(
    commands: Vec<Vec<u8>>,
    options: libmuser::client::Options,
) -> (Client, Receiver<Asked>, Served) {
    let (tell, replies) = mpsc::channel();
    let (socket, served) = serve(move |mut stream, asked| {
        if asked.command == RESET {
            for command in &commands {
                stream.write_all(command).unwrap();
                tell.send(receive(stream).unwrap()).unwrap();
            }
        }
        None
    });
    (options.open(socket).unwrap(), replies, served)
}

fn dma(command: u16, id: u16, address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    let body = [&longs(&[address, count]), data].concat();
    message(id, command, 0, 0, &body)
}

fn lend(client: &Client) -> ClientMemory {
    let memory = ClientMemory::new(0x3000).unwrap();
    let map = |iova, bytes, access| {
        let unshared = memory.clone().unshared();
        client.dma_map(iova, &unshared, bytes, access).unwrap();
    };
    map(0x1000, 0..0x1000, DmaAccess::ReadWrite);
    map(0x2000, 0x2000..0x3000, DmaAccess::Read);
    map(0x5000, 0x1000..0x2000, DmaAccess::Write);
    memory
}

#[test]
fn server_reads_and_writes_what_is_mapped_while_a_call_waits() {
    let commands = vec![
        dma(DMA_READ, 1, 0x1ffe, 4, &[]),
        dma(DMA_WRITE, 2, 0x1010, 3, &[7, 8, 9]),
    ];
    let (client, replies, _served) = asks(commands, options(DEADLINE));
    let memory = lend(&client);
    memory.write(0xffe, &[1, 2]).unwrap();
    memory.write(0x2000, &[3, 4]).unwrap();

    client.reset().unwrap();

    let read = replies.recv().unwrap();
    assert_eq!((read.id, read.command, read.flags), (1, DMA_READ, 1));
    assert_eq!(read.body, [longs(&[0x1ffe, 4]), vec![1, 2, 3, 4]].concat());
    let written = replies.recv().unwrap();
    assert_eq!(
        (written.id, written.command, written.flags),
        (2, DMA_WRITE, 1)
    );
    assert_eq!(written.body, longs(&[0x1010, 3]));
    let mut bytes = [0; 3];
    memory.read(0x10, &mut bytes).unwrap();
    assert_eq!(bytes, [7, 8, 9]);
    drop(client);
}

#[test]
fn what_the_server_must_not_ask_is_refused_and_goes_on() {
    let cases = [
        (dma(DMA_READ, 1, 0x9000, 4, &[]), 14),
        (dma(DMA_READ, 2, 0x2ffe, 4, &[]), 14),
        (dma(DMA_READ, 3, 0x5000, 4, &[]), 1),
        (dma(DMA_WRITE, 4, 0x2000, 1, &[1]), 1),
        (dma(DMA_READ, 5, 0x1000, (1 << 20) + 1, &[]), 22),
        (dma(DMA_READ, 6, 0x1000, u64::MAX, &[]), 22),
        (dma(DMA_WRITE, 7, 0x1000, 2, &[1]), 22),
        (dma(DMA_READ, 8, 0x1000, 1, &[1]), 22),
        (message(9, DMA_READ, 0, 0, &[0; 15]), 22),
        (message(10, REGION_READ, 0, 0, &[0; 16]), 95),
        (message(11, 14, 0, 0, &[]), 95),
        (message(12, 999, 0, 0, &[1; 99]), 95),
    ];
    let commands = cases.iter().map(|(command, _)| command.clone()).collect();
    let (client, replies, _served) = asks(commands, options(DEADLINE));
    lend(&client);

    client.reset().unwrap();

    for (command, errno) in cases {
        let refused = replies.recv().unwrap();
        assert_eq!(refused.id.to_ne_bytes(), command[..2]);
        assert_eq!((refused.flags, refused.body.len()), (0x21, 0), "{errno}");
    }
    client.reset().unwrap();
    drop(client);
}

/// Memory of which each access is counted.
#[derive(Debug, Default)]
struct Counted(AtomicUsize);

impl RemoteMemory for Counted {
    fn read(&self, _offset: u64, to: &mut [u8]) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        to.fill(5);
        Ok(())
    }

    fn write(&self, _offset: u64, _from: &[u8]) -> std::io::Result<()> {
        Err(nix::errno::Errno::ENXIO.into())
    }
}

#[test]
fn remote_memory_is_asked_and_its_errors_are_told() {
    let commands = vec![
        dma(DMA_READ, 1, 0x1000, 2, &[]),
        dma(DMA_WRITE, 2, 0x1000, 1, &[1]),
    ];
    let (client, replies, _served) = asks(commands, options(DEADLINE));
    let counted = Arc::new(Counted::default());
    let memory = ClientMemory::remote(Arc::clone(&counted) as _, 0x1000);
    let access = DmaAccess::ReadWrite;
    client.dma_map(0x1000, &memory, 0..0x1000, access).unwrap();

    client.reset().unwrap();

    assert_eq!(replies.recv().unwrap().body[16..], [5, 5]);
    assert_eq!(replies.recv().unwrap().flags, 0x21);
    assert_eq!(counted.0.load(Ordering::SeqCst), 1);
    drop(client);
}

/// A server that asks for memory as soon as it is mapped, over the twin socket if it has one, when
/// the client has its reply already.
fn asks_later(twin: bool) -> (OwnedSocket, Receiver<Asked>) {
    let (tell, replies) = mpsc::channel();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut theirs = Some(theirs);
    let json = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
    let (socket, served) = serve(move |stream, asked| match asked.command {
        VERSION if twin => {
            let theirs = theirs.take().unwrap();
            Some(reply(asked, &version(json)).with(vec![theirs.into()]))
        }
        DMA_MAP => {
            let mut stream = stream;
            stream.write_all(&good(asked).bytes).unwrap();
            let mut other = if twin { &ours } else { stream };
            other.write_all(&dma(DMA_READ, 9, 0x1000, 2, &[])).unwrap();
            tell.send(receive(other).unwrap()).unwrap();
            Some(Answer::silence())
        }
        _ => None,
    });
    (OwnedSocket(socket, served), replies)
}

struct OwnedSocket(std::os::fd::OwnedFd, Served);

#[test]
fn server_is_answered_while_nobody_calls() {
    for twin in [false, true] {
        let (OwnedSocket(socket, _served), replies) = asks_later(twin);
        let client = options(DEADLINE).open(socket).unwrap();
        assert_eq!(client.has_twin_socket(), twin);
        let memory = ClientMemory::new(0x1000).unwrap().unshared();
        memory.write(0, &[3, 4]).unwrap();

        client
            .dma_map(0x1000, &memory, 0..0x1000, DmaAccess::Read)
            .unwrap();

        let read = replies.recv_timeout(DEADLINE).unwrap();
        assert_eq!((read.id, &read.body[16..]), (9, &[3, 4][..]), "{twin}");
        client.read(1, 0, &mut [0; 4]).unwrap();
        drop(client);
    }
}

#[test]
fn client_without_a_thread_is_readable_when_the_server_asks() {
    for twin in [false, true] {
        let (OwnedSocket(socket, _served), replies) = asks_later(twin);
        let client = options(DEADLINE)
            .serving_thread(false)
            .open(socket)
            .unwrap();
        let memory = ClientMemory::new(0x1000).unwrap().unshared();
        client
            .dma_map(0x1000, &memory, 0..0x1000, DmaAccess::Read)
            .unwrap();

        // It may have been asked before the reply was taken.
        let read = loop {
            match replies.try_recv() {
                Ok(read) => break read,
                Err(_) => {
                    let mut polled = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
                    poll(&mut polled, PollTimeout::from(100_u16)).unwrap();
                    client.serve().unwrap();
                }
            }
        };

        assert_eq!((read.id, read.flags), (9, 1));
        drop(client);
    }
}

#[test]
fn replies_in_any_order_find_their_threads() {
    const THREADS: u64 = 6;
    const ROUNDS: u64 = 100;
    let mut held: Vec<Asked> = Vec::new();
    let (client, _served) = client(DEADLINE, move |mut stream, asked| {
        if asked.command != REGION_READ {
            return None;
        }
        held.push(asked.clone());
        // The last read is alone.
        let is_last = long(&asked.body, 0) == 0x2fff;
        if held.len() as u64 >= THREADS / 2 || is_last {
            while let Some(asked) = held.pop() {
                stream.write_all(&good(&asked).bytes).unwrap();
            }
        }
        Some(Answer::silence())
    });

    std::thread::scope(|scope| {
        let client = &client;
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let mut data = [0; 3];
                        let offset = number * ROUNDS + round;
                        client.read(0, offset, &mut data).unwrap();
                        let expected = [offset, offset + 1, offset + 2];
                        assert_eq!(data, expected.map(|at| at.to_le_bytes()[0]));
                    }
                })
            })
            .collect();
        // Whoever is left alone with less than a batch is freed.
        while !threads.iter().all(|thread| thread.is_finished()) {
            client.read(0, 0x2fff, &mut [0; 1]).unwrap();
        }
    });
    drop(client);
}

#[test]
fn thread_that_leaves_hands_over_to_one_that_waits() {
    let mut slow: Option<Asked> = None;
    let (client, _served) = client(DEADLINE, move |mut stream, asked| {
        match asked.command {
            RESET => slow = Some(asked.clone()),
            // Both replies at once: whoever leads may take its own, and leave the other.
            REGION_READ if slow.is_some() => {
                stream.write_all(&good(asked).bytes).unwrap();
                let slow = slow.take().unwrap();
                stream.write_all(&good(&slow).bytes).unwrap();
            }
            _ => return None,
        }
        Some(Answer::silence())
    });

    for _ in 0..200 {
        std::thread::scope(|scope| {
            let reset = scope.spawn(|| client.reset());
            while !reset.is_finished() {
                client.read(0, 0, &mut [0; 1]).unwrap();
            }
            reset.join().unwrap().unwrap();
        });
    }
    drop(client);
}

#[test]
fn silent_server_keeps_no_thread_beyond_its_deadline() {
    let timeout = Duration::from_millis(200);
    let (client, _served) = client(timeout, |_, asked| {
        (asked.command == REGION_READ).then(Answer::silence)
    });
    let started = Instant::now();

    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let error = client.read(0, 0, &mut [0; 1]).unwrap_err();
                assert!(error.is_timed_out(), "{error}");
            });
        }
    });

    assert!(started.elapsed() >= timeout && started.elapsed() < DEADLINE);
    client.write(1, 0, &[1]).unwrap();
    drop(client);
}

/// A server that stops receiving at the first write to a region.
fn deaf(timeout: Duration) -> (Client, mpsc::Sender<()>, Served) {
    let (wake, sleeping) = mpsc::channel();
    let sleeping = Mutex::new(sleeping);
    let (client, served) = client(timeout, move |_, asked| {
        if asked.command == REGION_WRITE {
            let _ = sleeping.lock().unwrap().recv_timeout(DEADLINE);
        }
        None
    });
    (client, wake, served)
}

#[test]
fn server_that_does_not_receive_ends_posted_writes_at_the_deadline() {
    let (client, wake, _served) = deaf(SHORT);
    let data = vec![0; 0x3000];
    let started = Instant::now();

    let error = loop {
        match client.write_posted(0, 0, &data) {
            Ok(_) => assert!(started.elapsed() < DEADLINE),
            Err(error) => break error,
        }
    };

    assert!(error.is_timed_out(), "{error}");
    drop(wake);
    // What was sent is sent; then the server is as it was.
    let read = || client.read(0, 0, &mut [0; 1]);
    while let Err(error) = read() {
        assert!(
            error.is_timed_out() && started.elapsed() < DEADLINE,
            "{error}"
        );
    }
    drop(client);
}

#[test]
fn threads_that_wait_for_room_go_on_when_there_is_some() {
    let (client, wake, _served) = deaf(DEADLINE);
    let data = vec![0; 0x3000];

    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    client.write_posted(0, 0, &data).unwrap();
                }
                client.read(0, 0, &mut [0; 1]).unwrap();
            });
        }
        drop(wake);
    });
    drop(client);
}

#[test]
fn server_that_asks_and_never_receives_is_given_up() {
    let (client, _served) = client(SHORT, |mut stream, asked| {
        if asked.command == RESET {
            // The client closes the connection some time.
            let ask = dma(DMA_READ, 1, 0x1000, 0x1000, &[]);
            while stream.write_all(&ask).is_ok() {}
            return Some(Answer::silence().and_close());
        }
        None
    });
    lend(&client);
    let started = Instant::now();

    let error = client.reset().unwrap_err();

    assert!(started.elapsed() < DEADLINE);
    assert!(error.is_timed_out(), "{error}");
    drop(client);
}

#[test]
fn server_that_floods_does_not_keep_a_call_beyond_its_deadline() {
    let (client, _served) = client(SHORT, |stream, asked| {
        if asked.command == RESET {
            let mut reader = stream.try_clone().unwrap();
            let drain = std::thread::spawn(move || {
                let _ = std::io::copy(&mut reader, &mut std::io::sink());
            });
            let ask = dma(DMA_READ, 1, 0x1000, 8, &[]);
            let asks = ask.repeat(1000);
            let mut stream = stream;
            while stream.write_all(&asks).is_ok() {}
            drain.join().unwrap();
            return Some(Answer::silence().and_close());
        }
        None
    });
    lend(&client);
    let started = Instant::now();

    let error = client.reset().unwrap_err();

    assert!(error.is_timed_out(), "{error}");
    assert!(started.elapsed() < DEADLINE);
    drop(client);
}

#[test]
fn memory_that_panics_panics_in_the_call_and_nobody_else_hangs() {
    #[derive(Debug)]
    struct Broken;
    impl RemoteMemory for Broken {
        fn read(&self, _offset: u64, _to: &mut [u8]) -> std::io::Result<()> {
            panic!("it is broken");
        }
        fn write(&self, _offset: u64, _from: &[u8]) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (client, _served) = client(DEADLINE, |mut stream, asked| {
        if asked.command == RESET {
            stream.write_all(&dma(DMA_READ, 1, 0x1000, 8, &[])).unwrap();
        }
        None
    });
    let memory = ClientMemory::remote(Arc::new(Broken), 0x1000);
    // No thread serves: it would panic in that one.
    client
        .dma_map(0x1000, &memory, 0..0x1000, DmaAccess::Read)
        .unwrap();

    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client.reset()));

    client.read(1, 0, &mut [0; 1]).unwrap();
    drop(client);
}

#[test]
fn nobody_at_the_path_is_told_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.sock");

    let error = Client::connect(&path).unwrap_err();
    assert_eq!(error.errno().number(), 2);
    assert!(error.to_string().contains("none.sock"));

    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = Client::connect(&path).unwrap_err();
    assert_eq!(error.errno().number(), 111);
}

#[test]
fn server_that_does_not_accept_is_waited_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("busy.sock");
    let stream = SockType::Stream;
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, stream, flags, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen_at(&listener, Backlog::new(0).unwrap()).unwrap();
    // The one that there is room for waits in the queue.
    let _first = UnixStream::connect(&path).unwrap();
    let started = Instant::now();

    let error: Error = options(SHORT).connect(&path).unwrap_err();

    assert!(error.is_timed_out(), "{error}");
    assert!(started.elapsed() >= SHORT && started.elapsed() < DEADLINE);
    assert!(error.to_string().contains("busy.sock"), "{error}");
}

#[test]
fn descriptor_that_is_no_connection_is_refused() {
    let listener =
        std::os::unix::net::UnixListener::bind(tempfile::tempdir().unwrap().path().join("a.sock"))
            .unwrap();
    let datagram = UnixStream::pair().map(|_| std::os::unix::net::UnixDatagram::pair());
    let fds: [std::os::fd::OwnedFd; 3] = [
        memfd(10),
        listener.into(),
        datagram.unwrap().unwrap().0.into(),
    ];
    for fd in fds {
        assert_eq!(options(SHORT).open(fd).unwrap_err().errno().number(), 22);
    }
}
