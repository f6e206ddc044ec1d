// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gate that every call of the device goes through: many accesses at a time, or one thread alone.
//!
//! Resets go through it alone, and so does whoever quiesces the device. Who wants to be alone goes
//! before those who come later, so that a stream of accesses can't keep a reset out.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::error::{Errno, Error, Result};

/// Who is in the device.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// # Invariants
///
/// `inside` is empty while somebody is alone.
#[derive(Debug, Default)]
struct State {
    /// Threads in an access.
    inside: Vec<ThreadId>,
    /// The thread that is alone.
    alone: Option<ThreadId>,
    /// How many want to be alone.
    waiting: usize,
    /// How many accesses wait, for a test to see.
    #[cfg(test)]
    kept_out: usize,
}

impl Gate {
    /// Goes in together with others.
    pub(crate) fn enter(&self) -> Passage<'_> {
        let shut = |state: &mut State| state.alone.is_some() || state.waiting > 0;
        let mut state = self.lock();
        #[cfg(test)]
        {
            state.kept_out += 1;
        }
        state = self.wait_while(state, shut);
        #[cfg(test)]
        {
            state.kept_out -= 1;
        }
        state.inside.push(thread::current().id());
        Passage {
            gate: self,
            alone: false,
        }
    }

    /// Goes in alone, once everybody else is out.
    pub(crate) fn enter_alone(&self) -> Passage<'_> {
        self.be_alone(self.lock());
        Passage {
            gate: self,
            alone: true,
        }
    }

    /// Keeps everybody out.
    ///
    /// # Errors
    ///
    /// `EDEADLK`: this very thread is in.
    pub(crate) fn quiesce(self: &Arc<Self>) -> Result<Quiesced> {
        let state = self.lock();
        let this = thread::current().id();
        if state.inside.contains(&this) || state.alone == Some(this) {
            let message = "a thread can't wait for the end of the access that it is in";
            return Err(Error::new(Errno::EDEADLK, message));
        }
        self.be_alone(state);
        Ok(Quiesced {
            gate: Arc::clone(self),
        })
    }

    fn be_alone(&self, mut state: MutexGuard<'_, State>) {
        state.waiting += 1;
        let busy = |state: &mut State| state.alone.is_some() || !state.inside.is_empty();
        let mut state = self.wait_while(state, busy);
        state.waiting -= 1;
        // INVARIANT: nobody is inside.
        state.alone = Some(thread::current().id());
    }

    fn leave(&self, alone: bool) {
        let mut state = self.lock();
        if alone {
            state.alone = None;
        } else {
            let this = thread::current().id();
            let place = state.inside.iter().position(|thread| *thread == this);
            place.map(|place| state.inside.swap_remove(place));
        }
        if state.inside.is_empty() {
            self.changed.notify_all();
        }
    }

    fn wait_while<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        busy: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_while(state, busy);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Being in; dropping it is leaving.
#[derive(Debug)]
pub(crate) struct Passage<'a> {
    gate: &'a Gate,
    alone: bool,
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.alone);
    }
}

/// A device that is left alone: no call of it is running, and none begins until this is dropped.
/// See [`Bus::quiesce`](crate::Bus::quiesce).
#[derive(Debug)]
#[must_use = "the device goes on when this is dropped"]
pub struct Quiesced {
    gate: Arc<Gate>,
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        self.gate.leave(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Barrier;
    use std::time::{Duration, Instant};

    /// Waits until other threads have come so far at the gate.
    fn wait_until(gate: &Gate, mut is_so: impl FnMut(&State) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so(&gate.lock()) {
            assert!(Instant::now() < deadline, "it did not come to be");
            thread::yield_now();
        }
    }

    #[test]
    fn many_go_in_together() {
        const THREADS: usize = 4;
        let gate = Gate::default();
        // Nobody passes it who is not in together with all others.
        let together = Barrier::new(THREADS);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let _passage = gate.enter();
                    together.wait();
                });
            }
        });
        assert!(gate.lock().inside.is_empty());
    }

    #[test]
    fn who_is_alone_is_alone() {
        const THREADS: usize = 4;
        let gate = Gate::default();
        let (inside, alone) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for round in 0..500 {
                        let alone_here = round % 7 == 0;
                        let passage = if alone_here {
                            gate.enter_alone()
                        } else {
                            gate.enter()
                        };
                        let others = inside.fetch_add(1, Ordering::SeqCst);
                        let lonely = alone.fetch_add(alone_here.into(), Ordering::SeqCst);
                        // Nobody is in with who is alone, whoever was there first.
                        assert!(!alone_here || others == 0);
                        assert_eq!(lonely, 0);
                        thread::yield_now();
                        alone.fetch_sub(alone_here.into(), Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(passage);
                    }
                });
            }
        });
        assert_eq!(gate.lock().waiting, 0);
    }

    #[test]
    fn who_wants_to_be_alone_goes_before_later_accesses() {
        let gate = Gate::default();
        let order = Mutex::new(Vec::new());
        let first = gate.enter();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _passage = gate.enter_alone();
                order.lock().unwrap().push("alone");
            });
            wait_until(&gate, |state| state.waiting == 1);
            scope.spawn(|| {
                let _passage = gate.enter();
                order.lock().unwrap().push("access");
            });
            wait_until(&gate, |state| state.kept_out == 1);
            drop(first);
        });
        assert_eq!(order.into_inner().unwrap(), ["alone", "access"]);
    }

    #[test]
    fn quiesce_from_inside_is_refused() {
        let gate = Arc::new(Gate::default());

        let access = gate.enter();
        assert_eq!(gate.quiesce().unwrap_err().errno(), Errno::EDEADLK);
        drop(access);
        let reset = gate.enter_alone();
        assert_eq!(gate.quiesce().unwrap_err().errno(), Errno::EDEADLK);
        drop(reset);

        assert!(gate.quiesce().is_ok());
    }

    #[test]
    fn quiesced_is_left_alone_until_dropped() {
        let gate = Arc::new(Gate::default());
        let entered = AtomicUsize::new(0);
        let quiesced = gate.quiesce().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _passage = gate.enter();
                entered.fetch_add(1, Ordering::SeqCst);
            });
            scope.spawn(|| {
                let _passage = gate.enter_alone();
                entered.fetch_add(1, Ordering::SeqCst);
            });
            // Both are at the gate, and nobody is in.
            wait_until(&gate, |state| state.kept_out == 1 && state.waiting == 1);
            assert_eq!(entered.load(Ordering::SeqCst), 0);
            // It may be dropped in another thread than the one that made it.
            scope.spawn(move || drop(quiesced));
        });
        assert_eq!(entered.load(Ordering::SeqCst), 2);
    }
}
