// SPDX-License-Identifier: GPL-2.0
//! What users may take of the machine: how many devices each, and how much memory for all of them.
//!
//! A user is who creates devices; the limits are those of the parent device. Root has none. Memory is
//! what descriptions promise and states are, whether touched or not, so that it is clear when a
//! process attaches whether it will do.

use crate::vfio::errno::Errno;
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        new_mutex,
        Arc,
        Mutex, //
    },
};

/// Default of the attribute `max_user_devices`.
const MAX_DEVICES: u32 = 256;
/// Default of the attribute `max_user_memory`, in bytes.
const MAX_MEMORY: u64 = 4 << 30;

/// What a user has.
struct User {
    uid: u32,
    devices: Atomic<u32>,
    memory: Atomic<u64>,
}

/// All users that have something, and their limits.
#[pin_data]
pub(crate) struct Users {
    /// Attribute: devices of one user.
    pub(crate) max_devices: Atomic<u32>,
    /// Attribute: bytes of device memory and state of all devices of one user.
    pub(crate) max_memory: Atomic<u64>,
    #[pin]
    list: Mutex<KVec<Arc<User>>>,
}

impl Users {
    /// Makes an empty list.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                max_devices: Atomic::new(MAX_DEVICES),
                max_memory: Atomic::new(MAX_MEMORY),
                list <- new_mutex!(KVec::new(), "muser_users"),
            }),
            GFP_KERNEL,
        )
    }

    /// Lets a user have another device, and the memory for it.
    ///
    /// # Errors
    ///
    /// `EDQUOT` if that is one too many, `ENOMEM`.
    pub(crate) fn admit(self: &Arc<Self>, uid: u32) -> Result<(Place, Arc<Allowance>)> {
        let user = match uid {
            0 => None,
            _ => Some(self.user_with_another_device(uid)?),
        };
        let place = Place(user.clone());
        let allowance = Allowance {
            users: self.clone(),
            user,
            bytes: Atomic::new(0),
        };
        Ok((place, Arc::new(allowance, GFP_KERNEL_ACCOUNT)?))
    }

    fn user_with_another_device(&self, uid: u32) -> Result<Arc<User>> {
        let mut list = self.list.lock();
        // Who has nothing any more is forgotten, but not before somebody comes.
        list.retain(|user| user.devices.load(Relaxed) > 0 || user.memory.load(Relaxed) > 0);
        let user = match list.iter().find(|user| user.uid == uid) {
            Some(user) => user.clone(),
            None => {
                let user = User {
                    uid,
                    devices: Atomic::new(0),
                    memory: Atomic::new(0),
                };
                let user = Arc::new(user, GFP_KERNEL)?;
                list.push(user.clone(), GFP_KERNEL)?;
                user
            }
        };
        // It grows under the lock only.
        if user.devices.load(Relaxed) >= self.max_devices.load(Relaxed) {
            return Err(Errno::EDQUOT.into());
        }
        user.devices.fetch_add(1, Relaxed);
        Ok(user)
    }
}

/// A device's place among those of its creator.
pub(crate) struct Place(Option<Arc<User>>);

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(user) = &self.0 {
            user.devices.fetch_sub(1, Relaxed);
        }
    }
}

/// The memory which a device's creator has given up for it, until the last page is gone.
pub(crate) struct Allowance {
    users: Arc<Users>,
    user: Option<Arc<User>>,
    bytes: Atomic<u64>,
}

impl Allowance {
    /// Sets aside what is missing to `total` bytes; `None` if the user has not so much left.
    pub(crate) fn reserve(self: &Arc<Self>, total: u64) -> Option<Reserved> {
        let missing = total.saturating_sub(self.bytes.load(Relaxed));
        if let Some(user) = &self.user {
            let limit = self.users.max_memory.load(Relaxed);
            let mut had = user.memory.load(Relaxed);
            loop {
                let has = had.saturating_add(missing);
                if missing > 0 && has > limit {
                    return None;
                }
                match user.memory.cmpxchg(had, has, Relaxed) {
                    Ok(_) => break,
                    Err(now) => had = now,
                }
            }
        }
        Some(Reserved {
            allowance: self.clone(),
            total,
            spare: missing,
        })
    }

    fn give_back(&self, bytes: u64) {
        if let Some(user) = &self.user {
            user.memory.fetch_sub(bytes, Relaxed);
        }
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        self.give_back(self.bytes.load(Relaxed));
    }
}

/// Memory set aside for an attachment. Dropped, it goes back to the user.
pub(crate) struct Reserved {
    allowance: Arc<Allowance>,
    total: u64,
    spare: u64,
}

impl Reserved {
    /// Makes it the device's. Only one caller may be here at a time for a device.
    pub(crate) fn keep(mut self) {
        let bytes = &self.allowance.bytes;
        let held = bytes.load(Relaxed);
        // Less may be missing by now than when it was set aside; never more, for a device gives
        // nothing back while it is there.
        let missing = self.total.saturating_sub(held).min(self.spare);
        bytes.store(held + missing, Relaxed);
        self.spare -= missing;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.allowance.give_back(self.spare);
    }
}
