// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a guest's console log for signs that the kernel is in trouble.

use std::fmt::Write as _;

/// What only a kernel in trouble says. Matched in each line of its log.
const TROUBLE: &[&str] = &[
    "BUG:",
    "Call Trace:",
    "DEBUG_LOCKS_WARN_ON",
    "INFO: rcu",
    "INFO: task",
    "INFO: trying to register non-static key",
    "KASAN:",
    "Kernel panic",
    "MUSER-GUEST-TROUBLE",
    "ODEBUG:",
    "Oops",
    "UBSAN:",
    "VM_FAULT_OOM",
    "WARNING:",
    "general protection fault",
    "hogged CPU",
    "inconsistent lock state",
    "kernel BUG at",
    "possible circular locking",
    "possible deadlock",
    "possible irq lock inversion",
    "possible recursive locking",
    "refcount_t:",
    "rust_kernel: panicked",
    "sleeping function called from invalid context",
    "soft lockup",
    "suspicious RCU usage",
    "turning off the locking correctness validator",
    "unreferenced object",
];
const BEFORE: usize = 2;
const AFTER: usize = 40;

/// The first passage that tells of trouble, with what stands around it, and how
/// many lines tell of any.
pub(crate) fn trouble(log: &str) -> Option<String> {
    let lines: Vec<&str> = log
        .lines()
        .map(|line| line.trim_end_matches('\r'))
        .collect();
    let hits: Vec<usize> = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| TROUBLE.iter().any(|sign| line.contains(sign)))
        .map(|(number, _)| number)
        .collect();
    let first = *hits.first()?;
    let end = lines.len().min(first + AFTER);
    let mut text = format!(
        "{} lines of the kernel's log tell of trouble; from the first on:\n",
        hits.len()
    );
    for line in &lines[first.saturating_sub(BEFORE)..end] {
        // Formatting into a string cannot fail.
        let _ = writeln!(text, "    {line}");
    }
    Some(text)
}

/// Whether the kernel is past carrying on, so that waiting for it is no use.
pub(crate) fn fatal(log: &str) -> bool {
    log.contains("Kernel panic - not syncing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_log_is_no_trouble() {
        let log =
            "[    0.0] Linux version 7.3.4\n[    1.0] kasan: KernelAddressSanitizer initialized\n\
                   [    2.0] muser: loading out-of-tree module taints kernel.\n";
        assert_eq!(trouble(log), None);
        assert!(!fatal(log));
    }

    #[test]
    fn warning_is_shown_with_what_follows() {
        let log =
            "[ 1.0] a\r\n[ 1.1] b\r\n[ 1.2] c\r\n[ 1.3] WARNING: at vfio.c:1\r\n[ 1.4] more\r\n";
        let text = trouble(log).unwrap();
        assert!(text.starts_with("1 lines of"), "{text}");
        assert!(!text.contains("] a") && text.contains("] b"), "{text}");
        assert!(text.contains("] more"), "{text}");
    }

    #[test]
    fn leak_and_panic_are_trouble() {
        assert!(trouble("unreferenced object 0xffff (size 64):").is_some());
        assert!(fatal("[ 9.9] Kernel panic - not syncing: Fatal exception"));
    }
}
