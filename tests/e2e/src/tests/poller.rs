// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many devices of the kernel's, served by one thread of one process.

use std::sync::mpsc;

use anyhow::{ensure, Context, Result};
use libmuser::transport::KernelTransport;
use libmuser::{Ended, Poller, Server, Stop};
use muser_conformance::device::{model, TestDevice, DOORBELL, RINGS, SCRATCH, TABLE};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{process, time};

use super::topic;

topic!("poller", once: [], roads: [
    devices_are_served_by_one_thread,
    removed_device_ends_alone,
    doorbells_wake_the_poller,
]);

const DEVICES: u32 = 6;
const BAR0: u32 = 0;

/// Runs a test with that many devices in a poller, which has a thread of its own. A client goes before
/// its device, which would wait for it.
fn with_devices(
    road: Road,
    test: impl FnOnce(Vec<(Client, Mdev)>, &mpsc::Receiver<Ended>) -> Result<()>,
) -> Result<()> {
    let (poller, stop) = (Poller::new()?, Stop::new()?);
    let (sender, ended) = mpsc::channel();
    let devices = (0..DEVICES).map(|_| {
        let mdev = Mdev::create(Type::Pci)?;
        let transport = KernelTransport::open_node(mdev.node())?;
        let server = Server::new(model()?, transport, |bus| Ok(TestDevice::new(bus)))?;
        poller.add(server)?;
        let client = works("opening the client", Client::open(&mdev, road))?;
        Ok((client, mdev))
    });
    let devices = devices.collect::<Result<Vec<_>>>()?;
    process::scope(|scope| {
        let serving = scope.spawn(|| {
            poller.run_until(&stop, |_, end| {
                // Who does not wait for it has gone on.
                let _ = end.map(|end| sender.send(end));
            })
        });
        let tested = test(devices, &ended);
        stop.stop();
        serving.join().ok().context("the poller panicked")??;
        tested
    })
}

fn devices_are_served_by_one_thread(road: Road) -> Result<()> {
    with_devices(road, |devices, _| {
        process::scope(|scope| {
            let mut clients = Vec::new();
            for (number, (client, _)) in (0u32..).zip(&devices) {
                clients.push(scope.spawn(move || -> Result<()> {
                    for round in 0..50 {
                        let value = (number << 16 | round).to_le_bytes();
                        works("write", client.write_all(BAR0, SCRATCH, &value))?;
                        let back = works("read", client.read_vec(BAR0, SCRATCH, 4))?;
                        equal("scratch", back, value.to_vec())?;
                    }
                    Ok(())
                }));
            }
            for client in clients {
                client.join().ok().context("a client panicked")??;
            }
            Ok(())
        })
    })
}

fn removed_device_ends_alone(road: Road) -> Result<()> {
    with_devices(road, |mut devices, ended| {
        let (client, mdev) = devices.pop().context("no device")?;
        drop(client);
        works("remove", mdev.remove())?;
        equal("end", ended.recv_timeout(time::patience())?, Ended::Removed)?;
        for (client, _) in &devices {
            works("read", client.read_vec(BAR0, SCRATCH, 4))?;
        }
        Ok(())
    })
}

fn doorbells_wake_the_poller(road: Road) -> Result<()> {
    with_devices(road, |devices, _| {
        for (client, _) in &devices {
            let rings = || -> Result<Vec<u8>> { Ok(client.read_vec(BAR0, RINGS, 4)?) };
            let before = rings()?;
            works("ring", client.write_all(TABLE, DOORBELL, &[1, 2, 3, 4]))?;
            time::until("the ring being told", || {
                rings().is_ok_and(|rings| rings != before)
            })?;
            ensure!(rings()? > before, "the rings went down");
        }
        Ok(())
    })
}
