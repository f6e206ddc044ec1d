// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a request: queued, taken, answered; put back when the server goes away.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno as Number;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{memfd_create, MFdFlags};

use super::irqs::Irqs;
use crate::error::{Errno, Error, Result};
use crate::memory::SharedMemory;
use crate::sys::Mapping;
use crate::transport::dma::DmaTable;
use crate::transport::{AreaMemory, Description, Operation, Reply, Request, Take, Token};

/// How long a request waits for a server, if nothing else is said; as `muser.ko` has it.
const REATTACH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an unmap waits for the server, if nothing else is said; as `muser.ko` has it.
const UNMAP_TIMEOUT: Duration = Duration::from_secs(1);

/// A device and its requests.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Something that a server may wait for has happened.
    work: Condvar,
    /// Something that a client may wait for has happened.
    progress: Condvar,
    /// Readable while a request waits, or the device is removed.
    event: EventFd,
    irqs: Arc<Irqs>,
    dma: Arc<DmaTable>,
}

#[derive(Debug)]
struct State {
    device: Option<Described>,
    removed: bool,
    attached: Option<u64>,
    attachments: u64,
    requests: u64,
    waiting: VecDeque<Pending>,
    taken: BTreeMap<u64, Pending>,
    answered: BTreeMap<u64, Answer>,
    clients: usize,
    /// Whether `event` is readable.
    readable: bool,
    reattach_timeout: Duration,
    unmap_timeout: Duration,
}

/// What the first server described.
#[derive(Clone, Debug)]
pub(super) struct Described {
    pub(super) description: Arc<Description>,
    pub(super) memory: Vec<AreaMemory>,
}

#[derive(Debug)]
struct Pending {
    id: u64,
    operation: Operation,
    data: Vec<u8>,
    replay: bool,
    /// Whether a client waits for the answer.
    awaited: bool,
}

#[derive(Debug)]
struct Answer {
    result: Result<(), Errno>,
    data: Vec<u8>,
}

impl Queue {
    pub(super) fn new() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::io("making an eventfd", errno))?;
        let state = State {
            device: None,
            removed: false,
            attached: None,
            attachments: 0,
            requests: 0,
            waiting: VecDeque::new(),
            taken: BTreeMap::new(),
            answered: BTreeMap::new(),
            clients: 0,
            readable: false,
            reattach_timeout: REATTACH_TIMEOUT,
            unmap_timeout: UNMAP_TIMEOUT,
        };
        Ok(Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            progress: Condvar::new(),
            event,
            irqs: Arc::default(),
            dma: Arc::default(),
        })
    }

    pub(super) fn irqs(&self) -> Arc<Irqs> {
        Arc::clone(&self.irqs)
    }

    pub(super) fn dma(&self) -> Arc<DmaTable> {
        Arc::clone(&self.dma)
    }

    pub(super) fn set_unmap_timeout(&self, timeout: Duration) {
        self.lock().unmap_timeout = timeout;
    }

    pub(super) fn set_reattach_timeout(&self, timeout: Duration) {
        self.lock().reattach_timeout = timeout;
    }

    pub(super) fn remove(&self) {
        let mut state = self.lock();
        state.removed = true;
        self.changed(&mut state);
    }

    /// A client opens the device.
    pub(super) fn open(&self) -> io::Result<Described> {
        let mut state = self.lock();
        if state.removed {
            return Err(Number::ENODEV.into());
        }
        let device = state.device.clone().ok_or(Number::ENXIO)?;
        state.clients += 1;
        Ok(device)
    }

    /// A client closes the device; the last one leaves its memory as zeroes and has it reset.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.clients -= 1;
        if state.clients == 0 {
            self.irqs.disable_all();
            self.dma.clear();
            for area in state.device.iter().flat_map(|device| &device.memory) {
                area.memory.clear();
            }
            let reset = Operation::Reset { close: true };
            let doubled = state
                .waiting
                .back()
                .is_some_and(|last| last.operation == reset);
            if !doubled {
                state.enqueue(reset, Vec::new(), false);
                self.changed(&mut state);
            }
        }
    }

    /// A client makes a request and waits for its answer, whose data is returned.
    pub(super) fn request(&self, operation: Operation, data: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut state = self.lock();
        if state.removed {
            return Err(Number::ENODEV.into());
        }
        let id = state.enqueue(operation, data, true);
        self.changed(&mut state);
        let mut unserved_since = None;
        loop {
            if let Some(answer) = state.answered.remove(&id) {
                return answer.result.map(|()| answer.data).map_err(io::Error::from);
            }
            if state.removed {
                return Err(Number::ENODEV.into());
            }
            if state.attached.is_some() {
                unserved_since = None;
                state = self
                    .progress
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let since = *unserved_since.get_or_insert_with(Instant::now);
            let left = state.reattach_timeout.saturating_sub(since.elapsed());
            if left.is_zero() {
                state.waiting.retain(|pending| pending.id != id);
                self.changed(&mut state);
                return Err(Number::ETIMEDOUT.into());
            }
            let wait = self.progress.wait_timeout(state, left);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tells the server, if there is one, that memory goes away, and waits for its reply; but not
    /// for long.
    pub(super) fn announce_unmap(&self, iova: u64, length: u64) {
        let mut state = self.lock();
        if state.removed || state.attached.is_none() {
            return;
        }
        let attachment = state.attached;
        let id = state.enqueue(Operation::Unmap { iova, length }, Vec::new(), true);
        self.changed(&mut state);
        let deadline = Instant::now() + state.unmap_timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answered = state.answered.remove(&id).is_some();
            if answered || state.removed || state.attached != attachment || left.is_zero() {
                break;
            }
            let wait = self.progress.wait_timeout(state, left);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        // A reply which comes after all finds nobody who waits for it.
        state.waiting.retain(|pending| pending.id != id);
        if let Some(pending) = state.taken.get_mut(&id) {
            pending.awaited = false;
        }
        self.changed(&mut state);
    }

    /// A server attaches, with a description that must be the one which the device has.
    pub(super) fn attach(&self, description: &Description) -> Result<(u64, Vec<AreaMemory>)> {
        let mut state = self.lock();
        if state.removed {
            return Err(Error::removed());
        }
        if state.attached.is_some() {
            return Err(Error::refused(
                libc::EBUSY,
                "another server serves it already",
            ));
        }
        let memory = match &state.device {
            Some(device) if *device.description == *description => device.memory.clone(),
            Some(_) => {
                return Err(Error::refused(
                    libc::ESTALE,
                    "it was described differently before",
                ));
            }
            None => {
                let memory = allocate(description)?;
                let described = Arc::new(description.clone());
                self.irqs.describe(&described);
                state.device = Some(Described {
                    description: described,
                    memory: memory.clone(),
                });
                memory
            }
        };
        state.attachments += 1;
        state.attached = Some(state.attachments);
        self.progress.notify_all();
        Ok((state.attachments, memory))
    }

    /// A server goes away: what it has taken returns to its place in the queue.
    pub(super) fn detach(&self, attachment: u64) {
        let mut state = self.lock();
        if state.attached != Some(attachment) {
            return;
        }
        state.attached = None;
        let taken = std::mem::take(&mut state.taken);
        for (_, pending) in taken.into_iter().rev() {
            state.waiting.push_front(Pending {
                replay: true,
                ..pending
            });
        }
        self.changed(&mut state);
    }

    pub(super) fn reply(&self, attachment: u64, reply: Reply, data: &[u8]) -> Result<()> {
        let mut state = self.lock();
        let pending = state.taken.remove(&reply.token.0).filter(|_| {
            // A server which is not attached any more has nothing taken.
            state.attached == Some(attachment)
        });
        let Some(pending) = pending else {
            return Err(Error::io("replying to a request not taken", Number::ENOMSG));
        };
        if pending.awaited {
            let reads = matches!(pending.operation, Operation::Read { .. });
            let data = if reads { data.to_vec() } else { Vec::new() };
            state.answered.insert(
                pending.id,
                Answer {
                    result: reply.result,
                    data,
                },
            );
            self.progress.notify_all();
        }
        Ok(())
    }

    pub(super) fn take(
        &self,
        attachment: u64,
        take: Take,
        data: &mut Vec<u8>,
    ) -> Result<Option<Request>> {
        let mut state = self.lock();
        loop {
            if state.removed {
                return Err(Error::removed());
            }
            if state.attached != Some(attachment) || take == Take::Nothing {
                return Ok(None);
            }
            if let Some(pending) = state.waiting.pop_front() {
                data.clone_from(&pending.data);
                let request = Request::new(Token(pending.id), pending.operation);
                let request = Request {
                    replay: pending.replay,
                    ..request
                };
                state.taken.insert(pending.id, pending);
                self.changed(&mut state);
                return Ok(Some(request));
            }
            if take == Take::Ready {
                return Ok(None);
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes who may wait for it, and keeps the event readable while there is something to take.
    fn changed(&self, state: &mut State) {
        let readable = state.removed || !state.waiting.is_empty();
        if readable != state.readable {
            state.readable = readable;
            // Neither can fail: the counter is 0 before the write and 1 before the read.
            let _ = if readable {
                self.event.write(1).map(drop)
            } else {
                self.event.read().map(drop)
            };
        }
        self.work.notify_all();
        self.progress.notify_all();
    }
}

impl State {
    fn enqueue(&mut self, operation: Operation, data: Vec<u8>, awaited: bool) -> u64 {
        self.requests += 1;
        let id = self.requests;
        self.waiting.push_back(Pending {
            id,
            operation,
            data,
            replay: false,
            awaited,
        });
        id
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Memory for each mappable area, zeroed.
fn allocate(description: &Description) -> Result<Vec<AreaMemory>> {
    let regions = description.regions.iter();
    let areas = regions.flat_map(|region| region.areas.iter().map(move |area| (region, area)));
    let memory = areas.map(|(region, area)| {
        let failed = |errno| Error::io("allocating shared memory", errno);
        let file = File::from(memfd_create("muser", MFdFlags::MFD_CLOEXEC).map_err(failed)?);
        file.set_len(area.size)
            .map_err(|error| Error::io("allocating shared memory", error))?;
        let len = usize::try_from(area.size).map_err(|_| failed(Number::ENOMEM))?;
        let mapping = Mapping::new(file.as_fd(), 0, len, true).map_err(failed)?;
        Ok(AreaMemory::new(
            region.index,
            area.offset,
            SharedMemory::new(mapping),
        ))
    });
    memory.collect()
}
