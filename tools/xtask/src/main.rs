// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Builds, checks, boots and tests muser: `cargo xtask --help` tells how.
//!
//! Reading order: what can be asked for (`cli`), what takes long (`step`,
//! `cache`), where kernels come from (`root`, `archive`, `kernel`), what is built
//! for them (`module`, `guest`, `cpio`), how they run (`qemu`, `console`), and what
//! that proves (`suite`, `vmm`, `fuzzing`, `targets`, `check`, `libtest`, `report`).

mod archive;
mod cache;
mod check;
mod cli;
mod console;
mod cpio;
mod fuzzing;
mod guest;
mod host;
mod kernel;
mod libtest;
mod module;
mod project;
mod qemu;
mod report;
mod root;
mod step;
mod suite;
mod targets;
mod vmm;
mod workbench;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Result};
use clap::Parser as _;

use crate::cli::{Cli, Fuzz, Kernel, Search, Storm, Target, Task};
use crate::guest::{Guest, Programs};
use crate::kernel::Tree;
use crate::workbench::Workbench;

/// The road of a storm that needs no guest.
const SOCKET: &str = "socket";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let bench = Workbench::new(cli.refresh)?;
    match cli.command {
        Task::Demo(boot) => in_guest(&bench, boot.kernel, &["demo".to_owned()], Duration::ZERO),
        Task::Run { boot, command } => in_guest(&bench, boot.kernel, &command, Duration::ZERO),
        Task::Test(asked) => {
            let report = suite::run(&bench, &asked);
            report.print();
            Ok(code(report.ok()))
        }
        Task::Storm(storm) if storm.road == SOCKET => host::storm(&bench, &storm),
        Task::Man { dir } => {
            let pages = host::manual_pages(&bench, &dir)?;
            println!("{pages} pages are in {}.", dir.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Storm(storm) => {
            let length = qemu::storm_length(storm.kernel, storm.kills);
            in_guest(&bench, storm.kernel, &storm_command(&storm), length)
        }
        Task::Fuzz {
            part:
                Fuzz::Kmod {
                    seconds,
                    seed,
                    kernel,
                },
        } => {
            let mut command = vec!["fuzz-kmod".to_owned()];
            command.extend(["--seconds".to_owned(), seconds.to_string()]);
            if let Some(seed) = seed {
                command.extend(["--seed".to_owned(), seed.to_string()]);
            }
            in_guest(&bench, kernel, &command, Duration::from_secs(seconds))
        }
        Task::Fuzz {
            part: Fuzz::Config(search),
        } => targets::run(&bench, Target::Config, &work(search)).map(code),
        Task::Fuzz {
            part: Fuzz::Client(search),
        } => targets::run(&bench, Target::Client, &work(search)).map(code),
        Task::Fuzz {
            part: Fuzz::Server(search),
        } => targets::run(&bench, Target::Server, &work(search)).map(code),
        Task::Check { fix } => {
            let report = check::run(&bench, fix)?;
            report.print();
            Ok(code(report.ok()))
        }
        Task::Kernel { kernel } => {
            println!("{}", Tree::prepare(&bench, kernel)?.build.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Module { kernel, clippy } => {
            let tree = Tree::prepare(&bench, kernel)?;
            if clippy {
                module::clippy(&bench, &tree)?;
            }
            println!("{}", module::build(&bench, &tree)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Shell(boot) => {
            qemu::shell(&bench, &guest(&bench, boot.kernel)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Task::Clean { all: true } => {
            bench.cache.clear()?;
            println!("{} is empty.", bench.cache.dir().display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Clean { all: false } => {
            let removed = bench.cache.forget(DAY)?;
            println!(
                "Removed {removed} stages from {}.",
                bench.cache.dir().display()
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What was asked for of a target.
fn work(search: Search) -> targets::Work {
    match search.input {
        Some(input) => targets::Work::Repeat(input),
        None if search.keep => targets::Work::Keep,
        None => targets::Work::Search {
            seconds: search.seconds,
            seed: search.seed,
        },
    }
}

/// The command of tests/e2e that a storm is.
pub(crate) fn storm_command(storm: &Storm) -> Vec<String> {
    let mut command = vec!["storm".to_owned()];
    let mut option = |name: &str, value: String| command.extend([name.to_owned(), value]);
    option("--kills", storm.kills.to_string());
    option("--road", storm.road.clone());
    option("--device", storm.device.clone());
    if let Some(seed) = storm.seed {
        option("--seed", seed.to_string());
    }
    command
}

/// Runs one command in a guest, which was asked to go on for `length`; its status becomes xtask's.
fn in_guest(
    bench: &Workbench,
    kernel: Kernel,
    command: &[String],
    length: Duration,
) -> Result<ExitCode> {
    let guest = guest(bench, kernel)?;
    eprintln!("Booting Linux {} in QEMU.", guest.tree.release);
    let words: Vec<String> = command.iter().map(|word| qemu::quote(word)).collect();
    let outcome = qemu::run(bench, &guest, &words.join(" "), length, |line| {
        println!("{line}");
    })?;
    if let Some(complaint) = outcome.complaint() {
        bail!("{complaint}");
    }
    let status = outcome.status.unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}

fn guest(bench: &Workbench, kernel: Kernel) -> Result<Guest> {
    let programs = Programs::build(bench)?;
    Guest::prepare(bench, Tree::prepare(bench, kernel)?, &programs)
}

fn code(ok: bool) -> ExitCode {
    if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
