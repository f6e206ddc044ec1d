// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes that may come by eventfd, without a message: what KVM calls an ioeventfd.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::description::{fixed, size};
use super::{failure, Client};
use crate::error::Result;
use crate::vfio_user::wire::payload::{self, RegionIoFds};
use crate::vfio_user::wire::{Command, AROUND_DATA};

const COMMAND: Command = Command::DeviceGetRegionIoFds;

/// An eventfd that stands for a write to a region: who signals it need not send the write.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct IoEventFd {
    /// Bytes from the region's start.
    pub offset: u64,
    /// Bytes of the write; 0 if any will do.
    pub size: u64,
    /// The value that must be written, if any other one is not meant.
    pub datamatch: Option<u64>,
    /// Whether it is a write to I/O ports.
    pub pio: bool,
    /// The eventfd; several writes may share it.
    pub fd: Arc<OwnedFd>,
}

impl Client {
    /// Which writes to a region may come by eventfd, as for `KVM_IOEVENTFD`.
    ///
    /// # Errors
    ///
    /// What the server returned: `EINVAL` or `EOPNOTSUPP` if it has none of it.
    pub fn io_eventfds(&self, region: u32) -> Result<Vec<IoEventFd>> {
        let wrong = |what: String| failure::wrong(COMMAND, format!("region {region}: {what}"));
        let ask = |argsz: u32| {
            let question = RegionIoFds {
                argsz,
                index: region,
                ..RegionIoFds::default()
            };
            self.connection.call(COMMAND, &[question.as_bytes()], &[])
        };
        let mut answer = ask(size::<RegionIoFds>())?;
        let (mut info, _) = fixed::<RegionIoFds>(COMMAND, &answer)?;
        if info.argsz > size::<RegionIoFds>() {
            if info.argsz as usize > AROUND_DATA {
                return Err(wrong(format!("{} bytes are too many", info.argsz)));
            }
            self.connection.done(answer);
            answer = ask(info.argsz)?;
            info = fixed::<RegionIoFds>(COMMAND, &answer)?.0;
        }
        if info.index != region {
            return Err(wrong(format!("it is about region {}", info.index)));
        }
        let (_, rest) = fixed::<RegionIoFds>(COMMAND, &answer)?;
        let entries = entries(&info, rest).map_err(&wrong)?;
        let fds: Vec<_> = answer
            .descriptors
            .into_kept()
            .into_iter()
            .map(Arc::new)
            .collect();
        let most = self.region(region).map_or(0, |region| region.size);
        let mut found = Vec::new();
        for entry in entries {
            if entry.kind != payload::IoEventFd::EVENTFD {
                log::debug!(
                    "region {region}: a sub-region of kind {} is ignored",
                    entry.kind
                );
                continue;
            }
            let end = entry.offset.checked_add(entry.size);
            if end.is_none_or(|end| end > most) || entry.offset >= most {
                let (offset, size) = (entry.offset, entry.size);
                return Err(wrong(format!(
                    "{size:#x} bytes at {offset:#x} are not in it"
                )));
            }
            let fd = fds.get(entry.fd_index as usize).ok_or_else(|| {
                let (index, count) = (entry.fd_index, fds.len());
                wrong(format!("descriptor {index} of {count} is to be used"))
            })?;
            let has_match = entry.flags & payload::IoEventFd::DATAMATCH != 0;
            found.push(IoEventFd {
                offset: entry.offset,
                size: entry.size,
                datamatch: has_match.then_some(entry.datamatch),
                pio: entry.flags & payload::IoEventFd::PIO != 0,
                fd: Arc::clone(fd),
            });
        }
        Ok(found)
    }
}

/// The entries behind the fixed part: there are as many as it says, in equal shares of the rest.
fn entries(info: &RegionIoFds, rest: &[u8]) -> Result<Vec<payload::IoEventFd>, String> {
    let count = info.count as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    let share = rest.len() / count;
    if share < size_of::<payload::IoEventFd>() {
        let bytes = rest.len();
        return Err(format!("{count} sub-regions are more than {bytes} bytes"));
    }
    let shares = rest.chunks_exact(share).take(count);
    let parsed = shares.filter_map(|share| payload::IoEventFd::read_from_prefix(share).ok());
    Ok(parsed.map(|(entry, _)| entry).collect())
}
