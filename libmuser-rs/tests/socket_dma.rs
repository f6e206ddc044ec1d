// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA over the socket: by mapped descriptors, and by messages.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};

use libmuser::vfio_user::wire::payload::{self, take, Feature};
use libmuser::vfio_user::wire::{Command, Header};
use libmuser::{Access, Bar, Bus, Device, Dma, Error, PciBuilder, Region, Result};
use zerocopy::IntoBytes;

mod raw;

use raw::{access, memfd, Listening, Message, RawClient, DEADLINE};

const EINVAL: i32 = libc::EINVAL;
const IOVA: u64 = 0x10_0000;

/// A device that copies: BAR 0 has IOVA, length, and the command which a write is. What it has
/// unmapped is written down.
struct Copier {
    dma: Dma,
    iova: u64,
    count: usize,
    bytes: Vec<u8>,
    unmapped: Arc<Mutex<Vec<std::ops::Range<u64>>>>,
}

const READ: u64 = 1;
const WRITE: u64 = 2;

impl Device for Copier {
    fn read(&mut self, access: Access) -> Result<u64> {
        let at = usize::try_from(access.offset - 0x100).unwrap_or(0);
        let byte = self.bytes.get(at).copied().unwrap_or(0);
        Ok(byte.into())
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        let count = || {
            usize::try_from(value)
                .map_err(|error| Error::new(libmuser::Errno::EINVAL, error.to_string()))
        };
        match (access.region, access.offset) {
            (Region::Bar(0), 0) => self.iova = value,
            (Region::Bar(0), 8) => self.count = count()?,
            (Region::Bar(0), 16) => match value {
                READ => {
                    self.bytes = vec![0; self.count];
                    self.dma.read(self.iova, &mut self.bytes)?;
                }
                WRITE => self.dma.write(self.iova, &vec![0x5a; self.count])?,
                _ => {}
            },
            _ => {}
        }
        Ok(())
    }

    fn dma_unmapped(&mut self, iova: std::ops::Range<u64>) {
        self.unmapped.lock().unwrap().push(iova);
    }
}

type Unmapped = Arc<Mutex<Vec<std::ops::Range<u64>>>>;

fn start() -> (RawClient, Unmapped, Listening) {
    let (mut client, unmapped, server) = start_unnegotiated();
    client.negotiate();
    client.write(7, 4, &[4, 0]).unwrap();
    (client, unmapped, server)
}

fn start_unnegotiated() -> (RawClient, Unmapped, Listening) {
    let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096));
    let unmapped = Unmapped::default();
    let unmapped_too = Arc::clone(&unmapped);
    let server = Listening::start(model.build().unwrap(), move |bus| {
        Ok(Copier {
            dma: bus.dma(),
            iova: 0,
            count: 0,
            bytes: Vec::new(),
            unmapped: unmapped_too,
        })
    });
    (server.connect(), unmapped, server)
}

/// Has the device copy, by a write for whose reply nobody has waited yet.
fn begin(client: &mut RawClient, iova: u64, count: u64, what: u64) -> u16 {
    client.write(0, 0, iova.as_bytes()).unwrap();
    client.write(0, 8, count.as_bytes()).unwrap();
    let access = access(0, 16, 8);
    client.send(Command::RegionWrite, &[access.as_bytes(), what.as_bytes()])
}

fn copy(client: &mut RawClient, iova: u64, count: u64, what: u64) -> Result<(), i32> {
    let id = begin(client, iova, count, what);
    let reply = client.receive();
    assert_eq!(reply.header.id, id);
    reply.result()
}

/// Answers a command of the server's.
fn answer(client: &RawClient, asked: &Message, data: &[u8]) {
    let said: payload::DmaAccess = asked.fixed();
    let reply = asked.header.reply(Ok(()));
    client.send_message(reply, &[said.as_bytes(), data], &[]);
}

#[test]
fn mapped_file_is_read_and_written_in_place() {
    let (mut client, _, _server) = start();
    let file = memfd(0x3000);
    file.write_all_at(&[7], 0x1004).unwrap();
    client
        .dma_map(IOVA, 0x2000, 3, Some((&file, 0x1000)))
        .unwrap();

    assert_eq!(copy(&mut client, IOVA + 4, 1, READ), Ok(()));
    assert_eq!(client.read(0, 0x100, 1), Ok(vec![7]));
    assert_eq!(copy(&mut client, IOVA + 0x1fff, 1, WRITE), Ok(()));

    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x2fff).unwrap();
    assert_eq!(byte, [0x5a]);
}

#[test]
fn map_of_what_can_not_be_mapped_is_refused() {
    let (mut client, _, _server) = start();
    let file = memfd(0x2000);
    let mut map =
        |iova, size, flags, offset| client.dma_map(iova, size, flags, Some((&file, offset)));

    assert_eq!(map(IOVA, 0x1000, 3, 0x2000), Err(EINVAL));
    assert_eq!(map(IOVA, 0x3000, 3, 0), Err(EINVAL));
    assert_eq!(map(IOVA, 0x1000, 3, u64::MAX - 0xfff), Err(EINVAL));
    assert_eq!(map(IOVA, 0, 3, 0), Err(EINVAL));
    assert_eq!(map(IOVA + 1, 0x1000, 3, 0), Err(EINVAL));
    assert_eq!(map(IOVA, 0x1000, 0, 0), Err(EINVAL));
    assert_eq!(map(IOVA, 0x1000, 4, 0), Err(EINVAL));
    assert_eq!(map(u64::MAX - 0xfff, 0x2000, 3, 0), Err(libc::EOVERFLOW));
    assert_eq!(map(IOVA, 0x2000, 3, 0), Ok(()));
    for iova in [IOVA - 0x1000, IOVA, IOVA + 0x1000] {
        assert_eq!(map(iova, 0x2000, 3, 0), Err(libc::EEXIST));
    }
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    let map = payload::DmaMap {
        argsz: 32,
        flags: 3,
        offset: 0,
        address: 0,
        size: 4096,
    };
    let two = [file.as_fd(), file.as_fd()];
    let reply = client.call_with(Command::DmaMap, &[map.as_bytes()], &two);
    assert_eq!(reply.result(), Err(EINVAL));
    let reply = client.call_with(Command::DmaMap, &[map.as_bytes()], &[pipe.as_fd()]);
    assert!(reply.result().is_err());
}

#[test]
fn read_only_memory_is_not_written() {
    let (mut client, _, _server) = start();
    let file = memfd(0x1000);
    client.dma_map(IOVA, 0x1000, 1, Some((&file, 0))).unwrap();

    assert_eq!(copy(&mut client, IOVA, 1, READ), Ok(()));
    assert_eq!(copy(&mut client, IOVA, 1, WRITE), Err(libc::EPERM));
}

#[test]
fn device_lets_go_of_what_it_has_used_before_the_reply() {
    let (mut client, unmapped, _server) = start();
    let file = memfd(0x3000);
    for page in 0..3 {
        let offset = page * 0x1000;
        client
            .dma_map(IOVA + offset, 0x1000, 3, Some((&file, offset)))
            .unwrap();
    }
    copy(&mut client, IOVA, 1, READ).unwrap();
    copy(&mut client, IOVA + 0x2000, 1, READ).unwrap();

    assert_eq!(client.dma_unmap(IOVA, 0x3000), Ok(()));

    let pages = [IOVA, IOVA + 0x2000].map(|iova| iova..iova + 0x1000);
    assert_eq!(*unmapped.lock().unwrap(), pages);
    assert_eq!(copy(&mut client, IOVA, 1, READ), Err(libc::EFAULT));
}

#[test]
fn unmap_of_what_is_not_mapped_is_refused() {
    let (mut client, _, _server) = start();
    client.dma_map(IOVA, 0x2000, 3, None).unwrap();

    assert_eq!(client.dma_unmap(IOVA, 0x1000), Err(EINVAL));
    assert_eq!(client.dma_unmap(IOVA + 0x2000, 0x1000), Err(libc::ENOENT));
    assert_eq!(client.dma_unmap(IOVA, 0), Err(EINVAL));
    assert_eq!(
        client.dma_unmap(u64::MAX - 0xfff, 0x2000),
        Err(libc::EOVERFLOW)
    );
    assert_eq!(client.dma_unmap(IOVA, 0x2000), Ok(()));
    assert_eq!(client.dma_unmap(IOVA, 0x2000), Err(libc::ENOENT));
}

#[test]
fn all_is_unmapped_at_once() {
    let (mut client, _, _server) = start();
    for page in 0..1000 {
        client
            .dma_map(IOVA + page * 0x2000, 0x1000, 3, None)
            .unwrap();
    }
    let all = payload::DmaUnmap {
        argsz: 24,
        flags: payload::DmaUnmap::ALL,
        ..Default::default()
    };

    for _ in 0..2 {
        let reply = client.call(Command::DmaUnmap, &[all.as_bytes()]);
        assert_eq!(reply.result(), Ok(()));
        assert_eq!(reply.payload, all.as_bytes());
    }

    assert_eq!(client.dma_map(IOVA, 0x1000 * 0x1000, 3, None), Ok(()));
}

fn unmap_with_bitmap(argsz: u32, size: u64) -> [Vec<u8>; 2] {
    let unmap = payload::DmaUnmap {
        argsz,
        flags: payload::DmaUnmap::DIRTY_BITMAP,
        address: IOVA,
        size: 0x4_1000,
    };
    let bitmap = payload::Bitmap { pgsize: 4096, size };
    [unmap.as_bytes().to_vec(), bitmap.as_bytes().to_vec()]
}

#[test]
fn unmap_brings_the_pages_that_were_written() {
    let (mut client, _, _server) = start();
    let file = memfd(0x4_1000);
    client.dma_map(IOVA, 0x4_1000, 3, Some((&file, 0))).unwrap();
    copy(&mut client, IOVA + 0x1fff, 2, WRITE).unwrap();
    copy(&mut client, IOVA + 0x4_0000, 1, WRITE).unwrap();
    copy(&mut client, IOVA + 0x5000, 1, READ).unwrap();

    // 65 pages are 2 words of bits.
    for (argsz, size) in [(55, 16), (56, 15), (24, 16), (56, 8)] {
        let parts = unmap_with_bitmap(argsz, size);
        let reply = client.call(Command::DmaUnmap, &[&parts[0], &parts[1]]);
        assert_eq!(reply.result(), Err(EINVAL), "{argsz} {size}");
    }
    assert_eq!(copy(&mut client, IOVA, 1, READ), Ok(()));
    let parts = unmap_with_bitmap(56, 16);
    let reply = client.call(Command::DmaUnmap, &[&parts[0], &parts[1]]);

    assert_eq!(reply.result(), Ok(()));
    let (fixed, rest) = take::<payload::DmaUnmap>(&reply.payload).unwrap();
    assert_eq!((fixed.argsz, fixed.flags, fixed.address), (56, 1, IOVA));
    let (bitmap, bits) = take::<payload::Bitmap>(rest).unwrap();
    assert_eq!((bitmap.pgsize, bitmap.size), (4096, 16));
    assert_eq!(bits, [0b110_u64, 1].as_bytes());
}

fn feature(client: &mut RawClient, argsz: u32, flags: u32, data: &[u8]) -> Message {
    let feature = Feature { argsz, flags };
    client.call(Command::DeviceFeature, &[feature.as_bytes(), data])
}

fn report(client: &mut RawClient, argsz: u32, iova: u64, length: u64, page_size: u64) -> Message {
    let report = payload::LoggingReport {
        iova,
        length,
        page_size,
    };
    let flags = Feature::GET | Feature::DMA_LOGGING_REPORT;
    feature(client, argsz, flags, report.as_bytes())
}

#[test]
fn logging_reports_pages_once_at_any_granularity() {
    let (mut client, _, _server) = start();
    let file = memfd(0x10_0000);
    client
        .dma_map(IOVA, 0x10_0000, 3, Some((&file, 0)))
        .unwrap();
    copy(&mut client, IOVA, 1, WRITE).unwrap();
    assert_eq!(
        report(&mut client, 40, IOVA, 0x1000, 4096).result(),
        Err(EINVAL)
    );
    let start = payload::LoggingStart {
        page_size: 1 << 21,
        num_ranges: 1,
        reserved: 0,
    };
    let range = payload::LoggingRange {
        iova: IOVA,
        length: 0x10_0000,
    };
    let data = [start.as_bytes(), range.as_bytes()].concat();
    let flags = Feature::SET | Feature::DMA_LOGGING_START;
    let reply = feature(&mut client, 64, flags, &data);
    assert_eq!(reply.result(), Ok(()));
    let (fixed, rest) = take::<Feature>(&reply.payload).unwrap();
    assert_eq!(fixed.flags, flags);
    let (started, ranges) = take::<payload::LoggingStart>(rest).unwrap();
    assert_eq!((started.page_size, started.num_ranges), (4096, 1));
    assert_eq!(ranges, range.as_bytes());

    copy(&mut client, IOVA + 0x1_0000, 0x2000, WRITE).unwrap();

    // There is no room for the bitmap, so nothing is taken away.
    let reply = report(&mut client, 32, IOVA, 0x10_0000, 4096);
    assert_eq!(reply.fixed::<Feature>().argsz, 8 + 24 + 32);
    assert_eq!(reply.payload.len(), 32);
    let reply = report(&mut client, 64, IOVA, 0x10_0000, 4096);
    assert_eq!(
        reply.payload[32..],
        [0b11_u64 << 16, 0, 0, 0][..].as_bytes()[..]
    );
    let reply = report(&mut client, 64, IOVA, 0x10_0000, 4096);
    assert_eq!(reply.payload[32..], [0; 32]);
    copy(&mut client, IOVA + 0x1_0000, 0x2000, WRITE).unwrap();
    let reply = report(&mut client, 64, IOVA, 0x10_0000, 0x8000);
    assert_eq!(reply.payload[32..], 0b100_u64.to_ne_bytes());
    copy(&mut client, IOVA + 0x1000, 1, WRITE).unwrap();
    let reply = report(&mut client, 64, IOVA, 0x2000, 1024);
    assert_eq!(reply.payload[32..], 0xf0_u64.to_ne_bytes());

    let stop = Feature::SET | Feature::DMA_LOGGING_STOP;
    assert_eq!(feature(&mut client, 8, stop, &[]).result(), Ok(()));
    assert_eq!(
        report(&mut client, 64, IOVA, 0x2000, 4096).result(),
        Err(EINVAL)
    );
}

#[test]
fn features_are_probed_and_others_are_not_supported() {
    let (mut client, _, _server) = start();
    for (index, flags, result) in [
        (6, Feature::PROBE | Feature::SET, Ok(())),
        (7, Feature::PROBE | Feature::SET, Ok(())),
        (8, Feature::PROBE | Feature::GET, Ok(())),
        (8, Feature::PROBE, Ok(())),
        (6, Feature::PROBE | Feature::GET, Err(EINVAL)),
        (8, Feature::PROBE | Feature::SET, Err(EINVAL)),
        (6, Feature::GET, Err(EINVAL)),
        (8, Feature::SET, Err(EINVAL)),
        (1, Feature::GET, Err(libc::EOPNOTSUPP)),
        (2, Feature::SET, Err(libc::EOPNOTSUPP)),
        (1, Feature::PROBE | Feature::GET, Err(libc::EOPNOTSUPP)),
        (99, Feature::PROBE, Err(libc::EOPNOTSUPP)),
    ] {
        let reply = feature(&mut client, 8, flags | index, &[]);
        assert_eq!(reply.result(), result, "{index} {flags:#x}");
    }
}

#[test]
fn logging_of_what_there_is_not_is_einval() {
    let (mut client, _, _server) = start();
    let start = |page_size: u64, num_ranges, ranges: &[[u64; 2]]| {
        let start = payload::LoggingStart {
            page_size,
            num_ranges,
            reserved: 0,
        };
        [start.as_bytes(), ranges.as_bytes()].concat()
    };
    let flags = Feature::SET | Feature::DMA_LOGGING_START;
    for data in [
        start(4096, 2, &[[0, 4096]]),
        start(4096, u32::MAX, &[]),
        start(4097, 0, &[]),
        start(0, 0, &[]),
        start(4096, 1, &[[0, 0]]),
        start(4096, 1, &[[u64::MAX, 2]]),
        vec![0; 15],
    ] {
        let reply = feature(&mut client, 64, flags, &data);
        assert_eq!(reply.result(), Err(EINVAL), "{data:?}");
    }
    let reply = feature(&mut client, 64, flags, &start(4096, 0, &[]));
    assert_eq!(reply.result(), Ok(()));
    for (iova, length, page_size, errno) in [
        (0, 0, 4096, EINVAL),
        (0, 4096, 0, EINVAL),
        (0, 4096, 3, EINVAL),
        (u64::MAX, 4096, 4096, EINVAL),
        (0, u64::MAX, 4096, libc::E2BIG),
        (0, u64::MAX, 1, libc::E2BIG),
    ] {
        let reply = report(&mut client, 64, iova, length, page_size);
        assert_eq!(reply.result(), Err(errno), "{iova} {length} {page_size}");
    }
}

#[test]
fn memory_without_a_descriptor_is_read_by_messages() {
    let (mut client, _, _server) = start();
    client.dma_map(IOVA, 0x1000, 3, None).unwrap();

    let id = begin(&mut client, IOVA + 4, 3, READ);
    let asked = client.receive();
    assert_eq!(asked.header.command, Command::DmaRead.number());
    let said: payload::DmaAccess = asked.fixed();
    assert_eq!((said.address, said.count), (IOVA + 4, 3));
    answer(&client, &asked, &[1, 2, 3]);

    let reply = client.receive();
    assert_eq!((reply.header.id, reply.result()), (id, Ok(())));
    assert_eq!(client.read(0, 0x102, 1), Ok(vec![3]));
}

#[test]
fn memory_without_a_descriptor_is_written_by_messages_of_the_negotiated_size() {
    let (mut client, _, _server) = start_unnegotiated();
    client.negotiate_with(r#"{"capabilities":{"max_data_xfer_size":4096}}"#);
    client.write(7, 4, &[4, 0]).unwrap();
    client.dma_map(IOVA, 0x10000, 3, None).unwrap();

    let id = begin(&mut client, IOVA, 0x2001, WRITE);
    for (step, len) in [(0, 0x1000), (1, 0x1000), (2, 1)] {
        let asked = client.receive();
        assert_eq!(asked.header.command, Command::DmaWrite.number());
        let said: payload::DmaAccess = asked.fixed();
        assert_eq!((said.address, said.count), (IOVA + step * 0x1000, len));
        assert_eq!(
            asked.rest::<payload::DmaAccess>(),
            vec![0x5a; usize::try_from(len).unwrap()]
        );
        // Clients differ in what they say of it.
        match step {
            0 => client.send_message(asked.header.reply(Ok(())), &[], &[]),
            1 => client.send_message(asked.header.reply(Ok(())), &[&asked.payload[..12]], &[]),
            _ => answer(&client, &asked, &[]),
        }
    }

    let reply = client.receive();
    assert_eq!((reply.header.id, reply.result()), (id, Ok(())));
}

#[test]
fn answers_that_are_none_are_errors_of_the_device() {
    let (mut client, _, _server) = start();
    client.dma_map(IOVA, 0x1000, 3, None).unwrap();
    let mut with = |answer: &dyn Fn(&RawClient, &Message)| {
        let id = begin(&mut client, IOVA, 4, READ);
        let asked = client.receive();
        answer(&client, &asked);
        let reply = client.receive();
        assert_eq!(reply.header.id, id);
        reply.result()
    };

    let efault = libmuser::Errno::EFAULT;
    let error = |client: &RawClient, asked: &Message| {
        client.send_message(asked.header.reply(Err(efault)), &[], &[]);
    };
    assert_eq!(with(&error), Err(libc::EFAULT));
    let short = |client: &RawClient, asked: &Message| answer(client, asked, &[1, 2, 3]);
    assert_eq!(with(&short), Err(libc::EPROTO));
    let empty = |client: &RawClient, asked: &Message| {
        client.send_message(asked.header.reply(Ok(())), &[], &[]);
    };
    assert_eq!(with(&empty), Err(libc::EPROTO));
    let elsewhere = |client: &RawClient, asked: &Message| {
        let said = payload::DmaAccess {
            address: 0,
            count: 4,
        };
        client.send_message(asked.header.reply(Ok(())), &[said.as_bytes(), &[0; 4]], &[]);
    };
    assert_eq!(with(&elsewhere), Err(libc::EPROTO));
    // A reply to something else first, which is dropped.
    let other = |client: &RawClient, asked: &Message| {
        let id = asked.header.id.wrapping_add(1);
        let header = Header::command(id, Command::DmaRead).reply(Ok(()));
        client.send_message(header, &[], &[]);
        answer(client, asked, &[0; 4]);
    };
    assert_eq!(with(&other), Ok(()));
}

#[test]
fn commands_of_the_client_cross_those_of_the_server() {
    let (mut client, _, _server) = start();
    client.dma_map(IOVA, 0x1000, 3, None).unwrap();

    let id = begin(&mut client, IOVA, 4, READ);
    // These come while the server waits for its reply.
    let asked = client.receive();
    let ids: Vec<_> = (0..500)
        .map(|_| client.send(Command::RegionRead, &[access(0, 0x100, 1).as_bytes()]))
        .collect();
    answer(&client, &asked, &[9; 4]);

    let reply = client.receive();
    assert_eq!((reply.header.id, reply.result()), (id, Ok(())));
    for id in ids {
        let reply = client.receive();
        assert_eq!((reply.header.id, reply.result()), (id, Ok(())));
        assert_eq!(reply.payload[16..], [9]);
    }
}

#[test]
fn both_sides_send_the_most_they_can_at_once() {
    let (mut client, _, _server) = start();
    let size = 4 << 20;
    client.dma_map(IOVA, size, 3, None).unwrap();
    let receiver = RawClient::new(client.socket.try_clone().unwrap());

    // The server writes 4 MiB, and the client sends 16 MiB before it looks at any of that.
    let id = begin(&mut client, IOVA, size, WRITE);
    let data = vec![0; 0xf00];
    for _ in 0..4000 {
        client.post(0, 0x100, &data);
    }
    for _ in 0..4 {
        let asked = receiver.receive();
        assert_eq!(asked.header.command, Command::DmaWrite.number());
        receiver.send_message(asked.header.reply(Ok(())), &[], &[]);
    }
    let reply = receiver.receive();
    assert_eq!((reply.header.id, reply.result()), (id, Ok(())));
    assert!(client.read(0, 0x100, 1).is_ok());
}

/// Writes the client's memory twice, whatever becomes of it, and then tells.
struct Insists(Dma, Sender<()>);

impl Device for Insists {
    fn write(&mut self, _access: Access, _value: u64) -> Result<()> {
        let data = vec![0; 0xf_0000];
        for _ in 0..2 {
            assert!(self.0.write(IOVA, &data).is_err());
        }
        self.1.send(()).unwrap();
        Ok(())
    }
}

#[test]
fn client_that_does_not_receive_is_sent_nothing_more() {
    let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(0x1000));
    let (sender, given_up) = mpsc::channel();
    let device = move |bus: &Bus| Ok(Insists(bus.dma(), sender));
    let server = Listening::start(model.build().unwrap(), device);
    let mut client = server.client();
    client.write(7, 4, &[4, 0]).unwrap();
    client.dma_map(IOVA, 0x10_0000, 3, None).unwrap();
    let write = access(0, 0, 4);
    let id = client.send(Command::RegionWrite, &[write.as_bytes(), &[0; 4]]);

    given_up.recv_timeout(DEADLINE).unwrap();

    let asked = client.receive();
    assert_eq!(asked.header.command, Command::DmaWrite.number());
    let reply = client.receive();
    assert_eq!(reply.header.command, Command::RegionWrite.number());
    assert_eq!((reply.header.id, reply.result()), (id, Ok(())));
}

#[test]
fn client_that_sends_without_end_instead_of_replying_is_not_served_any_more() {
    let (mut client, _, server) = start();
    client.dma_map(IOVA, 0x1000, 3, None).unwrap();
    begin(&mut client, IOVA, 4, READ);
    client.receive();

    let data = vec![0; 0x8_0000];
    let access = access(0, 0, data.len());
    let header = client.header(Command::RegionWrite).unanswered();
    let mut bytes = Vec::new();
    libmuser::vfio_user::wire::put(&mut bytes, header, &[access.as_bytes(), &data]).unwrap();
    use std::io::Write;
    let sent = (0..1000).find(|_| (&client.socket).write_all(&bytes).is_err());

    assert!(sent.is_some_and(|count| count > 100), "{sent:?}");
    assert!(server.client().read(0, 0x100, 1).is_ok());
}

#[test]
fn client_that_goes_instead_of_replying_is_gone() {
    let (mut client, _, server) = start();
    client.dma_map(IOVA, 0x1000, 3, None).unwrap();
    begin(&mut client, IOVA, 4, READ);
    client.receive();
    drop(client);

    assert!(server.client().read(0, 0x100, 1).is_ok());
}

fn with_twin() -> (RawClient, RawClient, Listening) {
    let (mut client, _, server) = start_unnegotiated();
    let reply = client
        .negotiate_with(r#"{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true}}}"#);
    let text = String::from_utf8_lossy(&reply.payload);
    assert!(text.contains(r#""fd_index":0"#), "{text}");
    let [fd] = <[_; 1]>::try_from(reply.fds).unwrap();
    let twin = RawClient::new(UnixStream::from(fd));
    client.write(7, 4, &[4, 0]).unwrap();
    client.dma_map(IOVA, 0x10_0000, 3, None).unwrap();
    (client, twin, server)
}

#[test]
fn server_asks_over_the_second_socket_if_there_is_one() {
    let (mut client, twin, _server) = with_twin();

    let id = begin(&mut client, IOVA, 4, READ);
    let asked = twin.receive();
    assert_eq!(asked.header.command, Command::DmaRead.number());
    // The first one has commands meanwhile.
    let read = client.send(Command::RegionRead, &[access(0, 0x100, 1).as_bytes()]);
    answer(&twin, &asked, &[5; 4]);

    assert_eq!(client.receive().header.id, id);
    let reply = client.receive();
    assert_eq!((reply.header.id, &reply.payload[16..]), (read, &[5][..]));
}

#[test]
fn client_that_closes_the_second_socket_is_gone() {
    let (mut client, twin, server) = with_twin();
    begin(&mut client, IOVA, 4, READ);
    twin.receive();
    drop(twin);

    client.wait_closed();
    assert!(server.client().read(0, 0x100, 1).is_ok());
}

#[test]
fn command_on_the_second_socket_is_the_end() {
    let (client, mut twin, server) = with_twin();

    twin.send(Command::RegionRead, &[access(0, 0, 1).as_bytes()]);

    client.wait_closed();
    assert!(server.client().read(0, 0x100, 1).is_ok());
}

#[test]
fn as_many_mappings_as_are_agreed_upon_share_one_file() {
    let (mut client, _, _server) = start();
    let file = memfd(4096);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let count = 5000;

    for page in 0..count {
        client
            .dma_map(IOVA + page * 0x2000, 4096, 3, Some((&file, 0)))
            .unwrap();
    }

    assert!(descriptors() < before + 20, "{} descriptors", descriptors());
    assert_eq!(
        copy(&mut client, IOVA + (count - 1) * 0x2000, 1, WRITE),
        Ok(())
    );
    let mut byte = [0];
    File::read_exact_at(&file, &mut byte, 0).unwrap();
    assert_eq!(byte, [0x5a]);
    client.dma_unmap(IOVA, 0x2000 * count).unwrap();
}

#[test]
fn mappings_beyond_the_agreed_number_are_enospc() {
    let (mut client, _, _server) = start();
    // All in one piece, so that it does not take for ever.
    let mut send = |range: std::ops::Range<u64>| {
        for page in range.clone() {
            let map = payload::DmaMap {
                argsz: 32,
                flags: 3,
                offset: 0,
                address: page * 0x1000,
                size: 0x1000,
            };
            client.send(Command::DmaMap, &[map.as_bytes()]);
            if page % 100 == 99 || page + 1 == range.end {
                let pending = page % 100 + 1;
                for _ in 0..pending.min(page + 1 - range.start) {
                    let reply = client.receive();
                    if reply.result().is_err() {
                        return reply.result();
                    }
                }
            }
        }
        Ok(())
    };
    assert_eq!(send(0..50_000), Ok(()));
    assert_eq!(send(50_000..65_535), Ok(()));
    assert_eq!(send(65_535..65_536), Err(libc::ENOSPC));
}
