// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The part of `cargo xtask test` that fuzzes the module, after the suite and in the same boot.

use std::time::Duration;

use crate::cli::Kernel;
use crate::report::Report;

/// The program of tests/fuzz.
const PROGRAM: &str = "fuzz-kmod";
/// What its last line but the advice begins with, and how it ends when all was well.
const RESULT: &str = "fuzz kmod: ";
const GOOD: &str = ", 0 faults";
/// Seconds of it: enough for each kind of call, little beside the suite.
const SECONDS: u64 = 60;

/// What the fuzzer said, line by line.
#[derive(Debug, Default)]
pub(crate) struct Fuzzing {
    result: Option<String>,
    faults: Vec<String>,
}

/// Whether a run of the suite in that kernel fuzzes too: the debug kernel alone can tell what went
/// wrong and what was covered.
pub(crate) fn wanted(kernel: Kernel, filter: Option<&str>) -> bool {
    kernel == Kernel::Debug && filter.is_none_or(|filter| PROGRAM.contains(filter))
}

/// How long it takes beside the suite, if there is any of it.
pub(crate) fn length(wanted: bool) -> Duration {
    Duration::from_secs(if wanted { SECONDS } else { 0 })
}

/// The shell command, to be run whatever the suite's status was.
pub(crate) fn command() -> String {
    format!("{PROGRAM} --seconds {SECONDS}")
}

impl Fuzzing {
    /// Takes in one more line.
    pub(crate) fn line(&mut self, line: &str) {
        if line.starts_with(RESULT) {
            self.result = Some(line.to_owned());
        } else if line.starts_with("FAULT: ") || line.starts_with("FINDING ") {
            self.faults.push(line.to_owned());
        }
    }

    /// Adds what came of it.
    pub(crate) fn report(self, kernel: Kernel, report: &mut Report) {
        let name = format!("{kernel}: fuzz kmod");
        match self.result {
            Some(result) if result.ends_with(GOOD) => {
                report.pass();
                report.note(format!("{kernel}: {result}"));
            }
            Some(result) => report.fail(&name, format!("{result}\n{}", self.faults.join("\n"))),
            None => report.fail(&name, "it came to no result".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &[&str]) -> Report {
        let mut fuzzing = Fuzzing::default();
        lines.iter().for_each(|line| fuzzing.line(line));
        let mut report = Report::default();
        fuzzing.report(Kernel::Debug, &mut report);
        report
    }

    #[test]
    fn result_without_faults_passes() {
        let report = report(&["fuzz kmod: seed 1, 9 operations, 0 faults"]);
        assert_eq!(report.to_string(), "1 passed, 0 failed");
    }

    #[test]
    fn fault_and_silence_fail() {
        let lines = ["FAULT: x", "fuzz kmod: seed 1, 9 operations, 10 faults"];
        let failed = report(&lines);
        assert!(failed.failures()[0].1.contains("FAULT: x"));
        assert!(!report(&[]).ok());
    }

    #[test]
    fn only_the_debug_kernel_fuzzes_and_only_when_asked() {
        assert!(wanted(Kernel::Debug, None));
        assert!(wanted(Kernel::Debug, Some("fuzz")));
        assert!(!wanted(Kernel::Debug, Some("irq::")));
        assert!(!wanted(Kernel::Small, None));
    }
}
