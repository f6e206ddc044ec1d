// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers of the device that is stormed: those of the sample `counter`.
//!
//! Sixteen lanes, each with a counter of its own. What a lane's registers do, they do exactly once
//! for each access, whatever becomes of the process meanwhile.

/// Region of the lanes' registers: BAR 0.
pub(super) const LANES: u32 = 0;
/// Bytes of [`LANES`].
pub(super) const LANES_SIZE: u64 = 0x2000;
/// How many lanes there are, and MSI-X vectors.
pub(super) const LANE_COUNT: u32 = 16;
/// Bytes from one lane's registers to the next's.
pub(super) const LANE_STRIDE: u64 = 0x40;

/// 4 bytes, written: adds to the counter.
pub(super) const ADD: u64 = 0x00;
/// 8 bytes, read: the counter.
pub(super) const VALUE: u64 = 0x08;
/// 8 bytes, read: the counter, to which 1 is added afterwards.
pub(super) const FETCH_ADD: u64 = 0x10;
/// 8 bytes: the IOVA of the lane's block, see [`BLOCK`].
pub(super) const ADDRESS: u64 = 0x18;
/// 4 bytes, written: adds `addend` of the block, writes the result to the block, raises the lane's
/// vector.
pub(super) const GO: u64 = 0x20;
/// 4 bytes, read: the last value written to the lane's doorbell.
pub(super) const BELL: u64 = 0x28;

/// Where the doorbells begin in [`LANES`]; lane `i`'s is 4 bytes long, `4 * i` further.
pub(super) const DOORBELLS: u64 = 0x1000;
/// Bytes of the doorbells' area.
pub(super) const DOORBELLS_SIZE: u64 = 0x1000;

/// Bytes of a lane's block in the client's memory: `addend`, `sequence`, then the answer: the
/// counter, and `sequence` again; 8 bytes each.
pub(super) const BLOCK: u64 = 32;

/// Interrupt index of the lanes' vectors: MSI-X.
pub(super) const VECTORS: u32 = crate::node::MSIX;

/// Offset of a lane's register in [`LANES`].
pub(super) fn register(lane: u32, register: u64) -> u64 {
    u64::from(lane) * LANE_STRIDE + register
}

/// Offset of a lane's doorbell in [`LANES`].
pub(super) fn doorbell(lane: u32) -> u64 {
    DOORBELLS + 4 * u64::from(lane)
}
