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
use crate::wait::{self, SOON};

/// What a device's program says once clients can connect.
const UP: &str = " serves ";

/// A device that can be connected to; its program is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: Process,
    command: Vec<OsString>,
    name: String,
    socket: PathBuf,
    /// The program that was killed last.
    killed: Option<i32>,
    _dir: TempDir,
}

impl Server {
    /// Starts a sample, which says at debug level what it does.
    pub(crate) fn start(program: &str) -> Result<Self> {
        let path = place::program(program)?.into_os_string();
        Self::run(program, |socket| {
            vec![path, "-v".into(), "--socket-path".into(), socket.into()]
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
            killed: None,
            _dir: dir,
        })
    }

    /// Starts it on the same socket, after it has ended.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        self.process = launch(&self.name, &self.command)?;
        Ok(())
    }

    /// Kills the program that the supervisor runs at present, as a crash does.
    pub(crate) fn kill_program(&mut self) -> Result<()> {
        let id = self.process.id();
        let list = format!("/proc/{id}/task/{id}/children");
        let program = wait::until("the supervisor starting the program", SOON, || {
            let children = std::fs::read_to_string(&list)?;
            let mut children = children.split_whitespace().map(str::parse);
            let program = children.next().transpose()?;
            // Until it is reaped the one that was killed is still a child.
            Ok(program.filter(|program| self.killed != Some(*program)))
        })?;
        self.killed = Some(program);
        kill(Pid::from_raw(program), Signal::SIGKILL).context("cannot kill the program")
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
