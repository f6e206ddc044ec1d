// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Expectations that fail with a sentence.

use std::fmt::Debug;
use std::io;

use anyhow::{bail, ensure, Result};

/// Expects `got` to be `expected`.
pub(crate) fn equal<T: PartialEq + Debug>(what: &str, got: T, expected: T) -> Result<()> {
    ensure!(
        got == expected,
        "{what}: is {got:x?}, expected {expected:x?}"
    );
    Ok(())
}

/// Expects `result` to be an error with this errno.
pub(crate) fn fails<T: Debug>(what: &str, result: io::Result<T>, errno: i32) -> Result<()> {
    match result {
        Ok(value) => bail!("{what}: succeeded with {value:?}, expected errno {errno}"),
        Err(error) => {
            let got = error.raw_os_error();
            ensure!(
                got == Some(errno),
                "{what}: failed with {error}, expected errno {errno}"
            );
            Ok(())
        }
    }
}
