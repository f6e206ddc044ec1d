// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server to be hostile to, and the proof that it has come to no harm: it serves the next client,
//! whose device is as after power-on, and has no more descriptors, mappings and threads than before.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use libmuser::vfio_user::wire::{put, Command, Header};
use libmuser::{
    Access, Bar, Bus, Device, Dma, Ended, Interrupts, Msix, PciBuilder, PciModel, Pin, Region,
    Reset, Result,
};

use crate::raw::{memfd, Listening, RawClient, DEADLINE};

pub(crate) const CONFIG: u32 = 7;
pub(crate) const PAGE: u64 = 4096;
pub(crate) const EINVAL: i32 = libc::EINVAL;

/// Registers of BAR 0: one that keeps what is written,
pub(crate) const SCRATCH: u64 = 0;
/// an address in the client's memory,
pub(crate) const IOVA: u64 = 8;
/// the 8 bytes there,
pub(crate) const DATA: u64 = 16;
/// and one that fires the vector written to it.
pub(crate) const FIRE: u64 = 24;
/// Where BAR 0 is memory that the client can map.
pub(crate) const AREA: u64 = 0x1000;

/// A device that does what its registers are told.
#[derive(Debug)]
pub(crate) struct Prober {
    dma: Dma,
    interrupts: Interrupts,
    scratch: u64,
    iova: u64,
}

impl Prober {
    pub(crate) fn new(bus: &Bus) -> Result<Self> {
        Ok(Self {
            dma: bus.dma(),
            interrupts: bus.interrupts(),
            scratch: 0,
            iova: 0,
        })
    }
}

impl Device for Prober {
    fn read(&mut self, access: Access) -> Result<u64> {
        match (access.region, access.offset) {
            (Region::Bar(0), SCRATCH) => Ok(self.scratch),
            (Region::Bar(0), DATA) => self.dma.read_obj(self.iova),
            _ => access.unhandled_read(),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        match (access.region, access.offset) {
            (Region::Bar(0), SCRATCH) => self.scratch = value,
            (Region::Bar(0), IOVA) => self.iova = value,
            (Region::Bar(0), DATA) => self.dma.write_obj(self.iova, value)?,
            (Region::Bar(0), FIRE) => self.interrupts.raise(u16::try_from(value).unwrap())?,
            _ => access.unhandled_write(value)?,
        }
        Ok(())
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        (self.scratch, self.iova) = (0, 0);
        Ok(())
    }
}

pub(crate) fn model() -> PciModel {
    PciBuilder::new(0x1af4, 0x10f0)
        .bar(0, Bar::memory32(0x4000).mappable(AREA..0x2000))
        .bar(1, Bar::memory32(0x4000))
        .interrupt_pin(Pin::A)
        .msix(Msix::new(4).table(1, 0).pba(1, 0x1000))
        .build()
        .unwrap()
}

/// What a process has, which all tests of a program share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Census {
    descriptors: usize,
    mappings: usize,
    threads: usize,
}

impl Census {
    fn take() -> Self {
        let count = |path| std::fs::read_dir(path).unwrap().count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        // Files that are shared: an allocator comes and goes with mappings of its own.
        let shared = |line: &&str| line.split(' ').nth(1).is_some_and(|it| it.ends_with('s'));
        Self {
            descriptors: count("/proc/self/fd"),
            mappings: maps.lines().filter(shared).count(),
            threads: count("/proc/self/task"),
        }
    }

    fn is_within(self, other: Self) -> bool {
        // The harness may start a thread for each processor, whose test then waits for this one.
        let harness = std::thread::available_parallelism().map_or(1, usize::from);
        self.descriptors <= other.descriptors
            && self.mappings <= other.mappings
            && self.threads <= other.threads + harness
    }
}

static ALONE: Mutex<()> = Mutex::new(());

/// A server in a process in which no other test does anything meanwhile.
#[derive(Debug)]
pub(crate) struct Target {
    server: Listening,
    before: Census,
    _alone: MutexGuard<'static, ()>,
}

/// Does something to a server, which comes to no harm by it.
pub(crate) fn attack(work: impl FnOnce(&Target)) {
    let target = Target::start();
    work(&target);
    target.check();
}

impl Target {
    fn start() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let server = Listening::start(model(), Prober::new);
        let client = good_client(&server);
        let before = Census::take();
        drop(client);
        Self {
            server,
            before,
            _alone: alone,
        }
    }

    /// A client that has said nothing yet.
    pub(crate) fn connect(&self) -> RawClient {
        self.server.connect()
    }

    /// A client that has agreed upon a version.
    pub(crate) fn client(&self) -> RawClient {
        connect_in_turn(&self.server)
    }

    /// The next client is served, and nothing is left of those before it.
    fn check(&self) {
        let _client = good_client(&self.server);
        // Connections that were turned away are closed when the server hears of it.
        let until = Instant::now() + DEADLINE;
        loop {
            let now = Census::take();
            if now.is_within(self.before) {
                return;
            }
            assert!(Instant::now() < until, "{now:?}, before {:?}", self.before);
            std::thread::yield_now();
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // The next test takes stock when this server has gone.
        self.server.stop.stop();
        if !std::thread::panicking() {
            assert!(matches!(self.server.wait(), Ok(Ended::Stopped)));
        }
    }
}

/// A client that has agreed upon a version. Who connects before the server has seen that the one
/// before has gone is turned away, and may try again.
fn connect_in_turn(server: &Listening) -> RawClient {
    let until = Instant::now() + DEADLINE;
    loop {
        let mut client = server.connect();
        if try_negotiate(&mut client) {
            return client;
        }
        assert!(Instant::now() < until, "nobody is served any more");
    }
}

/// Whether a version could be agreed upon.
fn try_negotiate(client: &mut RawClient) -> bool {
    let header = client.header(Command::Version);
    let mut bytes = Vec::new();
    put(&mut bytes, header, &[&[0; 4], b"{}\0"]).unwrap();
    client.try_send(&bytes) && client.try_receive().is_some_and(|it| it.result().is_ok())
}

/// Connects and does a bit of everything.
fn good_client(server: &Listening) -> RawClient {
    let mut client = connect_in_turn(server);
    assert_eq!(client.read(CONFIG, 0, 4), Ok(vec![0xf4, 0x1a, 0xf0, 0x10]));
    assert_eq!(client.read(CONFIG, 4, 2), Ok(vec![0; 2]));
    assert_eq!(client.read(0, SCRATCH, 8), Ok(vec![0; 8]));
    assert_eq!(client.read(0, AREA, 8), Ok(vec![0; 8]));
    assert_eq!(client.write(0, SCRATCH, &[7; 8]), Ok(8));
    assert_eq!(client.read(0, SCRATCH, 8), Ok(vec![7; 8]));
    let memory = memfd(PAGE);
    memory.write_all_at(b"in order", 8).unwrap();
    assert_eq!(
        client.dma_map(0x10_0000, PAGE, 3, Some((&memory, 0))),
        Ok(())
    );
    assert_eq!(
        device_reads(&mut client, 0x10_0008),
        Ok(b"in order".to_vec())
    );
    client
}

/// What the device finds at an address in the client's memory.
pub(crate) fn device_reads(client: &mut RawClient, iova: u64) -> Result<Vec<u8>, i32> {
    client.write(CONFIG, 4, &[4, 0])?;
    client.write(0, IOVA, &iova.to_ne_bytes())?;
    client.read(0, DATA, 8)
}

/// The bytes of a command.
pub(crate) fn message(id: u16, command: u16, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        id,
        command,
        ..Header::command(id, Command::Version)
    };
    let mut bytes = Vec::new();
    put(&mut bytes, header, &[payload]).unwrap();
    bytes
}

/// Numbers of 4 bytes, one behind the other.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Numbers of 8 bytes, one behind the other.
pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// Each command of a client's with a payload that makes sense, and whether it succeeds.
pub(crate) fn good_messages() -> Vec<(u16, Vec<u8>)> {
    let map = [words(&[32, 3]), longs(&[0, 0x8000, PAGE])].concat();
    let unmap = [words(&[24, 0]), longs(&[0x8000, PAGE])].concat();
    let access = |region, offset, count| [longs(&[offset]), words(&[region, count])].concat();
    let one = [access(0, SCRATCH, 4), vec![1, 2, 3, 4, 0, 0, 0, 0]].concat();
    vec![
        (2, map),
        (3, unmap),
        (4, words(&[16, 0, 0, 0])),
        (5, words(&[32, 0, 0, 0, 0, 0, 0, 0])),
        (6, words(&[16, 0, 0, 0])),
        (7, words(&[16, 0, 0, 0])),
        (8, words(&[20, 0x21, 0, 0, 0])),
        (9, access(CONFIG, 0, 4)),
        (10, [access(0, SCRATCH, 4), vec![1, 2, 3, 4]].concat()),
        (13, Vec::new()),
        (15, [longs(&[1]), one].concat()),
        (16, words(&[8, 0x4_0006])),
    ]
}

/// Waits until the other side has taken all that was sent from the socket.
pub(crate) fn wait_taken(socket: &UnixStream) {
    let until = Instant::now() + DEADLINE;
    loop {
        let mut left: libc::c_int = 0;
        // SAFETY: `TIOCOUTQ` of a socket writes the number of bytes not taken yet.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
        assert_eq!(result, 0);
        if left == 0 {
            return;
        }
        assert!(Instant::now() < until, "the server does not receive");
        std::thread::yield_now();
    }
}

/// So many descriptors of memory.
pub(crate) fn many(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| memfd(PAGE).into()).collect()
}
