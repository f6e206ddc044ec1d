// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Entries of the queues: what a host asks (figures 104 and 105), and how it is answered (figure 122).

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::spec::{Status, CQE, SQE};

/// An entry of a submission queue.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(crate) struct Command {
    pub(crate) opcode: u8,
    /// FUSE and PSDT.
    pub(crate) flags: u8,
    pub(crate) cid: U16,
    pub(crate) nsid: U32,
    pub(crate) cdw2: U32,
    pub(crate) cdw3: U32,
    pub(crate) mptr: U64,
    /// PRP1 and PRP2, or a descriptor of an SGL.
    pub(crate) dptr: [U64; 2],
    pub(crate) cdw10: U32,
    pub(crate) cdw11: U32,
    pub(crate) cdw12: U32,
    pub(crate) cdw13: U32,
    pub(crate) cdw14: U32,
    pub(crate) cdw15: U32,
}

const _: () = assert!(size_of::<Command>() == SQE);

impl Command {
    /// How the data is pointed to: 0 for PRPs, 1 and 2 for SGLs.
    pub(crate) fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// Whether it is half of a fused operation, or of no known kind.
    pub(crate) fn is_odd(&self) -> bool {
        self.flags & 0x3f != 0 || self.psdt() == 3
    }

    /// Starting LBA, of the commands that have one.
    pub(crate) fn slba(&self) -> u64 {
        u64::from(self.cdw11.get()) << 32 | u64::from(self.cdw10.get())
    }

    /// Number of logical blocks, of the commands that have one.
    pub(crate) fn blocks(&self) -> u32 {
        (self.cdw12.get() & 0xffff) + 1
    }
}

/// An entry of a completion queue.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(crate) struct Completion {
    pub(crate) dw0: U32,
    pub(crate) dw1: U32,
    pub(crate) sq_head: U16,
    pub(crate) sq_id: U16,
    pub(crate) cid: U16,
    /// Phase tag in bit 0.
    pub(crate) status: U16,
}

const _: () = assert!(size_of::<Completion>() == CQE);

/// What came of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) dw0: u32,
}

impl Answer {
    pub(crate) const SUCCESS: Self = Self {
        status: Status::SUCCESS,
        dw0: 0,
    };

    pub(crate) fn value(dw0: u32) -> Self {
        Self {
            status: Status::SUCCESS,
            dw0,
        }
    }
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        Self { status, dw0: 0 }
    }
}
