// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading and writing blocks, by the eyes of a driver and of who looks at the file.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

#[path = "driver/mod.rs"]
mod driver;
#[path = "driver/host.rs"]
mod host;

use std::path::PathBuf;
use std::sync::Arc;

use driver::{Command, Driver, Machine, Pair, PAGE};
use host::{Fault, Faulty, Parts, Rig};
use nvme::backing::FileBacking;
use nvme::Method;

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const COMPARE: u8 = 0x05;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;
const VERIFY: u8 = 0x0c;
const DNR: u16 = 1 << 14;
const BYTES: u64 = 8 << 20;

struct Disk {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Disk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        Self {
            _directory: directory,
            path,
        }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

fn start(parts: Parts) -> (Driver<Rig>, Pair) {
    let mut driver = Rig::driver(parts);
    let pair = driver.create(1, 64);
    (driver, pair)
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A command with the data that it writes, or room for what it reads.
fn data(driver: &Driver<Rig>, opcode: u8, lba: u64, count: u32, at: u64, len: usize) -> Command {
    let (first, second) = driver.prps(at, len as u64);
    Command::new(opcode, 1)
        .blocks(lba, count)
        .pointing(first, second)
}

#[test]
fn blocks_of_any_length_come_back_from_where_they_lie() {
    for (block_size, method) in [
        (512, Method::Auto),
        (512, Method::Uring),
        (4096, Method::Sync),
    ] {
        let disk = Disk::new();
        let mut parts = Parts::new(&disk.path, BYTES);
        (parts.settings.block_size, parts.settings.method) = (block_size, method);
        let (driver, mut pair) = start(parts);
        let size = usize::try_from(block_size).unwrap();
        let mut expected = vec![0; usize::try_from(BYTES).unwrap()];
        let lens = [1, 2, 7, 8, 9, 16, 17, 64, 128];
        let lens = lens.into_iter().filter(|count| count * size <= 512 << 10);
        for (round, count) in lens.enumerate() {
            // Not where a page begins, and not where the last one was.
            let at = driver.pages(130) + 4 * round as u64;
            let lba = 11 * round as u64 + 3;
            let bytes = pattern(round as u64 + 1, count * size);
            driver.machine.store(at, &bytes);
            let blocks = u32::try_from(count).unwrap();
            let write = data(&driver, WRITE, lba, blocks, at, bytes.len());
            assert_eq!(driver.at(&mut pair, &write).status, 0);
            let start = usize::try_from(lba).unwrap() * size;
            expected[start..start + bytes.len()].copy_from_slice(&bytes);

            driver.machine.store(at, &vec![0xee; bytes.len()]);
            let read = data(&driver, READ, lba, blocks, at, bytes.len());
            assert_eq!(driver.at(&mut pair, &read).status, 0);

            assert!(driver.bytes(at, bytes.len()) == bytes, "{count} blocks");
            let beyond = driver.bytes(at + bytes.len() as u64, 4);
            assert_eq!(beyond, [0; 4], "{count} blocks");
        }
        assert!(disk.content() == expected, "{block_size}, {method:?}");
    }
}

#[test]
fn lists_of_more_than_a_page_are_followed() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let (len, at) = (512 << 10, driver.pages(130));
    let bytes = pattern(5, len);
    driver.machine.store(at, &bytes);
    let pages: Vec<u64> = (1..128).map(|page| at + page * PAGE).collect();
    // A list that begins just before the end of its page.
    let list = driver.pages(2);
    let first = list + PAGE - 16;
    let link = [pages[0], list + PAGE].map(u64::to_le_bytes);
    driver.machine.store(first, link.as_flattened());
    let rest: Vec<u8> = pages[1..]
        .iter()
        .flat_map(|page| page.to_le_bytes())
        .collect();
    driver.machine.store(list + PAGE, &rest);

    let write = Command::new(WRITE, 1).blocks(0, 1024).pointing(at, first);

    assert_eq!(driver.at(&mut pair, &write).status, 0);
    assert!(disk.content()[..len] == bytes);
}

#[test]
fn scatter_gather_lists_carry_odd_pieces() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let (at, list) = (driver.pages(4), driver.pages(1));
    let bytes = pattern(9, 4096);
    // Three pieces of no round length, out of order.
    let pieces = [(0x1801, 1000, 0), (0x0003, 3000, 1000), (0x2ffd, 96, 4000)];
    let mut descriptors = Vec::new();
    for (offset, len, from) in pieces {
        driver.machine.store(at + offset, &bytes[from..from + len]);
        descriptors.extend((at + offset).to_le_bytes());
        descriptors.extend(u64::to_le_bytes(len as u64));
    }
    driver.machine.store(list, &descriptors);
    let last_segment = 3 << 60 | 48;
    let psdt = 1 << 14;

    let write = Command::new(WRITE, 1)
        .blocks(100, 8)
        .pointing(list, last_segment);
    let write = write.with(0, u32::from(WRITE) | psdt);
    assert_eq!(driver.at(&mut pair, &write).status, 0);
    assert!(disk.content()[51_200..51_200 + 4096] == bytes);

    // And back into one block.
    let read = Command::new(READ, 1).blocks(100, 8).pointing(at + 5, 4096);
    let read = read.with(0, u32::from(READ) | psdt);
    assert_eq!(driver.at(&mut pair, &read).status, 0);
    assert!(driver.bytes(at + 5, 4096) == bytes);
}

#[test]
fn memory_that_can_not_be_mapped_is_copied() {
    let disk = Disk::new();
    let mut parts = Parts::new(&disk.path, BYTES);
    parts.remote = true;
    let (driver, mut pair) = start(parts);
    let (at, bytes) = (driver.pages(20) + 0x204, pattern(3, 65_536));
    driver.machine.store(at, &bytes);

    let write = data(&driver, WRITE, 0, 128, at, bytes.len());
    assert_eq!(driver.at(&mut pair, &write).status, 0);
    driver.machine.store(at, &vec![0; bytes.len()]);
    let read = data(&driver, READ, 0, 128, at, bytes.len());
    assert_eq!(driver.at(&mut pair, &read).status, 0);

    assert!(driver.bytes(at, bytes.len()) == bytes);
    assert!(disk.content()[..65_536] == bytes);
}

#[test]
fn pages_that_are_read_into_are_dirty() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let at = driver.pages(4);
    let client = &driver.machine.client;
    let _ = client.dirty_pages(0..u64::MAX, true);

    let read = data(&driver, READ, 0, 16, at + PAGE, 8192);
    assert_eq!(driver.at(&mut pair, &read).status, 0);

    let dirty = client.dirty_pages(at..at + 4 * PAGE, false);
    assert_eq!(dirty, [at + PAGE, at + 2 * PAGE]);
}

#[test]
fn flush_and_force_unit_access_succeed() {
    let disk = Disk::new();
    for method in [Method::Auto, Method::Sync] {
        let mut parts = Parts::new(&disk.path, BYTES);
        parts.settings.method = method;
        let (driver, mut pair) = start(parts);
        let at = driver.pages(1);
        for nsid in [1, u32::MAX] {
            let flush = Command::new(FLUSH, nsid);
            assert_eq!(driver.at(&mut pair, &flush).status, 0);
        }
        let write = data(&driver, WRITE, 0, 8, at, 4096).with(12, 7 | 1 << 30);
        assert_eq!(driver.at(&mut pair, &write).status, 0);
    }
}

#[test]
fn zeroes_and_deallocation_read_as_zeroes() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let (at, bytes) = (driver.pages(64), vec![0xa5; 1 << 18]);
    driver.machine.store(at, &bytes);
    let write = data(&driver, WRITE, 0, 512, at, bytes.len());
    assert_eq!(driver.at(&mut pair, &write).status, 0);
    let mut expected = bytes;

    for (lba, count, deallocate) in [(3, 10, 0), (40, 16, 1 << 25)] {
        let zero = Command::new(WRITE_ZEROES, 1).blocks(lba, count);
        let zero = zero.with(12, (count - 1) | deallocate);
        assert_eq!(driver.at(&mut pair, &zero).status, 0);
        let start = usize::try_from(lba).unwrap() * 512;
        expected[start..start + count as usize * 512].fill(0);
    }
    let ranges = [(100, 8), (200, 1), (300, 0)];
    let list: Vec<u8> = ranges
        .iter()
        .flat_map(|(lba, count)| [(*count as u64) << 32, *lba])
        .flat_map(u64::to_le_bytes)
        .collect();
    driver.machine.store(at, &list);
    let discard = Command::new(DATASET_MANAGEMENT, 1).pointing(at, 0);
    let discard = discard.with(10, 2).with(11, 4);
    assert_eq!(driver.at(&mut pair, &discard).status, 0);
    for (lba, count) in ranges {
        let start = usize::try_from(lba).unwrap() * 512;
        expected[start..start + count * 512].fill(0);
    }

    assert!(disk.content()[..expected.len()] == expected);
}

#[test]
fn compare_and_verify_look_at_what_is_there() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let (at, bytes) = (driver.pages(2), pattern(1, 8192));
    driver.machine.store(at, &bytes);
    let write = data(&driver, WRITE, 5, 16, at, 8192);
    assert_eq!(driver.at(&mut pair, &write).status, 0);

    let compare = data(&driver, COMPARE, 5, 16, at, 8192);
    assert_eq!(driver.at(&mut pair, &compare).status, 0);
    driver.machine.store(at + 8191, &[!bytes[8191]]);
    assert_eq!(driver.at(&mut pair, &compare).status, 0x285 | DNR);
    let verify = Command::new(VERIFY, 1).blocks(0, 0x1_0000 / 8);
    assert_eq!(driver.at(&mut pair, &verify).status, 0);
}

#[test]
fn blocks_that_are_not_there_are_out_of_range() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let (at, blocks) = (driver.pages(2), BYTES / 512);
    let out_of_range = 0x80 | DNR;
    for (lba, count) in [
        (blocks, 1),
        (blocks - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, 8),
        (u64::MAX >> 9, 8),
        (1 << 55, 1),
    ] {
        for opcode in [READ, WRITE, WRITE_ZEROES, COMPARE, VERIFY] {
            let command = data(&driver, opcode, lba, count, at, 4096);
            let status = driver.at(&mut pair, &command).status;
            assert_eq!(status, out_of_range, "{opcode:#x} {lba:#x} {count}");
        }
        let range = [u64::from(count) << 32, lba].map(u64::to_le_bytes);
        driver.machine.store(at, range.as_flattened());
        let discard = Command::new(DATASET_MANAGEMENT, 1)
            .pointing(at, 0)
            .with(11, 4);
        assert_eq!(driver.at(&mut pair, &discard).status, out_of_range);
    }
    let last = data(&driver, READ, blocks - 1, 1, at, 512);
    assert_eq!(driver.at(&mut pair, &last).status, 0);
    assert!(disk.content().iter().all(|byte| *byte == 0));
}

#[test]
fn commands_that_make_no_sense_have_their_status() {
    let disk = Disk::new();
    let (driver, mut pair) = start(Parts::new(&disk.path, BYTES));
    let at = driver.pages(2);
    let read = data(&driver, READ, 0, 8, at, 4096);
    let cases = [
        (read.with(1, 0), 0x0b | DNR),
        (read.with(1, 2), 0x0b | DNR),
        (read.with(1, u32::MAX), 0x0b | DNR),
        (Command::new(0x7f, 1), 0x01 | DNR),
        (Command::new(0x0d, 9), 0x01 | DNR),
        // Fused, and pointed to in an unknown way.
        (read.with(0, 0x0102), 0x02 | DNR),
        (read.with(0, 0xc002), 0x02 | DNR),
        // Longer than MDTS.
        (read.blocks(0, 1025), 0x02 | DNR),
        (read.with(12, 7 | 1 << 29), 0x181 | DNR),
        // A page that does not begin where pages do.
        (read.pointing(at + 4, at + 8), 0x13 | DNR),
        (read.pointing(at + 1, 0), 0x13 | DNR),
        // Memory that is not there: data, and a list of PRPs.
        (read.pointing(0x10_0000, 0), 0x04),
        (read.pointing(u64::MAX - 4095, 0), 0x04),
        (read.blocks(0, 64).pointing(at, 0x10_0000), 0x04),
        // SGLs: a type that is none, too short, and a segment that is not there.
        (
            read.with(0, 0x4002).pointing(at, 0x7 << 60 | 4096),
            0x11 | DNR,
        ),
        (read.with(0, 0x4002).pointing(at, 100), 0x0f | DNR),
        (
            read.with(0, 0x4002).pointing(0x10_0000, 0x2 << 60 | 16),
            0x04,
        ),
        (
            read.with(0, 0x4002).pointing(at, 0x2 << 60 | 15),
            0x0d | DNR,
        ),
    ];
    for (number, (command, status)) in cases.into_iter().enumerate() {
        let found = driver.at(&mut pair, &command).status;
        assert_eq!(found, status, "case {number}: {found:#x}");
    }
    assert_eq!(driver.at(&mut pair, &read).status, 0);
}

#[test]
fn read_only_backing_is_not_written() {
    let disk = Disk::new();
    let mut parts = Parts::new(&disk.path, BYTES);
    parts.backing = Arc::new(FileBacking::open(&disk.path, true, None).unwrap());
    let (mut driver, mut pair) = start(parts);
    let at = driver.pages(2);
    driver.machine.store(at, &[0xff; 16]);
    for command in [
        data(&driver, WRITE, 0, 8, at, 4096),
        Command::new(WRITE_ZEROES, 1).blocks(0, 8),
        Command::new(DATASET_MANAGEMENT, 1)
            .pointing(at, 0)
            .with(11, 4),
    ] {
        assert_eq!(driver.at(&mut pair, &command).status, 0x182 | DNR);
    }
    let read = data(&driver, READ, 0, 8, at, 4096);
    assert_eq!(driver.at(&mut pair, &read).status, 0);
    let namespace = driver.page(&Command::new(0x06, 1)).unwrap();
    assert_eq!(namespace[99] & 1, 1);
}

#[test]
fn backing_that_fails_is_told_of_and_leaves_other_blocks_alone() {
    let disk = Disk::new();
    let backing = Faulty::new(&disk.path, BYTES);
    let mut parts = Parts::new(&disk.path.with_extension("unused"), BYTES);
    parts.backing = Arc::clone(&backing) as _;
    let (mut driver, mut pair) = start(parts);
    let (at, bytes) = (driver.pages(2), pattern(4, 4096));
    driver.machine.store(at, &bytes);
    let read = data(&driver, READ, 8, 8, at + PAGE, 4096);
    let write = data(&driver, WRITE, 8, 8, at, 4096);
    let zero = Command::new(WRITE_ZEROES, 1).blocks(8, 8);
    let flush = Command::new(FLUSH, 1);
    let cases = [
        (Fault::Errno(libc::EIO), [0x281, 0x280, 0x280, 0x280]),
        (Fault::Nothing, [0x281, 0x280, 0, 0]),
        (
            Fault::Errno(libc::ENOSPC),
            [0x81 | DNR, 0x81 | DNR, 0x81 | DNR, 0x81 | DNR],
        ),
        (Fault::Short(100), [0; 4]),
    ];
    let mut errors = 0;
    for (fault, statuses) in cases {
        backing.set(Some(fault));
        for (command, status) in [read, write, zero, flush].iter().zip(statuses) {
            let found = driver.at(&mut pair, command).status;
            assert_eq!(found, status, "{fault:?}: {found:#x}");
            errors += u64::from(status & 0x700 == 0x200);
        }
    }
    backing.set(None);
    assert_eq!(driver.at(&mut pair, &write).status, 0);

    let content = backing.content();
    assert!(content[4096..8192] == bytes);
    assert!(content[..4096]
        .iter()
        .chain(&content[8192..])
        .all(|byte| *byte == 0));
    // The log has the last one first, and SMART counts them.
    let log = driver
        .page(&Command::new(0x02, 0).with(10, 0x000f_0001))
        .unwrap();
    assert_eq!(log[..8], errors.to_le_bytes());
    assert_eq!(log[12..14], (0x280_u16 << 1).to_le_bytes());
    let smart = driver
        .page(&Command::new(0x02, 0).with(10, 0x007f_0002))
        .unwrap();
    assert_eq!(smart[160..168], errors.to_le_bytes());
}

#[test]
fn file_cut_short_is_an_unrecovered_read() {
    for method in [Method::Auto, Method::Sync] {
        let disk = Disk::new();
        let mut parts = Parts::new(&disk.path, BYTES);
        parts.settings.method = method;
        let (driver, mut pair) = start(parts);
        let file = std::fs::File::options()
            .write(true)
            .open(&disk.path)
            .unwrap();
        file.set_len(4096 + 512).unwrap();
        let at = driver.pages(2);

        let whole = data(&driver, READ, 0, 8, at, 4096);
        assert_eq!(driver.at(&mut pair, &whole).status, 0);
        let half = data(&driver, READ, 8, 8, at, 4096);
        assert_eq!(driver.at(&mut pair, &half).status, 0x281);
        let none = data(&driver, READ, 800, 8, at, 4096);
        assert_eq!(driver.at(&mut pair, &none).status, 0x281);
    }
}

#[test]
fn backings_that_can_not_be_are_refused() {
    let disk = Disk::new();
    std::fs::write(&disk.path, [0; 1000]).unwrap();

    assert!(FileBacking::open(&disk.path, true, Some(4096)).is_err());
    assert!(FileBacking::open("/dev/null".as_ref(), false, None).is_err());
    assert!(FileBacking::open(&disk.path.with_extension("none"), false, None).is_err());
    FileBacking::open(&disk.path, false, Some(1 << 20)).unwrap();
    assert_eq!(disk.content().len(), 1 << 20);
}
