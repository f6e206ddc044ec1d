// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sockets that the process was started with: by number, or as systemd hands them over
//! (sd_listen_fds(3)).

use std::env;
use std::os::fd::{OwnedFd, RawFd};
use std::str::FromStr;

use crate::error::{Errno, Error, Result};
use crate::sys;

/// Number of the first socket that systemd hands over (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// Which descriptor a program is to serve at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Handed {
    /// The one with this number.
    Number(RawFd),
    /// The one that a socket unit of systemd hands over.
    Systemd,
}

impl FromStr for Handed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "systemd" {
            return Ok(Self::Systemd);
        }
        let number = text.parse().ok().filter(|number| *number >= 0);
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        number
            .filter(|_| digits)
            .map(Self::Number)
            .ok_or_else(|| "a descriptor is a number, such as 3, or the word systemd".to_owned())
    }
}

impl Handed {
    /// Takes the descriptor. Once only: it is this caller's from then on.
    ///
    /// # Errors
    ///
    /// There is no such descriptor, or systemd has handed over none or several.
    pub fn take(self) -> Result<OwnedFd> {
        let number = match self {
            Self::Number(number) => number,
            Self::Systemd => announced(
                env::var("LISTEN_PID").ok().as_deref(),
                env::var("LISTEN_FDS").ok().as_deref(),
                std::process::id(),
            )?,
        };
        sys::adopt(number).map_err(|errno| {
            let message = format!("descriptor {number} was to be a socket, but is not open");
            log::debug!("descriptor {number}: {errno}");
            Error::new(Errno::new(libc::EBADF).unwrap_or(Errno::EIO), message)
        })
    }
}

/// The number of the one socket that systemd announces to this process.
fn announced(pid: Option<&str>, count: Option<&str>, own: u32) -> Result<RawFd> {
    let refused = |message: String| Err(Error::new(Errno::EINVAL, message));
    let (Some(pid), Some(count)) = (pid, count) else {
        return refused(
            "systemd has handed over no socket (LISTEN_PID and LISTEN_FDS are not set): start the \
             socket unit, not the service"
                .to_owned(),
        );
    };
    if pid.parse() != Ok(own) {
        return refused(format!(
            "the socket of systemd is for process {pid} (LISTEN_PID), but this is {own}: let the \
             unit start this program without another one between"
        ));
    }
    if count != "1" {
        return refused(format!(
            "systemd has handed over {count} sockets (LISTEN_FDS), but a device has one"
        ));
    }
    Ok(FIRST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_is_a_number_or_systemd() {
        assert_eq!("0".parse(), Ok(Handed::Number(0)));
        assert_eq!("3".parse(), Ok(Handed::Number(3)));
        assert_eq!("systemd".parse(), Ok(Handed::Systemd));
        for bad in ["", "-1", "+3", "3 ", "99999999999", "SYSTEMD", "x"] {
            assert!(bad.parse::<Handed>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn one_socket_for_this_process_is_taken() {
        assert_eq!(announced(Some("7"), Some("1"), 7).unwrap(), 3);
    }

    #[test]
    fn socket_of_nobody_of_another_and_of_many_are_refused_in_words() {
        let says = |pid, count| announced(pid, count, 7).unwrap_err().to_string();

        assert!(says(None, None).contains("start the socket unit"));
        assert!(says(Some("7"), None).contains("no socket"));
        assert!(says(Some("8"), Some("1")).contains("for process 8"));
        assert!(says(Some(""), Some("1")).contains("LISTEN_PID"));
        assert!(says(Some("7"), Some("2")).contains("2 sockets"));
        assert!(says(Some("7"), Some("0")).contains("0 sockets"));
    }

    #[test]
    fn descriptor_that_is_not_open_is_refused() {
        let error = Handed::Number(RawFd::MAX).take().unwrap_err();

        assert_eq!(error.errno().number(), libc::EBADF);
    }
}
