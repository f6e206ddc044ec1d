// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each allocation and each copy of each operation fails once: with a clear errno, without a leak
//! (kmemleak looks for those when all tests are over), and the device works afterwards.
//!
//! Not reached this way: what the module does in other tasks than the caller's (the eventfd that
//! unmasks a line, an unmap forced after its time), none of which allocates. And `create` is left
//! out: where it fails in VFIO's core, `vfio_create_group` frees a group that it has just made, and
//! `vfio_group_release` warns that the group still has its IOMMU group. That is upstream's, and a
//! warning must fail a run.

use std::cell::Cell;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::Result;
use muser_e2e::check::{equal, works};
use muser_e2e::fault::Failures;
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{area, region, Description, Node, Server, INTX, MEMORY, MSIX, TRAPPED};
use muser_e2e::rig::{Bare, DmaRig, Rig, BASE};
use muser_e2e::sys::{self, pwrite_at, EventFd, Mapping, Segment, PAGE};
use muser_e2e::vfio::{Client, IrqData, IrqSet, Road};
use muser_uapi::*;

use crate::runner::Test;

/// The tests of this topic.
pub(super) fn tests() -> Vec<Test> {
    let once = super::list(
        &[
            ("faults::opening_a_node", opening_a_node),
            ("faults::attaching", attaching),
            ("faults::ioctls_of_the_process", ioctls_of_the_process),
            ("faults::mappings_of_the_process", mappings_of_the_process),
        ],
        &[
            ("faults::opening_a_client", opening_a_client),
            ("faults::what_the_kernel_answers", what_the_kernel_answers),
            ("faults::requests", requests),
            ("faults::device_memory", device_memory),
            ("faults::interrupts", interrupts),
        ],
    );
    once.into_iter()
        .chain(super::dma_roads("faults::dma", dma))
        .map(|test| test.long(8).injecting())
        .collect()
}

/// What an operation may fail with: no memory, or a copy that did not work.
const CLEAR: &[i32] = &[libc::ENOMEM, libc::EFAULT];

/// A device whose [`MEMORY`] has a page for each time that one is touched first.
fn roomy() -> Description {
    let mut description = Description::pci();
    let size = 8 << 20;
    if let Some(memory) = description
        .regions
        .iter_mut()
        .find(|region| region.index == MEMORY)
    {
        *memory = muser_region {
            num_areas: 1,
            ..region(MEMORY, size)
        };
    }
    if let Some(last) = description.areas.last_mut() {
        *last = area(0, size);
    }
    description.state_size = PAGE as u32;
    description
}

/// Nothing that an operation is done with anew.
fn nothing() -> Result<()> {
    Ok(())
}

fn opening_a_node() -> Result<()> {
    let bare = Bare::new()?;
    let failures = Failures::new()?;
    // The file system's own: a name not looked up again, a file too many.
    let errnos = [libc::ENOMEM, libc::EFAULT, libc::ENFILE];
    let open = |()| Node::open(&bare.mdev);
    failures.each("open", &errnos, nothing, |&()| open(()))?;
    works("query", bare.server.node().query()).map(drop)
}

fn attaching() -> Result<()> {
    let failures = Failures::new()?;
    let description = roomy();
    let fresh = || {
        let mdev = Mdev::create(Type::Pci)?;
        let node = Node::open(&mdev)?;
        Ok((node, mdev))
    };
    let attach = |node: &Node| {
        let refused = |refusal: muser_e2e::node::Refusal| {
            // A failure is no fault of the description.
            io::Error::from_raw_os_error(if refusal.fault == MUSER_FAULT_NONE {
                refusal.errno
            } else {
                libc::EPROTO
            })
        };
        match node.attach_raw(&description) {
            Ok(_) => Ok(()),
            // The last thing that can fail is to tell of the success.
            Err(refusal) if refusal.fault == MUSER_FAULT_ATTACHED_SELF => Ok(()),
            Err(refusal) => Err(refused(refusal)),
        }
    };
    failures.each("attach", CLEAR, fresh, |(node, _mdev)| attach(node))?;
    // Now to a device that has its description, and to one that may differ.
    let mdev = Mdev::create(Type::Pci)?;
    drop(Server::attach(&mdev, &description)?);
    let fresh = || Ok(Node::open(&mdev)?);
    failures.each("attach again", CLEAR, fresh, attach)?;
    Ok(())
}

fn ioctls_of_the_process() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let server = Server::attach(&mdev, &Description::with_doorbells())?;
    let failures = Failures::new()?;
    let node = server.node();
    let check = |what: &str, act: &dyn Fn() -> io::Result<()>| {
        failures.each(what, CLEAR, nothing, |&()| act()).map(drop)
    };
    check("query", &|| node.query().map(drop))?;
    check("query of interrupts", &|| node.irq_state(0).map(drop))?;
    check("trigger", &|| node.trigger(0, MSIX, 0, 3).map(drop))?;
    let event = EventFd::new()?;
    check("doorbell", &|| node.doorbell(0, event.as_raw_fd()))?;
    check("no doorbell", &|| node.doorbell(0, -1))?;
    check("next", &|| match server.try_take() {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other.map(drop),
    })?;
    works("query", node.query()).map(drop)
}

fn mappings_of_the_process() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let description = roomy();
    let server = Server::attach(&mdev, &description)?;
    let failures = Failures::new()?;
    let node = server.node();
    let check = |what: &str, act: &dyn Fn() -> io::Result<Mapping>| {
        failures.each(what, CLEAR, nothing, |&()| act()).map(drop)
    };
    check("slots", &|| Mapping::shared(node, MUSER_MMAP_SLOTS, PAGE))?;
    check("status", &|| server.status())?;
    check("area", &|| node.map(MEMORY, 0, 16 * PAGE))?;
    check("state", &|| node.map_state(0, PAGE))?;
    check("window", &|| {
        Mapping::shared(node, MUSER_MMAP_WINDOW, 16 * PAGE)
    })?;
    let memory = node.map(MEMORY, 0, 8 << 20)?;
    touched(&failures, "touch by the process", &memory)
}

/// First touches of pages fail one by one: each is a SIGBUS, and the next touch works.
fn touched(failures: &Failures, what: &str, memory: &Mapping) -> Result<()> {
    let path = format!("/dev/shm/faults-{}", std::process::id());
    let file = std::fs::File::create(&path)?;
    std::fs::remove_file(&path)?;
    // The kernel reads the page for us, so that a SIGBUS is an EFAULT. Page tables are there
    // already where the page before was touched.
    let touch = |page: usize| pwrite_at(&file, memory, page * PAGE, 8, 0).map(drop);
    let next = Cell::new(0);
    let fresh = || {
        let page = next.get() + 1;
        next.set(page + 1);
        works("touching the page before", touch(page - 1))?;
        Ok(page)
    };
    failures
        .each(what, &[libc::EFAULT, libc::ENOMEM], fresh, |&page| {
            touch(page)
        })
        .map(drop)
}

fn opening_a_client(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let failures = Failures::new()?;
    // Of the file system, and of what looks for a descriptor that is free.
    let errnos = [
        libc::ENOMEM,
        libc::EFAULT,
        libc::ENFILE,
        libc::EMFILE,
        libc::ENOENT,
        // A node that can't be looked for is not found, as Rust's library has it.
        0,
    ];
    failures.each("opening a client", &errnos, nothing, |&()| {
        let client = Client::open(&bare.mdev, road);
        if client.is_ok() {
            // The reset behind each client is the next one's first request.
            while bare
                .server
                .try_take()
                .is_ok_and(|request| bare.server.reply(request.slot, 0).is_ok())
            {}
        }
        client
    })?;
    Ok(())
}

fn what_the_kernel_answers(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let failures = Failures::new()?;
    let check = |what: &str, act: &dyn Fn() -> io::Result<()>| {
        failures.each(what, CLEAR, nothing, |&()| act()).map(drop)
    };
    let client = &rig.client;
    check("device info", &|| client.info().map(drop))?;
    check("region info", &|| client.region_info(MEMORY).map(drop))?;
    check("interrupt info", &|| client.irq_info(MSIX).map(drop))
}

fn requests(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let failures = Failures::new()?;
    let check = |what: &str, act: &dyn Fn() -> io::Result<()>| {
        failures.each(what, CLEAR, nothing, |&()| act()).map(drop)
    };
    let client = &rig.client;
    check("read", &|| client.read_u32(TRAPPED, 8).map(drop))?;
    check("write", &|| client.write_all(TRAPPED, 8, &[1; 4]))?;
    check("long read", &|| {
        match client.read_vec(TRAPPED, 0, 3 * PAGE) {
            // What came before the failure is there.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            other => other.map(drop),
        }
    })?;
    check("reset", &|| client.reset())?;
    client.write_all(TRAPPED, 8, &[1, 2, 3, 4])?;
    equal(
        "what was written",
        client.read_u32(TRAPPED, 8)?,
        0x0403_0201,
    )
}

fn device_memory(road: Road) -> Result<()> {
    let rig = Rig::with(road, &roomy())?;
    let failures = Failures::new()?;
    let next = Cell::new(1024u64);
    let fresh = || {
        next.set(next.get() + 1);
        Ok(next.get() * PAGE as u64)
    };
    let client = &rig.client;
    failures.each("read of memory", CLEAR, fresh, |&at| {
        client.read_u32(MEMORY, at).map(drop)
    })?;
    failures.each("write to memory", CLEAR, fresh, |&at| {
        client.write_all(MEMORY, at, &[1; 8])
    })?;
    failures.each("mapping", CLEAR, nothing, |&()| client.map(MEMORY, 0, PAGE))?;
    let memory = client.map(MEMORY, 0, 4 << 20)?;
    touched(&failures, "touch by the client", &memory)
}

fn interrupts(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let failures = Failures::new()?;
    let client = &rig.client;
    let events = (0..8)
        .map(|_| EventFd::new())
        .collect::<io::Result<Vec<_>>>()?;
    let fds: Vec<_> = events.iter().map(AsRawFd::as_raw_fd).collect();
    let line = IrqSet::trigger(INTX, 0, IrqData::EventFd(vec![fds[0]]));
    let unmask = IrqSet::unmask(INTX, 0, IrqData::EventFd(vec![fds[1]]));
    let many = IrqSet::trigger(MSIX, 0, IrqData::EventFd(fds.clone()));
    let disabled = || {
        client.set_irqs(&IrqSet::disable(INTX))?;
        client.set_irqs(&IrqSet::disable(MSIX))?;
        Ok(())
    };
    let enabled = || {
        disabled()?;
        client.set_irqs(&line)?;
        Ok(())
    };
    failures.each("vectors", CLEAR, disabled, |()| client.set_irqs(&many))?;
    failures.each("line", CLEAR, disabled, |()| client.set_irqs(&line))?;
    failures.each("unmask eventfd", CLEAR, enabled, |()| {
        client.set_irqs(&unmask)
    })?;
    failures.each("disable", CLEAR, enabled, |()| {
        client.set_irqs(&IrqSet::disable(INTX))
    })?;
    // It still rings.
    disabled()?;
    client.set_irqs(&many)?;
    equal("signalled", rig.server.trigger(MSIX, 3, 1)?, 1)?;
    equal("interrupts", events[3].take()?, 1)
}

fn dma(road: Road) -> Result<()> {
    const PAGES: usize = 8;
    let rig = DmaRig::new(road, PAGES)?;
    let failures = Failures::new()?;
    let node = rig.node();
    let length = (PAGES * PAGE) as u64;
    let both = MUSER_DMA_READ | MUSER_DMA_WRITE;
    let dma = |number: u32, flags: u32| {
        let mut dma = muser_dma {
            size: size_of::<muser_dma>() as u32,
            flags,
            iova: BASE,
            length,
            ..Default::default()
        };
        sys::ioctl(node, number, &mut dma).map(drop)
    };
    let released = || Ok(dma(MUSER_DMA_RELEASE, 0)?);
    let acquired = || Ok(dma(MUSER_DMA_ACQUIRE, both)?);
    failures.each("acquire", CLEAR, released, |()| {
        dma(MUSER_DMA_ACQUIRE, both)
    })?;
    failures.each("release", CLEAR, acquired, |()| dma(MUSER_DMA_RELEASE, 0))?;
    failures.each("copy", CLEAR, released, |()| {
        let mut buffer = [0; 256];
        sys::dma_copy(node, 0, &[Segment::buffer(BASE + 100, &mut buffer)]).1
    })?;
    failures.each("window", CLEAR, acquired, |()| {
        Mapping::shared(node, MUSER_MMAP_WINDOW + BASE, PAGE)
    })?;
    released()?;
    let query = node.query()?;
    equal("pages pinned", query.pinned_pages, 0)?;
    equal(
        "pins and unpins",
        query.counters.pins,
        query.counters.unpins,
    )
}
