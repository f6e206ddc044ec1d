// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every size, offset and constant as the Rust compiler sees it.

use muser_uapi::*;
use std::collections::BTreeMap;
use std::mem::offset_of;

/// What is measured (`struct muser_irq: size`, `muser_irq.flags: offset`, …) and its value.
///
/// # Panics
///
/// If one name is measured twice, which the Rust compiler rules out.
#[must_use]
pub fn measure() -> BTreeMap<String, u64> {
    // Made by build.rs out of muser.rs.
    let values: Vec<(&str, u64)> = include!(concat!(env!("OUT_DIR"), "/rust_side.rs"));
    let count = values.len();
    let map: BTreeMap<_, _> = values
        .into_iter()
        .map(|(what, value)| (what.to_owned(), value))
        .collect();
    assert_eq!(map.len(), count, "a name was measured twice");
    map
}

fn wide(size: usize) -> u64 {
    size as u64
}

/// A constant of whatever width.
fn value(constant: impl Into<u64>) -> u64 {
    constant.into()
}

/// The size of a field, of which only the way to it is known.
fn size_of_field<S, F>(_: fn(&S) -> &F) -> u64 {
    wide(size_of::<F>())
}
