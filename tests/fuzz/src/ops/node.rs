// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device's process does at `/dev/muser/UUID`, right and wrong.

use std::io;
use std::mem::offset_of;
use std::os::fd::IntoRawFd;

use muser_e2e::mdev::DEVICES;
use muser_e2e::node::{area, Description};
use muser_e2e::sys::{ioctl_bytes, PAGE};
use muser_uapi::*;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::content;
use crate::sys::{self, borrow, WINDOW};
use crate::worker::{Attachment, Kind, Mapped, Worker};

/// The module knows doorbells.
pub(crate) const DOORBELLS: u64 = 1;
/// The module keeps state.
pub(crate) const STATE: u64 = 2;
/// Bytes of state that processes want.
const STATE_SIZE: u32 = 16 << 10;
/// What an argument of an ioctl is prepared with, where the kernel only writes.
const UNTOUCHED: u8 = 0x77;

/// An ioctl with bytes as its argument; what lies behind them must stay as it is.
fn ioctl(fd: i32, number: u32, bytes: &mut [u8]) -> io::Result<u64> {
    let result = ioctl_bytes(borrow(fd), number, bytes)?;
    Ok(u64::try_from(result).unwrap_or(0))
}

fn structure<T: IntoBytes + FromBytes + Immutable>(
    fd: i32,
    number: u32,
    argument: &mut T,
) -> io::Result<u64> {
    let mut bytes = argument.as_bytes().to_vec();
    let result = ioctl(fd, number, &mut bytes);
    if let Ok(read) = T::read_from_bytes(&bytes) {
        *argument = read;
    }
    result
}

pub(super) fn open_node(worker: &mut Worker) -> Option<io::Result<u64>> {
    let device = worker.device();
    let path = format!("/dev/muser/{}", worker.uuids[device]);
    let write = worker.chance(95);
    let file = std::fs::File::options().read(true).write(write).open(path);
    Some(file.map(|file| {
        let fd = file.into_raw_fd();
        worker.keep(u64::from(fd.unsigned_abs()), Kind::Node, device);
        0
    }))
}

/// What a device is, always the same.
pub(crate) fn description(device: usize, ability: u64) -> Description {
    let mut description = match device {
        2 => Description::platform(),
        _ => Description::pci(),
    };
    if device == 1 && ability & DOORBELLS != 0 {
        description.regions[0].num_areas = 1;
        let bells = muser_area {
            flags: MUSER_AREA_DOORBELL,
            ..area(0x2000, 0x100)
        };
        description.areas.insert(0, bells);
    }
    description
}

/// The argument of an attach, with state where the module keeps it.
pub(crate) fn argument(description: &Description, ability: u64) -> muser_attach {
    let mut attach = description.argument();
    if ability & STATE != 0 {
        attach.state_size = STATE_SIZE;
    }
    attach
}

fn try_attach(
    worker: &mut Worker,
    flags: u32,
    mutate: impl FnOnce(&mut Worker, &mut Description, &mut muser_attach),
) -> Option<io::Result<u64>> {
    if worker.attachment.is_some() && worker.chance(90) {
        return None;
    }
    let entry = worker.any(|kind| kind == Kind::Node)?;
    let ability = worker.shared.ability();
    let mut description = description(entry.device, ability);
    description.slots = *worker.random.pick(&[0, 1, 2, 16, 64]);
    let mut attach = argument(&description, ability);
    attach.flags = flags;
    attach.state_tag = *worker.random.pick(&[0, 0, 1, 1, 1, 1, 1, 2]);
    mutate(worker, &mut description, &mut attach);
    let honest = (attach.fault, attach.recovered) == (0, 0);
    let result = structure(entry.fd, MUSER_ATTACH, &mut attach);
    if let Err(error) = &result
        && error.raw_os_error() == Some(libc::ENODEV)
    {
        // Of no more use, like all files of a device that was removed.
        worker.files.retain(|file| file.fd != entry.fd);
        let _ = sys::close(entry.fd);
    }
    if honest && attach.fault > MUSER_FAULT_STATE_DIFFERS + 8 {
        worker.found(&format!("attach left fault {}", attach.fault));
    }
    if result.is_ok() {
        if attach.version != MUSER_ABI_VERSION
            || honest && attach.recovered > 0xF
            || attach.slots == 0
            || attach.slots > MUSER_MAX_SLOTS
        {
            worker.found(&format!("attached as {attach:?}"));
        }
        worker.attachment = Some(Attachment {
            fd: entry.fd,
            stride: attach.slot_stride as usize,
            slots: attach.slots,
            window: None,
            taken: Vec::new(),
        });
        // What a process does first; later ones may fail.
        let _ = map_slots(worker);
    }
    Some(result)
}

pub(super) fn attach(worker: &mut Worker) -> Option<io::Result<u64>> {
    try_attach(worker, 0, |_, _, _| ())
}

pub(super) fn attach_standby(worker: &mut Worker) -> Option<io::Result<u64>> {
    try_attach(worker, MUSER_ATTACH_STANDBY, |_, _, _| ())
}

/// A description with something changed: of one field, an edge or a random number.
pub(super) fn attach_mutated(worker: &mut Worker) -> Option<io::Result<u64>> {
    try_attach(worker, 0, |worker, description, attach| {
        let value = worker.number();
        let change = |bytes: &mut [u8], worker: &mut Worker| {
            let at = worker.random.below(bytes.len() as u64 / 4) as usize * 4;
            if let Some(word) = bytes.get_mut(at..at + 4) {
                word.copy_from_slice(&value.to_ne_bytes()[..4]);
            }
        };
        match worker.random.below(6) {
            0 => change(description.regions.as_mut_slice().as_mut_bytes(), worker),
            1 => change(description.areas.as_mut_slice().as_mut_bytes(), worker),
            2 => change(description.irqs.as_mut_slice().as_mut_bytes(), worker),
            3 => change(attach.as_mut_bytes(), worker),
            // Arrays of which the end is not there.
            4 => attach.regions = value,
            _ => (attach.num_regions, attach.num_irqs) = (value as u32, (value >> 32) as u32),
        }
    })
}

fn next(worker: &mut Worker, flags: u32, slot: u32) -> (io::Result<u64>, muser_next) {
    let mut next = muser_next {
        size: size_of::<muser_next>() as u32,
        flags,
        slot,
        reserved: 0,
    };
    let fd = worker.attachment.as_ref().map_or(-1, |it| it.fd);
    let result = structure(fd, MUSER_NEXT, &mut next);
    if let Err(error) = &result
        && matches!(
            error.raw_os_error(),
            Some(libc::ENOTCONN | libc::ENODEV | libc::EBADF | libc::ENOTTY)
        )
    {
        worker.attachment = None;
    }
    (result, next)
}

pub(super) fn next_take(worker: &mut Worker) -> Option<io::Result<u64>> {
    // Clients wait: mostly, what is taken is answered before more is.
    if !worker.attachment.as_ref()?.taken.is_empty() && worker.chance(80) {
        return None;
    }
    let flags = if worker.chance(70) {
        MUSER_NEXT_TAKE | MUSER_NEXT_NONBLOCK
    } else {
        MUSER_NEXT_TAKE
    };
    let (result, next) = next(worker, flags, 0);
    if result.is_ok() {
        took(worker, next.slot);
    }
    Some(result)
}

/// Remembers a slot, and looks at what is in it.
fn took(worker: &mut Worker, slot: u32) {
    let Some(attachment) = &mut worker.attachment else {
        return;
    };
    attachment.taken.push(slot);
    if slot >= attachment.slots {
        let slots = attachment.slots;
        worker.found(&format!("took slot {slot} of {slots}"));
    }
    let (Some(window), at) = (attachment.window, slot as usize * attachment.stride) else {
        return;
    };
    let len = size_of::<muser_slot>();
    if worker.windows[window] != Mapped::Slots || at + attachment.stride > WINDOW - PAGE {
        return;
    }
    let Some(bytes) = worker
        .arena
        .read(window, at, len + MUSER_SLOT_DATA as usize)
    else {
        // The mapping is not what it was.
        worker.windows[window] = Mapped::Nothing;
        return;
    };
    let (head, data) = bytes.split_at(len);
    if let Some(strange) = content::strange(data) {
        worker.found(&format!("data of slot {slot}: {strange}"));
    }
    let Ok(head) = muser_slot::read_from_bytes(head) else {
        return;
    };
    let good = (MUSER_REQUEST_READ..=MUSER_REQUEST_UNMAP).contains(&head.kind)
        && head.flags <= 3
        && head.region < MUSER_MAX_REGIONS
        && head.count <= MUSER_SLOT_DATA
        && (head.result, head.state, head.reserved) == (0, 0, [0; 2]);
    // A sibling may have written there meanwhile, or mapped something else.
    if !good && !worker.has_siblings && head.kind != 0 {
        worker.found(&format!("slot {slot} holds {head:?}"));
    }
}

pub(super) fn next_reply(worker: &mut Worker) -> Option<io::Result<u64>> {
    let attachment = worker.attachment.as_mut()?;
    if attachment.taken.is_empty() {
        return None;
    }
    // Some are kept to the grave.
    let at = worker.random.below(attachment.taken.len() as u64) as usize;
    let slot = attachment.taken.swap_remove(at);
    let (window, stride) = (attachment.window, attachment.stride);
    if let Some(window) = window {
        let result: i32 = match worker.random.below(20) {
            0 => -(worker.random.below(4100) as i32),
            1 => worker.number() as i32,
            _ => 0,
        };
        let at = slot as usize * stride;
        let head = at + offset_of!(muser_slot, result);
        worker.arena.write(window, head, &result.to_ne_bytes());
        let len = 1 + worker.random.below(MUSER_SLOT_DATA.into()) as usize;
        let data = content::bytes(&mut worker.random, len);
        if at + stride < WINDOW - PAGE {
            worker
                .arena
                .write(window, at + size_of::<muser_slot>(), &data);
        }
    }
    let flags = if worker.chance(50) {
        MUSER_NEXT_REPLY
    } else {
        MUSER_NEXT_REPLY | MUSER_NEXT_TAKE | MUSER_NEXT_NONBLOCK
    };
    let (result, next) = next(worker, flags, slot);
    let accepted = next.flags & MUSER_NEXT_REPLY == 0;
    if result.is_ok() && flags & MUSER_NEXT_TAKE != 0 {
        took(worker, next.slot);
    } else if let Some(attachment) = &mut worker.attachment
        && !accepted
        && result
            .as_ref()
            .is_err_and(|error| error.raw_os_error() == Some(libc::ERANGE))
    {
        attachment.taken.push(slot);
    }
    // Accepted, whether or not there was another to take.
    Some(if accepted { Ok(0) } else { result })
}

/// A reply that is wrong in every way.
pub(super) fn next_garbage(worker: &mut Worker) -> Option<io::Result<u64>> {
    let attachment = worker.attachment.clone()?;
    if let Some(window) = attachment.window {
        let head = content::bytes(&mut worker.random, size_of::<muser_slot>());
        let slot = worker.random.below(attachment.slots.into()) as usize;
        let len = if worker.chance(50) { 8 } else { head.len() };
        worker
            .arena
            .write(window, slot * attachment.stride, &head[..len]);
    }
    let flags = worker.random.below(9) as u32 | MUSER_NEXT_NONBLOCK;
    let slot = if worker.chance(70) {
        worker.random.below(attachment.slots.into())
    } else {
        worker.number()
    };
    let (result, next) = next(worker, flags, slot as u32);
    if result.is_ok() && flags & MUSER_NEXT_TAKE != 0 {
        took(worker, next.slot);
    }
    Some(result)
}

fn node(worker: &mut Worker) -> Option<i32> {
    if let Some(attachment) = &worker.attachment {
        let fd = attachment.fd;
        if worker.chance(90) {
            return Some(fd);
        }
    }
    worker.any(|kind| kind == Kind::Node).map(|entry| entry.fd)
}

pub(super) fn trigger(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    let wild = worker.chance(10);
    let mut trigger = muser_trigger {
        size: size_of::<muser_trigger>() as u32,
        flags: u32::from(worker.chance(20)),
        index: worker.random.below(5) as u32,
        start: 0,
        vectors: 1,
        signalled: 0,
    };
    if trigger.index == 2 {
        trigger.start = worker.random.below(64) as u32;
        trigger.vectors = worker.random.next();
    }
    if wild {
        let value = worker.number();
        let field = worker.random.below(3);
        match field {
            0 => trigger.index = value as u32,
            1 => trigger.start = value as u32,
            _ => trigger.vectors = value,
        }
    }
    let result = structure(fd, MUSER_TRIGGER, &mut trigger);
    if trigger.signalled & !trigger.vectors != 0 {
        worker.found(&format!("signalled what was not asked for: {trigger:?}"));
    }
    Some(result)
}

pub(super) fn query(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    let room = worker.random.below(9) as u32;
    let element = size_of::<muser_irq_state>();
    let mut arrays = [UNTOUCHED; 3 * 8 * size_of::<muser_irq_state>()];
    let address = arrays.as_mut_ptr().expose_provenance() as u64;
    let place = (8 * element) as u64;
    let wild = worker.chance(5);
    let mut query = muser_query {
        size: size_of::<muser_query>() as u32,
        num_regions: room,
        num_areas: room,
        num_irqs: room,
        regions: if wild { worker.number() } else { address },
        areas: address + place,
        irqs: address + 2 * place,
        ..Default::default()
    };
    let result = structure(fd, MUSER_QUERY, &mut query);
    let good = result.is_err()
        || query.version == MUSER_ABI_VERSION
            && query.flags <= 0xF
            && (MUSER_BUS_PCI..=MUSER_BUS_PLATFORM).contains(&query.bus)
            && query.num_regions <= MUSER_MAX_REGIONS
            && query.num_irqs <= MUSER_MAX_IRQ_INDEXES;
    if !good {
        worker.found(&format!("queried {query:?}"));
    }
    if result.is_ok() && !wild {
        let written = room.min(query.num_irqs) as usize * element;
        let irqs = &arrays[2 * 8 * element..];
        let (told, rest) = irqs.split_at(written.min(irqs.len()));
        let padding = told
            .chunks_exact(element)
            .any(|irq| irq[12..16] != [0; 4] || irq[28..] != [0; 4]);
        if padding || rest.iter().any(|&byte| byte != UNTOUCHED) {
            worker.found(&format!("queried interrupts {irqs:x?}"));
        }
    }
    Some(result)
}

pub(super) fn detach(worker: &mut Worker) -> Option<io::Result<u64>> {
    let attachment = worker.attachment.take()?;
    Some(sys::ioctl(attachment.fd, MUSER_DETACH.into(), 0))
}

/// Pages of IOVA that are mostly used.
pub(super) const SPACE: u64 = 64;

/// A range of IOVA where clients map mostly.
pub(super) fn range(worker: &mut Worker) -> (u64, u64) {
    let page = PAGE as u64;
    let iova = worker.random.below(SPACE) * page;
    let length = page << worker.random.below(3);
    match worker.random.below(12) {
        0 => (worker.number(), length),
        1 => (iova, worker.number()),
        2 => (iova + worker.random.below(page), worker.random.below(page)),
        _ => (iova, length),
    }
}

fn dma(worker: &mut Worker, number: u32, flags: u32) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    let (iova, length) = range(worker);
    let mut dma = muser_dma {
        size: size_of::<muser_dma>() as u32,
        flags,
        iova,
        length,
        ..Default::default()
    };
    let result = structure(fd, number, &mut dma);
    // A release counts pages as a whole.
    let most = if number == MUSER_DMA_RELEASE {
        length.saturating_add(2 * PAGE as u64)
    } else {
        length
    };
    if dma.done > most {
        worker.found(&format!("more done than asked for: {dma:?}"));
    }
    Some(result)
}

pub(super) fn dma_acquire(worker: &mut Worker) -> Option<io::Result<u64>> {
    let flags = *worker.random.pick(&[
        MUSER_DMA_READ,
        MUSER_DMA_READ,
        MUSER_DMA_READ | MUSER_DMA_WRITE,
        MUSER_DMA_WRITE,
        0,
        8,
    ]);
    dma(worker, MUSER_DMA_ACQUIRE, flags)
}

pub(super) fn dma_release(worker: &mut Worker) -> Option<io::Result<u64>> {
    let flags = u32::from(worker.chance(5));
    dma(worker, MUSER_DMA_RELEASE, flags)
}

pub(super) fn dma_copy(worker: &mut Worker) -> Option<io::Result<u64>> {
    const ROOM: usize = 12 << 10;
    let fd = node(worker)?;
    let flags = if worker.chance(50) {
        MUSER_DMA_COPY_WRITE
    } else {
        u32::from(worker.chance(2)) << 5
    };
    let mut memory = content::bytes(&mut worker.random, ROOM);
    let address = memory.as_mut_ptr().expose_provenance() as u64;
    let count = match worker.random.below(20) {
        0 => worker.number() as u32,
        _ => 1 + worker.random.below(4) as u32,
    };
    let segments: Vec<_> = (0..count.min(MUSER_MAX_SEGMENTS + 1))
        .map(|_| {
            let (iova, length) = range(worker);
            let wild = worker.chance(3);
            muser_dma_segment {
                iova,
                // Addresses of the fuzzer's own memory beyond this buffer must not be written.
                address: if wild { 0x1000 } else { address },
                length: if wild {
                    length
                } else {
                    length.min(ROOM as u64)
                },
            }
        })
        .collect();
    let mut copy = muser_dma_copy {
        size: size_of::<muser_dma_copy>() as u32,
        flags,
        segments: segments.as_ptr().expose_provenance() as u64,
        num_segments: segments.len() as u32,
        ..Default::default()
    };
    let result = structure(fd, MUSER_DMA_COPY, &mut copy);
    if let Some(leaked) = content::leaked(&memory) {
        worker.found(&format!("copied from the client: {leaked}"));
    }
    Some(result)
}

pub(super) fn doorbell(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    let event = super::client::event(worker)?;
    let event = match worker.random.below(10) {
        0 => -1,
        1 => fd,
        2 => worker.number() as i32,
        _ => event,
    };
    let mut doorbell = muser_doorbell {
        size: size_of::<muser_doorbell>() as u32,
        flags: u32::from(worker.chance(3)),
        area: worker.random.below(3) as u32,
        fd: event,
    };
    Some(structure(fd, MUSER_DOORBELL, &mut doorbell))
}

pub(super) fn poll_node(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    let events = muser_e2e::sys::poll(
        borrow(fd),
        libc::POLLIN,
        std::time::Duration::from_millis(worker.random.below(10)),
    );
    Some(events.map(|events| u64::from(events.unsigned_abs())))
}

/// Any ioctl, with an argument of any size, in memory that ends early, or nowhere.
pub(super) fn ioctl_node(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    Some(random_ioctl(worker, fd, MUSER_IOCTL_TYPE << 8))
}

/// An ioctl of that type, or nearly.
pub(super) fn random_ioctl(worker: &mut Worker, fd: i32, kind: u32) -> io::Result<u64> {
    let number = match worker.random.below(10) {
        0 => worker.number() as u32,
        _ => kind | worker.random.below(24) as u32,
    };
    if worker.chance(20) {
        // Nothing of ours is in the first pages or the last.
        let address = *worker.random.pick(&[0, 1, 0xFFF, u64::MAX - 7, 1 << 63]);
        return sys::ioctl(fd, number.into(), address);
    }
    let len = 4 + worker.random.below(300) as usize;
    // Numbers of the fuzzer's descriptors and addresses of its memory are not among these bytes.
    let mut bytes = content::bytes(&mut worker.random, len);
    let size = match worker.random.below(4) {
        0 => worker.number() as u32,
        _ => len as u32,
    };
    // A size larger than the bytes would let the kernel write behind them.
    let size = if size as usize > len && size < 64 << 10 {
        len as u32
    } else {
        size
    };
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    ioctl(fd, number, &mut bytes)
}

fn map(
    worker: &mut Worker,
    offset: u64,
    len: usize,
    protection: i32,
    mapped: Mapped,
) -> Option<io::Result<u64>> {
    let fd = node(worker)?;
    let window = worker.window();
    let result = worker
        .arena
        .map(window, len, protection, libc::MAP_SHARED, fd, offset);
    // A mapping that failed may have removed what was there.
    worker.windows[window] = if result.is_ok() {
        mapped
    } else {
        Mapped::Nothing
    };
    let slots = mapped == Mapped::Slots;
    if let Some(attachment) = &mut worker.attachment {
        if attachment.window == Some(window) {
            attachment.window = None;
        }
        if slots && result.is_ok() && attachment.fd == fd && offset == 0 {
            attachment.window = Some(window);
        }
    }
    Some(result)
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

pub(super) fn map_slots(worker: &mut Worker) -> Option<io::Result<u64>> {
    let attachment = worker.attachment.as_ref()?;
    let len = (attachment.stride * attachment.slots as usize).next_multiple_of(PAGE);
    let len = if worker.chance(95) { len } else { len + PAGE };
    map(worker, MUSER_MMAP_SLOTS, len, READ_WRITE, Mapped::Slots)
}

pub(super) fn map_status(worker: &mut Worker) -> Option<io::Result<u64>> {
    let protection = if worker.chance(90) {
        libc::PROT_READ
    } else {
        READ_WRITE
    };
    map(worker, MUSER_MMAP_STATUS, PAGE, protection, Mapped::Status)
}

pub(super) fn map_state(worker: &mut Worker) -> Option<io::Result<u64>> {
    let pages = 1 + worker.random.below(5) as usize;
    let offset = MUSER_MMAP_STATE + worker.random.below(4) * PAGE as u64;
    map(worker, offset, pages * PAGE, READ_WRITE, Mapped::Plain)
}

/// Areas of the devices, by region, offset and size; the last are none.
const AREAS: &[(u64, u64, usize)] = &[
    (1, 4096, 8192),
    (1, 8192, 4096),
    (2, 0, 64 << 10),
    (2, 8192, 16 << 10),
    (0, 0x2000, 4096),
    (0, 0, 4096),
    (9, 0, 4096),
];

/// Some area, or nearly.
pub(super) fn area_of(worker: &mut Worker) -> (u64, usize) {
    let (region, offset, len) = *worker.random.pick(AREAS);
    let wild = if worker.chance(5) { PAGE } else { 0 };
    ((region << MUSER_MMAP_REGION_SHIFT) + offset, len + wild)
}

pub(super) fn map_area(worker: &mut Worker) -> Option<io::Result<u64>> {
    let (offset, len) = area_of(worker);
    let offset = MUSER_MMAP_REGIONS + offset;
    map(worker, offset, len, READ_WRITE, Mapped::Plain)
}

pub(super) fn map_dma_window(worker: &mut Worker) -> Option<io::Result<u64>> {
    let (iova, len) = range(worker);
    let offset = MUSER_MMAP_WINDOW + (iova & !0xFFF) % (1 << 61);
    let len = (len.min(WINDOW as u64) as usize).next_multiple_of(PAGE);
    let protection = *worker.random.pick(&[READ_WRITE, libc::PROT_READ]);
    map(worker, offset, len.max(PAGE), protection, Mapped::Window)
}

/// Whether a device is there at all.
pub(super) fn exists(worker: &Worker, device: usize) -> bool {
    std::path::Path::new(DEVICES)
        .join(&worker.uuids[device])
        .exists()
}
