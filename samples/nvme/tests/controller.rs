// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a controller: registers, administration, queues, events, failures and restarts.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

#[path = "driver/mod.rs"]
mod driver;
#[path = "driver/host.rs"]
mod host;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use driver::{create_cq, create_sq, Command, Driver, Machine, Pair, CC, CSTS, DEADLINE, ENABLE};
use host::{Parts, Rig};
use libmuser::Moment;

const DNR: u16 = 1 << 14;
const BYTES: u64 = 8 << 20;
const FATAL: u32 = 2;

const DELETE_SQ: u8 = 0x00;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_CQ: u8 = 0x04;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const EVENT_REQUEST: u8 = 0x0c;
const FORMAT: u8 = 0x80;

/// A driver of an enabled controller, and where its file is.
fn start() -> (Driver<Rig>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let parts = Parts::new(&directory.path().join("disk"), BYTES);
    (Rig::driver(parts), directory)
}

fn identify(cns: u32, nsid: u32) -> Command {
    Command::new(IDENTIFY, nsid).with(10, cns)
}

fn log_page(page: u32, bytes: u32) -> Command {
    Command::new(GET_LOG_PAGE, u32::MAX).with(10, (bytes / 4 - 1) << 16 | page)
}

fn feature(opcode: u8, feature: u32, value: u32) -> Command {
    Command::new(opcode, 0).with(10, feature).with(11, value)
}

fn io(driver: &Driver<Rig>, opcode: u8, lba: u64, at: u64) -> Command {
    let (first, second) = driver.prps(at, 4096);
    Command::new(opcode, 1)
        .blocks(lba, 8)
        .pointing(first, second)
}

/// Waits until the controller says that it has failed.
fn wait_fatal(driver: &Driver<Rig>) {
    let end = Instant::now() + DEADLINE;
    while driver.read32(CSTS) & FATAL == 0 {
        assert!(Instant::now() < end);
        thread::yield_now();
    }
}

#[test]
fn registers_say_what_the_driver_needs() {
    let (driver, _directory) = start();
    let mut cap = [0; 8];
    driver.machine.read(0, &mut cap).unwrap();
    let cap = u64::from_le_bytes(cap);

    assert_eq!(cap & 0xffff, 1023, "MQES");
    assert_eq!(cap >> 16 & 1, 1, "CQR");
    assert_eq!(cap >> 32 & 0xf, 0, "DSTRD");
    assert_eq!(cap >> 37 & 1, 1, "NVM command set");
    assert_eq!(cap >> 48 & 0xff, 0, "pages of 4 KiB");
    assert_eq!(driver.read32(8), 0x0001_0400);
    assert_eq!(driver.read32(CSTS), 1);
}

#[test]
fn controller_and_namespace_describe_themselves() {
    let (mut driver, _directory) = start();

    let controller = driver.page(&identify(1, 0)).unwrap();
    assert_eq!(&controller[4..24], b"muser               ");
    assert_eq!(controller[77], 7, "MDTS");
    assert_eq!(controller[512..514], [0x66, 0x44]);
    assert_eq!(controller[516..520], [1, 0, 0, 0], "NN");
    let namespace = driver.page(&identify(0, 1)).unwrap();
    assert_eq!(namespace[0..8], (BYTES / 512).to_le_bytes());
    assert_eq!(namespace[128..132], [0, 0, 9, 0], "LBAF0");
    let list = driver.page(&identify(2, 0)).unwrap();
    assert_eq!(list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    let list = driver.page(&identify(2, 1)).unwrap();
    assert!(list.iter().all(|byte| *byte == 0));
    let descriptors = driver.page(&identify(3, 1)).unwrap();
    assert_eq!(descriptors[..2], [2, 16]);
    assert_eq!(descriptors[4..20], namespace[104..120], "NGUID");

    for (command, status) in [
        (identify(0, 2), 0x0b | DNR),
        (identify(0, u32::MAX), 0x0b | DNR),
        (identify(3, 0), 0x0b | DNR),
        (identify(2, u32::MAX), 0x0b | DNR),
        (identify(0xff, 0), 0x02 | DNR),
    ] {
        assert_eq!(driver.page(&command), Err(status));
    }
}

#[test]
fn log_pages_are_read_in_parts() {
    let (mut driver, _directory) = start();
    let whole = driver.page(&log_page(5, 4096)).unwrap();
    assert_eq!(whole[4 * 6], 1, "Identify is supported");
    assert_eq!(whole[1024 + 4], 3, "Write changes blocks");
    assert_eq!(whole[4 * 0x80], 0, "Format is not");

    let part = driver.page(&log_page(5, 64).with(12, 1024)).unwrap();
    assert_eq!(part[..64], whole[1024..1088]);
    assert!(part[64..].iter().all(|byte| *byte == 0));
    let smart = driver.page(&log_page(2, 512)).unwrap();
    assert_eq!(smart[0], 0, "no warning");
    assert_eq!(smart[3], 100);
    let firmware = driver.page(&log_page(3, 512)).unwrap();
    assert_eq!(firmware[0], 1);
    assert!(driver
        .page(&log_page(4, 4096))
        .unwrap()
        .iter()
        .all(|byte| *byte == 0));

    assert_eq!(driver.page(&log_page(0x70, 512)), Err(0x109 | DNR));
    assert_eq!(driver.page(&log_page(2, 512).with(12, 2)), Err(0x02 | DNR));
    assert_eq!(driver.page(&log_page(2, 512).with(13, 9)), Err(0x02 | DNR));
    // More than there is: the page, and nothing behind it.
    assert!(driver.page(&log_page(2, 4096)).is_ok());
}

#[test]
fn features_are_set_and_read_back() {
    let (mut driver, _directory) = start();
    let queues = driver.admin(&feature(SET_FEATURES, 7, 63 << 16 | 63));
    assert_eq!((queues.status, queues.dw0), (0, 3 << 16 | 3));
    for (number, value) in [
        (1, 0x0102_0304),
        (6, 0),
        (8, 0x0205),
        (0x0b, 2),
        (9, 1 << 16 | 3),
    ] {
        assert_eq!(
            driver.admin(&feature(SET_FEATURES, number, value)).status,
            0
        );
        let read = driver.admin(&feature(GET_FEATURES, number, value & 0xffff));
        assert_eq!((read.status, read.dw0), (0, value), "{number}");
    }
    let under = 1 << 20;
    assert_eq!(
        driver.admin(&feature(SET_FEATURES, 4, under | 300)).status,
        0
    );
    assert_eq!(driver.admin(&feature(GET_FEATURES, 4, under)).dw0, 300);
    assert_eq!(driver.admin(&feature(GET_FEATURES, 4, 0)).dw0, 343);

    let field = 0x02 | DNR;
    for (command, status) in [
        (feature(SET_FEATURES, 0x70, 0), field),
        (feature(GET_FEATURES, 0x70, 0), field),
        (feature(GET_FEATURES, 0x101, 0), field),
        (feature(SET_FEATURES, 7, 0xffff), field),
        (feature(SET_FEATURES, 2, 1), field),
        (feature(SET_FEATURES, 4, 1 << 16), field),
        (feature(SET_FEATURES, 9, 5), field),
        (feature(SET_FEATURES, 1 << 31 | 1, 0), 0x10d | DNR),
        (Command::new(FORMAT, 1), 0x01 | DNR),
        (Command::new(0x18, 0), 0x01 | DNR),
        (identify(1, 0).with(0, 0x4006), field),
    ] {
        assert_eq!(driver.admin(&command).status, status, "{command:?}");
    }
    // A reset takes them back.
    driver.enable();
    assert_eq!(driver.admin(&feature(GET_FEATURES, 6, 0)).dw0, 1);
}

#[test]
fn abort_of_what_has_ended_says_so() {
    let (mut driver, _directory) = start();

    let aborted = driver.admin(&Command::new(ABORT, 0).with(10, 7 << 16));

    assert_eq!((aborted.status, aborted.dw0), (0, 1));
}

#[test]
fn queues_are_created_and_deleted_in_order_only() {
    let (mut driver, _directory) = start();
    let pair = driver.pair(1, 16);
    let (cq, sq) = (create_cq(&pair), create_sq(&pair));
    let delete = |opcode, id| Command::new(opcode, 0).with(10, id);
    let cases = [
        (sq, 0x100 | DNR),
        (cq.with(11, 1 << 16 | 2), 0x02 | DNR),
        (cq.with(10, 15 << 16), 0x101 | DNR),
        (cq.with(10, 15 << 16 | 5), 0x101 | DNR),
        (cq.with(10, 1), 0x102 | DNR),
        (cq.with(10, 1024 << 16 | 1), 0x102 | DNR),
        (cq.with(11, 5 << 16 | 3), 0x108 | DNR),
        (cq.pointing(pair.cq + 8, 0), 0x13 | DNR),
        (cq, 0),
        (cq, 0x101 | DNR),
        (sq.with(11, 1), 0x100 | DNR),
        (sq.with(11, 9 << 16 | 1), 0x100 | DNR),
        (sq, 0),
        (sq, 0x101 | DNR),
        (delete(DELETE_CQ, 1), 0x10c | DNR),
        (delete(DELETE_SQ, 2), 0x101 | DNR),
        (delete(DELETE_SQ, 0), 0x101 | DNR),
        (delete(DELETE_SQ, 1), 0),
        (delete(DELETE_SQ, 1), 0x101 | DNR),
        (delete(DELETE_CQ, 1), 0),
        (delete(DELETE_CQ, 1), 0x101 | DNR),
        (delete(DELETE_CQ, 0), 0x101 | DNR),
    ];
    for (number, (command, status)) in cases.into_iter().enumerate() {
        let found = driver.admin(&command).status;
        assert_eq!(found, status, "case {number}: {found:#x}");
    }
    // What was deleted can be there again, from the beginning.
    let mut pair = driver.create(1, 4);
    for _ in 0..9 {
        assert_eq!(driver.at(&mut pair, &Command::new(0, 1)).status, 0);
    }
}

#[test]
fn many_queues_work_at_a_time() {
    let (mut driver, _directory) = start();
    let pairs: Vec<_> = (1..=4).map(|id| driver.create(id, 32)).collect();
    let driver = &driver;
    thread::scope(|scope| {
        for mut pair in pairs {
            scope.spawn(move || {
                let first = u64::from(pair.id) * 1024;
                let buffers: Vec<_> = (0..8).map(|_| driver.pages(2)).collect();
                for round in 0..20 {
                    for (number, at) in buffers.iter().enumerate() {
                        let bytes = [u8::try_from(round * 8 + number).unwrap(); 4096];
                        driver.machine.store(*at, &bytes);
                        let lba = first + 8 * number as u64;
                        driver.put(&mut pair, &io(driver, 1, lba, *at));
                    }
                    driver.ring(&pair);
                    for _ in &buffers {
                        assert_eq!(driver.next(&mut pair).status, 0);
                    }
                    for (number, at) in buffers.iter().enumerate() {
                        driver.machine.store(*at, &[0xff; 4096]);
                        let read = io(driver, 2, first + 8 * number as u64, *at);
                        assert_eq!(driver.at(&mut pair, &read).status, 0);
                        let expected = [u8::try_from(round * 8 + number).unwrap(); 4096];
                        assert!(driver.bytes(*at, 4096) == expected);
                    }
                }
            });
        }
    });
}

#[test]
fn several_queues_share_a_completion_queue() {
    let (mut driver, _directory) = start();
    let mut first = driver.create(1, 64);
    let second = driver.pair(2, 64);
    let shared = create_sq(&second).with(11, 1 << 16 | 1);
    assert_eq!(driver.admin(&shared).status, 0);
    let mut second = second;
    for _ in 0..20 {
        driver.put(&mut first, &Command::new(0, 1));
        driver.put(&mut second, &Command::new(0, 1));
    }

    driver.ring(&first);
    driver.ring(&second);

    let ended: BTreeSet<_> = (0..40)
        .map(|_| driver.next(&mut first))
        .map(|entry| (entry.sq_id, entry.cid))
        .collect();
    assert_eq!(ended.len(), 40);
}

#[test]
fn full_completion_queue_waits_for_the_host() {
    let (mut driver, _directory) = start();
    let mut pair = driver.pair(1, 64);
    let small = Pair {
        size: 4,
        ..driver.pair(1, 64)
    };
    assert_eq!(driver.admin(&create_cq(&small)).status, 0);
    assert_eq!(driver.admin(&create_sq(&pair)).status, 0);
    let mut completions = small;
    for _ in 0..40 {
        driver.put(&mut pair, &Command::new(0, 1));
    }
    driver.ring(&pair);

    let end = Instant::now() + DEADLINE;
    while driver.peek(&completions).is_none() {
        assert!(Instant::now() < end);
    }
    let mut ended = BTreeSet::new();
    for _ in 0..40 {
        let entry = driver.next(&mut completions);
        assert_eq!(entry.status, 0);
        assert!(ended.insert(entry.cid), "{} twice", entry.cid);
    }

    thread::sleep(Duration::from_millis(1));
    assert_eq!(driver.peek(&completions), None);
}

#[test]
fn event_is_told_to_who_asked() {
    let (mut driver, _directory) = start();
    let mut pair = driver.create(1, 16);
    let mut admin = driver.pair(0, 32);
    std::mem::swap(&mut admin, &mut driver.admin);
    for _ in 0..4 {
        driver.submit(&mut admin, &Command::new(EVENT_REQUEST, 0));
    }
    let fifth = driver.submit(&mut admin, &Command::new(EVENT_REQUEST, 0));
    let refused = driver.next(&mut admin);
    assert_eq!((refused.cid, refused.status), (fifth, 0x105 | DNR));

    // A tail beyond the queue, and then nothing before the log is read.
    driver.ring_with(2, 16);
    let told = driver.next(&mut admin);
    assert_eq!((told.status, told.dw0), (0, 0x0001_0100));
    // A doorbell of a queue that is not there.
    driver.ring_with(6, 1);
    let page = driver.pages(1);
    driver.submit(&mut admin, &log_page(1, 64).pointing(page, 0));
    // The page, and the event that it made room for.
    let mut seen = [0; 2].map(|_: u32| driver.next(&mut admin).dw0);
    seen.sort_unstable();
    assert_eq!(seen, [0, 0x0001_0000]);

    driver.ring_with(2, 0);
    assert_eq!(driver.at(&mut pair, &Command::new(0, 1)).status, 0);
}

#[test]
fn warm_controller_warns_if_it_is_asked_to() {
    let (mut driver, _directory) = start();
    let mut admin = driver.pair(0, 32);
    std::mem::swap(&mut admin, &mut driver.admin);
    let request = driver.submit(&mut admin, &Command::new(EVENT_REQUEST, 0));
    for command in [
        feature(SET_FEATURES, 0x0b, 2),
        feature(SET_FEATURES, 4, 300),
    ] {
        driver.submit(&mut admin, &command);
    }

    let entries: Vec<_> = (0..3).map(|_| driver.next(&mut admin)).collect();

    let event = entries.iter().find(|entry| entry.cid == request).unwrap();
    assert_eq!(event.dw0, 0x0002_0101);
}

#[test]
fn queue_that_is_nowhere_is_fatal_until_a_reset() {
    let (mut driver, _directory) = start();
    let pair = driver.pair(1, 16);
    let nowhere = Pair {
        sq: 0x10_0000,
        ..driver.pair(1, 16)
    };
    assert_eq!(driver.admin(&create_cq(&pair)).status, 0);
    assert_eq!(driver.admin(&create_sq(&nowhere)).status, 0);

    driver.ring_with(2, 1);
    wait_fatal(&driver);
    driver.enable();
    assert_eq!(driver.read32(CSTS), 1);

    // A completion queue that is not there.
    let mut pair = driver.pair(1, 16);
    let nowhere = Pair {
        cq: 0x10_0000,
        ..driver.pair(1, 16)
    };
    assert_eq!(driver.admin(&create_cq(&nowhere)).status, 0);
    assert_eq!(driver.admin(&create_sq(&pair)).status, 0);
    driver.submit(&mut pair, &Command::new(0, 1));
    wait_fatal(&driver);
    driver.enable();
    let mut pair = driver.create(1, 16);
    assert_eq!(driver.at(&mut pair, &Command::new(0, 1)).status, 0);
}

#[test]
fn nonsense_in_cc_is_fatal_until_a_reset() {
    let (mut driver, _directory) = start();
    for cc in [ENABLE | 1 << 7, ENABLE | 7 << 4, ENABLE | 1 << 11] {
        driver.set_cc(0, 0);
        driver.write32(CC, cc);
        assert_eq!(driver.read32(CSTS), FATAL, "{cc:#x}");
    }
    driver.enable();

    assert_eq!(driver.admin(&Command::new(ABORT, 0)).status, 0);
}

#[test]
fn shutdown_completes_and_ends_with_a_reset() {
    let (mut driver, _directory) = start();
    let mut pair = driver.create(1, 16);

    driver.write32(CC, ENABLE | 1 << 14);

    assert_eq!(driver.read32(CSTS), 1 | 2 << 2);
    driver.submit(&mut pair, &Command::new(0, 1));
    thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.peek(&pair), None);
    driver.enable();
    assert_eq!(driver.read32(CSTS), 1);
    assert_eq!(driver.admin(&Command::new(ABORT, 0)).status, 0);
}

#[test]
fn resets_of_every_kind_return_to_power_on() {
    let (mut driver, _directory) = start();
    for kind in 0..3 {
        let mut pair = driver.create(1, 16);
        driver.submit(&mut pair, &Command::new(0, 1));
        match kind {
            0 => driver.machine.client.reset().unwrap(),
            1 => flr(&driver),
            _ => driver.set_cc(0, 0),
        }
        assert_eq!(driver.read32(CSTS), 0);
        assert_eq!(driver.read32(CC) & 1, 0);
        let kept = driver.read32(0x24) != 0;
        assert_eq!(kept, kind == 2, "AQA");
        if kind < 2 {
            // Memory space and bus mastering are off as well.
            driver.machine.client.write(7, 4, &[6, 0]).unwrap();
        }
        driver.enable();
        assert_eq!(driver.admin(&create_sq(&pair)).status, 0x100 | DNR);
    }
}

/// Initiates a function level reset, as PCI Express has it.
fn flr(driver: &Driver<Rig>) {
    let client = &driver.machine.client;
    let mut config = [0; 256];
    client.read(7, 0, &mut config).unwrap();
    let mut at = usize::from(config[0x34]);
    while config[at] != 0x10 {
        at = usize::from(config[at + 1]);
    }
    let control = at as u64 + 8;
    client.write(7, control, &[0, 0x80]).unwrap();
}

#[test]
fn reset_under_load_ends_what_is_under_way() {
    let (mut driver, _directory) = start();
    for _ in 0..20 {
        let mut pair = driver.create(1, 64);
        let at = driver.pages(2);
        for lba in 0..30 {
            driver.put(&mut pair, &io(&driver, 1, 8 * lba, at));
        }
        driver.ring(&pair);
        driver.set_cc(0, 0);
        // Nothing comes after it.
        let before = driver.bytes(pair.cq, 1024);
        thread::yield_now();
        assert!(driver.bytes(pair.cq, 1024) == before);
        driver.enable();
    }
}

#[test]
fn memory_that_goes_away_is_let_go_of() {
    let (mut driver, _directory) = start();
    let mut pair = driver.create(1, 64);
    let at = driver.pages(2);
    for lba in 0..30 {
        driver.put(&mut pair, &io(&driver, 2, 8 * lba, at));
    }
    driver.ring(&pair);
    let memory = driver.machine.memory();
    let client = &driver.machine.client;

    let unmapped = client.dma_unmap(memory.start, memory.end - memory.start);

    assert_eq!(unmapped.unwrap(), memory.end - memory.start);
    let before = driver.bytes(at, 8192);
    driver.ring_with(2, 33);
    wait_fatal(&driver);
    assert!(driver.bytes(at, 8192) == before);
}

#[test]
fn death_at_any_moment_completes_each_command_once() {
    const ROUNDS: u64 = 60;
    const DEPTH: u64 = 12;
    let (mut driver, _directory) = start();
    let mut pair = driver.create(1, 32);
    let buffers: Vec<_> = (0..DEPTH).map(|_| driver.pages(1)).collect();
    for round in 0..ROUNDS {
        let moment = [Moment::Taken, Moment::Replying][usize::try_from(round % 2).unwrap()];
        let mut waiting = BTreeSet::new();
        for (number, at) in (0..).zip(&buffers) {
            let byte = u8::try_from((round * 7 + number) % 251).unwrap();
            driver.machine.store(*at, &[byte; 4096]);
            // Half of them over what the round before has written.
            let lba = 8 * (round * DEPTH / 2 + number);
            waiting.insert(driver.put(&mut pair, &io(&driver, 1, lba, *at)));
        }
        driver.ring(&pair);
        driver.machine.stop.die_at(moment);
        // An access for the server to die at, while commands are under way.
        driver.read32(CSTS);
        while !waiting.is_empty() {
            let entry = driver.next(&mut pair);
            assert_eq!(entry.status, 0);
            assert!(waiting.remove(&entry.cid), "{} in {round}", entry.cid);
        }
        for (number, at) in (0..).zip(&buffers) {
            driver.machine.store(*at, &[0xff; 4096]);
            let lba = 8 * (round * DEPTH / 2 + number);
            let read = io(&driver, 2, lba, *at);
            if number == 3 {
                driver.machine.stop.die_at(moment);
                driver.read32(CSTS);
            }
            assert_eq!(driver.at(&mut pair, &read).status, 0);
            let byte = u8::try_from((round * 7 + number) % 251).unwrap();
            assert!(driver.bytes(*at, 4096) == [byte; 4096], "{round}, {number}");
        }
    }
    assert_eq!(driver.peek(&pair), None);
    let starts = driver.machine.starts.load(Ordering::SeqCst);
    assert!(starts > ROUNDS, "{starts}");
}

#[test]
fn deaths_under_the_load_of_many_queues_lose_and_double_nothing() {
    const ROUNDS: usize = 150;
    let (mut driver, _directory) = start();
    let pairs: Vec<_> = (1..=4).map(|id| driver.create(id, 16)).collect();
    let driver = &driver;
    let load = |mut pair: Pair| {
        let buffers: Vec<_> = (0..10).map(|_| driver.pages(1)).collect();
        let first = u64::from(pair.id) * 1024;
        for round in 0..ROUNDS {
            let byte = u8::try_from(round % 251).unwrap();
            for opcode in [1, 2] {
                let fill = if opcode == 1 { byte } else { 0xff };
                let mut waiting = BTreeSet::new();
                for (lba, at) in (first..).step_by(8).zip(&buffers) {
                    driver.machine.store(*at, &[fill; 4096]);
                    waiting.insert(driver.put(&mut pair, &io(driver, opcode, lba, *at)));
                }
                driver.ring(&pair);
                while !waiting.is_empty() {
                    let entry = driver.next(&mut pair);
                    assert_eq!(entry.status, 0);
                    assert!(waiting.remove(&entry.cid), "{} in {round}", entry.cid);
                }
            }
            for at in &buffers {
                assert!(driver.bytes(*at, 4096) == [byte; 4096], "{round}");
            }
        }
        assert_eq!(driver.peek(&pair), None);
    };
    let load = &load;
    thread::scope(|scope| {
        let threads: Vec<_> = pairs
            .into_iter()
            .map(|pair| scope.spawn(move || load(pair)))
            .collect();
        let mut deaths = 0;
        while threads.iter().any(|thread| !thread.is_finished()) {
            let moment = [Moment::Taken, Moment::Replying][deaths % 2];
            driver.machine.stop.die_at(moment);
            driver.read32(CSTS);
            deaths += 1;
        }
        assert!(deaths > 20, "{deaths}");
    });
}

#[test]
fn death_amid_administration_changes_once() {
    let (mut driver, _directory) = start();
    let request = Command::new(EVENT_REQUEST, 0);
    let mut admin = driver.pair(0, 32);
    std::mem::swap(&mut admin, &mut driver.admin);
    let held = driver.submit(&mut admin, &request);
    for round in 0..40 {
        let pair = driver.pair(1, 16);
        let delete = |opcode| Command::new(opcode, 0).with(10, 1);
        for command in [
            create_cq(&pair),
            create_sq(&pair),
            feature(SET_FEATURES, 1, round),
            delete(DELETE_SQ),
            delete(DELETE_CQ),
        ] {
            let cid = driver.submit(&mut admin, &command);
            driver.machine.stop.die_at(Moment::Taken);
            driver.read32(CSTS);
            let entry = driver.next(&mut admin);
            assert_eq!((entry.cid, entry.status), (cid, 0), "{round}: {command:?}");
        }
        let read = feature(GET_FEATURES, 1, 0);
        let cid = driver.submit(&mut admin, &read);
        let entry = driver.next(&mut admin);
        assert_eq!((entry.cid, entry.dw0), (cid, round));
    }
    // The request for events has outlived all of them.
    driver.ring_with(8, 1);
    assert_eq!(driver.next(&mut admin).cid, held);
}

#[test]
fn nonsense_in_registers_and_commands_leaves_a_controller_that_works() {
    let (mut driver, _directory) = start();
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut next = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    for round in 0..40 {
        let mut pair = driver.create(1, 32);
        let memory = driver.machine.memory();
        for _ in 0..30 {
            let mut dwords = [0; 16];
            for dword in &mut dwords {
                *dword = match next(4) {
                    0 => u32::MAX,
                    1 => u32::try_from(next(16)).unwrap(),
                    _ => u32::try_from(next(1 << 32)).unwrap(),
                };
            }
            let mut command = Command(dwords).with(1, u32::try_from(next(3)).unwrap());
            dwords[0] = u32::try_from(next(16)).unwrap() | u32::try_from(next(2)).unwrap() << 14;
            command = command.with(0, dwords[0]);
            if next(2) == 0 {
                let address = memory.start + next(memory.end - memory.start);
                command = command.pointing(address & !3, address & !7);
                command =
                    command.blocks(next(BYTES / 512 + 8), 1 + u32::try_from(next(40)).unwrap());
            }
            driver.submit(&mut pair, &command);
        }
        for _ in 0..40 {
            let width = [1, 2, 4, 8][usize::try_from(next(4)).unwrap()];
            let bytes = [next(256), next(256), next(4), next(256)];
            let bytes = bytes.map(|byte| byte.to_le_bytes()[0]);
            let bytes: Vec<u8> = bytes.into_iter().cycle().take(width).collect();
            let offset = match next(3) {
                0 => next(0x40),
                1 => 0x1000 + next(64),
                _ => next(0x2000),
            };
            // Whatever comes of it.
            let _ = driver.machine.write(offset, &bytes);
            let mut read = vec![0; width];
            driver.machine.read(offset, &mut read).unwrap();
        }
        driver.enable();
        assert_eq!(driver.admin(&Command::new(ABORT, 0)).status, 0, "{round}");
        assert_eq!(driver.machine.starts.load(Ordering::SeqCst), 1);
        if round % 8 == 7 {
            // There is not so much memory.
            driver.start_over();
        }
    }
}
