// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One opaque error, which always knows the errno that a client would see.

use std::fmt;
use std::io;

/// The result of everything in this library that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error number that a client can be given, from 1 to 4095.
///
/// # Invariants
///
/// The number is in that range, which is the one that the kernel can return to a caller
/// (`MAX_ERRNO` in `<linux/err.h>`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// Input/output error: what a failure without a better name becomes.
    pub const EIO: Self = Self(libc::EIO);
    /// No such device or address.
    pub const ENXIO: Self = Self(libc::ENXIO);
    /// Invalid argument.
    pub const EINVAL: Self = Self(libc::EINVAL);
    /// Operation not permitted.
    pub const EPERM: Self = Self(libc::EPERM);
    /// Device or resource busy.
    pub const EBUSY: Self = Self(libc::EBUSY);
    /// Out of memory.
    pub const ENOMEM: Self = Self(libc::ENOMEM);
    /// No space left on device.
    pub const ENOSPC: Self = Self(libc::ENOSPC);
    /// Bad address: memory that the client has not mapped.
    pub const EFAULT: Self = Self(libc::EFAULT);
    /// Value too large: a range which ends beyond what an address can say.
    pub const EOVERFLOW: Self = Self(libc::EOVERFLOW);
    /// Operation not supported.
    pub const EOPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// No such device.
    pub const ENODEV: Self = Self(libc::ENODEV);
    /// Resource deadlock avoided.
    pub const EDEADLK: Self = Self(libc::EDEADLK);
    /// The largest number there can be.
    const MAX: i32 = 4095;

    /// The error number `number`, which is positive as in `<errno.h>`; `None` outside 1 to 4095.
    #[must_use]
    pub const fn new(number: i32) -> Option<Self> {
        if number >= 1 && number <= Self::MAX {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number, as in `<errno.h>`.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

/// What went wrong, as a sentence, with the errno that a client sees for it.
///
/// Device code makes one from an [`Errno`], from a [`std::io::Error`] or with [`Error::new`].
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Error(#[from] Kind);

/// The kinds behind [`Error`], private so that they can grow.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Kind {
    #[error("{message}")]
    Message { errno: Errno, message: String },
    #[error("{0}")]
    Errno(Errno),
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
    #[error("{0}")]
    Model(String),
    #[error("the device refused its description: {message}")]
    Refused { errno: Errno, message: String },
    #[error("the device was removed")]
    Removed,
    #[error("another server takes the device over")]
    HandedOver,
    #[error("{0}")]
    Disconnected(String),
    #[error("{0}")]
    TimedOut(String),
    #[error("{0}")]
    Protocol(String),
    #[error("the device panicked: {0}")]
    Panicked(String),
}

impl Error {
    /// An error of the device's own: what the client gets, and a sentence for the log.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self(Kind::Message {
            errno,
            message: message.into(),
        })
    }

    /// The errno that a client gets whose access failed with this error.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match &self.0 {
            Kind::Message { errno, .. } | Kind::Errno(errno) | Kind::Refused { errno, .. } => {
                *errno
            }
            Kind::Io { source, .. } => source
                .raw_os_error()
                .and_then(Errno::new)
                .unwrap_or(Errno::EIO),
            Kind::Model(_) => Errno::EINVAL,
            Kind::Removed => Errno(libc::ENODEV),
            Kind::HandedOver => Errno(libc::ESHUTDOWN),
            Kind::Disconnected(_) => Errno(libc::ENOTCONN),
            Kind::TimedOut(_) => Errno(libc::ETIMEDOUT),
            Kind::Protocol(_) => Errno(libc::EPROTO),
            Kind::Panicked(_) => Errno::EIO,
        }
    }

    /// Whether a builder was asked for a device which can't exist.
    #[must_use]
    pub fn is_model(&self) -> bool {
        matches!(self.0, Kind::Model(_))
    }

    /// Whether the other end of a transport refused the description of the device.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self.0, Kind::Refused { .. })
    }

    /// Whether another process serves the device already.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.is_refused() && self.errno() == Errno::EBUSY
    }

    /// Whether the device was removed, so that nothing can be served any more.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        matches!(self.0, Kind::Removed)
    }

    /// Whether another server waits in standby or has taken over, so that this one is done.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        matches!(self.0, Kind::HandedOver)
    }

    /// Whether the device's code panicked.
    #[must_use]
    pub fn is_panicked(&self) -> bool {
        matches!(self.0, Kind::Panicked(_))
    }

    /// Whether the other side of a socket has gone, so that it takes another connection to go on.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        matches!(self.0, Kind::Disconnected(_))
    }

    /// Whether the other side of a socket has not answered in time.
    #[must_use]
    pub fn is_timed_out(&self) -> bool {
        matches!(self.0, Kind::TimedOut(_))
    }

    /// Whether the other side of a socket has said what no side following the protocol says.
    #[must_use]
    pub fn is_protocol(&self) -> bool {
        matches!(self.0, Kind::Protocol(_))
    }

    pub(crate) fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self(Kind::Io {
            context: context.into(),
            source: source.into(),
        })
    }

    pub(crate) fn model(message: impl Into<String>) -> Self {
        Self(Kind::Model(message.into()))
    }

    pub(crate) fn refused(errno: i32, message: impl Into<String>) -> Self {
        let errno = Errno::new(errno).unwrap_or(Errno::EIO);
        Self(Kind::Refused {
            errno,
            message: message.into(),
        })
    }

    pub(crate) fn disconnected(message: impl Into<String>) -> Self {
        Self(Kind::Disconnected(message.into()))
    }

    pub(crate) fn timed_out(message: impl Into<String>) -> Self {
        Self(Kind::TimedOut(message.into()))
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self(Kind::Protocol(message.into()))
    }

    pub(crate) fn removed() -> Self {
        Self(Kind::Removed)
    }

    pub(crate) fn handed_over() -> Self {
        Self(Kind::HandedOver)
    }

    pub(crate) fn panicked(message: String) -> Self {
        Self(Kind::Panicked(message))
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self(Kind::Errno(errno))
    }
}

impl From<io::Error> for Error {
    fn from(source: io::Error) -> Self {
        Self::io("input/output", source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_out_of_range_is_no_errno() {
        assert_eq!(Errno::new(0), None);
        assert_eq!(Errno::new(-5), None);
        assert_eq!(Errno::new(4096), None);
        assert_eq!(Errno::new(4095).map(Errno::number), Some(4095));
    }

    #[test]
    fn io_error_keeps_its_number() {
        let error = Error::from(io::Error::from_raw_os_error(libc::ENOSPC));

        assert_eq!(error.errno(), Errno::ENOSPC);
    }

    #[test]
    fn io_error_without_number_is_eio() {
        let error = Error::from(io::Error::other("odd"));

        assert_eq!(error.errno(), Errno::EIO);
        assert!(error.to_string().contains("odd"));
    }
}
