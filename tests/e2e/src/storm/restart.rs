// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a client waits for a new process: from its attachment to the first answer, and what
//! of that is nobody's fault.
//!
//! Nothing tells of the attachment in the moment in which it happens, and when a look at the device
//! has found it, the answer may be there already. So the time is taken from the last look that has
//! found none: what is printed is too long by a look at the most, and never too short.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::device::Killer;
use super::plain_request;
use crate::vfio::Client;

/// Prints the times, over so many restarts.
pub(super) fn measure(client: &Client, killer: &mut Killer<'_>, rounds: u32) -> Result<()> {
    let mut from_attach = Vec::new();
    let mut from_start = Vec::new();
    for _ in 0..rounds {
        killer.kill()?;
        std::thread::scope(|scope| -> Result<()> {
            // It waits with its request before the process starts.
            let waiting = scope.spawn(|| plain_request(client).map(|()| Instant::now()));
            killer.wait_for_request()?;
            let started = Instant::now();
            killer.revive()?;
            let answered = waiting
                .join()
                .map_err(|_| anyhow::anyhow!("the client panicked"))??;
            from_attach.push(answered.saturating_duration_since(killer.unattached()));
            from_start.push(answered.saturating_duration_since(started));
            Ok(())
        })?;
    }
    let round_trips = (0..rounds)
        .map(|_| timed(|| Ok(plain_request(client)?)))
        .collect::<Result<Vec<_>>>()?;
    let processes = (0..rounds)
        .map(|_| {
            timed(|| {
                let mut trivial = Command::new("true");
                trivial.stdin(Stdio::null()).status()?;
                Ok(())
            })
        })
        .collect::<Result<Vec<_>>>()?;
    println!("over {rounds} restarts, median and longest:");
    for (what, times) in [
        ("attached to first answer, below", from_attach),
        ("started to the first answer", from_start),
        ("floor: a plain request", round_trips),
        ("floor: fork, exec and exit", processes),
    ] {
        let (median, longest) = spread(times);
        println!("    {what:30} {median:>10.1?} {longest:>10.1?}");
    }
    Ok(())
}

fn timed(act: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let began = Instant::now();
    act()?;
    Ok(began.elapsed())
}

/// The median and the longest; zeroes of none.
fn spread(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    (median, times.last().copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_unsorted_times_is_their_median_and_longest() {
        let times = [5, 1, 9].map(Duration::from_secs).to_vec();
        assert_eq!(
            spread(times),
            (Duration::from_secs(5), Duration::from_secs(9))
        );
    }

    #[test]
    fn spread_of_no_times_is_zero() {
        assert_eq!(spread(Vec::new()), (Duration::ZERO, Duration::ZERO));
    }
}
