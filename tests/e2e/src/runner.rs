// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a test in a process of its own, under a watchdog, and judges the kernel's log with it.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use libtest_mimic::{Completion, Failed, Trial};
use muser_conformance::Case;
use muser_e2e::mdev::Mdev;
use muser_e2e::vfio::Road;
use muser_e2e::{fault, kmsg, module, process, sys, time};

/// First argument of a run that is one test.
pub(crate) const INNER: &str = "--inner";

/// What a test does.
pub(crate) enum Body {
    /// It chooses its road itself, or needs none.
    Once(fn() -> Result<()>),
    /// It is run on this road.
    On(Road, fn(Road) -> Result<()>),
    /// It is a case of the conformance suite, run on this road.
    Case(Road, Case),
}

/// A test.
pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) body: Body,
    /// Why this system can't run it.
    pub(crate) lacking: fn() -> Option<String>,
    /// How much longer than others it may take.
    pub(crate) patience: u32,
    /// Whether it pins the client's memory, which [`Road::spoiled_for_dma`] may forbid: the only
    /// skip there is on a kernel that was built for these tests.
    pub(crate) pins: bool,
    /// Whether it has allocations fail, which the debug kernel alone can do.
    pub(crate) injects: bool,
}

impl Test {
    /// Has the test ignored where `lacking` gives a reason.
    pub(crate) fn needs(mut self, lacking: fn() -> Option<String>) -> Self {
        self.lacking = lacking;
        self
    }

    /// Gives the test `times` the time of others.
    pub(crate) fn long(mut self, times: u32) -> Self {
        self.patience = times;
        self
    }

    /// Says that the test pins the client's memory.
    pub(crate) fn pinning(mut self) -> Self {
        self.pins = true;
        self
    }

    /// Says that the test has allocations fail.
    pub(crate) fn injecting(mut self) -> Self {
        self.injects = true;
        self
    }

    /// Why the test is not run even though this kernel has all it needs.
    fn excuse(&self) -> Option<String> {
        if self.injects
            && !is_debug()
            && let Some(lacking) = fault::lacking()
        {
            return Some(lacking);
        }
        // Udev and systemd are not what a debug kernel is for, and take minutes there.
        if is_debug() && self.name.starts_with("unprivileged::") {
            return Some("the other kernels run it; it takes too long on this one".to_owned());
        }
        match self.body {
            Body::On(road, _) | Body::Case(road, _) if self.pins => road.spoiled_for_dma(),
            _ => None,
        }
    }

    fn reason_to_ignore(&self) -> Option<String> {
        let road = match self.body {
            Body::Once(_) => None,
            Body::On(road, _) | Body::Case(road, _) => {
                // The nodes come with the modules, and /dev/iommu with iommufd. Where the module
                // can't be loaded, the test itself says so.
                let _ = module::load();
                road.lacking()
            }
        };
        road.or_else(self.lacking)
    }
}

/// Runs one test in this process.
pub(crate) fn run_inner(tests: &[Test], name: &str) -> Result<()> {
    let test = tests.iter().find(|test| test.name == name);
    let test = test.with_context(|| format!("there is no test {name}"))?;
    sys::die_with_parent()?;
    match test.body {
        Body::Once(run) => run(),
        Body::On(road, run) => run(road),
        Body::Case(road, ref case) => crate::tests::run_case(case, road),
    }
}

/// The test as libtest-mimic wants it.
pub(crate) fn trial(test: Test) -> Trial {
    let name = test.name.clone();
    Trial::ignorable_test(name, move || {
        if let Some(excuse) = test.excuse() {
            return Ok(Completion::ignored_with(excuse));
        }
        match test.reason_to_ignore() {
            Some(reason) if has_everything() => {
                Err(format!("{reason}, but this kernel was configured to have it").into())
            }
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => supervise(&test).map(|()| Completion::Completed),
        }
    })
}

/// Whether this is a kernel built for these tests, where nothing may be skipped: xtask says so.
fn has_everything() -> bool {
    std::env::var("MUSER_KERNEL").is_ok_and(|kernel| kernel == "small" || kernel == "debug")
}

/// Whether this is the kernel that has all of the kernel's own checks: xtask says so.
fn is_debug() -> bool {
    std::env::var("MUSER_KERNEL").is_ok_and(|kernel| kernel == "debug")
}

fn supervise(test: &Test) -> Result<(), Failed> {
    let mut log = kmsg::Log::from_now().map_err(|error| format!("/dev/kmsg: {error}"))?;
    let judged = run_child(test);
    let leftovers = remove_leftovers();
    while sys::reap_one() {}
    let lines = log.lines().map_err(|error| format!("/dev/kmsg: {error}"))?;

    let mut faults: Vec<String> = Vec::new();
    if let Err(error) = &judged {
        faults.push(format!("{error:#}"));
    }
    if judged.is_ok() && !leftovers.is_empty() {
        faults.push(format!("it left devices behind: {}", leftovers.join(", ")));
    }
    if let Some(splat) = kmsg::splat(&lines) {
        faults.push(format!("the kernel complained:\n{}", splat.join("\n")));
    } else if judged.is_err() && !lines.is_empty() {
        let last = &lines[lines.len().saturating_sub(20)..];
        faults.push(format!(
            "the kernel's log of the time:\n{}",
            last.join("\n")
        ));
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n").into())
    }
}

fn run_child(test: &Test) -> Result<()> {
    let mut output = tempfile()?;
    let mut child = Command::new("/proc/self/exe")
        .args([INNER, &test.name])
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .env("RUST_BACKTRACE", "0")
        .process_group(0)
        .spawn()
        .context("starting the test's process")?;
    let limit = Duration::from_secs(60) * time::slowness() * test.patience;
    let status = watch(&mut child, limit);
    // Whatever it started and left; there may be nothing.
    let _ = sys::kill(-i32::from_ne_bytes(child.id().to_ne_bytes()), libc::SIGKILL);
    let mut said = String::new();
    output.rewind()?;
    output.read_to_string(&mut said)?;
    let said = said.trim_end();
    match status? {
        Ended::ByItself(status) if status.success() => Ok(()),
        Ended::ByItself(status) => match status.signal() {
            Some(signal) => bail!("the test's process died of signal {signal}\n{said}"),
            None => bail!("{said}"),
        },
        Ended::Hung(stack) => {
            bail!(
                "hung: killed by the watchdog after {limit:?}, while it waited in {stack}\n{said}"
            )
        }
    }
}

/// How a test's process ended.
enum Ended {
    /// In time, or by a signal that was not ours.
    ByItself(ExitStatus),
    /// It was killed at its limit, while it waited there in the kernel.
    Hung(String),
}

/// Waits for the child; kills it at the limit, and gives up the whole run if it can't be killed.
fn watch(child: &mut Child, limit: Duration) -> Result<Ended> {
    let pidfd = sys::pidfd(child.id()).context("watching the test's process")?;
    if sys::poll(&pidfd, libc::POLLIN, limit)? != 0 {
        return Ok(Ended::ByItself(child.wait()?));
    }
    let stack = process::stack(child.id());
    sys::kill(-i32::from_ne_bytes(child.id().to_ne_bytes()), libc::SIGKILL)?;
    if sys::poll(&pidfd, libc::POLLIN, time::patience())? != 0 {
        child.wait()?;
        return Ok(Ended::Hung(stack));
    }
    println!(
        "FAILED\nFATAL: the test's process can't be killed; it waits in {}. The run ends here.",
        process::stack(child.id())
    );
    std::process::exit(102);
}

/// Removes the devices that the test left, and says which, and what became of them.
fn remove_leftovers() -> Vec<String> {
    let remove = |uuid: String| {
        let mdev = Mdev::adopt(&uuid);
        drop(mdev);
        if Mdev::list().contains(&uuid) {
            format!("{uuid} (which can't be removed: its client is stuck)")
        } else {
            uuid
        }
    };
    Mdev::list().into_iter().map(remove).collect()
}

fn tempfile() -> Result<File> {
    let path = std::env::temp_dir().join(format!("e2e-{}.out", std::process::id()));
    let file = File::options()
        .read(true)
        .append(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("creating {}", path.display()))?;
    file.set_len(0)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
