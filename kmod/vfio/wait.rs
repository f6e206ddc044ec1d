// SPDX-License-Identifier: GPL-2.0
//! Waiting with an end: killable or interruptible, and with a timeout.
//!
//! The kernel crate's `CondVar` and `Completion` have no killable waits, and a client of a device
//! must not wait in any other way.
//!
//! C headers: `include/linux/wait.h`, `include/linux/completion.h`.

use super::bindings;
use kernel::{
    fs::File,
    prelude::*,
    sync::LockClassKey,
    types::Opaque, //
};

/// A time to wait, in jiffies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeout(c_long);

impl Timeout {
    /// No end but the event or a signal.
    pub(crate) const NEVER: Self = Self(c_long::MAX);
    /// Do not wait.
    pub(crate) const NOW: Self = Self(0);

    /// At least so many milliseconds.
    pub(crate) fn from_ms(ms: u32) -> Self {
        // SAFETY: A plain conversion.
        let jiffies = unsafe { bindings::__msecs_to_jiffies(ms) };
        Self(c_long::try_from(jiffies).unwrap_or(c_long::MAX))
    }
}

/// A point in time, for [`Timeout::until`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

impl Moment {
    /// The present.
    pub(crate) fn now() -> Self {
        // SAFETY: A plain look at the clock.
        Self(unsafe { bindings::muser_jiffies() })
    }
}

impl Timeout {
    /// From now until `ms` milliseconds after `start`.
    pub(crate) fn until(start: Moment, ms: u32) -> Self {
        let passed = Moment::now().0.saturating_sub(start.0);
        let passed = c_long::try_from(passed).unwrap_or(c_long::MAX);
        Self(Self::from_ms(ms).0.saturating_sub(passed).max(0))
    }

    /// Whether there is nothing left to wait.
    pub(crate) fn is_over(self) -> bool {
        self.0 == 0
    }
}

/// Which signals end a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signals {
    /// Only those that kill the process.
    Fatal,
    /// All.
    Any,
}

/// How a wait ended.
#[derive(Debug)]
pub(crate) enum Woken<R> {
    /// The condition came true.
    Ready(R),
    /// Time is up.
    TimedOut,
    /// A signal came.
    Signal,
}

/// Tasks that wait for a condition, and files that poll for it.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head>,
}

// SAFETY: A `wait_queue_head` may be used from any thread.
unsafe impl Send for WaitQueue {}
// SAFETY: A `wait_queue_head` has a lock of its own.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Makes an empty queue, with a name and a lock class for lockdep.
    pub(crate) fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes, and `name` and `key` live for ever.
            head <- Opaque::ffi_init(|slot| unsafe {
                bindings::__init_waitqueue_head(slot, name.as_char_ptr(), key.as_ptr())
            }),
        })
    }

    /// Wakes one waiting task and everything that polls.
    pub(crate) fn wake_one(&self) {
        self.wake(1);
    }

    /// Wakes all.
    pub(crate) fn wake_all(&self) {
        self.wake(0);
    }

    fn wake(&self, exclusive: c_int) {
        // SAFETY: The head is initialised and pinned.
        unsafe {
            bindings::__wake_up(
                self.head.get(),
                bindings::TASK_NORMAL,
                exclusive,
                core::ptr::null_mut(),
            )
        };
    }

    /// Waits until `condition` gives a value.
    ///
    /// `condition` is evaluated before each sleep, in a task state other than running: it may take
    /// spinlocks, but must not sleep. It decides before signals and time do, so that a wake-up is
    /// never lost.
    pub(crate) fn wait<R>(
        &self,
        signals: Signals,
        timeout: Timeout,
        mut condition: impl FnMut() -> Option<R>,
    ) -> Woken<R> {
        if timeout.is_over() {
            return condition().map_or(Woken::TimedOut, Woken::Ready);
        }
        let state = match signals {
            Signals::Fatal => bindings::muser_constants_MUSER_TASK_KILLABLE,
            Signals::Any => bindings::muser_constants_MUSER_TASK_INTERRUPTIBLE,
        } as c_int;
        let entry = Opaque::<bindings::wait_queue_entry>::uninit();
        // SAFETY: The entry is valid for writes; it does not move until `finish_wait` below.
        unsafe { bindings::init_wait(entry.get()) };
        let mut left = timeout.0;
        let woken = loop {
            // SAFETY: Head and entry are initialised, and the entry outlives its place in the list.
            unsafe { bindings::prepare_to_wait_exclusive(self.head.get(), entry.get(), state) };
            if let Some(value) = condition() {
                break Woken::Ready(value);
            }
            if left == 0 {
                break Woken::TimedOut;
            }
            if signal_pending(signals) {
                break Woken::Signal;
            }
            // SAFETY: The task state was set by `prepare_to_wait_exclusive`.
            left = unsafe { bindings::schedule_timeout(left) };
        };
        // SAFETY: As for `prepare_to_wait_exclusive`.
        unsafe { bindings::finish_wait(self.head.get(), entry.get()) };
        if !matches!(woken, Woken::Ready(_)) {
            // This waiter may have been chosen by a `wake_one` in the meantime, instead of another.
            self.wake_one();
        }
        woken
    }
}

impl WaitQueue {
    /// Has `file`'s poller woken.
    ///
    /// # Safety
    ///
    /// `table` must be what the `poll` operation of `file` was called with, and the queue must live
    /// as long as the file.
    pub(super) unsafe fn register(&self, file: &File, table: *mut bindings::poll_table) {
        // SAFETY: By the safety requirements.
        unsafe { bindings::poll_wait(file.as_ptr(), self.head.get(), table) };
    }
}

fn signal_pending(signals: Signals) -> bool {
    match signals {
        // SAFETY: Looks at the current task.
        Signals::Fatal => unsafe { bindings::muser_fatal_signal_pending() },
        Signals::Any => kernel::current!().signal_pending(),
    }
}

/// Something that happens once.
#[pin_data]
pub(crate) struct Completion {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: A `completion` may be used from any thread.
unsafe impl Send for Completion {}
// SAFETY: A `completion` has a lock of its own.
unsafe impl Sync for Completion {}

impl Completion {
    /// Makes a completion that has not happened.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes.
            inner <- Opaque::ffi_init(|slot| unsafe { bindings::init_completion(slot) }),
        })
    }

    /// Makes it happen.
    pub(crate) fn complete(&self) {
        // SAFETY: Initialised and pinned.
        unsafe { bindings::complete_all(self.inner.get()) };
    }

    /// Waits for it, killably.
    pub(crate) fn wait(&self, timeout: Timeout) -> Woken<()> {
        // SAFETY: Initialised and pinned.
        let left = unsafe {
            bindings::wait_for_completion_killable_timeout(
                self.inner.get(),
                timeout.0.unsigned_abs(),
            )
        };
        match left {
            0 => Woken::TimedOut,
            1.. => Woken::Ready(()),
            _ => Woken::Signal,
        }
    }
}
