// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `GET_INFO`, `GET_REGION_INFO` and `GET_IRQ_INFO`, which the kernel answers from the description.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::{
    Description, ABSENT, CONFIG, ERR, INTX, MEMORY, MIXED, MIXED_AREA, MSI, MSIX, READ_ONLY, REQ,
    TRAPPED, WRITE_ONLY,
};
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::sys;
use muser_e2e::vfio::{Area, Client, Road, REGION_SHIFT, VFIO_DEVICE_GET_REGION_INFO};
use vfio_bindings::bindings::vfio::{
    vfio_region_info, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_PLATFORM, VFIO_DEVICE_FLAGS_RESET,
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use super::topic;

topic!("info", once: [], roads: [
    device_info_is_that_of_pci,
    platform_info_counts_what_is_described,
    region_info_is_as_described,
    absent_region_has_size_0,
    region_capability_protocol_followed,
    irq_info_is_as_described,
    answered_with_no_process_attached,
]);

fn device_info_is_that_of_pci(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let info = works("GET_INFO", rig.client.info())?;
    let flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
    equal("flags", info.flags, flags)?;
    // VFIO_PCI_NUM_REGIONS and VFIO_PCI_NUM_IRQS of <linux/vfio.h>.
    equal(
        "regions and interrupts",
        (info.num_regions, info.num_irqs),
        (9, 5),
    )
}

fn platform_info_counts_what_is_described(road: Road) -> Result<()> {
    let rig = Rig::with(road, &Description::platform())?;
    let info = works("GET_INFO", rig.client.info())?;
    ensure!(
        info.flags & VFIO_DEVICE_FLAGS_PLATFORM != 0,
        "flags {:#x}",
        info.flags
    );
    ensure!(
        info.flags & VFIO_DEVICE_FLAGS_PCI == 0,
        "flags {:#x}",
        info.flags
    );
    equal(
        "regions and interrupts",
        (info.num_regions, info.num_irqs),
        (1, 1),
    )
}

fn region_info_is_as_described(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let (read, write) = (VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE);
    let mapped = VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;
    for (index, flags, size) in [
        (TRAPPED, read | write, 64 << 10),
        (MIXED, read | write | mapped, 16 << 10),
        (READ_ONLY, read, 4096),
        (WRITE_ONLY, write, 4096),
        (CONFIG, read | write, 256),
    ] {
        let info = works("GET_REGION_INFO", rig.client.region_info(index))?;
        equal(&format!("flags of region {index}"), info.flags, flags)?;
        equal(&format!("size of region {index}"), info.size, size)?;
        let offset = u64::from(index) << REGION_SHIFT;
        equal(&format!("offset of region {index}"), info.offset, offset)?;
    }
    let mixed = rig.client.region_info(MIXED)?;
    let areas = vec![Area {
        offset: MIXED_AREA.0,
        size: MIXED_AREA.1,
    }];
    equal("areas of the mixed region", mixed.areas, Some(areas))?;

    // A region that can be mapped as a whole may come without the capability.
    let memory = rig.client.region_info(MEMORY)?;
    ensure!(
        memory.flags & VFIO_REGION_INFO_FLAG_MMAP != 0,
        "flags {:#x}",
        memory.flags
    );
    let whole = vec![Area {
        offset: 0,
        size: 64 << 10,
    }];
    ensure!(
        memory.areas.is_none_or(|areas| areas == whole),
        "its areas are not the whole of it"
    );
    Ok(())
}

fn absent_region_has_size_0(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [ABSENT, 6, 8] {
        let info = works("GET_REGION_INFO", rig.client.region_info(index))?;
        equal(&format!("size of region {index}"), info.size, 0)?;
        equal(&format!("flags of region {index}"), info.flags, 0)?;
    }
    Ok(())
}

/// The kernel tells how much room it needs, leaves `cap_offset` at 0 until it is given, and never
/// writes beyond `argsz`.
fn region_capability_protocol_followed(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let least = size_of::<vfio_region_info>() as u32;
    let ask = |argsz: u32| -> Result<(u32, u32, u32)> {
        let mut bytes = vec![0; argsz as usize];
        bytes[0..4].copy_from_slice(&argsz.to_ne_bytes());
        bytes[8..12].copy_from_slice(&MIXED.to_ne_bytes());
        let asked = sys::ioctl_bytes(&rig.client, VFIO_DEVICE_GET_REGION_INFO, &mut bytes);
        works("GET_REGION_INFO", asked)?;
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Ok((word(0), word(4), word(12)))
    };
    let (needed, flags, cap) = ask(least)?;
    // Header, count and one area.
    ensure!(needed >= least + 16 + 16, "argsz grew to {needed} only");
    ensure!(
        flags & VFIO_REGION_INFO_FLAG_CAPS != 0,
        "no capability announced"
    );
    equal("cap_offset without room", cap, 0)?;
    let (_, _, cap) = ask(needed - 1)?;
    equal("cap_offset with a byte too little", cap, 0)?;
    let (_, _, cap) = ask(needed)?;
    ensure!(cap >= least, "cap_offset {cap} lies within the struct");
    let (_, _, cap) = ask(needed + 100)?;
    ensure!(cap >= least, "cap_offset {cap} lies within the struct");
    Ok(())
}

fn irq_info_is_as_described(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let eventfd = VFIO_IRQ_INFO_EVENTFD;
    for (index, count, flags) in [
        (
            INTX,
            1,
            eventfd | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
        ),
        (MSI, 8, eventfd | VFIO_IRQ_INFO_NORESIZE),
        (MSIX, 128, eventfd | VFIO_IRQ_INFO_MASKABLE),
        (ERR, 1, eventfd),
        (REQ, 1, eventfd),
    ] {
        let info = works("GET_IRQ_INFO", rig.client.irq_info(index))?;
        equal(&format!("flags of interrupt {index}"), info.flags, flags)?;
        equal(&format!("vectors of interrupt {index}"), info.count, count)?;
    }
    fails(
        "GET_IRQ_INFO of index 5",
        rig.client.irq_info(5),
        libc::EINVAL,
    )
}

fn answered_with_no_process_attached(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    drop(server);
    let client = works(
        "opening a device whose process is gone",
        Client::open(&mdev, road),
    )?;
    equal("regions", works("GET_INFO", client.info())?.num_regions, 9)?;
    equal(
        "size",
        works("GET_REGION_INFO", client.region_info(MIXED))?.size,
        16 << 10,
    )?;
    equal(
        "vectors",
        works("GET_IRQ_INFO", client.irq_info(MSIX))?.count,
        128,
    )
}
