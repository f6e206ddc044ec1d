// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The counter in a QEMU without a guest: DMA, MSI-X, and writes that QEMU does not wait for.

use anyhow::{Context as _, Result};
use serde_json::{json, Value};

use super::{equal, topic};
use crate::pci::{Function, BUS_MASTER, CAP_MSIX, MEMORY};
use crate::qemu::{Qemu, Setup};
use crate::qtest::Qtest;
use crate::server::Server;
use crate::wait::{self, SOON};

topic!("qtest::counter": [
    dma_reaches_shared_memory,
    dma_reaches_memory_that_is_not_shared,
    dma_elsewhere_does_nothing,
    dma_without_bus_master_does_nothing,
    vectors_write_their_messages,
    masked_vector_is_pending,
    queued_writes_all_arrive,
    writes_that_nobody_waits_for_keep_their_order,
    doorbell_keeps_what_is_rung,
]);

const SLOT: u8 = 5;
/// Where the BARs are put: the registers, and the MSI-X table.
const REGISTERS: u32 = 0xe000_0000;
const TABLE: u32 = 0xe001_0000;

/// Registers of a lane (samples/counter).
const LANE: u64 = 0x40;
pub(super) const ADD: u64 = 0x00;
pub(super) const VALUE: u64 = 0x08;
pub(super) const FETCH_ADD: u64 = 0x10;
const ADDRESS: u64 = 0x18;
const GO: u64 = 0x20;
const BELL: u64 = 0x28;
const DOORBELLS: u64 = 0x1000;

/// The machine's memory, and where in it things are.
const MEMORY_SIZE: &str = "64M";
pub(super) const BLOCK: u64 = 0x20_0000;
const MESSAGES: u64 = 0x30_0000;

/// A machine with a counter.
pub(super) struct Bench {
    pub(super) cpu: Qtest,
    card: Function,
    pub(super) qemu: Qemu,
}

impl Bench {
    fn new(
        server: &Server,
        memory: impl FnOnce(Setup) -> Setup,
        more: &[(&str, Value)],
    ) -> Result<Self> {
        let setup = memory(Setup::new("qtest-counter", "q35")?);
        let place = [("addr", json!(format!("{SLOT:x}")))];
        let properties = [&place, more].concat();
        let (qemu, cpu) = setup.device(server.socket(), &properties).start_bare()?;
        let card = Function::at(SLOT);
        let mut bench = Self { cpu, card, qemu };
        let cpu = &mut bench.cpu;
        equal("ids", card.read(cpu, 0, 4)?, 0xc047_1234)?;
        equal("BAR 0", card.bar(cpu, 0)?, (0, 0x2000))?;
        card.place(cpu, 0, REGISTERS)?;
        card.place(cpu, 1, TABLE)?;
        card.command(cpu, MEMORY | BUS_MASTER)?;
        Ok(bench)
    }

    pub(super) fn shared(server: &Server) -> Result<Self> {
        Self::new(server, |setup| setup.shared_memory(MEMORY_SIZE), &[])
    }

    pub(super) fn get(&mut self, lane: u64, register: u64) -> Result<u64> {
        let address = u64::from(REGISTERS) + lane * LANE + register;
        let width = if register == BELL { 4 } else { 8 };
        self.cpu.read(address, width)
    }

    pub(super) fn set(&mut self, lane: u64, register: u64, value: u64) -> Result<()> {
        let address = u64::from(REGISTERS) + lane * LANE + register;
        let width = if register == ADDRESS { 8 } else { 4 };
        self.cpu.write(address, width, value)
    }

    /// Has a lane add what a block says; returns the counter that it wrote there.
    pub(super) fn go(&mut self, lane: u64, block: u64, addend: u64, sequence: u64) -> Result<u64> {
        self.start(lane, block, addend, sequence)?;
        wait::until("the sequence behind the counter", SOON, || {
            let done = self.cpu.read(block + 24, 8)? == sequence;
            Ok(done.then_some(()))
        })?;
        self.cpu.read(block + 16, 8)
    }

    fn start(&mut self, lane: u64, block: u64, addend: u64, sequence: u64) -> Result<()> {
        for (place, value) in [(0, addend), (8, sequence), (16, 0), (24, 0)] {
            self.cpu.write(block + place, 8, value)?;
        }
        self.set(lane, ADDRESS, block)?;
        self.set(lane, GO, 1)
    }

    /// Gives each of the first `vectors` a message of its own, and switches MSI-X on.
    pub(super) fn use_vectors(&mut self, vectors: u64) -> Result<()> {
        let capability = self.card.capability(&mut self.cpu, CAP_MSIX)?;
        for vector in 0..vectors {
            let entry = u64::from(TABLE) + 16 * vector;
            self.cpu.write(entry, 4, MESSAGES + 4 * vector)?;
            self.cpu.write(entry + 4, 4, 0)?;
            self.cpu.write(entry + 8, 4, message(vector))?;
            self.cpu.write(entry + 12, 4, 0)?;
        }
        self.card.write(&mut self.cpu, capability + 2, 2, 1 << 15)
    }

    /// Waits for the message of a vector, and takes it.
    pub(super) fn take_message(&mut self, vector: u64) -> Result<()> {
        let place = MESSAGES + 4 * vector;
        wait::until(&format!("the message of vector {vector}"), SOON, || {
            let came = self.cpu.read(place, 4)? == message(vector);
            Ok(came.then_some(()))
        })?;
        self.cpu.write(place, 4, 0)
    }
}

/// What a vector's message says.
fn message(vector: u64) -> u64 {
    0x4000 + vector
}

fn dma_reaches_shared_memory() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::shared(&server)?;
    dma_counts(&mut bench)
}

/// QEMU gives no descriptor of memory that is its own: all of it goes by messages.
fn dma_reaches_memory_that_is_not_shared() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::new(&server, |setup| setup.with("-m", MEMORY_SIZE), &[])?;
    dma_counts(&mut bench)
}

fn dma_counts(bench: &mut Bench) -> Result<()> {
    let mut sum = 0;
    for round in 1..=20 {
        sum += round;
        // Across the edge of a page now and then.
        let block = BLOCK + 0xff0 * round;
        equal("the counter", bench.go(3, block, round, round << 32)?, sum)?;
    }
    equal("the counter's register", bench.get(3, VALUE)?, sum)?;
    equal("another lane", bench.get(4, VALUE)?, 0)
}

fn dma_elsewhere_does_nothing() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::shared(&server)?;
    // Behind the memory, in the middle of nowhere, and at the end of all addresses.
    for nowhere in [64 << 20, 1 << 40, u64::MAX - 31] {
        bench.set(0, ADDRESS, nowhere)?;
        bench.set(0, GO, 1)?;
        equal("the counter", bench.get(0, VALUE)?, 0)?;
    }
    equal("the counter", bench.go(0, BLOCK, 5, 1)?, 5)
}

fn dma_without_bus_master_does_nothing() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::shared(&server)?;
    bench.card.command(&mut bench.cpu, MEMORY)?;
    bench.start(0, BLOCK, 5, 1)?;
    equal("the counter", bench.get(0, VALUE)?, 0)?;
    bench.card.command(&mut bench.cpu, MEMORY | BUS_MASTER)?;
    equal("the counter", bench.go(0, BLOCK, 5, 1)?, 5)
}

fn vectors_write_their_messages() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::shared(&server)?;
    bench.use_vectors(16)?;
    for round in 0..3 {
        for vector in [0, 1, 7, 15] {
            bench.go(vector, BLOCK, 1, 1 + round)?;
            bench.take_message(vector)?;
        }
    }
    Ok(())
}

fn masked_vector_is_pending() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::shared(&server)?;
    bench.use_vectors(2)?;
    let mask = u64::from(TABLE) + 16 + 12;
    bench.cpu.write(mask, 4, 1)?;
    bench.go(1, BLOCK, 1, 1)?;
    // A vector that is not masked has overtaken it.
    bench.go(0, BLOCK, 1, 2)?;
    bench.take_message(0)?;
    equal("the masked message", bench.cpu.read(MESSAGES + 4, 4)?, 0)?;
    bench.cpu.write(mask, 4, 0)?;
    bench.take_message(1)
}

/// QEMU may hold writes back, and send many of them at once (REGION_WRITE_MULTI).
fn queued_writes_all_arrive() -> Result<()> {
    let queued = [("x-send-queued", json!(true))];
    let server = Server::start("counter")?;
    let mut bench = Bench::new(&server, |setup| setup.shared_memory(MEMORY_SIZE), &queued)?;
    for value in 1..=300 {
        bench.set(value % 16, ADD, value)?;
    }
    let mut sum = 0;
    for lane in 0..16 {
        sum += bench.get(lane, VALUE)?;
    }
    equal("the sum of all lanes", sum, 300 * 301 / 2)
}

/// QEMU waits for no write to memory. Whatever threads take them, a read comes behind them.
fn writes_that_nobody_waits_for_keep_their_order() -> Result<()> {
    let server = Server::start_with("counter", &["--threads", "4"])?;
    let mut bench = Bench::shared(&server)?;
    for value in 1..=500 {
        bench.set(0, ADDRESS, value << 32)?;
        bench.set(0, ADDRESS, value)?;
        equal("what was written last", bench.get(0, ADDRESS)?, value)?;
    }
    Ok(())
}

fn doorbell_keeps_what_is_rung() -> Result<()> {
    let server = Server::start("counter")?;
    let mut bench = Bench::shared(&server)?;
    for lane in [0, 15] {
        let doorbell = u64::from(REGISTERS) + DOORBELLS + 4 * lane;
        bench.cpu.write(doorbell, 4, 0xbe11 + lane)?;
        let bell = bench.get(lane, BELL).context("the bell")?;
        equal("the bell", bell, 0xbe11 + lane)?;
    }
    Ok(())
}
