// SPDX-License-Identifier: GPL-2.0
//! Whose a device is: the user and group that created it.
//!
//! C headers: `include/linux/cred.h`, `include/linux/uidgid.h`.

use super::bindings;

/// A user and a group.
#[derive(Clone, Copy)]
pub(crate) struct Owner {
    pub(super) uid: bindings::kuid_t,
    pub(super) gid: bindings::kgid_t,
}

impl Owner {
    /// Those of the current process, as a file that it creates gets them.
    pub(crate) fn current() -> Self {
        Self {
            // SAFETY: Looks at the current task.
            uid: unsafe { bindings::muser_current_fsuid() },
            // SAFETY: As above.
            gid: unsafe { bindings::muser_current_fsgid() },
        }
    }

    /// The user's id in the initial user namespace.
    pub(crate) fn uid(self) -> u32 {
        // SAFETY: A plain conversion.
        unsafe { bindings::muser_uid_value(self.uid) }
    }

    /// The group's id in the initial user namespace.
    pub(crate) fn gid(self) -> u32 {
        // SAFETY: A plain conversion.
        unsafe { bindings::muser_gid_value(self.gid) }
    }
}
