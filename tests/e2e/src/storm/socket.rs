// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The storm over a vfio-user socket: the clients' connection is with a supervisor, behind which the
//! device's processes come and go. It needs no module, and no kernel of its own.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use libmuser::client::{ClientMemory, IrqAction, IrqData, Options};
use libmuser::supervise::{Links, Supervisor};
use libmuser::{DmaAccess, Stop};

use super::port::Port;
use super::registers::{register, ADDRESS, BLOCK, LANES, LANE_COUNT, VECTORS};
use super::{Ability, Outcome, Program, Storm, Strikes, CLIENTS, COMMAND, IOVA};
use crate::node::CONFIG;
use crate::random::Random;
use crate::sys::{EventFd, Mapping, PAGE};
use crate::{sys, time};

/// How long a request waits for a process, and a client for its answer: as long as it takes.
const WAIT: Duration = Duration::from_secs(60);
/// How often it is looked whether a process has attached.
const GLANCE: Duration = Duration::from_micros(50);

/// Has the storm.
pub(super) fn run(storm: &Storm) -> Result<Outcome> {
    let (client, other) = UnixStream::pair()?;
    let supervision = Supervision::start(other.into())?;
    let life = Duration::from_millis(15);
    let random = Random::branch(storm.seed, 0);
    let mut killer = SocketKiller::new(storm.program.clone(), &supervision, life, random);
    println!(
        "storm of {} kills on {} over a supervised socket, seed {}",
        storm.kills, storm.program.0, storm.seed
    );
    killer.revive()?;
    let client = Options::new().timeout(WAIT).open(client.into())?;
    Port::write(&client, CONFIG, COMMAND.0, &COMMAND.1)?;
    let file = sys::memfd(PAGE)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let memory = Mapping::new(&file, 0, PAGE, protection, libc::MAP_SHARED)?;
    let lent = ClientMemory::map_file(file.as_fd(), 0, PAGE, true)?;
    client.dma_map(IOVA, &lent, 0..PAGE as u64, DmaAccess::ReadWrite)?;
    for lane in 0..CLIENTS {
        let block = IOVA + BLOCK * u64::from(lane);
        Port::write(
            &client,
            LANES,
            register(lane, ADDRESS),
            &block.to_le_bytes(),
        )?;
    }
    let interrupts = (0..LANE_COUNT).map(|_| EventFd::new());
    let interrupts = interrupts.collect::<std::io::Result<Vec<_>>>()?;
    let events: Vec<_> = interrupts.iter().map(|event| Some(event.as_fd())).collect();
    client.set_irqs(VECTORS, 0, IrqAction::Trigger, IrqData::EventFds(&events))?;
    let outcome = storm.hammer(&client, &interrupts, &mut killer, Some(&memory))?;
    drop(killer);
    drop(client);
    supervision.end()?;
    Ok(outcome)
}

/// A supervisor in a thread of its own.
struct Supervision {
    links: Links,
    stop: Stop,
    attachments: Arc<AtomicU64>,
    thread: JoinHandle<libmuser::Result<()>>,
}

impl Supervision {
    fn start(client: OwnedFd) -> Result<Self> {
        let mut supervisor = Supervisor::from_fd(client)?;
        supervisor.set_reattach_timeout(WAIT);
        let (links, stop) = (supervisor.links(), Stop::new()?);
        let attachments = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (stop.clone(), Arc::clone(&attachments));
        let thread = std::thread::spawn(move || loop {
            let over = supervisor.turn(None, &[stopped.as_fd()])?;
            counter.store(supervisor.counters().attachments, Ordering::Release);
            if over.is_some() || stopped.is_used() {
                return Ok(());
            }
        });
        Ok(Self {
            links,
            stop,
            attachments,
            thread,
        })
    }

    fn end(self) -> Result<()> {
        self.stop.stop();
        let ended = self.thread.join();
        ended.map_err(|_| anyhow::anyhow!("the supervisor panicked"))??;
        Ok(())
    }
}

/// Who starts and kills the processes behind a supervisor.
struct SocketKiller<'a> {
    program: Program,
    supervision: &'a Supervision,
    running: Option<Running>,
    random: Random,
    /// How long a process took from its start to its attachment, at most so far.
    start: Duration,
    /// How long a process lives when it is left alone, at the most.
    life: Duration,
    kills: u64,
    hand_overs: u64,
}

/// A process; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl<'a> SocketKiller<'a> {
    fn new(program: Program, supervision: &'a Supervision, life: Duration, random: Random) -> Self {
        Self {
            program,
            supervision,
            running: None,
            random,
            start: Duration::ZERO,
            life,
            kills: 0,
            hand_overs: 0,
        }
    }

    fn spawn(&self) -> Result<Running> {
        let mut words = self.program.0.split_whitespace();
        let link = self.supervision.links.link()?;
        // Nobody else starts processes here.
        sys::inherit(link.as_fd())?;
        let mut command = Command::new(words.next().context("a device needs a program")?);
        command
            .args(words)
            .args(["--fd", &link.as_raw_fd().to_string()])
            .stdin(Stdio::null());
        let child = command.spawn();
        let child = child.with_context(|| format!("starting {}", self.program.0))?;
        Ok(Running(child))
    }

    /// Kills the process, if one runs. One that ended by itself is an error: it should not have.
    fn kill(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else {
            return Ok(());
        };
        if let Some(status) = running.0.try_wait()? {
            bail!("{} ended by itself: {status}", self.program.0);
        }
        drop(running);
        self.kills += 1;
        Ok(())
    }

    /// Ends the process in peace, as an upgrade does.
    fn hand_over(&mut self) -> Result<()> {
        self.revive()?;
        if let Some(mut running) = self.running.take() {
            sys::kill(i32::try_from(running.0.id())?, libc::SIGTERM)?;
            let pidfd = sys::pidfd(running.0.id())?;
            sys::poll(&pidfd, libc::POLLIN, time::patience())?;
            let status = running.0.try_wait()?.context("it does not end")?;
            // Told so early that it did not listen yet, it is ended by the signal itself.
            let early = status.signal() == Some(libc::SIGTERM);
            ensure!(status.success() || early, "told to end: {status}");
        }
        self.hand_overs += 1;
        self.revive()
    }

    /// Waits some part of a time: no synchronisation, but the moment of the next kill.
    fn pause(&mut self, longest: Duration) -> Result<()> {
        let longest = u64::try_from(longest.as_nanos())?.max(1);
        std::thread::sleep(Duration::from_nanos(self.random.below(longest)));
        Ok(())
    }

    fn attachments(&self) -> u64 {
        self.supervision.attachments.load(Ordering::Acquire)
    }
}

impl Strikes for SocketKiller<'_> {
    fn strike(&mut self) -> Result<()> {
        match self.random.below(100) {
            // Wherever it is on its way to serving.
            0..20 => {
                self.kill()?;
                self.running = Some(self.spawn()?);
                self.pause(self.start)?;
            }
            // Right at the attachment.
            20..45 => {
                self.kill()?;
                self.revive()?;
            }
            45..60 => return self.hand_over(),
            // While it serves.
            _ => {
                self.revive()?;
                self.pause(self.life)?;
            }
        }
        self.kill()
    }

    fn revive(&mut self) -> Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let before = self.attachments();
        let began = Instant::now();
        self.running = Some(self.spawn()?);
        while self.attachments() == before {
            if let Some(running) = &mut self.running
                && let Some(status) = running.0.try_wait()?
            {
                bail!("{} ended by itself: {status}", self.program.0);
            }
            let patience = time::patience();
            ensure!(
                began.elapsed() < patience,
                "{} does not attach",
                self.program.0
            );
            std::thread::sleep(GLANCE);
        }
        self.start = self.start.max(began.elapsed());
        Ok(())
    }

    fn ability(&self) -> Ability {
        Ability {
            dma: true,
            doorbells: true,
            take_over: true,
        }
    }

    fn kills(&self) -> u64 {
        self.kills
    }

    fn hand_overs(&self) -> u64 {
        self.hand_overs
    }
}
