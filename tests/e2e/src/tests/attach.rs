// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who may attach, when, and again; and each fault of a description, by its errno, its number and
//! its place.

use anyhow::{bail, ensure, Result};
use muser_e2e::check::{equal, errno_name, fails};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{area, irq, region, Description, Node, Server, TRAPPED};
use muser_e2e::sys::Mapping;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::*;

use super::topic;

topic!("attach", once: [
    minimal_description_accepted,
    platform_device_with_odd_regions_accepted,
    answer_says_version_and_slots,
    second_process_refused,
    same_file_again_refused,
    same_description_again_accepted,
    other_regions_later_refused,
    other_areas_later_refused,
    other_irqs_later_refused,
    refused_description_leaves_device_undescribed,
    closed_attachment_makes_room,
    detached_file_is_out,
    wrong_version_refused_and_told,
    bad_bus_refused,
    bad_region_index_refused,
    bad_region_flags_refused,
    bad_region_size_refused,
    region_beyond_2_40_refused,
    bad_area_count_refused,
    bad_area_flags_refused,
    misaligned_area_refused,
    area_beyond_region_refused,
    overlapping_area_refused,
    bad_irq_index_refused,
    bad_irq_flags_refused,
    bad_irq_count_refused,
    missing_config_space_refused,
    areas_beyond_max_memory_refused,
    unattached_file_cannot_map,
], roads: []);

/// Expects an attach with this description to be refused for this fault.
fn refused(
    description: &Description,
    errno: i32,
    fault: u32,
    fault_index: Option<u32>,
) -> Result<()> {
    let kind = if description.bus == MUSER_BUS_PLATFORM {
        Type::Platform
    } else {
        Type::Pci
    };
    let mdev = Mdev::create(kind)?;
    refused_by(&Node::open(&mdev)?, description, errno, fault, fault_index)
}

fn refused_by(
    node: &Node,
    description: &Description,
    errno: i32,
    fault: u32,
    fault_index: Option<u32>,
) -> Result<()> {
    match node.attach_raw(description) {
        Ok(_) => bail!(
            "accepted, expected {} and fault {fault}: {description:?}",
            errno_name(errno)
        ),
        Err(refusal) => {
            let right = refusal.errno == errno && refusal.fault == fault;
            let place = fault_index.is_none_or(|index| index == refusal.fault_index);
            ensure!(
                right && place,
                "{refusal}; expected {}, fault {fault} at {fault_index:?}: {description:?}",
                errno_name(errno)
            );
            Ok(())
        }
    }
}

/// A change to one of the description's parts.
fn changed(change: impl FnOnce(&mut Description)) -> Description {
    let mut description = Description::pci();
    change(&mut description);
    description
}

fn minimal_description_accepted() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    Server::attach(&mdev, &Description::minimal()).map(drop)
}

fn platform_device_with_odd_regions_accepted() -> Result<()> {
    let mdev = Mdev::create(Type::Platform)?;
    let description = Description {
        regions: vec![region(0, 1), region(7, 0x1235), region(31, 4097)],
        irqs: vec![irq(0, 1, 0), irq(31, 3, MUSER_IRQ_MASKABLE)],
        ..Description::platform()
    };
    Server::attach(&mdev, &description).map(drop)
}

fn answer_says_version_and_slots() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let node = Node::open(&mdev)?;
    let answer = node.attach_raw(&Description {
        slots: 5,
        ..Description::pci()
    })?;
    equal("version", answer.version, MUSER_ABI_VERSION)?;
    equal("slots", answer.slots, 5)?;
    equal("fault", answer.fault, MUSER_FAULT_NONE)?;
    let least = size_of::<muser_slot>() as u32 + MUSER_SLOT_DATA;
    ensure!(
        answer.slot_stride >= least,
        "slots of {} bytes overlap",
        answer.slot_stride
    );
    equal("slot_stride % 8", answer.slot_stride % 8, 0)?;

    let mdev = Mdev::create(Type::Pci)?;
    let answer = Node::open(&mdev)?.attach_raw(&Description::pci())?;
    equal("slots by default", answer.slots, MUSER_DEFAULT_SLOTS)
}

fn second_process_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let _server = Server::attach(&mdev, &Description::pci())?;
    let other = Node::open(&mdev)?;
    refused_by(
        &other,
        &Description::pci(),
        libc::EBUSY,
        MUSER_FAULT_ATTACHED,
        None,
    )
}

fn same_file_again_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &Description::pci())?;
    let again = MUSER_FAULT_ATTACHED_SELF;
    refused_by(
        server.node(),
        &Description::pci(),
        libc::EISCONN,
        again,
        None,
    )
}

fn same_description_again_accepted() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    for _ in 0..3 {
        drop(Server::attach(&mdev, &Description::pci())?);
    }
    // Slots belong to the attachment, not to the device.
    let server = Server::attach(
        &mdev,
        &Description {
            slots: 3,
            ..Description::pci()
        },
    )?;
    equal("slots", server.slots(), 3)
}

/// Describes a device, goes away, and attaches with a changed description.
fn stale(kind: u32, place: u32, change: impl FnOnce(&mut Description)) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    drop(Server::attach(&mdev, &Description::pci())?);
    let node = Node::open(&mdev)?;
    refused_by(
        &node,
        &changed(change),
        libc::ESTALE,
        MUSER_FAULT_DIFFERS,
        Some(kind << 16 | place),
    )?;
    node.attach_raw(&Description::pci())?;
    Ok(())
}

fn other_regions_later_refused() -> Result<()> {
    stale(0, 0, |description| description.regions[0].size += 4096)?;
    stale(0, 0, |description| {
        description.regions.retain(|region| region.index != 0)
    })?;
    stale(0, 3, |description| {
        description.regions[3].flags |= MUSER_REGION_WRITE
    })
}

fn other_areas_later_refused() -> Result<()> {
    stale(1, 0, |description| description.areas[0].size -= 4096)?;
    stale(1, 0, |description| description.areas[0].offset -= 4096)?;
    stale(1, 1, |description| description.areas[1].size -= 4096)
}

fn other_irqs_later_refused() -> Result<()> {
    stale(2, 2, |description| description.irqs[2].count += 1)?;
    stale(2, 4, |description| description.irqs.truncate(4))?;
    stale(2, 1, |description| {
        description.irqs[1].flags |= MUSER_IRQ_MASKABLE
    })
}

fn refused_description_leaves_device_undescribed() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let node = Node::open(&mdev)?;
    let bad = changed(|description| description.regions[0].size = 0);
    refused_by(&node, &bad, libc::EINVAL, MUSER_FAULT_REGION_SIZE, Some(0))?;
    let query = node.query()?;
    equal("state", query.flags & MUSER_STATE_DESCRIBED, 0)?;
    equal("regions", query.num_regions, 0)?;
    node.attach_raw(&Description::pci())?;
    Ok(())
}

fn closed_attachment_makes_room() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let waiting = Node::open(&mdev)?;
    let server = Server::attach(&mdev, &Description::pci())?;
    let full = MUSER_FAULT_ATTACHED;
    refused_by(&waiting, &Description::pci(), libc::EBUSY, full, None)?;
    drop(server);
    waiting.attach_raw(&Description::pci())?;
    Ok(())
}

fn detached_file_is_out() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &Description::pci())?;
    let client = Client::open(&mdev, Road::Group)?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| client.read_u32(TRAPPED, 0));
        let request = server.take()?;
        let waiting = scope.spawn(|| server.take_with(0));
        let detach = || muser_e2e::sys::ioctl_bytes(server.node(), MUSER_DETACH, &mut [0; 8]);
        detach()?;
        let woken = waiting
            .join()
            .map_err(|_| anyhow::anyhow!("the taker panicked"))?;
        fails("a take that waited", woken.map(drop), libc::ENOTCONN)?;
        fails("a reply", server.reply(request.slot, 0), libc::ENOTCONN)?;
        fails("a trigger", server.trigger(0, 0, 1), libc::ENOTCONN)?;
        fails("another detach", detach(), libc::ENOTCONN)?;
        let again = MUSER_FAULT_ATTACHED_SELF;
        refused_by(
            server.node(),
            &Description::pci(),
            libc::EISCONN,
            again,
            None,
        )?;

        let next = Server::attach(&mdev, &Description::pci())?;
        let replay = next.take()?;
        equal("flags", replay.head.flags, MUSER_REQUEST_REPLAY)?;
        equal("id", replay.head.id, request.head.id)?;
        next.reply_data(replay.slot, &[4, 3, 2, 1])?;
        let value = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        equal("the client's answer", value?, 0x0102_0304)
    })
}

fn wrong_version_refused_and_told() -> Result<()> {
    for version in [0, MUSER_ABI_VERSION + 1, u32::MAX] {
        let description = changed(|description| description.version = version);
        refused(&description, libc::EPROTO, MUSER_FAULT_VERSION, None)?;
    }
    let mdev = Mdev::create(Type::Pci)?;
    let description = changed(|description| description.version = 77);
    let mut attach = description.argument();
    let node = Node::open(&mdev)?;
    fails(
        "attach",
        muser_e2e::sys::ioctl(&node, MUSER_ATTACH, &mut attach),
        libc::EPROTO,
    )?;
    equal("the module's version", attach.version, MUSER_ABI_VERSION)
}

fn bad_bus_refused() -> Result<()> {
    let bus = |bus| changed(|description| description.bus = bus);
    refused(&bus(0), libc::EINVAL, MUSER_FAULT_BUS, None)?;
    refused(&bus(3), libc::EINVAL, MUSER_FAULT_BUS, None)?;
    // A PCI description for a device of the platform type, and the other way round.
    let platform = Mdev::create(Type::Platform)?;
    let pci = Mdev::create(Type::Pci)?;
    let (einval, fault) = (libc::EINVAL, MUSER_FAULT_BUS);
    refused_by(
        &Node::open(&platform)?,
        &Description::pci(),
        einval,
        fault,
        None,
    )?;
    refused_by(
        &Node::open(&pci)?,
        &Description::platform(),
        einval,
        fault,
        None,
    )
}

fn bad_region_index_refused() -> Result<()> {
    let fault = MUSER_FAULT_REGION_INDEX;
    // PCI has 9 regions: VFIO_PCI_NUM_REGIONS in <linux/vfio.h>.
    let beyond = changed(|description| description.regions.push(region(9, 4096)));
    refused(&beyond, libc::EINVAL, fault, Some(6))?;
    let twice = changed(|description| description.regions[1].index = 0);
    refused(&twice, libc::EINVAL, fault, Some(1))?;
    let falling = changed(|description| description.regions.swap(3, 4));
    refused(&falling, libc::EINVAL, fault, Some(4))?;
    let platform = Description {
        regions: vec![region(MUSER_MAX_REGIONS, 4096)],
        ..Description::platform()
    };
    refused(&platform, libc::EINVAL, fault, Some(0))
}

fn bad_region_flags_refused() -> Result<()> {
    for flags in [0, 1 << 2, MUSER_REGION_READ | 1 << 31] {
        let description = changed(|description| description.regions[2].flags = flags);
        refused(
            &description,
            libc::EINVAL,
            MUSER_FAULT_REGION_FLAGS,
            Some(2),
        )?;
    }
    let reserved = changed(|description| description.regions[3].reserved = 1);
    refused(&reserved, libc::EINVAL, MUSER_FAULT_REGION_FLAGS, Some(3))
}

fn bad_region_size_refused() -> Result<()> {
    let empty = changed(|description| description.regions[3].size = 0);
    refused(&empty, libc::EINVAL, MUSER_FAULT_REGION_SIZE, Some(3))?;
    for size in [1, 64, 255, 257, 512, 4095, 4097, 8192] {
        let config = changed(|description| description.regions[5].size = size);
        refused(&config, libc::EINVAL, MUSER_FAULT_REGION_SIZE, Some(5))?;
    }
    Ok(())
}

fn region_beyond_2_40_refused() -> Result<()> {
    for size in [MUSER_MAX_REGION_SIZE + 1, 1 << 41, u64::MAX] {
        let description = changed(|description| description.regions[0].size = size);
        refused(
            &description,
            libc::EOVERFLOW,
            MUSER_FAULT_REGION_OVERFLOW,
            Some(0),
        )?;
    }
    Ok(())
}

fn bad_area_count_refused() -> Result<()> {
    let fault = MUSER_FAULT_AREA_COUNT;
    let few = changed(|description| description.regions[1].num_areas = 0);
    refused(&few, libc::EINVAL, fault, None)?;
    let many = changed(|description| description.regions[2].num_areas = 2);
    refused(&many, libc::EINVAL, fault, Some(2))?;
    let huge = changed(|description| description.regions[2].num_areas = u32::MAX);
    refused(&huge, libc::EINVAL, fault, Some(2))
}

fn bad_area_flags_refused() -> Result<()> {
    let both = MUSER_AREA_MMAP | MUSER_AREA_DOORBELL;
    for flags in [0, 1 << 2, both, MUSER_AREA_MMAP | 1 << 2, u32::MAX] {
        let description = changed(|description| description.areas[1].flags = flags);
        refused(&description, libc::EINVAL, MUSER_FAULT_AREA_FLAGS, Some(1))?;
    }
    let reserved = changed(|description| description.areas[0].reserved = 1);
    refused(&reserved, libc::EINVAL, MUSER_FAULT_AREA_FLAGS, Some(0))
}

fn misaligned_area_refused() -> Result<()> {
    for (offset, size) in [(4096, 0), (4095, 4096), (1, 8192), (4096, 4097), (4096, 1)] {
        let description = changed(|description| description.areas[0] = area(offset, size));
        refused(&description, libc::EINVAL, MUSER_FAULT_AREA_ALIGN, Some(0))?;
    }
    Ok(())
}

fn area_beyond_region_refused() -> Result<()> {
    let last_page = u64::MAX - 4095;
    for (offset, size) in [
        (16 << 10, 4096),
        (12 << 10, 8192),
        (last_page, 4096),
        (4096, last_page),
        (0, last_page),
    ] {
        let description = changed(|description| description.areas[0] = area(offset, size));
        refused(
            &description,
            libc::EOVERFLOW,
            MUSER_FAULT_AREA_OVERFLOW,
            Some(0),
        )?;
    }
    Ok(())
}

fn overlapping_area_refused() -> Result<()> {
    for second in [area(0, 8192), area(4096, 4096), area(0, 4096)] {
        let description = changed(|description| {
            description.regions[1].num_areas = 2;
            description.areas = vec![area(4096, 8192), second, area(0, 64 << 10)];
        });
        refused(
            &description,
            libc::EEXIST,
            MUSER_FAULT_AREA_OVERLAP,
            Some(1),
        )?;
    }
    // Neighbours are fine.
    let mdev = Mdev::create(Type::Pci)?;
    let neighbours = changed(|description| {
        description.regions[1].num_areas = 2;
        description.areas = vec![area(4096, 4096), area(8192, 4096), area(0, 64 << 10)];
    });
    Server::attach(&mdev, &neighbours).map(drop)
}

fn bad_irq_index_refused() -> Result<()> {
    let fault = MUSER_FAULT_IRQ_INDEX;
    // PCI has 5 interrupt indexes: VFIO_PCI_NUM_IRQS in <linux/vfio.h>.
    let beyond = changed(|description| description.irqs.push(irq(5, 1, 0)));
    refused(&beyond, libc::EINVAL, fault, Some(5))?;
    let twice = changed(|description| description.irqs[1].index = 0);
    refused(&twice, libc::EINVAL, fault, Some(1))?;
    let platform = Description {
        irqs: vec![irq(MUSER_MAX_IRQ_INDEXES, 1, 0)],
        ..Description::platform()
    };
    refused(&platform, libc::EINVAL, fault, Some(0))
}

fn bad_irq_flags_refused() -> Result<()> {
    let fault = MUSER_FAULT_IRQ_FLAGS;
    let automasked = MUSER_IRQ_EVENTFD | MUSER_IRQ_AUTOMASKED;
    for flags in [1 << 4, u32::MAX, automasked] {
        let description = changed(|description| description.irqs[1].flags = flags);
        refused(&description, libc::EINVAL, fault, Some(1))?;
    }
    let reserved = changed(|description| description.irqs[2].reserved = 1);
    refused(&reserved, libc::EINVAL, fault, Some(2))
}

fn bad_irq_count_refused() -> Result<()> {
    for count in [0, MUSER_MAX_IRQ_VECTORS + 1, u32::MAX] {
        let description = changed(|description| description.irqs[2].count = count);
        refused(&description, libc::ENOSPC, MUSER_FAULT_IRQ_COUNT, Some(2))?;
    }
    Ok(())
}

fn missing_config_space_refused() -> Result<()> {
    let description = changed(|description| description.regions.truncate(5));
    refused(&description, libc::EINVAL, MUSER_FAULT_NO_CONFIG, None)?;
    let nothing = Description {
        regions: Vec::new(),
        ..Description::minimal()
    };
    refused(&nothing, libc::EINVAL, MUSER_FAULT_NO_CONFIG, None)
}

fn areas_beyond_max_memory_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let total: u64 = Description::pci().areas.iter().map(|area| area.size).sum();
    mdev.set_attribute("max_memory", &(total - 4096).to_string())?;
    let node = Node::open(&mdev)?;
    refused_by(
        &node,
        &Description::pci(),
        libc::ENOSPC,
        MUSER_FAULT_MEMORY,
        None,
    )?;
    mdev.set_attribute("max_memory", &total.to_string())?;
    node.attach_raw(&Description::pci())?;
    Ok(())
}

fn unattached_file_cannot_map() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let _server = Server::attach(&mdev, &Description::pci())?;
    let other = Node::open(&mdev)?;
    let slots = Mapping::shared(&other, MUSER_MMAP_SLOTS, 4096);
    fails("mapping slots without attachment", slots, libc::ENOTCONN)?;
    fails(
        "mapping device memory without attachment",
        other.map(2, 0, 4096),
        libc::ENOTCONN,
    )?;
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    let status = Mapping::new(&other, MUSER_MMAP_STATUS, 4096, read, shared);
    fails(
        "mapping the status without attachment",
        status,
        libc::ENOTCONN,
    )
}
