// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What passed, what failed and why, and how long each part took.

use std::fmt;
use std::time::Duration;

use crate::step::clock;

/// The results of some tests.
#[derive(Debug, Default)]
pub(crate) struct Report {
    passed: usize,
    failed: Vec<(String, String)>,
    skipped: Vec<(String, String)>,
    notes: Vec<String>,
    phases: Vec<(String, Duration)>,
}

impl Report {
    /// Counts a test that passed.
    pub(crate) fn pass(&mut self) {
        self.passed += 1;
    }

    /// Counts a test that failed, and keeps why.
    pub(crate) fn fail(&mut self, name: &str, why: String) {
        self.failed.push((name.to_owned(), why));
    }

    /// Counts a test that could not be run, and keeps why.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.skipped.push((name.to_owned(), why.to_owned()));
    }

    /// Notes what is worth telling of a test that passed.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Notes how long a part took.
    pub(crate) fn phase(&mut self, name: &str, took: Duration) {
        self.phases.push((name.to_owned(), took));
    }

    /// Adds the results of another part.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
        self.notes.extend(other.notes);
        self.phases.extend(other.phases);
    }

    /// Whether nothing failed.
    pub(crate) fn ok(&self) -> bool {
        self.failed.is_empty()
    }

    /// Whether nothing ran at all.
    pub(crate) fn empty(&self) -> bool {
        self.passed == 0 && self.failed.is_empty() && self.skipped.is_empty()
    }

    /// The name of each failed test, and why it failed.
    #[cfg(test)]
    pub(crate) fn failures(&self) -> &[(String, String)] {
        &self.failed
    }

    /// The name of each test that was not run, and why.
    #[cfg(test)]
    pub(crate) fn skips(&self) -> &[(String, String)] {
        &self.skipped
    }

    /// Names of skipped tests that are printed for each reason: all were printed when they came up.
    const SHOWN: usize = 4;

    /// The reasons, in the order of their first test, and the tests of each.
    fn skips_by_reason(&self) -> Vec<(&str, Vec<&str>)> {
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for (name, why) in &self.skipped {
            match reasons.iter_mut().find(|(reason, _)| reason == why) {
                Some((_, names)) => names.push(name),
                None => reasons.push((why, vec![name])),
            }
        }
        reasons
    }

    /// Prints all of it, the counts last.
    pub(crate) fn print(&self) {
        println!();
        for (why, names) in self.skips_by_reason() {
            let why = if why.is_empty() {
                "no reason given"
            } else {
                why
            };
            println!("skipped: {}: {why}", count(names.len()));
            let shown = &names[..names.len().min(Self::SHOWN)];
            let rest = names.len() - shown.len();
            let more = if rest > 0 { " …" } else { "" };
            println!("    {}{more}", shown.join(", "));
        }
        for (name, why) in &self.failed {
            println!("failed: {name}");
            for line in why.lines() {
                println!("    {line}");
            }
        }
        for note in &self.notes {
            println!("{note}");
        }
        if !self.phases.is_empty() {
            let parts = self
                .phases
                .iter()
                .map(|(name, took)| format!("{name} {}", clock(*took)));
            println!("time: {}", parts.collect::<Vec<_>>().join(", "));
        }
        println!("{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed.len())?;
        if !self.skipped.is_empty() {
            write!(f, ", {} skipped", self.skipped.len())?;
        }
        Ok(())
    }
}

fn count(tests: usize) -> String {
    match tests {
        1 => "1 test".to_owned(),
        tests => format!("{tests} tests"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_told_once_a_reason() {
        let mut report = Report::default();
        report.skip("small: a", "no cdev");
        report.skip("small: b", "no type1");
        report.skip("small: c", "no cdev");

        let reasons = report.skips_by_reason();

        assert_eq!(
            reasons,
            [
                ("no cdev", vec!["small: a", "small: c"]),
                ("no type1", vec!["small: b"]),
            ]
        );
    }
}
