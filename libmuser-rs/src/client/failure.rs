// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong between a client and its server, as sentences that say what was expected and
//! what came.

use std::fmt;
use std::time::Duration;

use crate::error::{Errno, Error};
use crate::vfio_user::stream::StreamError;
use crate::vfio_user::wire::{Command, Header};

/// Why a connection is at its end: every thread that uses it is told.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    kind: Kind,
    message: String,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Disconnected,
    Protocol,
    Socket(i32),
}

impl Failure {
    pub(super) const fn protocol(message: String) -> Self {
        Self {
            kind: Kind::Protocol,
            message,
        }
    }

    pub(super) fn to_error(&self) -> Error {
        let message = self.message.clone();
        match self.kind {
            Kind::Disconnected => Error::disconnected(message),
            Kind::Protocol => Error::protocol(message),
            Kind::Socket(number) => Error::new(Errno::new(number).unwrap_or(Errno::EIO), message),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            _ if error.is_closed() => Kind::Disconnected,
            StreamError::Socket(number) => Kind::Socket(number as i32),
            _ => Kind::Protocol,
        };
        Self {
            kind,
            message: format!("the connection to the server: {error}"),
        }
    }
}

/// The server answered with an errno.
pub(super) fn refused(command: Command, errno: Errno) -> Error {
    Error::new(errno, format!("the server refused {command}: {errno}"))
}

/// The server did not answer.
pub(super) fn late(command: Command, timeout: Duration) -> Error {
    Error::timed_out(format!(
        "the server has not answered {command} in {timeout:?}"
    ))
}

/// The server does not receive.
pub(super) fn unsent(timeout: Duration) -> Error {
    Error::timed_out(format!(
        "the server has not received what was sent to it in {timeout:?}"
    ))
}

/// A reply is not what the command wants.
pub(super) fn wrong(command: Command, what: impl fmt::Display) -> Error {
    Error::protocol(format!("the server's reply to {command}: {what}"))
}

/// A reply for which nobody waits.
pub(super) fn unexpected_reply(header: &Header) -> String {
    let (id, command) = (header.id, name(header.command));
    format!("the server has sent a reply to {command} with id {id}, for which nobody waits")
}

/// A reply to something else.
pub(super) fn wrong_command(header: &Header, expected: Command) -> String {
    let (id, command) = (header.id, name(header.command));
    format!("the reply with id {id} was to be one to {expected}, and is one to {command}")
}

/// What the server asked for could not be done.
pub(super) fn refusing(header: &Header, errno: Errno) -> String {
    format!("the server asked for {}: {errno}", name(header.command))
}

fn name(command: u16) -> String {
    Command::new(command).map_or_else(
        || format!("command {command}"),
        |command| command.to_string(),
    )
}
