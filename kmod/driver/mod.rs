// SPDX-License-Identifier: GPL-2.0
//! The driver: a device for each UUID, whose accesses a process answers.
//!
//! A register read comes in at [`client`], becomes a [`request`] in the [`queue`] of its [`device`],
//! and goes out at [`node`]. There is no `unsafe` in this folder.

mod attach;
mod client;
mod description;
mod device;
mod doorbells;
mod irqs;
mod memory;
mod node;
mod queue;
mod request;
mod state;

use crate::{
    uapi::*,
    vfio::{
        chrdev::{Node, Numbers},
        class::Class,
        device::Registration,
        mdev::{self, Type},
        sysfs::{Attribute, Entry, File}, //
    },
};
use device::Device;
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc}, //
};
use node::NodeFile;

/// Devices of each type that there may be.
const MAX_DEVICES: u32 = 1024;

static PCI: Type = Type {
    name: c"pci",
    pretty_name: c"muser PCI device",
    description: c"PCI device emulated by a process attached to /dev/muser/UUID",
    device_api: c"vfio-pci",
    parent: c"muser",
    max_instances: MAX_DEVICES,
};

static PLATFORM: Type = Type {
    name: c"platform",
    pretty_name: c"muser platform device",
    description: c"platform device emulated by a process attached to /dev/muser/UUID",
    device_api: c"vfio-platform",
    parent: c"muser-platform",
    max_instances: MAX_DEVICES,
};

/// What the devices of a type share.
pub(crate) struct Context {
    bus: u32,
    numbers: Arc<Numbers>,
}

/// All that the module registers. Fields are dropped in order: types first, so that every device is
/// gone before the class is.
pub(crate) struct Driver {
    _pci: mdev::Registration<Mdev>,
    _platform: mdev::Registration<Mdev>,
}

impl Driver {
    /// Registers the class, the numbers and both types.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Self> {
        let class = Class::new(c"muser")?;
        let numbers = Numbers::new(class, c"muser", 2 * MAX_DEVICES)?;
        let register = |description, bus| {
            let context = Context {
                bus,
                numbers: numbers.clone(),
            };
            mdev::Registration::new(module, numbers.class(), description, context)
        };
        Ok(Self {
            _pci: register(&PCI, MUSER_BUS_PCI)?,
            _platform: register(&PLATFORM, MUSER_BUS_PLATFORM)?,
        })
    }
}

/// A mediated device. Fields are dropped in order: the client goes first, then processes are told,
/// then the node vanishes.
pub(crate) struct Mdev {
    _vfio: Registration<Device>,
    device: HangUp,
    _node: Node<NodeFile>,
}

/// Tells processes that their device is gone.
struct HangUp(Arc<Device>);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}

impl mdev::Driver for Mdev {
    type Context = Context;

    const ATTRIBUTES: &'static [Entry<Self>] = &[
        File::<Self, ReattachTimeout>::ENTRY,
        File::<Self, MaxMemory>::ENTRY,
        File::<Self, MaxState>::ENTRY,
    ];

    fn probe(parent: &mdev::Device, context: &Context) -> Result<Pin<KBox<Self>>> {
        let device = HangUp(Device::new(parent.name(), context.bus)?);
        let node = Node::new(&context.numbers, parent, device.0.clone())?;
        let vfio = Registration::new(parent, device.0.clone())?;
        let mdev = Self {
            _vfio: vfio,
            device,
            _node: node,
        };
        Ok(KBox::new(mdev, GFP_KERNEL_ACCOUNT)?.into())
    }
}

/// How long a request waits while no process is attached, in milliseconds.
struct ReattachTimeout;

impl Attribute<Mdev> for ReattachTimeout {
    const NAME: &'static CStr = c"reattach_timeout_ms";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.device.0.reattach_timeout_ms.load(Relaxed))
    }

    fn store(mdev: &Mdev, ms: u64) -> Result {
        let ms = u32::try_from(ms).map_err(|_| ERANGE)?;
        mdev.device.0.reattach_timeout_ms.store(ms, Relaxed);
        Ok(())
    }
}

/// How many bytes of device memory a description may ask for.
struct MaxMemory;

impl Attribute<Mdev> for MaxMemory {
    const NAME: &'static CStr = c"max_memory";

    fn show(mdev: &Mdev) -> u64 {
        mdev.device.0.max_memory.load(Relaxed)
    }

    fn store(mdev: &Mdev, bytes: u64) -> Result {
        if mdev.device.0.described().is_ok() {
            return Err(EBUSY);
        }
        mdev.device.0.max_memory.store(bytes, Relaxed);
        Ok(())
    }
}

/// How many bytes of state a process may ask for. What it has been given it keeps.
struct MaxState;

impl Attribute<Mdev> for MaxState {
    const NAME: &'static CStr = c"max_state";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.device.0.max_state.load(Relaxed))
    }

    fn store(mdev: &Mdev, bytes: u64) -> Result {
        let bytes = u32::try_from(bytes).map_err(|_| ERANGE)?;
        mdev.device.0.max_state.store(bytes, Relaxed);
        Ok(())
    }
}
