// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INTx: a line that stays up, masks itself when it fires, and fires again when it is unmasked.

use std::os::fd::AsRawFd;

use anyhow::Result;
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Server, INTX};
use muser_e2e::process::Process;
use muser_e2e::rig::Rig;
use muser_e2e::sys::EventFd;
use muser_e2e::time;
use muser_e2e::vfio::{Client, IrqData, IrqSet, Road};

use super::topic;

topic!("intx", once: [], roads: [
    raised_line_fires_once,
    line_that_stays_up_fires_at_each_unmask,
    lowered_line_does_not_fire_again,
    raised_masked_line_fires_when_unmasked,
    line_raised_and_lowered_while_masked_is_silent,
    unmask_by_bool_works_and_by_0_does_not,
    resample_eventfd_unmasks,
    resample_eventfd_taken_away_is_dead,
    resample_fires_while_line_stays_up,
    mask_eventfd_masks,
    line_raised_before_enabling_fires,
    disabled_line_goes_silent,
    line_survives_the_process,
    trigger_by_client_fires_and_masks,
]);

fn unmask(client: &Client) -> Result<()> {
    works(
        "unmask",
        client.set_irqs(&IrqSet::unmask(INTX, 0, IrqData::None(1))),
    )
}

fn mask(client: &Client) -> Result<()> {
    works(
        "mask",
        client.set_irqs(&IrqSet::mask(INTX, 0, IrqData::None(1))),
    )
}

fn raised_line_fires_once(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        1,
    )?;
    equal("count", line.take()?, 1)?;
    equal(
        "signalled when up",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        0,
    )?;
    equal("count when up", line.take()?, 0)
}

fn line_that_stays_up_fires_at_each_unmask(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    for round in 0..5 {
        equal(&format!("count in round {round}"), line.take()?, 1)?;
        unmask(&rig.client)?;
    }
    equal("count at last", line.take()?, 1)
}

fn lowered_line_does_not_fire_again(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    equal("count", line.take()?, 1)?;
    equal(
        "signalled by lowering",
        works("lower", rig.server.lower(INTX, 0, 1))?,
        0,
    )?;
    unmask(&rig.client)?;
    equal("count after lowering", line.take()?, 0)?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        1,
    )?;
    equal("count after raising", line.take()?, 1)
}

fn raised_masked_line_fires_when_unmasked(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    mask(&rig.client)?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        0,
    )?;
    equal("count", line.take()?, 0)?;
    unmask(&rig.client)?;
    equal("count once unmasked", line.take()?, 1)
}

fn line_raised_and_lowered_while_masked_is_silent(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    mask(&rig.client)?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    works("lower", rig.server.lower(INTX, 0, 1))?;
    unmask(&rig.client)?;
    equal("count", line.take()?, 0)
}

fn unmask_by_bool_works_and_by_0_does_not(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    equal("count", line.take()?, 1)?;
    let no = IrqSet::unmask(INTX, 0, IrqData::Bool(vec![0]));
    works("unmask with 0", rig.client.set_irqs(&no))?;
    equal("count after 0", line.take()?, 0)?;
    let yes = IrqSet::unmask(INTX, 0, IrqData::Bool(vec![1]));
    works("unmask with 1", rig.client.set_irqs(&yes))?;
    equal("count after 1", line.take()?, 1)
}

fn resampled(client: &Client) -> Result<EventFd> {
    let event = EventFd::new()?;
    let set = IrqSet::unmask(INTX, 0, IrqData::EventFd(vec![event.as_raw_fd()]));
    works("setting the resample eventfd", client.set_irqs(&set))?;
    Ok(event)
}

fn resample_eventfd_unmasks(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    let resample = resampled(&rig.client)?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    equal("count", line.take()?, 1)?;
    works("lower", rig.server.lower(INTX, 0, 1))?;
    resample.signal()?;
    time::until("the line being unmasked", || {
        rig.server
            .node()
            .irq_state(0)
            .is_ok_and(|state| state.masked == 0)
    })?;
    equal("count of the lowered line", line.take()?, 0)?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        1,
    )?;
    equal("count", line.take()?, 1)
}

fn resample_fires_while_line_stays_up(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    let resample = resampled(&rig.client)?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    for round in 0..20 {
        equal(
            &format!("count in round {round}"),
            line.wait(time::patience())?,
            1,
        )?;
        resample.signal()?;
    }
    equal("count at last", line.wait(time::patience())?, 1)
}

fn resample_eventfd_taken_away_is_dead(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    let resample = resampled(&rig.client)?;
    let set = IrqSet::unmask(INTX, 0, IrqData::EventFd(vec![-1]));
    works(
        "taking the resample eventfd away",
        rig.client.set_irqs(&set),
    )?;
    works("raise", rig.server.trigger(INTX, 0, 1))?;
    equal("count", line.take()?, 1)?;
    resample.signal()?;
    equal("count after the dead eventfd", line.wait(time::quiet())?, 0)?;
    unmask(&rig.client)?;
    equal("count after a real unmask", line.take()?, 1)
}

/// `<linux/vfio.h>` has an eventfd for masking as well, which vfio-pci never had.
fn mask_eventfd_masks(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    let event = EventFd::new()?;
    let set = IrqSet::mask(INTX, 0, IrqData::EventFd(vec![event.as_raw_fd()]));
    works("setting the mask eventfd", rig.client.set_irqs(&set))?;
    event.signal()?;
    time::until("the line being masked", || {
        rig.server
            .node()
            .irq_state(0)
            .is_ok_and(|state| state.masked == 1)
    })?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        0,
    )?;
    unmask(&rig.client)?;
    equal("count once unmasked", line.take()?, 1)
}

fn line_raised_before_enabling_fires(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        0,
    )?;
    // The line is up whoever listens.
    let line = rig.client.enable_irq(INTX, 0)?;
    equal("count", line.wait(time::patience())?, 1)
}

fn disabled_line_goes_silent(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    works("disable", rig.client.set_irqs(&IrqSet::disable(INTX)))?;
    equal(
        "signalled",
        works("raise", rig.server.trigger(INTX, 0, 1))?,
        0,
    )?;
    equal("count", line.take()?, 0)
}

fn line_survives_the_process(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let mut process = Process::helper(&["serve", mdev.uuid()])?;
    process.expect("ready")?;
    let client = works("opening the client", Client::open(&mdev, road))?;
    let line = client.enable_irq(INTX, 0)?;
    process.kill()?;
    let server = Server::attach(&mdev, &Description::pci())?;
    works("raise", server.trigger(INTX, 0, 1))?;
    equal("count", line.take()?, 1)?;
    drop(server);
    // With no process at all, the line is still up.
    unmask(&client)?;
    equal("count with no process", line.take()?, 1)
}

fn trigger_by_client_fires_and_masks(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let line = rig.client.enable_irq(INTX, 0)?;
    let trigger = IrqSet::trigger(INTX, 0, IrqData::None(1));
    works("trigger by the client", rig.client.set_irqs(&trigger))?;
    equal("count", line.take()?, 1)
}
