// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limits of a description: each is accepted at its maximum, and refused one above.

use anyhow::{bail, ensure, Result};
use muser_e2e::check::{equal, errno_name};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{area, irq, region, Description, Node, Server};
use muser_e2e::process;
use muser_e2e::sys;
use muser_e2e::vfio::{Client, Road};
use muser_uapi::*;

use super::topic;

topic!("limit", once: [
    most_regions_accepted_one_more_refused,
    most_areas_accepted_one_more_refused,
    most_irq_indexes_accepted_one_more_refused,
    most_vectors_accepted,
    most_slots_accepted_one_more_refused,
    largest_region_accepted,
    counts_near_2_32_refused,
], roads: []);

fn attach(description: &Description) -> Result<(Mdev, Server)> {
    let kind = if description.bus == MUSER_BUS_PLATFORM {
        Type::Platform
    } else {
        Type::Pci
    };
    let mdev = Mdev::create(kind)?;
    // Sparse terabytes may be described; what is charged is what is touched, up to max_memory.
    let server = Server::attach(&mdev, description)?;
    Ok((mdev, server))
}

/// Expects the limit's fault, at `place`: 0 regions, 1 areas, 2 interrupts, 3 slots.
fn beyond_limit(argument: &mut muser_attach, kind: Type, place: u32) -> Result<()> {
    let mdev = Mdev::create(kind)?;
    let node = Node::open(&mdev)?;
    match sys::ioctl(&node, MUSER_ATTACH, argument) {
        Ok(_) => bail!("{argument:?} was accepted"),
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(0);
            ensure!(
                errno == libc::ENOSPC,
                "{argument:?} gave {}",
                errno_name(errno)
            );
            equal("fault", argument.fault, MUSER_FAULT_LIMIT)?;
            equal("fault_index", argument.fault_index, place)
        }
    }
}

fn platform(regions: u32, irqs: u32) -> Description {
    Description {
        regions: (0..regions).map(|index| region(index, 4096)).collect(),
        irqs: (0..irqs).map(|index| irq(index, 1, 0)).collect(),
        ..Description::platform()
    }
}

fn most_regions_accepted_one_more_refused() -> Result<()> {
    let (mdev, _server) = attach(&platform(MUSER_MAX_REGIONS, 0))?;
    let client = Client::open(&mdev, Road::Group)?;
    equal("regions", client.info()?.num_regions, MUSER_MAX_REGIONS)?;
    let description = platform(MUSER_MAX_REGIONS + 1, 0);
    beyond_limit(&mut description.argument(), Type::Platform, 0)
}

fn most_areas_accepted_one_more_refused() -> Result<()> {
    let with_areas = |count: u32| Description {
        regions: vec![muser_region {
            num_areas: count,
            ..region(0, u64::from(MUSER_MAX_AREAS + 1) * 4096)
        }],
        areas: (0..u64::from(count))
            .map(|i| area(i * 4096, 4096))
            .collect(),
        ..Description::platform()
    };
    let (mdev, _server) = attach(&with_areas(MUSER_MAX_AREAS))?;
    let client = Client::open(&mdev, Road::Group)?;
    let areas = client.region_info(0)?.areas.map_or(0, |areas| areas.len());
    equal(
        "areas of the sparse-mmap capability",
        areas,
        MUSER_MAX_AREAS as usize,
    )?;
    let description = with_areas(MUSER_MAX_AREAS + 1);
    beyond_limit(&mut description.argument(), Type::Platform, 1)
}

fn most_irq_indexes_accepted_one_more_refused() -> Result<()> {
    let (mdev, _server) = attach(&platform(1, MUSER_MAX_IRQ_INDEXES))?;
    let client = Client::open(&mdev, Road::Group)?;
    equal(
        "interrupt indexes",
        client.info()?.num_irqs,
        MUSER_MAX_IRQ_INDEXES,
    )?;
    let description = platform(1, MUSER_MAX_IRQ_INDEXES + 1);
    beyond_limit(&mut description.argument(), Type::Platform, 2)
}

fn most_vectors_accepted() -> Result<()> {
    let description = Description {
        irqs: vec![irq(2, MUSER_MAX_IRQ_VECTORS, 0)],
        ..Description::minimal()
    };
    let (mdev, server) = attach(&description)?;
    let client = Client::open(&mdev, Road::Group)?;
    equal("vectors", client.irq_info(2)?.count, MUSER_MAX_IRQ_VECTORS)?;
    let last = client.enable_irq(2, MUSER_MAX_IRQ_VECTORS - 1)?;
    equal(
        "signalled",
        server.trigger(2, MUSER_MAX_IRQ_VECTORS - 1, 1)?,
        1,
    )?;
    equal("count", last.take()?, 1)
}

fn most_slots_accepted_one_more_refused() -> Result<()> {
    let slots = |slots| Description {
        slots,
        ..Description::minimal()
    };
    let (_mdev, server) = attach(&slots(MUSER_MAX_SLOTS))?;
    equal("slots", server.slots(), MUSER_MAX_SLOTS)?;
    // The last is mapped too, and nothing is in it.
    equal(
        "id in the last slot",
        server.request(MUSER_MAX_SLOTS - 1).head.id,
        0,
    )?;
    let description = slots(MUSER_MAX_SLOTS + 1);
    beyond_limit(&mut description.argument(), Type::Pci, 3)
}

fn largest_region_accepted() -> Result<()> {
    let mut description = Description::minimal();
    description
        .regions
        .insert(0, region(0, MUSER_MAX_REGION_SIZE));
    let (mdev, server) = attach(&description)?;
    let client = Client::open(&mdev, Road::Group)?;
    equal("size", client.region_info(0)?.size, MUSER_MAX_REGION_SIZE)?;
    let last = MUSER_MAX_REGION_SIZE - 1;
    process::scope(|scope| {
        let reader = scope.spawn(|| client.read_vec(0, last, 1));
        let request = server.take()?;
        equal("offset", request.head.offset, last)?;
        equal("count", request.head.count, 1)?;
        server.reply_data(request.slot, &[0x5A])?;
        let data = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))??;
        equal("data", data, vec![0x5A])
    })
}

fn counts_near_2_32_refused() -> Result<()> {
    let description = Description::minimal();
    let beyond = |place: u32, change: fn(&mut muser_attach, u32), count: u32| {
        let mut argument = description.argument();
        change(&mut argument, count);
        beyond_limit(&mut argument, Type::Pci, place)
    };
    for count in [u32::MAX, u32::MAX / 24 + 1, 1 << 31] {
        beyond(0, |argument, count| argument.num_regions = count, count)?;
        beyond(1, |argument, count| argument.num_areas = count, count)?;
        beyond(2, |argument, count| argument.num_irqs = count, count)?;
        beyond(3, |argument, count| argument.slots = count, count)?;
    }
    Ok(())
}
