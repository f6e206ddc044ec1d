// SPDX-License-Identifier: GPL-2.0
//! A process attaches to a device, and anyone asks about it.

use crate::{
    driver::{
        description::{Arrays, Fault},
        device::{Attachment, Complaint, Described, Slots},
        node::{Argument, Attached, NodeFile, SLOT_STRIDE}, //
    },
    uapi::*,
    vfio::{
        errno::Errno,
        process::Process,
        shared::SharedMemory, //
    },
};
use core::mem::size_of;
use kernel::{
    alloc::AllocError,
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
        MUSER_FAULT_LIMIT | MUSER_FAULT_IRQ_COUNT | MUSER_FAULT_MEMORY => ENOSPC,
        MUSER_FAULT_REGION_OVERFLOW | MUSER_FAULT_AREA_OVERFLOW => EOVERFLOW,
        MUSER_FAULT_AREA_OVERLAP => EEXIST,
        MUSER_FAULT_ATTACHED => EBUSY,
        MUSER_FAULT_ATTACHED_SELF => Errno::EISCONN.into(),
        MUSER_FAULT_DIFFERS => Errno::ESTALE.into(),
        _ => EINVAL,
    }
}

impl NodeFile {
    /// `MUSER_ATTACH`.
    pub(super) fn attach(&self, argument: UserPtr) -> Result {
        let mut attach = muser_attach::read(argument)?;
        if attach.flags != 0 || attach.reserved != 0 || attach.state_size != 0 {
            return Err(EINVAL);
        }
        let wanted = attach.version;
        attach.version = MUSER_ABI_VERSION;
        attach.fault = MUSER_FAULT_NONE;
        attach.fault_index = 0;
        attach.slot_stride = SLOT_STRIDE;
        if attach.slots == 0 {
            attach.slots = MUSER_DEFAULT_SLOTS;
        }
        // What there is to say of a success is known by now: if it can't be said, nothing happens.
        attach.write(argument)?;
        match self.try_attach(&attach, wanted) {
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
                attach.fault = fault.code;
                attach.fault_index = fault.index;
                attach.write(argument)?;
                Err(errno(fault))
            }
        }
    }

    fn try_attach(&self, attach: &muser_attach, wanted: u32) -> Result<(), Refusal> {
        if wanted != MUSER_ABI_VERSION {
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
        let described = self.read_description(attach)?;
        let slots = SharedMemory::new(attach.slots as usize * SLOT_STRIDE as usize)?;
        self.become_server(described, slots, attach.slots)?;
        Ok(())
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
        if arrays.memory() > self.device.max_memory.load(Relaxed) {
            return Err(Fault::new(MUSER_FAULT_MEMORY, 0).into());
        }
        let status = self.device.status.clone();
        Ok(Described::new(attach.bus, regions, areas, irqs, status)?)
    }

    /// Makes this file the one attached file of its device.
    fn become_server(
        &self,
        described: Described,
        slots: SharedMemory,
        count: u32,
    ) -> Result<(), Refusal> {
        let owner = {
            let mut state = self.device.state.lock();
            if state.removed {
                return Err(ENODEV.into());
            }
            if state.attachment.is_some() {
                return Err(Fault::new(MUSER_FAULT_ATTACHED, 0).into());
            }
            if let Some(present) = self.device.described.as_ref() {
                present.arrays().differs(&described.arrays())?;
            }
            let owner = state.next_owner;
            state.next_owner += 1;
            state.attachment = Some(Attachment {
                owner,
                slots: Slots::new(count),
                process: Process::current(),
            });
            owner
        };
        let attached = Attached {
            owner,
            slots,
            count,
        };
        // The attachment keeps every other file out, and other threads of this one: if the device
        // has no description yet, it is this one that it gets.
        self.device.described.populate(described);
        self.attached.populate(attached);
        self.device.counters.attachments.add(1);
        self.device.takers.wake_all();
        Ok(())
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
        query.pid = 0;
        {
            let state = device.state.lock();
            query.queued = state.requests.queued();
            query.taken = state.requests.taken();
            if state.client {
                query.flags |= MUSER_STATE_CLIENT;
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
            ..muser_counters::default()
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
