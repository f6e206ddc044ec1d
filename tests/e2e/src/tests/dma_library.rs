// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA as the library does it: limits, what is let go of, and threads against a client that unmaps.
//! What a device sees of it otherwise, the conformance suite tests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{anyhow, ensure, Context, Result};
use libmuser::transport::KernelTransport;
use libmuser::{Device, Dma, DmaAccess, PciBuilder, Server, Stop};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::Node;
use muser_e2e::rig::{pattern, Guest, BASE};
use muser_e2e::sys::{self, Mapping, Memory, PAGE};
use muser_e2e::vfio::{Road, DMA_BOTH};

use super::topic;

topic!("dma_library", dma: [
    limit_of_pinned_memory_makes_room,
    more_than_the_limit_is_refused,
    release_unpins_what_is_not_in_use,
    threads_use_a_range_while_the_client_unmaps_it,
    use_of_what_is_held_makes_no_ioctl,
]);

struct Idle;

impl Device for Idle {}

/// A server of the library, and a client with memory that lets it be a bus master.
struct Library {
    guest: Guest,
    dma: Dma,
    stop: Stop,
    thread: Option<JoinHandle<libmuser::Result<()>>>,
    mdev: Mdev,
}

impl Library {
    fn start(road: Road, pages: usize) -> Result<Self> {
        let mdev = Mdev::create(Type::Pci)?;
        let transport = KernelTransport::open_node(mdev.node())?;
        let stop = Stop::new()?;
        let stopped = stop.clone();
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let model = PciBuilder::new(0x1234, 0x5678).build()?;
            let mut server = Server::new(model, transport, |bus| {
                // Whoever waits for it may have given up.
                let _ = tell.send(bus.dma());
                Ok(Idle)
            })?;
            server.run_until(&stopped).map(drop)
        });
        let dma = told.recv().context("the server did not start")?;
        let guest = Guest::with(&mdev, road, Memory::Anonymous, pages)?;
        guest.client.write_all(7, 4, &[6, 0])?;
        Ok(Self {
            guest,
            dma,
            stop,
            thread: Some(thread),
            mdev,
        })
    }

    fn pinned(&self) -> Result<u64> {
        Ok(Node::open(&self.mdev)?.pinned()?)
    }

    fn end(mut self) -> Result<()> {
        self.stop.stop();
        let thread = self.thread.take().context("it has ended")?;
        let ended = thread.join().map_err(|_| anyhow!("the server panicked"))?;
        ended.context("the server")
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

fn errno<T: std::fmt::Debug>(what: &str, result: libmuser::Result<T>) -> Result<i32> {
    match result {
        Ok(value) => Err(anyhow!("{what} succeeded with {value:?}")),
        Err(error) => Ok(error.errno().number()),
    }
}

/// So many bytes of the guest's memory as it was filled.
fn filled(len: usize) -> Vec<u8> {
    let word = pattern(Guest::SEED);
    (0..len)
        .step_by(8)
        .flat_map(|at| word(at).to_ne_bytes())
        .collect()
}

fn limit(library: &Library, pages: usize) -> Result<()> {
    let bytes = (pages * PAGE).to_string();
    works(
        "max_pinned",
        library.mdev.set_attribute("max_pinned", &bytes),
    )
}

fn limit_of_pinned_memory_makes_room(road: Road) -> Result<()> {
    let library = Library::start(road, 64)?;
    limit(&library, 16)?;
    let mut all = vec![0; 64 * PAGE];
    library.dma.read(BASE, &mut all)?;
    ensure!(all == filled(all.len()), "the copy of all differs");
    let held = library.dma.map(BASE, 8 * PAGE, DmaAccess::ReadWrite)?;
    for round in 0..2_u64 {
        for page in 0..64 {
            let iova = BASE + (page * PAGE) as u64;
            let range = library.dma.map(iova, PAGE, DmaAccess::ReadWrite);
            let range = range.with_context(|| format!("round {round}, page {page}"))?;
            range.write_obj(8, round ^ iova)?;
            library.dma.write_obj(iova + 16, round + iova)?;
            let memory = &library.guest.memory;
            equal("by a range", memory.read(page * PAGE + 8), round ^ iova)?;
            equal("by a copy", memory.read(page * PAGE + 16), round + iova)?;
            held.store(page * 8, round)?;
            equal("what is held", memory.read(page * 8), round)?;
        }
    }
    ensure!(library.pinned()? <= 16, "over the limit");
    library.end()
}

fn more_than_the_limit_is_refused(road: Road) -> Result<()> {
    let library = Library::start(road, 64)?;
    limit(&library, 16)?;
    let more = library.dma.map(BASE, 17 * PAGE, DmaAccess::Read);
    equal("errno", errno("mapping too much", more)?, libc::EDQUOT)?;
    let held = library.dma.map(BASE, 16 * PAGE, DmaAccess::Read)?;
    let more = library.dma.read(BASE + 20 * PAGE as u64, &mut [0; 8]);
    equal("errno", errno("copying one more", more)?, libc::EDQUOT)?;
    drop(held);
    library.dma.read(BASE + 20 * PAGE as u64, &mut [0; 8])?;
    library.end()
}

fn release_unpins_what_is_not_in_use(road: Road) -> Result<()> {
    let library = Library::start(road, 16)?;
    let held = library
        .dma
        .map(BASE + 4 * PAGE as u64, PAGE, DmaAccess::ReadWrite)?;
    library.dma.read(BASE, &mut vec![0; 16 * PAGE])?;
    equal("pinned", library.pinned()?, 16)?;
    library.dma.release(BASE, 8 * PAGE as u64)?;
    equal("pinned after a release", library.pinned()?, 9)?;
    held.store(0, 5_u32)?;
    equal("held", library.guest.memory.read::<u32>(4 * PAGE), 5)?;
    drop(held);
    library.dma.release(0, u64::MAX)?;
    equal("pinned after all", library.pinned()?, 0)?;
    library.dma.read(BASE, &mut [0; 8])?;
    library.end()
}

/// What is unmapped is never written to again, and what is mapped then is, whatever threads do.
fn threads_use_a_range_while_the_client_unmaps_it(road: Road) -> Result<()> {
    let library = Library::start(road, 4)?;
    let other = BASE * 16;
    let client = &library.guest.client;
    let mut memory = Mapping::anonymous(PAGE)?;
    client.dma_map(&memory, other, DMA_BOTH)?;
    let range = library.dma.map(other, PAGE, DmaAccess::ReadWrite)?;
    let stop = AtomicBool::new(false);
    let storm = |number: u64| -> Result<u64> {
        let mut uses = 0;
        while !stop.load(Ordering::Relaxed) {
            let value = number << 32 | uses;
            for result in [
                range.store(8 * number as usize, value),
                library.dma.write_obj(other + 256, value),
                range.read_obj::<[u64; 8]>(0).map(drop),
            ] {
                if let Err(error) = result {
                    equal("errno", error.errno().number(), libc::EFAULT)?;
                }
            }
            uses += 1;
        }
        Ok(uses)
    };
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (1..=3)
            .map(|number| scope.spawn(move || storm(number)))
            .collect();
        let mut judged = Ok(());
        for _ in 0..30 {
            judged = (|| {
                client.dma_unmap(other, PAGE as u64)?;
                let left = memory.read_bytes(0, 512);
                let next = Mapping::anonymous(PAGE)?;
                client.dma_map(&next, other, DMA_BOTH)?;
                // A thread has come round to the new memory: it is reached, and the old one is not.
                let deadline = Instant::now() + std::time::Duration::from_secs(20);
                while next.read::<u64>(8) == 0 {
                    ensure!(Instant::now() < deadline, "the new memory is not reached");
                    thread::yield_now();
                }
                ensure!(
                    memory.read_bytes(0, 512) == left,
                    "unmapped memory was written"
                );
                memory = next;
                Ok(())
            })();
            if judged.is_err() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            let uses = thread.join().map_err(|_| anyhow!("a thread panicked"))??;
            ensure!(uses > 0, "a thread did nothing");
        }
        judged
    })?;
    library.end()
}

/// A thread that may make no ioctl any more uses what is held as before.
fn use_of_what_is_held_makes_no_ioctl(road: Road) -> Result<()> {
    let library = Library::start(road, 4)?;
    let range = library.dma.map(BASE, PAGE, DmaAccess::ReadWrite)?;
    range.write_obj(0, 0_u64)?;
    let node = Node::open(&library.mdev)?;
    let pins = node.pinned()?;
    std::thread::scope(|scope| {
        let user = scope.spawn(|| -> Result<()> {
            sys::forbid_ioctls()?;
            fails("an ioctl", node.pinned(), libc::EPERM)?;
            for round in 0..100_u64 {
                range.store(8, round)?;
                equal("load", range.load::<u64>(8)?, round)?;
                library.dma.write_obj(BASE + 16, [round, !round])?;
                let copy = library.dma.read_obj::<[u64; 2]>(BASE + 16)?;
                equal("copy", copy, [round, !round])?;
            }
            Ok(())
        });
        user.join().map_err(|_| anyhow!("the thread panicked"))?
    })?;
    equal("pinned", library.pinned()?, pins)?;
    library.end()
}
