// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations, and who does which how often.

mod client;
mod file;
mod node;
mod sysfs;

use std::io;

use crate::worker::Worker;

pub(crate) use self::node::{argument, description, DOORBELLS, STATE};
pub(crate) use self::sysfs::make;

/// What a process mostly does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It serves a device.
    Server,
    /// It uses one.
    Client,
    /// It creates, changes and removes devices.
    Owner,
    /// All of that.
    Any,
}

impl Role {
    /// How many processes there are.
    pub(crate) const PROCESSES: usize = 6;

    /// The role of a process.
    pub(crate) fn of(index: usize) -> Self {
        match index {
            0 | 2 => Self::Server,
            1 | 3 => Self::Client,
            4 => Self::Owner,
            _ => Self::Any,
        }
    }

    /// The device that a process has most to do with: a server's and a client's are the same.
    pub(crate) fn home(self, index: usize) -> usize {
        match self {
            Self::Server | Self::Client => index / 2,
            Self::Any => 2,
            Self::Owner => 3,
        }
    }
}

/// What a process of a role does first, so that most of what follows can succeed.
pub(crate) fn prologue(role: Role) -> &'static [&'static str] {
    match role {
        Role::Server => &["open_node", "attach", "map_status", "map_area"],
        Role::Client => &[
            "open_cdev",
            "open_group",
            "map_memory",
            "map_memory",
            "map_memory",
            "map_dma",
            "map_dma",
            "map_dma",
        ],
        Role::Owner | Role::Any => &["create"],
    }
}

/// A kind of operation. It gives `None` when there is nothing to do it with.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    /// How often: server, client, owner.
    often: (u64, u64, u64),
    pub(crate) run: fn(&mut Worker) -> Option<io::Result<u64>>,
}

impl Operation {
    /// How often a role does it.
    pub(crate) fn weight(&self, role: Role) -> u64 {
        let (server, client, owner) = self.often;
        match role {
            Role::Server => server,
            Role::Client => client,
            Role::Owner => owner,
            Role::Any => server + client + owner.min(2),
        }
    }
}

macro_rules! operations {
    ($($module:ident: $($name:ident $server:literal $client:literal $owner:literal),+;)+) => {
        /// All of them.
        pub(crate) const OPERATIONS: &[Operation] = &[$($(Operation {
            name: stringify!($name),
            often: ($server, $client, $owner),
            run: $module::$name,
        }),+),+];
    };
}

operations! {
    node:
        open_node 6 0 1,
        attach 12 0 0,
        attach_mutated 3 0 0,
        attach_standby 2 0 0,
        next_take 90 0 0,
        next_reply 90 0 0,
        next_garbage 4 0 0,
        trigger 15 0 0,
        query 8 0 6,
        detach 1 0 0,
        dma_acquire 14 0 0,
        dma_release 6 0 0,
        dma_copy 20 0 0,
        doorbell 4 0 0,
        poll_node 6 0 0,
        ioctl_node 4 0 0,
        map_slots 5 0 0,
        map_status 3 0 0,
        map_state 5 0 0,
        map_area 8 0 0,
        map_dma_window 6 0 0;
    client:
        open_group 0 7 0,
        open_cdev 0 7 0,
        device_info 0 4 0,
        region_info 0 6 0,
        irq_info 0 4 0,
        set_irqs 0 20 0,
        reset 0 2 0,
        read_region 0 45 0,
        write_region 0 45 0,
        map_region 0 10 0,
        map_dma 0 16 0,
        unmap_dma 0 8 0,
        feature 0 6 0,
        ioctl_device 0 4 0;
    file:
        map_memory 2 8 0,
        map_garbage 1 1 0,
        read_memory 12 12 0,
        write_memory 12 12 0,
        remap 2 2 0,
        unmap 2 2 0,
        protect 2 2 0,
        advise 2 2 0,
        read_file 1 1 0,
        duplicate 2 2 0,
        close 2 2 1,
        fork 1 1 0;
    sysfs:
        create 0 0 10,
        remove 0 0 4,
        read_attribute 0 0 30,
        write_attribute 0 0 10;
}
