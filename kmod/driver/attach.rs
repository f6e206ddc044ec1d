// SPDX-License-Identifier: GPL-2.0
//! A process attaches to a device, and anyone asks about it.

use crate::{
    driver::{
        description::{Arrays, Fault},
        device::{Complaint, Described},
        node::{Argument, Attached, NodeFile, SLOT_STRIDE},
        state::{Attachment, Slots, State},
        users::Reserved, //
    },
    uapi::*,
    vfio::{
        chrdev,
        errno::Errno,
        page::PAGE_SIZE,
        process::Process,
        shared::SharedMemory,
        wait::{Signals, Timeout, Woken}, //
    },
};
use core::mem::size_of;
use kernel::{
    alloc::AllocError,
    fs::File,
    prelude::*,
    sync::atomic::Relaxed,
    uaccess::{UserPtr, UserSlice}, //
};
use zerocopy::Immutable;

/// Why an attachment fails: by the process's description, or for lack of something.
enum Refusal {
    Fault(Fault),
    Error(Error),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<AllocError> for Refusal {
    fn from(error: AllocError) -> Self {
        Self::Error(error.into())
    }
}

/// The errno that goes with a fault, as the ABI says beside each.
fn errno(fault: Fault) -> Error {
    match fault.code {
        MUSER_FAULT_VERSION => Errno::EPROTO.into(),
        MUSER_FAULT_LIMIT | MUSER_FAULT_IRQ_COUNT | MUSER_FAULT_MEMORY | MUSER_FAULT_STATE => {
            ENOSPC
        }
        MUSER_FAULT_USER_MEMORY => Errno::EDQUOT.into(),
        MUSER_FAULT_REGION_OVERFLOW | MUSER_FAULT_AREA_OVERFLOW => EOVERFLOW,
        MUSER_FAULT_AREA_OVERLAP => EEXIST,
        MUSER_FAULT_ATTACHED | MUSER_FAULT_STANDBY => EBUSY,
        MUSER_FAULT_ATTACHED_SELF => Errno::EISCONN.into(),
        MUSER_FAULT_DIFFERS | MUSER_FAULT_STATE_DIFFERS => Errno::ESTALE.into(),
        _ => EINVAL,
    }
}

/// What `fault_index` of [`MUSER_FAULT_LIMIT`] says of too many vectors.
const VECTORS: usize = 4;

/// What to do while another file is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standby {
    /// Give up.
    No,
    /// Wait until it is no longer.
    Wait,
    /// Give up, but not for good.
    Poll,
}

/// What a process finds that has attached.
struct Found {
    /// `MUSER_RECOVERED_*`.
    recovered: u32,
    /// Bytes of state.
    state_size: u32,
}

impl NodeFile {
    /// `MUSER_ATTACH`.
    pub(super) fn attach(&self, file: &File, argument: UserPtr) -> Result {
        let mut attach = muser_attach::read(argument)?;
        if attach.flags & !MUSER_ATTACH_STANDBY != 0 || attach.reserved != 0 {
            return Err(EINVAL);
        }
        let standby = match attach.flags & MUSER_ATTACH_STANDBY {
            0 => Standby::No,
            _ if chrdev::is_nonblocking(file) => Standby::Poll,
            _ => Standby::Wait,
        };
        let mut answer = attach;
        answer.version = MUSER_ABI_VERSION;
        answer.fault = MUSER_FAULT_NONE;
        answer.fault_index = 0;
        answer.recovered = 0;
        answer.slot_stride = SLOT_STRIDE;
        if attach.slots == 0 {
            attach.slots = MUSER_DEFAULT_SLOTS;
        }
        // A standby that waits and is interrupted starts again with what it finds here, so what it
        // asked for stays until it is attached.
        answer.write(argument)?;
        answer.slots = attach.slots;
        match self.try_attach(&attach, standby, argument, answer) {
            Ok(()) => Ok(()),
            Err(Refusal::Error(error)) => Err(error),
            Err(Refusal::Fault(fault)) => {
                if self.device.complaints.is_first(Complaint::Description) {
                    pr_warn!(
                        "{}: refused an attachment: fault {} at {}\n",
                        self.device.name(),
                        fault.code,
                        fault.index
                    );
                }
                answer.fault = fault.code;
                answer.fault_index = fault.index;
                answer.write(argument)?;
                Err(errno(fault))
            }
        }
    }

    fn try_attach(
        &self,
        attach: &muser_attach,
        standby: Standby,
        argument: UserPtr,
        mut answer: muser_attach,
    ) -> Result<(), Refusal> {
        if attach.version != MUSER_ABI_VERSION {
            return Err(Fault::new(MUSER_FAULT_VERSION, 0).into());
        }
        if self.attached.as_ref().is_some() {
            return Err(Fault::new(MUSER_FAULT_ATTACHED_SELF, 0).into());
        }
        let limits = [
            (attach.num_regions, MUSER_MAX_REGIONS),
            (attach.num_areas, MUSER_MAX_AREAS),
            (attach.num_irqs, MUSER_MAX_IRQ_INDEXES),
            (attach.slots, MUSER_MAX_SLOTS),
        ];
        for (i, (count, limit)) in limits.into_iter().enumerate() {
            if count > limit {
                return Err(Fault::new(MUSER_FAULT_LIMIT, i).into());
            }
        }
        if attach.bus != self.device.bus {
            return Err(Fault::new(MUSER_FAULT_BUS, 0).into());
        }
        // What there is already stays, whatever the limit has become.
        let granted = self.device.state.lock().state_size;
        if attach.state_size > granted.max(self.device.max_state.load(Relaxed)) {
            return Err(Fault::new(MUSER_FAULT_STATE, 0).into());
        }
        let described = self.read_description(attach)?;
        let state_size = u64::from(attach.state_size.max(granted));
        let memory = described.arrays().memory() + state_size.next_multiple_of(PAGE_SIZE as u64);
        let reserved = self.device.memory.allowance.reserve(memory);
        let reserved = reserved.ok_or(Fault::new(MUSER_FAULT_USER_MEMORY, 0))?;
        let slots = SharedMemory::new(attach.slots as usize * SLOT_STRIDE as usize)?;
        let (owner, found) = self.become_server(described, attach, reserved, standby)?;
        answer.recovered = found.recovered;
        answer.state_size = found.state_size;
        let attached = Attached {
            owner,
            slots,
            count: attach.slots,
        };
        // Nobody can take anything before the file has what it needs for it: if the process can't be
        // told, or another of its threads was faster, it was as good as never attached.
        let done = match answer.write(argument) {
            Ok(()) if self.attached.populate(attached) => Ok(()),
            Ok(()) => Err(Fault::new(MUSER_FAULT_ATTACHED_SELF, 0).into()),
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(()) => self.device.counters.attachments.add(1),
            Err(_) => self.device.detach(owner),
        }
        self.device.takers.wake_all();
        done
    }

    fn read_description(&self, attach: &muser_attach) -> Result<Described, Refusal> {
        let regions = read_array::<muser_region>(attach.regions, attach.num_regions)?;
        let areas = read_array::<muser_area>(attach.areas, attach.num_areas)?;
        let irqs = read_array::<muser_irq>(attach.irqs, attach.num_irqs)?;
        let arrays = Arrays {
            bus: attach.bus,
            regions: &regions,
            areas: &areas,
            irqs: &irqs,
        };
        arrays.check()?;
        let vectors: u64 = irqs.iter().map(|irq| u64::from(irq.count)).sum();
        if vectors > u64::from(self.device.max_vectors.load(Relaxed)) {
            return Err(Fault::new(MUSER_FAULT_LIMIT, VECTORS).into());
        }
        if arrays.memory() > self.device.max_memory.load(Relaxed) {
            return Err(Fault::new(MUSER_FAULT_MEMORY, 0).into());
        }
        let status = self.device.status.clone();
        Ok(Described::new(attach.bus, regions, areas, irqs, status)?)
    }

    /// Makes an attachment of this file the one of its device, and returns its number.
    fn become_server(
        &self,
        described: Described,
        attach: &muser_attach,
        reserved: Reserved,
        standby: Standby,
    ) -> Result<(u64, Found), Refusal> {
        // Dropped when the lock is not held.
        let mut described = Some(described);
        let owner = {
            let mut state = self.device.state.lock();
            if state.removed {
                return Err(ENODEV.into());
            }
            let present = self.device.described.as_ref();
            if state.attachment.is_some() && standby == Standby::No {
                return Err(Fault::new(MUSER_FAULT_ATTACHED, 0).into());
            }
            if let (Some(present), Some(described)) = (present, &described) {
                present.arrays().differs(&described.arrays())?;
            }
            state.check_tag(attach.state_tag)?;
            let owner = state.next_owner;
            state.next_owner += 1;
            let attachment = Attachment {
                owner,
                slots: Slots::new(attach.slots),
                state_size: attach.state_size,
                state_tag: attach.state_tag,
                reserved: Some(reserved),
                process: Process::current(),
            };
            if state.attachment.is_none() {
                let recovered = self.recovered(&state);
                state.serve(Some(attachment));
                let found = Found {
                    recovered,
                    state_size: state.state_size,
                };
                if let (None, Some(described)) = (present, described.take()) {
                    self.device.described.populate(described);
                }
                return Ok((owner, found));
            }
            if state.standby.is_some() {
                return Err(Fault::new(MUSER_FAULT_STANDBY, 0).into());
            }
            if standby == Standby::Poll {
                return Err(EAGAIN.into());
            }
            state.standby = Some(attachment);
            self.device.publish(&state);
            owner
        };
        Ok((owner, self.wait_in_standby(owner)?))
    }

    /// Waits until the standby `owner` has taken over.
    fn wait_in_standby(&self, owner: u64) -> Result<Found> {
        let device = &self.device;
        // The attached process hears that it is to go.
        device.takers.wake_all();
        let taken_over = |state: &mut State| {
            let serving = state.serving(owner).is_some();
            serving.then(|| Found {
                recovered: self.recovered(state),
                state_size: state.state_size,
            })
        };
        let woken = device.successor.wait(Signals::Any, Timeout::NEVER, || {
            let mut state = device.state.lock();
            match state.removed {
                true => Some(Err(ENODEV)),
                false => taken_over(&mut state).map(Ok),
            }
        });
        let error = match woken {
            Woken::Ready(Ok(found)) => return Ok(found),
            Woken::Ready(Err(error)) => error,
            Woken::TimedOut | Woken::Signal => ERESTARTSYS,
        };
        let withdrawn = {
            let mut state = device.state.lock();
            if let Some(found) = taken_over(&mut state) {
                return Ok(found);
            }
            let withdrawn = state.standby.take();
            device.publish(&state);
            withdrawn
        };
        drop(withdrawn);
        // The attached process goes on as if nothing had been.
        device.takers.wake_all();
        Err(error)
    }

    /// What a process that attaches now finds: `MUSER_RECOVERED_*`.
    fn recovered(&self, state: &State) -> u32 {
        let mut found = 0;
        let (pins, unpins) = self.device.pins.counts();
        for (is_so, flag) in [
            (
                self.device.described.as_ref().is_some(),
                MUSER_RECOVERED_SERVED,
            ),
            (state.client, MUSER_RECOVERED_CLIENT),
            (state.requests.has_replays(), MUSER_RECOVERED_REPLAYS),
            (pins > unpins, MUSER_RECOVERED_PINS),
        ] {
            if is_so {
                found |= flag;
            }
        }
        found
    }

    /// `MUSER_QUERY`.
    pub(super) fn query(&self, argument: UserPtr) -> Result {
        let mut query = muser_query::read(argument)?;
        let device = &self.device;
        let room = [query.num_regions, query.num_areas, query.num_irqs];
        query.version = MUSER_ABI_VERSION;
        query.bus = device.bus;
        query.flags = 0;
        (query.num_regions, query.num_areas, query.num_irqs) = (0, 0, 0);
        if let Ok(described) = device.described() {
            let arrays = described.arrays();
            query.flags |= MUSER_STATE_DESCRIBED;
            query.num_regions = arrays.regions.len() as u32;
            query.num_areas = arrays.areas.len() as u32;
            query.num_irqs = arrays.irqs.len() as u32;
            write_array(query.regions, room[0], arrays.regions.iter().copied())?;
            write_array(query.areas, room[1], arrays.areas.iter().copied())?;
            write_array(query.irqs, room[2], described.irqs.states())?;
        }
        (query.pid, query.standby_pid) = (0, 0);
        {
            let state = device.state.lock();
            query.queued = state.requests.queued();
            query.taken = state.requests.taken();
            query.state_size = state.state_size;
            query.flags |= state.shown();
            if let Some(standby) = &state.standby {
                query.standby_pid = standby.process.pid();
            }
            if let Some(attachment) = &state.attachment {
                query.flags |= MUSER_STATE_ATTACHED;
                query.pid = attachment.process.pid();
            }
        }
        query.memory_pages = device.memory.allocated();
        let (pins, unpins) = device.pins.counts();
        query.pinned_pages = pins - unpins;
        let counters = &device.counters;
        query.counters = muser_counters {
            reads: counters.reads.count(),
            writes: counters.writes.count(),
            resets: counters.resets.count(),
            memory_reads: counters.memory_reads.count(),
            memory_writes: counters.memory_writes.count(),
            interrupts: counters.interrupts.count(),
            timeouts: counters.timeouts.count(),
            replays: counters.replays.count(),
            withdrawn: counters.withdrawn.count(),
            attachments: counters.attachments.count(),
            unmaps: counters.unmaps.count(),
            unmaps_forced: counters.unmaps_forced.count(),
            pins,
            unpins,
            doorbells: counters.doorbells.count(),
        };
        query.write(argument)
    }
}

pub(super) fn read_array<T>(address: u64, count: u32) -> Result<KVec<T>>
where
    T: FromBytes + IntoBytes + Default,
{
    let address = UserPtr::from_addr(usize::try_from(address)?);
    let mut reader = UserSlice::new(address, count as usize * size_of::<T>()).reader();
    let mut array = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
    for _ in 0..count {
        let mut element = T::default();
        reader.read_slice(element.as_mut_bytes())?;
        array.push(element, GFP_KERNEL_ACCOUNT)?;
    }
    Ok(array)
}

fn write_array<T>(address: u64, room: u32, elements: impl Iterator<Item = T>) -> Result
where
    T: IntoBytes + Immutable,
{
    let address = UserPtr::from_addr(usize::try_from(address)?);
    // As much as the array's elements need at most; the room is checked by taking.
    let mut done = 0;
    for element in elements.take(room as usize) {
        UserSlice::new(address.wrapping_byte_add(done), size_of::<T>())
            .writer()
            .write_slice(element.as_bytes())?;
        done += size_of::<T>();
    }
    Ok(())
}
