// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device with its process and its client, ready for one test.

use std::sync::Arc;

use anyhow::{Context, Result};
use muser_uapi::MUSER_BUS_PLATFORM;

use crate::mdev::{Mdev, Type};
use crate::node::{Description, Node, Request, Server};
use crate::service::{ram, Reply, Service};
use crate::sys::{Mapping, Memory, PAGE};
use crate::vfio::{Client, Road, DMA_BOTH};

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

/// Where [`Guest`] maps its memory.
pub const BASE: u64 = 0x10_0000;

/// What a word of memory holds that nobody has written since it was filled.
pub fn pattern(seed: u64) -> impl Fn(usize) -> u64 + Copy {
    move |offset| seed << 32 | offset as u64
}

/// A client with memory that a device can reach by DMA, at [`BASE`], filled with [`pattern`].
#[derive(Debug)]
pub struct Guest {
    /// The client, which closes before its memory goes.
    pub client: Client,
    /// Its memory.
    pub memory: Mapping,
}

impl Guest {
    /// Seed of the pattern in its memory.
    pub const SEED: u64 = 0x6E57;

    /// Opens a client and maps so many pages of anonymous memory.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn open(mdev: &Mdev, road: Road, pages: usize) -> Result<Self> {
        Self::with(mdev, road, Memory::Anonymous, pages)
    }

    /// Opens a client and maps so many pages of a kind of memory.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn with(mdev: &Mdev, road: Road, kind: Memory, pages: usize) -> Result<Self> {
        let client =
            Client::open(mdev, road).with_context(|| format!("opening the {road} client"))?;
        let memory = kind
            .map(pages * PAGE)
            .with_context(|| format!("making {kind}"))?;
        memory.fill(pattern(Self::SEED));
        client
            .dma_map(&memory, BASE, DMA_BOTH)
            .with_context(|| format!("mapping {kind}"))?;
        Ok(Self { client, memory })
    }

    /// Bytes of its memory.
    pub fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// Expects its memory to be as it was filled.
    ///
    /// # Errors
    ///
    /// Says what is where.
    pub fn is_untouched(&self) -> Result<()> {
        match self.memory.differs(pattern(Self::SEED)) {
            None => Ok(()),
            Some((offset, found)) => {
                anyhow::bail!("the client's memory at {offset:#x} became {found:#x}")
            }
        }
    }
}

/// A served device and a client with memory. Fields drop in the order in which nothing has to wait.
#[derive(Debug)]
pub struct DmaRig {
    /// The client.
    pub guest: Guest,
    /// The process's threads, which let go of what the client unmaps.
    pub service: Service,
    /// The process's attachment.
    pub server: Arc<Server>,
    /// The device.
    pub mdev: Mdev,
}

impl DmaRig {
    /// A client with so many pages of anonymous memory.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn new(road: Road, pages: usize) -> Result<Self> {
        Self::with(road, Memory::Anonymous, pages)
    }

    /// A client with so many pages of a kind of memory.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn with(road: Road, kind: Memory, pages: usize) -> Result<Self> {
        let description = Description::pci();
        let Bare { mdev, server } = Bare::with(&description)?;
        let server = Arc::new(server);
        let service = Service::start(&server, 1, ram(&description))?;
        let guest = Guest::with(&mdev, road, kind, pages)?;
        Ok(Self {
            guest,
            service,
            server,
            mdev,
        })
    }

    /// The process's file.
    pub fn node(&self) -> &Node {
        self.server.node()
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
