// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Other processes: sides of a device that a test can kill, and programs whose output it reads.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::Scope;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::{sys, time};

/// First argument of a run of this binary as a helper; see [`crate::helper`].
pub const HELPER: &str = "--helper";

/// A running process that writes lines; killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    /// Starts a program with its output piped to here, both stdout and stderr.
    ///
    /// # Errors
    ///
    /// Says which program could not be started, and why.
    pub fn start(command: &mut Command) -> Result<Self> {
        Self::start_on(command, Stdio::piped())
    }

    fn start_on(command: &mut Command, input: Stdio) -> Result<Self> {
        let name = format!("{command:?}");
        command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let (sender, lines) = mpsc::channel();
        let stdout = child.stdout.take().map(BufReader::new);
        let stderr = child.stderr.take().map(BufReader::new);
        if let Some(stdout) = stdout {
            let sender = sender.clone();
            std::thread::spawn(move || forward(stdout, &sender));
        }
        if let Some(stderr) = stderr {
            std::thread::spawn(move || forward(stderr, &sender));
        }
        Ok(Self { name, child, lines })
    }

    /// Starts this binary as a helper.
    ///
    /// # Errors
    ///
    /// As [`Process::start`].
    pub fn helper(arguments: &[&str]) -> Result<Self> {
        Self::start(Command::new("/proc/self/exe").arg(HELPER).args(arguments))
    }

    /// Starts this binary as a helper whose standard input is a file of this process's.
    ///
    /// # Errors
    ///
    /// As [`Process::start`].
    pub fn helper_on(file: &File, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        let input = file.try_clone()?.into();
        Self::start_on(command.arg(HELPER).args(arguments), input)
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        i32::from_ne_bytes(self.child.id().to_ne_bytes())
    }

    /// The next line it writes.
    ///
    /// # Errors
    ///
    /// When none comes in time, or the process has closed its output.
    pub fn line(&self) -> Result<String> {
        self.lines
            .recv_timeout(time::patience())
            .with_context(|| format!("waiting for a line of {}", self.name))
    }

    /// Expects the next line to be `expected`.
    ///
    /// # Errors
    ///
    /// Says what came instead.
    pub fn expect(&self, expected: &str) -> Result<()> {
        let line = self.line()?;
        ensure!(
            line == expected,
            "{} wrote {line:?}, expected {expected:?}",
            self.name
        );
        Ok(())
    }

    /// Waits for a line with `part` in it.
    ///
    /// # Errors
    ///
    /// When none comes in time; with the lines that came.
    pub fn expect_containing(&self, part: &str) -> Result<String> {
        let deadline = Instant::now() + time::patience();
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(part) => return Ok(line),
                Ok(line) => seen.push(line),
                Err(_) => bail!("{} never wrote {part:?}, but {seen:?}", self.name),
            }
        }
    }

    /// The lines that came and were not read yet.
    pub fn drain(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Kills it with SIGKILL and reaps it.
    ///
    /// # Errors
    ///
    /// When it does not die in time.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        self.wait().map(drop)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// The errno of kill(2).
    pub fn signal(&self, signal: i32) -> Result<()> {
        sys::kill(self.id(), signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    ///
    /// The errno of write(2), or that its input was closed.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("its input was closed")?;
        writeln!(input, "{line}").with_context(|| format!("telling {} {line:?}", self.name))
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// When it does not end in time; with where it waits in the kernel.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_within(time::patience())?
            .with_context(|| format!("{} did not end; it waits in {}", self.name, self.stack()))
    }

    /// Waits for its end that long; `None` if it still runs.
    ///
    /// # Errors
    ///
    /// The errno of pidfd_open(2), poll(2) or waitpid(2).
    pub fn wait_within(&mut self, time: Duration) -> Result<Option<ExitStatus>> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(Some(status));
        }
        let pidfd = sys::pidfd(self.child.id())?;
        sys::poll(&pidfd, libc::POLLIN, time)?;
        Ok(self.child.try_wait()?)
    }

    /// Where its threads wait in the kernel.
    pub fn stack(&self) -> String {
        stack(self.child.id())
    }

    /// Waits until its main thread sleeps in the kernel's function of that name.
    ///
    /// # Errors
    ///
    /// When it does not in time.
    pub fn wait_for_sleep(&self) -> Result<()> {
        let path = format!("/proc/{}/stat", self.child.id());
        time::until("the process going to sleep", || {
            std::fs::read_to_string(&path).is_ok_and(|stat| {
                let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
                matches!(state, Some(Some('S' | 'D')))
            })
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It may end between the two calls.
            let _ = self.kill();
        }
    }
}

/// Where the threads of a process wait in the kernel.
pub fn stack(pid: u32) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return "nothing: it is gone".to_owned();
    };
    let mut text = String::new();
    for task in tasks.flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let state = read("status").lines().find_map(|line| {
            line.strip_prefix("State:")
                .map(|state| state.trim().to_owned())
        });
        let stack: Vec<_> = read("stack")
            .lines()
            .map(|line| line.trim().to_owned())
            .collect();
        let name = task.file_name();
        text += &format!(
            "[{name:?} {state:?} {} {}] ",
            read("wchan"),
            stack.join(" ")
        );
    }
    text
}

fn forward(reader: impl BufRead, sender: &mpsc::Sender<String>) {
    for line in reader.lines().map_while(Result::ok) {
        if sender.send(line).is_err() {
            return;
        }
    }
}

/// What a program that ran to its end wrote.
#[derive(Debug)]
pub struct Output {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// Runs a program to its end. The runner's watchdog bounds its time.
///
/// # Errors
///
/// When it could not be started.
pub fn run(program: &str, arguments: &[&str]) -> Result<Output> {
    output(Command::new(program).args(arguments))
}

/// Runs a command to its end.
///
/// # Errors
///
/// When it could not be started.
pub fn output(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {command:?}"))?;
    Ok(Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a program that must succeed, and gives what it wrote to stdout.
///
/// # Errors
///
/// With the program's own words when it fails.
pub fn succeed(program: &str, arguments: &[&str]) -> Result<String> {
    let output = run(program, arguments)?;
    let Output {
        code,
        stdout,
        stderr,
    } = &output;
    ensure!(
        *code == 0,
        "{program} {}: exit code {code}, stdout {stdout:?}, stderr {stderr:?}",
        arguments.join(" ")
    );
    Ok(output.stdout)
}

/// Runs a test that shares what it has with threads, as [`std::thread::scope`] does.
///
/// Its threads may wait for something which a test that failed will never do; so a failure ends
/// this process at once, with its reason. Each test has a process of its own.
///
/// # Errors
///
/// None: an error of `act` ends the process.
pub fn scope<'env, T>(
    act: impl for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> Result<T>,
) -> Result<T> {
    std::thread::scope(|scope| {
        Ok(act(scope).unwrap_or_else(|error| {
            eprintln!("{error:#}");
            std::process::exit(1);
        }))
    })
}
