// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that a test runs, and what they say.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{bail, Context as _, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::wait::{self, Deadline, SOON};

/// Lines of what a program said that a failure shows.
const TAIL: usize = 25;

/// A running program; killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    said: Arc<Said>,
}

impl Process {
    /// Starts a program; what it says goes to a file as well.
    pub(crate) fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let log = File::options().append(true).create(true).open(log);
        let mut log = log.with_context(|| format!("cannot write the log of {name}"))?;
        writeln!(log, "+ {command:?}")?;
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn();
        let mut child = child.with_context(|| format!("cannot start {command:?}"))?;
        let said = Arc::new(Said::default());
        if let Some(output) = child.stdout.take() {
            listen(output, log.try_clone()?, &said);
        }
        if let Some(output) = child.stderr.take() {
            listen(output, log, &said);
        }
        Ok(Self {
            name: name.to_owned(),
            child,
            said,
        })
    }

    /// How much it has said so far: [`Self::hear`] can start from there.
    pub(crate) fn mark(&self) -> usize {
        self.said.heard().lines.len()
    }

    /// Waits for a line with `part` in it among what it says from `mark` on, and says which it is.
    pub(crate) fn hear(&self, mark: usize, part: &str, patience: Duration) -> Result<usize> {
        let deadline = Deadline::after(patience);
        let mut heard = self.said.heard();
        loop {
            let mut lines = heard.lines.iter().skip(mark);
            if let Some(place) = lines.position(|line| line.contains(part)) {
                return Ok(mark + place);
            }
            let left = deadline.left();
            if left.is_zero() || heard.open == 0 {
                drop(heard);
                bail!("{} did not say {part:?}\n{}", self.name, self.story());
            }
            let waited = self.said.more.wait_timeout(heard, left);
            heard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What it said that has `part` in it, from `mark` on.
    pub(crate) fn heard(&self, mark: usize, part: &str) -> Vec<String> {
        let lines = &self.said.heard().lines;
        let with = lines.iter().skip(mark).filter(|line| line.contains(part));
        with.cloned().collect()
    }

    /// A line of what it said.
    pub(crate) fn line(&self, place: usize) -> Option<String> {
        self.said.heard().lines.get(place).cloned()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let id = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(id, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> Result<ExitStatus> {
        let (name, child) = (&self.name, &mut self.child);
        let what = format!("the end of {name}");
        let ended = wait::until(&what, SOON, || Ok(child.try_wait()?));
        ended.with_context(|| self.story())
    }

    /// Kills it and waits for its end.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.end().map(drop)
    }

    /// Fails if it has ended, with what it said.
    pub(crate) fn running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended: {status}\n{}", self.name, self.story()),
        }
    }

    /// The last of what it said, for the message of a failure.
    pub(crate) fn story(&self) -> String {
        let lines = &self.said.heard().lines;
        let skipped = lines.len().saturating_sub(TAIL);
        let shown: Vec<_> = lines.iter().skip(skipped).map(String::as_str).collect();
        format!("{} said:\n    {}", self.name, shown.join("\n    "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program has said so far.
#[derive(Debug, Default)]
struct Said {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    /// Outputs that are open: without any, nothing will follow.
    open: u32,
}

impl Said {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(output: impl Read + Send + 'static, mut log: File, said: &Arc<Said>) {
    let said = Arc::clone(said);
    said.heard().open += 1;
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            // The log is for a person to read; the tests go on without it.
            let _ = writeln!(log, "{line}");
            said.heard().lines.push(line);
            said.more.notify_all();
        }
        said.heard().open -= 1;
        said.more.notify_all();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        let log = tempfile::NamedTempFile::new().unwrap();
        Process::start("sh", Command::new("sh").args(["-c", script]), log.path()).unwrap()
    }

    #[test]
    fn line_is_heard_from_the_mark_on() {
        let shell = shell("echo one; echo two >&2; echo one; sleep 60");
        let first = shell.hear(0, "one", SOON).unwrap();
        let second = shell.hear(first + 1, "one", SOON).unwrap();
        assert!(second > first);
        let silence = shell.hear(second + 1, "one", Duration::from_millis(5));
        let silence = silence.unwrap_err().to_string();
        assert!(silence.contains("did not say \"one\""), "{silence}");
    }

    #[test]
    fn program_that_ended_tells_its_last_words() {
        let mut shell = shell("echo alas; exit 3");
        assert_eq!(shell.end().unwrap().code(), Some(3));
        shell.hear(0, "alas", SOON).unwrap();
        assert!(shell.running().unwrap_err().to_string().contains("alas"));
    }
}
