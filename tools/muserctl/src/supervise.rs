// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `muserctl supervise`: a device's program behind a vfio-user socket, started again when it dies,
//! without its client noticing.
//!
//! What a client sees is [`libmuser::supervise`]'s part. Here is the program's: when it is started,
//! told to end, killed, and given up.

use crate::cli::Supervise;
use libmuser::cli::{log_to_stderr, socket_access};
use libmuser::supervise::Supervisor;
use nix::sys::signal::Signal;
use program::{Life, Program};
use signals::Signals;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

mod program;
mod signals;

/// Supervising failed.
const EXIT_FAILED: u8 = 1;
/// The socket could not be made or taken.
const EXIT_UNAVAILABLE: u8 = 3;
/// The program can't be started, or never came so far as to serve.
const EXIT_PROGRAM: u8 = 4;

/// How long a program may take to end when it is told to.
const GRACE: Duration = Duration::from_secs(10);
/// How long a program that the supervisor has sent away may go on.
const LINGER: Duration = Duration::from_secs(2);
/// Programs that may end by themselves before one has ever served.
const FIRST_LIVES: u32 = 5;

/// Supervises to the end.
pub(crate) fn run(options: &Supervise) -> ExitCode {
    log_to_stderr(options.level());
    let supervisor = match open(options) {
        Ok(supervisor) => supervisor,
        Err(error) => {
            log::error!("{error}");
            return EXIT_UNAVAILABLE.into();
        }
    };
    // Before the first program, so that no signal is missed.
    let signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            log::error!("signals can't be taken: {error}");
            return EXIT_FAILED.into();
        }
    };
    let program = Program::new(options.program(), supervisor.links());
    let mut run = Run {
        supervisor,
        program,
        ending: None,
        served: false,
    };
    run.run(&signals)
}

fn open(options: &Supervise) -> libmuser::Result<Supervisor> {
    let mut supervisor = match (&options.socket_path, options.fd) {
        (Some(path), _) => {
            let access = socket_access(options.socket_mode, options.socket_group.as_deref())?;
            Supervisor::listen(path, access)?
        }
        (None, Some(handed)) => Supervisor::from_fd(handed.take()?)?,
        // clap has asked for one of them.
        (None, None) => return Err(libmuser::Errno::EINVAL.into()),
    };
    if let Some(timeout) = options.reattach_timeout {
        supervisor.set_reattach_timeout(timeout);
    }
    Ok(supervisor)
}

struct Run {
    supervisor: Supervisor,
    program: Program,
    /// With which code this process ends, as soon as the program has.
    ending: Option<u8>,
    /// Whether any program has served.
    served: bool,
}

impl Run {
    fn run(&mut self, signals: &Signals) -> ExitCode {
        loop {
            let now = Instant::now();
            for signal in signals.take() {
                self.signal(signal, now);
            }
            if let Some(life) = self.program.reap(now) {
                self.ended(&life);
            }
            if self.supervisor.is_served() {
                self.served = true;
                self.program.serves();
            } else {
                self.program.is_sent_away(now, LINGER);
            }
            if let Some(code) = self.ending {
                if !self.program.is_running() {
                    return code.into();
                }
            } else if let Err(error) = self.program.start_if_due(now) {
                log::error!("{error}");
                if !self.served {
                    return EXIT_PROGRAM.into();
                }
            }
            self.program.kill_if_due(now);
            let timeout = self.program.next_moment(now);
            match self.supervisor.turn(timeout, &[signals.as_fd()]) {
                Ok(None) => {}
                Ok(Some(_)) if self.ending.is_some() => {}
                Ok(Some(_)) => {
                    log::info!("the client has gone");
                    self.end(0, Instant::now());
                }
                Err(error) => {
                    log::error!("{error}");
                    return EXIT_FAILED.into();
                }
            }
        }
    }

    fn signal(&mut self, signal: Signal, now: Instant) {
        match signal {
            Signal::SIGHUP if self.ending.is_none() => {
                log::info!("the program is to be started again");
                self.program.tell_to_end(now, GRACE);
            }
            Signal::SIGTERM | Signal::SIGINT if self.ending.is_none() => {
                log::info!("told to end");
                self.end(0, now);
            }
            // Once more is meant.
            Signal::SIGTERM | Signal::SIGINT => self.program.kill(),
            // SIGCHLD has done its part by ending the wait.
            _ => {}
        }
    }

    fn end(&mut self, code: u8, now: Instant) {
        self.ending = Some(code);
        self.program.tell_to_end(now, GRACE);
    }

    /// The program has ended.
    fn ended(&mut self, life: &Life) {
        if self.ending.is_some() {
            log::info!("the program has ended: {life}");
            return;
        }
        if life.was_told {
            log::info!("the program has ended as it was told to: {life}");
            return;
        }
        log::warn!("the program has ended: {life}");
        // Wrong options, a device that can't exist: to start it again changes nothing.
        let hopeless = matches!(life.status.code(), Some(0 | 2 | 3));
        if !self.served && (hopeless || self.program.failures() >= FIRST_LIVES) {
            log::error!("it is given up: it has never come so far as to serve");
            self.ending = Some(EXIT_PROGRAM);
        } else if let Some(delay) = self.program.delay() {
            log::warn!(
                "it has ended {} times at once; it is started again in {delay:?}",
                self.program.failures()
            );
        }
    }
}
