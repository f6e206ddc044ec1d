// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device served by several threads.

use anyhow::{anyhow, Context, Result};
use libmuser::Moment;

use super::config::capability;
use super::{get, set, topic, write};
use crate::check::equal;
use crate::device::{ADD, FETCH_ADD, INTRUDERS, SCRATCH, SUM, TOGETHER};
use crate::{Client, Host};

topic!("threads", 4 thread:
    accesses_run_at_the_same_time,
    resets_run_alone,
    each_thread_sees_its_own_accesses_in_order;
    restarts: effects_happen_once_while_servers_die,
);

const CONFIG: u32 = 7;
const THREADS: u32 = 4;

/// Runs the same in several threads of the client, each with its number.
fn at_once(
    client: &dyn Client,
    work: impl Fn(&dyn Client, u32) -> Result<()> + Sync,
    meanwhile: impl FnOnce(&dyn Fn() -> bool) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..THREADS)
            .map(|number| scope.spawn(move || work(client, number)))
            .collect();
        let done = meanwhile(&|| threads.iter().all(|thread| thread.is_finished()));
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        done
    })
}

/// Each waits in the device until another one is there as well.
fn accesses_run_at_the_same_time(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let met = |client: &dyn Client, _| {
        let together = get(client, TOGETHER)?;
        equal("met another", together >= 2, true)
    };
    at_once(&*client, met, |_| Ok(()))
}

fn resets_run_alone(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let express = capability(&*client, 0x10)?.context("no Express")?;
    let busy = |client: &dyn Client, number: u32| {
        for round in 0..150 {
            set(client, SCRATCH, round)?;
            get(client, SCRATCH)?;
            if number == 0 && round % 10 == 0 {
                client.reset()?;
            }
            if number == 1 && round % 10 == 0 {
                // Device control, bit 15: initiate FLR (PCI Express 4.0, 7.5.3.4).
                write(client, CONFIG, express + 8, &(1u16 << 15).to_le_bytes())?;
            }
        }
        Ok(())
    };
    at_once(&*client, busy, |_| Ok(()))?;
    equal("accesses during resets", get(&*client, INTRUDERS)?, 0)
}

fn each_thread_sees_its_own_accesses_in_order(host: &dyn Host) -> Result<()> {
    let client = host.open()?;
    let own = |client: &dyn Client, number: u32| {
        let register = SCRATCH + u64::from(number) * 4;
        for round in 0..200 {
            set(client, register, round)?;
            equal("what was written", get(client, register)?, round)?;
        }
        Ok(())
    };
    at_once(&*client, own, |_| Ok(()))
}

fn effects_happen_once_while_servers_die(host: &dyn Host) -> Result<()> {
    const ROUNDS: u32 = 60;
    let client = host.open()?;
    let count = |client: &dyn Client, _| {
        let mut last = None;
        for _ in 0..ROUNDS {
            set(client, ADD, 1)?;
            let before = get(client, FETCH_ADD)?;
            equal("it grows", last < Some(before), true)?;
            last = Some(before);
        }
        Ok(())
    };
    at_once(&*client, count, |finished| {
        let mut moments = [Moment::Taken, Moment::Replying].iter().cycle();
        while !finished() {
            if let Some(moment) = moments.next() {
                host.die_at(*moment);
            }
            // With this, what was there before it is answered as well: no request can be the end of
            // more than a few servers, as a request that ends many of them fails.
            get(&*client, SUM)?;
        }
        Ok(())
    })?;
    // The last death may still be due.
    equal("sum", get(&*client, SUM)?, 2 * THREADS * ROUNDS)
}
