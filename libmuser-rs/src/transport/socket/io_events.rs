// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes that come by eventfd, past the client.

use super::commands::Refusal;
use super::hub::State;
use super::session::ReplyTo;
use crate::error::Errno;
use crate::vfio_user::wire::request::Query;

impl State {
    pub(super) fn region_io_fds(&mut self, _to: ReplyTo, _query: Query) -> Result<(), Refusal> {
        Err(Refusal::new(Errno::EOPNOTSUPP, "no writes come by eventfd"))
    }
}
