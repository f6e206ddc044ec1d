// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `DEVICE_FEATURE`: recording of what the device writes.

use super::commands::Refusal;
use super::hub::State;
use super::session::ReplyTo;
use crate::error::Errno;
use crate::vfio_user::wire::request::Feature;

impl State {
    pub(super) fn feature(&mut self, _to: ReplyTo, asked: Feature<'_>) -> Result<(), Refusal> {
        let why = format!("there is no feature {}", asked.index);
        Err(Refusal::new(Errno::EOPNOTSUPP, why))
    }
}
