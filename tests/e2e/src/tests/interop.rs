// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! muser's devices through `vfio-ioctls`, which cloud-hypervisor and other VMMs open devices with.

use std::sync::Arc;

use anyhow::{Context, Result};
use muser_e2e::check::equal;
use muser_e2e::mdev::Mdev;
use muser_e2e::node::{Description, Server, INTX, MEMORY, MIXED, MIXED_AREA, MSIX, TRAPPED};
use muser_e2e::rig::Bare;
use muser_e2e::service::{ram, Service};
use muser_e2e::time;
use muser_e2e::vfio::Road;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioIommufd, VfioOps, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::topic;

topic!("interop", once: [], roads: [
    vfio_ioctls_reads_and_writes,
    vfio_ioctls_finds_sparse_areas,
    vfio_ioctls_takes_interrupts,
]);

fn open(mdev: &Mdev, road: Road) -> Result<VfioDevice> {
    let ops: Arc<dyn VfioOps> = match road {
        Road::Group => Arc::new(VfioContainer::new(None).context("opening the container")?),
        Road::Cdev => {
            let iommufd = iommufd_ioctls::IommuFd::new().context("opening the iommufd")?;
            let iommufd = VfioIommufd::new(Arc::new(iommufd), None, None);
            Arc::new(iommufd.context("allocating an address space")?)
        }
        Road::Compat => anyhow::bail!("vfio-ioctls does not know this road"),
    };
    VfioDevice::new(&mdev.directory(), ops, true).context("opening the device")
}

fn served() -> Result<(Service, Arc<Server>, Mdev)> {
    let description = Description::pci();
    let Bare { server, mdev } = Bare::with(&description)?;
    let server = Arc::new(server);
    let service = Service::start(&server, 1, ram(&description))?;
    Ok((service, server, mdev))
}

fn vfio_ioctls_reads_and_writes(road: Road) -> Result<()> {
    let (_service, _server, mdev) = served()?;
    let device = open(&mdev, road)?;
    device.region_write(TRAPPED, &[1, 2, 3, 4], 0x80);
    let mut data = [0; 4];
    device.region_read(TRAPPED, &mut data, 0x80);
    equal("data", data, [1, 2, 3, 4])?;
    device.reset();
    device.region_read(TRAPPED, &mut data, 0x80);
    equal("data after a reset", data, [0; 4])
}

fn vfio_ioctls_finds_sparse_areas(road: Road) -> Result<()> {
    let (_service, _server, mdev) = served()?;
    let device = open(&mdev, road)?;
    equal(
        "size of device memory",
        device.get_region_size(MEMORY),
        64 << 10,
    )?;
    let areas: Vec<_> = device
        .get_region_caps(MIXED)
        .into_iter()
        .filter_map(|cap| match cap {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        })
        .flatten()
        .map(|area| (area.offset, area.size))
        .collect();
    equal("areas", areas, vec![MIXED_AREA])
}

fn vfio_ioctls_takes_interrupts(road: Road) -> Result<()> {
    let (_service, server, mdev) = served()?;
    let device = open(&mdev, road)?;
    equal("most interrupts", device.max_interrupts(), 128)?;
    let mut events = Vec::new();
    for _ in 0..3 {
        events.push(EventFd::new(libc::EFD_NONBLOCK)?);
    }
    device.enable_msix(events.iter().collect())?;
    equal("signalled", server.trigger(MSIX, 0, 0b101)?, 0b101)?;
    let heard: Vec<_> = events.iter().map(|event| event.read().is_ok()).collect();
    equal("vectors heard", heard, vec![true, false, true])?;
    device.trigger_irq(MSIX, 1)?;
    equal("loopback", events[1].read()?, 1)?;
    device.disable_msix()?;

    let line = EventFd::new(libc::EFD_NONBLOCK)?;
    let resample = EventFd::new(libc::EFD_NONBLOCK)?;
    device.enable_irq(INTX, vec![&line])?;
    device.set_irq_resample_fd(INTX, vec![&resample])?;
    server.trigger(INTX, 0, 1)?;
    equal("line", line.read()?, 1)?;
    resample.write(1)?;
    time::until("the line firing again", || line.read().is_ok())
}
