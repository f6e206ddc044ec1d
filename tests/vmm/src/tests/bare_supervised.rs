// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cards whose program is killed and started again by `muserctl supervise`, in a QEMU without a
//! guest: QEMU, which knows nothing of reconnecting, must not notice.

use anyhow::{anyhow, ensure, Result};

use super::bare_dma::{self, BLOCK, FETCH_ADD, VALUE};
use super::bare_gpio::{self, CHANGED, IN_0_7, IRQ_CONTROL, IRQ_STATUS, OUT_0_7};
use super::bare_windows::{self, DEADLY, LARGE, PAGE, REGISTERS};
use super::{equal, topic};
use crate::server::Server;

topic!("qtest::supervised": [
    registers_and_lines_outlive_the_program,
    adds_go_on_while_the_program_is_killed,
    accesses_that_kill_the_program_are_done_once,
    dma_and_vectors_outlive_the_program,
    mapped_memory_outlives_the_program,
    reset_reaches_the_next_program,
    next_qemu_finds_the_card_as_new,
]);

fn registers_and_lines_outlive_the_program() -> Result<()> {
    let mut server = Server::supervised("gpio")?;
    let mut bench = bare_gpio::Bench::new(&server)?;
    bench.cpu.watch("ioapic")?;
    bench.get(IRQ_CONTROL)?;
    for round in 0..10_u32 {
        bench.set(OUT_0_7, round)?;
        server.kill_program()?;
        equal("outputs", bench.get(OUT_0_7)?, round)?;
        bench.toggle()?;
        server.kill_program()?;
        equal("status", bench.get(IRQ_STATUS)?, CHANGED)?;
        let rises = |inputs: &crate::qtest::Inputs| !inputs.high.is_empty();
        bench.cpu.wait_for("the line to rise", rises)?;
        bench.set(IN_0_7, 0)?;
        let falls = |inputs: &crate::qtest::Inputs| inputs.high.is_empty();
        bench.cpu.wait_for("the line to fall", falls)?;
    }
    Ok(())
}

fn adds_go_on_while_the_program_is_killed() -> Result<()> {
    const KILLS: u64 = 20;
    let mut server = Server::supervised("counter")?;
    let mut bench = bare_dma::Bench::shared(&server)?;
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| (0..KILLS).try_for_each(|_| server.kill_program()));
        let mut counted = 0;
        // As many again after the last kill.
        let mut last = None;
        while last.is_none_or(|last| counted < 2 * last) {
            equal("the counter before", bench.get(3, FETCH_ADD)?, counted)?;
            counted += 1;
            if last.is_none() && killer.is_finished() {
                last = Some(counted);
            }
        }
        equal("the counter", bench.get(3, VALUE)?, counted)?;
        let killed = killer.join();
        killed.map_err(|_| anyhow!("the killer panicked"))?
    })
}

/// Registers of `device.rs` that kill the program after, or before, they add to a counter. QEMU does
/// not wait for the one that is written.
fn accesses_that_kill_the_program_are_done_once() -> Result<()> {
    const ROUNDS: u64 = 20;
    let server = Server::supervised("vmm-device")?;
    let mut bench = bare_windows::Bench::new(&server)?;
    let [add_and_die, die_and_add, write_and_die, counter] =
        [0, 4, 8, 12].map(|register| u64::from(DEADLY) + register);
    for round in 0..ROUNDS {
        let added = 5 * round;
        equal("added, died", bench.cpu.read(add_and_die, 4)?, added)?;
        equal("died, added", bench.cpu.read(die_and_add, 4)?, added + 1)?;
        bench.cpu.write(write_and_die, 4, 3)?;
        equal("the counter", bench.cpu.read(counter, 4)?, added + 5)?;
    }
    let programs = server.process.heard(0, "the program runs").len();
    let deaths = usize::try_from(3 * ROUNDS)?;
    ensure!(programs > deaths, "{programs} programs, {deaths} deaths");
    Ok(())
}

fn dma_and_vectors_outlive_the_program() -> Result<()> {
    let mut server = Server::supervised("counter")?;
    let mut bench = bare_dma::Bench::shared(&server)?;
    bench.use_vectors(4)?;
    let mut sum = 0;
    for round in 1..=10 {
        server.kill_program()?;
        sum += round;
        equal("the counter", bench.go(2, BLOCK, round, round)?, sum)?;
        bench.take_message(2)?;
    }
    Ok(())
}

fn mapped_memory_outlives_the_program() -> Result<()> {
    let mut server = Server::supervised("vmm-device")?;
    let mut bench = bare_windows::Bench::new(&server)?;
    for round in 1..=5 {
        bench.cpu.write(LARGE, 8, round)?;
        bench.cpu.write(u64::from(REGISTERS) + PAGE, 4, round)?;
        server.kill_program()?;
        // QEMU maps what it did; the new program sees the same.
        equal("the large memory", bench.cpu.read(LARGE, 8)?, round)?;
        equal("the register", bench.register(0)?, round)?;
        bench.cpu.write(u64::from(REGISTERS), 4, !round & 0xffff)?;
        equal("the mapped word", bench.mapped(0)?, !round & 0xffff)?;
    }
    Ok(())
}

fn reset_reaches_the_next_program() -> Result<()> {
    let mut server = Server::supervised("gpio")?;
    let mut bench = bare_gpio::Bench::new(&server)?;
    for _ in 0..3 {
        bench.set(OUT_0_7, 0x5a)?;
        bench.get(IN_0_7)?;
        server.kill_program()?;
        bench.qemu.reset()?;
        server.kill_program()?;
        bench.switch_on()?;
        equal("outputs", bench.get(OUT_0_7)?, 0)?;
        bench.inputs_begin_anew()?;
    }
    Ok(())
}

fn next_qemu_finds_the_card_as_new() -> Result<()> {
    let mut server = Server::supervised("counter")?;
    for round in 0..4 {
        let mut bench = bare_dma::Bench::shared(&server)?;
        equal("the counter", bench.get(0, FETCH_ADD)?, 0)?;
        equal("the counter", bench.go(0, BLOCK, 5, 1)?, 6)?;
        // The program dies before its client does, or with it.
        server.kill_program()?;
        if round % 2 == 0 {
            equal("the counter", bench.get(0, VALUE)?, 6)?;
        }
        bench.qemu.process.kill()?;
        server.process.running()?;
    }
    let heard = server.process.heard(0, "the program runs");
    ensure!(heard.len() >= 4, "the programs: {heard:?}");
    Ok(())
}
