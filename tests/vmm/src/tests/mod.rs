// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All tests, the fast ones first.

mod bare_dma;
mod bare_gpio;
mod bare_supervised;
mod bare_windows;
mod guest;
mod guest_vfio;
mod shared;

use anyhow::{ensure, Result};

/// A test's name, and what it does.
pub(crate) type Test = (String, fn() -> Result<()>);

/// Every test.
pub(crate) fn all() -> Vec<Test> {
    [
        bare_gpio::tests(),
        bare_dma::tests(),
        bare_windows::tests(),
        bare_supervised::tests(),
        guest::tests(),
        guest_vfio::tests(),
    ]
    .concat()
}

/// The tests of a topic, by name.
macro_rules! topic {
    ($name:literal: [$($test:ident),* $(,)?]) => {
        pub(super) fn tests() -> Vec<super::Test> {
            vec![$((format!("{}::{}", $name, stringify!($test)), $test)),*]
        }
    };
}
use topic;

/// Compares what is seen with what must be.
fn equal<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, wanted: T) -> Result<()> {
    ensure!(seen == wanted, "{what}: {seen:x?}, expected {wanted:x?}");
    Ok(())
}
