// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The types, `create`, `remove` and the attributes of a device.

use std::sync::mpsc;

use anyhow::{ensure, Context, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{random_uuid, Mdev, Type};
use muser_e2e::node::{Description, Node, Server, REQ};
use muser_e2e::rig::{Bare, Rig};
use muser_e2e::vfio::{Client, Road};
use muser_e2e::{module, sys, time};

use super::topic;

topic!("sysfs", once: [
    types_say_what_they_are,
    available_instances_falls_and_rises,
    create_makes_device_and_node,
    create_of_bad_uuid_refused,
    create_of_present_uuid_refused,
    create_of_uuid_of_other_type_refused,
    create_with_newline_accepted,
    remove_takes_device_and_node,
    remove_of_attached_device_hangs_up,
    removed_device_refuses_every_ioctl,
    reattach_timeout_keeps_what_is_written,
    bad_attribute_values_refused,
    max_memory_fixed_once_described,
    a_hundred_devices_at_once,
], roads: [
    remove_with_open_client_raises_req_and_waits,
    open_of_undescribed_device_refused,
]);

fn types_say_what_they_are() -> Result<()> {
    module::load()?;
    for kind in Type::ALL {
        let device_api = kind.attribute("device_api")?;
        equal("device_api", device_api.as_str(), kind.api())?;
        for name in ["name", "description"] {
            let text = kind
                .attribute(name)
                .with_context(|| format!("{} {name}", kind.name()))?;
            ensure!(!text.is_empty(), "{} of {} is empty", name, kind.name());
        }
        let free: u64 = kind.attribute("available_instances")?.parse()?;
        ensure!(free > 0, "{} has no instances", kind.name());
    }
    Ok(())
}

fn available_instances_falls_and_rises() -> Result<()> {
    module::load()?;
    let free = || -> Result<u64> { Ok(Type::Pci.attribute("available_instances")?.parse()?) };
    let before = free()?;
    let mdev = Mdev::create(Type::Pci)?;
    equal("instances with one device", free()?, before - 1)?;
    works("remove", mdev.remove())?;
    equal("instances after its removal", free()?, before)
}

fn create_makes_device_and_node() -> Result<()> {
    for kind in Type::ALL {
        let mdev = Mdev::create(kind)?;
        ensure!(mdev.exists(), "{} is missing", mdev.directory().display());
        ensure!(mdev.node().exists(), "{} is missing", mdev.node().display());
        let group = mdev.group_node()?;
        ensure!(group.exists(), "{} is missing", group.display());
        let link = std::fs::read_link(mdev.directory().join("mdev_type"))?;
        ensure!(
            link.ends_with(kind.name()),
            "mdev_type leads to {}",
            link.display()
        );
        if Road::Cdev.lacking().is_none() {
            let cdev = mdev.cdev_node()?;
            ensure!(cdev.exists(), "{} is missing", cdev.display());
        }
    }
    Ok(())
}

fn create_of_bad_uuid_refused() -> Result<()> {
    module::load()?;
    let bad = [
        "no-uuid",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
        // A 37th character is not looked at by the mdev core, which takes it for the line's end.
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa100112",
        "83b8f4f2-509f-382f-3c1e_e6bfe0fa1001",
        "83b8f4f2509f382f3c1ee6bfe0fa1001",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa100g",
        "../../../../etc/passwd/0123456789abcd",
        "{83b8f4f2-509f-382f-3c1e-e6bfe0fa1001}",
    ];
    for text in bad {
        fails(
            &format!("create of {text:?}"),
            Type::Pci.create_raw(text),
            libc::EINVAL,
        )?;
    }
    equal("devices after that", Mdev::list().len(), 0)
}

fn create_of_present_uuid_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let again = Type::Pci.create_raw(mdev.uuid());
    fails("create of a present UUID", again, libc::EEXIST)?;
    let upper = Type::Pci.create_raw(&mdev.uuid().to_uppercase());
    fails("create of a present UUID in capitals", upper, libc::EEXIST)?;
    ensure!(mdev.node().exists(), "the refused create took the node");
    Ok(())
}

fn create_of_uuid_of_other_type_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let other = Type::Platform.create_raw(mdev.uuid());
    fails("create of a UUID of the other type", other, libc::EEXIST)
}

fn create_with_newline_accepted() -> Result<()> {
    module::load()?;
    let uuid = random_uuid()?;
    works(
        "create with a newline",
        Type::Pci.create_raw(&format!("{uuid}\n")),
    )?;
    let mdev = Mdev::adopt(&uuid);
    ensure!(mdev.node().exists(), "{} is missing", mdev.node().display());
    Ok(())
}

fn remove_takes_device_and_node() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    works("remove", mdev.remove())?;
    mdev.wait_gone()
}

fn remove_of_attached_device_hangs_up() -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    works("remove", mdev.remove())?;
    let events = sys::poll(server.node(), libc::POLLIN, time::patience())?;
    ensure!(
        events & libc::POLLHUP != 0,
        "poll says {events:#x} after removal, not POLLHUP"
    );
    fails(
        "taking from a removed device",
        server.try_take(),
        libc::ENODEV,
    )?;
    ensure!(
        !mdev.node().exists(),
        "the node of a removed device is still there"
    );
    Ok(())
}

fn removed_device_refuses_every_ioctl() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let unattached = Node::open(&mdev)?;
    let server = Server::attach(&mdev, &Description::pci())?;
    works("remove", mdev.remove())?;
    fails("query", unattached.query(), libc::ENODEV)?;
    fails("query by the attached", server.node().query(), libc::ENODEV)?;
    fails("take", server.try_take(), libc::ENODEV)?;
    fails("reply", server.reply(0, 0), libc::ENODEV)?;
    fails("trigger", server.trigger(0, 0, 1), libc::ENODEV)?;
    match unattached.attach_raw(&Description::pci()) {
        Ok(_) => anyhow::bail!("attaching to a removed device succeeded"),
        Err(refusal) => equal("errno of attach", refusal.errno, libc::ENODEV),
    }
}

fn reattach_timeout_keeps_what_is_written() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let name = "reattach_timeout_ms";
    equal("default", mdev.attribute(name)?.as_str(), "5000")?;
    works("writing it", mdev.set_attribute(name, "250\n"))?;
    equal("after writing", mdev.attribute(name)?.as_str(), "250")
}

fn bad_attribute_values_refused() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    for name in [
        "reattach_timeout_ms",
        "max_memory",
        "max_state",
        "max_vectors",
    ] {
        let before = mdev.attribute(name)?;
        for value in ["", "x", "-1", "1 2", "0x", "99999999999999999999999"] {
            let what = format!("writing {value:?} to {name}");
            // An empty write never reaches the attribute.
            if !value.is_empty() {
                let result = mdev.set_attribute(name, value);
                muser_e2e::check::fails_as(&what, result, &[libc::EINVAL, libc::ERANGE])?;
            }
        }
        equal(name, mdev.attribute(name)?, before)?;
    }
    Ok(())
}

fn max_memory_fixed_once_described() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    equal(
        "default",
        mdev.attribute("max_memory")?.as_str(),
        "268435456",
    )?;
    works(
        "writing it before",
        mdev.set_attribute("max_memory", "1048576"),
    )?;
    let _server = Server::attach(&mdev, &Description::pci())?;
    fails(
        "writing it after",
        mdev.set_attribute("max_memory", "4096"),
        libc::EBUSY,
    )?;
    equal("value", mdev.attribute("max_memory")?.as_str(), "1048576")
}

fn a_hundred_devices_at_once() -> Result<()> {
    let devices = (0..100)
        .map(|i| {
            Mdev::create(if i % 2 == 0 {
                Type::Pci
            } else {
                Type::Platform
            })
        })
        .collect::<Result<Vec<_>>>()?;
    equal("devices", Mdev::list().len(), 100)?;
    for mdev in &devices {
        ensure!(mdev.node().exists(), "{} is missing", mdev.node().display());
    }
    drop(devices);
    equal("devices after their removal", Mdev::list().len(), 0)
}

fn remove_with_open_client_raises_req_and_waits(road: Road) -> Result<()> {
    let Rig {
        client,
        service,
        server,
        mdev,
    } = Rig::new(road)?;
    let request = client.enable_irq(REQ, 0)?;
    let (done, removed) = mpsc::channel();
    let uuid = mdev.uuid().to_owned();
    let remover = std::thread::spawn(move || {
        // The receiver waits for it.
        let _ = done.send(std::mem::ManuallyDrop::new(Mdev::adopt(&uuid)).remove());
    });
    ensure!(request.wait(time::patience())? > 0, "REQ did not fire");
    ensure!(
        removed.try_recv().is_err(),
        "remove did not wait for the client"
    );
    drop(client);
    works("remove", removed.recv_timeout(time::patience())?)?;
    remover
        .join()
        .map_err(|_| anyhow::anyhow!("the remover panicked"))?;
    mdev.wait_gone()?;
    drop(service);
    fails(
        "taking from the removed device",
        server.try_take(),
        libc::ENODEV,
    )
}

fn open_of_undescribed_device_refused(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    fails(
        "opening a device without a description",
        Client::open(&mdev, road),
        libc::ENXIO,
    )?;
    let _server = Server::attach(&mdev, &Description::minimal())?;
    works("opening it once described", Client::open(&mdev, road)).map(drop)
}
