// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where connections come from: a socket file, a socket that somebody else has made, one connection.

use std::fmt::Debug;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{lchown, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno as Number;
use nix::fcntl::{Flock, FlockArg, AT_FDCWD};
use nix::sys::socket::{
    bind, connect, getsockname, getsockopt, listen, socket, sockopt, AddressFamily, Backlog,
    SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr,
};
use nix::sys::stat::{fchmod, fchmodat, FchmodatFlags, Mode};

use crate::error::{Error, Result};

/// Where a server's connections come from, one after the other.
pub(crate) trait Door: Debug + Send + Sync {
    /// Readable when there may be a connection, or none will come any more.
    fn as_fd(&self) -> BorrowedFd<'_>;

    /// Takes the next connection, if there is one.
    fn accept(&self) -> Result<Knock>;

    /// Whether somebody who comes while another client is there is turned away; else he waits.
    fn refuses(&self) -> bool {
        true
    }
}

/// What is at the door.
#[derive(Debug)]
pub(crate) enum Knock {
    /// Nobody.
    Nobody,
    /// A client.
    Client(OwnedFd),
    /// Nobody, and nobody will come any more.
    Closed,
}

/// Who may connect to a socket file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenOptions {
    /// The file's permissions: who may write it can connect.
    pub mode: u32,
    /// The file's group, by number; the process's own if there is none.
    pub group: Option<u32>,
}

impl ListenOptions {
    /// Nobody but the process's own user may connect.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            mode: 0o600,
            group: None,
        }
    }

    /// Sets the file's permissions.
    #[must_use]
    pub const fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// Sets the file's group.
    #[must_use]
    pub const fn group(self, group: u32) -> Self {
        Self {
            group: Some(group),
            ..self
        }
    }
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    /// Gives room for one descriptor more, when there is none: who can't be let in is turned away,
    /// rather than making the socket readable for ever.
    reserve: Mutex<Option<OwnedFd>>,
    /// The socket file, if it is ours to remove.
    _file: Option<SocketFile>,
}

/// A socket file that was made here.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Makes a socket file and listens to it. One that nobody listens to any more is replaced.
    pub(crate) fn new(path: &Path, options: ListenOptions) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::io(format!("listening to the socket {}", path.display()), error)
        };
        let address = UnixAddr::new(path).map_err(|errno| failed(errno.into()))?;
        // Of two processes which find the same stale file, the second one finds the first one's.
        let _lock = lock_directory(path);
        remove_stale(path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let make = || -> io::Result<(OwnedFd, SocketFile)> {
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            // The file has this mode from the first moment on.
            fchmod(&socket, Mode::empty())?;
            bind(socket.as_raw_fd(), &address)?;
            let made = fs::symlink_metadata(path)?;
            // From here on it is removed if something fails.
            let file = SocketFile {
                path: path.into(),
                device: made.dev(),
                inode: made.ino(),
            };
            listen(&socket, Backlog::MAXCONN)?;
            if options.group.is_some() {
                lchown(path, None, options.group)?;
            }
            // Whoever may write to the directory may have put a link there meanwhile.
            let mode = Mode::from_bits_truncate(options.mode);
            fchmodat(AT_FDCWD, path, mode, FchmodatFlags::NoFollowSymlink)?;
            Ok((socket, file))
        };
        let (socket, file) = make().map_err(failed)?;
        Ok(Self {
            socket: socket.into(),
            reserve: Mutex::new(reserve()),
            _file: Some(file),
        })
    }

    /// A socket which listens already.
    pub(crate) fn from_fd(socket: OwnedFd) -> Result<Self> {
        let socket = UnixListener::from(socket);
        socket
            .set_nonblocking(true)
            .map_err(|error| Error::io("taking a listening socket", error))?;
        Ok(Self {
            socket,
            reserve: Mutex::new(reserve()),
            _file: None,
        })
    }
}

impl Listener {
    /// Lets one in, if there is one, only to close the door behind it. Without room the kernel does not
    /// say.
    fn turn_away(&self) {
        let mut held = self.reserve.lock().unwrap_or_else(PoisonError::into_inner);
        *held = None;
        let turned_away = self.socket.accept().is_ok();
        *held = reserve();
        if turned_away {
            log::warn!("a client is refused: this process has too many descriptors");
        }
    }
}

/// Whether there are too many descriptors.
fn has_no_room(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

fn reserve() -> Option<OwnedFd> {
    File::open("/dev/null").ok().map(OwnedFd::from)
}

impl Door for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn accept(&self) -> Result<Knock> {
        loop {
            match self.socket.accept() {
                Ok((client, _)) => return Ok(Knock::Client(client.into())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Knock::Nobody)
                }
                Err(error) if has_no_room(&error) => {
                    // There is none with nobody at the door either. Who is, makes the socket readable.
                    self.turn_away();
                    return Ok(Knock::Nobody);
                }
                Err(error) => return Err(Error::io("accepting a client", error)),
            }
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have made another one there.
        let same = |file: &Metadata| (file.dev(), file.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(|file| same(&file)) {
            if let Err(error) = fs::remove_file(&self.path) {
                log::debug!("the socket {} stays: {error}", self.path.display());
            }
        }
    }
}

/// The one connection that there will be.
#[derive(Debug)]
pub(crate) struct Single {
    connection: Mutex<Option<OwnedFd>>,
    /// Readable: who looks finds the connection, or that there is none any more.
    event: nix::sys::eventfd::EventFd,
}

impl Single {
    pub(crate) fn new(connection: OwnedFd) -> Result<Self> {
        use nix::sys::eventfd::{EfdFlags, EventFd};
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(1, flags)
            .map_err(|errno| Error::io("making an eventfd", errno))?;
        Ok(Self {
            connection: Mutex::new(Some(connection)),
            event,
        })
    }
}

impl Door for Single {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn accept(&self) -> Result<Knock> {
        let connection = self.connection.lock();
        let connection = connection.unwrap_or_else(PoisonError::into_inner).take();
        Ok(connection.map_or(Knock::Closed, Knock::Client))
    }

    fn refuses(&self) -> bool {
        false
    }
}

/// What a socket is that somebody else has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// It listens for clients.
    Listening,
    /// A client is at its other end.
    Connected,
    /// Messages of its own come over it: a supervisor is at its other end.
    Supervised,
}

impl Given {
    /// Looks at a descriptor.
    pub(crate) fn of(fd: &OwnedFd) -> Result<Self> {
        let number = fd.as_raw_fd();
        let wrong = |what: &str| {
            let message = format!("descriptor {number} {what}");
            Error::refused(libc::ENOTSOCK, message)
        };
        let kind = getsockopt(fd, sockopt::SockType).map_err(|_| wrong("is not a socket"))?;
        let address = getsockname::<SockaddrStorage>(number);
        let family = address.ok().and_then(|address| address.family());
        if family != Some(AddressFamily::Unix) {
            return Err(wrong("is a socket, but not a UNIX socket"));
        }
        let listens = getsockopt(fd, sockopt::AcceptConn).unwrap_or(false);
        match (kind, listens) {
            (SockType::Stream, true) => Ok(Self::Listening),
            (SockType::Stream, false) => Ok(Self::Connected),
            (SockType::SeqPacket, false) => Ok(Self::Supervised),
            _ => Err(wrong(
                "is a UNIX socket, but neither a stream nor that of a supervisor",
            )),
        }
    }
}

/// Makes sure that nothing is at `path`, or refuses.
fn remove_stale(path: &Path) -> Result<()> {
    let refused = |errno, what: &str| {
        let message = format!("{} {what}", path.display());
        Err(Error::refused(errno, message))
    };
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|error| Error::io(format!("looking at {}", path.display()), error)),
    }?;
    if !found.file_type().is_socket() {
        return refused(libc::EEXIST, "is there already, and is not a socket");
    }
    match connects(path) {
        Err(Number::ECONNREFUSED) => {
            log::info!(
                "{}: nobody listens to it any more, replaced",
                path.display()
            );
            fs::remove_file(path)
                .map_err(|error| Error::io(format!("removing {}", path.display()), error))
        }
        Ok(()) | Err(Number::EAGAIN) => refused(
            libc::EADDRINUSE,
            "is a socket that another process listens to",
        ),
        Err(errno) => Err(Error::io(
            format!("looking who listens to {}", path.display()),
            errno,
        )),
    }
}

/// Whether somebody listens, without waiting for him.
fn connects(path: &Path) -> Result<(), Number> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

/// Locks the directory of a file, if that can be: nobody is waited for.
fn lock_directory(path: &Path) -> Option<Flock<File>> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(directory.unwrap_or(Path::new(".")));
    Flock::lock(directory.ok()?, FlockArg::LockExclusiveNonblock).ok()
}
