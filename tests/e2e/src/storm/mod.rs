// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A storm: clients hammer a device whose process is killed again and again, and hold it to what
//! each single operation should have done.

mod device;
mod lane;
mod port;
mod registers;
mod restart;
mod socket;
pub mod stand_in;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use self::device::Killer;
pub use self::device::Program;
use self::lane::{Lane, Tally};
use self::port::Port;
use self::registers::{register, ADDRESS, BLOCK, LANES, LANE_COUNT, VALUE, VECTORS};
use crate::mdev::{Mdev, Type};
use crate::node::CONFIG;
use crate::random::Random;
use crate::sys::{EventFd, Mapping, PAGE};
use crate::time;
use crate::vfio::{Client, Road, DMA_BOTH};

/// Lanes that are used, each by a thread of its own.
const CLIENTS: u32 = 8;
/// Where the lanes' blocks are mapped for the device.
const IOVA: u64 = 1 << 32;
/// How often a long run says how far it is.
const PROGRESS: Duration = Duration::from_secs(10);
/// PCI 3.0, 6.2.2: memory space and bus master enable.
const COMMAND: (u64, [u8; 2]) = (4, [0x06, 0]);

/// What a storm is to be.
#[derive(Clone, Debug)]
pub struct Storm {
    /// How often a process of the device is killed.
    pub kills: u64,
    /// Where the killer's and the clients' choices come from.
    pub seed: u64,
    /// How the clients come to the device: by the kernel, or over a supervised socket.
    pub road: Option<Road>,
    /// The device.
    pub program: Program,
    /// How often the time from an attachment to the first answer is measured.
    pub restarts: u32,
    /// How long an operation may take before it counts as stuck.
    pub deadline: Duration,
}

/// How long an operation may take where nothing else is asked for.
pub fn deadline() -> Duration {
    time::patience() * 3
}

/// What the device and the kernel can do, beside what all can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ability {
    /// The module reaches the client's memory.
    pub dma: bool,
    /// The device has doorbells.
    pub doorbells: bool,
    /// A process can take over from one that runs.
    pub take_over: bool,
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let can = |able: bool| if able { "with" } else { "without" };
        let Self {
            dma,
            doorbells,
            take_over,
        } = *self;
        write!(
            f,
            "{} DMA, {} doorbells, {} hand-overs",
            can(dma),
            can(doorbells),
            can(take_over)
        )
    }
}

/// What came of a storm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Processes killed.
    pub kills: u64,
    /// Operations that came to an end.
    pub operations: u64,
    /// Those whose effect is missing.
    pub lost: u64,
    /// Those whose effect is there more than once.
    pub doubled: u64,
    /// Operations and interrupts that did not come to an end.
    pub stuck: u64,
}

impl Outcome {
    /// Whether nothing was lost, doubled or stuck, and something was done at all.
    pub fn is_good(&self) -> bool {
        (self.lost, self.doubled, self.stuck) == (0, 0, 0) && self.operations > 0
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kills,
            operations,
            lost,
            doubled,
            stuck,
        } = self;
        write!(
            f,
            "kills {kills}, operations {operations}, lost {lost}, doubled {doubled}, stuck {stuck}"
        )
    }
}

/// Who starts and ends the device's processes.
trait Strikes {
    /// Lets a process live for a while, and ends it.
    ///
    /// # Errors
    ///
    /// When a process does not come to serve, or ends by itself.
    fn strike(&mut self) -> Result<()>;

    /// Has a process serve the device.
    ///
    /// # Errors
    ///
    /// When it does not in time.
    fn revive(&mut self) -> Result<()>;

    /// What the device and its road can do.
    fn ability(&self) -> Ability;

    /// SIGKILLs sent.
    fn kills(&self) -> u64;

    /// Processes that were replaced in peace.
    fn hand_overs(&self) -> u64;
}

impl Strikes for Killer<'_> {
    fn strike(&mut self) -> Result<()> {
        Killer::strike(self)
    }

    fn revive(&mut self) -> Result<()> {
        Killer::revive(self)
    }

    fn ability(&self) -> Ability {
        Killer::ability(self)
    }

    fn kills(&self) -> u64 {
        self.kills
    }

    fn hand_overs(&self) -> u64 {
        self.hand_overs
    }
}

impl Storm {
    /// Has the storm, and says what came of it.
    ///
    /// # Errors
    ///
    /// When something else went wrong than an operation: the device's program can't be started, or
    /// ends by itself.
    pub fn run(&self) -> Result<Outcome> {
        let Some(road) = self.road else {
            return socket::run(self);
        };
        let mdev = Mdev::create(Type::Pci)?;
        mdev.set_attribute("reattach_timeout_ms", "60000")?;
        let life = Duration::from_millis(15) * time::slowness();
        let random = Random::branch(self.seed, 0);
        let mut killer = Killer::new(self.program.clone(), &mdev, life, random)?;
        println!(
            "storm of {} kills on {} over the {}, seed {}: {}",
            self.kills,
            self.program.0,
            road,
            self.seed,
            killer.ability()
        );
        let client =
            Client::open(&mdev, road).with_context(|| format!("opening the {road} client"))?;
        client.write_all(CONFIG, COMMAND.0, &COMMAND.1)?;
        let memory = self.memory(&client, road, killer.ability())?;
        let interrupts = client.enable_irqs(VECTORS, 0, LANE_COUNT)?;
        let outcome = self.hammer(&client, &interrupts, &mut killer, memory.as_ref())?;
        if outcome.stuck == 0 && self.restarts > 0 {
            restart::measure(&client, &mut killer, self.restarts)?;
        }
        // In this order nothing has to wait.
        drop(client);
        drop(killer);
        Ok(outcome)
    }

    /// Memory for the lanes' blocks, mapped and made known to them, where the kernel can do that.
    fn memory(&self, client: &Client, road: Road, ability: Ability) -> Result<Option<Mapping>> {
        if !ability.dma {
            return Ok(None);
        }
        if let Some(why) = road.spoiled_for_dma() {
            // The sample's GO has nothing to do without its block.
            ensure!(
                self.program.0.starts_with("storm-device"),
                "{why}: take another road, or --device storm-device"
            );
            println!("GO without DMA: {why}");
            return Ok(None);
        }
        let memory = Mapping::anonymous(PAGE)?;
        client.dma_map(&memory, IOVA, DMA_BOTH)?;
        for lane in 0..CLIENTS {
            let block = IOVA + BLOCK * u64::from(lane);
            client.write_all(LANES, register(lane, ADDRESS), &block.to_le_bytes())?;
        }
        Ok(Some(memory))
    }

    fn hammer(
        &self,
        client: &dyn Port,
        interrupts: &[EventFd],
        killer: &mut dyn Strikes,
        memory: Option<&Mapping>,
    ) -> Result<Outcome> {
        let ability = killer.ability();
        let deadline = self.deadline;
        let tally = Tally::default();
        let over = AtomicBool::new(false);
        // By lane: when its present operation began, in milliseconds from the start and never 0;
        // 0 when it has none.
        let since: Vec<AtomicU64> = (0..CLIENTS).map(|_| AtomicU64::new(0)).collect();
        let began = Instant::now();
        let clock = || u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX) + 1;
        std::thread::scope(|scope| {
            for (number, interrupt) in (0..CLIENTS).zip(interrupts) {
                let mut lane = Lane {
                    number,
                    client,
                    interrupt,
                    memory,
                    ability,
                    deadline,
                    tally: &tally,
                    expected: 0,
                    sequence: 0,
                };
                let mut random = Random::branch(self.seed, 1 + u64::from(number));
                let (since, over) = (&since[number as usize], &over);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        since.store(clock(), Ordering::Relaxed);
                        lane.step(&mut random);
                    }
                    since.store(clock(), Ordering::Relaxed);
                    if let Err(error) = lane.value() {
                        println!("lane {number}: the last VALUE: {error}");
                        tally_lost(lane.tally);
                    }
                    since.store(0, Ordering::Relaxed);
                });
            }
            let stuck = |limit: Duration| {
                let limit = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                let now = clock();
                since
                    .iter()
                    .map(|since| since.load(Ordering::Relaxed))
                    .filter(|&since| since != 0 && now.saturating_sub(since) > limit)
                    .count() as u64
            };
            let outcome = |killer: &dyn Strikes, stuck: u64| Outcome {
                kills: killer.kills(),
                operations: tally.operations.load(Ordering::Relaxed),
                lost: tally.lost.load(Ordering::Relaxed),
                doubled: tally.doubled.load(Ordering::Relaxed),
                stuck: tally.stuck.load(Ordering::Relaxed) + stuck,
            };
            let mut kill = || -> Result<()> {
                let mut told = Instant::now();
                while killer.kills() < self.kills && stuck(2 * deadline) == 0 {
                    killer.strike()?;
                    if told.elapsed() > PROGRESS {
                        told = Instant::now();
                        println!("{:4} s: {}", began.elapsed().as_secs(), outcome(killer, 0));
                    }
                }
                killer.revive()
            };
            let killed = kill();
            over.store(true, Ordering::Relaxed);
            // A thread which is stuck can't be joined: this process ends without it.
            let waited = time::until("every lane coming to its end", || {
                since.iter().all(|since| since.load(Ordering::Relaxed) == 0)
            });
            let rest = since
                .iter()
                .filter(|since| since.load(Ordering::Relaxed) != 0)
                .count() as u64;
            let outcome = outcome(killer, rest);
            if let Err(error) = killed {
                println!("the storm broke off: {error:#}");
                println!("{outcome}");
                std::process::exit(1);
            }
            if waited.is_err() {
                println!("{outcome}");
                std::process::exit(1);
            }
            println!(
                "{} s, {} hand-overs",
                began.elapsed().as_secs(),
                killer.hand_overs()
            );
            ensure!(
                self.kills == 0 || outcome.operations >= self.kills,
                "only {} operations in {} kills: the clients had no chance",
                outcome.operations,
                outcome.kills
            );
            Ok(outcome)
        })
    }
}

fn tally_lost(tally: &Tally) {
    tally.lost.fetch_add(1, Ordering::Relaxed);
}

/// A plain request: the counter of the first lane that no client thread uses.
fn plain_request(client: &Client) -> std::io::Result<()> {
    client
        .read_vec(LANES, register(CLIENTS, VALUE), 8)
        .map(drop)
}
