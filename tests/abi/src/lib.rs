// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Keeps the two faces of the ABI one: `kmod/uapi/src/muser.rs`, which is the definition, and
//! `kmod/uapi/muser.h`, which C programs include.
//!
//! The header is made from the definition ([`header`]), kept in the tree so that its changes are
//! read in a review, and checked: both compilers are asked for every size, offset and constant
//! ([`rust_side`], [`c_side`]), and [`mismatches`] names what differs. A changed definition fails
//! the tests until `MUSER_BLESS=1 cargo test -p muser-abi-tests` has written the header anew.

#![forbid(unsafe_code)]

pub mod c_side;
pub mod definition;
pub mod header;
pub mod rust_side;

use std::collections::BTreeMap;

/// A sentence for each thing measured which the two sides don't agree on.
#[must_use]
pub fn mismatches(rust: &BTreeMap<String, u64>, c: &BTreeMap<String, u64>) -> Vec<String> {
    let mut found = Vec::new();
    for (what, rust) in rust {
        match c.get(what) {
            Some(c) if c == rust => {}
            Some(c) => found.push(format!("{what} is {rust} in muser.rs and {c} in muser.h")),
            None => found.push(format!("{what} is {rust} in muser.rs and not known to C")),
        }
    }
    for (what, c) in c.iter().filter(|(what, _)| !rust.contains_key(*what)) {
        found.push(format!("{what} is {c} in muser.h and not known to Rust"));
    }
    found
}
