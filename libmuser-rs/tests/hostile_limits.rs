// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server in a process that has hardly any descriptors: it can't be made to give up by them.
//!
//! The limit is one of the process, so the server runs in a child: this very program, asked for the
//! test that starts it.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libmuser::transport::{ListenOptions, SocketTransport};
use libmuser::Server;

mod hostile;
mod raw;

use hostile::{device_reads, longs, many, message, model, words, Prober, CONFIG, PAGE};
use raw::{memfd, Directory, RawClient, DEADLINE};

/// Names the socket that a child is to listen to.
const SOCKET: &str = "MUSER_HOSTILE_SOCKET";
/// Descriptors that the child has.
const LIMIT: u64 = 40;

/// A server in a process of its own, until this is dropped.
struct Poor {
    child: Child,
    path: PathBuf,
    _directory: Directory,
}

impl Poor {
    /// Runs the server, asked for `test`.
    fn start(test: &str) -> Self {
        let directory = Directory::new();
        let path = directory.0.join("socket");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", test, "--nocapture"])
            .env(SOCKET, &path);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self {
            child: child.unwrap(),
            path,
            _directory: directory,
        }
    }

    fn connect(&mut self) -> RawClient {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Ok(socket) = UnixStream::connect(&self.path) {
                return RawClient::new(socket);
            }
            assert!(
                self.child.try_wait().unwrap().is_none(),
                "the server has ended"
            );
            assert!(Instant::now() < until, "the server does not listen");
            std::thread::yield_now();
        }
    }

    /// A client that is served, as soon as the one before it has gone.
    fn client(&mut self) -> RawClient {
        let until = Instant::now() + DEADLINE;
        let version = message(0, 1, &[&[0; 4][..], b"{}\0"].concat());
        loop {
            let mut client = self.connect();
            let answer = client.try_send(&version).then(|| client.try_receive());
            if answer.flatten().is_some_and(|it| it.result().is_ok()) {
                assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));
                return client;
            }
            assert!(Instant::now() < until, "nobody is served any more");
        }
    }

    /// Time that its threads have worked for.
    fn worked(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let times = tasks.map(|task| {
            let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            text.split(' ').next().unwrap().parse::<u64>().unwrap()
        });
        Duration::from_nanos(times.sum())
    }
}

impl Drop for Poor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a child: serves for ever.
fn serve_if_asked() {
    if let Some(path) = std::env::var_os(SOCKET) {
        let limit = libc::rlimit {
            rlim_cur: LIMIT,
            rlim_max: LIMIT,
        };
        // SAFETY: `limit` leads to limits that are only read.
        let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        assert_eq!(result, 0);
        let transport = SocketTransport::listen(Path::new(&path), ListenOptions::new()).unwrap();
        let mut server = Server::new(model(), transport, Prober::new).unwrap();
        server.run().unwrap();
        std::process::exit(0);
    }
}

#[test]
fn more_descriptors_than_a_process_can_have_are_refused() {
    serve_if_asked();
    let mut server = Poor::start("more_descriptors_than_a_process_can_have_are_refused");
    let mut client = server.client();
    let fds = many(100);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    for _ in 0..20 {
        let map = [words(&[32, 3]), longs(&[0, 0x5000, PAGE])].concat();
        client.send_bytes(&message(4, 2, &map), &fds);
        assert!(client.receive().result().is_err());
    }
    let memory = memfd(PAGE);
    assert_eq!(client.dma_map(0, PAGE, 3, Some((&memory, 0))), Ok(()));
    assert_eq!(device_reads(&mut client, 0), Ok(vec![0; 8]));
    drop(client);
    server.client();
}

#[test]
fn more_files_than_a_process_can_have_are_refused() {
    serve_if_asked();
    let mut server = Poor::start("more_files_than_a_process_can_have_are_refused");
    let mut client = server.client();
    let mut refused = None;
    for number in 0..LIMIT {
        let memory = memfd(PAGE);
        if let Err(errno) = client.dma_map(number * PAGE, PAGE, 3, Some((&memory, 0))) {
            refused = refused.or(Some(errno));
        }
    }
    assert_eq!(refused, Some(libc::EMFILE));
    // There is room for another client to be told that it has to wait.
    let other = server.connect();
    other.send_bytes(&message(0, 1, &[&[0; 4][..], b"{}\0"].concat()), &[]);
    assert_eq!(other.receive().result(), Err(libc::EBUSY));
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));
    drop(client);
    server.client();
}

#[test]
fn more_connections_than_a_process_can_have_wait_without_keeping_it_busy() {
    serve_if_asked();
    let test = "more_connections_than_a_process_can_have_wait_without_keeping_it_busy";
    let mut server = Poor::start(test);
    let mut client = server.client();
    // Files and eventfds take what there is, so that there is none for a connection.
    let files: Vec<_> = (0..LIMIT).map(|_| memfd(PAGE)).collect();
    for (number, file) in (0..).zip(&files) {
        let _until_there_are_too_many = client.dma_map(number * PAGE, PAGE, 3, Some((file, 0)));
    }
    let events: Vec<_> = (0..4)
        .map(|_| nix::sys::eventfd::EventFd::new().unwrap())
        .collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    assert_eq!(client.set_irqs(0x24, (2, 0, 4), &[], &fds), Ok(()));
    let others: Vec<_> = (0..100).map(|_| server.connect()).collect();
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));

    let (began, before) = (Instant::now(), server.worked());
    while began.elapsed() < Duration::from_millis(500) {
        std::thread::park_timeout(Duration::from_millis(100));
    }
    let worked = server.worked() - before;

    assert!(
        worked < Duration::from_millis(250),
        "it works for {worked:?}"
    );
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0xf4, 0x1a]));
    drop(others);
    drop(client);
    server.client();
}
