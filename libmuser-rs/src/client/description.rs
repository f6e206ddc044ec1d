// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a server says of its device: regions with what can be mapped of them, and interrupts.
//!
//! All of it is checked here, so that nothing in a [`Layout`] contradicts itself.

use zerocopy::{FromBytes, IntoBytes};

use super::connection::{Answer, Connection};
use super::failure;
use crate::error::{Error, Result};
use crate::peer_file::PeerFile;
use crate::region::{Area, AreaKind, RegionInfo};
use crate::transport::{Description, IrqInfo};
use crate::vfio_user::wire::payload::{self, take, CapHeader, DeviceInfo, SparseArea, SparseMmap};
use crate::vfio_user::wire::{Command, AROUND_DATA};

/// Regions and interrupt indexes that a device can have here: `<linux/vfio.h>` has 9 and 5 for PCI.
const MOST_INDEXES: u32 = 256;

/// A device as its server describes it.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) description: Description,
    pub(super) can_reset: bool,
    pub(super) is_pci: bool,
    /// Files of the regions that have mappable areas.
    pub(super) files: Vec<RegionFile>,
}

/// What the areas of a region are mapped of.
#[derive(Debug)]
pub(super) struct RegionFile {
    pub(super) region: u32,
    pub(super) file: PeerFile,
    /// Where in the file the region starts.
    pub(super) start: u64,
}

/// Asks the server for everything.
pub(super) fn ask(connection: &Connection) -> Result<Layout> {
    let device = device(connection)?;
    let mut layout = Layout {
        description: Description {
            io_events: Vec::new(),
            regions: Vec::new(),
            irqs: Vec::new(),
        },
        can_reset: device.flags & DeviceInfo::RESET != 0,
        is_pci: device.flags & DeviceInfo::PCI != 0,
        files: Vec::new(),
    };
    for index in 0..device.num_regions {
        let Some((info, file)) = region(connection, index)? else {
            continue;
        };
        layout.description.regions.push(info);
        layout.files.extend(file);
    }
    for index in 0..device.num_irqs {
        let info = irq(connection, index)?;
        layout.description.irqs.extend(info);
    }
    Ok(layout)
}

fn device(connection: &Connection) -> Result<DeviceInfo> {
    const COMMAND: Command = Command::DeviceGetInfo;
    let question = DeviceInfo {
        argsz: size::<DeviceInfo>(),
        ..DeviceInfo::default()
    };
    let answer = connection.call(COMMAND, &[question.as_bytes()], &[])?;
    let (device, _) = fixed::<DeviceInfo>(COMMAND, &answer)?;
    connection.done(answer);
    for (what, count) in [("regions", device.num_regions), ("irqs", device.num_irqs)] {
        if count > MOST_INDEXES {
            let what = format!("{count} {what} are more than {MOST_INDEXES}");
            return Err(failure::wrong(COMMAND, what));
        }
    }
    Ok(device)
}

/// A region with its file; `None` if there is none of this index.
fn region(connection: &Connection, index: u32) -> Result<Option<(RegionInfo, Option<RegionFile>)>> {
    const COMMAND: Command = Command::DeviceGetRegionInfo;
    let ask = |argsz: u32| {
        let question = payload::RegionInfo {
            argsz,
            index,
            ..payload::RegionInfo::default()
        };
        connection.call(COMMAND, &[question.as_bytes()], &[])
    };
    let mut answer = match ask(size::<payload::RegionInfo>()) {
        Ok(answer) => answer,
        Err(error) if is_final(&error) => return Err(error),
        // As the kernel says of a region which a device does not have.
        Err(_) => return Ok(None),
    };
    let (mut info, _) = fixed::<payload::RegionInfo>(COMMAND, &answer)?;
    if info.argsz > size::<payload::RegionInfo>() {
        if info.argsz as usize > AROUND_DATA {
            let what = format!("{} bytes of capabilities are too many", info.argsz);
            return Err(failure::wrong(COMMAND, what));
        }
        let first = std::mem::take(&mut answer.descriptors);
        connection.done(answer);
        answer = ask(info.argsz)?;
        if answer.descriptors.kept().is_empty() {
            answer.descriptors = first;
        }
        info = fixed::<payload::RegionInfo>(COMMAND, &answer)?.0;
    }
    let wrong = |what: String| failure::wrong(COMMAND, format!("region {index}: {what}"));
    if info.index != index {
        return Err(wrong(format!("it is about region {}", info.index)));
    }
    let sparse = match info.flags & payload::RegionInfo::CAPS != 0 {
        true => sparse_areas(&info, &answer.body).map_err(&wrong)?,
        false => None,
    };
    let mut region = RegionInfo::new(index, info.size);
    region.readable = info.flags & payload::RegionInfo::READ != 0;
    region.writable = info.flags & payload::RegionInfo::WRITE != 0;
    let file = if info.flags & payload::RegionInfo::MMAP != 0 {
        let whole = || vec![(0, info.size)];
        let areas = check_areas(sparse.unwrap_or_else(whole), &info).map_err(&wrong)?;
        let file = region_file(&info, answer, region.writable);
        if file.is_some() {
            region.areas = areas;
        }
        file
    } else {
        None
    };
    Ok((info.size > 0).then_some((region, file)))
}

/// The file that the areas of a region are mapped of. A server that can't hand one over, or hands
/// over something else, has a device that works without.
fn region_file(info: &payload::RegionInfo, answer: Answer, writable: bool) -> Option<RegionFile> {
    let region = info.index;
    let mut files = answer.descriptors.into_kept().into_iter();
    let Some(file) = files.next() else {
        log::warn!("region {region} can be mapped, but came without a descriptor");
        return None;
    };
    match PeerFile::new(file, writable) {
        Ok(file) => Some(RegionFile {
            region,
            file,
            start: info.offset,
        }),
        Err(errno) => {
            log::warn!("region {region} came with a descriptor that can't be mapped: {errno}");
            None
        }
    }
}

/// Offset and size of each area that the capabilities have; `None` if they have none of them.
fn sparse_areas(
    info: &payload::RegionInfo,
    body: &[u8],
) -> Result<Option<Vec<(u64, u64)>>, String> {
    let mut at = info.cap_offset as usize;
    let mut found = None;
    let mut behind = size_of::<payload::RegionInfo>();
    while at != 0 {
        // Ascending, so that a chain which bites its tail ends.
        if at < behind {
            return Err(format!(
                "a capability at {at} is in what is before {behind}"
            ));
        }
        let rest = body.get(at..).unwrap_or_default();
        let outside = |_| format!("a capability at {at} ends beyond {} bytes", body.len());
        let (header, rest) = take::<CapHeader>(rest).map_err(outside)?;
        behind = at + size_of::<CapHeader>();
        if header.id == CapHeader::SPARSE_MMAP {
            let (sparse, rest) = take::<SparseMmap>(rest).map_err(outside)?;
            let count = sparse.nr_areas as usize;
            let areas = count
                .checked_mul(size_of::<SparseArea>())
                .and_then(|len| rest.get(..len))
                .ok_or_else(|| format!("{count} areas are more than {} bytes", rest.len()))?;
            let areas = areas.chunks_exact(size_of::<SparseArea>());
            let areas = areas.filter_map(|area| SparseArea::read_from_bytes(area).ok());
            found = Some(areas.map(|area| (area.offset, area.size)).collect());
        }
        at = header.next as usize;
    }
    Ok(found)
}

/// Checks that areas lie in their region, one behind the other.
fn check_areas(
    mut areas: Vec<(u64, u64)>,
    info: &payload::RegionInfo,
) -> Result<Vec<Area>, String> {
    areas.retain(|(_, size)| *size > 0);
    areas.sort_unstable();
    let mut behind = 0;
    for (offset, size) in &areas {
        let end = offset.checked_add(*size);
        let end = end.filter(|end| *end <= info.size && info.offset.checked_add(*end).is_some());
        match end {
            Some(end) if *offset >= behind => behind = end,
            _ => {
                return Err(format!(
                "an area of {size:#x} bytes at {offset:#x} overlaps another or ends beyond {:#x}",
                info.size
            ))
            }
        }
    }
    let area = |(offset, size)| Area {
        offset,
        size,
        kind: AreaKind::Mappable,
    };
    Ok(areas.into_iter().map(area).collect())
}

/// An interrupt index; `None` if it has no vectors.
fn irq(connection: &Connection, index: u32) -> Result<Option<IrqInfo>> {
    const COMMAND: Command = Command::DeviceGetIrqInfo;
    let question = payload::IrqInfo {
        argsz: size::<payload::IrqInfo>(),
        index,
        ..payload::IrqInfo::default()
    };
    let answer = match connection.call(COMMAND, &[question.as_bytes()], &[]) {
        Ok(answer) => answer,
        Err(error) if is_final(&error) => return Err(error),
        Err(_) => return Ok(None),
    };
    let (info, _) = fixed::<payload::IrqInfo>(COMMAND, &answer)?;
    connection.done(answer);
    if info.index != index {
        let what = format!("index {index}: it is about {}", info.index);
        return Err(failure::wrong(COMMAND, what));
    }
    let flag = |flag| info.flags & flag != 0;
    Ok((info.count > 0).then_some(IrqInfo {
        index,
        count: info.count,
        maskable: flag(payload::IrqInfo::MASKABLE),
        automasked: flag(payload::IrqInfo::AUTOMASKED),
        noresize: flag(payload::IrqInfo::NORESIZE),
    }))
}

/// Whether an error is not just the server's answer.
fn is_final(error: &Error) -> bool {
    error.is_disconnected() || error.is_timed_out() || error.is_protocol()
}

/// The fixed part of an answer, and what follows.
pub(super) fn fixed<T: FromBytes>(command: Command, answer: &Answer) -> Result<(T, &[u8])> {
    take::<T>(&answer.body).map_err(|_| {
        let (expected, came) = (size_of::<T>(), answer.body.len());
        let what = format!("{expected} bytes of payload were expected, and {came} came");
        failure::wrong(command, what)
    })
}

/// The size of a payload's fixed part, as `argsz` has it.
pub(super) const fn size<T>() -> u32 {
    // Structures of the protocol have a few bytes.
    #[expect(clippy::cast_possible_truncation, reason = "it is less than 4096")]
    let size = size_of::<T>() as u32;
    assert!(size_of::<T>() < 4096);
    size
}
