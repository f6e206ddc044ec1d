// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who keeps what outlives the server: nobody, or a supervisor.

use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};

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

    /// Nothing was [kept](Kept), and this is what was made.
    ///
    /// # Errors
    ///
    /// It can't be kept.
    fn made(&self, _state: BorrowedFd<'_>, _areas: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(())
    }

    /// A client is wound up, and the files of the areas are these from now on; none if the client has
    /// changed nothing.
    fn wound_up(&self, _areas: &[BorrowedFd<'_>]) {}

    /// The server is done.
    fn detach(&self) {}
}

/// What an earlier server has left.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The files of all areas. If there are none yet, they are made.
    pub(crate) areas: Option<Vec<OwnedFd>>,
    /// The file of the state, as large as it has to be at least.
    pub(crate) state: Option<OwnedFd>,
    /// Whether there was an earlier server.
    pub(crate) recovered: bool,
    /// Whether that one did not come to an end with winding up a client.
    pub(crate) closing: bool,
    /// The connection of a client who is there already, and how many messages come first on it, which
    /// set up what an earlier server had set up.
    pub(crate) session: Option<(OwnedFd, u32)>,
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
