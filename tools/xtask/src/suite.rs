// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask test`: the lints, the tests of the host, the devices in QEMU, and
//! the suite in each kernel. A part that fails never keeps the next one from
//! running.
//!
//! A guest keeps less than one processor busy, and the suite takes as long in
//! the debug kernel as everything else together: so that one runs beside the
//! others, once all that they need is built.

use std::io::{BufRead as _, BufReader};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{bail, Context as _, Result};

use crate::check;
use crate::cli::{Kernel, Stage, Test};
use crate::fuzzing::{self, Fuzzing};
use crate::guest::{Guest, Programs};
use crate::kernel::Tree;
use crate::libtest::Output;
use crate::qemu;
use crate::report::Report;
use crate::targets;
use crate::vmm;
use crate::workbench::Workbench;

/// The test program of tests/e2e.
const SUITE: &str = "e2e";

/// Runs every test that was asked for.
pub(crate) fn run(bench: &Workbench, asked: &Test) -> Report {
    let mut report = Report::default();
    let filter = asked.filter.as_deref();
    if asked.wants(Stage::Check) {
        part(&mut report, "check", || check::run(bench, false));
    }
    if asked.wants(Stage::Host) {
        part(&mut report, "host", || host(bench, filter));
    }
    if asked.wants(Stage::Fuzz) {
        part(&mut report, "fuzz", || Ok(targets::suite(bench)));
    }
    let programs = OnceLock::new();
    let programs = || match programs.get() {
        Some(built) => Ok(built),
        None => Programs::build(bench).map(|built| programs.get_or_init(|| built)),
    };
    let kernels: Vec<Kernel> = Kernel::ALL
        .into_iter()
        .filter(|&kernel| asked.wants(kernel.into()))
        .collect();
    let guests = prepare(bench, &kernels, programs, &mut report);
    let (debug, others): (Vec<_>, Vec<_>) = guests
        .iter()
        .partition(|guest| guest.tree.kernel == Kernel::Debug);
    let lane = |guests: Vec<&Guest>| {
        let mut report = Report::default();
        for guest in guests {
            let kernel = guest.tree.kernel;
            part(&mut report, kernel.name(), || {
                in_guest(bench, guest, filter)
            });
        }
        report
    };
    std::thread::scope(|scope| {
        let debug = scope.spawn(|| lane(debug));
        if asked.wants(Stage::Vmm) {
            part(&mut report, vmm::NAME, || {
                vmm::run(bench, programs()?, filter)
            });
        }
        report.add(lane(others));
        match debug.join() {
            Ok(result) => report.add(result),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    if report.empty() {
        let why = "no test has such a name".to_owned();
        report.fail(
            &format!("tests named like {:?}", filter.unwrap_or_default()),
            why,
        );
    }
    report
}

fn part(report: &mut Report, name: &str, run: impl FnOnce() -> Result<Report>) {
    println!("\n== {name}");
    let began = Instant::now();
    match run() {
        Ok(result) => {
            println!("== {name}: {result}");
            report.add(result);
        }
        Err(error) => {
            println!("== {name}: {error:#}");
            report.fail(name, format!("{error:#}"));
        }
    }
    report.phase(name, began.elapsed());
}

fn host(bench: &Workbench, filter: Option<&str>) -> Result<Report> {
    let (reader, writer) = std::io::pipe()?;
    let mut cargo = bench.project.cargo();
    cargo
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(filter);
    cargo.env("CARGO_TERM_COLOR", "never");
    // One pipe for both, so that a compiler's error stands where it happened.
    cargo.stdout(writer.try_clone()?).stderr(writer);
    let mut child = cargo.spawn().context("cannot run cargo test")?;
    // The command holds the pipe's other end; without this it never closes.
    drop(cargo);
    let mut output = Output::default();
    let mut errors = Vec::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        output.line(&line);
        if line.starts_with("error") {
            errors.push(line.into_owned());
        }
    }
    let status = child.wait()?;
    let mut report = output.into_report("host");
    if !status.success() && report.ok() {
        report.fail(
            "host: cargo test",
            format!("{status}\n{}", errors.join("\n")),
        );
    }
    Ok(report)
}

/// Builds what the guests need, those that can be had.
fn prepare<'a>(
    bench: &Workbench,
    kernels: &[Kernel],
    programs: impl Fn() -> Result<&'a Programs>,
    report: &mut Report,
) -> Vec<Guest> {
    let mut guests = Vec::new();
    if kernels.is_empty() {
        return guests;
    }
    part(report, "guests", || {
        let programs = programs()?;
        if !programs.has(SUITE) {
            bail!("tests/e2e has no program {SUITE}");
        }
        let mut report = Report::default();
        for &kernel in kernels {
            let guest =
                Tree::prepare(bench, kernel).and_then(|tree| Guest::prepare(bench, tree, programs));
            match guest {
                Ok(guest) => guests.push(guest),
                Err(error) => report.fail(kernel.name(), format!("{error:#}")),
            }
        }
        Ok(report)
    });
    guests
}

fn in_guest(bench: &Workbench, guest: &Guest, filter: Option<&str>) -> Result<Report> {
    let kernel = guest.tree.kernel;
    // One test at a time: they load and unload the one module there is.
    let fuzz = fuzzing::wanted(kernel, filter);
    let filter = filter.map(qemu::quote).unwrap_or_default();
    let mut command = format!("{SUITE} --test-threads=1 --color=never {filter}; status=$?\n");
    if fuzz {
        command += &fuzzing::command();
    }
    command += "\nexit $status";
    let mut output = Output::default();
    let mut fuzzed = Fuzzing::default();
    println!(
        "Booting {} and running the suite in it.",
        guest.tree.release
    );
    let outcome = qemu::run(bench, guest, &command, fuzzing::length(fuzz), |line| {
        println!("{kernel}| {line}");
        output.line(line);
        fuzzed.line(line);
    })?;
    let finished = output.finished();
    let mut report = output.into_report(kernel.name());
    if let Some(status) = outcome.status
        && report.ok()
        && (status != 0 || !finished)
    {
        report.fail(
            &format!("{kernel}: {SUITE}"),
            format!("it exited with status {status} and no failed test"),
        );
    }
    if fuzz {
        fuzzed.report(kernel, &mut report);
    }
    let name = format!("{kernel}: kernel log clean");
    match outcome.complaint() {
        None => {
            println!("{kernel}| test kernel log clean ... ok");
            report.pass();
        }
        Some(complaint) => {
            println!("{kernel}| test kernel log clean ... FAILED");
            report.fail(&name, complaint);
        }
    }
    Ok(report)
}
