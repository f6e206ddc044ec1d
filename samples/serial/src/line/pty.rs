// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A pseudo-terminal, of which the port has the master's side.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt, PtyMaster};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg};

use super::{came, ready, Came, End};

/// A pseudo-terminal. It is raw, for the driver at the port makes a terminal of it.
#[derive(Debug)]
pub struct Pty {
    master: PtyMaster,
    /// Says when somebody opens the other side.
    opened: Inotify,
    path: PathBuf,
    link: Option<PathBuf>,
    joined: bool,
}

impl Pty {
    /// A new one, with a symbolic link to it.
    ///
    /// # Errors
    ///
    /// `EEXIST`: where the link is to be, there is something that is no link.
    pub fn new(link: Option<&Path>) -> io::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let master = posix_openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(ptsname_r(&master)?);
        let opened = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        // Before it was opened for the first time, a pseudo-terminal does not say that nobody is there.
        let other = File::options().read(true).write(true).open(&path)?;
        let mut mode = tcgetattr(&other)?;
        cfmakeraw(&mut mode);
        tcsetattr(&other, SetArg::TCSANOW, &mode)?;
        drop(other);
        opened.add_watch(&path, AddWatchFlags::IN_OPEN)?;
        if let Some(link) = link {
            // An earlier process may have left its own.
            if fs::symlink_metadata(link).is_ok_and(|found| found.is_symlink()) {
                fs::remove_file(link)?;
            }
            std::os::unix::fs::symlink(&path, link)?;
        }
        log::info!("the port is joined to {}", path.display());
        Ok(Self {
            master,
            opened,
            path,
            link: link.map(Path::to_owned),
            joined: false,
        })
    }

    /// The other side's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn is_hung_up(&self) -> bool {
        let flags = ready(self.master.as_fd(), PollFlags::empty());
        flags.contains(PollFlags::POLLHUP)
    }
}

impl End for Pty {
    fn is_joined(&self) -> bool {
        self.joined
    }

    fn wanted(&self, input: bool, output: bool) -> Vec<PollFd<'_>> {
        if !self.joined {
            return vec![PollFd::new(self.opened.as_fd(), PollFlags::POLLIN)];
        }
        wanted(self.master.as_fd(), input, output)
            .into_iter()
            .collect()
    }

    fn attend(&mut self) {
        if !self.joined {
            // Which events there were is seen better by looking.
            let _ = self.opened.read_events();
            self.joined = !self.is_hung_up();
        }
    }

    fn read(&mut self, to: &mut [u8]) -> usize {
        match came(self.master.read(to)) {
            Came::Bytes(count) => count,
            Came::Nothing => 0,
            // EIO: the last one has closed it, and all of its bytes are read.
            Came::End => {
                self.joined = false;
                0
            }
        }
    }

    fn write(&mut self, from: &[u8]) -> usize {
        if self.is_hung_up() {
            return from.len();
        }
        match came(self.master.write(from)) {
            Came::Bytes(count) => count,
            Came::Nothing => 0,
            Came::End => from.len(),
        }
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let Some(link) = &self.link else { return };
        // A successor may have made it its own.
        if fs::read_link(link).is_ok_and(|to| to == self.path) {
            if let Err(error) = fs::remove_file(link) {
                log::warn!("{} is left behind: {error}", link.display());
            }
        }
    }
}

/// A descriptor to wait for, if there is anything to wait for.
pub(super) fn wanted(
    fd: std::os::fd::BorrowedFd<'_>,
    input: bool,
    output: bool,
) -> Option<PollFd<'_>> {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::POLLIN, input);
    flags.set(PollFlags::POLLOUT, output);
    // Without flags it would still say that it is hung up, again and again.
    (!flags.is_empty()).then(|| PollFd::new(fd, flags))
}
