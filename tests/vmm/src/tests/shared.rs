// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest takes a while to boot, so tests share one: whichever comes first boots it, and after a
//! failure the next one boots another.

use std::sync::{Mutex, PoisonError};

use anyhow::{Error, Result};

/// What the tests of a topic share.
pub(super) struct Shared<T>(Mutex<Option<T>>);

impl<T> Shared<T> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Runs a test with what there is, or else with what `make` makes. If it fails, `explain` says
    /// what else is to be known, and the thing is dropped.
    pub(super) fn run(
        &self,
        make: impl FnOnce() -> Result<T>,
        test: impl FnOnce(&mut T) -> Result<()>,
        explain: impl FnOnce(&T, Error) -> Error,
    ) -> Result<()> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut thing = match place.take() {
            Some(thing) => thing,
            None => make()?,
        };
        if let Err(error) = test(&mut thing) {
            return Err(explain(&thing, error));
        }
        *place = Some(thing);
        Ok(())
    }
}
