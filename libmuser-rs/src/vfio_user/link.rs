// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes before each message between a supervisor and the server behind it: the number which the
//! supervisor has given to the client's command, so that a successor of the server knows it again.

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Before a message's header, on the way to the server and back.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Prefix {
    /// The command's; 0 for what the server asks for and for replies to that. The low 16 bits are
    /// its place: below 256, and no other command's that is not answered; the highest bit is 0.
    pub number: u64,
    /// [`REPLAY`](Self::REPLAY), or 0.
    pub flags: u64,
}

impl Prefix {
    /// Bytes of it.
    pub const SIZE: usize = size_of::<Self>();
    /// The command was given to a server before, which has not answered it.
    pub const REPLAY: u64 = 1;
}

const _: () = assert!(Prefix::SIZE == 16);
