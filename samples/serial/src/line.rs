// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a port is joined to. Nothing here waits but who polls.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use nix::errno::Errno as Number;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

mod pty;
mod socket;
mod stdio;

pub use pty::Pty;
pub use socket::Socket;
pub use stdio::Stdio;

/// Which line a program is to join its port to.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "line", required = false, multiple = false)]
pub struct Options {
    /// Join the port to a new pseudo-terminal, with a symbolic link LINK to it
    #[arg(long, value_name = "LINK", num_args = 0..=1)]
    pub pty: Option<Option<PathBuf>>,

    /// Join the port to whoever connects to a new UNIX socket, one at a time
    #[arg(long, value_name = "PATH")]
    pub listen: Option<PathBuf>,

    /// Join the port to the program's own standard input and output
    #[arg(long)]
    pub stdio: bool,
}

impl Options {
    /// Makes the line; without options it is a pseudo-terminal.
    ///
    /// # Errors
    ///
    /// Those of the system: a path that is taken, for instance.
    pub fn line(&self) -> io::Result<Line> {
        if let Some(path) = &self.listen {
            return Ok(Line::new(Socket::listen(path)?));
        }
        if self.stdio {
            return Ok(Line::new(Stdio::new()?));
        }
        let link = self.pty.as_ref().and_then(Option::as_deref);
        Ok(Line::new(Pty::new(link)?))
    }
}

/// The end of a line.
pub trait End: Send {
    /// Whether somebody is at the other end.
    fn is_joined(&self) -> bool;

    /// Whether there is nobody for what is sent, so that it goes nowhere.
    fn discards(&self) -> bool {
        !self.is_joined()
    }

    /// What to wait for, to read, to write, or to see somebody come or go.
    fn wanted(&self, input: bool, output: bool) -> Vec<PollFd<'_>>;

    /// Looks whether somebody has come or gone.
    fn attend(&mut self) {}

    /// Reads what is there, which may be nothing.
    fn read(&mut self, to: &mut [u8]) -> usize;

    /// Writes what there is room for, which may be nothing.
    fn write(&mut self, from: &[u8]) -> usize;
}

/// A line of any kind.
pub struct Line(Box<dyn End>);

impl Line {
    /// A line with this end.
    pub fn new(end: impl End + 'static) -> Self {
        Self(Box::new(end))
    }

    pub(crate) fn is_joined(&self) -> bool {
        self.0.is_joined()
    }

    pub(crate) fn wanted(&self, input: bool, output: bool) -> Vec<PollFd<'_>> {
        self.0.wanted(input, output)
    }

    pub(crate) fn discards(&self) -> bool {
        self.0.discards()
    }

    pub(crate) fn attend(&mut self) {
        self.0.attend();
    }

    pub(crate) fn read(&mut self, to: &mut [u8]) -> usize {
        match to.len() {
            0 => 0,
            _ => self.0.read(to),
        }
    }

    pub(crate) fn write(&mut self, from: &[u8]) -> usize {
        if self.0.discards() {
            return from.len();
        }
        self.0.write(from)
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").finish_non_exhaustive()
    }
}

/// What a read or a write without waiting came to.
enum Came {
    /// So many bytes.
    Bytes(usize),
    /// None, as it would have to wait.
    Nothing,
    /// No more ever.
    End,
}

fn came(result: io::Result<usize>) -> Came {
    match result {
        Ok(0) => Came::End,
        Ok(count) => Came::Bytes(count),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Came::Nothing,
            _ => Came::End,
        },
    }
}

/// What a descriptor can do right now.
fn ready(fd: BorrowedFd<'_>, flags: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(fd, flags)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0].revents().unwrap_or(PollFlags::empty()),
        Err(Number::EINTR) => PollFlags::empty(),
        Err(_) => PollFlags::POLLERR,
    }
}
