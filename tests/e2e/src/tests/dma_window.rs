// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The window: the client's memory in the process's address space, where it is acquired.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, fails_as, works};
use muser_e2e::helper::PINNED;
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, Server};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::{pattern, Bare, DmaRig, Guest, BASE};
use muser_e2e::sys::{child_has, huge_pages_lacking, Mapping, Memory, HUGE_PAGE, PAGE};
use muser_e2e::vfio::{Road, DMA_BOTH, DMA_READ};
use muser_uapi::*;

use super::topic;
use crate::runner::Test;

topic!("dma_window", dma: [
    shows_anonymous_memory,
    shows_shared_memory,
    shows_memfd,
    shows_private_file_mapping,
    stores_are_seen_without_system_calls,
    page_not_acquired_reads_zeroes_and_loses_writes,
    acquire_replaces_what_stood_in,
    release_takes_the_page_away,
    read_only_mapping_is_shown_and_never_written,
    page_acquired_for_reading_is_never_written,
    child_does_not_inherit_it,
    two_devices_have_two_windows,
    bounds_and_private_mappings,
    outlives_the_attachment_without_a_page,
    pins_of_a_killed_process_are_the_next_ones,
    pins_survive_detach_and_window_of_the_old_file_is_dead,
]);

/// The tests that need huge pages.
pub(super) fn huge() -> Vec<Test> {
    let tests = super::dma_roads("dma_window::shows_huge_pages", shows_huge_pages);
    tests.map(|test| test.needs(huge_pages_lacking)).collect()
}

const BOTH: u32 = MUSER_DMA_READ | MUSER_DMA_WRITE;

fn shows_anonymous_memory(road: Road) -> Result<()> {
    shows(road, Memory::Anonymous, 8)
}

fn shows_shared_memory(road: Road) -> Result<()> {
    shows(road, Memory::Shared, 8)
}

fn shows_memfd(road: Road) -> Result<()> {
    shows(road, Memory::Memfd, 8)
}

fn shows_private_file_mapping(road: Road) -> Result<()> {
    shows(road, Memory::File, 8)
}

fn shows_huge_pages(road: Road) -> Result<()> {
    shows(road, Memory::Huge, HUGE_PAGE / PAGE + 1)
}

/// Expects the whole to be seen by the window, then by the client what is stored there.
fn shows(road: Road, kind: Memory, pages: usize) -> Result<()> {
    let rig = DmaRig::with(road, kind, pages)?;
    let memory = &rig.guest.memory;
    works(
        "acquiring",
        rig.node().dma_acquire(BASE, rig.guest.len(), BOTH),
    )?;
    equal("pages pinned", rig.node().pinned()?, rig.guest.len() / 4096)?;
    let window = works("the window", rig.node().window(BASE, memory.len()))?;
    if let Some((offset, found)) = window.differs(pattern(Guest::SEED)) {
        anyhow::bail!("the window shows {found:#x} at {offset:#x}");
    }
    window.fill(pattern(8));
    if let Some((offset, found)) = memory.differs(pattern(8)) {
        anyhow::bail!("the client has {found:#x} at {offset:#x}");
    }
    Ok(())
}

fn stores_are_seen_without_system_calls(road: Road) -> Result<()> {
    const ROUNDS: u32 = 20_000;
    let rig = DmaRig::new(road, 2)?;
    works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    let window = rig.node().window(BASE, 2 * PAGE)?;
    let memory = &rig.guest.memory;
    memory.write(64, 0u32);
    memory.write(PAGE + 64, 0u32);
    let pins = rig.node().query()?.counters.pins;
    // Each side owns a word on another page, and sees the other's grow to its end.
    process::scope(|scope| {
        let sides =
            [(memory, 64, PAGE + 64), (&window, PAGE + 64, 64)].map(|(memory, own, other)| {
                scope.spawn(move || {
                    let mut last = 0;
                    for round in 1..=ROUNDS {
                        memory.write(own, round);
                        let seen: u32 = memory.read(other);
                        assert!(seen >= last, "the other's word fell from {last} to {seen}");
                        last = seen;
                    }
                })
            });
        for side in sides {
            side.join()
                .map_err(|_| anyhow::anyhow!("a side panicked"))?;
        }
        Ok(())
    })?;
    let ends = (window.read::<u32>(64), memory.read::<u32>(PAGE + 64));
    equal("the words", ends, (ROUNDS, ROUNDS))?;
    equal("pins", rig.node().query()?.counters.pins, pins)
}

fn page_not_acquired_reads_zeroes_and_loses_writes(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    works("acquiring", rig.node().dma_acquire(BASE + 4096, 4096, BOTH))?;
    let window = rig.node().window(BASE - 4096, 6 * PAGE)?;
    // By pages of the window: nothing mapped, not acquired, acquired, not acquired twice, nothing.
    for page in [0, 1, 3, 4, 5] {
        equal(
            "a word not acquired",
            window.read::<u64>(page * PAGE + 8),
            0,
        )?;
    }
    equal(
        "a word acquired",
        window.read::<u64>(2 * PAGE + 8),
        pattern(Guest::SEED)(PAGE + 8),
    )?;
    for page in [0, 1, 3, 4, 5] {
        window.write(page * PAGE + 8, u64::MAX);
    }
    rig.guest.is_untouched()?;
    // A window made with write access alone, and touched by a write first, loses it as well.
    let flags = (libc::PROT_WRITE, libc::MAP_SHARED);
    let position = MUSER_MMAP_WINDOW + BASE + 3 * 4096;
    let writes = Mapping::new(rig.node(), position, PAGE, flags.0, flags.1)?;
    writes.write(0, u64::MAX);
    rig.guest.is_untouched()?;
    equal("pages pinned", rig.node().pinned()?, 1)
}

fn acquire_replaces_what_stood_in(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let window = rig.node().window(BASE, 2 * PAGE)?;
    for page in 0..2 {
        equal("before", window.read::<u64>(page * PAGE), 0)?;
        window.write(page * PAGE + 16, 1u64);
    }
    works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    if let Some((offset, found)) = window.differs(pattern(Guest::SEED)) {
        anyhow::bail!("the window shows {found:#x} at {offset:#x}");
    }
    window.write(16, 2u64);
    equal("the client's word", rig.guest.memory.read::<u64>(16), 2)
}

fn release_takes_the_page_away(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 3)?;
    works("acquiring", rig.node().dma_acquire(BASE, 3 * 4096, BOTH))?;
    let window = rig.node().window(BASE, 3 * PAGE)?;
    let word = pattern(Guest::SEED);
    equal("acquired", window.read::<u64>(PAGE), word(PAGE))?;
    let released = works("releasing", rig.node().dma_release(BASE + 4096, 4096))?;
    equal("bytes released", released, 4096)?;
    window.write(PAGE, u64::MAX);
    rig.guest.is_untouched()?;
    let sides = (window.read::<u64>(0), window.read::<u64>(2 * PAGE));
    equal("its neighbours", sides, (word(0), word(2 * PAGE)))
}

fn read_only_mapping_is_shown_and_never_written(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 1)?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    memory.fill(pattern(5));
    let iova = BASE + (1 << 24);
    works("mapping", rig.guest.client.dma_map(&memory, iova, DMA_READ))?;
    let acquired = rig.node().dma_acquire(iova, 8192, MUSER_DMA_READ);
    works("acquiring", acquired)?;
    let window = rig.node().window(iova, 2 * PAGE)?;
    if let Some((offset, found)) = window.differs(pattern(5)) {
        anyhow::bail!("the window shows {found:#x} at {offset:#x}");
    }
    // One page was read before, by another mapping of the window none was.
    window.write(8, u64::MAX);
    let other = rig.node().window(iova, 2 * PAGE)?;
    other.write(PAGE + 8, u64::MAX);
    ensure!(memory.differs(pattern(5)).is_none(), "the memory changed");
    Ok(())
}

/// Who acquired for reading may not write behind the back of the dirty log.
fn page_acquired_for_reading_is_never_written(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let acquired = rig.node().dma_acquire(BASE, 8192, MUSER_DMA_READ);
    works("acquiring for reading", acquired)?;
    let window = rig.node().window(BASE, 2 * PAGE)?;
    equal("read", window.read::<u64>(8), pattern(Guest::SEED)(8))?;
    // Whether such a write is lost or arrives, it does not end this process; and what was acquired
    // for writing afterwards is written.
    window.write(8, 7u64);
    works(
        "acquiring for writing",
        rig.node().dma_acquire(BASE, 8192, BOTH),
    )?;
    window.write(16, 8u64);
    window.write(PAGE + 16, 9u64);
    let memory = &rig.guest.memory;
    let words = (memory.read::<u64>(16), memory.read::<u64>(PAGE + 16));
    equal("written after that", words, (8, 9))
}

fn child_does_not_inherit_it(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 1)?;
    works("acquiring", rig.node().dma_acquire(BASE, 4096, BOTH))?;
    let window = rig.node().window(BASE, PAGE)?;
    equal("read", window.read::<u64>(0), pattern(Guest::SEED)(0))?;
    equal(
        "the child has the client's own memory",
        child_has(&rig.guest.memory)?,
        true,
    )?;
    equal("the child has the window", child_has(&window)?, false)?;
    equal(
        "read after the fork",
        window.read::<u64>(0),
        pattern(Guest::SEED)(0),
    )
}

fn two_devices_have_two_windows(road: Road) -> Result<()> {
    let first = DmaRig::new(road, 2)?;
    let second = DmaRig::new(road, 2)?;
    second.guest.memory.fill(pattern(6));
    works("acquiring", first.node().dma_acquire(BASE, 8192, BOTH))?;
    let (one, two) = (
        first.node().window(BASE, 2 * PAGE)?,
        second.node().window(BASE, 2 * PAGE)?,
    );
    equal("the other one's", two.read::<u64>(8), 0)?;
    two.write(8, u64::MAX);
    first.guest.is_untouched()?;
    works("acquiring", second.node().dma_acquire(BASE, 8192, BOTH))?;
    equal("the first", one.read::<u64>(8), pattern(Guest::SEED)(8))?;
    equal("the second", two.read::<u64>(8), pattern(6)(8))?;
    drop(first);
    equal("the second alone", two.read::<u64>(PAGE), pattern(6)(PAGE))?;
    equal("the first without its client", one.read::<u64>(8), 0)
}

fn bounds_and_private_mappings(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    let last = (1 << 62) - 4096;
    let window = works("the last page", rig.node().window(last, PAGE))?;
    equal("the last page", window.read::<u64>(0), 0)?;
    let refused = [libc::EINVAL, libc::EOVERFLOW];
    fails_as("over the end", rig.node().window(last, 2 * PAGE), &refused)?;
    fails_as("behind the end", rig.node().window(1 << 62, PAGE), &refused)?;
    let position = MUSER_MMAP_WINDOW - 4096;
    let before = Mapping::shared(rig.node(), position, 2 * PAGE);
    fails_as("from before the start", before, &refused)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let position = MUSER_MMAP_WINDOW + BASE;
    match Mapping::new(rig.node(), position, PAGE, protection, libc::MAP_PRIVATE) {
        Err(error) => fails_as("a private mapping", Err::<(), _>(error), &refused)?,
        Ok(private) => {
            private.write(8, u64::MAX);
            rig.guest.is_untouched()?;
        }
    }
    // Far apart, both are the same device's.
    let (near, far) = (
        rig.node().window(BASE, PAGE)?,
        rig.node().window(BASE + (1 << 40), PAGE)?,
    );
    let words = (near.read::<u64>(8), far.read::<u64>(8));
    equal("near and far", words, (pattern(Guest::SEED)(8), 0))
}

fn outlives_the_attachment_without_a_page(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let unattached = works("opening the node", Node::open(&mdev))?;
    let refused = unattached.window(BASE, PAGE);
    fails_as(
        "a window without an attachment",
        refused,
        &[libc::ENOTCONN, libc::EINVAL],
    )?;
    let guest = Guest::open(&mdev, road, 2)?;
    works("acquiring", server.node().dma_acquire(BASE, 8192, BOTH))?;
    let window = server.node().window(BASE, 2 * PAGE)?;
    equal("read", window.read::<u64>(8), pattern(Guest::SEED)(8))?;
    drop(guest);
    equal("with no client", window.read::<u64>(8), 0)?;
    window.write(8, 1u64);
    drop(server);
    works("remove", mdev.remove())?;
    mdev.wait_gone()?;
    let _: u64 = window.read(PAGE + 8);
    window.write(PAGE + 8, 1u64);
    Ok(())
}

fn pins_of_a_killed_process_are_the_next_ones(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    drop(Server::attach(&mdev, &Description::pci())?);
    let guest = Guest::open(&mdev, road, 8)?;
    let mut process = Process::helper(&["pin", mdev.uuid(), &(BASE + 4096).to_string(), "5"])?;
    process.expect("ready")?;
    equal("the client's word", guest.memory.read::<u64>(PAGE), PINNED)?;
    process.kill()?;
    let node = Node::open(&mdev)?;
    equal("pages pinned with no process", node.pinned()?, 5)?;
    guest.memory.write(PAGE + 8, 0xABCD_u64);
    let attach = node.attach_raw(&Description::pci())?;
    let expected = MUSER_RECOVERED_SERVED | MUSER_RECOVERED_CLIENT | MUSER_RECOVERED_PINS;
    equal("what is recovered", attach.recovered, expected)?;
    // Nothing is acquired here: what the dead process had, this one has.
    let window = node.window(BASE, 8 * PAGE)?;
    let words = (window.read::<u64>(PAGE), window.read::<u64>(PAGE + 8));
    equal("the window", words, (PINNED, 0xABCD))?;
    window.write(5 * PAGE + 8, 0xDCBA_u64);
    equal(
        "the client's word",
        guest.memory.read::<u64>(5 * PAGE + 8),
        0xDCBA,
    )?;
    let beside = (window.read::<u64>(0), window.read::<u64>(6 * PAGE));
    equal("pages that were not acquired", beside, (0, 0))?;
    equal("pins", node.query()?.counters.pins, 5)?;
    works(
        "acquiring again",
        node.dma_acquire(BASE + 4096, 5 * 4096, BOTH),
    )?;
    equal("pins after that", node.query()?.counters.pins, 5)?;
    let released = works("releasing", node.dma_release(0, u64::MAX))?;
    equal("bytes released", released, 5 * 4096)?;
    equal("pages pinned", node.pinned()?, 0)
}

fn pins_survive_detach_and_window_of_the_old_file_is_dead(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let guest = Guest::open(&mdev, road, 2)?;
    works("acquiring", server.node().dma_acquire(BASE, 8192, BOTH))?;
    let old = server.node().window(BASE, 2 * PAGE)?;
    equal("read", old.read::<u64>(8), pattern(Guest::SEED)(8))?;
    works(
        "detaching",
        muser_e2e::sys::ioctl_value(server.node(), MUSER_DETACH, 0),
    )?;
    let ended = server.node().dma_acquire(BASE, 4096, BOTH);
    fails("acquiring when detached", ended, libc::ENOTCONN)?;
    let ended = server.node().dma_read(BASE, &mut [0; 8]);
    fails("copying when detached", ended, libc::ENOTCONN)?;
    let node = Node::open(&mdev)?;
    let attach = node.attach_raw(&Description::pci())?;
    equal(
        "pins are recovered",
        attach.recovered & MUSER_RECOVERED_PINS,
        MUSER_RECOVERED_PINS,
    )?;
    let new = node.window(BASE, 2 * PAGE)?;
    equal(
        "read by the next",
        new.read::<u64>(8),
        pattern(Guest::SEED)(8),
    )?;
    // Whatever the old file's window shows, it is the client's memory or nothing.
    let shown = old.read::<u64>(PAGE + 8);
    ensure!(
        shown == 0 || shown == pattern(Guest::SEED)(PAGE + 8),
        "the old window shows {shown:#x}"
    );
    let other = Mapping::anonymous(2 * PAGE)?;
    other.fill(pattern(9));
    // Nobody answers the request, so it is forced.
    works(
        "the time for an unmap",
        mdev.set_attribute("unmap_timeout_ms", "50"),
    )?;
    works("unmapping", guest.client.dma_unmap(BASE, 8192))?;
    works("mapping", guest.client.dma_map(&other, BASE, DMA_BOTH))?;
    equal("the old window", old.read::<u64>(8), 0)
}
