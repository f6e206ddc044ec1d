// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program: one process after the other.

use crate::error::{reason, Error, Result};
use crate::sys;
use libmuser::supervise::Links;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fmt;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Lives that may be short in a row before the next one waits. A request that ends its programs is
/// refused after 64 of them (`libmuser::supervise`), for which its client waits.
const SHORT_LIVES: u32 = 100;
/// The same, of programs that did not even come to serve.
const STILLBIRTHS: u32 = 3;
/// A life that is longer is none of those.
const SHORT: Duration = Duration::from_secs(1);
/// How long the next one waits then, at first and at most.
const DELAYS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What is to be run, and its present process.
pub(super) struct Program {
    command: Vec<OsString>,
    links: Links,
    running: Option<Running>,
    /// Short lives in a row, and those in a row that never served.
    short: u32,
    stillbirths: u32,
    /// When the next process starts.
    due: Option<Instant>,
}

struct Running {
    child: Child,
    began: Instant,
    served: bool,
    told: bool,
    /// When it is killed, if it has not ended by then.
    kill_at: Option<Instant>,
}

/// A life that is over.
pub(super) struct Life {
    pub(super) status: ExitStatus,
    /// Whether it was to end.
    pub(super) was_told: bool,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => write!(f, "exit status {code}"),
            (None, Some(signal)) => match Signal::try_from(signal) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {signal}"),
            },
            (None, None) => self.status.fmt(f),
        }
    }
}

impl Program {
    pub(super) fn new(command: Vec<OsString>, links: Links) -> Self {
        Self {
            command,
            links,
            running: None,
            short: 0,
            stillbirths: 0,
            due: Some(Instant::now()),
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The process serves.
    pub(super) fn serves(&mut self) {
        if let Some(running) = &mut self.running {
            running.served = true;
        }
    }

    /// The supervisor has no link to the process: if it had one, it was sent away, and should end.
    pub(super) fn is_sent_away(&mut self, now: Instant, linger: Duration) {
        if let Some(running) = &mut self.running
            && running.served
        {
            running.kill_at.get_or_insert(now + linger);
        }
    }

    /// Starts a process, if it is time.
    pub(super) fn start_if_due(&mut self, now: Instant) -> Result<()> {
        if self.running.is_some() || self.due.is_none_or(|due| due > now) {
            return Ok(());
        }
        self.due = Some(now + DELAYS.1);
        let child = self.spawn()?;
        log::info!("the program runs, process {}", child.id());
        self.due = None;
        self.running = Some(Running {
            child,
            began: now,
            served: false,
            told: false,
            kill_at: None,
        });
        Ok(())
    }

    fn spawn(&self) -> Result<Child> {
        let (program, arguments) = self
            .command
            .split_first()
            .ok_or_else(|| Error::new("there is no program to start"))?;
        let link = self
            .links
            .link()
            .map_err(|error| Error::new(error.to_string()))?;
        // There is no other thread which could start a process just now.
        fcntl(&link, FcntlArg::F_SETFD(FdFlag::empty()))
            .map_err(|errno| Error::new(format!("the program can't have its link: {errno}")))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(["--fd", &link.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            // They were for this process.
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDS");
        sys::make_child(&mut command);
        command.spawn().map_err(|error| {
            let program = program.to_string_lossy();
            Error::new(format!("{program} can't be started: {}", reason(&error)))
        })
    }

    /// The life that is over, if it is.
    pub(super) fn reap(&mut self, now: Instant) -> Option<Life> {
        let running = self.running.as_mut()?;
        let status = running.child.try_wait().ok()??;
        let Running {
            child,
            began,
            served,
            told,
            ..
        } = self.running.take()?;
        // What it has started, and left behind, has the link still, but the next one is to serve. It gets
        // no time: to wind up would reset the state that they share.
        signal(&child, Signal::SIGKILL);
        let short = now.saturating_duration_since(began) < SHORT && !told;
        self.short = if short { self.short + 1 } else { 0 };
        self.stillbirths = if short && !served {
            self.stillbirths + 1
        } else {
            0
        };
        self.due = Some(now + self.delay().unwrap_or_default());
        Some(Life {
            status,
            was_told: told,
        })
    }

    /// How often in a row it has ended before it came to serve.
    pub(super) fn failures(&self) -> u32 {
        self.stillbirths.max(self.short.saturating_sub(SHORT_LIVES))
    }

    /// How long the next start is put off, if it is.
    pub(super) fn delay(&self) -> Option<Duration> {
        let many = self.stillbirths.saturating_sub(STILLBIRTHS);
        let many = many.max(self.short.saturating_sub(SHORT_LIVES));
        let doubled = many.checked_sub(1)?.min(16);
        Some(DELAYS.1.min(DELAYS.0 * (1 << doubled)))
    }

    /// Tells the process to end, for which it has `grace`.
    pub(super) fn tell_to_end(&mut self, now: Instant, grace: Duration) {
        let Some(running) = &mut self.running else {
            // Whoever wants the program anew does not want to wait for it.
            self.due = self.due.map(|_| now);
            return;
        };
        running.told = true;
        // However often it is told, the first time counts.
        running.kill_at.get_or_insert(now + grace);
        signal(&running.child, Signal::SIGTERM);
    }

    /// Ends the process at once.
    pub(super) fn kill(&mut self) {
        if let Some(running) = &mut self.running {
            running.kill_at = None;
            signal(&running.child, Signal::SIGKILL);
        }
    }

    /// Ends the process if it was to be gone by now.
    pub(super) fn kill_if_due(&mut self, now: Instant) {
        let due = |running: &Running| running.kill_at.is_some_and(|at| at <= now);
        if self.running.as_ref().is_some_and(due) {
            log::error!("the program does not end, and is killed");
            self.kill();
        }
    }

    /// How long there is nothing to be done for it.
    pub(super) fn next_moment(&self, now: Instant) -> Option<Duration> {
        let kill = self.running.as_ref().and_then(|running| running.kill_at);
        let next = kill.into_iter().chain(self.due).min();
        next.map(|next| next.saturating_duration_since(now))
    }
}

/// Sends a signal to a child's group: all that it has started and that is there.
fn signal(child: &Child, signal: Signal) {
    if let Ok(id) = i32::try_from(child.id()) {
        // They may have ended.
        let _ = killpg(Pid::from_raw(id), signal);
    }
}

impl Drop for Program {
    /// Nobody else would wait for it.
    fn drop(&mut self) {
        self.kill();
        if let Some(running) = &mut self.running {
            let _ = running.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn program() -> Program {
        let (own, _other) = UnixStream::pair().unwrap();
        let supervisor = libmuser::supervise::Supervisor::from_fd(own.into()).unwrap();
        let command = vec!["sh".into(), "-c".into(), "exit 7".into()];
        Program::new(command, supervisor.links())
    }

    /// Has a life begin and end.
    fn live(program: &mut Program, now: Instant, lasts: Duration) -> Life {
        program.due = Some(now);
        program.start_if_due(now).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(life) = program.reap(now + lasts) {
                return life;
            }
            std::thread::yield_now();
        }
        panic!("it does not end");
    }

    #[test]
    fn program_that_ends_at_once_waits_longer_and_longer() {
        let (mut program, now) = (program(), Instant::now());
        let mut delays = Vec::new();
        for _ in 0..12 {
            let life = live(&mut program, now, Duration::ZERO);
            assert_eq!(life.to_string(), "exit status 7");
            delays.push(program.delay().map(|delay| delay.as_millis()));
        }

        assert_eq!(delays[..3], [None; 3]);
        assert_eq!(delays[3..6], [Some(100), Some(200), Some(400)]);
        assert_eq!(delays[11], Some(5000));
        live(&mut program, now, SHORT);
        assert_eq!(program.delay(), None);
    }

    #[test]
    fn program_that_is_not_there_is_named() {
        let mut program = program();
        program.command = vec!["/no/such/program".into()];

        let error = program.start_if_due(Instant::now()).unwrap_err();

        assert!(error.to_string().starts_with("/no/such/program can't be"));
        assert!(!program.is_running() && program.due.is_some());
    }
}
