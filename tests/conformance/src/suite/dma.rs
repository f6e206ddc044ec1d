// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's memory, as the device reaches it.

use anyhow::{ensure, Result};

use super::{get, read, set, topic, write};
use crate::check::{equal, fails};
use crate::device::engine::{Command, GO, IOVA, LEN, UNMAPPED, UNMAPPED_LEN, UNMAPS};
use crate::device::{MEMORY, MEMORY_AREA, REGISTERS};
use crate::{Access, Client, Host};

topic!("dma":
    copies_reach_the_clients_memory,
    copies_of_any_place_and_length_are_exact,
    range_is_used_in_place,
    slices_write_what_is_asked,
    slices_for_reading_only_are_not_written,
    loads_and_stores_are_seen_by_the_client,
    pieces_are_gathered_over_mappings,
    range_over_adjacent_mappings_is_one,
    address_not_mapped_is_efault,
    range_ending_outside_is_efault,
    end_beyond_all_addresses_is_eoverflow,
    nothing_can_be_copied_anywhere,
    memory_for_reading_only_is_not_written,
    device_that_is_no_bus_master_is_refused,
    reset_ends_bus_mastering,
    unmap_of_memory_in_use_tells_the_device,
    unmap_of_memory_never_used_tells_nobody,
    unmap_of_memory_let_go_tells_nobody,
    unmapped_range_shows_what_is_mapped_next,
    unmap_elsewhere_leaves_a_range_alone,
    mapping_again_for_reading_only_forbids_writes,
    written_pages_are_recorded,
    pages_written_through_slices_are_recorded,
    mapped_and_unmapped_many_times,
    far_addresses_are_reached,
    close_takes_all_mappings;
    restarts: restart_keeps_mappings,
);

const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;

/// Opens the device and lets it be a bus master.
fn open(host: &dyn Host) -> Result<Box<dyn Client>> {
    let client = host.open()?;
    set_bus_master(&*client, true)?;
    Ok(client)
}

fn set_bus_master(client: &dyn Client, on: bool) -> Result<()> {
    let command: u16 = if on { 0x6 } else { 0x2 };
    write(client, 7, 4, &command.to_le_bytes())
}

/// Has the engine do something with `len` bytes at `iova`; its errno is that of the write.
fn go(client: &dyn Client, command: Command, iova: u64, len: u32) -> std::io::Result<usize> {
    let put = |offset, value: u32| client.write(REGISTERS, offset, &value.to_le_bytes());
    put(IOVA, iova as u32)?;
    put(IOVA + 4, (iova >> 32) as u32)?;
    put(LEN, len)?;
    put(GO, command as u32)
}

/// Puts data where the engine finds it.
fn give(client: &dyn Client, data: &[u8]) -> Result<()> {
    write(client, MEMORY, MEMORY_AREA.0, data)
}

/// Takes data from where the engine left it.
fn take(client: &dyn Client, len: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; len];
    let count = client.read(MEMORY, MEMORY_AREA.0, &mut data)?;
    equal("bytes", count, len)?;
    Ok(data)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (at as u8).wrapping_mul(31) ^ ((at >> 8) as u8) ^ seed;
    (0..len).map(byte).collect()
}

fn copies_reach_the_clients_memory(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, PAGE, Access::Both)?;
    memory.write(8, b"from the client");
    go(&*client, Command::Read, BASE + 8, 15)?;
    equal("read", take(&*client, 15)?, b"from the client".to_vec())?;
    give(&*client, b"from the device")?;
    go(&*client, Command::Write, BASE + 100, 15)?;
    equal(
        "written",
        memory.bytes(100, 15),
        b"from the device".to_vec(),
    )?;
    equal("before", memory.bytes(99, 1), vec![0])?;
    equal("behind", memory.bytes(115, 1), vec![0])
}

fn copies_of_any_place_and_length_are_exact(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let pages = 8;
    let memory = client.dma_map(BASE, pages * PAGE, Access::Both)?;
    let mut model = pattern((pages * PAGE) as usize, 1);
    memory.write(0, &model);
    // Twice: the first time each page is new to the device.
    for round in 0..2 {
        for (at, len) in [
            (0, 1),
            (1, 4095),
            (4090, 12),
            (3, 8192),
            (8191, 12289),
            (0, 32768),
        ] {
            go(&*client, Command::Read, BASE + at as u64, len as u32)?;
            let got = take(&*client, len)?;
            ensure!(
                got == model[at..at + len],
                "round {round}: read of {len} at {at}"
            );
            let new = pattern(len, at as u8 ^ 0x55);
            give(&*client, &new)?;
            go(&*client, Command::Write, BASE + at as u64, len as u32)?;
            model[at..at + len].copy_from_slice(&new);
            let got = memory.bytes(0, model.len());
            ensure!(got == model, "round {round}: write of {len} at {at}");
        }
    }
    Ok(())
}

fn range_is_used_in_place(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, 3 * PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE + 0x800, 8192)?;
    for round in 0..4 {
        let data = pattern(8192, round);
        memory.write(0x800, &data);
        go(&*client, Command::ReadHeld, 0, 0)?;
        ensure!(take(&*client, 8192)? == data, "round {round}: read");
        let data = pattern(8192, round ^ 0xFF);
        give(&*client, &data)?;
        go(&*client, Command::WriteHeld, 0, 0)?;
        ensure!(memory.bytes(0x800, 8192) == data, "round {round}: written");
    }
    Ok(())
}

fn slices_write_what_is_asked(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, 3 * PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE + 0xFFF, 4098)?;
    let data = pattern(4098, 9);
    give(&*client, &data)?;
    go(&*client, Command::WriteSlices, 0, 0)?;
    ensure!(memory.bytes(0xFFF, 4098) == data, "written");
    equal("before", memory.bytes(0xFFE, 1), vec![0])?;
    equal("behind", memory.bytes(0xFFF + 4098, 1), vec![0])
}

fn loads_and_stores_are_seen_by_the_client(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE + 0x40, 64)?;
    memory.write(0x40, &41_u32.to_le_bytes());
    go(&*client, Command::Increment, 0, 0)?;
    go(&*client, Command::Increment, 0, 0)?;
    equal("value", memory.bytes(0x40, 4), vec![43, 0, 0, 0])?;
    go(&*client, Command::Hold, BASE + 0x42, 64)?;
    fails("not aligned", go(&*client, Command::Increment, 0, 0), 22)
}

fn pieces_are_gathered_over_mappings(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let first = client.dma_map(BASE, PAGE, Access::Both)?;
    let second = client.dma_map(1 << 32, 2 * PAGE, Access::Both)?;
    first.write(10, &[1, 2, 3]);
    second.write(4094, &[4, 5, 6, 7]);
    for (iova, len) in [
        (BASE + 10, 3),
        (0x1234_5678, 0),
        ((1 << 32) + 4094, 4),
        (BASE + 10, 1),
    ] {
        go(&*client, Command::Piece, iova, len)?;
    }
    go(&*client, Command::ReadPieces, 0, 0)?;
    equal("read", take(&*client, 8)?, vec![1, 2, 3, 4, 5, 6, 7, 1])?;
    give(&*client, &[9, 8, 7, 6, 5])?;
    go(&*client, Command::Piece, (1 << 32) + 4095, 2)?;
    go(&*client, Command::Piece, BASE + 4093, 3)?;
    go(&*client, Command::WritePieces, 0, 0)?;
    equal("the second", second.bytes(4094, 4), vec![4, 9, 8, 7])?;
    equal("the first", first.bytes(4092, 4), vec![0, 7, 6, 5])?;
    go(&*client, Command::Piece, BASE, 1)?;
    go(&*client, Command::Piece, BASE + PAGE, 1)?;
    fails(
        "a piece outside",
        go(&*client, Command::ReadPieces, 0, 0),
        14,
    )
}

fn range_over_adjacent_mappings_is_one(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let first = client.dma_map(BASE, PAGE, Access::Both)?;
    let second = client.dma_map(BASE + PAGE, PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE + 4092, 8)?;
    give(&*client, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    go(&*client, Command::WriteHeld, 0, 0)?;
    equal("the first", first.bytes(4092, 4), vec![1, 2, 3, 4])?;
    equal("the second", second.bytes(0, 4), vec![5, 6, 7, 8])
}

fn address_not_mapped_is_efault(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, PAGE, Access::Both)?;
    for iova in [0, BASE - PAGE, BASE + PAGE, 1 << 40, u64::MAX - 7] {
        for command in [
            Command::Read,
            Command::Write,
            Command::Hold,
            Command::HoldRead,
        ] {
            let what = format!("{command:?} at {iova:#x}");
            fails(&what, go(&*client, command, iova, 8), 14)?;
        }
    }
    go(&*client, Command::Read, BASE, 8)?;
    Ok(())
}

fn range_ending_outside_is_efault(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, PAGE, Access::Both)?;
    for (iova, len) in [
        (BASE - 1, 2),
        (BASE + 4095, 2),
        (BASE - 1, 0x1002),
        (BASE, 0x7FFF),
    ] {
        for command in [Command::Read, Command::Write, Command::Hold] {
            let what = format!("{command:?} of {len:#x} at {iova:#x}");
            fails(&what, go(&*client, command, iova, len), 14)?;
        }
    }
    Ok(())
}

fn end_beyond_all_addresses_is_eoverflow(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    for command in [Command::Read, Command::Write, Command::Hold] {
        let what = format!("{command:?}");
        fails(&what, go(&*client, command, u64::MAX, 2), 75)?;
    }
    Ok(())
}

fn nothing_can_be_copied_anywhere(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    for iova in [0, BASE, u64::MAX] {
        for command in [
            Command::Read,
            Command::Write,
            Command::Hold,
            Command::ReadHeld,
        ] {
            go(&*client, command, iova, 0)?;
        }
    }
    Ok(())
}

fn memory_for_reading_only_is_not_written(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, PAGE, Access::Read)?;
    memory.write(0, &[7; 16]);
    for round in 0..2 {
        go(&*client, Command::Read, BASE, 16)?;
        equal("read", take(&*client, 16)?, vec![7; 16])?;
        let what = format!("round {round}: written");
        fails(&what, go(&*client, Command::Write, BASE, 16), 1)?;
        fails(&what, go(&*client, Command::Hold, BASE, 16), 1)?;
        go(&*client, Command::HoldRead, BASE, 16)?;
        go(&*client, Command::ReadHeld, 0, 0)?;
        fails(&what, go(&*client, Command::WriteHeld, 0, 0), 1)?;
        fails(&what, go(&*client, Command::Increment, 0, 0), 1)?;
    }
    equal("memory", memory.bytes(0, 16), vec![7; 16])
}

fn slices_for_reading_only_are_not_written(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, PAGE, Access::Read)?;
    go(&*client, Command::HoldRead, BASE, 16)?;
    fails("written", go(&*client, Command::WriteSlices, 0, 0), 1)?;
    equal("memory", memory.bytes(0, 16), vec![0; 16])
}

fn device_that_is_no_bus_master_is_refused(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let memory = client.dma_map(BASE, PAGE, Access::Both)?;
    let commands = [Command::Read, Command::Write, Command::Hold];
    for command in commands {
        let what = format!("{command:?} after power-on");
        fails(&what, go(&*client, command, BASE, 8), 1)?;
    }
    set_bus_master(&*client, true)?;
    go(&*client, Command::Hold, BASE, 8)?;
    set_bus_master(&*client, false)?;
    for command in [Command::ReadHeld, Command::WriteHeld, Command::Increment] {
        fails(&format!("{command:?}"), go(&*client, command, 0, 0), 1)?;
    }
    set_bus_master(&*client, true)?;
    go(&*client, Command::Increment, 0, 0)?;
    equal("value", memory.bytes(0, 2), vec![1, 0])
}

fn reset_ends_bus_mastering(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, PAGE, Access::Both)?;
    go(&*client, Command::Read, BASE, 8)?;
    client.reset()?;
    fails("reading", go(&*client, Command::Read, BASE, 8), 1)
}

fn unmap_of_memory_in_use_tells_the_device(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, 4 * PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE + PAGE, 16)?;
    let before = get(&*client, UNMAPS)?;
    equal("bytes", client.dma_unmap(BASE, 4 * PAGE)?, 4 * PAGE)?;
    equal("unmaps", get(&*client, UNMAPS)?, before + 1)?;
    equal("first page", get(&*client, UNMAPPED)?, (BASE / PAGE) as u32)?;
    equal("pages", get(&*client, UNMAPPED_LEN)?, 4)?;
    fails("reading", go(&*client, Command::ReadHeld, 0, 0), 14)?;
    fails("writing", go(&*client, Command::WriteHeld, 0, 0), 14)?;
    fails("slices", go(&*client, Command::WriteSlices, 0, 0), 14)?;
    fails("copying", go(&*client, Command::Read, BASE, 8), 14)
}

fn unmap_of_memory_never_used_tells_nobody(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, 4 * PAGE, Access::Both)?;
    client.dma_unmap(BASE, 4 * PAGE)?;
    equal("unmaps", get(&*client, UNMAPS)?, 0)
}

fn unmap_of_memory_let_go_tells_nobody(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, 4 * PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE, 16384)?;
    go(&*client, Command::ReadHeld, 0, 0)?;
    go(&*client, Command::Release, BASE, 16384)?;
    client.dma_unmap(BASE, 4 * PAGE)?;
    equal("unmaps", get(&*client, UNMAPS)?, 0)
}

fn unmapped_range_shows_what_is_mapped_next(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let old = client.dma_map(BASE, PAGE, Access::Both)?;
    old.write(0, &[1; 16]);
    go(&*client, Command::Hold, BASE, 16)?;
    go(&*client, Command::ReadHeld, 0, 0)?;
    client.dma_unmap(BASE, PAGE)?;
    let new = client.dma_map(BASE, PAGE, Access::Both)?;
    new.write(0, &[2; 16]);
    go(&*client, Command::ReadHeld, 0, 0)?;
    equal("read", take(&*client, 16)?, vec![2; 16])?;
    give(&*client, &[3; 16])?;
    go(&*client, Command::WriteHeld, 0, 0)?;
    equal("the new", new.bytes(0, 16), vec![3; 16])?;
    equal("the old", old.bytes(0, 16), vec![1; 16])
}

fn unmap_elsewhere_leaves_a_range_alone(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, PAGE, Access::Both)?;
    let _other = client.dma_map(BASE * 2, PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE, 16)?;
    go(&*client, Command::Write, BASE * 2, 16)?;
    client.dma_unmap(BASE * 2, PAGE)?;
    give(&*client, &[5; 16])?;
    go(&*client, Command::WriteHeld, 0, 0)?;
    equal("memory", memory.bytes(0, 17), [&[5; 16][..], &[0]].concat())
}

fn mapping_again_for_reading_only_forbids_writes(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _old = client.dma_map(BASE, PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE, 16)?;
    client.dma_unmap(BASE, PAGE)?;
    let new = client.dma_map(BASE, PAGE, Access::Read)?;
    give(&*client, &[5; 16])?;
    fails("writing", go(&*client, Command::WriteHeld, 0, 0), 1)?;
    fails("copying", go(&*client, Command::Write, BASE, 16), 1)?;
    equal("memory", new.bytes(0, 16), vec![0; 16])
}

fn written_pages_are_recorded(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, 16 * PAGE, Access::Both)?;
    let page = |number: u64| BASE + number * PAGE;
    // What was written before the record starts is none of its business.
    go(&*client, Command::Hold, page(2), 8192)?;
    go(&*client, Command::WriteHeld, 0, 0)?;
    client.dirty_start(BASE, 16 * PAGE)?;
    let dirty = || client.dirty_pages(BASE, 16 * PAGE);
    equal("at first", dirty()?, vec![])?;
    go(&*client, Command::ReadHeld, 0, 0)?;
    go(&*client, Command::Read, page(5), 8192)?;
    equal("after reads", dirty()?, vec![])?;
    go(&*client, Command::WriteHeld, 0, 0)?;
    go(&*client, Command::Write, page(7) + 4095, 2)?;
    let written = [2, 3, 7, 8].map(page).to_vec();
    equal("after writes", dirty()?, written)?;
    equal("once more", dirty()?, vec![])?;
    // The same again, of what is known already.
    go(&*client, Command::Increment, 0, 0)?;
    equal("by a store", dirty()?, vec![page(2)])?;
    go(&*client, Command::Write, page(8), 1)?;
    equal("by a copy", dirty()?, vec![page(8)])?;
    for number in [15, 0] {
        go(&*client, Command::Piece, page(number), 8)?;
    }
    go(&*client, Command::WritePieces, 0, 0)?;
    equal("by pieces", dirty()?, [0, 15].map(page).to_vec())
}

fn pages_written_through_slices_are_recorded(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, 16 * PAGE, Access::Both)?;
    client.dirty_start(BASE, 16 * PAGE)?;
    go(&*client, Command::Hold, BASE + 2 * PAGE, 8192)?;
    for round in 0..2 {
        go(&*client, Command::WriteSlices, 0, 0)?;
        let dirty = client.dirty_pages(BASE, 16 * PAGE)?;
        let written = vec![BASE + 2 * PAGE, BASE + 3 * PAGE];
        equal(&format!("round {round}"), dirty, written)?;
    }
    Ok(())
}

fn mapped_and_unmapped_many_times(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    for round in 0..60_u8 {
        let memory = client.dma_map(BASE, PAGE, Access::Both)?;
        memory.write(0, &[round; 64]);
        if round == 0 {
            go(&*client, Command::Hold, BASE, 64)?;
        }
        go(&*client, Command::ReadHeld, 0, 0)?;
        equal("read", take(&*client, 64)?, vec![round; 64])?;
        give(&*client, &[!round; 64])?;
        go(&*client, Command::WriteHeld, 0, 0)?;
        equal("written", memory.bytes(0, 64), vec![!round; 64])?;
        client.dma_unmap(BASE, PAGE)?;
        fails("unmapped", go(&*client, Command::ReadHeld, 0, 0), 14)?;
    }
    Ok(())
}

/// Addresses all over: near the end of what a window can show, and beyond it.
fn far_addresses_are_reached(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    for iova in [
        1 << 36,
        (1 << 46) - PAGE,
        1 << 52,
        (1 << 62) - PAGE,
        1 << 62,
    ] {
        let memory = client.dma_map(iova, PAGE, Access::Both)?;
        give(&*client, &iova.to_le_bytes())?;
        go(&*client, Command::Hold, iova + 8, 8)?;
        go(&*client, Command::WriteHeld, 0, 0)?;
        go(&*client, Command::Increment, 0, 0)?;
        go(&*client, Command::Write, iova + 16, 8)?;
        let bytes = iova.to_le_bytes();
        equal("copied", memory.bytes(16, 8), bytes.to_vec())?;
        equal(
            "in place",
            memory.bytes(8, 8),
            (iova + 1).to_le_bytes().to_vec(),
        )?;
        go(&*client, Command::ReadHeld, 0, 0)?;
        equal(
            "read",
            take(&*client, 8)?,
            (iova + 1).to_le_bytes().to_vec(),
        )?;
    }
    Ok(())
}

fn close_takes_all_mappings(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let _memory = client.dma_map(BASE, PAGE, Access::Both)?;
    go(&*client, Command::Hold, BASE, 16)?;
    drop(client);
    let client = open(host)?;
    fails("in place", go(&*client, Command::ReadHeld, 0, 0), 14)?;
    fails("copied", go(&*client, Command::Read, BASE, 16), 14)?;
    let memory = client.dma_map(BASE, PAGE, Access::Both)?;
    memory.write(0, &[4; 16]);
    go(&*client, Command::ReadHeld, 0, 0)?;
    equal("read", take(&*client, 16)?, vec![4; 16])
}

fn restart_keeps_mappings(host: &dyn Host) -> Result<()> {
    let client = open(host)?;
    let memory = client.dma_map(BASE, PAGE, Access::Both)?;
    go(&*client, Command::Write, BASE, 16)?;
    host.restart()?;
    // Configuration space is recovered: nobody has to say that it may be a bus master.
    equal("command", read(&*client, 7, 4)?, [6, 0])?;
    give(&*client, &[6; 16])?;
    go(&*client, Command::Write, BASE, 16)?;
    equal("memory", memory.bytes(0, 16), vec![6; 16])?;
    client.dma_unmap(BASE, PAGE)?;
    equal("unmaps", get(&*client, UNMAPS)?, 1)?;
    set(&*client, LEN, 0)
}
