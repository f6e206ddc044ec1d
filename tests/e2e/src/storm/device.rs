// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device's process: started, watched until it is attached, killed, taken over.

use std::fs::File;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use muser_uapi::*;

use super::Ability;
use crate::check::errno_of;
use crate::mdev::Mdev;
use crate::node::{Description, Node};
use crate::random::Random;
use crate::{sys, time};

/// How often a state is looked at that no file announces.
const GLANCE: Duration = Duration::from_micros(50);

/// A program that serves a device given by `--uuid`, with what options it has before that.
#[derive(Clone, Debug)]
pub struct Program(pub String);

impl Program {
    /// Starts it; with `take_over`, as the successor of the one that runs.
    fn start(&self, uuid: &str, take_over: bool) -> Result<Running> {
        let mut program = self.0.split_whitespace();
        let mut command = Command::new(program.next().context("a device needs a program")?);
        command
            .args(program)
            .args(["--uuid", uuid])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words()?);
        if take_over {
            command.arg("--take-over");
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", self.0))?;
        Ok(Running(child))
    }
}

/// Where the device's processes write what they have to say, which is shown when one ends by itself.
const WORDS: &str = "/tmp/storm-device.log";

fn words() -> Result<File> {
    let file = File::options().append(true).create(true).open(WORDS);
    file.with_context(|| format!("opening {WORDS}"))
}

/// The last words of the device's processes.
fn last_words() -> String {
    let words = std::fs::read_to_string(WORDS).unwrap_or_default();
    let lines: Vec<_> = words.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// A process of the device; killed when dropped.
#[derive(Debug)]
struct Running(Child);

impl Running {
    fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// Waits for an end that is its own doing.
    fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        let pidfd = sys::pidfd(self.0.id())?;
        sys::poll(&pidfd, libc::POLLIN, time::patience())?;
        self.0
            .try_wait()?
            .context("a process that was taken over from does not end")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Who starts and kills the device's processes.
#[derive(Debug)]
pub(super) struct Killer<'a> {
    program: Program,
    mdev: &'a Mdev,
    watch: Node,
    running: Option<Running>,
    ability: Ability,
    random: Random,
    /// How long a process took from its start to its attachment, at most so far.
    start: Duration,
    /// When the process that attached last was known not to be attached, at the latest.
    unattached: Instant,
    /// How long a process lives when it is left alone, at the most.
    life: Duration,
    /// SIGKILLs sent.
    pub(super) kills: u64,
    /// Hand-overs that were let come to their end.
    pub(super) hand_overs: u64,
}

impl<'a> Killer<'a> {
    /// Starts the device's first process, and lets it attach.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub(super) fn new(
        program: Program,
        mdev: &'a Mdev,
        life: Duration,
        random: Random,
    ) -> Result<Self> {
        let mut killer = Self {
            program,
            mdev,
            watch: Node::open(mdev)?,
            running: None,
            ability: Ability::default(),
            random,
            start: Duration::ZERO,
            unattached: Instant::now(),
            life,
            kills: 0,
            hand_overs: 0,
        };
        killer.revive()?;
        killer.ability = ability(&killer.watch)?;
        Ok(killer)
    }

    /// What the device and the kernel can do.
    pub(super) fn ability(&self) -> Ability {
        self.ability
    }

    /// A moment at which the process that serves was not attached yet, the last known.
    pub(super) fn unattached(&self) -> Instant {
        self.unattached
    }

    /// Has a process serve the device.
    ///
    /// # Errors
    ///
    /// When it does not attach in time.
    pub(super) fn revive(&mut self) -> Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let attachments = self.attachments()?;
        let began = Instant::now();
        self.unattached = began;
        self.running = Some(self.program.start(self.mdev.uuid(), false)?);
        self.wait_for_attachment(attachments)?;
        self.start = self.start.max(began.elapsed());
        Ok(())
    }

    /// Starts a process if none runs, lets it live for a while, and kills it.
    ///
    /// # Errors
    ///
    /// When a process does not attach, or ends by itself.
    pub(super) fn strike(&mut self) -> Result<()> {
        match self.random.below(100) {
            // Wherever it is on its way to serving.
            0..20 => {
                self.kill()?;
                self.running = Some(self.program.start(self.mdev.uuid(), false)?);
                self.pause(self.start)?;
            }
            // Right at the attachment.
            20..45 => {
                self.kill()?;
                self.revive()?;
            }
            45..60 if self.ability.take_over => return self.hand_over(),
            // While it serves.
            _ => {
                self.revive()?;
                self.pause(self.life)?;
            }
        }
        self.kill()
    }

    /// Kills the process, if one runs. One that ended by itself is an error: it should not have.
    ///
    /// # Errors
    ///
    /// As said.
    pub(super) fn kill(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else {
            return Ok(());
        };
        if let Some(status) = running.0.try_wait()? {
            bail!(
                "{} ended by itself: {status}\n{}",
                self.program.0,
                last_words()
            );
        }
        running.kill()?;
        self.kills += 1;
        Ok(())
    }

    /// Waits until a client's request is queued.
    pub(super) fn wait_for_request(&self) -> Result<()> {
        let deadline = Instant::now() + time::patience();
        while self.watch.query()?.queued == 0 {
            ensure!(Instant::now() < deadline, "no request is queued");
            std::thread::sleep(GLANCE);
        }
        Ok(())
    }

    /// Starts a successor, and kills it, its predecessor, or nobody.
    fn hand_over(&mut self) -> Result<()> {
        self.revive()?;
        let attachments = self.attachments()?;
        let successor = self.program.start(self.mdev.uuid(), true)?;
        let choice = self.random.below(4);
        if choice < 2 {
            self.pause(self.start)?;
        }
        match choice {
            0 => {
                successor.kill()?;
                self.kills += 1;
                // It may have been far enough for its predecessor to have gone.
                if let Some(running) = &mut self.running
                    && (running.0.try_wait()?.is_some() || self.watch.query()?.pid == 0)
                {
                    running.wait()?;
                    self.running = None;
                }
                return Ok(());
            }
            1 => {
                let predecessor = self.running.replace(successor);
                if let Some(mut predecessor) = predecessor {
                    match predecessor.0.try_wait()? {
                        Some(status) => ensure!(
                            status.success(),
                            "taken over from: {status}\n{}",
                            last_words()
                        ),
                        None => {
                            predecessor.kill()?;
                            self.kills += 1;
                        }
                    }
                }
            }
            _ => {
                let predecessor = self.running.replace(successor);
                if let Some(mut predecessor) = predecessor {
                    let status = predecessor.wait()?;
                    ensure!(
                        status.success(),
                        "taken over from: {status}\n{}",
                        last_words()
                    );
                }
                self.hand_overs += 1;
            }
        }
        self.wait_for_attachment(attachments)
    }

    /// Waits some part of a time: no synchronisation, but the moment of the next kill.
    fn pause(&mut self, longest: Duration) -> Result<()> {
        let longest = u64::try_from(longest.as_nanos())?;
        std::thread::sleep(Duration::from_nanos(self.random.below(longest)));
        Ok(())
    }

    fn attachments(&self) -> Result<u64> {
        Ok(self.watch.query()?.counters.attachments)
    }

    fn wait_for_attachment(&mut self, before: u64) -> Result<()> {
        let deadline = Instant::now() + time::patience();
        loop {
            let asked = Instant::now();
            if self.attachments()? > before {
                return Ok(());
            }
            self.unattached = asked;
            if let Some(running) = &mut self.running
                && let Some(status) = running.0.try_wait()?
            {
                self.running = None;
                bail!(
                    "{} ended by itself: {status}\n{}",
                    self.program.0,
                    last_words()
                );
            }
            ensure!(
                Instant::now() < deadline,
                "{} does not attach",
                self.program.0
            );
            std::thread::sleep(GLANCE);
        }
    }
}

/// Asks the module what it can do, through a file that does not serve.
fn ability(watch: &Node) -> Result<Ability> {
    let mut areas = vec![muser_area::default(); MUSER_MAX_AREAS as usize];
    let mut query = muser_query {
        size: size_of::<muser_query>() as u32,
        num_areas: MUSER_MAX_AREAS,
        areas: areas.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    sys::ioctl(watch, MUSER_QUERY, &mut query)?;
    areas.truncate(query.num_areas as usize);
    let unknown = |number| {
        let answer = sys::ioctl_bytes(watch, number, &mut [0; 64]);
        answer.is_err_and(|error| errno_of(&error) == libc::ENOTTY)
    };
    // A successor of a wrong description is told so, where there are successors.
    let standby = Description {
        flags: MUSER_ATTACH_STANDBY,
        ..Description::minimal()
    };
    let refused = watch.attach_raw(&standby).err();
    Ok(Ability {
        dma: !unknown(MUSER_DMA_COPY),
        doorbells: areas.iter().any(|area| area.flags == MUSER_AREA_DOORBELL),
        take_over: refused.is_some_and(|refusal| refusal.fault == MUSER_FAULT_DIFFERS),
    })
}
