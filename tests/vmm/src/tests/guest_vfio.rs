// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drivers in a guest's userspace, by the guest's own vfio-pci. Linux' driver for the gpio card takes
//! the line only, and the counter has no driver at all; this is how MSI, MSI-X and DMA get to a
//! guest. It needs an IOMMU, behind which QEMU maps and unmaps what the guest does, page by page.

use anyhow::{anyhow, ensure, Result};
use serde_json::json;

use super::shared::Shared;
use super::topic;
use crate::linux::Linux;
use crate::qemu::Setup;
use crate::server::Server;
use crate::wait::LONG;

topic!("guest::vfio": [
    line_interrupts_a_driver_in_userspace,
    msi_interrupts_a_driver_in_userspace,
    dma_goes_where_the_guests_iommu_says,
    dma_goes_on_while_the_program_is_killed,
]);

const GPIO: &str = "0000:00:04.0";
const COUNTER: &str = "0000:00:05.0";
const SUPERVISED: &str = "0000:00:06.0";

/// A guest with an IOMMU and three cards.
struct Rig {
    linux: Linux,
    gpio: Server,
    counter: Server,
    supervised: Server,
}

impl Rig {
    fn boot() -> Result<Self> {
        let (gpio, counter) = (Server::start("gpio")?, Server::start("counter")?);
        let supervised = Server::supervised("counter")?;
        let setup = Setup::new("guest-vfio", "q35,kernel-irqchip=off")?.shared_memory("512M");
        let setup = setup.with("-device", "intel-iommu,intremap=off,caching-mode=on");
        let setup = setup.device(gpio.socket(), &[("addr", json!("4"))]);
        let setup = setup.device(counter.socket(), &[("addr", json!("5"))]);
        let setup = setup.device(supervised.socket(), &[("addr", json!("6"))]);
        let mut linux = Linux::boot(setup, "intel_iommu=on")?;
        linux.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1")?;
        linux.run("modprobe vfio-pci ids=494f:0dc8,1234:c047")?;
        Ok(Self {
            linux,
            gpio,
            counter,
            supervised,
        })
    }
}

fn in_guest(test: impl FnOnce(&mut Rig) -> Result<()>) -> Result<()> {
    static GUEST: Shared<Rig> = Shared::new();
    GUEST.run(Rig::boot, test, |rig, error| {
        let error = rig.linux.explain(error);
        let servers = [&rig.gpio, &rig.counter, &rig.supervised];
        let stories = servers.map(|server| server.process.story());
        anyhow!("{error:#}\n{}", stories.join("\n"))
    })
}

fn line_interrupts_a_driver_in_userspace() -> Result<()> {
    interrupts("intx")
}

fn msi_interrupts_a_driver_in_userspace() -> Result<()> {
    interrupts("msi")
}

fn interrupts(way: &str) -> Result<()> {
    in_guest(|rig| {
        let command = format!("vmm-guest {way} {GPIO} 20");
        let said = rig.linux.run_for(&command, LONG)?;
        ensure!(said.ends_with("interrupt 20"), "{said}");
        Ok(())
    })
}

fn dma_goes_where_the_guests_iommu_says() -> Result<()> {
    in_guest(|rig| {
        let command = format!("vmm-guest dma {COUNTER} 30");
        let said = rig.linux.run_for(&command, LONG)?;
        ensure!(
            said.ends_with("round 30\n0 interrupts came for nothing"),
            "{said}"
        );
        Ok(())
    })
}

/// What is mapped and unmapped while the program is away counts as much. An interrupt may come twice
/// when the program is killed between sending it and the end of the access.
fn dma_goes_on_while_the_program_is_killed() -> Result<()> {
    const KILLS: usize = 10;
    in_guest(|rig| {
        let work = format!("vmm-guest dma {SUPERVISED}");
        rig.linux
            .work_amid(&work, KILLS, || rig.supervised.kill_program())?;
        Ok(())
    })
}
