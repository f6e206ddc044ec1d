// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client that behaves, by hand from the specification: what a server must still do for it.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixStream};

use nix::sys::memfd::{memfd_create, MFdFlags};

use super::device;
use crate::socket::send;

/// A connection, and what lets the server work.
pub(super) struct Client<W> {
    socket: UnixStream,
    work: W,
    id: u16,
}

fn message(id: u16, command: u16, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + payload.len()).expect("it is small");
    let mut message = Vec::new();
    message.extend(id.to_ne_bytes());
    message.extend(command.to_ne_bytes());
    message.extend(size.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(payload);
    message
}

/// The first message of a client.
pub(super) fn version() -> Vec<u8> {
    let capabilities = "{\"capabilities\":{\"max_msg_fds\":8,\"write_multiple\":true}}\0";
    message(0, 1, &[&[0; 4], capabilities.as_bytes()].concat())
}

impl<W: FnMut()> Client<W> {
    pub(super) fn connect(address: &SocketAddr, mut work: W) -> Self {
        let socket = UnixStream::connect_addr(address).expect("the server listens");
        socket.set_nonblocking(true).expect("a socket can be");
        work();
        Self {
            socket,
            work,
            id: 0,
        }
    }

    /// Uses what the server offers; its device has forgotten what others did to it.
    pub(super) fn check(&mut self) {
        let sent = send(&self.socket, &version(), &[]);
        assert!(sent.is_ok(), "the server takes no version: {sent:?}");
        self.reply(0, 1).expect("a version is agreed upon");
        let [vendor, device] = device::IDS.map(u16::to_ne_bytes);
        assert_eq!(self.read(7, 0, 4), [vendor, device].concat());
        assert_eq!(self.read(7, 4, 2), [0; 2], "the command register is reset");
        assert_eq!(self.read(0, device::SCRATCH, 8), [0; 8]);
        assert_eq!(self.read(0, 0x1000, 8), [0; 8], "its memory is zeroes");
        self.write(0, device::SCRATCH, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(self.read(0, device::SCRATCH, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
        self.check_dma();
    }

    fn check_dma(&mut self) {
        const AT: u64 = 0x10_0000;
        let file = memfd_create("good", MFdFlags::MFD_CLOEXEC).expect("there is room");
        let file = File::from(file);
        file.set_len(0x1000).expect("there is room");
        file.write_all_at(b"in order", 8).expect("it is there");
        let sizes = [0, AT, 0x1000].map(u64::to_ne_bytes).concat();
        let map = [[32_u32, 3].map(u32::to_ne_bytes).concat(), sizes].concat();
        self.call(2, &map, &[file.as_raw_fd()])
            .expect("memory is taken");
        // Memory is reached by bus masters only.
        self.write(7, 4, &[4, 0]);
        self.write(0, device::IOVA, &(AT + 8).to_ne_bytes());
        assert_eq!(self.read(0, device::DATA, 8), b"in order");
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let access = access(region, offset, count);
        let reply = self.call(9, &access, &[]).expect("a read succeeds");
        reply[16..].to_vec()
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let count = u32::try_from(data.len()).expect("it is small");
        let access = [access(region, offset, count), data.to_vec()].concat();
        self.call(10, &access, &[]).expect("a write succeeds");
    }

    fn call(&mut self, command: u16, payload: &[u8], fds: &[RawFd]) -> Result<Vec<u8>, u32> {
        self.id += 1;
        let sent = send(&self.socket, &message(self.id, command, payload), fds);
        assert!(sent.is_ok(), "the server does not listen: {sent:?}");
        self.reply(self.id, command)
    }

    /// The payload of the reply, which must come next.
    fn reply(&mut self, id: u16, command: u16) -> Result<Vec<u8>, u32> {
        (self.work)();
        let header: [u8; 16] = self.receive(16).try_into().expect("so many were asked for");
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four"));
        let half = |at: usize| u16::from_ne_bytes(header[at..at + 2].try_into().expect("two"));
        assert_eq!((half(0), half(2)), (id, command));
        assert_eq!(word(8) & 0xf, 1, "it is a reply");
        let size = usize::try_from(word(4)).expect("it fits");
        let payload = self.receive(size.checked_sub(16).expect("it has a header"));
        if word(8) & 0x20 != 0 {
            return Err(word(12));
        }
        Ok(payload)
    }

    fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let mut had = 0;
        while had < count {
            match (&self.socket).read(&mut bytes[had..]) {
                Ok(0) => panic!("a client that behaves was turned away"),
                Ok(read) => had += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("a client that behaves has no answer: {error}"),
            }
        }
        bytes
    }
}

fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let fields = [region, count].map(u32::to_ne_bytes).concat();
    [offset.to_ne_bytes().to_vec(), fields].concat()
}
