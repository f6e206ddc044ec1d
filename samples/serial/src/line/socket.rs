// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A UNIX socket, at whose other end is one client at a time.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags};

use super::pty::wanted;
use super::{came, ready, Came, End};

/// A socket that is listened at. Who connects while another is there waits.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    client: Option<Client>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Whether it sends no more.
    silent: bool,
    /// Whether it takes no more.
    deaf: bool,
}

impl Socket {
    /// A new one at a path, from which a socket that nobody listens at is removed.
    ///
    /// # Errors
    ///
    /// `EADDRINUSE`: somebody does, or it is no socket.
    pub fn listen(path: &Path) -> io::Result<Self> {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        if is_socket && UnixStream::connect(path).is_err_and(|error| is_refused(&error)) {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        log::info!("the port is joined to {}", path.display());
        Ok(Self {
            listener,
            path: path.to_owned(),
            client: None,
        })
    }
}

fn is_refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

impl End for Socket {
    fn is_joined(&self) -> bool {
        self.client.is_some()
    }

    fn discards(&self) -> bool {
        self.client.as_ref().is_none_or(|client| client.deaf)
    }

    fn wanted(&self, input: bool, output: bool) -> Vec<PollFd<'_>> {
        let Some(client) = &self.client else {
            return vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        };
        let fd = client.stream.as_fd();
        if client.silent && !output {
            // All that can still come is its end.
            return vec![PollFd::new(fd, PollFlags::empty())];
        }
        let fds = wanted(fd, input && !client.silent, output && !client.deaf);
        fds.into_iter().collect()
    }

    fn attend(&mut self) {
        if let Some(client) = &self.client {
            let flags = ready(client.stream.as_fd(), PollFlags::empty());
            let gone = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
            if client.silent && (client.deaf || gone) {
                log::info!("the client at {} has gone", self.path.display());
                self.client = None;
            }
        }
        if self.client.is_none() {
            if let Ok((stream, _)) = self.listener.accept() {
                if let Err(error) = stream.set_nonblocking(true) {
                    log::warn!("a client can't be served: {error}");
                    return;
                }
                log::info!("a client is at {}", self.path.display());
                self.client = Some(Client {
                    stream,
                    silent: false,
                    deaf: false,
                });
            }
        }
    }

    fn read(&mut self, to: &mut [u8]) -> usize {
        let Some(client) = self.client.as_mut().filter(|client| !client.silent) else {
            return 0;
        };
        match came(client.stream.read(to)) {
            Came::Bytes(count) => count,
            Came::Nothing => 0,
            Came::End => {
                client.silent = true;
                0
            }
        }
    }

    fn write(&mut self, from: &[u8]) -> usize {
        let Some(client) = &mut self.client else {
            return from.len();
        };
        match came(client.stream.write(from)) {
            Came::Bytes(count) => count,
            Came::Nothing => 0,
            Came::End => {
                client.deaf = true;
                from.len()
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{} is left behind: {error}", self.path.display());
        }
    }
}
