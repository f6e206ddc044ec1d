// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts of each kind. A register write raises them, so when it is done, they have come.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::config::capability;
use super::{get, read, set, topic, write};
use crate::check::{equal, fails};
use crate::device::{LOWER, MSIX_VECTORS, RAISE, TABLE};
use crate::{Client, Host};

topic!("interrupt":
    vectors_are_those_of_the_model,
    line_fires_and_masks_itself,
    line_that_stays_up_fires_at_unmask,
    lowered_line_is_silent,
    msi_delivered,
    msix_delivered_to_its_vector,
    vector_without_eventfd_is_silent,
    disabled_index_is_silent,
    vector_beyond_the_count_refused,
    masked_vector_fires_at_unmask,
    table_mask_holds_back_and_shows_pending,
    function_mask_holds_back,
    fired_by_client,
    close_forgets_eventfds,
);

const INTX: u32 = 0;
const MSI: u32 = 1;
const MSIX: u32 = 2;
const CONFIG: u32 = 7;
const EINVAL: i32 = 22;

fn events(count: usize) -> Result<Vec<EventFd>> {
    (0..count)
        .map(|_| {
            Ok(EventFd::from_flags(
                EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
            )?)
        })
        .collect()
}

/// Gives vectors from 0 an eventfd each.
pub(super) fn enable(client: &dyn Client, index: u32, count: usize) -> Result<Vec<EventFd>> {
    let events = events(count)?;
    let borrowed: Vec<_> = events.iter().map(|event| Some(event.as_fd())).collect();
    client.set_eventfds(index, 0, &borrowed)?;
    Ok(events)
}

pub(super) fn count(event: &EventFd) -> u64 {
    // It does not block: an error is that nobody has signalled.
    event.read().unwrap_or(0)
}

pub(super) fn counts(events: &[EventFd]) -> Vec<u64> {
    events.iter().map(count).collect()
}

/// Enables MSI or MSI-X in configuration space, as a driver does.
pub(super) fn enable_capability(client: &dyn Client, id: u8) -> Result<u64> {
    let offset = capability(client, id)?.context("the capability is missing")?;
    let control = u16::from_le_bytes(read(client, CONFIG, offset + 2)?);
    let bit = if id == 0x11 { 1 << 15 } else { 1 };
    write(client, CONFIG, offset + 2, &(control | bit).to_le_bytes())?;
    Ok(offset)
}

fn vectors_are_those_of_the_model(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (index, count) in [(0, 1), (1, 4), (2, MSIX_VECTORS.into()), (3, 1), (4, 1)] {
        equal(&format!("index {index}"), client.vectors(index)?, count)?;
    }
    Ok(())
}

fn line_fires_and_masks_itself(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let line = enable(&*client, INTX, 1)?;
    set(&*client, RAISE, 0)?;
    equal("counts", counts(&line), vec![1])?;
    set(&*client, RAISE, 0)?;
    equal("counts while masked", counts(&line), vec![0])?;
    // Status, bit 3: interrupt (PCI 3.0, 6.2.3).
    let status = read::<1>(&*client, CONFIG, 6)?[0];
    equal("interrupt status", status & 1 << 3, 1 << 3)
}

fn line_that_stays_up_fires_at_unmask(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let line = enable(&*client, INTX, 1)?;
    set(&*client, RAISE, 0)?;
    for _ in 0..3 {
        equal("counts", counts(&line), vec![1])?;
        client.set_mask(INTX, 0, false)?;
    }
    equal("counts", counts(&line), vec![1])
}

fn lowered_line_is_silent(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let line = enable(&*client, INTX, 1)?;
    set(&*client, RAISE, 0)?;
    equal("counts", counts(&line), vec![1])?;
    set(&*client, LOWER, 0)?;
    client.set_mask(INTX, 0, false)?;
    equal("counts once lowered", counts(&line), vec![0])?;
    set(&*client, RAISE, 0)?;
    equal("counts once raised again", counts(&line), vec![1])
}

fn msi_delivered(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let offset = capability(&*client, 0x05)?.context("no MSI")?;
    // Message control: enabled, 4 vectors granted (PCI 3.0, 6.8.1.3).
    write(&*client, CONFIG, offset + 2, &(1u16 | 2 << 4).to_le_bytes())?;
    let vectors = enable(&*client, MSI, 4)?;
    for vector in [0, 3, 1] {
        set(&*client, RAISE, vector)?;
    }
    equal("counts", counts(&vectors), vec![1, 1, 0, 1])
}

fn msix_delivered_to_its_vector(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, MSIX_VECTORS.into())?;
    enable_capability(&*client, 0x11)?;
    for vector in 0..u32::from(MSIX_VECTORS) {
        set(&*client, RAISE, vector)?;
        let fired: Vec<_> = (0u32..)
            .zip(counts(&vectors))
            .filter(|&(_, count)| count > 0)
            .collect();
        equal("vectors that fired", fired, vec![(vector, 1)])?;
    }
    Ok(())
}

fn vector_without_eventfd_is_silent(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 3)?;
    enable_capability(&*client, 0x11)?;
    client.set_eventfds(MSIX, 1, &[None])?;
    for vector in 0..4 {
        set(&*client, RAISE, vector)?;
    }
    equal("counts", counts(&vectors), vec![1, 0, 1])
}

fn disabled_index_is_silent(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 2)?;
    enable_capability(&*client, 0x11)?;
    client.disable(MSIX)?;
    set(&*client, RAISE, 0)?;
    equal("counts", counts(&vectors), vec![0, 0])?;
    let again = enable(&*client, MSIX, 1)?;
    set(&*client, RAISE, 0)?;
    equal("counts once enabled again", counts(&again), vec![1])
}

fn vector_beyond_the_count_refused(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let event = events(1)?;
    let fds = [Some(event[0].as_fd())];
    for (index, start) in [(0, 1), (1, 4), (2, 16), (3, 1), (5, 0), (32, 0)] {
        let result = client.set_eventfds(index, start, &fds);
        fails(&format!("index {index} from {start}"), result, EINVAL)?;
    }
    Ok(())
}

fn masked_vector_fires_at_unmask(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 2)?;
    enable_capability(&*client, 0x11)?;
    client.set_mask(MSIX, 1, true)?;
    for _ in 0..3 {
        set(&*client, RAISE, 1)?;
    }
    equal("counts while masked", counts(&vectors), vec![0, 0])?;
    client.set_mask(MSIX, 1, false)?;
    equal("counts once unmasked", counts(&vectors), vec![0, 1])
}

/// Vector control of an entry: 16 bytes an entry, of which it is the last 4 (PCI 3.0, 6.8.2).
pub(super) fn set_table_mask(client: &dyn Client, vector: u64, masked: bool) -> Result<()> {
    let value = u32::from(masked).to_le_bytes();
    write(client, TABLE, vector * 16 + 12, &value)
}

fn table_mask_holds_back_and_shows_pending(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 4)?;
    enable_capability(&*client, 0x11)?;
    for vector in 0..4 {
        set_table_mask(&*client, vector, false)?;
    }
    set_table_mask(&*client, 2, true)?;
    set(&*client, RAISE, 2)?;
    set(&*client, RAISE, 3)?;
    equal("counts", counts(&vectors), vec![0, 0, 0, 1])?;
    equal(
        "pending bits",
        read(&*client, TABLE, 0x800)?,
        [0b100, 0, 0, 0],
    )?;
    set_table_mask(&*client, 2, false)?;
    equal("counts once unmasked", counts(&vectors), vec![0, 0, 1, 0])?;
    equal("pending bits", read(&*client, TABLE, 0x800)?, [0; 4])
}

fn function_mask_holds_back(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 2)?;
    let offset = enable_capability(&*client, 0x11)?;
    for vector in 0..2 {
        set_table_mask(&*client, vector, false)?;
    }
    // Message control, bit 15: enable, bit 14: function mask (PCI 3.0, 6.8.2.3).
    write(&*client, CONFIG, offset + 2, &0xC000u16.to_le_bytes())?;
    set(&*client, RAISE, 0)?;
    set(&*client, RAISE, 1)?;
    equal("counts", counts(&vectors), vec![0, 0])?;
    write(&*client, CONFIG, offset + 2, &0x8000u16.to_le_bytes())?;
    equal("counts once unmasked", counts(&vectors), vec![1, 1])
}

fn fired_by_client(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 3)?;
    client.fire(MSIX, 1)?;
    equal("counts", counts(&vectors), vec![0, 1, 0])
}

fn close_forgets_eventfds(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let vectors = enable(&*client, MSIX, 2)?;
    enable_capability(&*client, 0x11)?;
    drop(client);
    let client = host.open()?;
    set(&*client, RAISE, 0)?;
    equal("counts", counts(&vectors), vec![0, 0])?;
    // The close has reset the device before the next client's first access.
    equal("last reset", get(&*client, crate::device::LAST_RESET)?, 2)
}
