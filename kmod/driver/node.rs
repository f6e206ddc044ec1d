// SPDX-License-Identifier: GPL-2.0
//! The process's side of a device: what `/dev/muser/UUID` does.

use crate::{
    driver::{
        client::Side,
        device::{Complaint, Device},
        memory::{ProcessPager, StatePager},
        queue::{Holder, Id, ReplyError},
        request::{Kind, Request},
        state::Claim,
    },
    uapi::*,
    vfio::{
        chrdev::{self, POLL_GONE, POLL_IN},
        errno::Errno,
        eventfd::EventFd,
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
    const FIRST_SIZE: usize = 88;
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

impl Argument for muser_doorbell {
    const FIRST_SIZE: usize = 16;
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
        // `next` looks for itself, under the lock which it takes anyway.
        if command != MUSER_NEXT && self.device.state.lock().removed {
            return Err(ENODEV);
        }
        match command {
            MUSER_ATTACH if !chrdev::is_read_write(file) => Err(EBADF),
            MUSER_ATTACH => self.attach(file, argument),
            MUSER_NEXT => self.next(file, argument),
            MUSER_TRIGGER => self.trigger(argument),
            MUSER_QUERY => self.query(argument),
            MUSER_DETACH => self.detach(),
            MUSER_DMA_ACQUIRE => self.acquire(argument),
            MUSER_DMA_RELEASE => self.release(argument),
            MUSER_DMA_COPY => self.copy(argument),
            MUSER_DOORBELL => self.doorbell(argument),
            _ => return Err(ENOTTY),
        }?;
        Ok(0)
    }

    fn mmap(&self, vma: &NewVma<'_>) -> Result {
        const STATE: usize = MUSER_MMAP_STATE as usize / PAGE_SIZE;
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
            first @ STATE..STATUS => {
                let size = self.device.state.lock().state_size as usize;
                let end = (first - STATE).checked_add(vma.pages()).ok_or(EINVAL)?;
                if vma.is_private() || end > size.div_ceil(PAGE_SIZE) {
                    return Err(EINVAL);
                }
                vma.fill::<StatePager>(self.device.memory.clone());
                Ok(())
            }
            first @ REGIONS.. => {
                self.device
                    .check_mapping(vma, first - REGIONS, Side::Process)?;
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
        let mut state = self.device.state.lock();
        if state.removed {
            return POLL_GONE;
        }
        match self.attached.as_ref() {
            None => 0,
            Some(attached) if state.serving(attached.owner).is_none() => POLL_GONE,
            Some(attached) if state.is_ready(attached.owner) => POLL_IN,
            Some(_) => 0,
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
    /// What the file got when it attached; that may be over.
    fn attached(&self) -> Result<&Attached> {
        self.attached
            .as_ref()
            .ok_or_else(|| match self.device.state.lock().removed {
                true => ENODEV,
                false => Errno::ENOTCONN.into(),
            })
    }

    /// What the file got when it attached, if that is not over.
    pub(super) fn serving(&self) -> Result<&Attached> {
        let attached = self.attached()?;
        match self.device.state.lock().serving(attached.owner) {
            Some(_) => Ok(attached),
            None => Err(Errno::ENOTCONN.into()),
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
        let attached = self.attached()?;
        let take = asked & MUSER_NEXT_TAKE != 0;
        let mut claimed = None;
        if asked & MUSER_NEXT_REPLY != 0 {
            claimed = self.reply(attached, next.slot, take)?;
            next.flags &= !MUSER_NEXT_REPLY;
            // Before it waits: a restarted call must not reply again.
            if !matches!(claimed, Some(Ok(_))) {
                next.write(argument)?;
            }
        }
        if !take {
            return Ok(());
        }
        let claim = match claimed {
            Some(claim) => claim?,
            None => {
                let now = next.flags & MUSER_NEXT_NONBLOCK != 0 || chrdev::is_nonblocking(file);
                let timeout = if now { Timeout::NOW } else { Timeout::NEVER };
                self.take(attached, timeout)?
            }
        };
        if claim.more {
            // The end of a barrier wakes one thread, and may free many requests.
            self.device.takers.wake_one();
        }
        next.slot = claim.slot;
        let told = fill(attached, &claim).and_then(|()| next.write(argument));
        if told.is_err() {
            self.untake(attached.owner, &claim);
        }
        told
    }

    fn take(&self, attached: &Attached, timeout: Timeout) -> Result<Claim> {
        let taken = self.device.takers.wait(Signals::Any, timeout, || {
            self.device.state.lock().take(attached.owner)
        });
        match taken {
            Woken::Ready(taken) => taken,
            Woken::TimedOut => Err(EAGAIN),
            Woken::Signal => Err(ERESTARTSYS),
        }
    }

    /// Puts a request back of which the process could not be told.
    fn untake(&self, owner: u64, claim: &Claim) {
        let holder = Holder {
            owner,
            slot: claim.slot,
        };
        let takable = {
            let mut state = self.device.state.lock();
            // If another thread has replied to it already, the slot is no longer this request's.
            if state.requests.untake(claim.taken.id, holder) {
                state.release(holder);
            }
            state.requests.is_takable()
        };
        self.device.left(takable);
    }

    /// Accepts a reply, and takes the next request if asked to and one is there: `None` otherwise.
    fn reply(&self, attached: &Attached, slot: u32, take: bool) -> Result<Option<Result<Claim>>> {
        let result = self.accept(attached, slot, take);
        if let Err(error) = &result {
            // Not the process's fault: the client, the attachment or the device is gone.
            let late = [Errno::ECANCELED.into(), Errno::ENOTCONN.into(), ENODEV].contains(error);
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

    fn accept(&self, attached: &Attached, slot: u32, take: bool) -> Result<Option<Result<Claim>>> {
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
        let request = {
            let mut state = self.device.state.lock();
            if state.removed {
                return Err(ENODEV);
            }
            if state.serving(attached.owner).is_none() {
                return Err(Errno::ENOTCONN.into());
            }
            state.requests.reply(Id::from_raw(head.id), holder)
        };
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
        if let Ok(request) = &request {
            let counters = &self.device.counters;
            match request.kind() {
                Kind::Read(_) => counters.reads.add(1),
                Kind::Write(_) => counters.writes.add(1),
                Kind::Reset { .. } => counters.resets.add(1),
                // Counted when the client asked.
                Kind::Unmap { .. } => {}
            }
            request.finish(result);
        }
        let (claimed, takable) = {
            let mut state = self.device.state.lock();
            state.release(holder);
            let claimed = match take && request.is_ok() {
                true => state.take(attached.owner),
                false => None,
            };
            // Who takes wakes the next.
            let takable = claimed.is_none() && state.requests.is_takable();
            (claimed, takable)
        };
        self.device.left(takable);
        request.map(|_| claimed)
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

impl NodeFile {
    /// `MUSER_DOORBELL`.
    fn doorbell(&self, argument: UserPtr) -> Result {
        let doorbell = muser_doorbell::read(argument)?;
        if doorbell.flags != 0 {
            return Err(EINVAL);
        }
        let attached = self.serving()?;
        let arrays = self.device.described()?.arrays();
        let area = doorbell.area as usize;
        match arrays.areas.get(area) {
            Some(area) if area.flags & MUSER_AREA_DOORBELL != 0 => {}
            _ => return Err(ENXIO),
        }
        let eventfd = match doorbell.fd {
            -1 => None,
            fd => Some(EventFd::from_fd(fd)?),
        };
        self.device
            .doorbells
            .listen(area, attached.owner, eventfd, || self.serving().map(drop))
    }
}

/// Writes a request into the slot it was taken into.
fn fill(attached: &Attached, claim: &Claim) -> Result {
    let start = claim.slot as usize * SLOT_STRIDE as usize;
    let request = &claim.taken.payload;
    let head = request.slot(claim.taken.id.raw(), claim.taken.replay);
    attached.slots.write(start, head.as_bytes())?;
    request.with_written(|data| attached.slots.write(start + size_of::<muser_slot>(), data))
}
