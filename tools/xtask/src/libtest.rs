// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads what Rust's test harness prints, from `cargo test` as from a guest.

use crate::report::Report;

/// The output of one or more test programs, line by line.
#[derive(Debug, Default)]
pub(crate) struct Output {
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
    /// `---- NAME ----` and what follows, for each failed test.
    details: Vec<(String, String)>,
    /// Whether a program is between `running N tests` and its result.
    running: bool,
    /// `test NAME ... ` without a result yet, and what the test printed since.
    begun: Option<(String, String)>,
    programs: usize,
    /// What had passed and failed before the program that runs now.
    before: (usize, usize),
    in_details: bool,
}

impl Output {
    /// Takes in one more line.
    pub(crate) fn line(&mut self, line: &str) {
        if line.starts_with("running ") && line.trim_end().ends_with(['s', 't']) {
            self.running = true;
            self.in_details = false;
            self.begun = None;
            self.programs += 1;
            self.before = (self.passed, self.failed.len());
        } else if line.starts_with("test result: ") {
            self.running = false;
            self.in_details = false;
            self.settle(line);
        } else if let Some(name) = heading(line) {
            self.in_details = true;
            self.details.push((name.to_owned(), String::new()));
        } else if line == "failures:" {
            self.in_details = false;
        } else if self.in_details {
            if let Some((_, text)) = self.details.last_mut() {
                text.push_str(line);
                text.push('\n');
            }
        } else if let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        {
            // `name - should panic` and doctests' `(line 8) - compile` stay part of the name.
            let name = name.trim_end();
            if !self.result(name, result) {
                self.begun = Some((name.to_owned(), format!("{result}\n")));
            }
        } else if let Some((name, mut printed)) = self.begun.take() {
            if !self.result(&name, line) {
                printed.push_str(line);
                printed.push('\n');
                self.begun = Some((name, printed));
            } else if self.failed.last() == Some(&name) {
                self.details.push((name, printed));
            }
        }
    }

    /// Whether no test program is in the middle of its tests.
    pub(crate) fn finished(&self) -> bool {
        !self.running && self.programs > 0
    }

    /// Adds up what was seen, under the name of where it ran.
    pub(crate) fn into_report(self, place: &str) -> Report {
        let mut report = Report::default();
        for _ in 0..self.passed {
            report.pass();
        }
        for name in &self.failed {
            let why = self
                .details
                .iter()
                .rev()
                .find(|(detailed, _)| detailed == name);
            let why = why
                .map(|(_, text)| text.trim().to_owned())
                .unwrap_or_default();
            report.fail(&format!("{place}: {name}"), why);
        }
        for (name, reason) in &self.skipped {
            report.skip(&format!("{place}: {name}"), reason);
        }
        if self.running {
            let begun = self
                .begun
                .unwrap_or(("a test program".to_owned(), String::new()));
            let (name, printed) = begun;
            report.fail(
                &format!("{place}: {name}"),
                format!("it ended in the middle of its tests\n{printed}"),
            );
        }
        report
    }

    /// The program's own count decides, where a test's output hid a result.
    fn settle(&mut self, line: &str) {
        let count = |what: &str| {
            let (number, _) = line.split_once(what)?;
            number.trim_end().rsplit(' ').next()?.parse().ok()
        };
        let (passed, failed) = self.before;
        if let Some(count) = count("passed;") {
            self.passed = passed + count;
        }
        let count: usize = count("failed;").unwrap_or_default();
        for _ in self.failed.len() - failed..count {
            self.failed
                .push("a test whose name its output hid".to_owned());
        }
    }

    fn result(&mut self, name: &str, result: &str) -> bool {
        let name = name.to_owned();
        let result = result.trim();
        match result.split([' ', ',', '<']).next() {
            Some("ok") => self.passed += 1,
            Some("FAILED") => self.failed.push(name),
            Some("ignored") => {
                let reason = result
                    .trim_start_matches("ignored")
                    .trim_matches([',', ' ']);
                // cargo's harness says `ignored, why`, libtest-mimic `ignored (why)`.
                let bare = reason
                    .strip_prefix('(')
                    .and_then(|rest| rest.strip_suffix(')'));
                let reason = bare.unwrap_or(reason);
                self.skipped.push((name, reason.to_owned()));
            }
            _ => return false,
        }
        self.begun = None;
        true
    }
}

/// `---- tests::name stdout ----`, or libtest-mimic's `---- name ----`.
fn heading(line: &str) -> Option<&str> {
    let name = line.strip_prefix("---- ")?.strip_suffix(" ----")?;
    Some(
        name.strip_suffix(" stdout")
            .or(name.strip_suffix(" stderr"))
            .unwrap_or(name),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARGO: &str = "
running 4 tests
test a::good   ... ok
test a::slow ... ignored, takes an hour
test a::noisy ... something printed
ok
test a::bad ... FAILED

failures:

---- a::bad stdout ----
thread 'a::bad' panicked at src/lib.rs:1:
assertion failed

failures:
    a::bad

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out
";

    fn read(text: &str) -> Output {
        let mut output = Output::default();
        text.lines().for_each(|line| output.line(line));
        output
    }

    #[test]
    fn each_kind_of_result_is_counted_once() {
        let output = read(CARGO);
        assert!(output.finished());
        let report = output.into_report("host");
        assert_eq!(report.to_string(), "2 passed, 1 failed, 1 skipped");
        let (name, why) = &report.failures()[0];
        assert_eq!(name, "host: a::bad");
        assert!(why.ends_with("assertion failed"), "{why}");
        assert_eq!(
            report.skips(),
            [("host: a::slow".to_owned(), "takes an hour".to_owned())]
        );
    }

    #[test]
    fn hidden_results_are_counted_by_the_summary() {
        let output = read(
            "running 2 tests\ntest a ... noiseok\ntest b ... noiseFAILED\n\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        assert_eq!(
            output.into_report("stock").to_string(),
            "1 passed, 1 failed"
        );
    }

    #[test]
    fn program_that_dies_is_a_failure_of_the_test_it_was_in() {
        let output = read("running 2 tests\ntest first ... ok\ntest second ... \n");
        assert!(!output.finished());
        let report = output.into_report("small");
        assert_eq!(report.to_string(), "1 passed, 1 failed");
        assert_eq!(report.failures()[0].0, "small: second");
    }

    #[test]
    fn reason_of_a_skip_loses_its_outer_brackets_only() {
        let output = read("running 1 test\ntest a ... ignored (no iommufd (/dev/iommu))\n");
        let report = output.into_report("stock");
        assert_eq!(report.skips()[0].1, "no iommufd (/dev/iommu)");
    }

    #[test]
    fn no_output_is_not_finished() {
        assert!(!read("").finished());
    }
}
