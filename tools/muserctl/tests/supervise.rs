// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `muserctl supervise` with real processes: started, killed, replaced, given up.

#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

use libmuser::client::{Client, Options};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Long enough for anything that is going to happen.
const DEADLINE: Duration = Duration::from_secs(20);
/// Where [`device_program`] finds the number of its descriptor.
const DEVICE_FD: &str = "MUSERCTL_TEST_DEVICE_FD";
/// Registers of the sample `counter`.
const ADD: u64 = 0;
const VALUE: u64 = 8;

/// The device's program is this test program itself, started so that it runs this only.
#[test]
fn device_program() {
    let Ok(number) = std::env::var(DEVICE_FD) else {
        return;
    };
    use clap::{Args, FromArgMatches};
    let command = libmuser::cli::Options::augment_args(clap::Command::new("counter"));
    let matches = command.get_matches_from(["counter", "--quiet", "--fd", &number]);
    let options = libmuser::cli::Options::from_arg_matches(&matches).unwrap();
    let model = counter::model();
    println!("the program speaks");
    let code = options.serve("counter", "", model, |bus| {
        counter::Counter::new(bus).map(Served)
    });
    assert_eq!(
        format!("{code:?}"),
        format!("{:?}", std::process::ExitCode::SUCCESS)
    );
}

/// The sample, in one thread.
struct Served(counter::Counter);

impl libmuser::Device for Served {
    fn read(&mut self, access: libmuser::Access) -> libmuser::Result<u64> {
        libmuser::SharedDevice::read(&self.0, access)
    }

    fn write(&mut self, access: libmuser::Access, value: u64) -> libmuser::Result<()> {
        libmuser::SharedDevice::write(&self.0, access, value)
    }

    fn reset(&mut self, reset: libmuser::Reset) -> libmuser::Result<()> {
        libmuser::SharedDevice::reset(&self.0, reset)
    }
}

/// muserctl, supervising.
struct Supervised {
    child: Child,
    said: BufReader<ChildStderr>,
    dir: TempDir,
}

impl Supervised {
    /// With [`device_program`] behind it.
    fn start() -> Self {
        let this = std::env::current_exe().unwrap();
        let script = format!(
            "{DEVICE_FD}=$2 exec {} --exact device_program --nocapture",
            this.display()
        );
        Self::with(&["sh", "-c", &script, "sh"])
    }

    fn with(program: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_muserctl"))
            .args(["supervise", "-v", "--socket-path"])
            .arg(dir.path().join("socket"))
            .arg("--")
            .args(program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        Self { child, said, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// The rest of the next line that has `words`.
    fn says(&mut self, words: &str) -> String {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < DEADLINE, "it does not say {words:?}");
            let mut line = String::new();
            assert_ne!(self.said.read_line(&mut line).unwrap(), 0, "no {words:?}");
            if let Some((_, rest)) = line.split_once(words) {
                return rest.trim().to_owned();
            }
        }
    }

    /// The process of the next program.
    fn program(&mut self) -> Pid {
        let process = self.says("the program runs, process ").parse().unwrap();
        self.says("a program has attached");
        Pid::from_raw(process)
    }

    fn client(&self) -> Client {
        Options::new()
            .timeout(DEADLINE)
            .connect(self.socket())
            .unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let mut ended = None;
        until("the end of muserctl", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a state that nothing announces.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < DEADLINE, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_alive(process: Pid) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{process}/stat"));
    state.is_ok_and(|state| !state.contains(") Z "))
}

fn add(client: &Client, addend: u32) {
    assert_eq!(client.write(0, ADD, &addend.to_le_bytes()).unwrap(), 4);
}

fn value(client: &Client) -> u64 {
    let mut bytes = [0; 8];
    client.read(0, VALUE, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn killed_program_is_started_again_and_its_client_goes_on() {
    let mut supervised = Supervised::start();
    let mut program = supervised.program();
    let client = supervised.client();

    for round in 1..=5 {
        add(&client, 10);
        kill(program, Signal::SIGKILL).unwrap();
        add(&client, 1);
        assert_eq!(value(&client), round * 11);
        let next = supervised.program();
        assert_ne!(next, program);
        program = next;
    }
}

#[test]
fn program_left_behind_by_a_killed_shell_does_not_serve_on() {
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "{DEVICE_FD}=$2 {} --exact device_program --nocapture & wait",
        this.display()
    );
    let mut supervised = Supervised::with(&["sh", "-c", &script, "sh"]);
    let shell = supervised.program();
    let client = supervised.client();
    add(&client, 7);

    kill(shell, Signal::SIGKILL).unwrap();
    let next = supervised.program();

    assert_ne!(next, shell);
    add(&client, 1);
    assert_eq!(value(&client), 8);
    supervised.signal(Signal::SIGTERM);
    supervised.wait();
}

#[test]
fn hangup_replaces_the_program_and_its_client_goes_on() {
    let mut supervised = Supervised::start();
    let program = supervised.program();
    let client = supervised.client();
    add(&client, 7);

    supervised.signal(Signal::SIGHUP);
    add(&client, 1);

    assert_eq!(value(&client), 8);
    supervised.says("as it was told to: exit status 0");
    assert_ne!(supervised.program(), program);
    assert!(!is_alive(program));
}

#[test]
fn next_client_finds_the_device_as_after_power_on() {
    let mut supervised = Supervised::start();
    supervised.program();
    let client = supervised.client();
    add(&client, 7);
    drop(client);

    assert_eq!(value(&supervised.client()), 0);
}

#[test]
fn told_to_end_it_ends_with_its_program_and_its_socket() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut supervised = Supervised::start();
        let program = supervised.program();
        let client = supervised.client();
        add(&client, 7);

        supervised.signal(signal);

        supervised.says("the program has ended: exit status 0");
        assert_eq!(supervised.wait().code(), Some(0));
        assert!(!is_alive(program));
        assert!(!supervised.socket().exists());
    }
}

#[test]
fn killed_supervisor_takes_its_program_along() {
    let mut supervised = Supervised::start();
    let program = supervised.program();

    supervised.signal(Signal::SIGKILL);

    until("the end of the program", || !is_alive(program));
}

#[test]
fn program_that_is_not_there_is_named() {
    let mut supervised = Supervised::with(&["/no/such/program"]);

    supervised.says("/no/such/program can't be started");
    assert_eq!(supervised.wait().code(), Some(4));
    assert!(!supervised.socket().exists());
}

#[test]
fn program_that_never_serves_is_given_up() {
    for (script, lives) in [("exit 2", 1), ("exit 9", 5)] {
        let mut supervised = Supervised::with(&["sh", "-c", script]);
        for _ in 0..lives {
            supervised.says("the program has ended: exit status");
        }

        supervised.says("it is given up");
        assert_eq!(supervised.wait().code(), Some(4));
    }
}

#[test]
fn socket_that_somebody_listens_to_is_left_alone() {
    let mut first = Supervised::start();
    first.program();
    let second = Command::new(env!("CARGO_BIN_EXE_muserctl"))
        .args(["supervise", "--socket-path"])
        .arg(first.socket())
        .args(["--", "true"])
        .output()
        .unwrap();

    assert_eq!(second.status.code(), Some(3));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("another process listens"), "{said}");
    value(&first.client());
}

#[test]
fn client_of_a_connected_socket_ends_it_by_going() {
    let (own, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let this = std::env::current_exe().unwrap();
    nix::fcntl::fcntl(
        &other,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let script = format!(
        "{DEVICE_FD}=$2 exec {} --exact device_program --nocapture",
        this.display()
    );
    let mut child = Command::new(env!("CARGO_BIN_EXE_muserctl"))
        .args(["supervise", "--fd", &other.as_raw_fd().to_string(), "--"])
        .args(["sh", "-c", &script, "sh"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    drop(other);
    let client = Options::new().timeout(DEADLINE).open(own.into()).unwrap();
    add(&client, 3);
    assert_eq!(value(&client), 3);

    drop(client);

    let mut ended = None;
    until("the end of muserctl", || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.unwrap().code(), Some(0));
}

#[test]
fn options_that_do_not_fit_together_are_refused() {
    let says = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_muserctl"))
            .arg("supervise")
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };

    assert!(says(&["--", "true"]).contains("--socket-path"));
    assert!(says(&["--socket-path", "/a"]).contains("PROGRAM"));
    assert!(says(&["--socket-path", "/a", "--fd", "3", "--", "true"]).contains("cannot be used"));
    assert!(says(&["--fd", "3", "--socket-mode", "0600", "--", "true"]).contains("cannot be used"));
    assert!(says(&["--fd", "x", "--", "true"]).contains("a descriptor is a number"));
}

#[test]
fn help_has_exact_commands_and_exit_codes() {
    let output = Command::new(env!("CARGO_BIN_EXE_muserctl"))
        .args(["supervise", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8_lossy(&output.stdout);

    for part in [
        "muserctl supervise --socket-path /",
        "vfio-user-pci",
        "EXIT STATUS",
        "SIGHUP",
    ] {
        assert!(help.contains(part), "{part}: {help}");
    }
}
