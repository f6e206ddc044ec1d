// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ranges in use, of which nothing may be let go.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::transport::dma::IovaRange;

/// All leases of a device.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    next: u64,
    /// Last IOVA by first IOVA and number: there may be several of one range.
    ranges: BTreeMap<(u64, u64), u64>,
}

/// Keeps a range from being let go of, until it is dropped.
#[derive(Debug)]
pub(super) struct Lease {
    leases: Arc<Leases>,
    key: (u64, u64),
}

impl Leases {
    pub(super) fn take(leases: &Arc<Self>, range: IovaRange) -> Lease {
        let mut held = leases.lock();
        let key = (range.first(), held.next);
        held.next += 1;
        held.ranges.insert(key, range.last());
        Lease {
            leases: Arc::clone(leases),
            key,
        }
    }

    /// Hands out what nobody has a lease of in a range, while no lease can be taken.
    pub(super) fn outside(
        &self,
        range: IovaRange,
        mut work: impl FnMut(IovaRange) -> Result<()>,
    ) -> Result<()> {
        let held = self.lock();
        let mut next = range.first();
        for ((first, _), &last) in held.ranges.range(..=(range.last(), u64::MAX)) {
            if *first > next {
                work(IovaRange::between(next, first - 1))?;
            }
            match last.checked_add(1) {
                Some(end) => next = next.max(end),
                None => return Ok(()),
            }
        }
        if next <= range.last() {
            work(IovaRange::between(next, range.last()))?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leases.lock().ranges.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(leases: &Leases, range: IovaRange) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let work = |free: IovaRange| {
            found.push((free.first(), free.last()));
            Ok(())
        };
        leases.outside(range, work).unwrap();
        found
    }

    #[test]
    fn leases_cut_holes() {
        let leases = Arc::<Leases>::default();
        let _first = Leases::take(&leases, IovaRange::between(100, 199));
        let again = Leases::take(&leases, IovaRange::between(100, 149));
        let inner = Leases::take(&leases, IovaRange::between(300, 399));
        let _outer = Leases::take(&leases, IovaRange::between(350, 360));

        let all = IovaRange::between(0, 499);
        assert_eq!(outside(&leases, all), [(0, 99), (200, 299), (400, 499)]);
        assert_eq!(outside(&leases, IovaRange::between(150, 250)), [(200, 250)]);
        assert_eq!(outside(&leases, IovaRange::between(100, 199)), []);
        drop((again, inner));
        assert_eq!(outside(&leases, all), [(0, 99), (200, 349), (361, 499)]);
    }

    #[test]
    fn last_iova_can_be_leased() {
        let leases = Arc::<Leases>::default();
        let _last = Leases::take(&leases, IovaRange::between(u64::MAX - 1, u64::MAX));

        let top = IovaRange::between(u64::MAX - 9, u64::MAX);

        assert_eq!(outside(&leases, top), [(u64::MAX - 9, u64::MAX - 2)]);
    }
}
