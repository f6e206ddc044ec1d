// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's program that serves on a socket.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::place;
use crate::process::Process;
use crate::wait::SOON;

/// What a device's program says once clients can connect.
const UP: &str = " serves ";

/// What the supervisor says before the number of a program's process.
const STARTED: &str = "the program runs, process ";

/// A device that can be connected to; its program is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: Process,
    command: Vec<OsString>,
    name: String,
    socket: PathBuf,
    /// How much had been said when the last program was started that was killed.
    killed: usize,
    _dir: TempDir,
}

impl Server {
    /// Starts a sample, which says at debug level what it does.
    pub(crate) fn start(program: &str) -> Result<Self> {
        Self::start_with(program, &[])
    }

    /// The same, with some `more` options.
    pub(crate) fn start_with(program: &str, more: &[&str]) -> Result<Self> {
        let path = place::program(program)?.into_os_string();
        Self::run(program, |socket| {
            let command = [path, "-v".into(), "--socket-path".into(), socket.into()];
            let more = more.iter().map(OsString::from);
            command.into_iter().chain(more).collect()
        })
    }

    /// Starts a sample as an operator who wants it to be restarted does.
    pub(crate) fn supervised(program: &str) -> Result<Self> {
        let path = place::program(program)?.into_os_string();
        let muserctl = place::program("muserctl")?.into_os_string();
        Self::run(program, |socket| {
            let supervise = [muserctl, "supervise".into(), "--socket-path".into()];
            let program = [socket.into(), "--".into(), path, "-v".into()];
            supervise.into_iter().chain(program).collect()
        })
    }

    fn run(name: &str, command: impl FnOnce(&Path) -> Vec<OsString>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("muser-vmm-").tempdir()?;
        let socket = dir.path().join("socket");
        let command = command(&socket);
        Ok(Self {
            process: launch(name, &command)?,
            command,
            name: name.to_owned(),
            socket,
            killed: 0,
            _dir: dir,
        })
    }

    /// Starts it on the same socket, after it has ended.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        self.process = launch(&self.name, &self.command)?;
        Ok(())
    }

    /// Kills the program that the supervisor runs at present, as a crash does, once it serves.
    pub(crate) fn kill_program(&mut self) -> Result<()> {
        let place = self.process.hear(self.killed, STARTED, SOON)?;
        self.process.hear(place, UP, SOON)?;
        let line = self.process.line(place).unwrap_or_default();
        let number = line.rsplit(' ').next().unwrap_or_default();
        let program = number.parse().with_context(|| line.clone())?;
        self.killed = place + 1;
        kill(Pid::from_raw(program), Signal::SIGKILL)
            .with_context(|| format!("cannot kill {line:?}"))
    }

    /// Where clients connect.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

fn launch(name: &str, command: &[OsString]) -> Result<Process> {
    let (program, arguments) = command.split_first().context("no program")?;
    let mut command = Command::new(program);
    let log = place::log(name)?;
    let process = Process::start(name, command.args(arguments), &log)?;
    process.hear(0, UP, SOON)?;
    Ok(process)
}
