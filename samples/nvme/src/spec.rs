// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbers of the NVM Express Base Specification, revision 1.4, with the figures they are from.

/// What a command ended with: status code, status code type, and whether to try again (figure 125).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(u16);

impl Status {
    pub(crate) const SUCCESS: Self = Self(0);

    // Generic: figures 127 and 128.
    pub(crate) const INVALID_OPCODE: Self = generic(0x01).for_good();
    pub(crate) const INVALID_FIELD: Self = generic(0x02).for_good();
    pub(crate) const DATA_TRANSFER_ERROR: Self = generic(0x04);
    pub(crate) const INTERNAL_ERROR: Self = generic(0x06);
    pub(crate) const INVALID_NAMESPACE: Self = generic(0x0b).for_good();
    pub(crate) const INVALID_SGL_SEGMENT: Self = generic(0x0d).for_good();
    pub(crate) const INVALID_SGL_COUNT: Self = generic(0x0e).for_good();
    pub(crate) const INVALID_SGL_LENGTH: Self = generic(0x0f).for_good();
    pub(crate) const INVALID_SGL_TYPE: Self = generic(0x11).for_good();
    pub(crate) const INVALID_PRP_OFFSET: Self = generic(0x13).for_good();
    pub(crate) const LBA_OUT_OF_RANGE: Self = generic(0x80).for_good();
    pub(crate) const CAPACITY_EXCEEDED: Self = generic(0x81).for_good();

    // Command specific: figures 129 and 130.
    pub(crate) const INVALID_COMPLETION_QUEUE: Self = specific(0x00).for_good();
    pub(crate) const INVALID_QUEUE_ID: Self = specific(0x01).for_good();
    pub(crate) const INVALID_QUEUE_SIZE: Self = specific(0x02).for_good();
    pub(crate) const TOO_MANY_EVENT_REQUESTS: Self = specific(0x05).for_good();
    pub(crate) const INVALID_VECTOR: Self = specific(0x08).for_good();
    pub(crate) const INVALID_LOG_PAGE: Self = specific(0x09).for_good();
    pub(crate) const INVALID_QUEUE_DELETION: Self = specific(0x0c).for_good();
    pub(crate) const FEATURE_NOT_SAVEABLE: Self = specific(0x0d).for_good();
    pub(crate) const INVALID_PROTECTION: Self = specific(0x81).for_good();
    pub(crate) const READ_ONLY_RANGE: Self = specific(0x82).for_good();

    // Media and data integrity: figure 131.
    pub(crate) const WRITE_FAULT: Self = media(0x80);
    pub(crate) const UNRECOVERED_READ: Self = media(0x81);
    pub(crate) const COMPARE_FAILURE: Self = media(0x85).for_good();

    const DO_NOT_RETRY: u16 = 1 << 14;

    const fn for_good(self) -> Self {
        Self(self.0 | Self::DO_NOT_RETRY)
    }

    /// As it lies in an entry of a completion queue, above the phase tag.
    pub(crate) const fn bits(self) -> u16 {
        self.0
    }

    pub(crate) fn is_success(self) -> bool {
        self == Self::SUCCESS
    }

    /// Whether it is about the medium, or about what is between it and the host's memory.
    pub(crate) fn is_logged(self) -> bool {
        let [_, kind] = self.0.to_le_bytes();
        kind & 7 == 2 || self == Self::DATA_TRANSFER_ERROR || self == Self::INTERNAL_ERROR
    }

    /// Whether it counts as an error of the medium.
    pub(crate) fn is_media(self) -> bool {
        self == Self::WRITE_FAULT || self == Self::UNRECOVERED_READ
    }
}

const fn generic(code: u16) -> Status {
    Status(code)
}

const fn specific(code: u16) -> Status {
    Status(1 << 8 | code)
}

const fn media(code: u16) -> Status {
    Status(2 << 8 | code)
}

/// Bytes of a page of the host's, the only size there is here (`CAP.MPSMIN`, `CAP.MPSMAX`).
pub(crate) const PAGE: usize = 4096;
/// Bytes of an entry of a submission queue.
pub(crate) const SQE: usize = 64;
/// Bytes of an entry of a completion queue.
pub(crate) const CQE: usize = 16;
/// Most entries of a queue.
pub(crate) const QUEUE_ENTRIES: u32 = 1024;
/// Most bytes of a command's data, as a power of two of pages (`MDTS`).
pub(crate) const MDTS: u8 = 7;
/// The same in bytes.
pub(crate) const MAX_TRANSFER: usize = PAGE << MDTS;
/// Every namespace.
pub(crate) const ALL_NAMESPACES: u32 = u32::MAX;
/// The namespace there is.
pub(crate) const NAMESPACE: u32 = 1;
/// Asynchronous Event Requests that may be outstanding.
pub(crate) const EVENT_REQUESTS: usize = 4;
/// Entries of the error log.
pub(crate) const ERROR_ENTRIES: usize = 8;
/// Kelvin, at all times.
pub(crate) const TEMPERATURE: u16 = 308;
/// Kelvin from which on there is a warning, unless the host says otherwise.
pub(crate) const WARNING_TEMPERATURE: u16 = 343;
/// Kelvin that are critical.
pub(crate) const CRITICAL_TEMPERATURE: u16 = 353;

/// Opcodes of the admin command set (figure 138).
pub(crate) mod admin {
    pub(crate) const DELETE_SQ: u8 = 0x00;
    pub(crate) const CREATE_SQ: u8 = 0x01;
    pub(crate) const GET_LOG_PAGE: u8 = 0x02;
    pub(crate) const DELETE_CQ: u8 = 0x04;
    pub(crate) const CREATE_CQ: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
    pub(crate) const SET_FEATURES: u8 = 0x09;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
    pub(crate) const EVENT_REQUEST: u8 = 0x0c;
}

/// Opcodes of the NVM command set (figure 346).
pub(crate) mod nvm {
    pub(crate) const FLUSH: u8 = 0x00;
    pub(crate) const WRITE: u8 = 0x01;
    pub(crate) const READ: u8 = 0x02;
    pub(crate) const COMPARE: u8 = 0x05;
    pub(crate) const WRITE_ZEROES: u8 = 0x08;
    pub(crate) const DATASET_MANAGEMENT: u8 = 0x09;
    pub(crate) const VERIFY: u8 = 0x0c;
}
