// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the first program has made of the device, which holds for all that follow.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::transport::{Difference, STATE_DIFFERS};
use crate::vfio_user::control::Attach;

/// Files that a program may leave here: its state, and one for each region.
const MOST_FILES: usize = 32;

/// A device, as its first program has described it.
#[derive(Debug)]
pub(super) struct Kept {
    attach: Attach,
    /// The state, then the areas.
    files: Vec<OwnedFd>,
}

impl Kept {
    /// A device whose memory is still to come.
    pub(super) fn new(attach: Attach) -> Self {
        let files = Vec::new();
        Self { attach, files }
    }

    /// Whether its first program got as far as to leave its memory here.
    pub(super) fn is_complete(&self) -> bool {
        !self.files.is_empty()
    }

    /// Why a program that says this of itself can't serve it: an errno and a sentence.
    pub(super) fn refusal(&self, later: &Attach) -> Option<(i32, String)> {
        let (earlier, description) = (&self.attach, &later.description);
        if let Some(difference) = Difference::between(&earlier.description, description) {
            return Some((libc::ESTALE, difference.sentence(description)));
        }
        let tags = [earlier.state_tag, later.state_tag];
        let same = tags[0] == tags[1] && later.state_size <= earlier.state_size;
        (!same).then(|| (libc::ESTALE, STATE_DIFFERS.to_owned()))
    }

    /// The first program has made the memory.
    pub(super) fn complete(&mut self, files: Vec<OwnedFd>) -> Result<(), &'static str> {
        if self.is_complete() || files.is_empty() || files.len() > MOST_FILES {
            return Err("it leaves memory that nobody has asked for");
        }
        self.files = files;
        Ok(())
    }

    /// A client is wound up, and the areas are new; without any they are those of before.
    pub(super) fn replace_areas(&mut self, areas: Vec<OwnedFd>) -> Result<(), &'static str> {
        if areas.is_empty() {
            return Ok(());
        }
        if areas.len() + 1 != self.files.len() {
            return Err("its new areas are not as many as before");
        }
        self.files.truncate(1);
        self.files.extend(areas);
        Ok(())
    }

    /// What the next program gets.
    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd).collect()
    }
}
