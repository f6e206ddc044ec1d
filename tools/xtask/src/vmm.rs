// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The part of `cargo xtask test` that has QEMU as the client of the samples:
//! the program of tests/vmm, run in the build root, where QEMU is, with the
//! guest's file system and kernel laid out for it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, BufWriter};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};

use crate::cache;
use crate::cli::Kernel;
use crate::console;
use crate::cpio::Archive;
use crate::guest::{self, Programs};
use crate::kernel::Tree;
use crate::libtest::Output;
use crate::report::Report;
use crate::workbench::Workbench;

pub(crate) const NAME: &str = "vmm";
/// The test program, what runs in the guests that it boots, and a device of its own.
const SUITE: &str = "vmm";
const INSIDE: &str = "vmm-guest";
const DEVICE: &str = "vmm-device";
/// What is of no use in the guests that the module is tested in.
pub(crate) const PROGRAMS: &[&str] = &[SUITE, INSIDE, DEVICE];
/// Taken with what they depend on.
const MODULES: &[&str] = &["gpio_pci_idio_16", "vfio_iommu_type1", "vfio_pci"];
const DIRECTORIES: &[&str] = &["dev", "proc", "sys", "tmp", "usr/bin", "usr/lib"];
const LINKS: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("sbin", "usr/bin"),
    ("lib", "usr/lib"),
    ("usr/bin/sh", "busybox"),
    ("usr/bin/modprobe", "busybox"),
];
/// Sockets and the like vanish with the namespace. $@ is the program.
const RUN: &str = "mount -t tmpfs tmpfs /tmp; exec \"$@\"";

/// Runs the tests whose names contain `filter`.
pub(crate) fn run(bench: &Workbench, programs: &Programs, filter: Option<&str>) -> Result<Report> {
    let root = bench.root()?;
    let output = bench.project.output().join(NAME);
    fs::create_dir_all(&output)?;
    let _lock = cache::lock(&output.join("lock"), "the tests in QEMU")?;
    let logs = output.join("log");
    cache::remove(&logs)?;
    fs::create_dir(&logs)?;
    // The oldest kernel there is: the one that users have.
    let tree = Tree::prepare(bench, Kernel::Stock)?;
    let initramfs = initramfs(bench, &tree, programs, &output)?;
    let suite = program(programs, SUITE)?;

    let mut command = root.command_in(&output, "sh");
    command.args(["-ec", RUN, "sh"]).arg(suite);
    command.args(["--test-threads=1", "--color=never"]);
    command.args(filter);
    command.env("MUSER_VMM_PROGRAMS", suite.parent().unwrap_or(suite));
    command.env("MUSER_VMM_KERNEL", &tree.image);
    command.env("MUSER_VMM_INITRAMFS", &initramfs);
    command.env("MUSER_VMM_LOGS", &logs);
    command.env("RUST_BACKTRACE", "1");
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null());
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("cannot enter the build root")?;
    // The command holds the pipe's other end; without this it never closes.
    drop(command);
    let mut tests = Output::default();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{NAME}| {line}");
        tests.line(&line);
    }
    let status = child.wait()?;
    let finished = tests.finished();
    let mut report = tests.into_report(NAME);
    if report.ok() && (!status.success() || !finished) {
        let why = format!("it ended with {status} and no failed test");
        report.fail(&format!("{NAME}: {SUITE}"), why);
    }
    judge(&logs, &mut report)?;
    Ok(report)
}

fn program<'a>(programs: &'a Programs, name: &str) -> Result<&'a Path> {
    let program = programs.find(name);
    program.with_context(|| format!("tests/vmm has no program {name}"))
}

/// The guests' kernels must not have complained, whatever the tests saw.
fn judge(logs: &Path, report: &mut Report) -> Result<()> {
    let mut consoles = 0;
    for entry in fs::read_dir(logs)? {
        let path = entry?.path();
        if !path.to_string_lossy().ends_with(".console.log") {
            continue;
        }
        consoles += 1;
        let log = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        if let Some(trouble) = console::trouble(&log) {
            let why = format!("{trouble}    (all of it: {})", path.display());
            println!("{NAME}| test kernel logs clean ... FAILED");
            report.fail(&format!("{NAME}: kernel logs clean"), why);
            return Ok(());
        }
    }
    if consoles > 0 {
        println!("{NAME}| test kernel logs clean ... ok");
        report.pass();
    }
    Ok(())
}

/// What guests boot from.
fn initramfs(
    bench: &Workbench,
    tree: &Tree,
    programs: &Programs,
    output: &Path,
) -> Result<PathBuf> {
    let root = bench.root()?;
    let dir = output.join("guest");
    cache::remove(&dir)?;
    for name in DIRECTORIES {
        fs::create_dir_all(dir.join(name))?;
    }
    for (name, target) in LINKS {
        symlink(target, dir.join(name))?;
    }
    guest::install(
        &bench.project.file("tests/vmm/guest/init"),
        &dir.join("init"),
    )?;
    guest::install(&root.path("/usr/bin/busybox"), &dir.join("usr/bin/busybox"))?;
    let inside = program(programs, INSIDE)?;
    guest::install(inside, &dir.join("usr/bin").join(INSIDE))?;
    guest::modules(root, tree, MODULES, None, &dir)?;
    let image = output.join("guest.cpio");
    let file = File::create(&image);
    let file = file.with_context(|| format!("cannot write {}", image.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    archive.tree(&dir)?;
    archive.device("dev/console", 5, 1)?;
    archive.finish()?;
    Ok(image)
}
