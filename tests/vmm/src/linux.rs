// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that runs Debian's kernel and takes commands over its second serial port.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{anyhow, bail, ensure, Context as _, Error, Result};

use crate::lines::Lines;
use crate::place;
use crate::qemu::{Qemu, Setup};
use crate::wait::{Deadline, LONG, SOON};

/// What `guest/init` says when it takes commands, and after each.
const UP: &str = "MUSER-VMM-UP";
const DONE: &str = "MUSER-VMM-DONE ";
/// Rounds of a work between one thing that is done to it and the next.
const ROUNDS_APART: usize = 5;
/// Lines of its console that a failure shows.
const TAIL: usize = 25;

/// A guest; killed when dropped.
#[derive(Debug)]
pub(crate) struct Linux {
    pub(crate) qemu: Qemu,
    shell: Lines,
    console: PathBuf,
}

impl Linux {
    /// Boots a guest, with `words` for its kernel, and waits until it takes commands.
    pub(crate) fn boot(setup: Setup, words: &str) -> Result<Self> {
        static BOOTS: AtomicU32 = AtomicU32::new(1);
        let boot = BOOTS.fetch_add(1, Ordering::Relaxed);
        let console = place::log(&format!("guest-{boot}.console"))?;
        // Five-level page tables are left out as in the other guests, see xtask's qemu.rs.
        let setup = setup.with("-accel", "tcg,thread=multi");
        let setup = setup.with("-cpu", "max,la57=off").with("-smp", "2");
        let setup = setup.with("-kernel", &place::kernel()?.display().to_string());
        let setup = setup.with("-initrd", &place::initramfs()?.display().to_string());
        let words = format!("console=ttyS0 panic=-1 oops=panic {words}");
        let setup = setup.with("-append", &words);
        let setup = setup.with("-serial", &format!("file:{}", console.display()));
        let (setup, shell) = setup.socket("shell", "-chardev", "socket,id=shell,path=")?;
        let qemu = setup.with("-serial", "chardev:shell").start()?;
        let shell = shell.accept(Deadline::after(SOON))?;
        let mut linux = Self {
            qemu,
            shell,
            console,
        };
        match linux.wait_until_up() {
            Ok(()) => Ok(linux),
            Err(error) => Err(linux.explain(error)),
        }
    }

    /// Waits until it has come up, for the first time or again.
    pub(crate) fn wait_until_up(&mut self) -> Result<()> {
        let deadline = Deadline::after(LONG);
        loop {
            let line = self.shell.next(deadline);
            if line.context("the guest's boot")? == UP {
                return Ok(());
            }
        }
    }

    /// Runs a shell command, which must succeed; returns what it says.
    pub(crate) fn run(&mut self, command: &str) -> Result<String> {
        self.run_for(command, SOON)
    }

    /// Runs a shell command that may take so long.
    pub(crate) fn run_for(&mut self, command: &str, patience: Duration) -> Result<String> {
        ensure!(!command.contains('\n'), "one line, not {command:?}");
        self.shell.send(command)?;
        let deadline = Deadline::after(patience);
        let mut said = String::new();
        loop {
            let line = self.shell.next(deadline);
            let line = line.with_context(|| format!("in the guest: {command}\n{said}"))?;
            match line.strip_prefix(DONE) {
                Some("0") => return Ok(said.trim_end().to_owned()),
                Some(status) => bail!("in the guest: {command}: status {status}\n{said}"),
                None if line == UP => bail!("the guest has rebooted amid: {command}\n{said}"),
                None => said += &format!("{line}\n"),
            }
        }
    }

    /// Has it look again and again until a condition of the shell's holds.
    pub(crate) fn wait_for(&mut self, what: &str, condition: &str) -> Result<()> {
        let seconds = SOON.as_secs();
        let look = format!(
            "n=0; until {condition}; do n=$((n + 1)); [ $n -lt {} ] || break; usleep 100000; done; {condition}",
            seconds * 10
        );
        let waited = self.run_for(&look, LONG);
        waited
            .map(drop)
            .with_context(|| format!("waiting for {what}"))
    }

    /// Runs a command that prints a line a round, and does something to it so many times meanwhile,
    /// some rounds apart. It must go on as if nothing was, and end well when it is told to.
    pub(crate) fn work_amid(
        &mut self,
        command: &str,
        times: usize,
        mut act: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        self.run(&format!(
            "rm -f /tmp/stop; {command} - >/tmp/work 2>&1 & work=$!"
        ))?;
        for time in 1..=times {
            let at_work = format!("[ $(wc -l </tmp/work) -ge {} ]", time * ROUNDS_APART);
            let goes_on = "kill -0 $work 2>/dev/null";
            self.wait_for("rounds of work", &format!("{at_work} || ! {goes_on}"))?;
            self.run(&format!("{goes_on} || {{ tail -n 3 /tmp/work; false; }}"))?;
            act()?;
        }
        let end = "touch /tmp/stop; wait $work; status=$?; tail -n 3 /tmp/work; (exit $status)";
        self.run_for(end, LONG).map(drop)
    }

    /// Has it do what it does not come back from.
    pub(crate) fn send(&mut self, command: &str) -> Result<()> {
        self.shell.send(command)
    }

    /// Adds to an error what the guest and its QEMU said last.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let console = std::fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = console.lines().collect();
        let shown = lines[lines.len().saturating_sub(TAIL)..].join("\n    ");
        let path = self.console.display();
        let qemu = self.qemu.process.story();
        anyhow!("{error:#}\nThe end of {path}:\n    {shown}\n{qemu}")
    }
}
