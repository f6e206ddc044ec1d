// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program's own standard input and output.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, LocalFlags, SetArg, Termios};

use super::pty::wanted;
use super::{came, ready, Came, End};

/// Standard input and output. A terminal is raw meanwhile, but for the keys that end a program.
#[derive(Debug)]
pub struct Stdio {
    input: Option<File>,
    output: Option<File>,
    /// What the terminal was before.
    before: Option<Termios>,
}

impl Stdio {
    /// Those of this process.
    ///
    /// # Errors
    ///
    /// One of them is closed.
    pub fn new() -> io::Result<Self> {
        let copy = |fd: std::os::fd::BorrowedFd<'_>| -> io::Result<File> {
            let copy: OwnedFd = fd.try_clone_to_owned()?;
            Ok(File::from(copy))
        };
        let (input, output) = (copy(io::stdin().as_fd())?, copy(io::stdout().as_fd())?);
        let mut before = None;
        if input.is_terminal() {
            let mode = tcgetattr(&input)?;
            let mut raw = mode.clone();
            cfmakeraw(&mut raw);
            raw.local_flags |= LocalFlags::ISIG;
            tcsetattr(&input, SetArg::TCSANOW, &raw)?;
            before = Some(mode);
        }
        Ok(Self {
            input: Some(input),
            output: Some(output),
            before,
        })
    }
}

impl End for Stdio {
    fn is_joined(&self) -> bool {
        self.input.is_some() || self.output.is_some()
    }

    fn discards(&self) -> bool {
        self.output.is_none()
    }

    fn wanted(&self, input: bool, output: bool) -> Vec<PollFd<'_>> {
        let mut fds = Vec::new();
        if let Some(file) = self.input.as_ref().filter(|_| input) {
            fds.extend(wanted(file.as_fd(), true, false));
        }
        if let Some(file) = self.output.as_ref().filter(|_| output) {
            fds.extend(wanted(file.as_fd(), false, true));
        }
        fds
    }

    fn read(&mut self, to: &mut [u8]) -> usize {
        let Some(file) = &mut self.input else {
            return 0;
        };
        // Others have the same open file, so it can't be made one that does not wait.
        if ready(file.as_fd(), PollFlags::POLLIN).is_empty() {
            return 0;
        }
        match came(file.read(to)) {
            Came::Bytes(count) => count,
            Came::Nothing => 0,
            Came::End => {
                self.input = None;
                0
            }
        }
    }

    fn write(&mut self, from: &[u8]) -> usize {
        let Some(file) = &mut self.output else {
            return from.len();
        };
        // Of one byte it is known that there is room for it.
        let Some(first) = from.get(..1) else { return 0 };
        if ready(file.as_fd(), PollFlags::POLLOUT).is_empty() {
            return 0;
        }
        match came(file.write(first)) {
            Came::Bytes(count) => count,
            Came::Nothing => 0,
            Came::End => {
                self.output = None;
                from.len()
            }
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        if let (Some(mode), Some(input)) = (&self.before, &self.input) {
            if let Err(error) = tcsetattr(input, SetArg::TCSANOW, mode) {
                log::warn!("the terminal stays raw: {error}");
            }
        }
    }
}
