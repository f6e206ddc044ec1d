// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Deadlines: whatever a test waits for has one.

use std::time::{Duration, Instant};

use anyhow::{ensure, Result};

/// For what a program of the host does at once, on a machine that has much else to do.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// For what takes an emulated CPU a while.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// A moment until which something is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    /// So long from now.
    pub(crate) fn after(patience: Duration) -> Self {
        Self(Instant::now() + patience)
    }

    /// The time that is left; none once it has passed.
    pub(crate) fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// Looks again and again until there is something.
///
/// For what nothing announces: memory that a device writes, a child's exit, a path.
pub(crate) fn until<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Deadline::after(patience);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        let left = deadline.left();
        ensure!(!left.is_zero(), "{what}: not within {patience:?}");
        std::thread::sleep(left.min(Duration::from_millis(2)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_named() {
        let never = || Ok(None::<()>);
        let error = until("the end of days", Duration::from_millis(5), never).unwrap_err();
        assert!(error.to_string().contains("the end of days"), "{error}");
    }

    #[test]
    fn what_is_there_is_taken_though_time_is_up() {
        assert_eq!(until("now", Duration::ZERO, || Ok(Some(7))).unwrap(), 7);
    }
}
