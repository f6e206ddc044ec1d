// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask check`: every lint, each with a result of its own.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{bail, Context as _, Result};

use crate::cache::Key;
use crate::cli::Kernel;
use crate::host;
use crate::kernel::Tree;
use crate::module;
use crate::report::Report;
use crate::root;
use crate::step::{clock, Step};
use crate::workbench::Workbench;

/// The spelling checker, from the crate registry.
const TYPOS: Tool = Tool {
    package: "typos-cli",
    program: "typos",
    version: "1.52.0",
};
/// The checker of dependencies, from the crate registry.
const DENY: Tool = Tool {
    package: "cargo-deny",
    program: "cargo-deny",
    version: "0.20.2",
};

/// A lint's end: it passed, or it could not be run and why.
enum End {
    Passed,
    Skipped(String),
}

/// Runs every lint; with `fix`, those that can correct what they find do so.
pub(crate) fn run(bench: &Workbench, fix: bool) -> Result<Report> {
    let mut report = Report::default();
    let mut lint = |name: &str, run: &dyn Fn() -> Result<End>| {
        let began = Instant::now();
        let end = run();
        let took = clock(began.elapsed());
        let name = format!("check: {name}");
        match end {
            Ok(End::Passed) => {
                println!("{name} ... ok ({took})");
                report.pass();
            }
            Ok(End::Skipped(why)) => {
                println!("{name} ... skipped: {why}");
                report.skip(&name, &why);
            }
            Err(error) => {
                println!("{name} ... FAILED ({took})\n{error:#}");
                report.fail(&name, format!("{error:#}"));
            }
        }
    };
    lint("rustfmt", &|| {
        let mut cargo = bench.project.cargo();
        cargo.args(["fmt", "--all"]);
        if !fix {
            cargo.arg("--check");
        }
        quiet(&mut cargo)
    });
    lint("clippy", &|| {
        let mut cargo = bench.project.cargo();
        quiet(cargo.args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    });
    lint("rustdoc", &|| {
        let mut cargo = bench.project.cargo();
        cargo.env("RUSTDOCFLAGS", "-D warnings");
        quiet(cargo.args(["doc", "--no-deps", "--workspace"]))
    });
    lint("manual pages", &|| {
        host::check_pages(bench)?;
        Ok(End::Passed)
    });
    lint("typos", &|| {
        let mut typos = TYPOS.command(bench)?;
        if fix {
            typos.arg("--write-changes");
        }
        quiet(typos.current_dir(bench.project.dir()))
    });
    lint("cargo-deny", &|| {
        let mut deny = DENY.command(bench)?;
        deny.args(["check", "licenses", "bans", "sources"]);
        quiet(deny.current_dir(bench.project.dir()))
    });
    lint("advisories", &|| {
        let mut fetch = DENY.command(bench)?;
        fetch.args(["fetch", "db"]).current_dir(bench.project.dir());
        if quiet(&mut fetch).is_err() {
            let why =
                "the database of advisories cannot be had here: it is not in a package registry";
            return Ok(End::Skipped(why.to_owned()));
        }
        let mut deny = DENY.command(bench)?;
        quiet(
            deny.args(["check", "advisories"])
                .current_dir(bench.project.dir()),
        )
    });
    lint("miri", &|| miri(bench));
    let stock = Tree::prepare(bench, Kernel::Stock);
    let tree = || match &stock {
        Ok(tree) => Ok(tree),
        Err(error) => bail!("there is no kernel to check the module against: {error:#}"),
    };
    lint("rustfmt of the module", &|| {
        let source = &tree()?.source;
        quiet(&mut module::rustfmt(
            bench.root()?,
            &bench.project,
            source,
            fix,
        )?)
    });
    lint("clippy of the module", &|| {
        module::clippy(bench, tree()?)?;
        Ok(End::Passed)
    });
    Ok(report)
}

/// The tests of libmuser that Miri runs: those of pure logic, which make no mappings and no sockets.
/// Of configuration space and the table of mappings, the models take Miri many minutes.
const PURE: [&str; 9] = [
    "dma::bus_master",
    "error::",
    "hash::",
    "peer_file::",
    "transport::difference",
    "transport::dma::dirty",
    "transport::dma::tests",
    "vfio_user::capabilities",
    "vfio_user::wire",
];
/// One among them that takes minutes.
const LONG: &str = "marks_are_those_of_a_set";

/// Runs pure logic in Miri, which finds undefined behaviour, where there is one.
fn miri(bench: &Workbench) -> Result<End> {
    // A component of nightly toolchains only.
    let mut probe = Command::new("cargo");
    probe.args(["+nightly", "miri", "--version"]);
    if quiet(&mut probe).is_err() {
        let why = "there is no Miri: `rustup +nightly component add miri rust-src` installs it";
        return Ok(End::Skipped(why.to_owned()));
    }
    let mut cargo = Command::new("cargo");
    cargo.current_dir(bench.project.dir());
    cargo.args(["+nightly", "miri", "test", "--package=libmuser", "--lib"]);
    cargo
        .arg("--target-dir")
        .arg(bench.project.output().join("miri"));
    cargo.arg("--").args(PURE);
    cargo.args(["--skip", LONG]);
    // What cargo has set for xtask names another toolchain.
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(name);
    }
    // It is a thousand times slower; and proptest looks for files.
    cargo.env("PROPTEST_CASES", "2");
    cargo.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    quiet(&mut cargo)
}

/// Runs a program and keeps what it prints for the case that it fails.
fn quiet(command: &mut Command) -> Result<End> {
    let program = command.get_program().display().to_string();
    let output = command
        .env("TERM", "dumb")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        // Of cargo's output, what it compiled meanwhile helps nobody.
        let noise = [
            "    Checking ",
            "   Compiling ",
            " Documenting ",
            "    Finished ",
        ];
        let lines = text
            .lines()
            .filter(|line| !noise.iter().any(|noise| line.starts_with(noise)));
        bail!("{}", lines.collect::<Vec<_>>().join("\n"));
    }
    Ok(End::Passed)
}

/// A program that comes from the crate registry.
struct Tool {
    package: &'static str,
    program: &'static str,
    version: &'static str,
}

impl Tool {
    /// The program: the one on PATH, or one installed in the cache.
    fn command(&self, bench: &Workbench) -> Result<Command> {
        if root::on_path(self.program) {
            return Ok(Command::new(self.program));
        }
        let Self {
            package,
            program,
            version,
        } = self;
        let key = Key::new("tool 1").and(package).and(version);
        let stage = bench.cache.stage(program, &key, |stage| {
            let mut step = Step::start(
                &format!("Installing {package} {version} from the crate registry"),
                "2 minutes",
                bench.cache.log(program),
            )?;
            let mut cargo = bench.project.cargo();
            cargo
                .current_dir(stage)
                .args(["install", "--locked", "--root"])
                .arg(stage);
            cargo.arg("--target-dir").arg(stage.join("target"));
            // Running it is short, compiling it is not.
            cargo.args(["--debug", &format!("{package}@{version}")]);
            cargo.env("CARGO_PROFILE_DEV_DEBUG", "false");
            step.run("compiling", &mut cargo)?;
            std::fs::remove_dir_all(stage.join("target"))?;
            step.done();
            Ok(())
        })?;
        Ok(Command::new(stage.join("bin").join(program)))
    }
}
