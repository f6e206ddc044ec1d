// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who keeps what outlives the server: nobody, or a supervisor.

use std::fmt::Debug;
use std::os::fd::OwnedFd;

use super::areas::make_file;
use crate::error::Result;
use crate::transport::{AttachOptions, Description};

/// Keeps what outlives the server.
pub(crate) trait Keeper: Debug + Send {
    /// The server attaches: what has an earlier one left?
    ///
    /// # Errors
    ///
    /// The device was described differently before, or there is no memory.
    fn attach(&mut self, description: &Description, options: &AttachOptions) -> Result<Kept>;

    /// A new file for the areas of a region of so many bytes, as large as that.
    ///
    /// # Errors
    ///
    /// There is no memory.
    fn make_file(&self, region: u32, size: u64) -> Result<OwnedFd>;
}

/// What an earlier server has left.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The files of all regions that have mappable areas, by ascending region. If there are none
    /// yet, they are [made](Keeper::make_file).
    pub(crate) areas: Option<Vec<OwnedFd>>,
    /// The file of the state, as large as it has to be at least.
    pub(crate) state: Option<OwnedFd>,
    /// Whether there was an earlier server.
    pub(crate) recovered: bool,
}

/// Nobody keeps anything: each server is the first one.
#[derive(Debug)]
pub(super) struct Nobody;

impl Keeper for Nobody {
    fn attach(&mut self, _: &Description, _: &AttachOptions) -> Result<Kept> {
        Ok(Kept::default())
    }

    fn make_file(&self, _region: u32, size: u64) -> Result<OwnedFd> {
        make_file(size)
    }
}
