// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A step that takes long: runs programs, keeps all they print in a log, and
//! tells the person who waits what is going on.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};

/// How often the terminal's status line changes.
const TICK: Duration = Duration::from_millis(200);
/// How often a line is printed where there is no terminal.
const QUIET: Duration = Duration::from_secs(30);
/// How much of the log a failure shows.
const TAIL: usize = 30;

/// One step: a title, a log, and the time it began.
#[derive(Debug)]
pub(crate) struct Step {
    title: String,
    log: PathBuf,
    began: Instant,
    printed: Instant,
    terminal: bool,
}

impl Step {
    /// Announces a step and opens its log anew.
    pub(crate) fn start(title: &str, usually: &str, log: PathBuf) -> Result<Self> {
        if let Some(parent) = log.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        eprintln!("{title} (usually {usually}; log: {})", log.display());
        Ok(Self {
            title: title.to_owned(),
            log,
            began: Instant::now(),
            printed: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
        })
    }

    /// Runs one program of the step and waits for it, showing how far it is.
    pub(crate) fn run(&mut self, what: &str, command: &mut Command) -> Result<()> {
        let mut log = File::options()
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot write {}", self.log.display()))?;
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
        writeln!(log, "+ {}", words.join(" "))?;
        let mut follow = Follow::new(&self.log)?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            std::thread::sleep(TICK);
            follow.read()?;
            self.show(what, &follow);
        };
        if self.terminal {
            eprint!("\r\x1b[K");
        }
        if !status.success() {
            bail!(
                "{}: {what} failed ({status}). The end of its log, {}:\n{}",
                self.title,
                self.log.display(),
                tail(&self.log)
            );
        }
        Ok(())
    }

    /// Says that the step is over and how long it took.
    pub(crate) fn done(self) {
        eprintln!("{}: done in {}", self.title, clock(self.began.elapsed()));
    }

    fn show(&mut self, what: &str, follow: &Follow) {
        let mut line = format!("  {} {what}", clock(self.began.elapsed()));
        if follow.objects > 0 {
            line += &format!(", {} files built", follow.objects);
        }
        if self.terminal {
            line += &format!(": {}", follow.last);
            let short: String = line.chars().take(width()).collect();
            eprint!("\r\x1b[K{short}");
        } else if self.printed.elapsed() >= QUIET {
            eprintln!("{line}: {}", follow.last);
            self.printed = Instant::now();
        }
    }
}

/// What was written to a log since it was opened here.
#[derive(Debug)]
struct Follow {
    file: File,
    rest: Vec<u8>,
    last: String,
    objects: usize,
}

impl Follow {
    fn new(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self {
            file,
            rest: Vec::new(),
            last: String::new(),
            objects: 0,
        })
    }

    fn read(&mut self) -> Result<()> {
        self.file.read_to_end(&mut self.rest)?;
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            // The kernel's build prints "  CC      mm/slub.o" and the like.
            if line.starts_with("  ") && line.trim().starts_with(|c: char| c.is_ascii_uppercase()) {
                self.objects += 1;
            }
            if !line.trim().is_empty() {
                self.last = line.split_whitespace().collect::<Vec<_>>().join(" ");
            }
        }
        Ok(())
    }
}

/// The last lines of a log.
pub(crate) fn tail(path: &Path) -> String {
    let Ok(bytes) = fs::read(path) else {
        return format!("({} cannot be read)", path.display());
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = VecDeque::new();
    for line in text.lines() {
        if lines.len() == TAIL {
            lines.pop_front();
        }
        lines.push_back(format!("    {line}"));
    }
    lines.make_contiguous().join("\n")
}

/// A duration as a person says it: `48 s`, `3 min 05 s`.
pub(crate) fn clock(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

fn width() -> usize {
    std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok())
        .unwrap_or(80_usize)
        .saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_of_seconds_and_minutes() {
        assert_eq!(clock(Duration::from_secs(59)), "59 s");
        assert_eq!(clock(Duration::from_secs(185)), "3 min 05 s");
    }

    #[test]
    fn failing_program_shows_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut step = Step::start("Testing", "no time", dir.path().join("a/log")).unwrap();
        let error = step
            .run(
                "a shell",
                Command::new("sh").args(["-c", "echo why; exit 3"]),
            )
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("Testing: a shell failed"), "{text}");
        assert!(text.contains("    why"), "{text}");
    }
}
