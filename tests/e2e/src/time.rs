// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Deadlines: how long a test waits for what must happen, and for what must not.

use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How much slower than the stock kernel this one is: 4 with lock validation, which the debug
/// kernel has together with KASAN, else 1.
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| {
        if Path::new("/proc/lockdep_stats").exists() {
            4
        } else {
            1
        }
    })
}

/// How long to wait for something that must happen.
pub fn patience() -> Duration {
    Duration::from_secs(10) * slowness()
}

/// How long to watch that something does not happen. It bounds a negative check and synchronises
/// nothing: on a correct kernel the whole of it passes.
pub fn quiet() -> Duration {
    Duration::from_millis(50) * slowness()
}

/// Polls `condition` until it holds.
///
/// For states that no file descriptor announces: sysfs, `/proc`, counters.
///
/// # Errors
///
/// Says `what` did not happen when [`patience`] ends.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience();
    while !condition() {
        anyhow::ensure!(
            Instant::now() < deadline,
            "{what}: did not happen in {:?}",
            patience()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
