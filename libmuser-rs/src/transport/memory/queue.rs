// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a request: queued, taken, answered; put back when the server goes away.
//!
//! As in `muser.ko`, a reset is a barrier: it is taken when nothing else is taken any more, and
//! nothing is taken until it has ended.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno as Number;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Errno, Error, Result};
use crate::memory::SharedMemory;
use crate::region::AreaKind;
use crate::transport::difference::Difference;
use crate::transport::dma::DmaTable;
use crate::transport::irqs::Irqs;
use crate::transport::{
    AreaMemory, AttachOptions, Description, Operation, Reply, Request, RequestId, Take, Token,
    STATE_DIFFERS,
};

/// How long a request waits for a server, if nothing else is said; as `muser.ko` has it.
const REATTACH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an unmap waits for the server, if nothing else is said; as `muser.ko` has it.
const UNMAP_TIMEOUT: Duration = Duration::from_secs(1);

/// Requests in flight at one time, as `muser.ko` has them.
#[expect(clippy::cast_possible_truncation, reason = "they are 512")]
const PLACES: u16 = RequestId::PLACES as u16;

/// A device and its requests.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Something that a server may wait for has happened.
    work: Condvar,
    /// Something that a client may wait for has happened.
    progress: Condvar,
    /// Readable while a turn would find something: a request, a ring, a successor, the removal.
    event: EventFd,
    irqs: Arc<Irqs>,
    dma: Arc<DmaTable>,
}

#[derive(Debug)]
struct State {
    device: Option<Described>,
    removed: bool,
    attached: Option<u64>,
    /// Whether a server waits for the attached one to detach.
    standby: bool,
    attachments: u64,
    /// Places in the queue that no request has.
    places: Vec<u16>,
    requests: u64,
    waiting: VecDeque<Pending>,
    taken: BTreeMap<RequestId, Pending>,
    answered: BTreeMap<RequestId, Answer>,
    /// Doorbells that were rung and not answered yet, by region and offset.
    rung: BTreeSet<(u32, u64)>,
    /// Whether a write to a doorbell is over before the server hears of it.
    posted: bool,
    /// What outlives servers.
    memory: Option<SharedMemory>,
    /// The first tag of a server's that was not 0.
    tag: u64,
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

/// What a server gets.
pub(super) struct Attached {
    pub(super) id: u64,
    pub(super) memory: Vec<AreaMemory>,
    pub(super) state: SharedMemory,
}

#[derive(Debug)]
struct Pending {
    id: RequestId,
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
            standby: false,
            attachments: 0,
            places: (0..PLACES).rev().collect(),
            requests: 0,
            waiting: VecDeque::new(),
            taken: BTreeMap::new(),
            answered: BTreeMap::new(),
            rung: BTreeSet::new(),
            posted: true,
            memory: None,
            tag: 0,
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

    pub(super) fn set_posted_doorbells(&self, posted: bool) {
        self.lock().posted = posted;
    }

    pub(super) fn has_posted_doorbells(&self) -> bool {
        self.lock().posted
    }

    /// A client has written to the doorbell area at `offset` of a region.
    pub(super) fn ring(&self, region: u32, offset: u64) {
        let mut state = self.lock();
        state.rung.insert((region, offset));
        self.changed(&mut state);
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
                // Nobody is there any more who could have the places.
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
        state = self.wait_for_place(state);
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
            if state.attached.is_some() || state.standby {
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
                state.withdraw(id);
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
        let deadline = Instant::now() + state.unmap_timeout;
        let mut id = None;
        loop {
            if id.is_none() && !state.places.is_empty() {
                id = Some(state.enqueue(Operation::Unmap { iova, length }, Vec::new(), true));
                self.changed(&mut state);
            }
            let answer = id.and_then(|id| state.answered.remove(&id));
            let left = deadline.saturating_duration_since(Instant::now());
            let over = state.removed || state.attached != attachment || left.is_zero();
            if answer.is_some() || over {
                break;
            }
            let wait = self.progress.wait_timeout(state, left);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        let Some(id) = id else { return };
        if let Some(pending) = state.taken.get_mut(&id) {
            // A reply which comes after all finds nobody who waits for it.
            pending.awaited = false;
        }
        state.withdraw(id);
        self.changed(&mut state);
    }

    /// A server attaches, with a description that must be the one which the device has.
    pub(super) fn attach(
        &self,
        description: &Description,
        options: &AttachOptions,
    ) -> Result<Attached> {
        let mut state = self.lock();
        if state.removed {
            return Err(Error::removed());
        }
        let described = state.device.as_ref().map(|device| &device.description);
        let difference = described.and_then(|device| Difference::between(device, description));
        if let Some(difference) = difference {
            let message = difference.sentence(description);
            return Err(Error::refused(libc::ESTALE, message));
        }
        let tags = [state.tag, options.state_tag];
        if !tags.contains(&0) && tags[0] != tags[1] {
            return Err(Error::refused(libc::ESTALE, STATE_DIFFERS));
        }
        if state.attached.is_some() {
            state = self.stand_by(state, options)?;
        }
        let memory = match &state.device {
            Some(device) => device.memory.clone(),
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
        let outlives = grow(state.memory.as_ref(), options.state_size)?;
        state.memory = Some(outlives.clone());
        if state.tag == 0 {
            state.tag = options.state_tag;
        }
        state.attachments += 1;
        state.attached = Some(state.attachments);
        if state.posted {
            // A client may have rung while nobody listened.
            let doorbells = memory.iter().filter(|area| area.kind == AreaKind::Doorbell);
            state.rung = doorbells.map(|area| (area.region, area.offset)).collect();
        }
        self.changed(&mut state);
        Ok(Attached {
            id: state.attachments,
            memory,
            state: outlives,
        })
    }

    /// Waits until no server is attached any more; the one which is hears of it.
    fn stand_by<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        options: &AttachOptions,
    ) -> Result<MutexGuard<'a, State>> {
        if !options.standby || state.standby {
            let message = if options.standby {
                "another server waits in standby already"
            } else {
                "another server serves it already"
            };
            return Err(Error::refused(libc::EBUSY, message));
        }
        state.standby = true;
        self.changed(&mut state);
        while state.attached.is_some() && !state.removed {
            let wait = self.progress.wait(state);
            state = wait.unwrap_or_else(PoisonError::into_inner);
        }
        state.standby = false;
        if state.removed {
            return Err(Error::removed());
        }
        Ok(state)
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
        let request = reply.token.request();
        if request == RequestId::NONE {
            // A ring, which nobody waits for.
            return Ok(());
        }
        let mut state = self.lock();
        if state.attached != Some(attachment) {
            return Err(Error::io("replying to a request", Number::ENOTCONN));
        }
        let Some(pending) = state.taken.remove(&request) else {
            return Err(Error::io("replying to a request not taken", Number::ENOMSG));
        };
        state.release(request);
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
        }
        self.changed(&mut state);
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
            if take == Take::Nothing {
                return Ok(None);
            }
            if state.attached != Some(attachment) {
                return Err(Error::io("taking a request", Number::ENOTCONN));
            }
            if state.standby {
                return Err(Error::handed_over());
            }
            if let Some((region, offset)) = state.rung.pop_first() {
                self.changed(&mut state);
                let token = Token::new(RequestId::NONE, 0, false);
                let operation = Operation::Doorbell { region, offset };
                return Ok(Some(Request::new(token, operation)));
            }
            if let Some(pending) = state.next() {
                data.clone_from(&pending.data);
                let reads = matches!(pending.operation, Operation::Read { .. });
                let token = Token::new(pending.id, 0, reads);
                let request = Request::new(token, pending.operation);
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

    fn wait_for_place<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let full = |state: &mut State| state.places.is_empty() && !state.removed;
        let wait = self.progress.wait_while(state, full);
        wait.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes who may wait for it, and keeps the event readable while there is something to take.
    fn changed(&self, state: &mut State) {
        let readable =
            state.removed || state.standby || !state.rung.is_empty() || state.is_takeable();
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
    /// Whether the first request that waits can be taken now.
    fn is_takeable(&self) -> bool {
        let is_reset = |pending: &Pending| matches!(pending.operation, Operation::Reset { .. });
        let resetting = self.taken.values().any(is_reset);
        let first = self.waiting.front();
        first.is_some_and(|first| !resetting && (self.taken.is_empty() || !is_reset(first)))
    }

    fn next(&mut self) -> Option<Pending> {
        let takeable = self.is_takeable();
        takeable.then(|| self.waiting.pop_front()).flatten()
    }

    /// Takes a request back that nobody has taken.
    fn withdraw(&mut self, id: RequestId) {
        let before = self.waiting.len();
        self.waiting.retain(|pending| pending.id != id);
        if self.waiting.len() < before {
            self.release(id);
        }
    }

    /// The request has ended, so another may have its place.
    fn release(&mut self, id: RequestId) {
        self.places
            .extend(u16::try_from(id.place()).ok().filter(|at| *at < PLACES));
    }

    fn enqueue(&mut self, operation: Operation, data: Vec<u8>, awaited: bool) -> RequestId {
        self.requests += 1;
        // One that nobody waits for finds a place too: clients have none by then.
        let place = self.places.pop().unwrap_or(PLACES - 1);
        let id = RequestId::new(self.requests << 16 | u64::from(place));
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

/// Memory that outlives servers, of at least that size, with what was in it before.
fn grow(before: Option<&SharedMemory>, size: usize) -> Result<SharedMemory> {
    if let Some(before) = before.filter(|before| before.len() >= size) {
        return Ok(before.clone());
    }
    let memory = SharedMemory::anonymous(size.max(1))?;
    if let Some(before) = before {
        let mut content = vec![0; before.len()];
        before.read_bytes(0, &mut content)?;
        memory.write_bytes(0, &content)?;
    }
    Ok(memory)
}

/// Memory for each area, zeroed.
fn allocate(description: &Description) -> Result<Vec<AreaMemory>> {
    let regions = description.regions.iter();
    let areas = regions.flat_map(|region| region.areas.iter().map(move |area| (region, area)));
    let memory = areas.map(|(region, area)| {
        let len = usize::try_from(area.size)
            .map_err(|_| Error::io("allocating shared memory", Number::ENOMEM))?;
        let memory = SharedMemory::anonymous(len)?;
        Ok(AreaMemory::new(region.index, area, memory))
    });
    memory.collect()
}
