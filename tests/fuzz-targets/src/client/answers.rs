// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server that answers as an input says: as the specification has it, with a few numbers changed,
//! or with any bytes.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::descriptors::{Kinds, SIZE};
use crate::socket::send;
use crate::Input;

/// The server's end of a connection.
#[derive(Debug)]
pub(super) struct Server<'a> {
    socket: UnixStream,
    /// The other end of a second connection that the client may have, and the client's until then.
    twin: [UnixStream; 2],
    input: Input<'a>,
    kinds: &'a Kinds,
}

/// A command that has come.
#[derive(Debug)]
struct Asked {
    id: u16,
    command: u16,
    flags: u32,
    body: Vec<u8>,
}

impl<'a> Server<'a> {
    pub(super) fn new(socket: UnixStream, input: Input<'a>, kinds: &'a Kinds) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("there is room");
        Self {
            socket,
            twin: [ours, theirs],
            input,
            kinds,
        }
    }

    /// Answers until the input ends, or the client does.
    pub(super) fn serve(mut self) {
        while let Some(asked) = receive(&self.socket) {
            // What it says to commands of this side, and what wants no answer.
            if asked.flags & 0x1f != 0 {
                continue;
            }
            if self.input.is_empty() || !self.answer(&asked) {
                return;
            }
        }
    }

    /// Tells whether the client has taken it.
    fn answer(&mut self, asked: &Asked) -> bool {
        while self.input.below(8) == 7 {
            self.ask();
        }
        let mut body = good(asked);
        let kind = self.input.below(8);
        match kind {
            // Some bytes are others.
            0 | 1 => {
                for _ in 0..=self.input.below(3) {
                    let at = usize::from(self.input.u8());
                    let byte = self.input.u8();
                    if let Some(place) = body.get_mut(at) {
                        *place = byte;
                    }
                }
            }
            // Some are missing, or too many.
            2 => body.truncate(usize::from(self.input.u8())),
            3 => {
                let more = usize::from(self.input.u8());
                body.extend(self.input.bytes(more));
            }
            _ => {}
        }
        let mut message = message(asked.id, asked.command, 1, &body);
        match self.input.below(16) {
            // An error, with a number that may be none.
            0 => {
                message.truncate(16);
                message[4] = 16;
                message[5..8].fill(0);
                message[8] |= 0x20;
                message[12..14].copy_from_slice(&self.input.array::<2>());
            }
            // Anything in the header, and the right answer behind it.
            1 => {
                let right = message.clone();
                message[usize::from(self.input.below(16))] = self.input.u8();
                message.extend(right);
            }
            _ => {}
        }
        let descriptors = self.descriptors(asked);
        let sent = send(&self.socket, &message, &descriptors).unwrap_or(0);
        sent > 0 && (&self.socket).write_all(&message[sent..]).is_ok()
    }

    /// What comes with an answer, as a rule what belongs to it.
    fn descriptors(&mut self, asked: &Asked) -> Vec<RawFd> {
        match self.input.below(4) {
            0 => self.kinds.take(&mut self.input),
            1 => {
                self.kinds.cut();
                Vec::new()
            }
            _ => match asked.command {
                1 => vec![self.twin[1].as_raw_fd()],
                5 => vec![self.kinds.memory()],
                6 => vec![self.kinds.event()],
                _ => Vec::new(),
            },
        }
    }

    /// Asks for memory, as a server does and a client does not; or says something odd.
    fn ask(&mut self) {
        let input = &mut self.input;
        let command = match input.below(8) {
            0 => u16::from(input.u8()),
            1..=4 => 11,
            _ => 12,
        };
        let address = match input.below(4) {
            0 => input.u64(),
            _ => u64::from(input.u16()),
        };
        let count = match input.below(4) {
            0 => input.u64(),
            _ => u64::from(input.u8()),
        };
        let mut body = [address, count].map(u64::to_ne_bytes).concat();
        if command == 12 {
            let len = usize::from(input.u8());
            body.extend(input.bytes(len));
            body.resize(16 + usize::try_from(count.min(256)).unwrap_or(0), 7);
        }
        let message = message(u16::from(input.u8()), command, 0, &body);
        let socket = match input.below(4) {
            0 => &self.twin[0],
            _ => &self.socket,
        };
        // Who does not listen is not asked.
        let _ = send(socket, &message, &[]);
    }
}

fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).expect("it is small");
    let mut message = [id, command].map(u16::to_ne_bytes).concat();
    message.extend([size, flags, 0].map(u32::to_ne_bytes).concat());
    message.extend(body);
    message
}

fn receive(mut socket: &UnixStream) -> Option<Asked> {
    let mut header = [0; 16];
    socket.read_exact(&mut header).ok()?;
    let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let size = word(&header, 4)
        .checked_sub(16)
        .expect("a client's messages are right");
    let mut body = vec![0; usize::try_from(size).ok()?];
    socket.read_exact(&mut body).ok()?;
    Some(Asked {
        id: half(0),
        command: half(2),
        flags: word(&header, 8),
        body,
    })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    u32::from_ne_bytes(word.unwrap_or_default())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let long = bytes.get(at..at + 8).and_then(|long| long.try_into().ok());
    u64::from_ne_bytes(long.unwrap_or_default())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// How a server answers that does nothing wrong. Its device has three regions, of which the first
/// has areas to map, and three interrupt indexes.
fn good(asked: &Asked) -> Vec<u8> {
    let body = &asked.body;
    match asked.command {
        1 => {
            let text = "{\"capabilities\":{\"max_msg_fds\":8,\"write_multiple\":true,\
                 \"twin_socket\":{\"supported\":true,\"fd_index\":0}}}\0";
            [&[0, 0, 1, 0], text.as_bytes()].concat()
        }
        4 => words(&[16, 3, 3, 3]),
        5 => {
            let areas = [0x1000, 0x1000, 0x3000, 0x1000];
            let all = [
                words(&[80, 0xf, word(body, 8), 32]),
                longs(&[SIZE, 0]),
                words(&[0x1_0001, 0, 2, 0]),
                longs(&areas),
            ];
            let mut all = all.concat();
            all.truncate(usize::try_from(word(body, 0)).unwrap_or(0));
            all
        }
        6 => {
            let one = [longs(&[0x10, 4]), words(&[0, 0, 1, 0]), longs(&[7])].concat();
            let mut all = [words(&[56, 0, word(body, 8), 1]), one].concat();
            all.truncate(usize::try_from(word(body, 0)).unwrap_or(0));
            all
        }
        7 => words(&[16, 3, word(body, 8), 4]),
        9 => {
            let count = usize::try_from(word(body, 12).min(4096)).unwrap_or(0);
            [&body[..16], &vec![5; count]].concat()
        }
        10 => body[..16].to_vec(),
        15 => body[..8].to_vec(),
        3 if word(body, 4) & 1 != 0 => {
            let bytes = usize::try_from(long(body, 32).min(4096)).unwrap_or(0);
            [&body[..], &vec![0xa5; bytes]].concat()
        }
        3 => body.clone(),
        16 if word(body, 4) & 0xffff == 8 => {
            let words = long(body, 16).div_ceil(4096).div_ceil(64).min(64);
            [
                &body[..],
                &longs(&vec![5; usize::try_from(words).unwrap_or(0)]),
            ]
            .concat()
        }
        16 => body.clone(),
        _ => Vec::new(),
    }
}
