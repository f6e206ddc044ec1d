// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Starts QEMU as a user does: the options are those of the README.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::{json, Value};
use tempfile::TempDir;

use crate::lines::{Lines, Listener};
use crate::place;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::qtest::Qtest;
use crate::wait::{Deadline, SOON};

const PROGRAM: &str = "qemu-system-x86_64";

/// What `-device` and `device_add` are told of a device that is served on a socket.
pub(crate) fn card(socket: &Path) -> Value {
    json!({ "driver": "vfio-user-pci", "socket": { "path": socket, "type": "unix" } })
}

/// A port that a card with I/O ports can be plugged into, by what follows `-device`.
pub(crate) const PORT: &str = "pcie-root-port,id=port-1,chassis=1,io-reserve=4096";

/// A QEMU that is not started yet.
#[derive(Debug)]
pub(crate) struct Setup {
    name: String,
    command: Command,
    dir: TempDir,
    qmp: Listener,
}

impl Setup {
    /// A machine with nothing but a control socket.
    pub(crate) fn new(name: &str, machine: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("muser-vmm-").tempdir()?;
        let qmp = dir.path().join("qmp");
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", machine]);
        let setup = Self {
            name: name.to_owned(),
            command,
            qmp: Listener::bind(&qmp, "control")?,
            dir,
        };
        let socket = format!("socket,id=qmp-socket,path={}", qmp.display());
        let setup = setup.with("-chardev", &socket);
        Ok(setup.with("-object", "monitor-qmp,id=qmp,chardev=qmp-socket"))
    }

    /// One more option and its value.
    pub(crate) fn with(mut self, option: &str, value: &str) -> Self {
        self.command.args([option, value]);
        self
    }

    /// Memory that servers can map: what QEMU shares with them is a descriptor of it.
    pub(crate) fn shared_memory(self, size: &str) -> Self {
        let memory = format!("memory-backend-memfd,id=memory,size={size},share=on");
        let setup = self.with("-m", size).with("-object", &memory);
        setup.with("-machine", "memory-backend=memory")
    }

    /// A device that is served on a socket, with some `more` of its properties.
    pub(crate) fn device(self, socket: &Path, more: &[(&str, Value)]) -> Self {
        let mut device = card(socket);
        for (name, value) in more {
            device[*name] = value.clone();
        }
        self.with("-device", &device.to_string())
    }

    /// A socket by which QEMU can be talked to: the option's value begins with `prefix`, and its
    /// path follows.
    pub(crate) fn socket(
        self,
        what: &'static str,
        option: &str,
        prefix: &str,
    ) -> Result<(Self, Listener)> {
        let path = self.dir.path().join(what);
        let listener = Listener::bind(&path, what)?;
        let value = format!("{prefix}{}", path.display());
        Ok((self.with(option, &value), listener))
    }

    /// Starts it.
    pub(crate) fn start(mut self) -> Result<Qemu> {
        let log = place::log(&self.name)?;
        let mut process = Process::start(&self.name, &mut self.command, &log)?;
        let lines = self.qmp.accept(Deadline::after(SOON));
        match lines.and_then(Qmp::greet) {
            Ok(qmp) => Ok(Qemu {
                qmp,
                process,
                _dir: self.dir,
            }),
            Err(error) => {
                // What it says when it refuses its options comes last.
                process.kill()?;
                Err(error).with_context(|| process.story())
            }
        }
    }

    /// Starts it without a guest, for a test to be the CPU.
    pub(crate) fn start_bare(self) -> Result<(Qemu, Qtest)> {
        let setup = self.with("-accel", "qtest").with("-qtest-log", "none");
        let (setup, listener) = setup.socket("qtest", "-qtest", "unix:")?;
        let qemu = setup.start()?;
        let lines: Lines = listener.accept(Deadline::after(SOON))?;
        Ok((qemu, Qtest::new(lines)))
    }
}

/// A QEMU that runs; killed when dropped.
#[derive(Debug)]
pub(crate) struct Qemu {
    pub(crate) qmp: Qmp,
    pub(crate) process: Process,
    _dir: TempDir,
}

impl Qemu {
    /// Resets the machine, as its reset button does.
    pub(crate) fn reset(&mut self) -> Result<()> {
        self.qmp.forget_events();
        self.qmp.execute("system_reset", json!({}))?;
        self.qmp.event("RESET", |_| true)
    }

    /// Ends it in order.
    pub(crate) fn quit(mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.end().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the README tells users to run is what runs here.
    #[test]
    fn options_are_those_of_the_readme() {
        let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
        let readme = std::fs::read_to_string(readme).unwrap();
        let setup = Setup::new("readme", "q35").unwrap().shared_memory("1G");
        let before = setup.command.get_args().count();
        let setup = setup.device(Path::new("/tmp/gpio.sock"), &[]);
        let arguments: Vec<_> = setup.command.get_args().collect();
        let device = arguments[before + 1].to_str().unwrap();
        for option in [
            "-machine q35 -m 1G",
            "-object memory-backend-memfd,id=memory,size=1G,share=on",
            "-machine memory-backend=memory",
            &format!("-device '{device}'"),
            PORT,
            "muserctl supervise --socket-path",
        ] {
            assert!(readme.contains(option), "{option}");
        }
        let words = arguments.iter().map(|word| word.to_str().unwrap());
        let words = words.collect::<Vec<_>>().join(" ");
        assert!(words.contains("share=on -machine memory-backend=memory -device"));
    }
}
