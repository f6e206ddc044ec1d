// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server's stream: a client that says anything, with descriptors of every kind.
//!
//! One thread plays both sides. The hostile client says a part, the server does what it can without
//! waiting, and so on until the client hangs up. What came back must be messages; then the server
//! serves a client that knows how to behave, whose device is as after power-on, and nothing of the
//! hostile one's is left in the process.

use std::cell::RefCell;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use libmuser::transport::SocketTransport;
use libmuser::Server;

use crate::descriptors::{self, Kinds};
use crate::socket::send;
use crate::Input;

mod client;
mod device;
mod message;

use client::Client;
use device::Prober;

/// What a hostile client does next.
#[derive(Debug)]
enum Action<'a> {
    /// Says what a good client begins with.
    Negotiate,
    /// Says a message that is shaped like one.
    Message,
    /// Says these bytes.
    Raw(&'a [u8]),
    /// Says nothing, and lets the server work.
    Wait,
    /// Takes back some of the memory that it has given.
    Cut,
}

impl<'a> Action<'a> {
    fn take(input: &mut Input<'a>) -> Self {
        match input.below(16) {
            0 => {
                let len = usize::from(input.u8());
                Self::Raw(input.bytes(len))
            }
            1 | 2 => Self::Wait,
            3 => Self::Cut,
            4 => Self::Negotiate,
            _ => Self::Message,
        }
    }
}

/// Has a client say what the input says.
///
/// # Panics
///
/// The server ends, does not serve the next client, or something is left behind.
pub fn run(data: &[u8]) {
    let kinds = Kinds::new();
    // What is made once is made before it is counted.
    once();
    let before = descriptors::open_count();
    serve(&mut Input::new(data), &kinds);
    assert_eq!(descriptors::open_count(), before, "descriptors stay open");
}

fn once() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| serve(&mut Input::new(&[4, 0]), &Kinds::new()));
}

/// A listening socket without a file.
fn listener() -> (UnixListener, SocketAddr) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("muser-fuzz-{}-{count}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).expect("a name is short");
    let listener = UnixListener::bind_addr(&address).expect("nobody has the name");
    (listener, address)
}

fn serve(input: &mut Input<'_>, kinds: &Kinds) {
    let (listener, address) = listener();
    let transport = SocketTransport::from_fd(OwnedFd::from(listener)).expect("it listens");
    let mut server = Server::new(device::model(), transport, Prober::new).expect("it is served");
    // Memory that is reached by messages is waited for, so there is nobody who would answer: then
    // all is said before the server begins.
    let at_once = input.flag();
    let hostile = Hostile::new(UnixStream::connect_addr(&address).expect("it listens"));
    while !input.is_empty() {
        hostile.act(input, kinds);
        if !at_once {
            work(&mut server);
            hostile.listen();
        }
    }
    hostile.hang_up();
    work(&mut server);
    hostile.listen();
    hostile.check();
    drop(hostile);
    work(&mut server);
    let mut good = Client::connect(&address, || work(&mut server));
    good.check();
    drop(good);
    work(&mut server);
}

/// Lets the server do all that it can.
fn work(server: &mut Server<Prober>) {
    // Every step of its own takes something away.
    for _ in 0..100_000 {
        if !server.process().expect("the server goes on") {
            return;
        }
    }
    panic!("the server works without end");
}

/// A client that can say anything.
#[derive(Debug)]
struct Hostile {
    socket: UnixStream,
    heard: RefCell<Vec<u8>>,
}

impl Hostile {
    fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket can be");
        Self {
            socket,
            heard: RefCell::default(),
        }
    }

    fn act(&self, input: &mut Input<'_>, kinds: &Kinds) {
        match Action::take(input) {
            Action::Negotiate => self.say(&client::version(), &[]),
            Action::Message => {
                let message = message::take(input);
                let descriptors = kinds.take(input);
                self.say(&message, &descriptors);
            }
            Action::Raw(bytes) => {
                let descriptors = kinds.take(input);
                self.say(bytes, &descriptors);
            }
            Action::Wait => {}
            Action::Cut => kinds.cut(),
        }
    }

    /// What the socket does not take is not said.
    fn say(&self, bytes: &[u8], descriptors: &[std::os::fd::RawFd]) {
        let _ = send(&self.socket, bytes, descriptors);
    }

    fn hang_up(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Hears what there is.
    fn listen(&self) {
        let mut buffer = [0; 4096];
        while let Ok(count) = (&self.socket).read(&mut buffer) {
            if count == 0 {
                break;
            }
            self.heard.borrow_mut().extend_from_slice(&buffer[..count]);
        }
    }

    /// What was heard are messages, and such as a server sends.
    fn check(&self) {
        let heard = self.heard.borrow();
        let mut rest = heard.as_slice();
        while !rest.is_empty() {
            let (header, _) = rest.split_first_chunk::<16>().expect("a header is whole");
            let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
            let command = u16::from_ne_bytes([header[2], header[3]]);
            let (size, flags) = (word(4), word(8));
            // DMA_READ and DMA_WRITE are the server's own.
            let own = flags & 0xf == 0 && matches!(command, 11 | 12);
            let failed = flags & 0x21 == 0x21 && (1..4096).contains(&word(12)) && size == 16;
            let done = flags & 0x21 == 1;
            assert!(own || failed || done, "it sends {header:x?}");
            let size = usize::try_from(size).expect("it fits");
            rest = rest.get(size.max(16)..).expect("a message is whole");
        }
    }
}
