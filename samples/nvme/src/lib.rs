// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An NVMe 1.4 controller with one namespace, over a file or a block device.
//!
//! A command's way through the files: a doorbell wakes a worker (`controller`), which fetches the
//! command, has it carried out and posts its completion (`queue`). `admin` is about the
//! controller (`identify`, `log_page`, `feature`, `event`), `io` about blocks: `transfer`
//! finds the host's memory by `prp` or `sgl`, and an `engine` moves the data between it and a
//! [`backing`], without a copy where the memory can be mapped. `regs` is what the registers say,
//! `sys` the system calls.
//!
//! # Threads
//!
//! Each submission queue has a thread, which begins up to 32 commands at a time. The threads of the
//! server write registers and ring; what changes all of the controller (a reset, a shutdown, memory
//! that goes away) first waits until each queue's thread has ended what it has under way.
//!
//! # Restart
//!
//! The process may be killed at any instruction and started again, and each command completes exactly
//! once. What the controller is lies in `kept`, libmuser's [`State`](libmuser::State), which changes as
//! a whole or not at all. In this order:
//!
//! 1. Commands are *fetched* by one change: the head of the queue goes on, and the commands are copied
//!    into its slots. From then on the host may write others in their place.
//! 2. Commands are *carried out*. Who is started again finds the commands in the slots and carries
//!    them out again: reading, writing, flushing, making zeroes and comparing come to the same if
//!    they are done twice before the host has heard of the first time. Nobody may count on an order
//!    of commands that are under way together, so a write that is done again may well come behind
//!    others which have completed since. What a command changes of the controller, a queue that is
//!    created or a feature that is set, is not done here.
//! 3. Commands are *completed* by one change: the slots are free, the tail of the completion queue
//!    goes on, and the completions are kept. With it goes what a command changes of the controller.
//! 4. The completions are *shown*: written into the host's memory, and then an interrupt is raised.
//!    Who is started again does that again with the last ones, for each completion queue. In their
//!    places they are either new, or what lies there already: the host takes entries by the phase tag,
//!    which is another the next time round.
//!
//! Who holds the lock of a completion queue does 3 and 4, so those that are kept and may not have
//! been shown are always the last. An Asynchronous Event Request just stays in its slot; the event is
//! taken in step 3. The deletion of a submission queue has a step before: the queue is marked, so
//! that nothing of it is begun any more, also by the next process.
//!
//! # Hosts that make no sense
//!
//! A queue that is not in memory is a failure of which no completion can tell: CSTS.CFS is set, and a
//! reset clears it. Anything else has a status code, or an asynchronous event where there is no
//! command. A command is read once, and what it says is checked after it was copied.

#![deny(unsafe_code)]

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use libmuser::{
    Access, Bar, Bus, Doorbell, Errno, Error, Express, Msix, PciBuilder, PciModel, PowerManagement,
    Region, Reset, Result, SharedDevice,
};

mod admin;
pub mod backing;
mod command;
mod controller;

mod engine;
mod event;
mod feature;
mod identify;
mod io;
mod kept;
mod log_page;
mod options;
mod prp;
mod queue;
mod regs;
mod sgl;
mod spec;
mod sys;
mod transfer;

pub use engine::Method;
pub use options::{Options, Settings};

use backing::Backing;
use controller::{Config, Core};
use event::Event;
use kept::Kept;
use regs::{Transition, DOORBELLS};

/// The vendor's id, of the device and in Identify.
const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x4e56;
/// Where in BAR 0 the MSI-X table is, and its pending bits.
const TABLE: u32 = 0x2000;
const PENDING: u32 = 0x3000;
const BAR_SIZE: u64 = 0x4000;

/// Describes the controller; drivers find it by its class.
pub fn model(settings: &Settings) -> Result<PciModel> {
    let pairs = settings.queues + 1;
    let doorbells = DOORBELLS..regs::doorbells_end(pairs.into());
    PciBuilder::new(VENDOR, DEVICE)
        .class(0x01, 0x08, 0x02) // non-volatile memory, NVM Express I/O controller
        .bar(0, Bar::memory64(BAR_SIZE).doorbells(doorbells))
        .power_management(PowerManagement::new())
        .express(Express::endpoint())
        .msix(Msix::new(pairs).table(0, TABLE).pba(0, PENDING))
        .state(Kept::size(pairs.into()))
        .build()
}

/// The controller.
#[derive(Debug)]
pub struct Nvme {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl Nvme {
    /// The controller, just powered on or as an earlier process left it.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the backing has no block. Those of the system.
    pub fn new(bus: &Bus, settings: &Settings, backing: Arc<dyn Backing>) -> Result<Self> {
        let blocks = backing.size() >> settings.block_shift();
        if blocks == 0 {
            return Err(Error::new(
                Errno::EINVAL,
                "the backing is too short for a block",
            ));
        }
        let config = Config {
            serial: settings.serial.clone(),
            blocks,
            block_shift: settings.block_shift(),
            read_only: backing.is_read_only(),
            queues: settings.queues,
            method: settings.method,
        };
        let core = Arc::new(Core::new(bus, config, backing)?);
        if core.is_live() {
            log::debug!("a controller at work is taken over");
            for number in 0..core.cqs.len() {
                queue::show(&core, number, &mut queue::lock(&core, number));
            }
        }
        let mut nvme = Self {
            core,
            threads: Vec::new(),
        };
        for number in 0..nvme.core.seats.len() {
            let core = Arc::clone(&nvme.core);
            let name = thread::Builder::new().name(format!("queue {number}"));
            let thread = name.spawn(move || queue::run(&core, number))?;
            nvme.threads.push(thread);
        }
        Ok(nvme)
    }
}

impl SharedDevice for Nvme {
    fn read(&self, access: Access) -> Result<u64> {
        if access.region != Region::Bar(0) {
            return access.unhandled_read();
        }
        Ok(self.core.kept.control().read(access.offset, access.width))
    }

    fn write(&self, access: Access, value: u64) -> Result<()> {
        let core = &self.core;
        if access.region != Region::Bar(0) {
            return access.unhandled_write(value);
        }
        if access.offset >= DOORBELLS {
            if core.is_live() {
                core.note(Event::InvalidDoorbellRegister);
            }
            return Ok(());
        }
        let _registers = core.registers();
        let write = |control: &mut kept::Control| control.write(access.offset, access.width, value);
        match core.kept.change_control(write)? {
            (Transition::Enable, cc) => core.enable(cc),
            (Transition::Reset, cc) => core.reset(Some(cc)),
            (Transition::Shutdown, cc) => core.shut_down(cc),
            (Transition::None, cc) => core.kept.change_control(|control| control.cc = cc),
        }
    }

    fn doorbell(&self, _doorbell: &Doorbell) -> Result<()> {
        self.core.ring();
        Ok(())
    }

    fn reset(&self, _reset: Reset) -> Result<()> {
        let _registers = self.core.registers();
        self.core.reset(None)
    }

    fn dma_unmapped(&self, _iova: std::ops::Range<u64>) {
        // What is under way may be about that memory: it ends before the memory goes.
        drop(self.core.pause_all());
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        self.core.end();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a queue's thread panicked");
            }
        }
    }
}
