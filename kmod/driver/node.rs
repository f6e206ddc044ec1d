// SPDX-License-Identifier: GPL-2.0
//! The process's side of a device: what `/dev/muser/UUID` does.

use crate::{
    driver::{
        device::{Complaint, Device},
        memory::ProcessPager,
        queue::{Holder, Id, ReplyError, Taken},
        request::{Kind, Request},
    },
    uapi::*,
    vfio::{
        chrdev::{self, POLL_GONE, POLL_IN},
        errno::Errno,
        inode::Inode,
        page::PAGE_SIZE,
        shared::SharedMemory,
        vm::NewVma,
        wait::{Signals, Timeout, WaitQueue, Woken}, //
    },
};
use core::mem::size_of;
use kernel::{
    fs::File,
    prelude::*,
    sync::{Arc, SetOnce},
    uaccess::{UserPtr, UserSlice}, //
};
use zerocopy::Immutable;

/// Bytes from one slot to the next.
pub(crate) const SLOT_STRIDE: u32 = size_of::<muser_slot>() as u32 + MUSER_SLOT_DATA;
/// Largest negated errno: `MAX_ERRNO` of `<linux/err.h>`.
const MAX_ERRNO: i32 = 4095;
/// Largest argument of an ioctl that is looked at.
const MAX_ARGUMENT: usize = PAGE_SIZE;

/// An open file of a node.
pub(crate) struct NodeFile {
    /// The device.
    pub(crate) device: Arc<Device>,
    /// Set when the file attaches; a file does so once.
    pub(crate) attached: SetOnce<Attached>,
}

/// What an attached file has.
pub(crate) struct Attached {
    /// Number of the attachment.
    pub(crate) owner: u64,
    /// Its slots.
    pub(crate) slots: SharedMemory,
    /// How many they are.
    pub(crate) count: u32,
}

/// A struct of the ABI which can come in as an argument.
pub(crate) trait Argument: FromBytes + IntoBytes + Immutable + Default {
    /// Bytes of it in version 1 of the ABI: no caller knows less.
    const FIRST_SIZE: usize;

    /// Reads it, by the rules of the ABI for longer and shorter ones.
    fn read(from: UserPtr) -> Result<Self> {
        let size = Self::size(from)?;
        if size < Self::FIRST_SIZE {
            return Err(EINVAL);
        }
        if size > MAX_ARGUMENT {
            return Err(E2BIG);
        }
        let mut argument = Self::default();
        let known = size.min(size_of::<Self>());
        let mut reader = UserSlice::new(from, size).reader();
        reader.read_slice(&mut argument.as_mut_bytes()[..known])?;
        while !reader.is_empty() {
            if reader.read::<u8>()? != 0 {
                return Err(E2BIG);
            }
        }
        Ok(argument)
    }

    /// Writes it back, as much of it as the caller knows. `size` is its first field.
    fn write(&self, to: UserPtr) -> Result {
        let bytes = self.as_bytes();
        let known = bytes
            .first_chunk()
            .map_or(0, |size| u32::from_ne_bytes(*size) as usize);
        let bytes = &bytes[..known.min(bytes.len())];
        UserSlice::new(to, bytes.len()).writer().write_slice(bytes)
    }

    /// Bytes of it as the caller knows it.
    fn size(from: UserPtr) -> Result<usize> {
        let size = UserSlice::new(from, size_of::<u32>())
            .reader()
            .read::<u32>()?;
        Ok(size as usize)
    }
}

impl Argument for muser_attach {
    const FIRST_SIZE: usize = 80;
}

impl Argument for muser_next {
    const FIRST_SIZE: usize = 16;
}

impl Argument for muser_trigger {
    const FIRST_SIZE: usize = 32;
}

impl Argument for muser_query {
    const FIRST_SIZE: usize = 208;
}

impl Argument for muser_dma {
    const FIRST_SIZE: usize = 40;
}

impl Argument for muser_dma_copy {
    const FIRST_SIZE: usize = 32;
}

impl chrdev::Operations for NodeFile {
    type Target = Device;

    fn open(device: Arc<Device>) -> Result<Pin<KBox<Self>>> {
        if device.state.lock().removed {
            return Err(ENODEV);
        }
        let file = Self {
            device,
            attached: SetOnce::new(),
        };
        Ok(KBox::new(file, GFP_KERNEL_ACCOUNT)?.into())
    }

    fn ioctl(&self, file: &File, command: u32, argument: UserPtr) -> Result<isize> {
        if self.device.state.lock().removed {
            return Err(ENODEV);
        }
        match command {
            MUSER_ATTACH if !chrdev::is_read_write(file) => Err(EBADF),
            MUSER_ATTACH => self.attach(argument),
            MUSER_NEXT => self.next(file, argument),
            MUSER_TRIGGER => self.trigger(argument),
            MUSER_QUERY => self.query(argument),
            MUSER_DETACH => self.detach(),
            MUSER_DMA_ACQUIRE => self.acquire(argument),
            MUSER_DMA_RELEASE => self.release(argument),
            MUSER_DMA_COPY => self.copy(argument),
            _ => return Err(ENOTTY),
        }?;
        Ok(0)
    }

    fn mmap(&self, vma: &NewVma<'_>) -> Result {
        const STATUS: usize = MUSER_MMAP_STATUS as usize / PAGE_SIZE;
        const REGIONS: usize = MUSER_MMAP_REGIONS as usize / PAGE_SIZE;
        const WINDOW: usize = MUSER_MMAP_WINDOW as usize / PAGE_SIZE;
        let attached = self.serving()?;
        match vma.offset() {
            0 => attached.slots.map(vma),
            STATUS => {
                if vma.is_writable() {
                    return Err(EACCES);
                }
                vma.forbid_writing()?;
                self.device.status.map(vma)
            }
            WINDOW.. => self.device.pins.map(vma),
            first @ REGIONS.. => {
                self.device.check_mapping(vma, first - REGIONS)?;
                vma.fill::<ProcessPager>(self.device.memory.clone());
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }

    fn inode(&self) -> &Inode {
        self.device.pins.inode()
    }

    fn changes(&self) -> &WaitQueue {
        &self.device.takers
    }

    fn ready(&self) -> u32 {
        let state = self.device.state.lock();
        if state.removed {
            return POLL_GONE;
        }
        match (&self.attached.as_ref(), &state.attachment) {
            (None, _) => 0,
            (Some(attached), Some(attachment)) if attachment.owner == attached.owner => {
                let takable = attachment.slots.free().is_some() && state.requests.is_takable();
                if takable {
                    POLL_IN
                } else {
                    0
                }
            }
            // The attachment of this file is over.
            (Some(_), _) => POLL_GONE,
        }
    }
}

impl Drop for NodeFile {
    fn drop(&mut self) {
        if let Some(attached) = self.attached.as_ref() {
            self.device.detach(attached.owner);
        }
    }
}

impl NodeFile {
    /// What the file got when it attached, if that is not over.
    pub(super) fn serving(&self) -> Result<&Attached> {
        let attached = self.attached.as_ref().ok_or(Errno::ENOTCONN)?;
        if self.device.state.lock().is_served_by(attached.owner) {
            Ok(attached)
        } else {
            Err(Errno::ENOTCONN.into())
        }
    }

    /// `MUSER_DETACH`.
    fn detach(&self) -> Result {
        self.device.detach(self.serving()?.owner);
        Ok(())
    }

    /// `MUSER_NEXT`.
    fn next(&self, file: &File, argument: UserPtr) -> Result {
        let mut next = muser_next::read(argument)?;
        let known = MUSER_NEXT_REPLY | MUSER_NEXT_TAKE | MUSER_NEXT_NONBLOCK;
        let asked = next.flags & (MUSER_NEXT_REPLY | MUSER_NEXT_TAKE);
        if next.flags & !known != 0 || asked == 0 || next.reserved != 0 {
            return Err(EINVAL);
        }
        let attached = self.serving()?;
        if asked & MUSER_NEXT_REPLY != 0 {
            self.reply(attached, next.slot)?;
            next.flags &= !MUSER_NEXT_REPLY;
            next.write(argument)?;
        }
        if asked & MUSER_NEXT_TAKE != 0 {
            let now = next.flags & MUSER_NEXT_NONBLOCK != 0 || chrdev::is_nonblocking(file);
            let timeout = if now { Timeout::NOW } else { Timeout::NEVER };
            let (slot, taken) = self.take(attached, timeout)?;
            next.slot = slot;
            let told = fill(attached, slot, &taken).and_then(|()| next.write(argument));
            if told.is_err() {
                self.untake(attached.owner, slot, taken.id);
            }
            told?;
        }
        Ok(())
    }

    fn take(&self, attached: &Attached, timeout: Timeout) -> Result<(u32, Taken<Arc<Request>>)> {
        let mut more = false;
        let taken = self.device.takers.wait(Signals::Any, timeout, || {
            let mut state = self.device.state.lock();
            if state.removed {
                return Some(Err(ENODEV));
            }
            if !state.is_served_by(attached.owner) {
                return Some(Err(Errno::ENOTCONN.into()));
            }
            let state = &mut *state;
            let slots = &mut state.attachment.as_mut()?.slots;
            let slot = slots.free()?;
            let taken = state.requests.take(Holder {
                owner: attached.owner,
                slot,
            })?;
            slots.claim(slot);
            more = state.requests.is_takable();
            Some(Ok((slot, taken)))
        });
        if more {
            // The end of a barrier wakes one thread, and may free many requests.
            self.device.takers.wake_one();
        }
        match taken {
            Woken::Ready(taken) => taken,
            Woken::TimedOut => Err(EAGAIN),
            Woken::Signal => Err(ERESTARTSYS),
        }
    }

    /// Puts a request back of which the process could not be told.
    fn untake(&self, owner: u64, slot: u32, id: Id) {
        let mut state = self.device.state.lock();
        // If another thread has replied to it already, the slot is no longer this request's.
        let holder = Holder { owner, slot };
        if state.requests.untake(id, holder) {
            state.release(holder);
        }
        drop(state);
        self.device.left();
    }

    fn reply(&self, attached: &Attached, slot: u32) -> Result {
        let result = self.accept(attached, slot);
        if let Err(error) = result {
            let late = error == Errno::ECANCELED.into();
            if !late && self.device.complaints.is_first(Complaint::Reply) {
                pr_warn!(
                    "{}: refused a reply in slot {}: {:?}\n",
                    self.device.name(),
                    slot,
                    error
                );
            }
        }
        result
    }

    fn accept(&self, attached: &Attached, slot: u32) -> Result {
        if slot >= attached.count {
            return Err(ENOSPC);
        }
        // The process can change its slots at any time: copy first, then check.
        let start = slot as usize * SLOT_STRIDE as usize;
        let mut head = muser_slot::default();
        attached.slots.read(start, head.as_mut_bytes())?;
        if head.result > 0 || head.result < -MAX_ERRNO {
            return Err(ERANGE);
        }
        let holder = Holder {
            owner: attached.owner,
            slot,
        };
        self.device.hears(attached.owner);
        let request = self
            .device
            .state
            .lock()
            .requests
            .reply(Id::from_raw(head.id), holder);
        let request: Result<Arc<Request>> = match request {
            Ok(request) => Ok(request),
            Err(ReplyError::Unknown) => return Err(ENOENT),
            Err(ReplyError::NotTaken) => return Err(Errno::ENOMSG.into()),
            Err(ReplyError::OtherOwner) => return Err(EPERM),
            Err(ReplyError::OtherSlot) => return Err(Errno::EBADSLT.into()),
            // The request ended; its slot and its place are free like those of any other.
            Err(ReplyError::Abandoned) => Err(Errno::ECANCELED.into()),
        };
        // The slot belongs to this reply until it is released, so its data stay those of the reply,
        // or what the process makes of them.
        let mut result = head.result;
        if let (Ok(request), 0) = (&request, result) {
            let data = start + size_of::<muser_slot>();
            if let Err(error) = request.with_read(|to| attached.slots.read(data, to)) {
                result = error.to_errno();
            }
        }
        self.device.state.lock().release(holder);
        self.device.left();
        let request = request?;
        let counters = &self.device.counters;
        match request.kind() {
            Kind::Read(_) => counters.reads.add(1),
            Kind::Write(_) => counters.writes.add(1),
            Kind::Reset { .. } => counters.resets.add(1),
            // Counted when the client asked.
            Kind::Unmap { .. } => {}
        }
        request.finish(result);
        Ok(())
    }

    /// `MUSER_TRIGGER`.
    fn trigger(&self, argument: UserPtr) -> Result {
        let mut trigger = muser_trigger::read(argument)?;
        if trigger.flags & !MUSER_TRIGGER_LOWER != 0 {
            return Err(EINVAL);
        }
        self.serving()?;
        trigger.signalled = self.device.described()?.irqs.trigger(&trigger)?;
        let count = trigger.signalled.count_ones();
        self.device.counters.interrupts.add(u64::from(count));
        trigger.write(argument)
    }
}

/// Writes a request into the slot it was taken into.
fn fill(attached: &Attached, slot: u32, taken: &Taken<Arc<Request>>) -> Result {
    let start = slot as usize * SLOT_STRIDE as usize;
    let head = taken.payload.slot(taken.id.raw(), taken.replay);
    attached.slots.write(start, head.as_bytes())?;
    taken
        .payload
        .with_written(|data| attached.slots.write(start + size_of::<muser_slot>(), data))
}
