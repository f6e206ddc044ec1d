// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The first words: connecting, and the version and capabilities which both sides then have.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno as Number;
use nix::sys::socket::{
    connect, getsockopt, socket, sockopt, AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr,
};
use zerocopy::IntoBytes;

use super::connection::{Channel, Connection};
use super::failure::{self, Failure};
use super::Options;
use crate::error::{Error, Result};
use crate::vfio_user::capabilities::{Capabilities, TwinSocket};
use crate::vfio_user::stream::{
    self, drain, Descriptors, Limits, Progress, Ready, Receiver, Sender, StreamError,
};
use crate::vfio_user::wire::payload::Version as FixedVersion;
use crate::vfio_user::wire::request::Version;
use crate::vfio_user::wire::{self, Command, Header, Kind, MAJOR, MINOR};

/// Bytes that are kept for a server which does not receive, before whoever sends waits.
const BACKLOG: usize = 1 << 20;
/// The time between two attempts to connect to a server that is busy with other connections.
const BUSY: Duration = Duration::from_millis(2);

/// What both sides have agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreement {
    pub(super) minor: u16,
    /// What the server can.
    pub(super) server: Capabilities,
    /// Bytes of data in one message, either way.
    pub(super) data: usize,
}

/// Connects to a server that listens at a path.
pub(super) fn connect_to(path: &Path, timeout: Duration) -> Result<OwnedFd> {
    let failed = |errno: Number| Error::io(format!("connecting to {}", path.display()), errno);
    let deadline = Instant::now().checked_add(timeout);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
    let address = UnixAddr::new(path).map_err(failed)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(socket),
            Err(Number::EINTR) => {}
            // The server's queue of connections is full, and nothing says when it is no more.
            Err(Number::EAGAIN) if deadline.is_none_or(|at| Instant::now() < at) => {
                std::thread::sleep(BUSY);
            }
            Err(Number::EAGAIN) => {
                return Err(Error::timed_out(format!(
                    "connecting to {}: the server has not accepted in {timeout:?}",
                    path.display()
                )));
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Makes a connection of a connected socket: proposes a version, and checks what the server makes of
/// it.
pub(super) fn negotiate(
    socket: OwnedFd,
    options: &Options,
    deadline: Option<Instant>,
) -> Result<(Connection, Agreement)> {
    check_socket(&socket).map_err(|what| Error::io(what, Number::EINVAL))?;
    let limits = Limits {
        message: wire::max_message(options.max_data),
        descriptors: options.max_descriptors,
        prefix: 0,
        backlog: BACKLOG,
    };
    let (mut sender, mut receiver) = stream::split(socket, limits);
    let late = || failure::late(Command::Version, options.timeout);

    propose(&mut sender, options)?;
    let sender = std::sync::Mutex::new(sender);
    let ignore = || Ok::<_, Failure>(());
    if !drain(&sender, deadline, ignore).map_err(|failure| failure.to_error())? {
        return Err(late());
    }
    let sender = sender
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let (payload, descriptors) = receive(&mut receiver, deadline)?.ok_or_else(late)?;
    let (agreement, twin) = agree(&payload, descriptors, options)?;

    let main = Channel::new(sender, receiver);
    let twin = twin.map(|twin| {
        let (sender, receiver) = stream::split(twin, limits);
        Channel::new(sender, receiver)
    });
    let connection = Connection::new(main, twin, options.max_data, options.timeout, deadline)?;
    Ok((connection, agreement))
}

/// Says what this side can.
fn propose(sender: &mut Sender, options: &Options) -> Result<()> {
    let fixed = FixedVersion {
        major: MAJOR,
        minor: MINOR,
    };
    let capabilities = Capabilities {
        max_msg_fds: Some(options.max_descriptors as u64),
        max_data_xfer_size: Some(options.max_data as u64),
        max_dma_maps: Some(wire::DEFAULT_DMA_MAPS),
        pgsizes: Some(wire::DEFAULT_PAGE_SIZES),
        twin_socket: options.twin_socket.then_some(TwinSocket {
            supported: true,
            fd_index: None,
        }),
        write_multiple: Some(true),
        ..Capabilities::default()
    };
    let mut message = Vec::new();
    let header = Header::command(0, Command::Version);
    wire::put(
        &mut message,
        header,
        &[fixed.as_bytes(), &capabilities.to_data()],
    )?;
    match sender.send(&[&message], &[]) {
        Ok(Progress::Sent | Progress::Kept | Progress::Full) => Ok(()),
        Err(error) => Err(Failure::from(error).to_error()),
    }
}

/// The payload of the reply, with its descriptors; `None` if the deadline has passed.
fn receive(
    receiver: &mut Receiver,
    deadline: Option<Instant>,
) -> Result<Option<(Vec<u8>, Descriptors)>> {
    let failed = |error: StreamError| Failure::from(error).to_error();
    let wanted = Ready {
        receive: true,
        send: false,
    };
    loop {
        if let Some(message) = receiver.receive().map_err(failed)? {
            let payload = check(message.header(), message.body())?.to_vec();
            return Ok(Some((payload, message.descriptors)));
        }
        if !stream::wait(receiver.as_fd(), wanted, deadline)
            .map_err(failed)?
            .receive
        {
            return Ok(None);
        }
    }
}

/// Checks that a message is the reply to the proposal.
fn check<'a>(header: &[u8], body: &'a [u8]) -> Result<&'a [u8]> {
    let wrong = |what: String| failure::wrong(Command::Version, what);
    let header = Header::parse(header).ok_or_else(|| wrong("it has no header".into()))?;
    let (id, command) = (header.id, header.command);
    if (id, command) != (0, Command::Version.number()) {
        return Err(wrong(format!(
            "id 0 of command 1 was expected, and id {id} of command {command} came"
        )));
    }
    match header.kind() {
        Ok(Kind::Reply(Ok(()))) => Ok(body),
        Ok(Kind::Reply(Err(errno))) => Err(failure::refused(Command::Version, errno)),
        Ok(Kind::Command { .. }) => Err(wrong("a command came instead".into())),
        Err(malformed) => Err(wrong(malformed.to_string())),
    }
}

/// Checks what the server says, and finds the twin socket.
fn agree(
    payload: &[u8],
    descriptors: Descriptors,
    options: &Options,
) -> Result<(Agreement, Option<OwnedFd>)> {
    let wrong = |what: String| failure::wrong(Command::Version, what);
    let version = Version::parse(payload).map_err(|malformed| wrong(malformed.to_string()))?;
    let (major, minor) = (version.major, version.minor);
    if major != MAJOR || minor > MINOR {
        return Err(wrong(format!(
            "version {MAJOR}.{MINOR} was proposed, and {major}.{minor} came"
        )));
    }
    let server = Capabilities::parse(version.data).map_err(|error| wrong(error.to_string()))?;
    let agreement = Agreement {
        minor,
        server,
        data: server.data().min(options.max_data),
    };
    if !server.has_twin_socket() {
        return Ok((agreement, None));
    }
    if !options.twin_socket {
        return Err(wrong("it has a twin socket, for which nobody asked".into()));
    }
    let index = server.twin_socket.and_then(|twin| twin.fd_index);
    let index = index.ok_or_else(|| wrong("it has a twin socket without fd_index".into()))?;
    let count = descriptors.kept().len();
    let twin = usize::try_from(index)
        .ok()
        .and_then(|index| descriptors.into_kept().into_iter().nth(index));
    let twin = twin.ok_or_else(|| {
        wrong(format!(
            "the twin socket is descriptor {index}, and {count} came"
        ))
    })?;
    check_socket(&twin).map_err(|what| wrong(format!("the twin socket: {what}")))?;
    Ok((agreement, Some(twin)))
}

/// Checks that a descriptor is a connected UNIX stream socket.
fn check_socket(socket: &OwnedFd) -> Result<(), &'static str> {
    let kind = getsockopt(&socket.as_fd(), sockopt::SockType);
    if kind != Ok(SockType::Stream) {
        return Err("the descriptor is not a stream socket");
    }
    let address =
        nix::sys::socket::getpeername::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd());
    match address.map(|address| address.family()) {
        Ok(Some(AddressFamily::Unix)) => Ok(()),
        _ => Err("the descriptor is not a connected UNIX socket"),
    }
}
