// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO_DEVICE_SET_IRQS` in the forms that VFIO refuses.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::Result;
use muser_e2e::check::{equal, fails, fails_as, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Server, INTX, MSI, MSIX};
use muser_e2e::rig::Rig;
use muser_e2e::sys::EventFd;
use muser_e2e::vfio::{Client, IrqData, IrqSet, Road};

use super::topic;

topic!("irq_bad", once: [], roads: [
    argsz_too_small_refused,
    bad_flags_refused,
    bad_index_refused,
    bad_range_refused,
    bad_descriptor_refused,
    one_bad_descriptor_leaves_all_as_they_were,
    mask_of_unmaskable_refused,
    trigger_of_disabled_refused_or_ignored,
    undescribed_index_refused,
]);

fn argsz_too_small_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let event = EventFd::new()?;
    let whole = IrqSet::trigger(MSI, 0, IrqData::EventFd(vec![event.as_raw_fd(); 2]));
    for argsz in [0, 1, 19, 20, 24, 27] {
        let set = IrqSet {
            argsz,
            ..whole.clone()
        };
        fails(
            &format!("argsz {argsz}"),
            rig.client.set_irqs(&set),
            libc::EINVAL,
        )?;
    }
    let bools = IrqSet::trigger(MSI, 0, IrqData::Bool(vec![1; 4]));
    let set = IrqSet {
        argsz: bools.argsz - 1,
        ..bools
    };
    fails("a bool short", rig.client.set_irqs(&set), libc::EINVAL)?;
    equal("signalled", rig.server.trigger(MSI, 0, 3)?, 0)
}

fn bad_flags_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let _event = rig.client.enable_irq(MSIX, 0)?;
    // VFIO_IRQ_SET_*: bits 0 to 2 are data, 3 to 5 actions, of each exactly one.
    for flags in [
        0,
        1 << 0,
        1 << 5,
        1 << 0 | 1 << 1 | 1 << 5,
        0b111 | 1 << 5,
        1 << 0 | 1 << 6,
        1 << 0 | 1 << 5 | 1 << 31,
    ] {
        let set = IrqSet {
            flags,
            ..IrqSet::trigger(MSIX, 0, IrqData::None(1))
        };
        let refused = [libc::EINVAL, libc::ENOTTY];
        fails_as(
            &format!("flags {flags:#b}"),
            rig.client.set_irqs(&set),
            &refused,
        )?;
    }
    for flags in [1 << 0 | 1 << 3 | 1 << 5, 1 << 0 | 0b111 << 3] {
        let set = IrqSet {
            flags,
            ..IrqSet::trigger(MSIX, 0, IrqData::None(1))
        };
        let refused = [libc::EINVAL, libc::ENOTTY];
        fails_as(
            &format!("two actions {flags:#b}"),
            rig.client.set_irqs(&set),
            &refused,
        )?;
    }
    Ok(())
}

fn bad_index_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [5, 31, 32, 1 << 16, u32::MAX] {
        for set in [
            IrqSet::disable(index),
            IrqSet::trigger(index, 0, IrqData::None(1)),
        ] {
            fails(
                &format!("index {index}"),
                rig.client.set_irqs(&set),
                libc::EINVAL,
            )?;
        }
    }
    Ok(())
}

fn bad_range_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let _events = rig.client.enable_irqs(MSI, 0, 8)?;
    for (start, count) in [
        (8, 1),
        (0, 9),
        (7, 2),
        (9, 0),
        (u32::MAX, 1),
        (1, u32::MAX),
        (u32::MAX, u32::MAX),
        (0, u32::MAX),
    ] {
        let set = IrqSet::trigger(MSI, start, IrqData::None(count));
        let what = format!("{count} vectors from {start}");
        fails(&what, rig.client.set_irqs(&set), libc::EINVAL)?;
        // The same with data whose size overflows when multiplied.
        let data = IrqSet {
            count,
            ..IrqSet::trigger(MSI, start, IrqData::EventFd(vec![-1; 16]))
        };
        fails(&what, rig.client.set_irqs(&data), libc::EINVAL)?;
    }
    equal("signalled", rig.server.trigger(MSI, 0, 0xFF)?, 0xFF)
}

fn bad_descriptor_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let no_eventfd = File::open("/proc/self/status")?;
    let fd = |fd| IrqSet::trigger(MSIX, 0, IrqData::EventFd(vec![fd]));
    fails(
        "a closed descriptor",
        rig.client.set_irqs(&fd(1_000_000)),
        libc::EBADF,
    )?;
    let other = no_eventfd.as_raw_fd();
    fails(
        "not an eventfd",
        rig.client.set_irqs(&fd(other)),
        libc::EINVAL,
    )?;
    let device = rig.client.file().as_raw_fd();
    fails(
        "the device itself",
        rig.client.set_irqs(&fd(device)),
        libc::EINVAL,
    )?;
    let refused = [libc::EBADF, libc::EINVAL];
    fails_as("-2", rig.client.set_irqs(&fd(-2)), &refused)?;
    fails_as(
        "the least number",
        rig.client.set_irqs(&fd(i32::MIN)),
        &refused,
    )?;
    let resample = IrqSet::unmask(INTX, 0, IrqData::EventFd(vec![1_000_000]));
    let _line = rig.client.enable_irq(INTX, 0)?;
    fails(
        "a closed descriptor for unmasking",
        rig.client.set_irqs(&resample),
        libc::EBADF,
    )
}

fn one_bad_descriptor_leaves_all_as_they_were(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let before = rig.client.enable_irqs(MSIX, 0, 2)?;
    let after = EventFd::new()?;
    let fds = vec![after.as_raw_fd(), 1_000_000, after.as_raw_fd()];
    let set = IrqSet::trigger(MSIX, 0, IrqData::EventFd(fds));
    fails(
        "three descriptors, one bad",
        rig.client.set_irqs(&set),
        libc::EBADF,
    )?;
    equal("signalled", rig.server.trigger(MSIX, 0, 0b111)?, 0b11)?;
    let counts = (before[0].take()?, before[1].take()?, after.take()?);
    equal("counts", counts, (1, 1, 0))
}

fn mask_of_unmaskable_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let event = rig.client.enable_irq(MSI, 0)?;
    let refused = [libc::ENOTTY, libc::EINVAL];
    for set in [
        IrqSet::mask(MSI, 0, IrqData::None(1)),
        IrqSet::unmask(MSI, 0, IrqData::None(1)),
    ] {
        fails_as("masking MSI", rig.client.set_irqs(&set), &refused)?;
    }
    let fd = IrqData::EventFd(vec![event.as_raw_fd()]);
    fails_as(
        "masking by eventfd",
        rig.client.set_irqs(&IrqSet::mask(MSI, 0, fd)),
        &refused,
    )?;
    equal("signalled", rig.server.trigger(MSI, 0, 1)?, 1)
}

/// vfio-pci refuses a trigger of an index that is not enabled; other drivers let it pass. What
/// matters is that it changes nothing.
fn trigger_of_disabled_refused_or_ignored(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [INTX, MSI, MSIX] {
        match rig
            .client
            .set_irqs(&IrqSet::trigger(index, 0, IrqData::None(1)))
        {
            Ok(()) => (),
            refused => fails("triggering a disabled index", refused, libc::EINVAL)?,
        }
        let event = works("enabling", rig.client.enable_irq(index, 0))?;
        equal("count", event.wait(muser_e2e::time::quiet())?, 0)?;
        works("disabling", rig.client.set_irqs(&IrqSet::disable(index)))?;
        works(
            "disabling again",
            rig.client.set_irqs(&IrqSet::disable(index)),
        )?;
    }
    Ok(())
}

fn undescribed_index_refused(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let _server = Server::attach(&mdev, &Description::minimal())?;
    let client = Client::open(&mdev, road)?;
    for index in [INTX, MSI, MSIX] {
        let event = EventFd::new()?;
        let set = IrqSet::trigger(index, 0, IrqData::EventFd(vec![event.as_raw_fd()]));
        fails(
            &format!("index {index}"),
            client.set_irqs(&set),
            libc::EINVAL,
        )?;
        match client.irq_info(index) {
            Ok(info) => equal("vectors", info.count, 0)?,
            refused => fails("GET_IRQ_INFO", refused, libc::EINVAL)?,
        }
    }
    Ok(())
}
