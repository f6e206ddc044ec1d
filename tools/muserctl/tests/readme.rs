// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the project's README that need nothing but cargo, as they stand there.

#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the README calls the socket.
const SOCKET: &str = "/tmp/gpio.sock";
/// How long the sample may take to be built and to listen.
const DEADLINE: Duration = Duration::from_secs(300);

/// The server, ended when the test is over.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let group = libc::pid_t::try_from(self.0.id()).unwrap();
        // cargo and the sample.
        Command::new("kill")
            .args(["-TERM", "--", &format!("-{group}")])
            .status()
            .unwrap();
        self.0.wait().unwrap();
    }
}

/// The `cargo run` commands of the README, with the socket at another place.
fn commands(socket: &Path) -> Vec<String> {
    let readme = include_str!("../../../README.md");
    let socket = socket.to_str().unwrap();
    let commands = readme.lines().filter(|line| line.starts_with("cargo run "));
    commands
        .map(|command| command.replace(SOCKET, socket))
        .collect()
}

fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    shell.args(["-c", command]).current_dir(project);
    shell.stdin(Stdio::null());
    shell
}

#[test]
fn sample_is_served_and_probed() {
    use std::os::unix::process::CommandExt as _;

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gpio.sock");
    let commands = commands(&socket);
    let [serve, probe] = &commands[..] else {
        panic!("the README has other commands: {commands:?}");
    };
    let mut server = Server(shell(serve).process_group(0).spawn().unwrap());
    let began = Instant::now();
    while !socket.exists() {
        let ended = server.0.try_wait().unwrap();
        assert!(ended.is_none(), "{serve}: {ended:?}");
        assert!(began.elapsed() < DEADLINE, "{serve}: no socket yet");
        std::thread::sleep(Duration::from_millis(20));
    }

    let output = shell(probe).output().unwrap();

    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{probe}: {output:?}");
    assert!(text.contains("PCI 494f:0dc8"), "{text}");
    assert!(text.contains("region 2 at 0x0:"), "{text}");
}
