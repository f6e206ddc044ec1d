// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Allocations and copies that fail on demand (`Documentation/fault-injection/fault-injection.rst`).
//!
//! `fail-nth` of a thread has the nth thing that can fail, in that thread alone, fail: what slab
//! allocates, what the page allocator does, what is copied from or to the process. Allocations of
//! the core (files, descriptors, mappings) count as well, so most failures are not the module's; all
//! of the module's that the operation makes are among them.

use std::fmt::Display;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};

use crate::check::{errno_name, errno_of, errno_text};

/// Operations need fewer allocations than this.
const MOST: u32 = 2000;
/// What makes each allocation of a sleeping task one that can fail, silently. Pages for user memory
/// are left out: a process that has no memory is not what is tested.
const SETTINGS: &[(&str, &str)] = &[
    ("failslab/ignore-gfp-wait", "N"),
    ("failslab/verbose", "0"),
    ("fail_page_alloc/ignore-gfp-wait", "N"),
    ("fail_page_alloc/min-order", "0"),
    ("fail_page_alloc/verbose", "0"),
    ("fail_usercopy/verbose", "0"),
];

/// Why nothing can fail on demand in this kernel.
pub fn lacking() -> Option<String> {
    (!Path::new("/proc/self/fail-nth").exists())
        .then(|| "only the debug kernel has allocations fail on demand".to_owned())
}

/// Failures of the thread that made this.
#[derive(Debug)]
pub struct Failures(File);

impl Failures {
    /// Has failures be silent, and anything fail.
    ///
    /// # Errors
    ///
    /// What can't be set.
    pub fn new() -> Result<Self> {
        for (name, value) in SETTINGS {
            let path = Path::new("/sys/kernel/debug").join(name);
            fs::write(&path, value).with_context(|| format!("setting {}", path.display()))?;
        }
        let path = "/proc/thread-self/fail-nth";
        let file = File::options().read(true).write(true).open(path);
        Ok(Self(file.with_context(|| format!("opening {path}"))?))
    }

    /// Acts while the `nth` thing that can fail does; whether there was such a thing.
    fn during<T>(&self, nth: u32, act: impl FnOnce() -> T) -> Result<(T, bool)> {
        self.0.write_at(nth.to_string().as_bytes(), 0)?;
        let done = act();
        // Telling what is left copies to the process, which is where the failure can strike as well.
        let mut left = [0; 16];
        let told = self.0.read_at(&mut left, 0);
        let struck = told.is_ok() && left[0] == b'0';
        // As does this, once.
        if self.0.write_at(b"0", 0).is_err() {
            self.0.write_at(b"0", 0)?;
        }
        Ok((done, struck))
    }

    /// Does an operation again and again, each time with another thing failing, until nothing is
    /// left that fails; how many things there were. It may fail with one of `errnos`, and must
    /// succeed when it is tried again.
    ///
    /// `fresh` makes what it is done with, anew each time.
    ///
    /// # Errors
    ///
    /// Says which failure had another effect.
    pub fn each<S, T>(
        &self,
        what: impl Display,
        errnos: &[i32],
        mut fresh: impl FnMut() -> Result<S>,
        mut act: impl FnMut(&S) -> io::Result<T>,
    ) -> Result<u32> {
        // What is allocated once and for all is so now.
        let again = |subject: &S, act: &mut dyn FnMut(&S) -> io::Result<T>| match act(subject) {
            Ok(_) => Ok(()),
            Err(error) => bail!("{what} when nothing fails: {}", errno_text(&error)),
        };
        again(&fresh()?, &mut act)?;
        for nth in 1..MOST {
            let subject = fresh()?;
            let (done, struck) = self.during(nth, || act(&subject))?;
            match &done {
                Ok(_) => {}
                Err(error) => {
                    let errno = errno_of(error);
                    ensure!(
                        struck,
                        "{what}: failed with {} by itself",
                        errno_text(error)
                    );
                    ensure!(
                        errnos.contains(&errno),
                        "{what}: failed with {} when failure {nth} struck",
                        errno_name(errno)
                    );
                    again(&subject, &mut act).with_context(|| format!("after failure {nth}"))?;
                }
            }
            if !struck {
                println!("{what}: {} failures", nth - 1);
                return Ok(nth - 1);
            }
        }
        bail!("{what} has more than {MOST} allocations")
    }
}
