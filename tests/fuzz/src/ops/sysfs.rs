// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices created and removed, their attributes read and written.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use muser_e2e::mdev::{self, Type};

use super::Role;
use crate::worker::Worker;

/// Attributes with a number that may be written, and a good value of each.
const LIMITS: &[(&str, &str)] = &[
    ("reattach_timeout_ms", "40"),
    ("max_memory", "16777216"),
    ("max_state", "1048576"),
    ("max_pinned", "4096"),
    ("max_vectors", "4096"),
    ("unmap_timeout_ms", "20"),
];

/// The type of a device.
pub(crate) fn kind(device: usize) -> Type {
    if device == 2 {
        Type::Platform
    } else {
        Type::Pci
    }
}

/// Creates a device of those that all fuzzers use, with a timeout that ends soon.
pub(crate) fn make(uuids: &[String], device: usize) -> io::Result<()> {
    kind(device).create_raw(&uuids[device])?;
    // It may be gone already.
    let _ = write(&uuids[device], "reattach_timeout_ms", b"40");
    let _ = write(&uuids[device], "unmap_timeout_ms", b"20");
    Ok(())
}

fn write(uuid: &str, name: &str, value: &[u8]) -> io::Result<()> {
    let path = Path::new(mdev::DEVICES).join(uuid).join(name);
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value)
}

pub(super) fn create(worker: &mut Worker) -> Option<io::Result<u64>> {
    if worker.chance(20) {
        let garbage = worker.number().to_string();
        return Some(Type::Pci.create_raw(&garbage).map(|()| 0));
    }
    let device = worker.random.below(worker.uuids.len() as u64) as usize;
    let exists = Path::new(mdev::DEVICES)
        .join(&worker.uuids[device])
        .exists();
    if exists && worker.chance(90) {
        return None;
    }
    Some(make(&worker.uuids, device).map(|()| 0))
}

pub(super) fn remove(worker: &mut Worker) -> Option<io::Result<u64>> {
    // A removal waits until the clients have closed the device, and can't be killed: a client that
    // removes its own device waits for itself.
    if worker.role != Role::Owner {
        return None;
    }
    // Its own mostly: nobody else could do much without a device.
    let device = if worker.chance(80) {
        worker.home
    } else {
        worker.device()
    };
    Some(write(&worker.uuids[device], "remove", b"1").map(|()| 0))
}

pub(super) fn read_attribute(worker: &mut Worker) -> Option<io::Result<u64>> {
    let device = worker.device();
    let directory = Path::new(mdev::DEVICES).join(&worker.uuids[device]);
    let files: Vec<_> = fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        .collect();
    if files.is_empty() {
        return None;
    }
    let path = worker.random.pick(&files).clone();
    let mut text = Vec::new();
    let read = fs::File::open(&path).and_then(|mut file| file.read_to_end(&mut text));
    if let Some(byte) = text
        .iter()
        .find(|byte| !byte.is_ascii_graphic() && !byte.is_ascii_whitespace())
    {
        worker.found(&format!("{} has byte {byte:#x}", path.display()));
    }
    // `remove` can be written only.
    if path.ends_with("remove") {
        return None;
    }
    Some(read.map(|count| count as u64))
}

pub(super) fn write_attribute(worker: &mut Worker) -> Option<io::Result<u64>> {
    let device = worker.device();
    let (name, good) = *worker.random.pick(LIMITS);
    let directory = Path::new(mdev::DEVICES).join(&worker.uuids[device]);
    if !directory.join(name).exists() {
        return None;
    }
    let value = match worker.random.below(10) {
        0 => worker.number().to_string(),
        1 => worker.random.below(8).to_string(),
        2 => "-1\n".to_owned(),
        3 => "x".repeat(worker.random.below(5000) as usize),
        _ => good.to_owned(),
    };
    // Nobody may wait for minutes: neither a client for a process, nor an unmap.
    if name.ends_with("_ms") && value.trim().parse::<u64>().is_ok_and(|ms| ms > 100) {
        return None;
    }
    Some(write(&worker.uuids[device], name, value.as_bytes()).map(|()| 0))
}
