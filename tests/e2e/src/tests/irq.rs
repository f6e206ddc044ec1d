// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Edge-triggered interrupts: delivery, the client's own triggers, masks, and their lives.

use std::os::fd::AsRawFd;

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::Mdev;
use muser_e2e::node::{Description, Server, ERR, MSI, MSIX, REQ};
use muser_e2e::process::Process;
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::sys::{EventFd, Mapping};
use muser_e2e::time;
use muser_e2e::vfio::{Client, IrqData, IrqSet, Road};
use muser_uapi::{muser_status, MUSER_STATE_CLIENT};
use zerocopy::FromBytes;

use super::topic;

topic!("irq", once: [], roads: [
    each_edge_kind_delivered,
    trigger_without_eventfd_signals_nothing,
    many_vectors_in_one_trigger,
    trigger_from_a_start_counts_from_it,
    signalled_tells_who_heard,
    trigger_by_client_without_data_fires,
    trigger_by_client_with_bools_fires_those,
    vector_given_minus_1_goes_silent,
    index_disabled_goes_silent,
    eventfd_swapped_moves_the_signal,
    eventfd_shared_by_vectors_counts_each,
    masked_vector_fires_when_unmasked,
    masked_vector_fires_once_for_many_triggers,
    mask_by_bools_masks_those,
    all_of_128_vectors_fire,
    close_disables_all,
    survives_the_process,
    status_page_counts_the_enabled,
    query_tells_the_state,
]);

fn each_edge_kind_delivered(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [MSI, MSIX, ERR, REQ] {
        let event = works("enabling", rig.client.enable_irq(index, 0))?;
        equal("count before", event.take()?, 0)?;
        let signalled = works("trigger", rig.server.trigger(index, 0, 1))?;
        equal(&format!("signalled of index {index}"), signalled, 1)?;
        equal(&format!("count of index {index}"), event.take()?, 1)?;
    }
    Ok(())
}

fn trigger_without_eventfd_signals_nothing(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [MSI, MSIX, ERR, REQ] {
        equal(
            "signalled",
            works("trigger", rig.server.trigger(index, 0, 1))?,
            0,
        )?;
    }
    // An edge that nobody heard is gone.
    let event = rig.client.enable_irq(MSI, 0)?;
    equal("count", event.wait(time::quiet())?, 0)
}

fn counts(events: &[EventFd]) -> Result<Vec<u64>> {
    events.iter().map(|event| Ok(event.take()?)).collect()
}

fn many_vectors_in_one_trigger(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSIX, 0, 64)?;
    equal(
        "signalled",
        works("trigger", rig.server.trigger(MSIX, 0, u64::MAX))?,
        u64::MAX,
    )?;
    equal("counts", counts(&events)?, vec![1; 64])?;
    equal(
        "signalled",
        works("trigger", rig.server.trigger(MSIX, 0, 1 << 63 | 5))?,
        1 << 63 | 5,
    )?;
    let mut expected = vec![0; 64];
    expected[0] = 1;
    expected[2] = 1;
    expected[63] = 1;
    equal("counts", counts(&events)?, expected)
}

fn trigger_from_a_start_counts_from_it(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSIX, 0, 128)?;
    works("trigger", rig.server.trigger(MSIX, 100, 0b1001))?;
    let fired: Vec<_> = counts(&events)?
        .iter()
        .enumerate()
        .filter_map(|(vector, &count)| (count > 0).then_some(vector))
        .collect();
    equal("vectors that fired", fired, vec![100, 103])
}

fn signalled_tells_who_heard(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let _first = rig.client.enable_irqs(MSIX, 0, 2)?;
    let _later = rig.client.enable_irqs(MSIX, 5, 1)?;
    works(
        "mask",
        rig.client
            .set_irqs(&IrqSet::mask(MSIX, 1, IrqData::None(1))),
    )?;
    let signalled = works("trigger", rig.server.trigger(MSIX, 0, 0xFF))?;
    equal("signalled", signalled, 0b10_0001)
}

fn trigger_by_client_without_data_fires(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSI, 0, 4)?;
    works(
        "trigger",
        rig.client
            .set_irqs(&IrqSet::trigger(MSI, 1, IrqData::None(2))),
    )?;
    equal("counts", counts(&events)?, vec![0, 1, 1, 0])
}

fn trigger_by_client_with_bools_fires_those(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSIX, 0, 5)?;
    let set = IrqSet::trigger(MSIX, 1, IrqData::Bool(vec![1, 0, 1]));
    works("trigger", rig.client.set_irqs(&set))?;
    equal("counts", counts(&events)?, vec![0, 1, 0, 1, 0])
}

fn vector_given_minus_1_goes_silent(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSIX, 0, 3)?;
    let set = IrqSet::trigger(MSIX, 1, IrqData::EventFd(vec![-1]));
    works("taking the eventfd away", rig.client.set_irqs(&set))?;
    equal(
        "signalled",
        works("trigger", rig.server.trigger(MSIX, 0, 0b111))?,
        0b101,
    )?;
    equal("counts", counts(&events)?, vec![1, 0, 1])
}

fn index_disabled_goes_silent(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [MSI, MSIX, ERR, REQ] {
        let event = rig.client.enable_irq(index, 0)?;
        works("disable", rig.client.set_irqs(&IrqSet::disable(index)))?;
        equal(
            "signalled",
            works("trigger", rig.server.trigger(index, 0, 1))?,
            0,
        )?;
        equal("count", event.take()?, 0)?;
        let event = works("enabling again", rig.client.enable_irq(index, 0))?;
        equal(
            "signalled",
            works("trigger", rig.server.trigger(index, 0, 1))?,
            1,
        )?;
        equal("count", event.take()?, 1)?;
    }
    Ok(())
}

fn eventfd_swapped_moves_the_signal(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let first = rig.client.enable_irq(MSIX, 3)?;
    let second = rig.client.enable_irq(MSIX, 3)?;
    works("trigger", rig.server.trigger(MSIX, 3, 1))?;
    equal("counts", (first.take()?, second.take()?), (0, 1))
}

fn eventfd_shared_by_vectors_counts_each(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let event = EventFd::new()?;
    let fds = vec![event.as_raw_fd(); 8];
    works(
        "enabling",
        rig.client
            .set_irqs(&IrqSet::trigger(MSI, 0, IrqData::EventFd(fds))),
    )?;
    works("trigger", rig.server.trigger(MSI, 0, 0xFF))?;
    equal("count", event.take()?, 8)
}

fn masked_vector_fires_when_unmasked(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let event = rig.client.enable_irq(MSIX, 7)?;
    works(
        "mask",
        rig.client
            .set_irqs(&IrqSet::mask(MSIX, 7, IrqData::None(1))),
    )?;
    equal(
        "signalled",
        works("trigger", rig.server.trigger(MSIX, 7, 1))?,
        0,
    )?;
    equal("count while masked", event.take()?, 0)?;
    works(
        "unmask",
        rig.client
            .set_irqs(&IrqSet::unmask(MSIX, 7, IrqData::None(1))),
    )?;
    equal("count once unmasked", event.take()?, 1)?;
    works(
        "unmask again",
        rig.client
            .set_irqs(&IrqSet::unmask(MSIX, 7, IrqData::None(1))),
    )?;
    equal("count after a second unmask", event.take()?, 0)
}

fn masked_vector_fires_once_for_many_triggers(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let event = rig.client.enable_irq(MSIX, 0)?;
    works(
        "mask",
        rig.client
            .set_irqs(&IrqSet::mask(MSIX, 0, IrqData::None(1))),
    )?;
    for _ in 0..5 {
        works("trigger", rig.server.trigger(MSIX, 0, 1))?;
    }
    works(
        "unmask",
        rig.client
            .set_irqs(&IrqSet::unmask(MSIX, 0, IrqData::None(1))),
    )?;
    // A pending bit is one bit (PCI 3.0, 6.8.3.4).
    equal("count", event.take()?, 1)
}

fn mask_by_bools_masks_those(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSIX, 0, 4)?;
    let mask = IrqSet::mask(MSIX, 0, IrqData::Bool(vec![1, 0, 1, 0]));
    works("mask", rig.client.set_irqs(&mask))?;
    equal(
        "signalled",
        works("trigger", rig.server.trigger(MSIX, 0, 0xF))?,
        0b1010,
    )?;
    equal("counts", counts(&events)?, vec![0, 1, 0, 1])?;
    let unmask = IrqSet::unmask(MSIX, 0, IrqData::Bool(vec![0, 0, 1, 0]));
    works("unmask", rig.client.set_irqs(&unmask))?;
    equal(
        "counts after unmasking one",
        counts(&events)?,
        vec![0, 0, 1, 0],
    )
}

fn all_of_128_vectors_fire(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let events = rig.client.enable_irqs(MSIX, 0, 128)?;
    for vector in 0..128 {
        equal(
            "signalled",
            works("trigger", rig.server.trigger(MSIX, vector, 1))?,
            1,
        )?;
    }
    equal("counts", counts(&events)?, vec![1; 128])
}

fn close_disables_all(road: Road) -> Result<()> {
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    let msi = client.enable_irq(MSI, 0)?;
    let msix = client.enable_irq(MSIX, 0)?;
    works(
        "mask",
        client.set_irqs(&IrqSet::mask(MSIX, 1, IrqData::None(1))),
    )?;
    drop(client);
    service.record().wait(1)?;
    equal("signalled", works("trigger", server.trigger(MSI, 0, 1))?, 0)?;
    equal(
        "signalled",
        works("trigger", server.trigger(MSIX, 0, 3))?,
        0,
    )?;
    equal("counts", (msi.take()?, msix.take()?), (0, 0))?;
    // The next client finds neither masks nor pending interrupts of the one before.
    let client = works("the next client", Client::open(&mdev, road))?;
    let events = client.enable_irqs(MSIX, 0, 2)?;
    equal("counts", counts(&events)?, vec![0, 0])?;
    equal(
        "signalled",
        works("trigger", server.trigger(MSIX, 0, 3))?,
        3,
    )?;
    drop(service);
    Ok(())
}

/// Eventfds, masks and pending bits belong to the device, not to the process.
fn survives_the_process(road: Road) -> Result<()> {
    let mdev = Mdev::create(muser_e2e::mdev::Type::Pci)?;
    let mut process = Process::helper(&["serve", mdev.uuid()])?;
    process.expect("ready")?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    let events = client.enable_irqs(MSIX, 0, 2)?;
    works(
        "mask",
        client.set_irqs(&IrqSet::mask(MSIX, 1, IrqData::None(1))),
    )?;
    process.kill()?;
    let more = works("enabling with no process", client.enable_irqs(MSIX, 4, 1))?;
    let server = Server::attach(&mdev, &Description::pci())?;
    equal(
        "signalled",
        works("trigger", server.trigger(MSIX, 0, 0b1_0011))?,
        0b1_0001,
    )?;
    equal(
        "counts",
        (counts(&events)?, counts(&more)?),
        (vec![1, 0], vec![1]),
    )?;
    works(
        "unmask",
        client.set_irqs(&IrqSet::unmask(MSIX, 1, IrqData::None(1))),
    )?;
    equal("counts", counts(&events)?, vec![0, 1])
}

fn status(mapping: &Mapping) -> Result<muser_status> {
    let bytes = mapping.read_bytes(0, size_of::<muser_status>());
    muser_status::read_from_bytes(&bytes).map_err(|_| anyhow::anyhow!("the status has no size"))
}

fn status_page_counts_the_enabled(road: Road) -> Result<()> {
    let bare = Bare::new()?;
    let page = works("mapping the status", bare.server.status())?;
    equal("status at first", status(&page)?, muser_status::default())?;
    let client = bare.client(road)?;
    equal(
        "flags with a client",
        status(&page)?.flags,
        MUSER_STATE_CLIENT,
    )?;
    let _msi = client.enable_irqs(MSI, 0, 3)?;
    let _msix = client.enable_irqs(MSIX, 10, 100)?;
    let mut expected = [0; 32];
    expected[MSI as usize] = 3;
    expected[MSIX as usize] = 100;
    equal("enabled", status(&page)?.irq_enabled, expected)?;
    works("disable", client.set_irqs(&IrqSet::disable(MSIX)))?;
    equal("enabled", status(&page)?.irq_enabled[MSIX as usize], 0)?;
    drop(client);
    time::until("the status forgetting the client", || {
        status(&page).is_ok_and(|status| status == muser_status::default())
    })
}

fn query_tells_the_state(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let _events = rig.client.enable_irqs(MSIX, 0, 4)?;
    works(
        "mask",
        rig.client
            .set_irqs(&IrqSet::mask(MSIX, 0, IrqData::None(3))),
    )?;
    works("trigger", rig.server.trigger(MSIX, 0, 0b11))?;
    let state = works("QUERY", rig.server.node().irq_state(2))?;
    equal("index", state.irq.index, MSIX)?;
    equal(
        "enabled, masked, pending",
        (state.enabled, state.masked, state.pending),
        (4, 3, 2),
    )?;
    ensure!(state.reserved == 0, "reserved is {}", state.reserved);
    Ok(())
}
