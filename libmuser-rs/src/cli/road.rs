// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! By which transport clients come, as the options say.

use std::fmt;
use std::path::Path;

use super::handed::Handed;
use crate::error::{Errno, Error, Result};
use crate::server::Ended;
use crate::transport::kernel::Uuid;
use crate::transport::{KernelTransport, ListenOptions, SocketTransport, Transport};

/// What clients come by.
#[derive(Clone, Copy, Debug)]
pub(super) enum Road<'a> {
    /// The module.
    Kernel(&'a Uuid),
    /// A socket that is made.
    Path {
        path: &'a Path,
        mode: Option<u32>,
        group: Option<&'a str>,
    },
    /// A socket that is there.
    Handed(Handed),
}

impl Road<'_> {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// There is no such device or group, or the socket can't be made or is none.
    pub(super) fn open(self) -> Result<Box<dyn Transport>> {
        Ok(match self {
            Self::Kernel(uuid) => Box::new(KernelTransport::open(uuid)?),
            Self::Path { path, mode, group } => {
                Box::new(SocketTransport::listen(path, access(mode, group)?)?)
            }
            Self::Handed(handed) => Box::new(SocketTransport::from_fd(handed.take()?)?),
        })
    }

    /// Why the program is done, as the end of a sentence.
    pub(super) fn farewell(self, ended: Ended) -> &'static str {
        match (ended, self) {
            (Ended::Removed, Self::Kernel(_)) => "the device was removed",
            (Ended::Removed, _) => "the client has gone",
            (Ended::Stopped, Self::Kernel(_)) => "stopped; requests wait for the next server",
            (Ended::Stopped, _) => "stopped",
            (Ended::HandedOver, _) => "another process has taken the device over",
            (Ended::Abandoned, _) => "the device was abandoned",
        }
    }
}

impl fmt::Display for Road<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(uuid) => uuid.fmt(f),
            Self::Path { path, .. } => write!(f, "vfio-user clients at {}", path.display()),
            Self::Handed(Handed::Number(number)) => {
                write!(f, "vfio-user clients at descriptor {number}")
            }
            Self::Handed(Handed::Systemd) => f.write_str("vfio-user clients at systemd's socket"),
        }
    }
}

/// Who may use a socket with these permissions and of this group.
///
/// # Errors
///
/// There is no such group.
pub fn access(mode: Option<u32>, group: Option<&str>) -> Result<ListenOptions> {
    let options = ListenOptions::new();
    let options = mode.map_or(options, |mode| options.mode(mode));
    Ok(match group {
        Some(group) => options.group(gid(group)?),
        None => options,
    })
}

/// The number of a group.
fn gid(group: &str) -> Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    match nix::unistd::Group::from_name(group) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(Error::new(
            Errno::EINVAL,
            format!("there is no group {group:?}"),
        )),
        Err(errno) => Err(Error::io(format!("looking for group {group:?}"), errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_is_found_by_name_and_by_number() {
        assert_eq!(gid("root").unwrap(), 0);
        assert_eq!(gid("4242").unwrap(), 4242);
    }

    #[test]
    fn group_that_is_not_there_is_named() {
        let error = gid("no such group").unwrap_err();

        assert!(error.to_string().contains("no such group"), "{error}");
    }
}
