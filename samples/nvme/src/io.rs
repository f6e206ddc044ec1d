// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The NVM command set (section 6).
//!
//! Reads, writes and flushes become jobs of an engine. The rest is rare, and done at once.

use std::io;
use std::ops::Range;

use libmuser::ScatterGather;

use crate::backing::{self, is_unsupported, Segments};
use crate::command::{Answer, Command};
use crate::controller::Core;
use crate::engine::{perform, Ended, Job};
use crate::kept::Work;
use crate::spec::*;
use crate::transfer::{self, Data};

/// What a command comes to.
#[derive(Debug)]
pub(crate) enum Plan {
    Done(Answer),
    Job(Job, Rest),
}

/// What is left to do when a job has ended.
#[derive(Debug)]
pub(crate) struct Rest {
    writes: bool,
    bounce: Option<ScatterGather>,
    work: Work,
}

/// Force Unit Access (bit 30 of dword 12).
const FUA: u32 = 1 << 30;
/// Deallocate (bit 25 of dword 12).
const DEALLOCATE: u32 = 1 << 25;
/// Protection information: action and checks (bits 29 to 26 of dword 12).
const PRINFO: u32 = 0xf << 26;
/// Attribute of Dataset Management: deallocate.
const AD: u32 = 1 << 2;
/// Bytes of a range of Dataset Management.
const RANGE: usize = 16;

/// Decides what a command comes to.
pub(crate) fn plan(core: &Core, command: &Command) -> Plan {
    prepare(core, command).unwrap_or_else(|status| Plan::Done(status.into()))
}

fn prepare(core: &Core, command: &Command) -> Result<Plan, Status> {
    if command.is_odd() {
        return Err(Status::INVALID_FIELD);
    }
    let nsid = command.nsid.get();
    let all = command.opcode == nvm::FLUSH && nsid == ALL_NAMESPACES;
    if !all && nsid != NAMESPACE {
        // An opcode that is unknown is so for any namespace.
        return Err(match command.opcode {
            nvm::FLUSH..=nvm::READ | nvm::COMPARE => Status::INVALID_NAMESPACE,
            nvm::WRITE_ZEROES..=nvm::DATASET_MANAGEMENT | nvm::VERIFY => Status::INVALID_NAMESPACE,
            _ => Status::INVALID_OPCODE,
        });
    }
    match command.opcode {
        nvm::READ => {
            let (at, len) = span(core, command)?;
            let (segments, bounce) = Data::incoming(core, command, len)?.split();
            let rest = Rest::new(bounce, false, len);
            Ok(Plan::Job(Job::Read(at, segments), rest))
        }
        nvm::WRITE => {
            let (at, len) = span(core, command)?;
            writable(core)?;
            let durable = is_durable(core, command);
            let (segments, _) = Data::outgoing(core, command, len)?.split();
            let rest = Rest::new(None, true, len);
            Ok(Plan::Job(Job::Write(at, segments, durable), rest))
        }
        nvm::FLUSH => Ok(Plan::Job(Job::Flush, Rest::new(None, true, 0))),
        nvm::COMPARE => compare(core, command),
        nvm::VERIFY => verify(core, command),
        nvm::WRITE_ZEROES => write_zeroes(core, command),
        nvm::DATASET_MANAGEMENT => dataset_management(core, command),
        _ => Err(Status::INVALID_OPCODE),
    }
}

impl Rest {
    fn new(bounce: Option<ScatterGather>, writes: bool, len: usize) -> Self {
        let bytes = len as u64;
        let count = u64::from(len > 0);
        let work = match writes {
            true => Work {
                writes: count,
                bytes_written: bytes,
                ..Work::default()
            },
            false => Work {
                reads: count,
                bytes_read: bytes,
                ..Work::default()
            },
        };
        Self {
            writes,
            bounce,
            work,
        }
    }

    /// What came of the command, when its job has ended so.
    pub(crate) fn finish(self, (result, segments): Ended) -> (Answer, Work) {
        let status = match (result, segments) {
            (Err(error), _) => failure(&error, self.writes),
            (Ok(()), Some(segments)) if !self.writes => {
                let arrived = transfer::arrive(&segments, self.bounce.as_ref());
                arrived.err().unwrap_or(Status::SUCCESS)
            }
            (Ok(()), _) => Status::SUCCESS,
        };
        let work = if status.is_success() {
            self.work
        } else {
            Work::default()
        };
        (status.into(), work)
    }
}

/// What a host is told when a backing fails.
fn failure(error: &io::Error, writes: bool) -> Status {
    log::warn!("input or output failed: {error}");
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Status::CAPACITY_EXCEEDED,
        // The host's memory went away under the system call.
        Some(libc::EFAULT) => Status::DATA_TRANSFER_ERROR,
        Some(libc::ENOMEM | libc::EAGAIN) => Status::INTERNAL_ERROR,
        _ if writes => Status::WRITE_FAULT,
        _ => Status::UNRECOVERED_READ,
    }
}

/// Bytes of the blocks that a command is about, which the namespace has.
fn blocks(core: &Core, first: u64, count: u64) -> Result<Range<u64>, Status> {
    let config = &core.config;
    let end = first
        .checked_add(count)
        .filter(|end| *end <= config.blocks)
        .ok_or(Status::LBA_OUT_OF_RANGE)?;
    Ok(first << config.block_shift..end << config.block_shift)
}

/// Where the data of a command with data is, and how much.
fn span(core: &Core, command: &Command) -> Result<(u64, usize), Status> {
    // There is no protection information in this format.
    if command.cdw12.get() & PRINFO != 0 {
        return Err(Status::INVALID_PROTECTION);
    }
    let len = u64::from(command.blocks()) << core.config.block_shift;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > MAX_TRANSFER {
        return Err(Status::INVALID_FIELD);
    }
    let range = blocks(core, command.slba(), command.blocks().into())?;
    Ok((range.start, len))
}

fn writable(core: &Core) -> Result<(), Status> {
    match core.config.read_only {
        true => Err(Status::READ_ONLY_RANGE),
        false => Ok(()),
    }
}

/// Whether a write must be on the medium when it has ended.
fn is_durable(core: &Core, command: &Command) -> bool {
    command.cdw12.get() & FUA != 0 || core.kept.control().features.write_cache == 0
}

/// Reads into memory of this process.
fn read(core: &Core, at: u64, len: usize) -> Result<Segments, Status> {
    let job = Job::Read(at, Segments::copy(vec![0; len]));
    match perform(&*core.backing, job) {
        (Ok(()), Some(segments)) => Ok(segments),
        (Err(error), _) => Err(failure(&error, false)),
        (Ok(()), None) => Err(Status::INTERNAL_ERROR),
    }
}

fn compare(core: &Core, command: &Command) -> Result<Plan, Status> {
    let (at, len) = span(core, command)?;
    let expected = transfer::from_host(core, command, len)?;
    let found = read(core, at, len)?;
    match found.copied() == Some(&expected) {
        true => Ok(Plan::Done(Answer::SUCCESS)),
        false => Err(Status::COMPARE_FAILURE),
    }
}

fn verify(core: &Core, command: &Command) -> Result<Plan, Status> {
    if command.cdw12.get() & PRINFO != 0 {
        return Err(Status::INVALID_PROTECTION);
    }
    // It has no data, so it may be about more than could be transferred.
    let range = blocks(core, command.slba(), command.blocks().into())?;
    let mut at = range.start;
    while at < range.end {
        let part = (range.end - at).min(MAX_TRANSFER as u64);
        read(core, at, usize::try_from(part).unwrap_or(MAX_TRANSFER))?;
        at += part;
    }
    Ok(Plan::Done(Answer::SUCCESS))
}

fn write_zeroes(core: &Core, command: &Command) -> Result<Plan, Status> {
    if command.cdw12.get() & PRINFO != 0 {
        return Err(Status::INVALID_PROTECTION);
    }
    let range = blocks(core, command.slba(), command.blocks().into())?;
    writable(core)?;
    let deallocate = command.cdw12.get() & DEALLOCATE != 0;
    let durable = is_durable(core, command);
    backing::zero(&*core.backing, range, deallocate, durable)
        .map_err(|error| failure(&error, true))?;
    Ok(Plan::Done(Answer::SUCCESS))
}

/// Deallocates, if that is what is wanted; the other attributes are hints.
fn dataset_management(core: &Core, command: &Command) -> Result<Plan, Status> {
    let count = usize::try_from(command.cdw10.get() & 0xff).unwrap_or(0) + 1;
    if command.cdw11.get() & AD == 0 {
        return Ok(Plan::Done(Answer::SUCCESS));
    }
    writable(core)?;
    let bytes = transfer::from_host(core, command, count * RANGE)?;
    let ranges = bytes.chunks_exact(RANGE).map(|range| {
        let len = range[4..]
            .first_chunk()
            .map_or(0, |b| u32::from_le_bytes(*b));
        let start = range[8..]
            .first_chunk()
            .map_or(0, |b| u64::from_le_bytes(*b));
        blocks(core, start, len.into())
    });
    // All are looked at before the first one is touched.
    let ranges: Vec<_> = ranges.collect::<Result<_, _>>()?;
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match core.backing.zero(range, true) {
            // It is a hint as well: the blocks stay what they are.
            Err(error) if is_unsupported(&error) => break,
            result => result.map_err(|error| failure(&error, true))?,
        }
    }
    Ok(Plan::Done(Answer::SUCCESS))
}
