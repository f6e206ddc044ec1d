// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Starts the fuzzing processes, ends those that wait too long, and judges what came of it.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use muser_e2e::check::errno_name;
use muser_e2e::mdev::{self, Mdev, Type};
use muser_e2e::node::Node;
use muser_e2e::random::Random;
use muser_e2e::{kmsg, module, process, sys, time};
use muser_uapi::{MUSER_ATTACH, MUSER_MMAP_STATE};

use crate::ops::{self, Role, OPERATIONS};
use crate::points::{Points, TEXT};
use crate::shared::{Shared, KINDS};
use crate::worker::{Worker, FOUND};

/// First argument of a run that is a fuzzing process.
pub(crate) const WORKER: &str = "--worker";
const SHARED: &str = "/dev/shm/fuzz-kmod";
const SECTIONS: &str = "/sys/module/muser/sections";
/// Devices that are fuzzed.
const DEVICES: usize = 4;
/// How long a call may take before its process is killed.
const PATIENCE: Duration = Duration::from_secs(2);
/// Operations that must have succeeded, or the fuzzing is worth nothing.
const VITAL: &[&str] = &[
    "open_node",
    "attach",
    "next_take",
    "next_reply",
    "trigger",
    "query",
    "map_slots",
    "map_area",
    "open_group",
    "set_irqs",
    "read_region",
    "write_region",
    "map_region",
    "map_dma",
    "read_memory",
    "create",
    "remove",
];

/// The devices' UUIDs, which follow from the seed.
fn uuids(seed: u64) -> Vec<String> {
    let mut random = Random::branch(seed, u64::MAX);
    (0..DEVICES)
        .map(|device| {
            let number = random.next();
            format!(
                "{:08x}-{:04x}-4000-8000-00000000000{device}",
                number & 0xFFFF_FFFF,
                number >> 48
            )
        })
        .collect()
}

/// Runs as a fuzzing process: its place, its generation, the seed.
pub(crate) fn work(words: &[String]) -> Result<()> {
    sys::die_with_parent()?;
    let [index, generation, seed] = words else {
        bail!("a fuzzing process needs its place, its generation and the seed");
    };
    let (index, generation, seed) = (index.parse()?, generation.parse()?, seed.parse()?);
    let shared = Shared::open(SHARED)?;
    let mut worker = Worker::new(shared, seed, index, generation, uuids(seed))?;
    worker.live();
    Ok(())
}

/// A place, and the process that fuzzes there.
struct Place {
    index: usize,
    generation: u64,
    process: Option<Child>,
    /// When it was killed, if it was.
    killed: Option<Instant>,
}

impl Place {
    fn start(&mut self, shared: &Shared, seed: u64) -> Result<()> {
        shared.begin(self.index, 0, crate::sys::milliseconds());
        let process = Command::new("/proc/self/exe")
            .args([WORKER, &self.index.to_string()])
            .args([self.generation.to_string(), seed.to_string()])
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .context("starting a fuzzing process")?;
        self.generation += 1;
        self.process = Some(process);
        self.killed = None;
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(process) = &self.process
            && self.killed.is_none()
        {
            // With all that it forked.
            let group = -i32::from_ne_bytes(process.id().to_ne_bytes());
            let _ = sys::kill(group, libc::SIGKILL);
            self.killed = Some(Instant::now());
        }
    }

    /// Looks whether it has ended; an error if it ended as it should not, or can't be ended.
    fn look(&mut self) -> Result<bool> {
        let Some(process) = &mut self.process else {
            return Ok(true);
        };
        let id = process.id();
        let Some(status) = process.try_wait()? else {
            if let Some(killed) = self.killed {
                ensure!(
                    killed.elapsed() < 6 * time::patience(),
                    "a process can't be killed; it waits in {}",
                    process::stack(id)
                );
            }
            return Ok(false);
        };
        // What it forked goes with it.
        let _ = sys::kill(-i32::from_ne_bytes(id.to_ne_bytes()), libc::SIGKILL);
        self.process = None;
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(true),
            (None, Some(libc::SIGKILL)) if self.killed.is_some() => Ok(true),
            (Some(FOUND), _) => bail!("process {} found a fault", self.index),
            _ => bail!(
                "process {} generation {} ended with {status}",
                self.index,
                self.generation - 1
            ),
        }
    }
}

/// Fuzzes for so long; whether all was well.
pub(crate) fn run(seconds: u64, seed: u64) -> Result<bool> {
    println!(
        "fuzzing muser.ko for {seconds} s with {} processes, seed {seed}",
        Role::PROCESSES
    );
    println!("(the seed repeats each process's calls, but the scheduler mixes them anew)");
    let mut log = kmsg::Log::from_now()?;
    // What was left by a run before this.
    let _ = std::fs::remove_file(SHARED);
    sys::adopt_orphans()?;
    module::load()?;
    let shared = Shared::open(SHARED)?;
    let points = points()?;
    if let Some((points, start)) = &points {
        shared.set_text(*start, points.text);
    }
    shared.set_ability(ability()?);
    let uuids = uuids(seed);
    for device in 0..DEVICES {
        ops::make(&uuids, device).context("creating a device")?;
    }

    let mut faults = Vec::new();
    if let Err(error) = fuzz(&shared, seconds, seed) {
        faults.push(format!("{error:#}"));
    }
    if shared.findings() > 0 {
        faults.push(format!("{} findings, see above", shared.findings()));
    }
    let settled = time::until("the devices and the module going", || {
        for uuid in Mdev::list() {
            drop(Mdev::adopt(&uuid));
        }
        while sys::reap_one() {}
        // Upstream's `remove_store` takes the file `remove` away before `mdev_device_remove` finds
        // that the device is still being created, and refuses: such a device goes with the module.
        let stay = Mdev::list();
        let spoiled = |uuid: &String| !Path::new(mdev::DEVICES).join(uuid).join("remove").exists();
        module::references().is_ok_and(|count| count == 0)
            && stay.iter().all(spoiled)
            && module::unload().is_ok()
            && Mdev::list().is_empty()
    });
    if let Err(error) = settled {
        faults.push(format!(
            "{error:#}: references {:?}, devices {:?}, processes:\n{}",
            module::references(),
            devices(),
            left_over().join("\n")
        ));
    }
    let lines = log.lines()?;
    if let Some(splat) = kmsg::splat(&lines) {
        faults.push(format!("the kernel complained:\n{}", splat.join("\n")));
    }
    faults.extend(tell(&shared));
    let covered = match &points {
        Some((points, _)) => coverage(points, &shared),
        None => "coverage unknown: this kernel has no KCOV".to_owned(),
    };
    // The file is of no use to anybody else.
    let _ = std::fs::remove_file(SHARED);
    for fault in &faults {
        println!("FAULT: {fault}");
    }
    let (all, ok) = sum(&shared);
    println!(
        "fuzz kmod: seed {seed}, {all} operations, {ok} succeeded ({} %), {covered}, {} faults",
        percent(ok, all),
        faults.len()
    );
    if !faults.is_empty() {
        println!("again: cargo xtask fuzz kmod --seconds {seconds} --seed {seed}");
    }
    Ok(faults.is_empty())
}

fn fuzz(shared: &Shared, seconds: u64, seed: u64) -> Result<()> {
    let mut places: Vec<_> = (0..Role::PROCESSES)
        .map(|index| Place {
            index,
            generation: 0,
            process: None,
            killed: None,
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random::branch(seed, u64::MAX - 1);
    let limit = u64::try_from((PATIENCE * time::slowness()).as_millis())?;
    let mut told = Instant::now();
    let mut result = Ok(());
    while Instant::now() < end && result.is_ok() && shared.findings() == 0 {
        for place in &mut places {
            match place.look() {
                Ok(true) => place.start(shared, seed)?,
                Ok(false) => {
                    let (since, _) = shared.place(place.index);
                    let stuck = crate::sys::milliseconds().saturating_sub(since) > limit;
                    if stuck || random.below(2000) == 0 {
                        place.kill();
                    }
                }
                Err(error) => result = Err(error),
            }
        }
        if told.elapsed() > Duration::from_secs(15) {
            told = Instant::now();
            let (all, ok) = sum(shared);
            println!("    {all} operations, {ok} succeeded");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for place in &mut places {
        place.kill();
    }
    for place in &mut places {
        let kind = shared.place(place.index).1;
        let ended = time::until("the end of a fuzzing process", || {
            !matches!(place.look(), Ok(false))
        });
        if let (Err(_), Some(process)) = (ended, &place.process) {
            let stack = process::stack(process.id());
            let name = OPERATIONS.get(kind).map_or("?", |op| op.name);
            println!("process {} stays in {name}, in {stack}", place.index);
            result = result.and_then(|()| bail!("a process can't be killed"));
        }
    }
    result
}

/// The devices that are still there, and what they are made of.
fn devices() -> Vec<String> {
    let names = |uuid: &String| {
        let entries = std::fs::read_dir(Path::new(mdev::DEVICES).join(uuid));
        let names = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name());
        format!("{uuid} with {:?}", names.collect::<Vec<_>>())
    };
    Mdev::list().iter().map(names).collect()
}

/// The fuzzing processes that are still there, and where they wait.
fn left_over() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&id: &u32| {
            // A process that is just ending has a name, but no command line.
            let own = std::fs::read_to_string(format!("/proc/{id}/comm"));
            own.is_ok_and(|name| name.trim() == "exe")
                || std::fs::read_to_string(format!("/proc/{id}/cmdline"))
                    .is_ok_and(|line| line.contains("/remove"))
        })
        .map(|id| {
            let files = std::fs::read_dir(format!("/proc/{id}/fd"));
            let files: Vec<_> = files
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| std::fs::read_link(entry.path()).ok())
                .filter(|file| file.starts_with("/dev"))
                .collect();
            format!("{id} has {files:?} open, {}", process::stack(id))
        })
        .collect()
}

/// What the module can do: a device is attached with it.
fn ability() -> Result<u64> {
    let mut bits = 0;
    for bit in [ops::DOORBELLS, ops::STATE] {
        let mdev = Mdev::create(Type::Pci)?;
        let node = Node::open(&mdev)?;
        let description = ops::description(1, bit);
        let mut attach = ops::argument(&description, bit);
        let attached = sys::ioctl(&node, MUSER_ATTACH, &mut attach).is_ok();
        let mapped = || sys::Mapping::shared(&node, MUSER_MMAP_STATE, sys::PAGE).is_ok();
        if attached && (bit != ops::STATE || mapped()) {
            bits |= bit;
        }
    }
    Ok(bits)
}

/// The module's points, and where its text is; `None` where there is no KCOV.
fn points() -> Result<Option<(Points, u64)>> {
    if !Path::new("/sys/kernel/debug/kcov").exists() {
        return Ok(None);
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let path = format!("/lib/modules/{}/extra/muser.ko", release.trim());
    let file = std::fs::read(&path).with_context(|| format!("reading {path}"))?;
    let points = Points::read(&file).with_context(|| path.clone())?;
    ensure!(
        !points.functions.is_empty(),
        "{path} was built without KCOV, which this kernel has"
    );
    let start = std::fs::read_to_string(format!("{SECTIONS}/{TEXT}"))?;
    let start = u64::from_str_radix(start.trim().trim_start_matches("0x"), 16)?;
    Ok(Some((points, start)))
}

fn sum(shared: &Shared) -> (u64, u64) {
    (0..KINDS)
        .map(|kind| shared.counts(kind))
        .fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1))
}

fn percent(part: u64, whole: u64) -> u64 {
    100 * part / whole.max(1)
}

/// Prints the operations by kind, and says which should have succeeded at least once.
fn tell(shared: &Shared) -> Vec<String> {
    let mut faults = Vec::new();
    println!(
        "{:18}{:>9}{:>11}  failed last with",
        "operation", "tried", "succeeded"
    );
    for (kind, op) in OPERATIONS.iter().enumerate() {
        let (all, ok) = shared.counts(kind);
        let last = match shared.errno(kind) {
            0 => String::new(),
            errno => errno_name(errno),
        };
        println!("{:18}{all:>9}{ok:>11}  {last}", op.name);
        if ok == 0 && VITAL.contains(&op.name) {
            faults.push(format!("no {} of {all} succeeded", op.name));
        }
    }
    faults
}

/// Prints the functions that were never entered, and says how much was covered.
fn coverage(points: &Points, shared: &Shared) -> String {
    let never = points.never_entered(|offset| shared.is_covered(offset));
    println!("{} functions were never entered:", never.len());
    for (name, points) in never {
        println!("    {name} ({points} points)");
    }
    let all = points.functions.len() as u64;
    let covered = points
        .functions
        .keys()
        .filter(|&&offset| shared.is_covered(offset))
        .count() as u64;
    format!(
        "covered {covered} of {all} points ({} %)",
        percent(covered, all)
    )
}
