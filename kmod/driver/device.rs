// SPDX-License-Identifier: GPL-2.0
//! A device: what stays while clients and processes come and go.
//!
//! # Locks
//!
//! `state` is a spinlock, held for a few instructions and never over a copy, an allocation or a
//! wait. The other locks (a request's `data`, an interrupt index's `vectors`, the memory's
//! `allocating`, the doorbells' `listeners`) are mutexes of which nothing takes two; only the last is
//! held when `state` is taken. The memory's tree has a spinlock of its own, the only lock that is taken inside another: `allocating`.

use crate::{
    driver::{
        description::Arrays,
        doorbells::Doorbells,
        irqs::Irqs,
        memory::Memory,
        queue::{Id, Queue, Withdrawn},
        request::Request,
        state::State,
        users::{Allowance, Place}, //
    },
    uapi::*,
    vfio::{
        errno::Errno,
        inode::{Inode, Inodes},
        pins::Pins,
        shared::SharedMemory,
        wait::{Moment, Signals, Timeout, WaitQueue, Woken}, //
    },
};
use core::mem::{offset_of, size_of};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    static_lock_class,
    str::CString,
    sync::{
        atomic::{Atomic, Relaxed},
        new_spinlock,
        Arc,
        SetOnce,
        SpinLock, //
    },
};

/// Requests in flight at a time, and the default of the attribute `max_requests`.
pub(crate) const MAX_REQUESTS: u32 = 512;
/// How many processes in a row a request may end before it is given up.
const MAX_REPLAYS: u32 = 64;
/// Default of the attribute `reattach_timeout_ms`.
const REATTACH_TIMEOUT_MS: u32 = 5_000;
/// Default of the attribute `max_memory`, in bytes.
const MAX_MEMORY: u64 = 256 << 20;
/// Default of the attribute `max_pinned`, in bytes.
const MAX_PINNED: u64 = 1 << 30;
/// Default of the attribute `unmap_timeout_ms`.
const UNMAP_TIMEOUT_MS: u32 = 1_000;

/// Default of the attribute `max_state`, in bytes.
const MAX_STATE: u32 = 1 << 20;
/// Default of the attribute `max_vectors`: twice what an MSI-X table holds.
const MAX_VECTORS: u32 = 4096;

/// The description that the first process gave, and what was made by it.
pub(crate) struct Described {
    regions: KVec<muser_region>,
    areas: KVec<muser_area>,
    irq_list: KVec<muser_irq>,
    bus: u32,
    /// The device's interrupts.
    pub(crate) irqs: Arc<Irqs>,
}

impl Described {
    /// Keeps checked arrays.
    pub(crate) fn new(
        bus: u32,
        regions: KVec<muser_region>,
        areas: KVec<muser_area>,
        irq_list: KVec<muser_irq>,
        status: Arc<SharedMemory>,
    ) -> Result<Self> {
        let irqs = Irqs::new(&irq_list, status)?;
        Ok(Self {
            regions,
            areas,
            irq_list,
            bus,
            irqs,
        })
    }

    /// The description.
    pub(crate) fn arrays(&self) -> Arrays<'_> {
        Arrays {
            bus: self.bus,
            regions: &self.regions,
            areas: &self.areas,
            irqs: &self.irq_list,
        }
    }
}

/// Counts events of one kind.
pub(crate) struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    /// Counts `n` more.
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What the device has done; see `muser_counters` for the meaning of each.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) resets: Counter,
    pub(crate) memory_reads: Counter,
    pub(crate) memory_writes: Counter,
    pub(crate) interrupts: Counter,
    pub(crate) timeouts: Counter,
    pub(crate) replays: Counter,
    pub(crate) withdrawn: Counter,
    pub(crate) attachments: Counter,
    pub(crate) unmaps: Counter,
    pub(crate) unmaps_forced: Counter,
    pub(crate) doorbells: Counter,
}

/// What was said in the log once, so that a hostile process can't flood it.
pub(crate) struct Complaints(Atomic<u32>);

/// Something worth one line in the log.
#[derive(Clone, Copy)]
pub(crate) enum Complaint {
    /// A description was refused.
    Description,
    /// A reply was refused.
    Reply,
    /// Nobody answered in time.
    Timeout,
    /// There is no room for another request.
    Full,
    /// A process went away before it had answered everything.
    Gone,
    /// A process did not answer an unmap in time.
    Unmap,
}

impl Complaints {
    fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Whether this is the first of its kind.
    pub(crate) fn is_first(&self, complaint: Complaint) -> bool {
        let bit = 1 << complaint as u32;
        let mut said = self.0.load(Relaxed);
        while said & bit == 0 {
            match self.0.cmpxchg(said, said | bit, Relaxed) {
                Ok(_) => return true,
                Err(now) => said = now,
            }
        }
        false
    }
}

/// A device.
#[pin_data]
pub(crate) struct Device {
    name: CString,
    /// `MUSER_BUS_*` of its type.
    pub(crate) bus: u32,
    /// What it is made of, once a process said so.
    pub(crate) described: SetOnce<Described>,
    /// What changes.
    #[pin]
    pub(crate) state: SpinLock<State>,
    /// Threads of the process that wait for a request, and pollers.
    #[pin]
    pub(crate) takers: WaitQueue,
    /// The thread which waits in standby.
    #[pin]
    pub(crate) successor: WaitQueue,
    /// Threads of clients that wait for room for a request.
    #[pin]
    room: WaitQueue,
    /// It counts for its creator until the last file of it is closed.
    _place: Place,
    /// Pages of mappable areas.
    pub(crate) memory: Arc<Memory>,
    /// Pages of its client's memory.
    pub(crate) pins: Arc<Pins>,
    /// The attachment that last failed to answer an unmap, and nothing since.
    pub(crate) deaf: Atomic<u64>,
    /// Who is told of writes to doorbells.
    #[pin]
    pub(crate) doorbells: Doorbells,
    /// The page of `muser_status`.
    pub(crate) status: Arc<SharedMemory>,
    /// What it did.
    pub(crate) counters: Counters,
    /// What was said of it.
    pub(crate) complaints: Complaints,
    /// Attribute: how long a request waits with nobody attached.
    pub(crate) reattach_timeout_ms: Atomic<u32>,
    /// Attribute: bytes of device memory that a description may ask for.
    pub(crate) max_memory: Atomic<u64>,
    /// Attribute: bytes of its client's memory that may be pinned.
    pub(crate) max_pinned: Atomic<u64>,
    /// Attribute: how long a client's unmap waits for the process.
    pub(crate) unmap_timeout_ms: Atomic<u32>,
    /// Attribute: bytes of state that a process may ask for.
    pub(crate) max_state: Atomic<u32>,
    /// Attribute: requests of clients in flight at a time; more threads of clients wait.
    pub(crate) max_requests: Atomic<u32>,
    /// Attribute: vectors that a description may ask for.
    pub(crate) max_vectors: Atomic<u32>,
}

impl Device {
    /// Makes a device which nobody has described.
    pub(crate) fn new(
        name: &CStr,
        bus: u32,
        inodes: &Arc<Inodes>,
        (place, allowance): (Place, Arc<Allowance>),
    ) -> Result<Arc<Self>> {
        let mut places = KVVec::with_capacity(MAX_REQUESTS as usize, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..MAX_REQUESTS {
            places.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        let state = State {
            requests: Queue::new(places, MAX_REPLAYS),
            attachment: None,
            standby: None,
            next_owner: 1,
            detached_since: Moment::now(),
            state_size: 0,
            state_tag: 0,
            removed: false,
            client: false,
        };
        let status = SharedMemory::new(size_of::<muser_status>())?;
        let status = Arc::new(status, GFP_KERNEL_ACCOUNT)?;
        let pins = Pins::new(
            Inode::new(inodes)?,
            MUSER_MMAP_WINDOW as usize / PAGE_SIZE,
            status.clone(),
            offset_of!(muser_status, dma_generation),
        )?;
        Arc::pin_init(
            try_pin_init!(Self {
                name: CString::try_from(name)?,
                bus,
                described: SetOnce::new(),
                state <- new_spinlock!(state, "muser_state"),
                takers <- WaitQueue::new(c"muser_takers", static_lock_class!()),
                successor <- WaitQueue::new(c"muser_successor", static_lock_class!()),
                room <- WaitQueue::new(c"muser_room", static_lock_class!()),
                memory: Memory::new(allowance)?,
                _place: place,
                doorbells <- Doorbells::new(),
                pins,
                deaf: Atomic::new(0),
                status,
                counters: Counters::default(),
                complaints: Complaints::new(),
                reattach_timeout_ms: Atomic::new(REATTACH_TIMEOUT_MS),
                max_memory: Atomic::new(MAX_MEMORY),
                max_pinned: Atomic::new(MAX_PINNED),
                unmap_timeout_ms: Atomic::new(UNMAP_TIMEOUT_MS),
                max_state: Atomic::new(MAX_STATE),
                max_requests: Atomic::new(MAX_REQUESTS),
                max_vectors: Atomic::new(MAX_VECTORS),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Its UUID.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// The description.
    ///
    /// # Errors
    ///
    /// `ENXIO` if no process has given one yet.
    pub(crate) fn described(&self) -> Result<&Described> {
        self.described.as_ref().ok_or(ENXIO)
    }

    /// Says that a client opened the device, or that it is gone.
    pub(crate) fn set_client(&self, client: bool) {
        let mut state = self.state.lock();
        state.client = client;
        self.publish(&state);
    }

    /// Shows the process what it can see of the state.
    pub(crate) fn publish(&self, state: &State) {
        let offset = offset_of!(muser_status, flags);
        // The page holds the whole struct, so this can't fail.
        let _ = self.status.store(offset, state.shown());
    }

    /// Has a process perform a request, and waits for it: killably, and with nobody attached for
    /// `reattach_timeout_ms` at most.
    ///
    /// # Errors
    ///
    /// The process's own, `ETIMEDOUT`, `EINTR` if the caller is being killed, `ENODEV` if the
    /// device is removed.
    pub(crate) fn perform(&self, request: &Arc<Request>) -> Result {
        let start = Moment::now();
        let queued = self
            .room
            .wait(Signals::Fatal, Timeout::NEVER, || self.queue(request));
        let id = match queued {
            Woken::Ready(id) => id?,
            Woken::TimedOut | Woken::Signal => return Err(EINTR),
        };
        self.takers.wake_one();
        loop {
            match request.done().wait(self.patience(start).0) {
                Woken::Ready(()) => return request.result(),
                Woken::Signal => {
                    self.counters.withdrawn.add(1);
                    self.withdraw(id);
                    return Err(EINTR);
                }
                Woken::TimedOut if self.give_up(id, start) => {
                    self.counters.timeouts.add(1);
                    if self.complaints.is_first(Complaint::Timeout) {
                        pr_warn!(
                            "{}: a request failed, no process was attached in time\n",
                            self.name()
                        );
                    }
                    return Err(ETIMEDOUT);
                }
                Woken::TimedOut => {}
            }
        }
    }

    /// Has the process which is attached perform a request, and waits `ms` milliseconds for it at
    /// most.
    ///
    /// # Errors
    ///
    /// The process's own, `ENOTCONN` if there is none, `ETIMEDOUT`, `EINTR`, `EBUSY` for want of
    /// a place.
    pub(crate) fn perform_within(&self, request: &Arc<Request>, ms: u32) -> Result {
        let id = {
            let mut state = self.state.lock();
            if state.attachment.is_none() {
                return Err(Errno::ENOTCONN.into());
            }
            state.queue(request).ok_or(EBUSY)?
        };
        self.takers.wake_one();
        let error = match request.done().wait(Timeout::from_ms(ms)) {
            Woken::Ready(()) => return request.result(),
            Woken::TimedOut => ETIMEDOUT,
            Woken::Signal => EINTR,
        };
        self.withdraw(id);
        Err(error)
    }

    /// Has a process perform a request which nobody waits for. It counts for no limit: places are left
    /// for it, since a process has fewer slots than there are places.
    pub(crate) fn perform_later(&self, request: &Arc<Request>) {
        let kind = request.kind();
        let queued = {
            let mut state = self.state.lock();
            let doubled = state
                .requests
                .last_queued()
                .is_some_and(|last| last.kind() == kind);
            state.removed || doubled || state.queue(request).is_some()
        };
        if !queued && self.complaints.is_first(Complaint::Full) {
            pr_warn!(
                "{}: too many requests in flight to reset the device\n",
                self.name()
            );
        }
        self.takers.wake_one();
    }

    fn queue(&self, request: &Arc<Request>) -> Option<Result<Id>> {
        let mut state = self.state.lock();
        if state.removed {
            return Some(Err(ENODEV));
        }
        let requests = &state.requests;
        if requests.queued() + requests.taken() >= self.max_requests.load(Relaxed) {
            return None;
        }
        state.queue(request).map(Ok)
    }

    /// Sets how many requests of clients may be in flight; those that are stay.
    pub(crate) fn set_max_requests(&self, requests: u32) {
        self.max_requests.store(requests, Relaxed);
        self.room.wake_all();
    }

    /// How long a request made at `start` has left if nothing changes, and whether that is final.
    ///
    /// While a process is attached there is no limit; but a look is due after a time in which it
    /// might have gone away.
    fn patience(&self, start: Moment) -> (Timeout, bool) {
        self.patience_in(&self.state.lock(), start)
    }

    fn patience_in(&self, state: &State, start: Moment) -> (Timeout, bool) {
        let ms = self.reattach_timeout_ms.load(Relaxed);
        if state.attachment.is_some() {
            // Never no time at all, or the look would not end.
            return (Timeout::from_ms(ms.max(1)), false);
        }
        (Timeout::until(start.max(state.detached_since), ms), true)
    }

    /// Withdraws a request if nobody was there to take it for too long.
    fn give_up(&self, id: Id, start: Moment) -> bool {
        // One look at the state and one decision: a process that attaches in between would take the
        // request, and its reply must find somebody waiting.
        let (withdrawn, takable) = {
            let mut state = self.state.lock();
            let withdrawn = match self.patience_in(&state, start) {
                (left, true) if left.is_over() => state.requests.withdraw_queued(id),
                _ => None,
            };
            (withdrawn, state.requests.is_takable())
        };
        if withdrawn.is_some() {
            self.left(takable);
        }
        withdrawn.is_some()
    }

    /// Says that nobody waits for a request any more.
    fn withdraw(&self, id: Id) {
        let (withdrawn, takable) = {
            let mut state = self.state.lock();
            let withdrawn = state.requests.withdraw(id);
            (withdrawn, state.requests.is_takable())
        };
        if let Withdrawn::Removed(_) = withdrawn {
            self.left(takable);
        }
    }

    /// Says that a request has left the queue: another one finds room, and if one is `takable`, it
    /// may be that it was kept back by the one that left. Who takes it wakes the next.
    pub(crate) fn left(&self, takable: bool) {
        self.room.wake_one();
        if takable {
            self.takers.wake_one();
        }
    }

    /// Ends the attachment `owner`: what it took goes back into the queue, and who waits in standby
    /// takes over in the same moment, so that nobody sees the device without a process.
    pub(crate) fn detach(&self, owner: u64) {
        let replays = {
            let mut state = self.state.lock();
            if state.serving(owner).is_none() {
                return;
            }
            // What the process used of the client's memory is not used any more.
            while let Some(unmap) = state.requests.pop_where(Request::is_unmap) {
                unmap.finish(Error::from(Errno::ENOTCONN).to_errno());
            }
            state.serve(None);
            state.detached_since = Moment::now();
            self.publish(&state);
            state.requests.owner_gone(owner)
        };
        self.doorbells.forget(owner);
        self.counters.replays.add(u64::from(replays));
        loop {
            let poison = self.state.lock().requests.pop_poison(owner);
            let Some(request) = poison else { break };
            request.finish(EIO.to_errno());
        }
        // Threads of the process which wait for a request find that they are not attached.
        self.takers.wake_all();
        self.successor.wake_all();
        // Abandoned requests ended, too.
        self.room.wake_all();
        if replays > 0 && self.complaints.is_first(Complaint::Gone) {
            pr_info!(
                "{}: the process went away amid {} requests; they wait for the next\n",
                self.name(),
                replays
            );
        }
    }

    /// Ends everything: the device is being removed, and no client has it open.
    pub(crate) fn hang_up(&self) {
        self.state.lock().removed = true;
        loop {
            let request = self.state.lock().requests.pop();
            let Some(request) = request else { break };
            request.finish(ENODEV.to_errno());
        }
        self.takers.wake_all();
        self.successor.wake_all();
        self.room.wake_all();
    }
}
