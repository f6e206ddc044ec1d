// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A command's data, between the host's memory and here.

use libmuser::{DmaAccess, ScatterGather};

use crate::command::Command;
use crate::controller::Core;
use crate::prp::{self, Pieces};
use crate::sgl;
use crate::spec::Status;
use crate::sys::Segments;

/// Where `len` bytes of a command's data are.
pub(crate) fn pieces(core: &Core, command: &Command, len: usize) -> Result<Pieces, Status> {
    let mut read = |address: u64, to: &mut [u8]| core.dma.read(address, to).ok();
    let [first, second] = command
        .dptr
        .map(zerocopy::byteorder::little_endian::U64::get);
    match command.psdt() {
        0 => prp::pieces(first, second, len, &mut read),
        _ => sgl::pieces([first, second], len, &mut read),
    }
}

/// Writes a command's data to the host.
pub(crate) fn to_host(core: &Core, command: &Command, data: &[u8]) -> Result<(), Status> {
    let mut rest = data;
    let mut parts = Vec::new();
    for (address, len) in pieces(core, command, data.len())? {
        let (part, after) = rest.split_at(len.min(rest.len()));
        rest = after;
        parts.push((address, part));
    }
    core.dma.write_vectored(&parts).map_err(failed)
}

/// Reads a command's data from the host.
pub(crate) fn from_host(core: &Core, command: &Command, len: usize) -> Result<Vec<u8>, Status> {
    let pieces = pieces(core, command, len)?;
    let mut data = vec![0; len];
    gather(core, &pieces, DmaAccess::Read)?
        .read(0, &mut data)
        .map_err(failed)?;
    Ok(data)
}

/// Memory to read a command's data from, or to write it to.
#[derive(Debug)]
pub(crate) struct Data {
    pub(crate) segments: Segments,
    /// Where it must be copied to in the end.
    bounce: Option<ScatterGather>,
}

impl Data {
    /// Memory that the host's data is in, for `len` bytes.
    pub(crate) fn outgoing(core: &Core, command: &Command, len: usize) -> Result<Self, Status> {
        Self::new(core, command, len, DmaAccess::Read)
    }

    /// Memory that data is to be in, and from which it comes to the host by [`arrive`].
    pub(crate) fn incoming(core: &Core, command: &Command, len: usize) -> Result<Self, Status> {
        Self::new(core, command, len, DmaAccess::Write)
    }

    fn new(core: &Core, command: &Command, len: usize, access: DmaAccess) -> Result<Self, Status> {
        let written = access == DmaAccess::Write;
        let gathered = gather(core, &pieces(core, command, len)?, access)?;
        // What can't be mapped into this process is copied.
        if let Ok(slices) = gathered.slices() {
            let segments = Segments::host(slices, written).map_err(failed)?;
            return Ok(Self {
                segments,
                bounce: None,
            });
        }
        let mut copy = vec![0; len];
        if !written {
            gathered.read(0, &mut copy).map_err(failed)?;
        }
        Ok(Self {
            segments: Segments::copy(copy),
            bounce: written.then_some(gathered),
        })
    }

    /// Takes apart what an engine wants by itself.
    pub(crate) fn split(self) -> (Segments, Option<ScatterGather>) {
        (self.segments, self.bounce)
    }
}

/// Brings to the host what was read.
pub(crate) fn arrive(segments: &Segments, bounce: Option<&ScatterGather>) -> Result<(), Status> {
    match (bounce, segments.copied()) {
        (Some(host), Some(copy)) => host.write(0, copy).map_err(failed),
        _ => segments.mark_written().map_err(failed),
    }
}

fn gather(core: &Core, pieces: &Pieces, access: DmaAccess) -> Result<ScatterGather, Status> {
    core.dma.gather(pieces, access).map_err(failed)
}

fn failed(error: libmuser::Error) -> Status {
    log::debug!("a command's data: {error}");
    Status::DATA_TRANSFER_ERROR
}
