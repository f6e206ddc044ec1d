// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device with its process and its client, ready for one test.

use std::sync::Arc;

use anyhow::{Context, Result};
use muser_uapi::MUSER_BUS_PLATFORM;

use crate::mdev::{Mdev, Type};
use crate::node::{Description, Request, Server};
use crate::service::{ram, Reply, Service};
use crate::vfio::{Client, Road};

/// A served device with an open client. Fields drop in the order in which nothing has to wait.
#[derive(Debug)]
pub struct Rig {
    /// The client.
    pub client: Client,
    /// The process's threads.
    pub service: Service,
    /// The process's attachment.
    pub server: Arc<Server>,
    /// The device.
    pub mdev: Mdev,
}

impl Rig {
    /// [`Description::pci`], whose regions are plain memory.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn new(road: Road) -> Result<Self> {
        Self::with(road, &Description::pci())
    }

    /// Another description, whose regions are plain memory.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn with(road: Road, description: &Description) -> Result<Self> {
        Self::serving(road, description, 1, ram(description))
    }

    /// Another description, answered by `handler` in `threads` threads.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn serving(
        road: Road,
        description: &Description,
        threads: usize,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Result<Self> {
        let Bare { mdev, server } = Bare::with(description)?;
        let server = Arc::new(server);
        let service = Service::start(&server, threads, handler)?;
        let client =
            Client::open(&mdev, road).with_context(|| format!("opening the {road} client"))?;
        Ok(Self {
            client,
            service,
            server,
            mdev,
        })
    }
}

/// An attached device that nobody serves: the test does it by hand.
#[derive(Debug)]
pub struct Bare {
    /// The attachment.
    pub server: Server,
    /// The device.
    pub mdev: Mdev,
}

impl Bare {
    /// [`Description::pci`].
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn new() -> Result<Self> {
        Self::with(&Description::pci())
    }

    /// Another description.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn with(description: &Description) -> Result<Self> {
        let kind = if description.bus == MUSER_BUS_PLATFORM {
            Type::Platform
        } else {
            Type::Pci
        };
        let mdev = Mdev::create(kind)?;
        let server = Server::attach(&mdev, description)?;
        Ok(Self { server, mdev })
    }

    /// Opens a client.
    ///
    /// # Errors
    ///
    /// The errno of the call that failed.
    pub fn client(&self, road: Road) -> Result<Client> {
        Client::open(&self.mdev, road).with_context(|| format!("opening the {road} client"))
    }
}
