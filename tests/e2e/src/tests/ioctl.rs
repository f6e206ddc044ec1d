// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malformed arguments of every ioctl of `/dev/muser/UUID`: each rule of the ABI that holds for all
//! of them, tried on all of them.

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, errno_of, fails, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, Server};
use muser_e2e::rig::Bare;
use muser_e2e::sys::{self, Mapping, PAGE};
use muser_uapi::*;
use zerocopy::IntoBytes;

use super::topic;

topic!("ioctl", once: [
    size_too_small_refused,
    larger_size_with_zero_tail_accepted,
    larger_size_with_other_tail_refused,
    size_above_4096_refused,
    unknown_flags_refused,
    reserved_fields_refused,
    bad_pointer_refused,
    struct_straddling_unmapped_memory_refused,
    array_straddling_unmapped_memory_refused,
    unknown_number_refused,
    unattached_refused,
    next_without_action_refused,
    trigger_beyond_description_refused,
    query_fills_the_arrays_it_is_given,
    query_with_too_little_room_tells_the_number,
    query_counts_what_happened,
    read_and_write_refused,
    open_read_only_cannot_attach,
], roads: []);

/// An ioctl with an argument that it accepts from an attached file.
struct Call {
    name: &'static str,
    number: u32,
    argument: Vec<u8>,
    /// Offsets of fields that must be zero.
    reserved: &'static [usize],
    /// Offset of the flags, if the caller has any.
    flags: Option<usize>,
}

/// Every ioctl but ATTACH, whose good argument is accepted only once.
fn calls() -> Vec<Call> {
    let next = muser_next {
        size: size_of::<muser_next>() as u32,
        flags: MUSER_NEXT_TAKE | MUSER_NEXT_NONBLOCK,
        ..Default::default()
    };
    let trigger = muser_trigger {
        size: size_of::<muser_trigger>() as u32,
        index: 1,
        ..Default::default()
    };
    let query = muser_query {
        size: size_of::<muser_query>() as u32,
        ..Default::default()
    };
    let dma = muser_dma {
        size: size_of::<muser_dma>() as u32,
        length: 1,
        ..Default::default()
    };
    let acquire = muser_dma {
        flags: MUSER_DMA_READ,
        ..dma
    };
    let copy = muser_dma_copy {
        size: size_of::<muser_dma_copy>() as u32,
        ..Default::default()
    };
    let doorbell = muser_doorbell {
        size: size_of::<muser_doorbell>() as u32,
        fd: -1,
        ..Default::default()
    };
    vec![
        Call {
            name: "DMA_ACQUIRE",
            number: MUSER_DMA_ACQUIRE,
            argument: acquire.as_bytes().to_vec(),
            reserved: &[],
            flags: Some(4),
        },
        Call {
            name: "DMA_RELEASE",
            number: MUSER_DMA_RELEASE,
            argument: dma.as_bytes().to_vec(),
            reserved: &[],
            flags: Some(4),
        },
        Call {
            name: "DMA_COPY",
            number: MUSER_DMA_COPY,
            argument: copy.as_bytes().to_vec(),
            reserved: &[20],
            flags: Some(4),
        },
        Call {
            name: "NEXT",
            number: MUSER_NEXT,
            argument: next.as_bytes().to_vec(),
            reserved: &[12],
            flags: Some(4),
        },
        Call {
            name: "TRIGGER",
            number: MUSER_TRIGGER,
            argument: trigger.as_bytes().to_vec(),
            reserved: &[],
            flags: Some(4),
        },
        Call {
            name: "DOORBELL",
            number: MUSER_DOORBELL,
            argument: doorbell.as_bytes().to_vec(),
            reserved: &[],
            flags: Some(4),
        },
        Call {
            name: "QUERY",
            number: MUSER_QUERY,
            argument: query.as_bytes().to_vec(),
            reserved: &[],
            flags: None,
        },
    ]
}

/// ATTACH, with an argument that it accepts from a file that is not attached.
fn attach(description: &Description) -> Call {
    Call {
        name: "ATTACH",
        number: MUSER_ATTACH,
        argument: description.argument().as_bytes().to_vec(),
        reserved: &[76],
        flags: Some(8),
    }
}

/// Tries `change` on every ioctl, and hands the result of each to `judge`.
fn on_each(
    change: impl Fn(&Call) -> Vec<u8>,
    judge: impl Fn(&Call, std::io::Result<i32>) -> Result<()>,
) -> Result<()> {
    let Bare { server, mdev } = Bare::with(&Description::with_doorbells())?;
    for call in calls() {
        let result = sys::ioctl_bytes(server.node(), call.number, &mut change(&call));
        judge(&call, result)?;
    }
    drop(server);
    let description = Description::with_doorbells();
    let call = attach(&description);
    let node = Node::open(&mdev)?;
    judge(
        &call,
        sys::ioctl_bytes(&node, call.number, &mut change(&call)),
    )
}

/// What a good argument gives: a take without a request in the queue has nothing to give, and
/// without a client there is no memory to pin.
fn accepted(call: &Call, result: std::io::Result<i32>) -> Result<()> {
    match call.number {
        MUSER_NEXT => return fails(call.name, result, libc::EAGAIN),
        MUSER_DMA_ACQUIRE => return fails(call.name, result, libc::EFAULT),
        _ => {}
    }
    works(call.name, result).map(drop)
}

fn with_size(call: &Call, size: u32, bytes: usize) -> Vec<u8> {
    let mut argument = call.argument.clone();
    argument.resize(bytes, 0);
    argument[..4].copy_from_slice(&size.to_ne_bytes());
    argument
}

fn size_too_small_refused() -> Result<()> {
    for less in [1, 4, 8] {
        on_each(
            |call| {
                let len = call.argument.len();
                with_size(call, len as u32 - less, len)
            },
            |call, result| {
                fails(
                    &format!("{} {less} too short", call.name),
                    result,
                    libc::EINVAL,
                )
            },
        )?;
    }
    for size in [0, 1, 4, 7] {
        on_each(
            |call| with_size(call, size, call.argument.len()),
            |call, result| fails(&format!("{} of {size}", call.name), result, libc::EINVAL),
        )?;
    }
    Ok(())
}

fn larger_size_with_zero_tail_accepted() -> Result<()> {
    for size in [256, 1000, 4096] {
        on_each(|call| with_size(call, size, size as usize), accepted)?;
    }
    on_each(
        |call| {
            let len = call.argument.len() + 1;
            with_size(call, len as u32, len)
        },
        accepted,
    )
}

fn larger_size_with_other_tail_refused() -> Result<()> {
    // The first and the last byte of the tail, so that no scan stops short.
    for at_end in [false, true] {
        on_each(
            |call| {
                let mut argument = with_size(call, 512, 512);
                let at = if at_end { 511 } else { call.argument.len() };
                argument[at] = 1;
                argument
            },
            |call, result| fails(&format!("{} with a tail", call.name), result, libc::E2BIG),
        )?;
    }
    Ok(())
}

fn size_above_4096_refused() -> Result<()> {
    for size in [4097, 8192, u32::MAX] {
        on_each(
            |call| with_size(call, size, 8192),
            |call, result| fails(&format!("{} of {size}", call.name), result, libc::E2BIG),
        )?;
    }
    Ok(())
}

fn unknown_flags_refused() -> Result<()> {
    for bit in [3, 8, 31] {
        on_each(
            |call| {
                let mut argument = call.argument.clone();
                if let Some(at) = call.flags {
                    argument[at + bit / 8] |= 1 << (bit % 8);
                }
                argument
            },
            |call, result| match call.flags {
                Some(_) => fails(
                    &format!("{} with flag {bit}", call.name),
                    result,
                    libc::EINVAL,
                ),
                None => accepted(call, result),
            },
        )?;
    }
    Ok(())
}

fn reserved_fields_refused() -> Result<()> {
    on_each(
        |call| {
            let mut argument = call.argument.clone();
            for &at in call.reserved {
                argument[at] = 1;
            }
            argument
        },
        |call, result| match call.reserved {
            [] => accepted(call, result),
            _ => fails(&format!("{} with padding", call.name), result, libc::EINVAL),
        },
    )
}

fn every_number(act: impl Fn(&Node, u32) -> Result<()>) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    for number in [MUSER_NEXT, MUSER_TRIGGER, MUSER_QUERY] {
        act(server.node(), number).with_context(|| format!("ioctl {number:#x}"))?;
    }
    drop(server);
    act(&Node::open(&mdev)?, MUSER_ATTACH).context("ATTACH")
}

fn bad_pointer_refused() -> Result<()> {
    every_number(|node, number| {
        fails("null", sys::ioctl_value(node, number, 0), libc::EFAULT)?;
        fails(
            "the last page",
            sys::ioctl_value(node, number, -4096),
            libc::EFAULT,
        )?;
        fails(
            "an odd address",
            sys::ioctl_value(node, number, 3),
            libc::EFAULT,
        )
    })
}

fn struct_straddling_unmapped_memory_refused() -> Result<()> {
    let memory = Mapping::with_hole(PAGE)?;
    every_number(|node, number| {
        for accessible in [1, 4, 8, 12] {
            // The size is readable where it is, and true; what follows is not there.
            let at = PAGE - accessible;
            memory.write_bytes(at, &4096u32.to_ne_bytes()[..accessible.min(4)]);
            let result = sys::ioctl_at(node, number, &memory, at);
            fails(
                &format!("{accessible} accessible bytes"),
                result,
                libc::EFAULT,
            )?;
        }
        Ok(())
    })
}

fn array_straddling_unmapped_memory_refused() -> Result<()> {
    let memory = Mapping::with_hole(PAGE)?;
    let description = Description::pci();
    let mdev = Mdev::create(Type::Pci)?;
    let node = Node::open(&mdev)?;
    memory.write_bytes(PAGE - 24, description.regions[0].as_bytes());
    let bad = [
        memory.address() + (PAGE - 24) as u64,
        memory.address() + PAGE as u64,
        0,
        u64::MAX,
    ];
    for address in bad {
        let change: [fn(&mut muser_attach, u64); 3] =
            [|a, p| a.regions = p, |a, p| a.areas = p, |a, p| a.irqs = p];
        for (which, change) in change.into_iter().enumerate() {
            let mut argument = description.argument();
            change(&mut argument, address);
            let result = sys::ioctl(&node, MUSER_ATTACH, &mut argument);
            fails(
                &format!("array {which} at {address:#x}"),
                result,
                libc::EFAULT,
            )?;
        }
    }
    node.attach_raw(&description)?;
    // The same for the arrays that QUERY fills.
    for address in bad {
        let mut query = muser_query {
            size: size_of::<muser_query>() as u32,
            num_regions: 32,
            regions: address,
            ..Default::default()
        };
        let result = sys::ioctl(&node, MUSER_QUERY, &mut query);
        fails(&format!("QUERY into {address:#x}"), result, libc::EFAULT)?;
    }
    Ok(())
}

fn unknown_number_refused() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    let with_size = |nr: u32| nr | 16 << 16 | 3 << 30;
    let tcgets = 0x5401;
    for number in [
        MUSER_DOORBELL + 1,
        MUSER_QUERY + 100,
        with_size(MUSER_NEXT),
        tcgets,
        0,
        u32::MAX,
    ] {
        let result = sys::ioctl_bytes(server.node(), number, &mut [0; 256]);
        fails(&format!("ioctl {number:#x}"), result, libc::ENOTTY)?;
    }
    Ok(())
}

fn unattached_refused() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let other = Node::open(&mdev)?;
    let refuse = |when: &str| -> Result<()> {
        for call in calls() {
            let result = sys::ioctl_bytes(&other, call.number, &mut call.argument.clone());
            match call.number {
                MUSER_QUERY => works("QUERY", result).map(drop)?,
                _ => fails(&format!("{} {when}", call.name), result, libc::ENOTCONN)?,
            }
        }
        Ok(())
    };
    refuse("beside the attached file")?;
    drop(server);
    refuse("with no file attached")
}

fn next_without_action_refused() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    for flags in [0, MUSER_NEXT_NONBLOCK] {
        let size = size_of::<muser_next>() as u32;
        let mut next = muser_next {
            size,
            flags,
            ..Default::default()
        };
        fails(
            "NEXT without REPLY and TAKE",
            server.node().next(&mut next),
            libc::EINVAL,
        )?;
    }
    Ok(())
}

fn trigger_beyond_description_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut description = Description::pci();
    description.irqs.remove(3);
    let server = Server::attach(&mdev, &description)?;
    for index in [3, 5, 31, 32, u32::MAX] {
        fails(
            &format!("index {index}"),
            server.trigger(index, 0, 1),
            libc::ENXIO,
        )?;
    }
    for (index, start, vectors) in [
        (0, 1, 1),
        (0, 0, 2),
        (1, 8, 1),
        (1, 0, 1 << 8),
        (1, 7, 2),
        (2, 127, 2),
        (2, u32::MAX, 1),
    ] {
        let result = server.trigger(index, start, vectors);
        fails(
            &format!("index {index}, bits {vectors:#x} from {start}"),
            result,
            libc::ENOSPC,
        )?;
    }
    works("no vectors at all", server.trigger(1, 0, 0))?;
    for index in [1, 2] {
        fails(
            "lowering an edge",
            server.lower(index, 0, 1),
            libc::EOPNOTSUPP,
        )?;
    }
    works("lowering a line", server.lower(0, 0, 1)).map(drop)
}

/// What QUERY gives with room for so many regions, areas and interrupts.
struct Queried {
    query: muser_query,
    regions: Vec<muser_region>,
    areas: Vec<muser_area>,
    irqs: Vec<muser_irq_state>,
}

fn query_arrays(node: &Node, rooms: [usize; 3]) -> Result<Queried> {
    let mut regions = vec![muser_region::default(); rooms[0]];
    let mut areas = vec![muser_area::default(); rooms[1]];
    let mut irqs = vec![muser_irq_state::default(); rooms[2]];
    let mut query = muser_query {
        size: size_of::<muser_query>() as u32,
        num_regions: rooms[0] as u32,
        num_areas: rooms[1] as u32,
        num_irqs: rooms[2] as u32,
        regions: regions.as_mut_ptr().expose_provenance() as u64,
        areas: areas.as_mut_ptr().expose_provenance() as u64,
        irqs: irqs.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    works("QUERY", sys::ioctl(node, MUSER_QUERY, &mut query))?;
    Ok(Queried {
        query,
        regions,
        areas,
        irqs,
    })
}

fn query_fills_the_arrays_it_is_given() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let other = Node::open(&mdev)?;
    let description = Description::pci();
    let Queried {
        query,
        regions,
        areas,
        irqs,
    } = query_arrays(&other, [6, 2, 5])?;
    equal(
        "state",
        query.flags,
        MUSER_STATE_ATTACHED | MUSER_STATE_DESCRIBED,
    )?;
    equal("version", query.version, MUSER_ABI_VERSION)?;
    equal("bus", query.bus, MUSER_BUS_PCI)?;
    equal("pid", query.pid, std::process::id())?;
    equal("regions", regions, description.regions)?;
    equal("areas", areas, description.areas)?;
    let described: Vec<_> = irqs.iter().map(|state| state.irq).collect();
    equal("interrupts", described, description.irqs)?;
    drop(server);
    let query = other.query()?;
    equal(
        "state after the process",
        query.flags,
        MUSER_STATE_DESCRIBED,
    )?;
    equal("pid after the process", query.pid, 0)
}

fn query_with_too_little_room_tells_the_number() -> Result<()> {
    let Bare {
        server,
        mdev: _mdev,
    } = Bare::new()?;
    let Queried {
        query,
        regions,
        areas,
        irqs,
    } = query_arrays(server.node(), [2, 0, 1])?;
    equal(
        "numbers",
        (query.num_regions, query.num_areas, query.num_irqs),
        (6, 2, 5),
    )?;
    let description = Description::pci();
    equal("regions", regions.as_slice(), &description.regions[..2])?;
    equal("areas", areas.len(), 0)?;
    equal("interrupt", irqs[0].irq, description.irqs[0])?;
    let Queried { query, regions, .. } = query_arrays(server.node(), [40; 3])?;
    equal("regions with room to spare", query.num_regions, 6)?;
    equal("what lies behind them", regions[6], muser_region::default())
}

fn query_counts_what_happened() -> Result<()> {
    let rig = muser_e2e::rig::Rig::new(muser_e2e::vfio::Road::Group)?;
    let event = rig.client.enable_irq(1, 0)?;
    for _ in 0..3 {
        rig.client.read_u32(0, 0)?;
    }
    rig.client.write_all(0, 0, &[1, 2])?;
    rig.client.read_u32(2, 0)?;
    rig.client.write_all(2, 0, &[1])?;
    rig.client.write_all(2, 4096, &[1])?;
    rig.client.reset()?;
    rig.server.trigger(1, 0, 1)?;
    equal("interrupts", event.take()?, 1)?;
    let query = rig.server.node().query()?;
    let counters = query.counters;
    equal("reads", counters.reads, 3)?;
    equal("writes", counters.writes, 1)?;
    equal("resets", counters.resets, 1)?;
    equal("memory_reads", counters.memory_reads, 1)?;
    equal("memory_writes", counters.memory_writes, 2)?;
    equal("interrupts", counters.interrupts, 1)?;
    equal("attachments", counters.attachments, 1)?;
    equal(
        "timeouts, replays, withdrawn",
        counters.timeouts + counters.replays + counters.withdrawn,
        0,
    )?;
    equal("queued and taken", (query.queued, query.taken), (0, 0))?;
    ensure!(
        query.memory_pages >= 1,
        "no page of device memory is counted"
    );
    ensure!(
        query.flags & MUSER_STATE_CLIENT != 0,
        "the client is not seen"
    );
    Ok(())
}

fn read_and_write_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut file = muser_e2e::vfio::open_rw(mdev.node())?;
    let einval = [libc::EINVAL, libc::ESPIPE];
    let read = std::io::Read::read(&mut file, &mut [0; 8]);
    muser_e2e::check::fails_as("read", read, &einval)?;
    let write = std::io::Write::write(&mut file, &[0; 8]);
    muser_e2e::check::fails_as("write", write, &einval)
}

fn open_read_only_cannot_attach() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let file = std::fs::File::open(mdev.node())?;
    let description = Description::pci();
    let mut argument = description.argument();
    match sys::ioctl(&file, MUSER_ATTACH, &mut argument) {
        // Attaching is all that a writable file allows beyond QUERY; should the module let a
        // read-only one do it, its slots can't be mapped for replies.
        Ok(_) => {
            let slots = Mapping::shared(&file, MUSER_MMAP_SLOTS, PAGE);
            fails("writable slots of a read-only file", slots, libc::EACCES)
        }
        Err(error) => {
            let errno = errno_of(&error);
            ensure!(
                [libc::EBADF, libc::EACCES].contains(&errno),
                "failed with errno {errno}"
            );
            Ok(())
        }
    }
}
