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

    /// Notes how long a part took.
    pub(crate) fn phase(&mut self, name: &str, took: Duration) {
        self.phases.push((name.to_owned(), took));
    }

    /// Adds the results of another part.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
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

    /// Prints all of it, the counts last.
    pub(crate) fn print(&self) {
        println!();
        for (name, why) in &self.skipped {
            println!(
                "skipped: {name}{}{why}",
                if why.is_empty() { "" } else { ": " }
            );
        }
        for (name, why) in &self.failed {
            println!("failed: {name}");
            for line in why.lines() {
                println!("    {line}");
            }
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
