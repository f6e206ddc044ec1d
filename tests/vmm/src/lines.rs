// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sockets that QEMU connects to, and lines that come over them.
//!
//! QEMU is the one that connects: a socket that it listens on would have to be waited for.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{bail, ensure, Context as _, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::wait::Deadline;

/// A socket that one connection is expected on.
#[derive(Debug)]
pub(crate) struct Listener {
    what: &'static str,
    socket: UnixListener,
}

impl Listener {
    /// Listens on a path, for `what`.
    pub(crate) fn bind(path: &Path, what: &'static str) -> Result<Self> {
        let socket = UnixListener::bind(path);
        let socket = socket.with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self { what, socket })
    }

    /// Waits for the connection.
    pub(crate) fn accept(self, deadline: Deadline) -> Result<Lines> {
        let left = u16::try_from(deadline.left().as_millis()).unwrap_or(u16::MAX);
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut sockets, PollTimeout::from(left))?;
        ensure!(ready > 0, "QEMU does not connect for {}", self.what);
        let (stream, _) = self.socket.accept()?;
        Ok(Lines {
            what: self.what,
            stream,
            received: Vec::new(),
        })
    }
}

/// Lines in both directions.
#[derive(Debug)]
pub(crate) struct Lines {
    what: &'static str,
    stream: UnixStream,
    /// What came after the last line that was handed out.
    received: Vec<u8>,
}

impl Lines {
    /// Sends a line.
    pub(crate) fn send(&mut self, line: &str) -> Result<()> {
        let sent = self.stream.write_all(format!("{line}\n").as_bytes());
        sent.with_context(|| format!("{}: cannot send {line:?}", self.what))
    }

    /// The next line, without what ends it.
    pub(crate) fn next(&mut self, deadline: Deadline) -> Result<String> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                return Ok(line.trim_end_matches(['\r', '\n']).to_owned());
            }
            let left = deadline.left();
            ensure!(!left.is_zero(), "{}: no line came in time", self.what);
            self.stream.set_read_timeout(Some(left))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => bail!("{}: QEMU has closed it", self.what),
                Ok(length) => self.received.extend(&bytes[..length]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => bail!("{}: {error}", self.what),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn pair() -> (UnixStream, Lines) {
        let (here, there) = UnixStream::pair().unwrap();
        let lines = Lines {
            what: "a test",
            stream: here,
            received: Vec::new(),
        };
        (there, lines)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    #[test]
    fn lines_in_pieces_are_whole_lines() {
        let (mut peer, mut lines) = pair();
        peer.write_all(b"one\r\ntw").unwrap();
        assert_eq!(lines.next(soon()).unwrap(), "one");
        peer.write_all(b"o\n\nthree\n").unwrap();
        assert_eq!(lines.next(soon()).unwrap(), "two");
        assert_eq!(lines.next(soon()).unwrap(), "");
        assert_eq!(lines.next(soon()).unwrap(), "three");
    }

    #[test]
    fn silence_and_a_closed_socket_are_told_apart() {
        let (peer, mut lines) = pair();
        let now = Deadline::after(Duration::from_millis(5));
        assert!(lines.next(now).unwrap_err().to_string().contains("in time"));
        drop(peer);
        let error = lines.next(soon()).unwrap_err();
        assert!(error.to_string().contains("closed"), "{error}");
    }

    #[test]
    fn line_that_came_before_the_deadline_is_kept_for_after_it() {
        let (mut peer, mut lines) = pair();
        peer.write_all(b"ha").unwrap();
        assert!(lines
            .next(Deadline::after(Duration::from_millis(5)))
            .is_err());
        peer.write_all(b"lf\n").unwrap();
        assert_eq!(lines.next(soon()).unwrap(), "half");
    }
}
