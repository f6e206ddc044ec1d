// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that device and client share.

use anyhow::{Context, Result};

use super::{get, read, set, topic, write};
use crate::check::{equal, fails};
use crate::device::{MEMORY, MEMORY_AREA, PEEK, PEEK_AT, REGISTERS};
use crate::{Client, Host, Memory};

topic!("memory":
    area_is_described,
    starts_zeroed,
    both_sides_see_each_others_stores,
    access_by_read_and_write_is_the_same_memory,
    access_straddling_the_area_is_split,
    nothing_but_the_area_can_be_mapped,
    keeps_its_content_over_a_reset,
    is_zeroed_for_the_next_client,
);

fn map(client: &dyn Client) -> Result<Box<dyn Memory>> {
    let (offset, size) = MEMORY_AREA;
    Ok(client.map(MEMORY, offset, usize::try_from(size)?)?)
}

/// What the device sees of the memory.
fn peek(client: &dyn Client, offset: u32) -> Result<u32> {
    set(client, PEEK_AT, offset)?;
    get(client, PEEK)
}

fn area_is_described(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let region = client.region(MEMORY)?.context("no region")?;
    equal("areas", region.areas, vec![MEMORY_AREA])?;
    let registers = client.region(REGISTERS)?.context("no registers")?;
    equal("areas of the registers", registers.areas, vec![])
}

fn starts_zeroed(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = map(&*client)?;
    for offset in (0..MEMORY_AREA.1 as usize).step_by(4) {
        equal("memory", memory.load(offset), 0)?;
    }
    Ok(())
}

fn both_sides_see_each_others_stores(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = map(&*client)?;
    for offset in [0u32, 4, 0x1000, 0x7FFC] {
        memory.store(offset as usize, offset ^ 0xAAAA_0001);
        equal(
            "the client's store",
            peek(&*client, offset)?,
            offset ^ 0xAAAA_0001,
        )?;
        set(&*client, PEEK, offset ^ 0x5555_0002)?;
        equal(
            "the device's store",
            memory.load(offset as usize),
            offset ^ 0x5555_0002,
        )?;
    }
    Ok(())
}

fn access_by_read_and_write_is_the_same_memory(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = map(&*client)?;
    let start = MEMORY_AREA.0;
    write(&*client, MEMORY, start + 0x100, &[1, 2, 3, 4])?;
    equal("mapped", memory.load(0x100), 0x0403_0201)?;
    equal("the device's", peek(&*client, 0x100)?, 0x0403_0201)?;
    memory.store(0x104, 0xDDCC_BBAA);
    let back = read(&*client, MEMORY, start + 0x102)?;
    equal("read", back, [3, 4, 0xAA, 0xBB, 0xCC])
}

/// Around the area the device has nothing: all ones, and writes are lost.
fn access_straddling_the_area_is_split(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = map(&*client)?;
    let (start, size) = MEMORY_AREA;
    write(&*client, MEMORY, start - 2, &[1, 2, 3, 4])?;
    equal("memory at the start", memory.load(0), 0x0403)?;
    equal(
        "read at the start",
        read(&*client, MEMORY, start - 2)?,
        [0xFF, 0xFF, 3, 4],
    )?;
    write(&*client, MEMORY, start + size - 1, &[9, 8])?;
    let last = memory.load(usize::try_from(size)? - 4);
    equal("memory at the end", last, 0x0900_0000)?;
    equal(
        "read at the end",
        read(&*client, MEMORY, start + size - 1)?,
        [9, 0xFF],
    )
}

fn nothing_but_the_area_can_be_mapped(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (region, offset) in [
        (REGISTERS, 0),
        (MEMORY, 0),
        (MEMORY, 0xC000),
        (7, 0),
        (9, 0),
    ] {
        let mapped = client.map(region, offset, 4096);
        fails(&format!("region {region} at {offset:#x}"), mapped, 22)?;
    }
    Ok(())
}

fn keeps_its_content_over_a_reset(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = map(&*client)?;
    memory.store(0x40, 0xFEED);
    client.reset()?;
    equal("after a reset", memory.load(0x40), 0xFEED)
}

fn is_zeroed_for_the_next_client(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = map(&*client)?;
    memory.store(0x40, 0xFEED);
    drop(memory);
    drop(client);
    let client = host.open()?;
    equal("after a close", map(&*client)?.load(0x40), 0)
}
