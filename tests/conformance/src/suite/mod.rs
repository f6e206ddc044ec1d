// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cases, a file a topic.

mod access;
mod config;
mod dma;
mod doorbell;
mod interrupt;
mod life;
mod memory;
mod recovery;
mod threads;

use anyhow::Result;

use crate::{Client, Host};

/// A test of the suite.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// `topic::input_outcome`.
    pub name: &'static str,
    pub(crate) run: fn(&dyn Host) -> Result<()>,
    /// Threads that serve the device, at least.
    pub threads: usize,
    /// Whether servers end under the client, and others go on: not every transport can that.
    pub restarts: bool,
}

/// Lists the cases of a topic: those that any transport can run, and those in which servers end
/// under the client.
macro_rules! topic {
    ($topic:literal: $($case:ident),* $(; restarts: $($restarts:ident),*)? $(,)?) => {
        $crate::suite::topic!($topic, 1 thread: $($case),* $(; restarts: $($restarts),*)?);
    };
    (
        $topic:literal, $threads:literal thread:
        $($case:ident),* $(; restarts: $($restarts:ident),*)? $(,)?
    ) => {
        pub(super) const CASES: &[$crate::Case] = &[
            $($crate::suite::topic!(@case $topic, $case, $threads, false),)*
            $($($crate::suite::topic!(@case $topic, $restarts, $threads, true),)*)?
        ];
    };
    (@case $topic:literal, $case:ident, $threads:literal, $restarts:literal) => {
        $crate::Case {
            name: concat!($topic, "::", stringify!($case)),
            run: $case,
            threads: $threads,
            restarts: $restarts,
        }
    };
}
use topic;

/// All cases.
pub fn cases() -> impl Iterator<Item = Case> {
    [
        access::CASES,
        config::CASES,
        interrupt::CASES,
        memory::CASES,
        dma::CASES,
        life::CASES,
        doorbell::CASES,
        recovery::CASES,
        threads::CASES,
    ]
    .into_iter()
    .flatten()
    .copied()
}

/// Reads exactly so many bytes.
fn read<const N: usize>(client: &dyn Client, region: u32, offset: u64) -> Result<[u8; N]> {
    let mut data = [0; N];
    let count = client.read(region, offset, &mut data)?;
    crate::check::equal("bytes read", count, N)?;
    Ok(data)
}

/// Reads a register of 4 bytes.
fn get(client: &dyn Client, offset: u64) -> Result<u32> {
    Ok(u32::from_le_bytes(read(
        client,
        crate::device::REGISTERS,
        offset,
    )?))
}

/// Writes a register of 4 bytes.
fn set(client: &dyn Client, offset: u64, value: u32) -> Result<()> {
    write(
        client,
        crate::device::REGISTERS,
        offset,
        &value.to_le_bytes(),
    )
}

/// Writes all bytes.
fn write(client: &dyn Client, region: u32, offset: u64, data: &[u8]) -> Result<()> {
    let count = client.write(region, offset, data)?;
    crate::check::equal("bytes written", count, data.len())
}
