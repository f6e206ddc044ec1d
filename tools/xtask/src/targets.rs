// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask fuzz` for the parts of libmuser: coverage-guided, with libFuzzer.
//!
//! Stable Rust has all that takes but sanitizers: a pass of LLVM counts the edges
//! that are taken, and libFuzzer is a crate that is compiled with everything else.
//! So no nightly toolchain and no cargo-fuzz is needed; a C++ compiler is.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{bail, Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::cli::Target;
use crate::report::Report;
use crate::step::Step;
use crate::workbench::Workbench;

const PACKAGE: &str = "muser-fuzz-targets";
/// Where committed inputs are.
const CORPUS: &str = "tests/fuzz-targets/corpus";
/// Where inputs are that once showed a fault.
const REGRESSIONS: &str = "tests/fuzz-targets/regressions";

/// Counts edges and compares operands, as cargo-fuzz has it.
const INSTRUMENTATION: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Seconds that `cargo xtask test` gives each target.
const SECONDS: u64 = 30;
/// Seconds that one input may take; most take less than a millisecond.
const PATIENCE: u64 = 10;
/// Seconds that an input which shows a fault is made smaller for.
const SHRINKING: u64 = 20;
/// Bytes of an input, at most.
const LARGEST: usize = 4096;
/// MiB that a target may use.
const MEMORY: u64 = 2048;

/// What to do with a target.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// Look for inputs that show a fault.
    Search { seconds: u64, seed: Option<u32> },
    /// Run one input.
    Repeat(PathBuf),
    /// Keep the inputs that reach something, and no more of them than it takes.
    Keep,
}

/// Does it; tells whether no fault showed.
pub(crate) fn run(bench: &Workbench, target: Target, work: &Work) -> Result<bool> {
    if let Some(why) = obstacle() {
        bail!("{why}");
    }
    let fuzzer = Fuzzer::build(bench, target)?;
    match work {
        Work::Search { seconds, seed } => {
            let found = fuzzer.search(*seconds, seed.unwrap_or_else(any_seed))?;
            println!("{}", found.text(target));
            Ok(found.fault.is_none())
        }
        Work::Repeat(input) => {
            let input = input.canonicalize();
            let input = input.context("there is no such input")?;
            let status = fuzzer.command().arg(&input).status()?;
            println!("fuzz {target}: {} ended with {status}", input.display());
            Ok(status.success())
        }
        Work::Keep => fuzzer.keep().map(|()| true),
    }
}

/// The part of `cargo xtask test` that searches with every target for a while.
pub(crate) fn suite(bench: &Workbench) -> Report {
    let mut report = Report::default();
    for target in Target::ALL {
        let name = format!("fuzz {target}");
        if let Some(why) = obstacle() {
            println!("{name} ... skipped: {why}");
            report.skip(&name, &why);
            continue;
        }
        let found = Fuzzer::build(bench, target).and_then(|it| it.search(SECONDS, any_seed()));
        match found {
            Ok(found) => {
                let text = found.text(target);
                println!("{text}");
                match found.fault {
                    None => {
                        report.pass();
                        report.note(text);
                    }
                    Some(fault) => report.fail(&name, format!("{text}\n{}", fault.said)),
                }
            }
            Err(error) => report.fail(&name, format!("{error:#}")),
        }
    }
    report
}

/// Why nothing can be fuzzed here, if it can't.
fn obstacle() -> Option<String> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let there = quiet(Command::new(&compiler).arg("--version"));
    if !there {
        let compiler = compiler.to_string_lossy();
        return Some(format!(
            "libFuzzer needs a C++ compiler, and there is no {compiler}"
        ));
    }
    let mut probe = Command::new(rustc());
    probe.args(INSTRUMENTATION);
    // The program that does nothing, compiled but not linked.
    probe.args([
        "--crate-type=lib",
        "--crate-name=probe",
        "--emit=obj",
        "-o",
        "/dev/null",
        "-",
    ]);
    (!quiet(&mut probe)).then(|| "this Rust compiler can't count edges (sancov-module)".to_owned())
}

fn quiet(command: &mut Command) -> bool {
    let command = command.stdin(Stdio::null());
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn rustc() -> std::ffi::OsString {
    std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}

/// The triple that this machine's programs are compiled for.
fn host() -> Result<String> {
    let output = Command::new(rustc()).arg("-vV").output();
    let output = output.context("cannot run rustc")?.stdout;
    let text = String::from_utf8_lossy(&output);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc has no host")?.to_owned())
}

fn any_seed() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // libFuzzer takes 0 for none.
    now.map_or(1, |now| now.subsec_nanos()).max(1)
}

/// A target's program, and where its inputs are.
#[derive(Debug)]
struct Fuzzer {
    program: PathBuf,
    /// Inputs found on this machine.
    found: PathBuf,
    /// Inputs that show a fault.
    faults: PathBuf,
    corpus: PathBuf,
    regressions: PathBuf,
}

impl Fuzzer {
    fn build(bench: &Workbench, target: Target) -> Result<Self> {
        let output = bench.project.output().join("fuzz");
        let host = host()?;
        let mut step = Step::start(
            &format!("Building the fuzz target {target}"),
            "seconds, the first time 3 minutes",
            bench.project.log("fuzz"),
        )?;
        let mut cargo = bench.project.cargo();
        cargo.args([
            "build",
            "--profile=fuzz",
            "--features=libfuzzer",
            "--package",
            PACKAGE,
        ]);
        // With a target given, what runs at build time is not instrumented.
        cargo.args(["--bin", &program(target), "--target", &host, "--target-dir"]);
        cargo.arg(&output);
        let flags = [&INSTRUMENTATION[..], &["--cfg=fuzzing"]].concat();
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        step.run("compiling", &mut cargo)?;
        step.done();
        let fuzzer = Self {
            program: output.join(host).join("fuzz").join(program(target)),
            found: output.join("found").join(target.name()),
            faults: output.join("faults").join(target.name()),
            corpus: bench.project.file(CORPUS).join(target.name()),
            regressions: bench.project.file(REGRESSIONS).join(target.name()),
        };
        for folder in [&fuzzer.found, &fuzzer.faults] {
            fs::create_dir_all(folder)?;
        }
        Ok(fuzzer)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(format!("-timeout={PATIENCE}"));
        command.arg(format!("-rss_limit_mb={MEMORY}"));
        command.arg(format!("-max_len={LARGEST}"));
        command.env("RUST_BACKTRACE", "0").stdin(Stdio::null());
        command
    }

    /// The folders of inputs to begin with that exist.
    fn known(&self) -> impl Iterator<Item = &Path> {
        let known = [self.corpus.as_path(), &self.regressions];
        known.into_iter().filter(|folder| folder.is_dir())
    }

    fn search(&self, seconds: u64, seed: u32) -> Result<Found> {
        let mut command = self.command();
        command.args(["-print_final_stats=1", "-reload=0"]);
        command.arg(format!("-max_total_time={seconds}"));
        command.arg(format!("-seed={seed}"));
        command.arg(format!("-artifact_prefix={}/", self.faults.display()));
        command.arg(&self.found).args(self.known());
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("cannot run the fuzzer")?;
        // It holds the pipe's other end; without this that never closes.
        drop(command);
        let mut log = fs::File::create(self.found.with_extension("log"))?;
        let mut said = Said::default();
        for line in BufReader::new(reader).split(b'\n') {
            let line = line?;
            writeln!(log, "{}", String::from_utf8_lossy(&line))?;
            said.line(&String::from_utf8_lossy(&line));
        }
        let status = child.wait()?;
        let fault = match (status.success(), said.fault.take()) {
            (true, _) => None,
            (false, Some(input)) => Some(self.name(&input, &said.last)?),
            (false, None) => bail!("the fuzzer ended with {status}:\n{}", said.last.join("\n")),
        };
        Ok(Found {
            seconds,
            seed,
            said,
            fault,
        })
    }

    /// Makes an input that shows a fault as small as it gets, and gives it a name.
    fn name(&self, input: &Path, said: &[String]) -> Result<Fault> {
        let small = self.faults.join("smaller");
        let mut command = self.command();
        command.arg("-minimize_crash=1");
        command.arg(format!("-max_total_time={SHRINKING}"));
        command.arg(format!("-exact_artifact_path={}", small.display()));
        // It fails by design, and may have nothing smaller.
        quiet(command.arg(input));
        let smallest = [small.as_path(), input]
            .into_iter()
            .find(|path| path.exists());
        let bytes = fs::read(smallest.context("the fuzzer kept no input")?)?;
        let digest = Sha256::digest(&bytes);
        let panic = said.iter().find(|line| line.contains("panicked at"));
        let place = panic.and_then(|line| line.split("panicked at ").nth(1));
        let place: String = place
            .and_then(|place| place.rsplit('/').next())
            .map_or("fault", |place| place.trim_end_matches(':'))
            .chars()
            .map(|c| if c.is_alphanumeric() { c } else { '-' })
            .collect();
        let name = format!(
            "{place}-{:02x}{:02x}{:02x}",
            digest[0], digest[1], digest[2]
        );
        let path = self.faults.join(&name);
        fs::write(&path, bytes)?;
        for rest in [small.as_path(), input] {
            if rest.exists() && rest != path {
                fs::remove_file(rest)?;
            }
        }
        Ok(Fault {
            path,
            keep: self.regressions.join(name),
            said: said.join("\n"),
        })
    }

    /// Replaces the committed inputs by as few of those that are known as reach the same.
    fn keep(&self) -> Result<()> {
        let fresh = self.found.with_extension("fresh");
        if fresh.exists() {
            fs::remove_dir_all(&fresh)?;
        }
        fs::create_dir_all(&fresh)?;
        let mut command = self.command();
        command.arg("-set_cover_merge=1").arg(&fresh);
        // Ordered, so that what was committed is rather kept than replaced.
        let status = command.args(self.known()).arg(&self.found).status()?;
        if !status.success() {
            bail!("libFuzzer could not merge the inputs: {status}");
        }
        if self.corpus.exists() {
            fs::remove_dir_all(&self.corpus)?;
        }
        fs::create_dir_all(&self.corpus)?;
        let mut count = 0;
        for file in fs::read_dir(&fresh)? {
            let file = file?;
            fs::copy(file.path(), self.corpus.join(file.file_name()))?;
            count += 1;
        }
        fs::remove_dir_all(fresh)?;
        println!("{count} inputs are in {}", self.corpus.display());
        Ok(())
    }
}

fn program(target: Target) -> String {
    format!("fuzz-{target}")
}

/// What a search came to.
#[derive(Debug)]
struct Found {
    seconds: u64,
    seed: u32,
    said: Said,
    fault: Option<Fault>,
}

/// An input that shows a fault.
#[derive(Debug)]
struct Fault {
    path: PathBuf,
    keep: PathBuf,
    said: String,
}

impl Found {
    /// One line of result, and what to do about a fault.
    fn text(&self, target: Target) -> String {
        let Self {
            seconds,
            seed,
            said,
            fault,
        } = self;
        let faults = usize::from(fault.is_some());
        let line = format!(
            "fuzz {target}: seed {seed}, {} executions in {seconds} s, {} of {} edges, {} inputs, \
             {faults} faults",
            said.executions, said.covered, said.edges, said.inputs
        );
        let Some(fault) = fault else {
            return format!(
                "{line}\n    again: cargo xtask fuzz {target} --seconds {seconds} --seed {seed}"
            );
        };
        let (path, keep) = (fault.path.display(), fault.keep.display());
        format!(
            "{line}\n    again: cargo xtask fuzz {target} --input {path}\n    \
             to have the tests replay it, copy it to {keep}"
        )
    }
}

/// What libFuzzer said.
#[derive(Debug, Default)]
struct Said {
    executions: u64,
    covered: u64,
    edges: u64,
    inputs: u64,
    fault: Option<PathBuf>,
    /// The last lines, among them a panic's message.
    last: Vec<String>,
}

impl Said {
    const LINES: usize = 40;

    fn line(&mut self, line: &str) {
        let number = |text: &str| -> Option<u64> { text.split('/').next()?.parse().ok() };
        let after = |word: &str| {
            let mut words = line.split_whitespace();
            words.find(|it| *it == word).and_then(|_| words.next())
        };
        if let Some(edges) = line.split(" PC tables (").nth(1) {
            self.edges = edges.split(' ').next().and_then(number).unwrap_or(0);
        }
        if let (Some(covered), Some(inputs)) = (after("cov:"), after("corp:")) {
            self.covered = number(covered).unwrap_or(self.covered);
            self.inputs = number(inputs).unwrap_or(self.inputs);
        }
        if let Some(executions) = after("stat::number_of_executed_units:") {
            self.executions = number(executions).unwrap_or(0);
        }
        if let Some(path) = line.split("Test unit written to ").nth(1) {
            self.fault = Some(PathBuf::from(path.trim()));
        }
        // What comes after is libFuzzer's own stack.
        if self.last.iter().any(|line| line.contains("libFuzzer: ")) {
            return;
        }
        if self.last.len() == Self::LINES {
            self.last.remove(0);
        }
        self.last.push(line.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Said {
        let mut said = Said::default();
        text.lines().for_each(|line| said.line(line));
        said
    }

    #[test]
    fn numbers_are_read_from_what_libfuzzer_says() {
        let said = said(
            "INFO: Loaded 1 PC tables (5120 PCs): 5120 [0x1,0x2),\n\
             #2      INITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 30Mb\n\
             #99     DONE   cov: 345 ft: 900 corp: 72/1003b lim: 4096 exec/s: 50 rss: 50Mb\n\
             stat::number_of_executed_units: 99",
        );

        assert_eq!(
            [said.edges, said.covered, said.inputs, said.executions],
            [5120, 345, 72, 99]
        );
        assert!(said.fault.is_none());
    }

    #[test]
    fn fault_has_its_input_and_its_panic() {
        let said = said(
            "thread '<unnamed>' panicked at libmuser-rs/src/a.rs:1:2:\n\
             oh\n\
             ==1== ERROR: libFuzzer: deadly signal\n\
             #0 0x5 in main\n\
             artifact_prefix='/t/'; Test unit written to /t/crash-1",
        );

        assert_eq!(said.fault.as_deref(), Some(Path::new("/t/crash-1")));
        assert_eq!(said.last.len(), 3);
        assert!(said.last[0].contains("a.rs:1:2"));
    }

    #[test]
    fn result_says_how_to_repeat_it() {
        let found = Found {
            seconds: 7,
            seed: 5,
            said: Said::default(),
            fault: None,
        };

        let text = found.text(Target::Config);

        assert!(text.contains("cargo xtask fuzz config --seconds 7 --seed 5"));
        assert!(text.contains("0 faults"));
    }
}
