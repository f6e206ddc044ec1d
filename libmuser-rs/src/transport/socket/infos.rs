// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What clients are told of the protocol and of the device: versions, capabilities, regions,
//! interrupts.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vfio_bindings::bindings::vfio;
use zerocopy::IntoBytes;

use super::commands::Refusal;
use super::events::Source;
use super::hub::{Hub, State};
use super::session::{Channel, Framing, ReplyTo, MAX_DATA};
use crate::error::{Errno, Error};
use crate::region::{Area, AreaKind, RegionInfo};
use crate::vfio_user::capabilities::{Capabilities, TwinSocket};
use crate::vfio_user::wire::payload;
use crate::vfio_user::wire::request::{Query, Version};
use crate::vfio_user::wire::{DEFAULT_DMA_MAPS, DEFAULT_PAGE_SIZES, MAJOR, MAX_FDS, MINOR};

/// Descriptors in a message, for a client that does not say how many it would like to send.
const FDS: u64 = 16;

impl State {
    /// Agrees upon a version, or says why not and ends the session.
    pub(super) fn negotiate(
        &mut self,
        hub: &Hub,
        to: ReplyTo,
        version: Version<'_>,
    ) -> Result<(), Refusal> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        if session.peer.is_some() {
            let why = "a version was agreed upon before";
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        if version.major != MAJOR {
            let Version { major, minor, .. } = version;
            let why = format!("version {major}.{minor} is not one of {MAJOR}.x");
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let proposed = Capabilities::parse(version.data)?;
        let twin = proposed.has_twin_socket() && proposed.fds() > 0 && !to.is_posted();
        let twin = twin.then(UnixStream::pair).transpose();
        let twin = twin.map_err(|error| Refusal::from(Error::from(error)))?;
        let agreed = Capabilities {
            max_msg_fds: Some(proposed.max_msg_fds.unwrap_or(FDS).min(MAX_FDS as u64)),
            max_data_xfer_size: Some(session_data(&proposed)),
            max_dma_maps: Some(proposed.dma_maps().min(DEFAULT_DMA_MAPS)),
            pgsizes: Some(DEFAULT_PAGE_SIZES),
            twin_socket: twin.as_ref().map(|_| TwinSocket {
                supported: true,
                fd_index: Some(0),
            }),
            write_multiple: proposed.writes_multiple().then_some(true),
            migration: None,
        };
        let fixed = payload::Version {
            major: MAJOR,
            minor: version.minor.min(MINOR),
        };
        let data = agreed.to_data();
        let twin = match twin {
            Some((ours, theirs)) => {
                let twin = Channel::new(ours.into(), Framing::Plain, Source::Twin, &hub.events)?;
                Some((twin, theirs))
            }
            None => None,
        };
        // From here on nothing fails, and the version is agreed upon.
        session.peer = Some(proposed);
        session.fds = agreed.fds();
        session.main.receiver.set_descriptors(session.fds);
        let payload = [fixed.as_bytes(), data.as_slice()];
        match twin {
            Some((twin, theirs)) => {
                session.twin = Some(twin);
                session.reply_with(to, &payload, &[theirs.as_fd()]);
            }
            None => session.reply(to, &payload),
        }
        let payload::Version { major, minor } = fixed;
        log::debug!(
            "client {} speaks {major}.{minor}: {proposed:?}",
            session.number
        );
        Ok(())
    }

    pub(super) fn device_info(&mut self, to: ReplyTo, _query: Query) {
        let info = payload::DeviceInfo {
            argsz: size_of_u32::<payload::DeviceInfo>(),
            flags: payload::DeviceInfo::RESET | payload::DeviceInfo::PCI,
            num_regions: vfio::VFIO_PCI_NUM_REGIONS,
            num_irqs: vfio::VFIO_PCI_NUM_IRQS,
        };
        self.reply_to(to, Ok(&[info.as_bytes()]));
    }

    pub(super) fn region_info(&mut self, to: ReplyTo, query: Query) -> Result<(), Refusal> {
        let (Some(served), Some(session)) = (&self.served, &mut self.session) else {
            return Ok(());
        };
        if query.index >= vfio::VFIO_PCI_NUM_REGIONS {
            let why = format!("there is no region {}", query.index);
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let region = served.description.region(query.index);
        // A client that takes no descriptors maps nothing, and reads and writes.
        let takes_fds = session.peer.is_some_and(|peer| peer.fds() > 0);
        let file = served.areas.file(query.index).filter(|_| takes_fds);
        let areas = region.filter(|_| takes_fds).map_or_else(Vec::new, mappable);
        let capability = match (region, areas.as_slice()) {
            // All of it is mappable, so that there is nothing more to say.
            (Some(region), [area]) if area.offset == 0 && area.size == region.size => Vec::new(),
            (_, []) => Vec::new(),
            (_, areas) => sparse(areas),
        };
        let fixed = size_of_u32::<payload::RegionInfo>();
        let full = fixed.saturating_add(u32::try_from(capability.len()).unwrap_or(u32::MAX));
        let mut flags = 0;
        let mut flag = |is: bool, flag| flags |= if is { flag } else { 0 };
        flag(
            region.is_some_and(|region| region.readable),
            payload::RegionInfo::READ,
        );
        flag(
            region.is_some_and(|region| region.writable),
            payload::RegionInfo::WRITE,
        );
        flag(file.is_some(), payload::RegionInfo::MMAP);
        flag(!capability.is_empty(), payload::RegionInfo::CAPS);
        let info = payload::RegionInfo {
            argsz: full,
            flags,
            index: query.index,
            cap_offset: if capability.is_empty() { 0 } else { fixed },
            size: region.map_or(0, |region| region.size),
            offset: 0,
        };
        let has_room = query.argsz >= full;
        let capability: &[u8] = if has_room { &capability } else { &[] };
        let fds: Vec<_> = file.into_iter().collect();
        session.reply_with(to, &[info.as_bytes(), capability], &fds);
        Ok(())
    }

    pub(super) fn irq_info(&mut self, to: ReplyTo, query: Query) -> Result<(), Refusal> {
        let Some(served) = &self.served else {
            return Ok(());
        };
        if query.index >= vfio::VFIO_PCI_NUM_IRQS {
            let why = format!("there is no interrupt index {}", query.index);
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let mut info = payload::IrqInfo {
            argsz: size_of_u32::<payload::IrqInfo>(),
            flags: 0,
            index: query.index,
            count: 0,
        };
        if let Some(irq) = served.description.irq(query.index) {
            info.count = irq.count;
            info.flags |= payload::IrqInfo::EVENTFD;
            for (is, flag) in [
                (irq.maskable, payload::IrqInfo::MASKABLE),
                (irq.automasked, payload::IrqInfo::AUTOMASKED),
                (irq.noresize, payload::IrqInfo::NORESIZE),
            ] {
                info.flags |= if is { flag } else { 0 };
            }
        }
        self.reply_to(to, Ok(&[info.as_bytes()]));
        Ok(())
    }
}

/// Bytes of data that a message may have, for both sides to keep to.
fn session_data(proposed: &Capabilities) -> u64 {
    proposed.data().min(MAX_DATA) as u64
}

fn mappable(region: &RegionInfo) -> Vec<Area> {
    let areas = region.areas.iter();
    areas
        .filter(|area| area.kind == AreaKind::Mappable)
        .copied()
        .collect()
}

/// The capability that says which parts can be mapped.
fn sparse(areas: &[Area]) -> Vec<u8> {
    let header = payload::CapHeader {
        id: payload::CapHeader::SPARSE_MMAP,
        version: 1,
        next: 0,
    };
    let sparse = payload::SparseMmap {
        nr_areas: u32::try_from(areas.len()).unwrap_or(u32::MAX),
        reserved: 0,
    };
    let mut bytes = [header.as_bytes(), sparse.as_bytes()].concat();
    for area in areas {
        let area = payload::SparseArea {
            offset: area.offset,
            size: area.size,
        };
        bytes.extend_from_slice(area.as_bytes());
    }
    bytes
}

/// Bytes of a structure, as `argsz` has them.
#[expect(
    clippy::cast_possible_truncation,
    reason = "structures of the protocol have some dozen bytes"
)]
pub(super) const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}
