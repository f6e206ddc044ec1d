// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Boots a guest in QEMU and follows it to its end.
//!
//! The kernel's console is the first serial port and goes to a file; what the
//! command prints comes through the second. The guest's CPUs are emulated: not
//! every machine that runs the tests has a usable KVM.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};

use crate::cli::Kernel;
use crate::console;
use crate::guest::Guest;
use crate::step;
use crate::workbench::Workbench;

/// What tests/e2e/guest/init prints last.
const EXIT: &str = "MUSER-GUEST-EXIT ";
/// What the guest prints when it is up, just before the command.
const UP: &str = "MUSER-GUEST-UP";
/// How often a guest is booted at the most, and how long it may take to come up.
const BOOTS: u32 = 3;
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// Without five-level page tables: while Linux looks at its boot CPU it forgets
/// for a moment that it has them, and an interrupt then makes KASAN report what
/// is no fault.
const CPU: &str = "max,la57=off";
/// How long a guest may take to end after its command did, or its kernel panicked.
const GRACE: Duration = Duration::from_secs(20);

/// How a guest came to its end.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The command's exit status, if it came to an end.
    pub(crate) status: Option<i32>,
    /// Why there is no status.
    pub(crate) reason: Option<String>,
    /// What in the kernel's log tells of trouble.
    pub(crate) trouble: Option<String>,
    /// The console's log.
    pub(crate) console: PathBuf,
}

impl Outcome {
    /// What is wrong with the guest itself, whatever its command returned.
    pub(crate) fn complaint(&self) -> Option<String> {
        let console = self.console.display();
        let mut parts = Vec::new();
        if let Some(reason) = &self.reason {
            parts.push(format!(
                "{reason}. The end of its console, {console}:\n{}",
                step::tail(&self.console)
            ));
        }
        if let Some(trouble) = &self.trouble {
            parts.push(format!("{trouble}    (all of it: {console})"));
        }
        (!parts.is_empty()).then(|| parts.join("\n"))
    }
}

/// How long a storm of so many kills may take: many times what it does take. What does not end by
/// itself it notices itself.
pub(crate) fn storm_length(kernel: Kernel, kills: u64) -> Duration {
    let each = match kernel {
        Kernel::Debug => 20,
        Kernel::Stock | Kernel::Small => 2,
    };
    Duration::from_secs(kills.saturating_mul(each))
}

/// Boots the guest, runs a shell command in it and hands each line on.
///
/// A command that was asked to go on for some time, its `length`, gets that beside what any command
/// gets.
///
/// A guest that does not come up, so that nothing of muser's has run in it, is booted again: under
/// emulation a debug kernel hangs now and then at its start.
pub(crate) fn run(
    bench: &Workbench,
    guest: &Guest,
    command: &str,
    length: Duration,
    mut line: impl FnMut(&str),
) -> Result<Outcome> {
    let asked = std::env::var("MUSER_GUEST_TIMEOUT").ok();
    let limit = limit(guest.tree.kernel, length, asked.as_deref())?;
    for boot in 1..BOOTS {
        match attempt(bench, guest, command, limit, &mut line, BOOT_TIMEOUT)? {
            Some(outcome) => return Ok(outcome),
            None => eprintln!(
                "The guest did not come up within {}, before anything of muser ran in it; \
                 booting it again ({} of {BOOTS}).",
                step::clock(BOOT_TIMEOUT),
                boot + 1
            ),
        }
    }
    let last = attempt(bench, guest, command, limit, &mut line, Duration::MAX)?;
    last.context("the guest did not come up")
}

/// Boots the guest once; `None` if it is not up in time.
fn attempt(
    bench: &Workbench,
    guest: &Guest,
    command: &str,
    limit: Duration,
    mut line: impl FnMut(&str),
    boot_timeout: Duration,
) -> Result<Option<Outcome>> {
    let console = console_file(bench, guest)?;
    let mut qemu = qemu(bench, guest, command, &console)?;
    let log = fs::File::create(console.with_file_name("qemu.log"))?;
    let qemu = qemu
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = qemu.stderr(log).spawn().context("cannot start QEMU")?;
    let lines = read(&mut child)?;
    let began = Instant::now();
    let mut status = None;
    let mut reason = None;
    let mut over: Option<Instant> = None;
    let mut up = false;
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(text) if text == UP => up = true,
            Ok(text) => match text.strip_prefix(EXIT) {
                Some(number) => {
                    status = number.trim().parse().ok();
                    over = Some(Instant::now());
                }
                None => line(&text),
            },
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                if over.is_none() && console::fatal(&log_of(&console)) {
                    over = Some(Instant::now());
                }
            }
        }
        if over.is_some_and(|since| since.elapsed() > GRACE) {
            if status.is_some() {
                reason =
                    Some("the guest's command ended, but the guest does not power off".to_owned());
            }
            break;
        }
        if !up && began.elapsed() > boot_timeout {
            child.kill().ok();
            child.wait()?;
            return Ok(None);
        }
        if began.elapsed() > limit {
            reason = Some(format!(
                "the guest did not finish within {} and was ended (MUSER_GUEST_TIMEOUT changes that)",
                step::clock(limit)
            ));
            break;
        }
    }
    // Ends QEMU where it still runs; the namespace takes all of it along.
    child.kill().ok();
    let ended = child.wait()?;
    let log = log_of(&console);
    if status.is_none() && reason.is_none() {
        reason = Some(if console::fatal(&log) {
            "the guest's kernel panicked".to_owned()
        } else {
            let qemu = console.with_file_name("qemu.log");
            format!(
                "the guest ended without a result (QEMU: {ended})\n{}",
                step::tail(&qemu)
            )
        });
    }
    Ok(Some(Outcome {
        status,
        reason,
        trouble: console::trouble(&log),
        console,
    }))
}

/// Boots the guest with a shell on this terminal.
pub(crate) fn shell(bench: &Workbench, guest: &Guest) -> Result<()> {
    let console = console_file(bench, guest)?;
    eprintln!(
        "The kernel's log goes to {}. exit ends the guest.",
        console.display()
    );
    let command = "stty -F /dev/ttyS1 sane\ncd /root\nsetsid sh -c 'exec sh -il </dev/ttyS1 >/dev/ttyS1 2>&1'";
    let mut qemu = qemu(bench, guest, command, &console)?;
    let status = qemu
        .args(["-serial", "mon:stdio"])
        .status()
        .context("cannot start QEMU")?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    Ok(())
}

/// Quotes a word for the guest's shell.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn qemu(bench: &Workbench, guest: &Guest, command: &str, console: &Path) -> Result<Command> {
    let tree = &guest.tree;
    let memory = match tree.kernel {
        Kernel::Debug => "2G",
        Kernel::Stock | Kernel::Small => "1G",
    };
    let mut qemu = bench.root()?.command("qemu-system-x86_64");
    qemu.args([
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        CPU,
        "-smp",
        "2",
    ]);
    qemu.args([
        "-m",
        memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    qemu.arg("-kernel")
        .arg(&tree.image)
        .arg("-initrd")
        .arg(guest.pack(command)?);
    // panic=-1 ends the guest at once where the kernel cannot go on. Poison tells memory which the
    // kernel hands out without having written it.
    let poison = match tree.kernel {
        Kernel::Debug => " page_poison=1 slab_debug=P",
        Kernel::Stock | Kernel::Small => "",
    };
    let append = format!("console=ttyS0 loglevel=7 panic=-1 oops=panic kasan_multi_shot{poison}");
    qemu.args(["-append", &append]);
    qemu.arg("-serial")
        .arg(format!("file:{}", console.display()));
    Ok(qemu)
}

/// The console's log, emptied.
fn console_file(bench: &Workbench, guest: &Guest) -> Result<PathBuf> {
    let console = bench
        .project
        .output_for(guest.tree.kernel)
        .join("console.log");
    fs::write(&console, "").with_context(|| format!("cannot write {}", console.display()))?;
    Ok(console)
}

fn log_of(console: &Path) -> String {
    String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned()
}

fn read(child: &mut Child) -> Result<Receiver<String>> {
    let output = child.stdout.take().context("QEMU has no output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}

/// How long a guest may run: as `asked`, or what any command gets and the `length` on top.
fn limit(kernel: Kernel, length: Duration, asked: Option<&str>) -> Result<Duration> {
    if let Some(asked) = asked {
        return match asked.parse() {
            Ok(seconds) => Ok(Duration::from_secs(seconds)),
            Err(_) => bail!("MUSER_GUEST_TIMEOUT is a number of seconds, not {asked:?}"),
        };
    }
    let any = match kernel {
        Kernel::Debug => 2400,
        Kernel::Stock | Kernel::Small => 900,
    };
    Ok(Duration::from_secs(any).saturating_add(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_word_is_one_word() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    #[test]
    fn outcome_with_trouble_is_a_complaint_whatever_the_status() {
        let mut outcome = Outcome {
            status: Some(0),
            reason: None,
            trouble: None,
            console: PathBuf::from("console.log"),
        };
        assert_eq!(outcome.complaint(), None);
        outcome.trouble = Some("WARNING: in vfio".to_owned());
        assert!(outcome.complaint().unwrap().contains("WARNING: in vfio"));
    }

    #[test]
    fn guest_with_long_work_may_run_longer_than_the_work() {
        let seconds = |kernel, length| limit(kernel, length, None).unwrap().as_secs();
        assert_eq!(seconds(Kernel::Small, Duration::ZERO), 900);
        let day = Duration::from_secs(86_400);
        assert_eq!(seconds(Kernel::Debug, day), 86_400 + 2400);
        assert_eq!(seconds(Kernel::Debug, Duration::MAX), u64::MAX);
    }

    #[test]
    fn storm_may_run_longer_the_more_it_kills() {
        let small = storm_length(Kernel::Small, 100_000);
        assert!(small > Duration::from_secs(86_400));
        assert!(storm_length(Kernel::Debug, 100_000) > small);
        assert_eq!(storm_length(Kernel::Debug, u64::MAX).as_secs(), u64::MAX);
    }

    #[test]
    fn limit_that_the_user_asks_for_is_the_limit() {
        let asked = |text| limit(Kernel::Small, Duration::MAX, Some(text));
        assert_eq!(asked("7").unwrap(), Duration::from_secs(7));
        assert!(asked("soon").is_err());
    }
}
