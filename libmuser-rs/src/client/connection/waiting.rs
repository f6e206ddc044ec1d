// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that wait, and which of them leads.

use std::collections::HashMap;
use std::sync::MutexGuard;
use std::thread::{self, Thread, ThreadId};

use super::{Answer, Connection, Goal};
use crate::client::failure::Failure;
use crate::error::{Errno, Error, Result};
use crate::vfio_user::wire::Command;

/// Everything that is being waited for.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) slots: HashMap<u16, Slot>,
    pub(super) next: u16,
    /// The thread that leads.
    pub(super) led: Option<ThreadId>,
    pub(super) flushing: Vec<Thread>,
    /// The thread that serves when nobody else leads.
    pub(super) idle: Option<Thread>,
    pub(super) failure: Option<Failure>,
    pub(super) spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) command: Command,
    /// Who waits; nobody does any more for a reply that was late.
    pub(super) thread: Option<Thread>,
    pub(super) answer: Option<Answer>,
}

impl Waiting {
    /// Checks that this thread may wait for the server.
    ///
    /// # Errors
    ///
    /// `EDEADLK`: it leads, so it was called by memory that it is just serving.
    pub(super) fn check_thread(&self) -> Result<()> {
        if self.led == Some(thread::current().id()) {
            let errno = Errno::new(libc::EDEADLK).unwrap_or(Errno::EBUSY);
            let message = "memory that the server reaches by asking can't wait for the server";
            return Err(Error::new(errno, message));
        }
        Ok(())
    }

    /// Has this thread woken when all is sent, or when it is to lead.
    pub(super) fn join_flushing(&mut self) {
        self.leave_flushing();
        self.flushing.push(thread::current());
    }

    /// This thread waits for that no more: an entry which stayed would be woken in place of a thread
    /// that waits.
    pub(super) fn leave_flushing(&mut self) {
        let this = thread::current().id();
        self.flushing.retain(|thread| thread.id() != this);
    }
}

/// A thread that leads; it hands over to another one when this is dropped.
pub(super) struct Leading<'a>(pub(super) &'a Connection);

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.led = None;
        drop(waiting);
        self.0.show();
        hand_over(self.0.lock());
    }
}

/// A thread that waits; when a panic takes it away, nobody takes it for one that does.
pub(super) struct Departure<'a>(pub(super) &'a Connection, pub(super) Goal);

impl Drop for Departure<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let mut waiting = self.0.lock();
        match self.1 {
            Goal::Answer(id) => {
                // The reply may still come, and must not be taken for that to another command.
                let slot = waiting.slots.get_mut(&id);
                let answered = slot.is_some_and(|slot| {
                    slot.thread = None;
                    slot.answer.is_some()
                });
                if answered {
                    waiting.slots.remove(&id);
                }
            }
            Goal::Flushed => waiting.leave_flushing(),
            Goal::End | Goal::Nothing => {}
        }
        hand_over(waiting);
    }
}

/// Has another thread lead, if none does. A thread that stops waiting does this: it may be the one
/// that was to lead next.
pub(super) fn hand_over(mut waiting: MutexGuard<'_, Waiting>) {
    if waiting.led.is_some() {
        return;
    }
    let this = thread::current().id();
    let slots = waiting.slots.values();
    let mut followers = slots
        .filter(|slot| slot.answer.is_none())
        .filter_map(|slot| slot.thread.as_ref())
        .filter(|thread| thread.id() != this);
    let next = followers.next().cloned();
    let mut flushing = waiting.flushing.iter().rev();
    let next = next.or_else(|| flushing.find(|thread| thread.id() != this).cloned());
    let next = next.or_else(|| waiting.idle.take());
    drop(waiting);
    if let Some(next) = next {
        next.unpark();
    }
}
