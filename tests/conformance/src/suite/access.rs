// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Register accesses: widths, alignment, ends, errors.

use anyhow::Result;

use super::{get, read, set, topic, write};
use crate::check::{equal, fails};
use crate::device::{
    ERRNO, FAIL, NOTHING, REGISTERS, SCRATCH, SCRATCH_SIZE, TRACE, TRACE_AT, TRACE_ENTRY,
};
use crate::{Client, Host};

topic!("access":
    regions_are_those_of_the_model,
    every_width_keeps_data,
    aligned_access_arrives_whole,
    unaligned_access_arrives_in_aligned_pieces,
    nothing_there_reads_all_ones,
    access_across_the_end_is_short,
    access_behind_the_end_refused,
    access_of_absent_region_refused,
    error_of_device_reaches_client,
    device_goes_on_after_errors,
    long_access_reaches_every_register,
);

const EINVAL: i32 = 22;

fn regions_are_those_of_the_model(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (index, size) in [(0, 0x1000), (2, 0x10000), (4, 0x1000), (7, 4096)] {
        let region = client.region(index)?;
        let what = format!("size of region {index}");
        equal(&what, region.map(|region| region.size), Some(size))?;
    }
    for index in [1, 3, 5, 6] {
        equal(&format!("region {index}"), client.region(index)?, None)?;
    }
    Ok(())
}

fn every_width_keeps_data(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for width in [1, 2, 4, 8, 3, 5, 6, 7, 16, 31] {
        for offset in 0..8u64 {
            let data: Vec<u8> = (1..=width).map(|i| i * 7 + offset as u8).collect();
            write(&*client, REGISTERS, SCRATCH + offset, &data)?;
            let mut back = vec![0; data.len()];
            let count = client.read(REGISTERS, SCRATCH + offset, &mut back)?;
            equal("bytes read", count, data.len())?;
            equal(&format!("{width} bytes at {offset}"), back, data)?;
        }
    }
    Ok(())
}

/// The accesses of the scratch registers that `act` becomes: offset, width.
fn traced(client: &dyn Client, act: impl FnOnce() -> Result<()>) -> Result<Vec<(u32, u32)>> {
    set(client, TRACE, 0)?;
    act()?;
    let count = get(client, TRACE)?;
    (0..count)
        .map(|entry| {
            set(client, TRACE_AT, entry)?;
            let value = get(client, TRACE_ENTRY)?;
            Ok((value >> 8 & 0xFF, value & 0x7F))
        })
        .collect()
}

fn aligned_access_arrives_whole(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for width in [1u32, 2, 4, 8] {
        let offset = u64::from(width) * 3;
        let data = vec![0xEE; width as usize];
        let writes = traced(&*client, || {
            write(&*client, REGISTERS, SCRATCH + offset, &data)
        })?;
        equal("write", writes, vec![(width * 3, width)])?;
        let reads = traced(&*client, || {
            let mut back = vec![0; width as usize];
            client.read(REGISTERS, SCRATCH + offset, &mut back)?;
            Ok(())
        })?;
        equal("read", reads, vec![(width * 3, width)])?;
    }
    Ok(())
}

fn unaligned_access_arrives_in_aligned_pieces(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for (offset, len, expected) in [
        (3, 7, vec![(3, 1), (4, 4), (8, 2)]),
        (1, 4, vec![(1, 1), (2, 2), (4, 1)]),
        (4, 8, vec![(4, 4), (8, 4)]),
        (0, 16, vec![(0, 8), (8, 8)]),
    ] {
        let data = vec![0x11; len];
        let writes = traced(&*client, || write(&*client, REGISTERS, offset, &data))?;
        equal(&format!("{len} bytes at {offset}"), writes, expected)?;
    }
    Ok(())
}

fn nothing_there_reads_all_ones(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    write(&*client, REGISTERS, NOTHING, &[1, 2, 3, 4])?;
    equal("8 bytes", read(&*client, REGISTERS, NOTHING)?, [0xFF; 8])?;
    equal("1 byte", read(&*client, REGISTERS, NOTHING + 5)?, [0xFF; 1])
}

fn access_across_the_end_is_short(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let mut data = [0x77; 16];
    let count = client.read(REGISTERS, 0x1000 - 4, &mut data)?;
    equal("bytes read", count, 4)?;
    equal(
        "bytes behind them",
        data[4..].iter().all(|&byte| byte == 0x77),
        true,
    )?;
    equal(
        "bytes written",
        client.write(REGISTERS, 0x1000 - 2, &data)?,
        2,
    )
}

fn access_behind_the_end_refused(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for offset in [0x1000, 0x1001, 1 << 32, (1 << 40) - 1] {
        let mut data = [0; 4];
        fails(
            "read",
            client.read(REGISTERS, offset, &mut data).map(drop),
            EINVAL,
        )?;
        fails("write", client.write(REGISTERS, offset, &data), EINVAL)?;
    }
    Ok(())
}

fn access_of_absent_region_refused(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for region in [1, 5, 6, 9, 100] {
        let mut data = [0; 4];
        fails("read", client.read(region, 0, &mut data), EINVAL)?;
        fails("write", client.write(region, 0, &data), EINVAL)?;
    }
    Ok(())
}

fn error_of_device_reaches_client(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    // EPERM, EIO, ENXIO, EBUSY, ENODEV, EPROTO
    for errno in [1u8, 5, 6, 16, 19, 71] {
        set(&*client, ERRNO, errno.into())?;
        let mut data = [0; 4];
        fails(
            "read",
            client.read(REGISTERS, FAIL, &mut data),
            errno.into(),
        )?;
        fails("write", client.write(REGISTERS, FAIL, &data), errno.into())?;
    }
    Ok(())
}

fn device_goes_on_after_errors(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    for round in 0..50u32 {
        let mut data = [0; 4];
        fails("read", client.read(REGISTERS, FAIL, &mut data), 5)?;
        set(&*client, SCRATCH, round)?;
        equal("scratch", get(&*client, SCRATCH)?, round)?;
    }
    Ok(())
}

fn long_access_reaches_every_register(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let data: Vec<u8> = (0..SCRATCH_SIZE as u8).map(|i| i ^ 0x5C).collect();
    write(&*client, REGISTERS, SCRATCH, &data)?;
    equal(
        "scratch",
        read::<SCRATCH_SIZE>(&*client, REGISTERS, SCRATCH)?.to_vec(),
        data,
    )
}
