// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages: a header of 16 bytes, and a payload that depends on the command.
//!
//! ```text
//! 0   id        u16   the sender's; a reply has that of its command
//! 2   command   u16
//! 4   size      u32   of the whole message
//! 8   flags     u32   bits 0-3 type, bit 4 no reply wanted, bit 5 error
//! 12  error     u32   errno of an error reply
//! 16  payload
//! ```
//!
//! All of it in the byte order of the host. Descriptors ride on a message's first byte.

use std::fmt;

use zerocopy::{FromBytes, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::Errno;

pub mod payload;
pub mod request;

/// Bytes of a header.
pub const HEADER: usize = size_of::<Header>();

/// Bytes of data in a message, unless another number is negotiated (`max_data_xfer_size`).
pub const DEFAULT_DATA: usize = 1 << 20;

/// Bytes of a payload which are not data of the kind that `max_data_xfer_size` counts: fixed parts,
/// and in messages without such data, what they count themselves.
pub const AROUND_DATA: usize = 4096;

/// Descriptors in a message that the kernel carries (`SCM_MAX_FD` in `<net/scm.h>`).
pub const MAX_FDS: usize = 253;

/// Descriptors in a message, unless another number is negotiated (`max_msg_fds`).
pub const DEFAULT_FDS: usize = 1;

/// Mappings for DMA, unless another number is negotiated (`max_dma_maps`).
pub const DEFAULT_DMA_MAPS: u64 = 65_535;

/// Page sizes of mappings, or'ed, unless others are negotiated (`pgsizes`).
pub const DEFAULT_PAGE_SIZES: u64 = 4096;

/// The major version of the protocol.
pub const MAJOR: u16 = 0;

/// The latest minor version of which this library knows something.
pub const MINOR: u16 = 1;

/// Bytes of the largest message there can be when data of so many bytes is negotiated.
#[must_use]
pub const fn max_message(data: usize) -> usize {
    HEADER.saturating_add(AROUND_DATA).saturating_add(data)
}

/// What is wrong with a message, as the end of a sentence; the errno for it is `EINVAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl Malformed {
    /// What the other side gets for it.
    #[must_use]
    pub const fn errno(self) -> Errno {
        Errno::EINVAL
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub enum Command {
    Version = 1,
    DmaMap = 2,
    DmaUnmap = 3,
    DeviceGetInfo = 4,
    DeviceGetRegionInfo = 5,
    DeviceGetRegionIoFds = 6,
    DeviceGetIrqInfo = 7,
    DeviceSetIrqs = 8,
    RegionRead = 9,
    RegionWrite = 10,
    DmaRead = 11,
    DmaWrite = 12,
    DeviceReset = 13,
    RegionWriteMulti = 15,
    DeviceFeature = 16,
    MigDataRead = 17,
    MigDataWrite = 18,
}

impl Command {
    /// All commands; 14 is none.
    pub const ALL: [Self; 17] = [
        Self::Version,
        Self::DmaMap,
        Self::DmaUnmap,
        Self::DeviceGetInfo,
        Self::DeviceGetRegionInfo,
        Self::DeviceGetRegionIoFds,
        Self::DeviceGetIrqInfo,
        Self::DeviceSetIrqs,
        Self::RegionRead,
        Self::RegionWrite,
        Self::DmaRead,
        Self::DmaWrite,
        Self::DeviceReset,
        Self::RegionWriteMulti,
        Self::DeviceFeature,
        Self::MigDataRead,
        Self::MigDataWrite,
    ];

    /// The command with this number.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|command| command.number() == number)
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Whether it is the client who asks, rather than the server.
    #[must_use]
    pub const fn is_clients(self) -> bool {
        !matches!(self, Self::DmaRead | Self::DmaWrite)
    }

    /// The name that the specification has for it, without what is the same in all.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Version => "VERSION",
            Self::DmaMap => "DMA_MAP",
            Self::DmaUnmap => "DMA_UNMAP",
            Self::DeviceGetInfo => "DEVICE_GET_INFO",
            Self::DeviceGetRegionInfo => "DEVICE_GET_REGION_INFO",
            Self::DeviceGetRegionIoFds => "DEVICE_GET_REGION_IO_FDS",
            Self::DeviceGetIrqInfo => "DEVICE_GET_IRQ_INFO",
            Self::DeviceSetIrqs => "DEVICE_SET_IRQS",
            Self::RegionRead => "REGION_READ",
            Self::RegionWrite => "REGION_WRITE",
            Self::DmaRead => "DMA_READ",
            Self::DmaWrite => "DMA_WRITE",
            Self::DeviceReset => "DEVICE_RESET",
            Self::RegionWriteMulti => "REGION_WRITE_MULTI",
            Self::DeviceFeature => "DEVICE_FEATURE",
            Self::MigDataRead => "MIG_DATA_READ",
            Self::MigDataWrite => "MIG_DATA_WRITE",
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bits 0 to 3 of a header's flags.
const TYPE: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
/// Nobody waits for a reply to this command.
const NO_REPLY: u32 = 1 << 4;
/// The header's errno is why the command failed.
const ERROR: u32 = 1 << 5;

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It asks.
    Command {
        /// Nobody waits for the answer.
        no_reply: bool,
    },
    /// It answers.
    Reply(Result<(), Errno>),
}

/// The first 16 bytes of a message.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Default,
)]
#[repr(C)]
pub struct Header {
    /// The sender's name for the command.
    pub id: u16,
    /// The command's number; see [`Command::new`].
    pub command: u16,
    /// Bytes of the whole message.
    pub size: u32,
    /// See [`kind`](Self::kind).
    pub flags: u32,
    /// The errno of an error reply.
    pub error: u32,
}

impl Header {
    /// That of a command. The size is for [`put`] to say.
    #[must_use]
    pub const fn command(id: u16, command: Command) -> Self {
        Self {
            id,
            command: command.number(),
            size: 0,
            flags: TYPE_COMMAND,
            error: 0,
        }
    }

    /// The same, and nobody waits for a reply.
    #[must_use]
    pub const fn unanswered(self) -> Self {
        Self {
            flags: self.flags | NO_REPLY,
            ..self
        }
    }

    /// That of the reply to a command with this header. One of an error has no payload.
    #[must_use]
    pub const fn reply(self, result: Result<(), Errno>) -> Self {
        let (flags, error) = match result {
            Ok(()) => (TYPE_REPLY, 0),
            Err(errno) => (TYPE_REPLY | ERROR, errno.number().unsigned_abs()),
        };
        Self {
            id: self.id,
            command: self.command,
            size: 0,
            flags,
            error,
        }
    }

    /// The first bytes of a message, if there are enough.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes).ok().map(|(header, _)| header)
    }

    /// Bytes of the message of which this is the header, that can be `most`.
    ///
    /// # Errors
    ///
    /// It can't have so many: where the next message starts, nobody knows.
    pub fn checked_size(&self, most: usize) -> Result<usize, Malformed> {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if size < HEADER {
            return Err(Malformed("the size is less than that of a header"));
        }
        if size > most {
            return Err(Malformed("the size is more than was negotiated"));
        }
        Ok(size)
    }

    /// Whether it asks or answers.
    ///
    /// An error reply without an errno, or with one that can't be, is `EIO`. Bits that no
    /// specification has are no matter: a later minor version may have them.
    ///
    /// # Errors
    ///
    /// It is of neither type.
    pub fn kind(&self) -> Result<Kind, Malformed> {
        match self.flags & TYPE {
            TYPE_COMMAND => Ok(Kind::Command {
                no_reply: self.flags & NO_REPLY != 0,
            }),
            TYPE_REPLY if self.flags & ERROR != 0 => {
                let errno = i32::try_from(self.error).ok().and_then(Errno::new);
                Ok(Kind::Reply(Err(errno.unwrap_or(Errno::EIO))))
            }
            TYPE_REPLY => Ok(Kind::Reply(Ok(()))),
            _ => Err(Malformed("the type is neither command nor reply")),
        }
    }

    /// Whether nobody waits for the reply to this command.
    #[must_use]
    pub const fn is_unanswered(&self) -> bool {
        self.flags & NO_REPLY != 0
    }
}

/// Appends a message: the header with its size, and the parts of the payload.
///
/// # Errors
///
/// `EMSGSIZE`: no header can say how long it is. Nothing is appended then.
pub fn put(to: &mut Vec<u8>, header: Header, parts: &[&[u8]]) -> Result<(), Errno> {
    let size = HEADER + parts.iter().map(|part| part.len()).sum::<usize>();
    let size = u32::try_from(size).map_err(|_| EMSGSIZE)?;
    let header = Header { size, ..header };
    to.extend_from_slice(header.as_bytes());
    parts.iter().for_each(|part| to.extend_from_slice(part));
    Ok(())
}

const EMSGSIZE: Errno = match Errno::new(libc::EMSGSIZE) {
    Some(errno) => errno,
    None => Errno::EIO,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_bytes_of_the_specification() {
        let mut bytes = Vec::new();
        let header = Header::command(0x0201, Command::RegionWrite).unanswered();

        put(&mut bytes, header, &[&[7, 8], &[9]]).unwrap();

        let size = 19_u32.to_ne_bytes();
        let mut expected = [0x0201_u16.to_ne_bytes(), 10_u16.to_ne_bytes()].concat();
        expected.extend(size);
        expected.extend(0x10_u32.to_ne_bytes());
        expected.extend([0, 0, 0, 0, 7, 8, 9]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn numbers_are_commands_but_0_14_and_those_above() {
        for number in 0..30 {
            let command = Command::new(number);
            assert_eq!(
                command.is_some(),
                (1..=18).contains(&number) && number != 14
            );
            assert!(command.is_none_or(|command| command.number() == number));
        }
    }

    #[test]
    fn error_reply_is_recognised_with_its_errno() {
        let header = Header::command(3, Command::DmaMap).reply(Err(Errno::ENOSPC));

        assert_eq!((header.id, header.command), (3, 2));
        assert_eq!(header.kind(), Ok(Kind::Reply(Err(Errno::ENOSPC))));
    }

    #[test]
    fn error_reply_without_an_errno_is_eio() {
        for error in [0, 4096, u32::MAX] {
            let header = Header {
                flags: 0x21,
                error,
                ..Header::default()
            };
            assert_eq!(header.kind(), Ok(Kind::Reply(Err(Errno::EIO))));
        }
    }

    #[test]
    fn other_types_are_neither_command_nor_reply() {
        for kind in 2..16 {
            let header = Header {
                flags: kind,
                ..Header::default()
            };
            assert!(header.kind().is_err());
        }
    }

    #[test]
    fn sizes_outside_of_the_limits_are_refused() {
        let of = |size| Header {
            size,
            ..Header::default()
        };

        assert!(of(15).checked_size(100).is_err());
        assert_eq!(of(16).checked_size(100), Ok(16));
        assert_eq!(of(100).checked_size(100), Ok(100));
        assert!(of(101).checked_size(100).is_err());
        assert!(of(u32::MAX)
            .checked_size(max_message(DEFAULT_DATA))
            .is_err());
    }
}
