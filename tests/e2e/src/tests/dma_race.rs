// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Acquires, copies and touches of the window by several threads at once, while the client maps and
//! unmaps: nobody ever sees or changes memory that is no longer the device's.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::Description;
use muser_e2e::rig::{Bare, DmaRig, BASE};
use muser_e2e::sys::{Mapping, Segment, PAGE};
use muser_e2e::vfio::{Client, Road, DMA_BOTH};
use muser_e2e::{process, time};
use muser_uapi::*;

use super::topic;

const BOTH: u32 = MUSER_DMA_READ | MUSER_DMA_WRITE;
const PAGES: usize = 4;

topic!("dma_race", dma: [
    acquires_race_with_unmaps,
    silent_process_acquires_while_the_client_unmaps,
    devices_of_a_container_do_not_keep_an_unmap_going,
    acquires_race_with_closes,
    copies_race_with_unmaps,
    window_races_with_unmaps,
]);

/// How long a race is run. On the debug kernel a round takes longer, and less of it is chance.
fn length() -> Duration {
    Duration::from_millis(if time::slowness() > 1 { 3000 } else { 1500 })
}

/// What the client leaves in memory that it has unmapped. Nobody but itself may ever see it.
const POISON: u64 = 0xDEAD_DEAD_DEAD_DEAD;
/// What the process writes to memory of round 0. A round's words are `ROUND + round`.
const ROUND: u64 = 0xA000_0000_0000_0000;

/// type1 counts how often it asks for one unmap, for all devices of its container together, and takes
/// the kernel down at the eleventh time: when one device lets go, no other may take hold.
fn devices_of_a_container_do_not_keep_an_unmap_going(road: Road) -> Result<()> {
    if road == Road::Cdev {
        return Ok(()); // It has no container: IOMMUFD itself lets nobody pin what is being unmapped.
    }
    const DEVICES: usize = 13;
    let description = Description::pci();
    let devices = (0..DEVICES)
        .map(|_| Bare::with(&description))
        .collect::<Result<Vec<_>>>()?;
    let first = devices[0].client(road)?;
    let others = devices[1..]
        .iter()
        .map(|device| Client::open_beside(&device.mdev, &first))
        .collect::<std::io::Result<Vec<_>>>();
    let others = works("the other devices", others)?;
    let memory = Mapping::anonymous(PAGE)?;
    works("map", first.dma_map(&memory, BASE, DMA_BOTH))?;
    let acquired = devices[0].server.node().dma_acquire(BASE, 4096, BOTH);
    works("acquire", acquired)?;
    process::scope(|scope| -> Result<()> {
        // Each that is asked to let go has the next one take hold before it answers.
        for (at, device) in devices.iter().enumerate() {
            let next = &devices[(at + 1) % DEVICES];
            scope.spawn(move || {
                while let Ok((request, _)) = device.server.take_unmap() {
                    let _ = next.server.node().dma_acquire(BASE, 4096, BOTH);
                    if device.server.reply(request.slot, 0).is_err() {
                        break;
                    }
                }
            });
        }
        works("unmap", first.dma_unmap(BASE, 4096))?;
        for device in &devices {
            equal("pinned", device.server.node().pinned()?, 0)?;
            device.server.node().detach()?;
        }
        Ok(())
    })?;
    drop(others);
    Ok(())
}

/// An error of a range that is just not mapped.
fn unless_unmapped(what: &str, result: std::io::Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) => {
            fails(what, Err::<(), _>(error), libc::EFAULT)?;
            Ok(false)
        }
    }
}

/// Runs `rounds` of the client's in this thread, against threads that do each of `against` until
/// it is over.
fn race(
    against: &[(&(dyn Fn() -> Result<()> + Sync), usize)],
    client: impl FnOnce(Instant) -> Result<()>,
) -> Result<()> {
    let over = AtomicBool::new(false);
    process::scope(|scope| {
        let mut threads = Vec::new();
        for &(turn, count) in against {
            for _ in 0..count {
                let over = &over;
                threads.push(scope.spawn(move || -> Result<()> {
                    while !over.load(Ordering::Relaxed) {
                        turn()?;
                    }
                    Ok(())
                }));
            }
        }
        let result = client(Instant::now() + length());
        over.store(true, Ordering::Relaxed);
        result?;
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// Expects no pin to be left, by either count.
fn nothing_stays(rig: &DmaRig) -> Result<()> {
    let query = rig.node().query()?;
    equal("pages pinned", query.pinned_pages, 0)?;
    equal(
        "pins and unpins",
        query.counters.pins,
        query.counters.unpins,
    )
}

fn remap(rig: &DmaRig, all: bool) -> Result<()> {
    let client = &rig.guest.client;
    if all {
        works("unmapping all", client.dma_unmap_all())?;
    } else {
        works("unmapping", client.dma_unmap(BASE, rig.guest.len()))?;
    }
    works("mapping", client.dma_map(&rig.guest.memory, BASE, DMA_BOTH))
}

fn acquires_race_with_unmaps(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 64)?;
    let node = rig.node();
    let acquired = AtomicU64::new(0);
    let acquire = || {
        if unless_unmapped(
            "acquiring",
            node.dma_acquire(BASE, 64 * 4096, BOTH).map(drop),
        )? {
            acquired.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let part = || {
        unless_unmapped(
            "a part",
            node.dma_acquire(BASE + 5 * 4096, 9000, BOTH).map(drop),
        )?;
        works("releasing", node.dma_release(BASE + 4096, 8 * 4096)).map(drop)
    };
    race(&[(&acquire, 3), (&part, 1)], |end| {
        let mut rounds = 0;
        while Instant::now() < end {
            remap(&rig, rounds % 2 == 0)?;
            rounds += 1;
        }
        ensure!(rounds > 10, "{rounds} rounds were no race");
        Ok(())
    })?;
    ensure!(
        acquired.load(Ordering::Relaxed) > 0,
        "nothing was ever acquired"
    );
    works("unmapping", rig.guest.client.dma_unmap_all())?;
    nothing_stays(&rig)?;
    rig.guest.is_untouched()
}

/// A process that never lets go by itself and pins the one page again as soon as it is unpinned:
/// type1 asks ten times for it, and then takes the kernel down (`BUG_ON` in `vfio_dma_do_unmap`).
fn silent_process_acquires_while_the_client_unmaps(road: Road) -> Result<()> {
    let DmaRig {
        guest,
        service,
        server,
        mdev,
    } = DmaRig::new(road, 1)?;
    works(
        "unmap_timeout_ms",
        mdev.set_attribute("unmap_timeout_ms", "1"),
    )?;
    service.stop()?;
    let node = server.node();
    let acquire =
        || unless_unmapped("acquiring", node.dma_acquire(BASE, 4096, BOTH).map(drop)).map(drop);
    race(&[(&acquire, 4)], |end| {
        let mut rounds = 0;
        while Instant::now() < end {
            works("unmapping", guest.client.dma_unmap(BASE, guest.len()))?;
            works(
                "mapping",
                guest.client.dma_map(&guest.memory, BASE, DMA_BOTH),
            )?;
            rounds += 1;
        }
        ensure!(rounds > 20, "{rounds} rounds were no race");
        Ok(())
    })?;
    works("unmapping", guest.client.dma_unmap_all())?;
    let query = node.query()?;
    equal("pages pinned", query.pinned_pages, 0)?;
    equal(
        "pins and unpins",
        query.counters.pins,
        query.counters.unpins,
    )?;
    guest.is_untouched()?;
    // With a client there the device's removal would have to wait.
    drop(guest);
    Ok(())
}

fn acquires_race_with_closes(road: Road) -> Result<()> {
    let DmaRig {
        guest,
        service,
        server,
        mdev,
    } = DmaRig::new(road, 8)?;
    drop(guest);
    let node = server.node();
    let acquire = || {
        unless_unmapped(
            "acquiring",
            node.dma_acquire(BASE, 8 * 4096, BOTH).map(drop),
        )
        .map(drop)
    };
    let copy = || unless_unmapped("copying", node.dma_read(BASE + 7, &mut [0; 5000])).map(drop);
    race(&[(&acquire, 2), (&copy, 2)], |end| {
        let mut rounds = 0;
        while Instant::now() < end {
            let guest = muser_e2e::rig::Guest::open(&mdev, road, 8)?;
            works("acquiring", node.dma_acquire(BASE, 4096, BOTH))?;
            guest.is_untouched()?;
            rounds += 1;
        }
        ensure!(rounds > 3, "{rounds} rounds were no race");
        Ok(())
    })?;
    let query = node.query()?;
    equal("pages pinned", query.pinned_pages, 0)?;
    equal(
        "pins and unpins",
        query.counters.pins,
        query.counters.unpins,
    )?;
    drop(service);
    Ok(())
}

/// The client's memories, mapped one after the other at one IOVA.
struct Rounds<'a> {
    rig: &'a DmaRig,
    memories: Vec<Mapping>,
    /// The present round: raised before its memory is mapped.
    round: AtomicU64,
}

impl<'a> Rounds<'a> {
    fn new(rig: &'a DmaRig) -> Result<Self> {
        works("unmapping", rig.guest.client.dma_unmap_all())?;
        let memories: Vec<_> = (0..3)
            .map(|_| Mapping::anonymous(PAGES * PAGE))
            .collect::<std::io::Result<_>>()?;
        memories.iter().for_each(|memory| memory.fill(|_| POISON));
        Ok(Self {
            rig,
            memories,
            round: AtomicU64::new(0),
        })
    }

    /// One round of the client's: memory that becomes the device's and ceases to be.
    fn play(&self, meanwhile: impl Fn() -> Result<()>) -> Result<()> {
        let client = &self.rig.guest.client;
        let round = self.round.fetch_add(1, Ordering::SeqCst) + 1;
        let memory = &self.memories[round as usize % self.memories.len()];
        // It was unmapped rounds ago. A write that came since came too late.
        if let Some((offset, found)) = memory.differs(|_| POISON) {
            anyhow::bail!("round {round}: unmapped memory became {found:#x} at {offset:#x}");
        }
        memory.fill(|_| ROUND + round);
        works("mapping", client.dma_map(memory, BASE, DMA_BOTH))?;
        meanwhile()?;
        works("unmapping", client.dma_unmap(BASE, memory.len() as u64))?;
        // Before or after: every word is what the client or the process wrote in this very round.
        let odd = |word: u64| word != ROUND + round && word != WRITTEN;
        for offset in (0..memory.len()).step_by(8) {
            let word = memory.read::<u64>(offset);
            ensure!(!odd(word), "round {round}: {word:#x} at {offset:#x}");
        }
        memory.fill(|_| POISON);
        Ok(())
    }

    /// Expects a word that the process saw, which it read when `before` was the round, to be one
    /// that it may have seen.
    fn judge(&self, what: &str, word: u64, before: u64) -> Result<()> {
        let after = self.round.load(Ordering::SeqCst);
        // A copy may come between two bytes of another.
        let mixed = |round: u64| {
            let bytes = word.to_ne_bytes();
            let sources = (ROUND + round)
                .to_ne_bytes()
                .into_iter()
                .zip(WRITTEN.to_ne_bytes());
            bytes
                .iter()
                .zip(sources)
                .all(|(byte, (one, other))| *byte == one || *byte == other)
        };
        let known = (before..=after).any(mixed);
        ensure!(
            known,
            "{what} was {word:#x} in the rounds {before} to {after}"
        );
        Ok(())
    }

    fn now(&self) -> u64 {
        self.round.load(Ordering::SeqCst)
    }
}

/// What the process writes.
const WRITTEN: u64 = 0xB000_0000_0000_0000;

fn copies_race_with_unmaps(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 1)?;
    let rounds = Rounds::new(&rig)?;
    let node = rig.node();
    let good = AtomicU64::new(0);
    let read = || {
        let before = rounds.now();
        let mut bytes = vec![0; PAGES * PAGE];
        let (done, result) = node.dma_copy(0, &[Segment::buffer(BASE, &mut bytes)]);
        unless_unmapped("reading", result)?;
        for word in bytes[..done as usize].chunks_exact(8) {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            rounds.judge("a word read", u64::from_ne_bytes(value), before)?;
            good.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let write = || {
        let words = WRITTEN.to_ne_bytes().repeat(PAGE / 8 + 10);
        unless_unmapped("writing", node.dma_write(BASE + 4096 - 80, &words)).map(drop)
    };
    race(&[(&read, 2), (&write, 2)], |end| {
        while Instant::now() < end {
            // Now and then the memory stays until a copy has found it.
            let found = good.load(Ordering::Relaxed);
            let stay = rounds.now() % 4 == 0;
            let is_found = || !stay || good.load(Ordering::Relaxed) > found;
            rounds.play(|| time::until("a copy that finds memory", is_found))?;
        }
        ensure!(rounds.now() > 20, "{} rounds were no race", rounds.now());
        Ok(())
    })?;
    ensure!(
        good.load(Ordering::Relaxed) > 0,
        "no copy ever found memory"
    );
    nothing_stays(&rig)
}

/// Thousands of rounds, if there is time for them, on a window that is touched all the time.
fn window_races_with_unmaps(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 1)?;
    let rounds = Rounds::new(&rig)?;
    let node = rig.node();
    let windows = [
        works("a window", node.window(BASE, PAGES * PAGE))?,
        works("a window", node.window(BASE, PAGES * PAGE))?,
    ];
    let shown = AtomicU64::new(0);
    let touch = |window: &Mapping| {
        for page in 0..PAGES {
            for offset in [0, 2048, 4088] {
                let before = rounds.now();
                let word: u64 = window.read(page * PAGE + offset);
                // 0, where nothing is; what this process itself lost there, where it lost it.
                if word != 0 {
                    rounds.judge("a word of the window", word, before)?;
                    shown.fetch_add(1, Ordering::Relaxed);
                }
                window.write(page * PAGE + offset, WRITTEN);
            }
        }
        Ok(())
    };
    let first = || touch(&windows[0]);
    let second = || touch(&windows[1]);
    race(&[(&first, 1), (&second, 1)], |end| {
        let latest = end + time::patience() / 5;
        while Instant::now() < end || (rounds.now() < 3000 && Instant::now() < latest) {
            let length = (PAGES * PAGE) as u64;
            rounds.play(|| works("acquiring", node.dma_acquire(BASE, length, BOTH)).map(drop))?;
        }
        eprintln!(
            "{} rounds, {} words shown",
            rounds.now(),
            shown.load(Ordering::Relaxed)
        );
        ensure!(rounds.now() > 20, "{} rounds were no race", rounds.now());
        Ok(())
    })?;
    ensure!(
        shown.load(Ordering::Relaxed) > 0,
        "the window never showed anything"
    );
    nothing_stays(&rig)
}
