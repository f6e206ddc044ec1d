// SPDX-License-Identifier: GPL-2.0
//! Attributes in sysfs: limits that an operator sets, and whose a device is.

use crate::{
    driver::{device::MAX_REQUESTS, Context, Mdev},
    vfio::sysfs::{Attribute, Entry, Fact, File}, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};

/// Those of each device.
pub(super) const DEVICE: &[Entry<Mdev>] = &[
    File::<Mdev, ReattachTimeout>::ENTRY,
    File::<Mdev, MaxMemory>::ENTRY,
    File::<Mdev, MaxPinned>::ENTRY,
    File::<Mdev, UnmapTimeout>::ENTRY,
    File::<Mdev, MaxState>::ENTRY,
    File::<Mdev, MaxRequests>::ENTRY,
    File::<Mdev, MaxVectors>::ENTRY,
    File::<Mdev, Uid>::FACT,
    File::<Mdev, Gid>::FACT,
];

/// Those of the parent: limits of a user, for devices of both types together.
pub(super) const PARENT: &[Entry<Context>] = &[
    File::<Context, MaxUserDevices>::ENTRY,
    File::<Context, MaxUserMemory>::ENTRY,
];

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

/// How many bytes of its client's memory may be pinned at a time.
struct MaxPinned;

impl Attribute<Mdev> for MaxPinned {
    const NAME: &'static CStr = c"max_pinned";

    fn show(mdev: &Mdev) -> u64 {
        mdev.device.0.max_pinned.load(Relaxed)
    }

    fn store(mdev: &Mdev, bytes: u64) -> Result {
        mdev.device.0.max_pinned.store(bytes, Relaxed);
        Ok(())
    }
}

/// How long a client's unmap waits for the process to let go of the range, in milliseconds.
struct UnmapTimeout;

impl Attribute<Mdev> for UnmapTimeout {
    const NAME: &'static CStr = c"unmap_timeout_ms";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.device.0.unmap_timeout_ms.load(Relaxed))
    }

    fn store(mdev: &Mdev, ms: u64) -> Result {
        let ms = u32::try_from(ms).map_err(|_| ERANGE)?;
        mdev.device.0.unmap_timeout_ms.store(ms, Relaxed);
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

/// How many requests may be in flight at a time.
struct MaxRequests;

impl Attribute<Mdev> for MaxRequests {
    const NAME: &'static CStr = c"max_requests";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.device.0.max_requests.load(Relaxed))
    }

    fn store(mdev: &Mdev, requests: u64) -> Result {
        match u32::try_from(requests) {
            Ok(requests @ 1..=MAX_REQUESTS) => mdev.device.0.set_max_requests(requests),
            _ => return Err(ERANGE),
        }
        Ok(())
    }
}

/// How many vectors all interrupts of a description may have.
struct MaxVectors;

impl Attribute<Mdev> for MaxVectors {
    const NAME: &'static CStr = c"max_vectors";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.device.0.max_vectors.load(Relaxed))
    }

    fn store(mdev: &Mdev, vectors: u64) -> Result {
        let vectors = u32::try_from(vectors).map_err(|_| ERANGE)?;
        if mdev.device.0.described().is_ok() {
            return Err(EBUSY);
        }
        mdev.device.0.max_vectors.store(vectors, Relaxed);
        Ok(())
    }
}

/// The user who created the device.
struct Uid;

impl Fact<Mdev> for Uid {
    const NAME: &'static CStr = c"uid";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.owner.uid())
    }
}

/// That user's group.
struct Gid;

impl Fact<Mdev> for Gid {
    const NAME: &'static CStr = c"gid";

    fn show(mdev: &Mdev) -> u64 {
        u64::from(mdev.owner.gid())
    }
}

/// How many devices one user may have.
struct MaxUserDevices;

impl Attribute<Context> for MaxUserDevices {
    const NAME: &'static CStr = c"max_user_devices";

    fn show(context: &Context) -> u64 {
        u64::from(context.users.max_devices.load(Relaxed))
    }

    fn store(context: &Context, devices: u64) -> Result {
        let devices = u32::try_from(devices).map_err(|_| ERANGE)?;
        context.users.max_devices.store(devices, Relaxed);
        Ok(())
    }
}

/// How many bytes of device memory and state all devices of one user may have.
struct MaxUserMemory;

impl Attribute<Context> for MaxUserMemory {
    const NAME: &'static CStr = c"max_user_memory";

    fn show(context: &Context) -> u64 {
        context.users.max_memory.load(Relaxed)
    }

    fn store(context: &Context, bytes: u64) -> Result {
        context.users.max_memory.store(bytes, Relaxed);
        Ok(())
    }
}
