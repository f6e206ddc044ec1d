// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vfio-user server that answers as it is told to: well by default, and as badly as a test wants.
//! It shares no code with the library.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libmuser::client::{Client, Options};
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};

pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const REGION_INFO: u16 = 5;
pub(crate) const IO_FDS: u16 = 6;
pub(crate) const IRQ_INFO: u16 = 7;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const DMA_READ: u16 = 11;
pub(crate) const DMA_WRITE: u16 = 12;
pub(crate) const RESET: u16 = 13;
pub(crate) const WRITE_MULTI: u16 = 15;
pub(crate) const FEATURE: u16 = 16;

/// Long enough for anything that is going to happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// Short enough to wait for what is not going to happen.
pub(crate) const SHORT: Duration = Duration::from_millis(60);

/// A command that a client has sent.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) id: u16,
    pub(crate) command: u16,
    pub(crate) flags: u32,
    pub(crate) body: Vec<u8>,
}

/// What the server does about it.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Closes the connection then.
    pub(crate) close: bool,
}

impl Answer {
    pub(crate) fn bytes(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }

    /// None at all.
    pub(crate) fn silence() -> Self {
        Self::default()
    }

    pub(crate) fn with(self, fds: Vec<OwnedFd>) -> Self {
        Self { fds, ..self }
    }

    pub(crate) fn and_close(self) -> Self {
        Self {
            close: true,
            ..self
        }
    }
}

/// A message.
pub(crate) fn message(id: u16, command: u16, flags: u32, error: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend(u32::try_from(16 + body.len()).unwrap().to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(error.to_ne_bytes());
    bytes.extend(body);
    bytes
}

/// The reply to a command.
pub(crate) fn reply(asked: &Asked, body: &[u8]) -> Answer {
    Answer::bytes(message(asked.id, asked.command, 1, 0, body))
}

/// The reply which says that it failed.
pub(crate) fn error(asked: &Asked, errno: u32) -> Answer {
    Answer::bytes(message(asked.id, asked.command, 0x21, errno, &[]))
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

pub(crate) fn word(body: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(body[offset..offset + 4].try_into().unwrap())
}

pub(crate) fn long(body: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(body[offset..offset + 8].try_into().unwrap())
}

pub(crate) fn version(json: &str) -> Vec<u8> {
    [&[0, 0, 1, 0], json.as_bytes(), &[0]].concat()
}

pub(crate) fn memfd(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("script", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file.into()
}

/// Payload of what is known of region 0: readable, writable, with these areas.
pub(crate) fn region_info(size: u64, areas: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(areas.len()).unwrap();
    let mut body = words(&[32 + 16 + 16 * count, 0xf, 0, 32]);
    body.extend(longs(&[size, 0]));
    body.extend([1, 0, 1, 0]);
    body.extend(words(&[0, count, 0]));
    for (offset, size) in areas {
        body.extend(longs(&[*offset, *size]));
    }
    body
}

/// How a server answers that does nothing wrong. Its device has two regions, of which the first has
/// an area to map, and an interrupt index of 4 vectors. Regions read as their offsets.
pub(crate) fn good(asked: &Asked) -> Answer {
    let body = &asked.body;
    match asked.command {
        VERSION => reply(
            asked,
            &version(r#"{"capabilities":{"max_msg_fds":2,"write_multiple":true}}"#),
        ),
        GET_INFO => reply(asked, &words(&[16, 3, 2, 1])),
        REGION_INFO => match (word(body, 8), word(body, 0)) {
            (0, argsz) => {
                let info = region_info(0x3000, &[(0x1000, 0x1000)]);
                let shown = info.len().min(argsz as usize);
                reply(asked, &info[..shown]).with(vec![memfd(0x3000)])
            }
            (_, _) => {
                let info = [words(&[32, 3, 1, 0]), longs(&[256, 0])].concat();
                reply(asked, &info)
            }
        },
        IRQ_INFO => reply(asked, &words(&[16, 3, 0, 4])),
        IO_FDS => {
            let entry = [longs(&[0x10, 4]), words(&[0, 0, 1, 0]), longs(&[7])].concat();
            let all = [words(&[56, 0, word(body, 8), 1]), entry].concat();
            let shown = all.len().min(word(body, 0) as usize);
            reply(asked, &all[..shown]).with(vec![memfd(1)])
        }
        REGION_READ => {
            let (offset, count) = (long(body, 0), word(body, 12));
            let data = (0..u64::from(count)).map(|at| (offset + at).to_le_bytes()[0]);
            let data: Vec<u8> = data.collect();
            reply(asked, &[&body[..16], &data].concat())
        }
        REGION_WRITE => reply(asked, &body[..16]),
        WRITE_MULTI => reply(asked, &body[..8]),
        DMA_UNMAP if word(body, 4) & 1 != 0 => {
            let bitmap = vec![0xff; usize::try_from(long(body, 32)).unwrap()];
            reply(asked, &[body.as_slice(), &bitmap].concat())
        }
        DMA_UNMAP => reply(asked, body),
        FEATURE if word(body, 4) & 0xffff == 8 => {
            let words = long(body, 16).div_ceil(4096).div_ceil(64);
            let bitmap = longs(&vec![5; usize::try_from(words).unwrap()]);
            reply(asked, &[body.as_slice(), &bitmap].concat())
        }
        FEATURE => reply(asked, body),
        _ => reply(asked, &[]),
    }
}

/// The server's end of a connection.
pub(crate) struct Served {
    thread: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let thread = self.thread.take().unwrap();
        let deadline = Instant::now() + DEADLINE;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        if !std::thread::panicking() {
            assert!(
                thread.is_finished(),
                "the client did not close the connection"
            );
            thread.join().unwrap();
        }
    }
}

/// A socket behind which each command is answered as `script` says, or well where that says nothing.
pub(crate) fn serve(
    mut script: impl FnMut(&UnixStream, &Asked) -> Option<Answer> + Send + 'static,
) -> (OwnedFd, Served) {
    let (client, server) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        while let Some(asked) = receive(&server) {
            // What it says to commands of this side.
            if asked.flags & 0xf == 1 {
                continue;
            }
            let answer = script(&server, &asked);
            let answer = answer.unwrap_or_else(|| match asked.flags & 0x10 {
                0 => good(&asked),
                _ => Answer::silence(),
            });
            if !send(&server, &answer) || answer.close {
                return;
            }
        }
    });
    let served = Served {
        thread: Some(thread),
    };
    (client.into(), served)
}

/// Options of a client that waits for as long as `timeout`.
pub(crate) fn options(timeout: Duration) -> Options {
    Options::new().timeout(timeout)
}

/// A client of a server with such a script. The server is dropped behind it.
pub(crate) fn client(
    timeout: Duration,
    script: impl FnMut(&UnixStream, &Asked) -> Option<Answer> + Send + 'static,
) -> (Client, Served) {
    let (socket, served) = serve(script);
    (options(timeout).open(socket).unwrap(), served)
}

/// The next message; `None` at the end. Descriptors with it are closed.
pub(crate) fn receive(mut stream: &UnixStream) -> Option<Asked> {
    let mut header = [0; 16];
    fill(&mut stream, &mut header)?;
    let mut body = vec![0; word(&header, 4) as usize - 16];
    fill(&mut stream, &mut body)?;
    Some(Asked {
        id: u16::from_ne_bytes([header[0], header[1]]),
        command: u16::from_ne_bytes([header[2], header[3]]),
        flags: word(&header, 8),
        body,
    })
}

fn fill(stream: &mut &UnixStream, to: &mut [u8]) -> Option<()> {
    match stream.read_exact(to) {
        Ok(()) => Some(()),
        Err(error) => {
            let kinds = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
            assert!(kinds.contains(&error.kind()), "{error}");
            None
        }
    }
}

/// Sends; tells whether the client is still there.
fn send(mut stream: &UnixStream, answer: &Answer) -> bool {
    if answer.bytes.is_empty() {
        return true;
    }
    let numbers: Vec<RawFd> = answer.fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights: &[_] = if numbers.is_empty() { &[] } else { &rights };
    let slices = [IoSlice::new(&answer.bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<()>(stream.as_raw_fd(), &slices, rights, flags, None) {
        Ok(sent) => stream.write_all(&answer.bytes[sent..]).is_ok(),
        Err(_) => false,
    }
}
