// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device with the registers of the sample `counter`, on the bare ABI: so that a storm tells
//! whether the module or the library has lost something.
//!
//! A lane's state lies in device memory, which outlives the process. It is there twice, with a word
//! that says which of the two holds: the other is written first, then the word, in one store. So a
//! kill at any instruction leaves a lane as it was before or after a request, and the number of the
//! last request that changed it tells a replay from the first time.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use muser_uapi::*;

use super::registers::*;
use crate::check::errno_of;
use crate::mdev::Mdev;
use crate::node::{area, irq, region, Description, Node, Request, Server, CONFIG};
use crate::service::Reply;
use crate::sys::{self, EventFd, Mapping, Segment, PAGE};

/// Region of device memory that no client uses: the lanes' state.
const STATE: u32 = 4;
/// Bytes of a lane's state.
const LANE: usize = 128;
/// Bytes of one of its two versions.
const VERSION: usize = 40;
/// Where a lane's state has what its doorbell was last rung with. Another thread than those that
/// serve writes it.
const HEARD: usize = LANE - 8;
/// Threads that serve.
const THREADS: usize = 2;

/// What a stand-in does wrong with a request that a process before it has left: so that it can be
/// seen that a storm notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It takes the request for a new one.
    Double,
    /// It takes the request for one that was done.
    Lose,
    /// It answers none.
    Silent,
}

impl Fault {
    /// The fault of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "double" => Some(Self::Double),
            "lose" => Some(Self::Lose),
            "silent" => Some(Self::Silent),
            _ => None,
        }
    }

    /// Makes requests take a while on one side of their effect, where there is a fault to be hit by
    /// a kill: a process that does nothing but its work is hardly ever killed in just that place.
    fn dawdle(self, sides: &[Self]) {
        if sides.contains(&self) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// One version of a lane's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Version {
    counter: u64,
    address: u64,
    /// Number of the last request which changed this, and what a read was answered.
    last: u64,
    answer: u64,
    /// Whether there was one: 0 is a number as well.
    changed: u64,
}

/// The lanes' state in device memory.
#[derive(Debug)]
struct Lanes {
    memory: Mapping,
    fault: Fault,
}

impl Lanes {
    fn load(&self, lane: u32) -> Version {
        let at = lane as usize * LANE;
        let valid: u64 = self.memory.read(at);
        fence(Ordering::Acquire);
        let at = at + 8 + VERSION * (valid & 1) as usize;
        let word = |i: usize| self.memory.read::<u64>(at + 8 * i);
        Version {
            counter: word(0),
            address: word(1),
            last: word(2),
            answer: word(3),
            changed: word(4),
        }
    }

    fn store(&self, lane: u32, version: Version) {
        let at = lane as usize * LANE;
        let other = self.memory.read::<u64>(at) & 1 ^ 1;
        let to = at + 8 + VERSION * other as usize;
        let Version {
            counter,
            address,
            last,
            answer,
            changed,
        } = version;
        for (i, word) in [counter, address, last, answer, changed]
            .into_iter()
            .enumerate()
        {
            self.memory.write(to + 8 * i, word);
        }
        // What holds is written after what it says.
        fence(Ordering::Release);
        self.memory.write(at, other);
    }

    fn heard(&self, lane: u32) -> u32 {
        self.memory.read(lane as usize * LANE + HEARD)
    }

    fn hear(&self, lane: u32, value: u32) {
        self.memory.write(lane as usize * LANE + HEARD, value);
    }

    /// Changes a lane once for a request, and says what to answer each time it is asked.
    fn once(
        &self,
        lane: u32,
        request: &muser_slot,
        change: impl FnOnce(&mut Version) -> u64,
    ) -> u64 {
        let mut version = self.load(lane);
        let again = request.flags & MUSER_REQUEST_REPLAY != 0;
        let done = match self.fault {
            Fault::Double => false,
            Fault::Lose if again => true,
            _ => version.changed == 1 && version.last == request.id,
        };
        if done {
            return version.answer;
        }
        self.fault.dawdle(&[Fault::Lose, Fault::Silent]);
        version.answer = change(&mut version);
        version.last = request.id;
        version.changed = 1;
        self.store(lane, version);
        self.fault.dawdle(&[Fault::Double]);
        version.answer
    }
}

/// The description, with or without doorbells.
fn description(doorbells: bool) -> Description {
    let mut lanes = region(LANES, LANES_SIZE);
    let mut state = region(STATE, PAGE as u64);
    state.num_areas = 1;
    let mut areas = vec![area(0, PAGE as u64)];
    if doorbells {
        lanes.num_areas = 1;
        let bells = muser_area {
            flags: MUSER_AREA_DOORBELL,
            ..area(DOORBELLS, DOORBELLS_SIZE)
        };
        areas.insert(0, bells);
    }
    Description {
        regions: vec![lanes, state, region(CONFIG, 256)],
        areas,
        irqs: vec![irq(VECTORS, LANE_COUNT, 0)],
        ..Description::minimal()
    }
}

/// Attaches, with doorbells where the module knows them.
fn attach(mdev: &Mdev, take_over: bool) -> Result<(Server, bool)> {
    let flags = if take_over { MUSER_ATTACH_STANDBY } else { 0 };
    let with = |doorbells| Description {
        flags,
        ..description(doorbells)
    };
    let node = Node::open(mdev)?;
    match node.attach_raw(&with(true)) {
        Ok(attach) => Ok((Server::attached(node, &attach)?, true)),
        Err(refusal) if refusal.fault == MUSER_FAULT_AREA_FLAGS => {
            Ok((node.attach(&with(false))?, false))
        }
        Err(refusal) => Err(refusal.into()),
    }
}

/// Serves the device until it is removed or somebody takes over.
///
/// # Errors
///
/// What failed.
pub fn run(uuid: &str, take_over: bool, fault: Fault) -> Result<()> {
    // Whoever created the device removes it.
    let mdev = std::mem::ManuallyDrop::new(Mdev::adopt(uuid));
    let (server, doorbells) = attach(&mdev, take_over)?;
    let server = Arc::new(server);
    let lanes = Arc::new(Lanes {
        memory: server.node().map(STATE, 0, PAGE)?,
        fault,
    });
    if doorbells {
        let (server, lanes) = (Arc::clone(&server), Arc::clone(&lanes));
        std::thread::spawn(move || {
            if let Err(error) = listen(&server, &lanes) {
                eprintln!("stand-in: {error:#}");
            }
        });
    }
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (server, lanes) = (Arc::clone(&server), Arc::clone(&lanes));
            std::thread::spawn(move || serve(&server, &lanes))
        })
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a serving thread panicked"))??;
    }
    // The device may be gone.
    let _ = sys::ioctl_value(server.node(), MUSER_DETACH, 0);
    Ok(())
}

/// Answers requests until there are no more to come.
fn serve(server: &Server, lanes: &Lanes) -> Result<()> {
    let mut next = muser_next {
        size: size_of::<muser_next>() as u32,
        flags: MUSER_NEXT_TAKE,
        ..Default::default()
    };
    loop {
        match server
            .node()
            .next(&mut next)
            .map_err(|error| errno_of(&error))
        {
            Ok(()) => {}
            Err(libc::EINTR) => continue,
            // The client was killed; the request has ended.
            Err(libc::ECANCELED) => {
                next.flags = MUSER_NEXT_TAKE;
                continue;
            }
            Err(libc::ESHUTDOWN | libc::ENODEV) => return Ok(()),
            Err(errno) => anyhow::bail!("NEXT: {}", crate::check::errno_name(errno)),
        }
        let request = server.request(next.slot);
        if lanes.fault == Fault::Silent && request.head.flags & MUSER_REQUEST_REPLAY != 0 {
            next.flags = MUSER_NEXT_TAKE;
            continue;
        }
        let result = match answer(server, lanes, &request) {
            Reply::Data(data) => {
                server.set_data(next.slot, &data);
                0
            }
            Reply::Error(errno) => -errno,
            Reply::Done | Reply::Hold => 0,
        };
        server.set_result(next.slot, result);
        next.flags = MUSER_NEXT_REPLY | MUSER_NEXT_TAKE;
    }
}

fn answer(server: &Server, lanes: &Lanes, request: &Request) -> Reply {
    let head = &request.head;
    if head.kind != MUSER_REQUEST_READ && head.kind != MUSER_REQUEST_WRITE {
        // A storm does not reset, but for the reset when its client closes the device.
        return Reply::Done;
    }
    if head.region != LANES {
        let bytes = [0x34, 0x12, 0x47, 0xC0];
        let byte = |at: u64| bytes.get(at as usize).copied().unwrap_or(0);
        return match head.kind {
            MUSER_REQUEST_READ => Reply::Data(
                (0..u64::from(head.count))
                    .map(|i| byte(head.offset + i))
                    .collect(),
            ),
            _ => Reply::Done,
        };
    }
    let lane = (head.offset / LANE_STRIDE) as u32;
    if lane >= LANE_COUNT {
        return Reply::Error(libc::ENXIO);
    }
    let register = head.offset % LANE_STRIDE;
    if head.kind == MUSER_REQUEST_READ {
        let value = match register {
            VALUE => lanes.load(lane).counter,
            FETCH_ADD => lanes.once(lane, head, |version| {
                let before = version.counter;
                version.counter = before.wrapping_add(1);
                before
            }),
            ADDRESS => lanes.load(lane).address,
            BELL => lanes.heard(lane).into(),
            _ => return Reply::Error(libc::ENXIO),
        };
        let mut data = value.to_le_bytes().to_vec();
        data.resize(head.count as usize, 0);
        return Reply::Data(data);
    }
    let mut bytes = [0; 8];
    let count = request.data.len().min(8);
    bytes[..count].copy_from_slice(&request.data[..count]);
    let value = u64::from_le_bytes(bytes);
    match register {
        ADD => {
            lanes.once(lane, head, |version| {
                version.counter = version.counter.wrapping_add(value);
                0
            });
        }
        ADDRESS => {
            lanes.once(lane, head, |version| {
                version.address = value;
                0
            });
        }
        GO => {
            if let Err(error) = go(server, lanes, lane, head, value) {
                eprintln!("stand-in: GO: {error}");
                return Reply::Error(errno_of(&error).max(1));
            }
        }
        _ => return Reply::Error(libc::ENXIO),
    }
    Reply::Done
}

/// Everything but the addition may happen again: it then writes and raises the same.
fn go(
    server: &Server,
    lanes: &Lanes,
    lane: u32,
    head: &muser_slot,
    value: u64,
) -> std::io::Result<()> {
    let address = lanes.load(lane).address;
    let add = |addend: u64| {
        lanes.once(lane, head, |version| {
            version.counter = version.counter.wrapping_add(addend);
            version.counter
        })
    };
    if address == 0 {
        add(value);
    } else {
        let mut block = [0; 16];
        copy(server, address, &mut block, 0)?;
        let (addend, sequence) = block.split_at_mut(8);
        let mut number = [0; 8];
        number.copy_from_slice(addend);
        let after = add(u64::from_le_bytes(number));
        let mut answer = [0; 16];
        answer[..8].copy_from_slice(&after.to_le_bytes());
        answer[8..].copy_from_slice(sequence);
        copy(server, address + 16, &mut answer, MUSER_DMA_COPY_WRITE)?;
    }
    server.trigger(VECTORS, lane, 1)?;
    Ok(())
}

fn copy(server: &Server, iova: u64, bytes: &mut [u8], flags: u32) -> std::io::Result<()> {
    sys::dma_copy(server.node(), flags, &[Segment::buffer(iova, bytes)]).1
}

/// Looks at the doorbells whenever one is rung.
fn listen(server: &Server, lanes: &Lanes) -> Result<()> {
    let event = EventFd::new()?;
    let bells = server.node().map(LANES, DOORBELLS, PAGE)?;
    let mut doorbell = muser_doorbell {
        size: size_of::<muser_doorbell>() as u32,
        flags: 0,
        area: 0,
        fd: event.as_raw_fd(),
    };
    sys::ioctl(server.node(), MUSER_DOORBELL, &mut doorbell).context("MUSER_DOORBELL")?;
    loop {
        sys::poll(event.as_fd(), libc::POLLIN, Duration::from_secs(3600))?;
        if event.take()? == 0 {
            continue;
        }
        for lane in 0..LANE_COUNT {
            lanes.hear(lane, bells.read::<u32>((4 * lane) as usize));
        }
    }
}
