// SPDX-License-Identifier: GPL-2.0
//! The process on the other side of a file.
//!
//! C header: `include/linux/pid.h`.

use super::bindings;
use kernel::{
    sync::aref::ARef,
    task::Task, //
};

/// A process which may have ended.
pub(crate) struct Process(ARef<Task>);

impl Process {
    /// The calling process.
    pub(crate) fn current() -> Self {
        Self(ARef::from(kernel::current!().group_leader()))
    }

    /// Its id as the calling process sees it, or 0 if it can't.
    pub(crate) fn pid(&self) -> u32 {
        // SAFETY: The reference keeps the task alive.
        unsafe { bindings::muser_pid_in_current_ns(self.0.as_ptr()) }
    }
}
