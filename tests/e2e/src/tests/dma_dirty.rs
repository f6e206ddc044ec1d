// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty logging: what the device writes to the client's memory, it tells who asks.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails_as, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Server};
use muser_e2e::process::Process;
use muser_e2e::rig::{DmaRig, BASE};
use muser_e2e::sys::{Mapping, Unanswered, PAGE};
use muser_e2e::time;
use muser_e2e::vfio::{logging_lacking, Client, Road, DMA_BOTH};
use muser_uapi::*;

use super::topic;
use crate::runner::Test;

topic!("dma_dirty", dma: [
    copies_to_the_client_are_reported_and_copies_from_it_are_not,
    stores_by_the_window_are_reported,
    page_written_by_the_window_before_the_log_is_reported_when_written_again,
    report_clears_and_the_next_write_is_reported_again,
    report_is_of_the_asked_range,
    page_that_was_unmapped_is_still_reported,
    nothing_is_reported_when_nothing_is_logged,
    log_ends_with_the_client,
    start_that_waits_for_an_acquire_can_be_killed,
]);

/// The tests of this topic, where they can be run.
pub(super) fn where_it_logs() -> Vec<Test> {
    let tests = tests().into_iter();
    tests.map(|test| test.needs(logging_lacking)).collect()
}

const BOTH: u32 = MUSER_DMA_READ | MUSER_DMA_WRITE;
const LEN: u64 = 16 * 4096;

/// A rig of 16 pages, whose log of them has begun.
fn logging(road: Road) -> Result<DmaRig> {
    let rig = DmaRig::new(road, 16)?;
    start(&rig)?;
    Ok(rig)
}

fn start(rig: &DmaRig) -> Result<()> {
    let size = works(
        "starting the log",
        rig.guest.client.log_start(&[(BASE, LEN)], 4096),
    )?;
    equal("bytes of a page", size, 4096)
}

/// Expects a report to have the pages of these numbers, and those only.
fn reports(rig: &DmaRig, what: &str, pages: &[u64]) -> Result<()> {
    let dirty = works("the report", rig.guest.client.log_report(BASE, LEN, 4096))?;
    let numbers: Vec<u64> = dirty
        .iovas
        .iter()
        .map(|iova| (iova - BASE) / 4096)
        .collect();
    equal(what, &numbers[..], pages)
}

fn copies_to_the_client_are_reported_and_copies_from_it_are_not(road: Road) -> Result<()> {
    let rig = logging(road)?;
    equal("the device can log", rig.guest.client.can_log(), true)?;
    reports(&rig, "at first", &[])?;
    works("reading", rig.node().dma_read(BASE, &mut [0; 8 * PAGE]))?;
    works(
        "acquiring",
        rig.node().dma_acquire(BASE + 8 * 4096, 4096, BOTH),
    )?;
    reports(&rig, "after reads and an acquire", &[])?;
    works("one byte", rig.node().dma_write(BASE + 5 * 4096 - 1, &[1]))?;
    works(
        "across pages",
        rig.node().dma_write(BASE + 7 * 4096 - 1, &[1; PAGE + 2]),
    )?;
    works("the last byte", rig.node().dma_write(BASE + LEN - 1, &[1]))?;
    reports(&rig, "after writes", &[4, 6, 7, 8, 15])?;
    works("stopping", rig.guest.client.log_stop())
}

fn stores_by_the_window_are_reported(road: Road) -> Result<()> {
    let rig = logging(road)?;
    works("acquiring", rig.node().dma_acquire(BASE, LEN, BOTH))?;
    let window = rig.node().window(BASE, LEN as usize)?;
    for page in 0..16 {
        let _: u64 = window.read(page * PAGE);
    }
    reports(&rig, "after loads", &[])?;
    window.write(3 * PAGE + 8, 1u64);
    window.write(9 * PAGE, 1u64);
    // Not touched by the first mapping before, and by this one with a store first.
    let other = rig.node().window(BASE, LEN as usize)?;
    other.write(12 * PAGE, 1u64);
    reports(&rig, "after stores", &[3, 9, 12])
}

fn page_written_by_the_window_before_the_log_is_reported_when_written_again(
    road: Road,
) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    works("acquiring", rig.node().dma_acquire(BASE, LEN, BOTH))?;
    let window = rig.node().window(BASE, LEN as usize)?;
    for page in 0..16 {
        window.write(page * PAGE, 1u64);
    }
    start(&rig)?;
    // Written before the log began: not its business. Whether they are told all the same is not
    // said; so the log is emptied.
    works("a report", rig.guest.client.log_report(BASE, LEN, 4096))?;
    window.write(2 * PAGE, 2u64);
    let _: u64 = window.read(5 * PAGE);
    window.write(14 * PAGE + 4088, 2u64);
    reports(&rig, "after stores", &[2, 14])?;
    equal(
        "the client's word",
        rig.guest.memory.read::<u64>(2 * PAGE),
        2,
    )
}

fn report_clears_and_the_next_write_is_reported_again(road: Road) -> Result<()> {
    let rig = logging(road)?;
    works("acquiring", rig.node().dma_acquire(BASE, LEN, BOTH))?;
    let window = rig.node().window(BASE, LEN as usize)?;
    for round in 0..10u64 {
        window.write(PAGE, round);
        works("writing", rig.node().dma_write(BASE + 3 * 4096, &[1; 8]))?;
        reports(&rig, "after a round", &[1, 3])?;
        reports(&rig, "after a report", &[])?;
    }
    works("stopping", rig.guest.client.log_stop())?;
    window.write(PAGE, 11u64);
    start(&rig)?;
    works("a report", rig.guest.client.log_report(BASE, LEN, 4096))?;
    window.write(PAGE, 12u64);
    reports(&rig, "in a second log", &[1])
}

fn report_is_of_the_asked_range(road: Road) -> Result<()> {
    let rig = logging(road)?;
    for page in [0, 7, 8, 15] {
        works("writing", rig.node().dma_write(BASE + page * 4096, &[1; 8]))?;
    }
    let client = &rig.guest.client;
    let part = works("a part", client.log_report(BASE + 4 * 4096, 4 * 4096, 4096))?;
    equal("the part's pages", part.iovas, vec![BASE + 7 * 4096])?;
    // The rest is still there.
    reports(&rig, "the whole", &[0, 8, 15])?;
    // By larger pages, a page is dirty when any part of it is.
    works("writing", rig.node().dma_write(BASE + 5 * 4096, &[1; 8]))?;
    let large = works("by 16 KiB", client.log_report(BASE, LEN, 16384))?;
    equal("pages of 16 KiB", large.iovas, vec![BASE + 4 * 4096])
}

/// Or a migration would lose what was written last.
fn page_that_was_unmapped_is_still_reported(road: Road) -> Result<()> {
    let rig = logging(road)?;
    works("acquiring", rig.node().dma_acquire(BASE, LEN, BOTH))?;
    let window = rig.node().window(BASE, LEN as usize)?;
    window.write(6 * PAGE, 1u64);
    works("writing", rig.node().dma_write(BASE + 10 * 4096, &[1; 8]))?;
    works("releasing", rig.node().dma_release(BASE + 6 * 4096, 4096))?;
    works("unmapping", rig.guest.client.dma_unmap(BASE, LEN))?;
    // A store that is lost dirties nothing.
    window.write(2 * PAGE, 1u64);
    reports(&rig, "after the unmap", &[6, 10])
}

fn nothing_is_reported_when_nothing_is_logged(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    let client = &rig.guest.client;
    let refused = [libc::EINVAL, libc::ENODATA, libc::ENOENT];
    let report = client.log_report(BASE, LEN, 4096);
    fails_as("a report without a log", report, &refused)?;
    let none = client.log_start(&[], 4096);
    fails_as("no ranges", none, &[libc::EINVAL])?;
    let odd = client.log_start(&[(BASE + 1, 4096)], 4096);
    fails_as("an odd range", odd, &[libc::EINVAL])?;
    start(&rig)?;
    let twice = client.log_start(&[(BASE, LEN)], 4096);
    fails_as(
        "a second log",
        twice,
        &[libc::EBUSY, libc::EEXIST, libc::EINVAL],
    )?;
    let other = Mapping::anonymous(PAGE)?;
    works("mapping", client.dma_map(&other, 0, DMA_BOTH))?;
    works(
        "writing outside of the log",
        rig.node().dma_write(0, &[1; 8]),
    )?;
    reports(&rig, "of the log", &[])?;
    works("stopping", client.log_stop())?;
    let report = client.log_report(BASE, LEN, 4096);
    fails_as("a report after the log", report, &refused)
}

fn log_ends_with_the_client(road: Road) -> Result<()> {
    let DmaRig {
        guest,
        service,
        server,
        mdev,
    } = logging(road)?;
    works("writing", server.node().dma_write(BASE, &[1; 8]))?;
    drop(guest);
    let guest = muser_e2e::rig::Guest::open(&mdev, road, 16)?;
    let rig = DmaRig {
        guest,
        service,
        server,
        mdev,
    };
    start(&rig)?;
    reports(&rig, "what the client before left", &[])?;
    works("writing", rig.node().dma_write(BASE + 4096, &[1; 8]))?;
    reports(&rig, "after a write", &[1])
}

fn start_that_waits_for_an_acquire_can_be_killed(road: Road) -> Result<()> {
    if road == Road::Group {
        // type1 pins without leave to wait for a fault, so no acquire makes anybody wait.
        return Ok(());
    }
    let mdev = Mdev::create(Type::Pci)?;
    drop(Server::attach(&mdev, &Description::pci())?);
    let slow = works("userfaultfd", Unanswered::new(4 * PAGE))?;
    let client = Client::open(&mdev, road)?;
    works("mapping", client.dma_map(slow.memory(), BASE, DMA_BOTH))?;
    let base = BASE.to_string();
    let mut process = Process::helper(&["pin", mdev.uuid(), &base, "4"])?;
    let touched = works("poll", slow.wait_for_touch(time::patience()))?;
    ensure!(touched, "the acquire did not touch the client's memory");
    let mut logger = Process::helper_on(client.file(), &["sharer", "log", &base, "16384"])?;
    logger.expect("ready")?;
    logger.wait_for_sleep()?;
    logger.kill()?;
    equal("what it said", logger.drain(), Vec::new())?;
    process.kill()?;
    works("answering the fault", slow.answer())?;
    // Whoever was killed has left neither a log nor a lock.
    works(
        "starting the log",
        client.log_start(&[(BASE, 4 * 4096)], 4096),
    )?;
    works("stopping it", client.log_stop())
}
