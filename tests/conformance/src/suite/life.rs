// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resets, closes and restarts.

use anyhow::Result;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{get, read, set, topic, write};
use crate::check::equal;
use crate::device::{LAST_RESET, MEMORY, MEMORY_AREA, RAISE, RESETS, SCRATCH};
use crate::Host;

topic!("life":
    reset_reaches_the_device,
    close_resets_for_the_next_client,
    opened_and_closed_many_times;
    restarts: restart_keeps_the_client,
    restart_keeps_memory,
    restart_keeps_eventfds,
);

fn reset_reaches_the_device(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let before = get(&*client, RESETS)?;
    set(&*client, SCRATCH, 0xABCD)?;
    client.reset()?;
    equal("scratch", get(&*client, SCRATCH)?, 0)?;
    equal("resets", get(&*client, RESETS)?, before + 1)?;
    equal("kind", get(&*client, LAST_RESET)?, 1)
}

fn close_resets_for_the_next_client(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    set(&*client, SCRATCH, 0x1111)?;
    drop(client);
    let client = host.open()?;
    equal("scratch", get(&*client, SCRATCH)?, 0)?;
    equal("kind", get(&*client, LAST_RESET)?, 2)
}

fn opened_and_closed_many_times(host: &dyn Host) -> Result<()> {
    for round in 0..30 {
        let client = host.open()?;
        equal("resets", get(&*client, RESETS)?, round)?;
        set(&*client, SCRATCH, round)?;
    }
    Ok(())
}

fn restart_keeps_the_client(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    set(&*client, SCRATCH, 5)?;
    host.restart()?;
    // The device starts anew: what it keeps over a restart is its own affair.
    equal("scratch", get(&*client, SCRATCH)?, 0)?;
    equal("resets", get(&*client, RESETS)?, 0)?;
    set(&*client, SCRATCH, 6)?;
    equal("scratch", get(&*client, SCRATCH)?, 6)
}

fn restart_keeps_memory(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    write(&*client, MEMORY, MEMORY_AREA.0 + 8, &[1, 2, 3])?;
    host.restart()?;
    equal(
        "memory",
        read(&*client, MEMORY, MEMORY_AREA.0 + 8)?,
        [1, 2, 3],
    )
}

fn restart_keeps_eventfds(host: &dyn Host) -> Result<()> {
    use std::os::fd::AsFd;
    let client = host.open()?;
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    client.set_eventfds(2, 3, &[Some(event.as_fd())])?;
    host.restart()?;
    set(&*client, RAISE, 3)?;
    equal("count", event.read().unwrap_or(0), 1)
}
