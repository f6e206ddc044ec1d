// SPDX-License-Identifier: GPL-2.0
//! The driver: a device for each UUID, whose accesses a process answers.
//!
//! A register read comes in at [`client`], becomes a [`request`] in the [`queue`] of its [`device`],
//! and goes out at [`node`]. There is no `unsafe` in this folder.

mod attach;
mod attributes;
mod client;
mod description;
mod device;
mod dma;
mod doorbells;
mod irqs;
mod memory;
mod node;
mod queue;
mod request;
mod state;
mod users;

use crate::{
    uapi::*,
    vfio::{
        chrdev::{Node, Numbers},
        class::Class,
        device::Registration,
        inode::Inodes,
        mdev::{self, Type},
        owner::Owner,
        sysfs::Entry, //
    },
};
use device::Device;
use kernel::{
    prelude::*,
    sync::Arc, //
};
use node::NodeFile;
use users::Users;

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
    inodes: Arc<Inodes>,
    users: Arc<Users>,
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
        let inodes = Inodes::new()?;
        let users = Users::new()?;
        let register = |description, bus, files| {
            let context = Context {
                bus,
                numbers: numbers.clone(),
                inodes: inodes.clone(),
                users: users.clone(),
            };
            mdev::Registration::new(module, numbers.class(), description, files, context)
        };
        Ok(Self {
            // The limits of users hold for both types together; they are beside the first.
            _pci: register(&PCI, MUSER_BUS_PCI, attributes::PARENT)?,
            _platform: register(&PLATFORM, MUSER_BUS_PLATFORM, &[])?,
        })
    }
}

/// A mediated device. Fields are dropped in order: the client goes first, then processes are told,
/// then the node vanishes.
pub(crate) struct Mdev {
    _vfio: Registration<Device>,
    device: HangUp,
    _node: Node<NodeFile>,
    owner: Owner,
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

    const ATTRIBUTES: &'static [Entry<Self>] = attributes::DEVICE;

    fn probe(parent: &mdev::Device, context: &Context) -> Result<Pin<KBox<Self>>> {
        let owner = Owner::current();
        let admission = context.users.admit(owner.uid())?;
        let (name, inodes) = (parent.name(), &context.inodes);
        let device = HangUp(Device::new(name, context.bus, inodes, admission)?);
        let node = Node::new(&context.numbers, parent, owner, device.0.clone())?;
        let vfio = Registration::new(parent, device.0.clone())?;
        let mdev = Self {
            _vfio: vfio,
            device,
            _node: node,
            owner,
        };
        Ok(KBox::new(mdev, GFP_KERNEL_ACCOUNT)?.into())
    }
}
