// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Write a PCI device in userspace once, serve it to any VFIO client.
//!
//! A device is a [`Device`]: what its registers do. A [`PciBuilder`] declares what it looks like.
//! A [`Server`] brings the two to clients over a [transport]: the kernel's VFIO by way of
//! `muser.ko`, or this very process, for tests.
//!
//! ```
//! use libmuser::transport::memory;
//! use libmuser::{Access, Bar, Device, PciBuilder, Region, Result, Server};
//!
//! /// One register that counts how often it is read.
//! #[derive(Default)]
//! struct Counter {
//!     reads: u64,
//! }
//!
//! impl Device for Counter {
//!     fn read(&mut self, access: Access) -> Result<u64> {
//!         match (access.region, access.offset) {
//!             (Region::Bar(0), 0) => {
//!                 self.reads += 1;
//!                 Ok(self.reads)
//!             }
//!             _ => access.unhandled_read(),
//!         }
//!     }
//! }
//!
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build()?;
//! let (transport, host) = memory::pair()?;
//! let mut server = Server::new(model, transport, |_bus| Ok(Counter::default()))?;
//! std::thread::spawn(move || server.run());
//!
//! let client = host.open()?;
//! let mut value = [0; 4];
//! client.read(0, 0, &mut value)?;
//! client.read(0, 0, &mut value)?;
//! assert_eq!(u32::from_le_bytes(value), 2);
//! # Ok(())
//! # }
//! ```
//!
//! A program that serves it over the kernel has a [command line](cli) and needs no transport in
//! sight:
//!
//! ```no_run
//! # struct Counter;
//! # impl libmuser::Device for Counter {}
//! use libmuser::{Bar, PciBuilder, cli};
//!
//! fn main() -> std::process::ExitCode {
//!     let model = PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(4096)).build();
//!     cli::run("counter", env!("CARGO_PKG_VERSION"), "Counts", model, |_bus| Ok(Counter))
//! }
//! ```
//!
//! # Layers
//!
//! Imports go down only: sample → [`Device`] and what it is given → [`Server`] → the
//! [`Transport`](transport::Transport) trait; transports → the ABI of `/dev/muser` and system
//! calls. A device never sees a transport, a transport never sees a device.
//!
//! # Threads
//!
//! A [`Server`] calls its device from the thread that runs it, one call at a time; a
//! [`SharedServer`] calls a [`SharedDevice`] from as many as it is given, and says what runs alone. A
//! [`Poller`] serves many devices from one thread. The handles that a [`Bus`] gives out
//! ([`Interrupts`], [`SharedMemory`], [`State`], [`Dma`]) work from any thread.
//!
//! # Signals
//!
//! A peer on a socket shares memory as files, and can cut a file short while it is mapped here: the
//! next access to what is gone is a SIGBUS. The library installs a handler for that signal with the
//! first such mapping. Where a file of a peer's has nothing any more, the handler puts zeroes, and
//! the access goes on: it reads zeroes, and what it writes is lost. Every other SIGBUS goes to the
//! handler that was there before, or ends the process. Who installs one later passes on what is not
//! his own; threads that touch a peer's memory do not block the signal.
//!
//! # Restart
//!
//! A process may be killed at any moment, and started again: its clients wait, and notice nothing
//! else. The function (configuration space, the MSI-X table, pending and raised interrupts) goes on
//! where it was, by the library. Requests that were not answered come again, in their order, and are
//! marked ([`Access::replay`]). What else a device must not forget, it keeps in its [`State`]; what it
//! must not do twice, it does with [`State::once`]. To replace a process that works, start its
//! successor in [standby](AttachOptions::standby).
//!
//! # What the library does for a device
//!
//! - Configuration space: BAR sizing, command and status, write masks, the capability chains,
//!   power states, function level reset ([`pci`]).
//! - MSI-X with its table and pending bits, MSI, the interrupt line ([`Interrupts`]).
//! - The expansion ROM, memory shared with the client ([`SharedMemory`]), and doorbells
//!   ([`Doorbell`]).
//! - The client's memory by IOVA, in place or copied, checked at each use ([`Dma`]).
//! - Accesses of any size and alignment, cut into typed ones ([`Access`]).
//! - Errors, which become the client's errno and a line in the log ([`Error`]).
//!
//! What it does not: a BAR whose decoding is off in the command register is accessible all the
//! same, since clients of VFIO may use regions without a word in configuration space. A VMM unmaps
//! such a BAR from its guest.

#![deny(unsafe_code, missing_docs)]

mod builder;
#[cfg(feature = "cli")]
pub mod cli;
pub mod client;
mod device;
mod dma;
mod error;
mod hash;
mod irq;
mod memory;
mod model;
pub mod pci;
mod peer_file;
mod poller;
mod region;
mod server;
mod state;
pub mod supervise;
mod sys;
pub mod transport;
#[doc(hidden)]
pub mod vfio_user;

pub use vm_memory;

pub use builder::{PciBuilder, Pin};
pub use device::{Bus, Device, Doorbell, Reset, SharedDevice};
pub use dma::{DirtyLog, Dma, DmaAccess, DmaRange, DmaSlice, DmaSlices, ScatterGather};
pub use error::{Errno, Error, Result};
pub use irq::Interrupts;
pub use memory::SharedMemory;
pub use model::PciModel;
pub use pci::{Bar, Express, Msi, Msix, PowerManagement, VendorCapability, VendorExtended};
pub use poller::{Member, Poller, Served};
pub use region::{Access, Area, AreaKind, IoEvent, Region, RegionInfo, Width};
pub use server::{Ended, Moment, Quiesced, Server, SharedServer, Stop};
pub use state::State;
pub use transport::{AttachOptions, RequestId, Wait};
