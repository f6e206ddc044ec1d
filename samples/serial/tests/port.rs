// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The port as a driver sees it, over the memory transport, with each kind of line.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libmuser::transport::memory::{Client, Host, IrqAction, IrqData};
use libmuser::{Ended, Moment, Server, Stop};
use nix::poll::{PollFd, PollFlags};
use serial::line::{End, Line, Pty, Socket};
use serial::Serial;

const DEADLINE: Duration = Duration::from_secs(20);
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

/// A port whose server is started again whenever it dies.
struct Port {
    client: Client,
    host: Host,
    stop: Stop,
    serving: Option<JoinHandle<()>>,
    fired: mpsc::Receiver<()>,
}

impl Port {
    fn new(mut line: impl FnMut() -> Line + Send + 'static) -> Self {
        let (stop, host) = (Stop::new().unwrap(), Host::new().unwrap());
        let (again, stopped) = (host.clone(), stop.clone());
        let (sender, served) = mpsc::channel();
        let serving = thread::spawn(move || loop {
            let model = serial::model().unwrap();
            let line = line();
            let server = Server::new(model, again.transport(), |bus| Serial::new(bus, line));
            let mut server = server.unwrap();
            // Nobody listens after the first time.
            let _ = sender.send(());
            if server.run_until(&stopped).unwrap() != Ended::Abandoned {
                break;
            }
        });
        served.recv_timeout(DEADLINE).unwrap();
        let client = host.open().unwrap();
        let (sender, fired) = mpsc::channel();
        let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            // The test may be over.
            let _ = sender.send(());
        });
        let calls = IrqData::Calls(vec![Some(call)]);
        client.set_irqs(0, 0, IrqAction::Trigger, calls).unwrap();
        Self {
            client,
            host,
            stop,
            serving: Some(serving),
            fired,
        }
    }

    fn read(&self, register: u64) -> u8 {
        let mut byte = [0];
        self.client.read(0, register, &mut byte).unwrap();
        byte[0]
    }

    fn write(&self, register: u64, value: u8) {
        self.client.write(0, register, &[value]).unwrap();
    }

    /// Waits for a register to be so.
    fn wait(&self, register: u64, mask: u8, value: u8) {
        let end = Instant::now() + DEADLINE;
        while self.read(register) & mask != value {
            assert!(Instant::now() < end, "{register}: {value:#x}");
            thread::yield_now();
        }
    }

    /// Waits for an interrupt; its cause.
    fn interrupt(&self) -> u8 {
        self.fired.recv_timeout(DEADLINE).unwrap();
        let cause = self.read(IIR) & 0x0f;
        let unmask = IrqData::None(1);
        self.client
            .set_irqs(0, 0, IrqAction::Unmask, unmask)
            .unwrap();
        cause
    }

    fn send(&self, bytes: &[u8]) {
        for part in bytes.chunks(16) {
            self.wait(LSR, 0x20, 0x20);
            for byte in part {
                self.write(DATA, *byte);
            }
        }
    }

    fn receive(&self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            self.wait(LSR, 1, 1);
            bytes.push(self.read(DATA));
        }
        bytes
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.serving.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
        self.host.remove();
    }
}

/// The end of a wire that outlives servers.
struct Wire(UnixStream);

impl Wire {
    /// A port at one end, and the other end.
    fn port() -> (Port, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        far.set_write_timeout(Some(DEADLINE)).unwrap();
        let line = move || Line::new(Self(near.try_clone().unwrap()));
        (Port::new(line), far)
    }
}

impl End for Wire {
    fn is_joined(&self) -> bool {
        true
    }

    fn wanted(&self, input: bool, output: bool) -> Vec<PollFd<'_>> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, input);
        flags.set(PollFlags::POLLOUT, output);
        vec![PollFd::new(self.0.as_fd(), flags)]
    }

    fn read(&mut self, to: &mut [u8]) -> usize {
        self.0.read(to).unwrap_or(0)
    }

    fn write(&mut self, from: &[u8]) -> usize {
        self.0.write(from).unwrap_or(0)
    }
}

fn pattern(count: usize) -> Vec<u8> {
    let mut state = 7_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(count).collect()
}

#[test]
fn ids_are_those_that_the_driver_takes_for_one_port() {
    let (port, _far) = Wire::port();
    let mut config = [0; 16];

    port.client.read(7, 0, &mut config).unwrap();

    assert_eq!(config[0..4], [0x36, 0x1b, 0x02, 0x00]);
    // PCI_CLASS_COMMUNICATION_SERIAL, with an interface of not more than 6.
    assert_eq!(config[9..12], [0x02, 0x00, 0x07]);
    assert_eq!(port.client.region(0).unwrap().size, 8);
}

#[test]
fn bytes_go_both_ways_whole_and_in_order() {
    const COUNT: usize = 3000;
    let (port, mut far) = Wire::port();
    port.write(FCR, 0x81);
    let data = pattern(COUNT);
    let mut other = far.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| other.write_all(&data).unwrap());
        let came = scope.spawn(|| {
            let mut came = vec![0; COUNT];
            far.read_exact(&mut came).unwrap();
            came
        });
        port.send(&data);
        assert!(came.join().unwrap() == data);
        assert!(port.receive(COUNT) == data);
    });
    assert_eq!(port.read(LSR) & 0x03, 0);
}

#[test]
fn bytes_wait_in_the_line_while_the_driver_does_not_read() {
    let (port, mut far) = Wire::port();
    port.write(FCR, 0x01);
    let sent = pattern(3000);
    far.write_all(&sent).unwrap();

    port.wait(LSR, 1, 1);
    // Many times as long as it would take to overrun the FIFO.
    for _ in 0..200 {
        assert_eq!(port.read(LSR) & 0x03, 0x01);
    }
    let came = port.receive(sent.len());

    assert!(came == sent);
    assert_eq!(port.read(LSR) & 0x02, 0);
}

#[test]
fn driver_waits_while_nobody_takes_what_it_sends() {
    let (port, mut far) = Wire::port();
    port.write(FCR, 0x01);
    let mut sent = Vec::new();
    // Until the line is full, and stays so for as long as it would take a thousand times.
    let mut idle = 0;
    while idle < 2000 {
        if port.read(LSR) & 0x20 == 0 {
            idle += 1;
            continue;
        }
        idle = 0;
        let byte = u8::try_from(sent.len() / 16 % 251).unwrap();
        for _ in 0..16 {
            port.write(DATA, byte);
            sent.push(byte);
        }
    }

    let mut came = vec![0; sent.len()];
    far.read_exact(&mut came).unwrap();

    assert!(came == sent);
    port.wait(LSR, 0x60, 0x60);
}

#[test]
fn few_bytes_interrupt_by_the_time_out() {
    let (port, mut far) = Wire::port();
    port.write(FCR, 0xc1);
    port.write(IER, 0x01);

    far.write_all(b"ls").unwrap();

    assert_eq!(port.interrupt(), 0x0c);
    assert_eq!(port.receive(2), b"ls");
    assert_eq!(port.read(IIR), 0xc1);
}

#[test]
fn transmitter_interrupts_each_time_it_is_empty() {
    let (port, mut far) = Wire::port();
    port.write(FCR, 0x01);
    port.write(IER, 0x02);
    for round in 0..50 {
        assert_eq!(port.interrupt(), 0x02, "{round}");
        port.write(DATA, round);
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [round]);
    }
}

#[test]
fn carrier_follows_the_client_of_a_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("line");
    let place = path.clone();
    let port = Port::new(move || Line::new(Socket::listen(&place).unwrap()));
    // Into a cable that ends in the air.
    port.write(FCR, 0x01);
    port.send(b"lost");
    port.wait(LSR, 0x40, 0x40);
    assert_eq!(port.read(MSR) & 0x80, 0);

    for round in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        port.wait(MSR, 0x80, 0x80);
        client.write_all(&[round]).unwrap();
        assert_eq!(port.receive(1), [round]);
        port.send(&[round]);
        let mut came = [0xff];
        client.read_exact(&mut came).unwrap();
        assert_eq!(came, [round]);
        drop(client);
        port.wait(MSR, 0x80, 0);
    }
    drop(port);

    assert!(!path.exists());
}

#[test]
fn client_that_sends_and_leaves_is_heard_to_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("line");
    let place = path.clone();
    let port = Port::new(move || Line::new(Socket::listen(&place).unwrap()));
    let data = pattern(3000);

    UnixStream::connect(&path)
        .unwrap()
        .write_all(&data)
        .unwrap();

    assert!(port.receive(data.len()) == data);
    port.wait(MSR, 0x80, 0);
}

#[test]
fn socket_of_somebody_else_is_left_to_him() {
    let directory = tempfile::tempdir().unwrap();
    let (live, dead, file) = (
        directory.path().join("live"),
        directory.path().join("dead"),
        directory.path().join("file"),
    );
    let _first = Socket::listen(&live).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    File::create(&file).unwrap();

    assert!(Socket::listen(&live).is_err());
    assert!(Socket::listen(&file).is_err());
    assert!(file.exists());
    assert!(Socket::listen(&dead).is_ok());
}

#[test]
fn terminal_is_raw_and_can_be_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("console");
    let place = link.clone();
    let port = Port::new(move || Line::new(Pty::new(Some(&place)).unwrap()));
    let data: Vec<u8> = (0..=255).collect();
    port.write(FCR, 0x01);
    for _ in 0..3 {
        let mut terminal = File::options().read(true).write(true).open(&link).unwrap();
        port.wait(MSR, 0x80, 0x80);
        terminal.write_all(&data).unwrap();
        assert!(port.receive(data.len()) == data);
        port.send(&data);
        let mut came = vec![0; data.len()];
        terminal.read_exact(&mut came).unwrap();
        assert!(came == data);
        drop(terminal);
        port.wait(MSR, 0x80, 0);
        port.send(b"nobody hears this");
        port.wait(LSR, 0x40, 0x40);
    }
    drop(port);

    assert!(!link.is_symlink());
}

#[test]
fn registers_and_bytes_outlive_the_server() {
    let (port, mut far) = Wire::port();
    port.write(FCR, 0xc1);
    port.write(SCR, 0xa5);
    port.write(MCR, 0x03);
    far.write_all(b"abc").unwrap();
    port.wait(LSR, 1, 1);
    assert_eq!(port.read(DATA), b'a');

    port.stop.die_at(Moment::Taken);

    assert_eq!(port.read(SCR), 0xa5);
    assert_eq!(port.read(MCR), 0x03);
    assert_eq!(port.receive(2), b"bc");
    assert_eq!(port.read(IIR) & 0xc0, 0xc0);
}

#[test]
fn death_at_any_moment_loses_and_doubles_no_byte() {
    const COUNT: usize = 1500;
    let (port, mut far) = Wire::port();
    port.write(FCR, 0x01);
    let data = pattern(COUNT);
    let mut other = far.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| other.write_all(&data).unwrap());
        let came = scope.spawn(|| {
            let mut came = vec![0; COUNT];
            far.read_exact(&mut came).unwrap();
            came
        });
        for (round, byte) in data.iter().enumerate() {
            let moment = [Moment::Taken, Moment::Replying][round / 7 % 2];
            if round % 7 == 0 {
                port.stop.die_at(moment);
            }
            port.wait(LSR, 0x20, 0x20);
            port.write(DATA, *byte);
            if round % 7 == 3 {
                port.stop.die_at(moment);
            }
            assert_eq!(port.receive(1), [*byte], "{round}");
        }
        assert!(came.join().unwrap() == data);
    });
}

#[test]
fn reset_returns_to_power_on() {
    let (port, mut far) = Wire::port();
    port.write(FCR, 0xc1);
    port.write(IER, 0x0f);
    port.write(MCR, 0x03);
    far.write_all(b"abc").unwrap();
    port.wait(LSR, 1, 1);

    port.client.reset().unwrap();

    assert_eq!(port.read(IER), 0);
    assert_eq!(port.read(MCR), 0);
    assert_eq!(port.read(IIR), 0x01);
    far.write_all(b"d").unwrap();
    port.wait(LSR, 1, 1);
}

#[test]
fn nonsense_leaves_a_port_that_works() {
    let (port, mut far) = Wire::port();
    for value in (0..=255).step_by(5) {
        for register in 0..8 {
            port.write(register, value);
            port.read(register);
        }
        // All of it at once, and more than there is.
        port.client.write(0, 0, &[value; 8]).unwrap();
        assert_eq!(port.client.write(0, 5, &[value; 20]).unwrap(), 3);
        let mut bytes = [0; 16];
        assert_eq!(port.client.read(0, 3, &mut bytes).unwrap(), 5);
    }
    assert!(port.client.read(0, 8, &mut [0]).is_err());

    port.client.reset().unwrap();
    port.write(FCR, 0x01);
    // What was sent meanwhile is still under way; none of it was 1, 2 or 3.
    port.send(&[1, 2, 3]);
    let mut came = Vec::new();
    while !came.ends_with(&[1, 2, 3]) {
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
        came.extend(byte);
    }
}
