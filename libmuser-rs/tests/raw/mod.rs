// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client that sends whatever bytes a test wants, and a server on a socket for it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use libmuser::transport::{ListenOptions, SocketTransport};
use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::{put, Command, Header, Kind, HEADER};
use libmuser::{Bus, Device, Ended, PciModel, Result, Server};
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};
use zerocopy::{FromBytes, IntoBytes};

/// Long enough for anything that is going to happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A message that has come.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// Whether it is a reply without an error, and to what.
    pub(crate) fn result(&self) -> Result<(), i32> {
        match self.header.kind().unwrap() {
            Kind::Reply(result) => result.map_err(|errno| errno.number()),
            Kind::Command { .. } => panic!("it is a command: {:?}", self.header),
        }
    }

    pub(crate) fn fixed<T: FromBytes>(&self) -> T {
        payload::take(&self.payload).unwrap().0
    }

    pub(crate) fn rest<T: FromBytes>(&self) -> &[u8] {
        payload::take::<T>(&self.payload).unwrap().1
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct RawClient {
    pub(crate) socket: UnixStream,
    next: u16,
}

impl RawClient {
    pub(crate) fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        Self { socket, next: 1 }
    }

    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights: &[_] = if fds.is_empty() { &[] } else { &rights };
        let mut sent = 0;
        while sent < bytes.len() {
            let rights = if sent == 0 { rights } else { &[] };
            let rest = [IoSlice::new(&bytes[sent..])];
            let fd = self.socket.as_raw_fd();
            sent += sendmsg::<()>(fd, &rest, rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
        }
    }

    /// Sends, unless the connection is closed already; tells whether it has.
    pub(crate) fn try_send(&self, bytes: &[u8]) -> bool {
        (&self.socket).write_all(bytes).is_ok()
    }

    /// Sends with descriptors, unless the connection is closed already or takes no more.
    pub(crate) fn try_send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let bytes = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(self.socket.as_raw_fd(), &bytes, &rights, flags, None).is_ok()
    }

    /// Sends a command; tells its id.
    pub(crate) fn send(&mut self, command: Command, parts: &[&[u8]]) -> u16 {
        self.send_with(command, parts, &[])
    }

    pub(crate) fn send_with(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> u16 {
        let header = self.header(command);
        self.send_message(header, parts, fds);
        header.id
    }

    pub(crate) fn header(&mut self, command: Command) -> Header {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        Header::command(id, command)
    }

    pub(crate) fn send_message(&self, header: Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::new();
        put(&mut bytes, header, parts).unwrap();
        self.send_bytes(&bytes, fds);
    }

    /// The next message.
    pub(crate) fn receive(&self) -> Message {
        self.try_receive().expect("the connection was closed")
    }

    /// The next message; none if the connection was closed.
    pub(crate) fn try_receive(&self) -> Option<Message> {
        let mut header = [0; HEADER];
        let fds = self.receive_start(&mut header)?;
        let header = Header::parse(&header).unwrap();
        let mut payload = vec![0; header.size as usize - HEADER];
        (&self.socket).read_exact(&mut payload).unwrap();
        Some(Message {
            header,
            payload,
            fds,
        })
    }

    fn receive_start(&self, bytes: &mut [u8]) -> Option<Vec<OwnedFd>> {
        let mut fds = Vec::new();
        let mut had = 0;
        while had < bytes.len() {
            let mut space = nix::cmsg_space!([RawFd; 253]);
            let mut slice = [IoSliceMut::new(&mut bytes[had..])];
            let fd = self.socket.as_raw_fd();
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = match recvmsg::<()>(fd, &mut slice, Some(&mut space), flags) {
                Ok(received) => received,
                Err(nix::errno::Errno::ECONNRESET) => return None,
                Err(error) => panic!("nothing came: {error}"),
            };
            for message in received.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(numbers) = message {
                    // SAFETY: The kernel has opened them for this call.
                    let owned = numbers
                        .into_iter()
                        .map(|number| unsafe { OwnedFd::from_raw_fd(number) });
                    fds.extend(owned);
                }
            }
            if received.bytes == 0 {
                assert_eq!(had, 0, "closed in a message");
                return None;
            }
            had += received.bytes;
        }
        Some(fds)
    }

    /// Sends a command and waits for its reply.
    pub(crate) fn call(&mut self, command: Command, parts: &[&[u8]]) -> Message {
        self.call_with(command, parts, &[])
    }

    pub(crate) fn call_with(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Message {
        let id = self.send_with(command, parts, fds);
        let reply = self.receive();
        assert_eq!(reply.header.id, id, "{reply:?}");
        assert_eq!(reply.header.command, command.number());
        reply
    }

    /// Agrees upon a version, as QEMU does.
    pub(crate) fn negotiate(&mut self) -> Message {
        self.negotiate_with(
            r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"pgsizes":4096,
            "max_dma_maps":65535,"migration":{"pgsize":4096,"max_bitmap_size":268435456},
            "write_multiple":true}}"#,
        )
    }

    pub(crate) fn negotiate_with(&mut self, capabilities: &str) -> Message {
        let version = payload::Version::default();
        let data = [capabilities.as_bytes(), &[0]].concat();
        let reply = self.call(Command::Version, &[version.as_bytes(), &data]);
        assert_eq!(reply.result(), Ok(()));
        reply
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, i32> {
        let access = payload::RegionAccess {
            offset,
            region,
            count,
        };
        let reply = self.call(Command::RegionRead, &[access.as_bytes()]);
        reply.result()?;
        let said: payload::RegionAccess = reply.fixed();
        let data = reply.rest::<payload::RegionAccess>();
        assert_eq!(said.count as usize, data.len());
        assert_eq!((said.offset, said.region), (offset, region));
        Ok(data.to_vec())
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let access = access(region, offset, data.len());
        let reply = self.call(Command::RegionWrite, &[access.as_bytes(), data]);
        reply.result()?;
        assert!(reply.rest::<payload::RegionAccess>().is_empty());
        Ok(reply.fixed::<payload::RegionAccess>().count)
    }

    /// Writes without waiting for a reply.
    pub(crate) fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let header = self.header(Command::RegionWrite).unanswered();
        let access = access(region, offset, data.len());
        self.send_message(header, &[access.as_bytes(), data], &[]);
    }

    pub(crate) fn set_irqs(
        &mut self,
        flags: u32,
        (index, start, count): (u32, u32, u32),
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), i32> {
        let set = payload::IrqSet {
            argsz: u32::try_from(20 + data.len()).unwrap(),
            flags,
            index,
            start,
            count,
        };
        self.call_with(Command::DeviceSetIrqs, &[set.as_bytes(), data], fds)
            .result()
    }

    pub(crate) fn dma_map(
        &mut self,
        address: u64,
        size: u64,
        flags: u32,
        file: Option<(&File, u64)>,
    ) -> Result<(), i32> {
        let map = payload::DmaMap {
            argsz: 32,
            flags,
            offset: file.map_or(0, |(_, offset)| offset),
            address,
            size,
        };
        let fds: Vec<_> = file.iter().map(|(file, _)| file.as_fd()).collect();
        self.call_with(Command::DmaMap, &[map.as_bytes()], &fds)
            .result()
    }

    pub(crate) fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), i32> {
        let unmap = payload::DmaUnmap {
            argsz: 24,
            flags: 0,
            address,
            size,
        };
        let reply = self.call(Command::DmaUnmap, &[unmap.as_bytes()]);
        reply.result()?;
        assert_eq!(reply.payload, unmap.as_bytes());
        Ok(())
    }

    pub(crate) fn reset(&mut self) -> Result<(), i32> {
        self.call(Command::DeviceReset, &[]).result()
    }

    /// Waits until the other side has closed the connection; messages that come are dropped.
    pub(crate) fn wait_closed(&self) {
        let mut buffer = [0; 4096];
        loop {
            match (&self.socket).read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("it was not closed: {error}"),
            }
        }
    }
}

pub(crate) fn access(region: u32, offset: u64, count: usize) -> payload::RegionAccess {
    payload::RegionAccess {
        offset,
        region,
        count: u32::try_from(count).unwrap(),
    }
}

/// A file of memory, which is zeroes.
pub(crate) fn memfd(size: u64) -> File {
    let file = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let file = File::from(file.unwrap());
    file.set_len(size).unwrap();
    file
}

/// A directory that goes with its last user.
#[derive(Debug)]
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = format!("muser-socket-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server on a socket, in a thread of its own.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) directory: Directory,
    pub(crate) path: PathBuf,
    pub(crate) ended: Receiver<Result<Ended>>,
    pub(crate) stop: libmuser::Stop,
}

impl Listening {
    pub(crate) fn start<D: Device + Send + 'static>(
        model: PciModel,
        device: impl FnOnce(&Bus) -> Result<D> + Send + 'static,
    ) -> Self {
        let directory = Directory::new();
        let path = directory.0.join("socket");
        let transport = SocketTransport::listen(&path, ListenOptions::new()).unwrap();
        let mut server = Server::new(model, transport, device).unwrap();
        let stop = libmuser::Stop::new().unwrap();
        let stopped = stop.clone();
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || {
            let result = server.run_until(&stopped);
            drop(server);
            sender.send(result)
        });
        Self {
            directory,
            path,
            ended,
            stop,
        }
    }

    pub(crate) fn connect(&self) -> RawClient {
        RawClient::new(UnixStream::connect(&self.path).unwrap())
    }

    /// A client that has agreed upon a version.
    pub(crate) fn client(&self) -> RawClient {
        let mut client = self.connect();
        client.negotiate();
        client
    }

    /// How the server ended.
    pub(crate) fn wait(&self) -> Result<Ended> {
        match self.ended.recv_timeout(DEADLINE) {
            Ok(ended) => ended,
            Err(RecvTimeoutError::Timeout) => panic!("the server did not end"),
            Err(RecvTimeoutError::Disconnected) => panic!("the server's thread panicked"),
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.stop();
    }
}
