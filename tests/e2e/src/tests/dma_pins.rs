// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is pinned: how much, for how long, on whose account, and that all of it is given back.

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::Mdev;
use muser_e2e::node::{Node, Server};
use muser_e2e::process::Process;
use muser_e2e::rig::{Bare, DmaRig, Guest, BASE};
use muser_e2e::sys::{Mapping, PAGE};
use muser_e2e::time;
use muser_e2e::vfio::{Road, DMA_BOTH};
use muser_uapi::*;

use super::topic;

topic!("dma_pins", dma: [
    acquire_counts_each_page_once,
    unaligned_range_pins_the_pages_it_touches,
    release_unpins_what_is_there,
    partly_mapped_range_says_how_far_it_came,
    max_pinned_bounds_acquires_and_copies,
    max_pinned_counts_what_is_pinned_already,
    locked_memory_limit_of_the_client_holds,
    generation_grows_when_pages_go,
    everything_comes_back_after_release,
    everything_comes_back_after_unmap,
    everything_comes_back_after_unmap_all,
    everything_comes_back_after_the_client_closed,
    everything_comes_back_after_the_client_was_killed,
    everything_comes_back_after_remove,
    next_client_starts_with_nothing_pinned,
]);

const BOTH: u32 = MUSER_DMA_READ | MUSER_DMA_WRITE;

/// Expects the counters to agree, and so many pages to be pinned.
fn pinned(node: &Node, pages: u64) -> Result<()> {
    let query = works("MUSER_QUERY", node.query())?;
    equal("pages pinned", query.pinned_pages, pages)?;
    let muser_counters { pins, unpins, .. } = query.counters;
    ensure!(
        pins.checked_sub(unpins) == Some(pages),
        "{pins} pins and {unpins} unpins, with {pages} pages pinned"
    );
    Ok(())
}

fn acquire_counts_each_page_once(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    pinned(rig.node(), 0)?;
    works(
        "acquiring",
        rig.node().dma_acquire(BASE + 4096, 4 * 4096, BOTH),
    )?;
    pinned(rig.node(), 4)?;
    works(
        "the same",
        rig.node().dma_acquire(BASE + 4096, 4 * 4096, BOTH),
    )?;
    pinned(rig.node(), 4)?;
    works("overlapping", rig.node().dma_acquire(BASE, 8 * 4096, BOTH))?;
    pinned(rig.node(), 8)?;
    works(
        "reading",
        rig.node().dma_acquire(BASE, 9 * 4096, MUSER_DMA_READ),
    )?;
    pinned(rig.node(), 9)?;
    works(
        "writing",
        rig.node().dma_acquire(BASE, 9 * 4096, MUSER_DMA_WRITE),
    )?;
    pinned(rig.node(), 9)?;
    works("all", rig.node().dma_acquire(BASE, 16 * 4096, BOTH))?;
    pinned(rig.node(), 16)?;
    rig.guest.is_untouched()
}

fn unaligned_range_pins_the_pages_it_touches(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    let mut expected = 0;
    for (iova, length, pages) in [
        (1, 1, 1),
        (2 * 4096 - 1, 1, 1),
        (3 * 4096 - 1, 2, 2),
        (4 * 4096 + 5, 4096, 2),
        (6 * 4096 + 4095, 4098, 3),
        (15 * 4096, 4096, 1),
    ] {
        let acquired = rig.node().dma_acquire(BASE + iova, length, BOTH);
        works(&format!("{length} bytes at {iova:#x}"), acquired)?;
        expected += pages;
        pinned(rig.node(), expected)?;
    }
    Ok(())
}

fn release_unpins_what_is_there(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    let release = |iova, length| works("releasing", rig.node().dma_release(BASE + iova, length));
    equal("of nothing", release(0, 16 * 4096)?, 0)?;
    works("acquiring", rig.node().dma_acquire(BASE, 4 * 4096, BOTH))?;
    works(
        "acquiring",
        rig.node().dma_acquire(BASE + 8 * 4096, 4 * 4096, BOTH),
    )?;
    equal("the middle of the first", release(4096, 4096)?, 4096)?;
    pinned(rig.node(), 7)?;
    equal("the same again", release(4096, 4096)?, 0)?;
    equal("across a hole", release(3 * 4096, 6 * 4096)?, 2 * 4096)?;
    pinned(rig.node(), 5)?;
    let all = works("releasing", rig.node().dma_release(0, u64::MAX))?;
    equal("all", all, 5 * 4096)?;
    pinned(rig.node(), 0)?;
    works("acquiring again", rig.node().dma_acquire(BASE, 4096, BOTH))?;
    pinned(rig.node(), 1)
}

fn partly_mapped_range_says_how_far_it_came(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let beyond = Mapping::anonymous(2 * PAGE)?;
    let iova = BASE + 6 * 4096;
    works("mapping", rig.guest.client.dma_map(&beyond, iova, DMA_BOTH))?;
    let acquire = |iova, length| rig.node().pinning(MUSER_DMA_ACQUIRE, iova, length, BOTH);
    let over = acquire(BASE + 4096, 7 * 4096);
    fails("over the hole", over.result, libc::EFAULT)?;
    equal("bytes before the hole", over.done, 3 * 4096)?;
    pinned(rig.node(), 3)?;
    let unaligned = acquire(BASE + 100, 7 * 4096);
    fails("from the middle of a page", unaligned.result, libc::EFAULT)?;
    equal("bytes before the hole", unaligned.done, 4 * 4096 - 100)?;
    pinned(rig.node(), 4)?;
    let hole = acquire(BASE + 5 * 4096, 2 * 4096);
    fails("from within the hole", hole.result, libc::EFAULT)?;
    equal("bytes", hole.done, 0)?;
    pinned(rig.node(), 4)
}

fn max_pinned_bounds_acquires_and_copies(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    equal(
        "max_pinned",
        rig.mdev.attribute("max_pinned")?,
        "1073741824".to_owned(),
    )?;
    works("max_pinned", rig.mdev.set_attribute("max_pinned", "32768"))?;
    let over = rig.node().pinning(MUSER_DMA_ACQUIRE, BASE, 12 * 4096, BOTH);
    fails("12 pages of 8", over.result, libc::EDQUOT)?;
    equal("bytes acquired", over.done, 8 * 4096)?;
    pinned(rig.node(), 8)?;
    works("those again", rig.node().dma_acquire(BASE, 8 * 4096, BOTH))?;
    let mut buffer = vec![0; 4 * PAGE];
    let segment = muser_e2e::sys::Segment::buffer(BASE + 6 * 4096, &mut buffer);
    let (done, result) = rig.node().dma_copy(0, &[segment]);
    fails("a copy of two more", result, libc::EDQUOT)?;
    equal("bytes copied", done, 2 * 4096)?;
    pinned(rig.node(), 8)?;
    equal(
        "released",
        works("releasing", rig.node().dma_release(BASE, 4096))?,
        4096,
    )?;
    works(
        "one of the others",
        rig.node().dma_acquire(BASE + 9 * 4096, 1, BOTH),
    )?;
    let full = rig.node().dma_acquire(BASE, 1, BOTH);
    fails("one too many", full, libc::EDQUOT)?;
    works(
        "max_pinned",
        rig.mdev.set_attribute("max_pinned", "1048576"),
    )?;
    works("all", rig.node().dma_acquire(BASE, 16 * 4096, BOTH))?;
    pinned(rig.node(), 16)
}

fn max_pinned_counts_what_is_pinned_already(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 8)?;
    works("acquiring", rig.node().dma_acquire(BASE, 4 * 4096, BOTH))?;
    works("max_pinned", rig.mdev.set_attribute("max_pinned", "0"))?;
    pinned(rig.node(), 4)?;
    works(
        "what is pinned",
        rig.node().dma_read(BASE, &mut [0; 4 * PAGE]),
    )?;
    let more = rig.node().dma_acquire(BASE + 4 * 4096, 1, BOTH);
    fails("more", more, libc::EDQUOT)?;
    for wrong in ["-1", "x", "", "99999999999999999999999"] {
        let refused = rig.mdev.set_attribute("max_pinned", wrong);
        ensure!(refused.is_err(), "max_pinned took {wrong:?}");
    }
    pinned(rig.node(), 4)
}

fn guest_process(mdev: &Mdev, road: Road, pages: u64, limit: u64) -> Result<Process> {
    let (pages, limit) = (pages.to_string(), limit.to_string());
    let process = Process::helper(&["guest", road.name(), mdev.uuid(), &pages, &limit])?;
    process.expect("mapped")?;
    Ok(process)
}

fn locked_memory_limit_of_the_client_holds(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let node = server.node();
    let mut client = guest_process(&mdev, road, 16, 8 * 4096)?;
    works("within the limit", node.dma_acquire(BASE, 4 * 4096, BOTH))?;
    let over = node.pinning(MUSER_DMA_ACQUIRE, BASE, 16 * 4096, BOTH);
    fails("beyond what the client may lock", over.result, libc::ENOMEM)?;
    ensure!(
        over.done <= 8 * 4096,
        "{:#x} bytes were acquired",
        over.done
    );
    pinned(node, over.done.max(4 * 4096) / 4096)?;
    let read = node.dma_read(BASE + 15 * 4096, &mut [0; 8]);
    if over.done == 8 * 4096 {
        fails("a copy beyond it", read, libc::ENOMEM)?;
    }
    works("releasing", node.dma_release(0, u64::MAX))?;
    pinned(node, 0)?;
    works(
        "as much again",
        node.dma_acquire(BASE + 8 * 4096, 4 * 4096, BOTH),
    )?;
    client.kill()?;
    time::until("the pins going with the client", || {
        node.pinned().is_ok_and(|pages| pages == 0)
    })
}

fn generation_grows_when_pages_go(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 8)?;
    let status = rig.server.status()?;
    let now = || Server::generation(&status);
    let first = works("acquiring", rig.node().dma_acquire(BASE, 4 * 4096, BOTH))?;
    equal("the status page", now(), first)?;
    let more = works("more", rig.node().dma_acquire(BASE, 8 * 4096, BOTH))?;
    equal("after another acquire", (more, now()), (first, first))?;
    works("releasing", rig.node().dma_release(BASE + 4096, 4096))?;
    let released = now();
    ensure!(released > first, "a release left the generation {first}");
    works(
        "releasing nothing",
        rig.node().dma_release(BASE + 4096, 4096),
    )?;
    equal("after a release of nothing", now(), released)?;
    works("unmapping", rig.guest.client.dma_unmap_all())?;
    let unmapped = now();
    ensure!(
        unmapped > released,
        "an unmap left the generation {released}"
    );
    let other = Mapping::anonymous(2 * PAGE)?;
    works("mapping", rig.guest.client.dma_map(&other, BASE, DMA_BOTH))?;
    equal("after a map", now(), unmapped)?;
    works("unmapping", rig.guest.client.dma_unmap_all())?;
    equal("after an unmap of what nobody acquired", now(), unmapped)?;
    works("mapping", rig.guest.client.dma_map(&other, BASE, DMA_BOTH))?;
    let last = works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    equal("the acquire's", last, unmapped)?;
    let DmaRig { guest, service, .. } = rig;
    drop(guest);
    service.record().wait(1)?;
    ensure!(now() > last, "a close left the generation {last}");
    Ok(())
}

/// Kilobytes that VFIO has on the process's account: type1's in `VmLck`, iommufd's in `VmPin`.
fn on_account(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut sum = 0;
    for name in ["VmLck:", "VmPin:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        sum += number
            .context("the process's status has no such line")?
            .parse::<u64>()?;
    }
    Ok(sum)
}

/// Acquires 64 pages of a client that is another process, lets `end` take them away, and expects
/// every one of them to be back, by muser's count and by VFIO's.
fn comes_back(
    road: Road,
    end: impl FnOnce(&Server, &mut Process, &Mdev) -> Result<Alive>,
) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    works(
        "the time for an unmap",
        mdev.set_attribute("unmap_timeout_ms", "100"),
    )?;
    let mut client = guest_process(&mdev, road, 64, 64 << 20)?;
    let before = on_account(client.id())?;
    works(
        "acquiring",
        server.node().dma_acquire(BASE, 64 * 4096, BOTH),
    )?;
    pinned(server.node(), 64)?;
    ensure!(
        on_account(client.id())? >= before + 256,
        "VFIO accounts {} kB, {before} before",
        on_account(client.id())?
    );
    let window = server.node().window(BASE, 64 * PAGE)?;
    window.write(63 * PAGE, 1u64);
    let alive = end(&server, &mut client, &mdev)?;
    if alive.device {
        time::until("every pin coming back", || {
            server.node().pinned().is_ok_and(|pages| pages == 0)
        })?;
        pinned(server.node(), 0)?;
    }
    if alive.client {
        equal(
            "kilobytes on VFIO's account",
            on_account(client.id())?,
            before,
        )?;
    }
    equal("the window", window.read::<u64>(0), 0)
}

/// What is left after an end.
struct Alive {
    client: bool,
    device: bool,
}

fn everything_comes_back_after_release(road: Road) -> Result<()> {
    comes_back(road, |server, _, _| {
        let released = works("releasing", server.node().dma_release(BASE, 64 * 4096))?;
        equal("bytes", released, 64 * 4096)?;
        Ok(Alive {
            client: true,
            device: true,
        })
    })
}

fn everything_comes_back_after_unmap(road: Road) -> Result<()> {
    comes_back(road, |_, client, _| {
        client.tell("unmap")?;
        client.expect("unmapped")?;
        Ok(Alive {
            client: true,
            device: true,
        })
    })
}

fn everything_comes_back_after_unmap_all(road: Road) -> Result<()> {
    comes_back(road, |_, client, _| {
        client.tell("unmap all")?;
        client.expect("unmapped")?;
        Ok(Alive {
            client: true,
            device: true,
        })
    })
}

fn everything_comes_back_after_the_client_closed(road: Road) -> Result<()> {
    comes_back(road, |_, client, _| {
        client.close_input();
        client.wait()?;
        Ok(Alive {
            client: false,
            device: true,
        })
    })
}

fn everything_comes_back_after_the_client_was_killed(road: Road) -> Result<()> {
    comes_back(road, |_, client, _| {
        client.kill()?;
        Ok(Alive {
            client: false,
            device: true,
        })
    })
}

fn everything_comes_back_after_remove(road: Road) -> Result<()> {
    comes_back(road, |_, client, mdev| {
        let write = format!("echo 1 >{}/remove", mdev.directory().display());
        let mut removal = Process::start(std::process::Command::new("sh").args(["-c", &write]))?;
        // It waits for the client, which goes by its own death.
        removal.wait_for_sleep()?;
        client.kill()?;
        removal.wait()?;
        mdev.wait_gone()?;
        Ok(Alive {
            client: false,
            device: false,
        })
    })
}

fn next_client_starts_with_nothing_pinned(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let window = server.node().window(BASE, PAGE)?;
    for round in 1..=3 {
        let guest = Guest::open(&mdev, road, 4)?;
        pinned(server.node(), 0)?;
        equal("the window before", window.read::<u64>(8), 0)?;
        works("acquiring", server.node().dma_acquire(BASE, 4 * 4096, BOTH))?;
        pinned(server.node(), 4)?;
        equal("pins", server.node().query()?.counters.pins, round * 4)?;
        window.write(8, round);
        equal("the client's word", guest.memory.read::<u64>(8), round)?;
        drop(guest);
        pinned(server.node(), 0)?;
        equal("the window after", window.read::<u64>(8), 0)?;
        let reset = works("the close", server.take())?;
        equal("kind", reset.head.kind, MUSER_REQUEST_RESET)?;
        works("reply", server.reply(reset.slot, 0))?;
    }
    Ok(())
}
