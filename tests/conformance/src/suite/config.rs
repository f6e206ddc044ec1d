// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space, which the library serves.

use anyhow::{ensure, Context, Result};

use super::{read, set, topic, write};
use crate::check::equal;
use crate::device::{IDS, LAST_RESET, SCRATCH};
use crate::{Client, Host};

topic!("config":
    header_is_that_of_the_model,
    bars_are_sized_as_described,
    capabilities_are_found,
    extended_capabilities_are_found,
    read_only_bits_keep_their_values,
    function_level_reset_resets,
    reset_returns_defaults,
);

const CONFIG: u32 = 7;

fn word(client: &dyn Client, offset: u64) -> Result<u32> {
    Ok(u32::from_le_bytes(read(client, CONFIG, offset)?))
}

fn half(client: &dyn Client, offset: u64) -> Result<u16> {
    Ok(u16::from_le_bytes(read(client, CONFIG, offset)?))
}

fn header_is_that_of_the_model(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    equal("vendor", half(&*client, 0)?, IDS.0)?;
    equal("device", half(&*client, 2)?, IDS.1)?;
    equal("class", word(&*client, 8)? >> 8, 0xFF_0000)?;
    equal(
        "header type",
        read::<1>(&*client, CONFIG, 0x0E)?[0] & 0x7F,
        0,
    )?;
    equal("interrupt pin", read(&*client, CONFIG, 0x3D)?, [1])
}

fn sized(client: &dyn Client, bar: u64) -> Result<u32> {
    let offset = 0x10 + bar * 4;
    let before = word(client, offset)?;
    write(client, CONFIG, offset, &[0xFF; 4])?;
    let mask = word(client, offset)?;
    write(client, CONFIG, offset, &before.to_le_bytes())?;
    equal("BAR after sizing", word(client, offset)?, before)?;
    Ok(mask)
}

fn bars_are_sized_as_described(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    equal("BAR 0", sized(&*client, 0)?, !0xFFF)?;
    equal("BAR 1", sized(&*client, 1)?, 0)?;
    // 64-bit (bit 2), prefetchable (bit 3).
    equal("BAR 2", sized(&*client, 2)?, !0xFFFF | 0b1100)?;
    equal("upper half of BAR 2", sized(&*client, 3)?, u32::MAX)?;
    equal("BAR 4", sized(&*client, 4)?, !0xFFF)?;
    equal("BAR 5", sized(&*client, 5)?, 0)
}

/// Where a capability is.
pub(super) fn capability(client: &dyn Client, id: u8) -> Result<Option<u64>> {
    ensure!(
        half(client, 6)? & 1 << 4 != 0,
        "status has no capability list"
    );
    let mut offset = read::<1>(client, CONFIG, 0x34)?[0];
    for _ in 0..48 {
        if offset == 0 {
            return Ok(None);
        }
        ensure!(
            offset >= 0x40,
            "a capability lies in the header, at {offset:#x}"
        );
        let [found, next] = read(client, CONFIG, offset.into())?;
        if found == id {
            return Ok(Some(offset.into()));
        }
        offset = next;
    }
    anyhow::bail!("the capability chain has a loop")
}

fn capabilities_are_found(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    // Power management, MSI, vendor, Express, MSI-X.
    for id in [0x01, 0x05, 0x09, 0x10, 0x11] {
        ensure!(
            capability(&*client, id)?.is_some(),
            "capability {id:#x} is missing"
        );
    }
    equal(
        "a capability not described",
        capability(&*client, 0x0D)?,
        None,
    )?;
    let msix = capability(&*client, 0x11)?.context("no MSI-X")?;
    equal(
        "MSI-X table size",
        half(&*client, msix + 2)? & 0x7FF,
        crate::device::MSIX_VECTORS - 1,
    )
}

fn extended_capabilities_are_found(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let head = word(&*client, 0x100)?;
    // Device serial number (PCI Express 4.0, 7.9.3).
    equal("first extended capability", head & 0xFFFF, 3)?;
    equal("serial number, low", word(&*client, 0x104)?, 0x89AB_CDEF)?;
    equal("serial number, high", word(&*client, 0x108)?, 0x0123_4567)
}

fn read_only_bits_keep_their_values(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let before: [u8; 16] = read(&*client, CONFIG, 0)?;
    for offset in [0, 2, 8, 9, 10, 14] {
        write(&*client, CONFIG, offset, &[!before[offset as usize]])?;
    }
    equal("header", read(&*client, CONFIG, 0)?, before)?;
    // I/O space, memory space, bus master, interrupt disable can be set; reserved bits can't.
    write(&*client, CONFIG, 4, &0xFFFFu16.to_le_bytes())?;
    let command = half(&*client, 4)?;
    equal("bus master", command & 1 << 2, 1 << 2)?;
    equal("reserved bits", command & 0xF800, 0)
}

fn function_level_reset_resets(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let express = capability(&*client, 0x10)?.context("no Express")?;
    let capable = word(&*client, express + 4)? & 1 << 28;
    equal("FLR capable", capable, 1 << 28)?;
    set(&*client, SCRATCH, 0x1234)?;
    write(&*client, CONFIG, 4, &[0x06, 0])?;
    // Device control, bit 15: initiate FLR (PCI Express 4.0, 7.5.3.4).
    write(&*client, CONFIG, express + 8, &(1u16 << 15).to_le_bytes())?;
    equal("scratch", super::get(&*client, SCRATCH)?, 0)?;
    equal("last reset", super::get(&*client, LAST_RESET)?, 3)?;
    equal("command", half(&*client, 4)? & 0x06, 0)
}

fn reset_returns_defaults(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let before: Vec<u8> = read::<256>(&*client, CONFIG, 0)?.to_vec();
    write(&*client, CONFIG, 4, &[0x06, 0x04])?;
    write(&*client, CONFIG, 0x10, &0xFEBF_0000u32.to_le_bytes())?;
    write(&*client, CONFIG, 0x3C, &[11])?;
    client.reset()?;
    equal(
        "configuration space",
        read::<256>(&*client, CONFIG, 0)?.to_vec(),
        before,
    )
}
