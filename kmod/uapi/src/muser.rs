// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause
//! The ABI of `/dev/muser/UUID`: the one definition which `muser.ko` and libmuser both compile.
//!
//! Items carry their C names, so that one `grep` finds a field on both sides and in
//! `kmod/uapi/muser.h`, the C header made from this file (`cargo xtask check` compares the two).
//!
//! # Rules
//!
//! - Integers have a fixed width and host byte order; pointers travel as `u64`; padding is
//!   explicit. Every struct starts on an 8-byte boundary and its size is a multiple of 8.
//! - A struct passed to an ioctl begins with its `size` in bytes as the caller knows it. A module
//!   that knows a longer struct takes the missing tail as zeroes; one that knows a shorter struct
//!   refuses a non-zero tail with `E2BIG`. Structs grow at the end only.
//! - Unknown flags and non-zero reserved fields are refused with `EINVAL`.
//! - Every ioctl may be interrupted by a signal and restarted; none repeats an effect.
//!
//! # Errors of every ioctl
//!
//! | errno     | meaning                                                                       |
//! |-----------|-------------------------------------------------------------------------------|
//! | `ENOTTY`  | no such ioctl                                                                 |
//! | `EFAULT`  | a pointer does not lead to memory of the caller                               |
//! | `EINVAL`  | `size` below that of version 1, an unknown flag, a reserved field not zero    |
//! | `E2BIG`   | `size` beyond what this module knows, and the excess is not zero; or over 4096 |
//! | `ENODEV`  | the device was removed; the file is of no more use                            |
//! | `ENOTCONN`| the ioctl needs an attachment, and this file is not (or no longer) attached   |

// What one side leaves unused is not dead: it belongs to the ABI.
#![allow(dead_code, non_camel_case_types, unreachable_pub)]

use core::mem::{offset_of, size_of};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of the ABI, raised only when an existing meaning changes.
pub const MUSER_ABI_VERSION: u32 = 1;

// ---------------------------------------------------------------------------------------------
// Limits
// ---------------------------------------------------------------------------------------------

/// Regions of a device: a region's index is below this.
pub const MUSER_MAX_REGIONS: u32 = 32;
/// Interrupt indexes of a device: an index is below this.
pub const MUSER_MAX_IRQ_INDEXES: u32 = 32;
/// Vectors of one interrupt index (PCI 3.0, 6.8.2: an MSI-X table has at most 2048 entries).
pub const MUSER_MAX_IRQ_VECTORS: u32 = 2048;
/// Areas of all regions together.
pub const MUSER_MAX_AREAS: u32 = 256;
/// Slots of one attachment, so the requests that its threads can hold at one time.
pub const MUSER_MAX_SLOTS: u32 = 256;
/// Slots of an attachment that asks for 0.
pub const MUSER_DEFAULT_SLOTS: u32 = 16;
/// Bytes of the largest region: regions lie this far apart in the VFIO device file.
pub const MUSER_MAX_REGION_SIZE: u64 = 1 << 40;
/// Bytes of data one request carries; a longer access becomes several requests in ascending order.
pub const MUSER_SLOT_DATA: u32 = 4096;
/// Segments of one [`muser_dma_copy`].
pub const MUSER_MAX_SEGMENTS: u32 = 1024;

// ---------------------------------------------------------------------------------------------
// The description of a device, given once by the first process which attaches
// ---------------------------------------------------------------------------------------------

/// `muser_attach.bus`: a PCI device, of an mdev type whose `device_api` is `vfio-pci`.
pub const MUSER_BUS_PCI: u32 = 1;
/// `muser_attach.bus`: a platform device, of an mdev type whose `device_api` is `vfio-platform`.
pub const MUSER_BUS_PLATFORM: u32 = 2;

/// `muser_region.flags`: the client may read the region.
pub const MUSER_REGION_READ: u32 = 1 << 0;
/// `muser_region.flags`: the client may write the region.
pub const MUSER_REGION_WRITE: u32 = 1 << 1;

/// One region of a device: a BAR, config space, or a platform device's memory.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_region {
    /// Index, below [`MUSER_MAX_REGIONS`]; for PCI as `VFIO_PCI_*_REGION_INDEX` in `<linux/vfio.h>`.
    pub index: u32,
    /// `MUSER_REGION_*`; at least one of them.
    pub flags: u32,
    /// Bytes, from 1 to [`MUSER_MAX_REGION_SIZE`].
    pub size: u64,
    /// How many of the areas, in the order given, belong to this region.
    pub num_areas: u32,
    /// Zero.
    pub reserved: u32,
}

/// `muser_area.flags`: pages of the kernel back the area; client and process may map it.
pub const MUSER_AREA_MMAP: u32 = 1 << 0;
/// `muser_area.flags`: a doorbell. A client's write is over as soon as its bytes lie in device
/// memory; the process hears of it by an eventfd ([`MUSER_DOORBELL`]) and looks at the memory, which
/// it alone may map. A read is answered from there as well.
pub const MUSER_AREA_DOORBELL: u32 = 1 << 1;

/// Part of a region which does not behave like the rest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_area {
    /// Offset in the region, not before the end of the area before it. A multiple of the page size;
    /// of a doorbell, of 4.
    pub offset: u64,
    /// Bytes, a multiple of the same.
    pub size: u64,
    /// `MUSER_AREA_*`; exactly one of them.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// `muser_irq.flags`: vectors may signal an eventfd (`VFIO_IRQ_INFO_EVENTFD`).
pub const MUSER_IRQ_EVENTFD: u32 = 1 << 0;
/// `muser_irq.flags`: vectors can be masked and unmasked (`VFIO_IRQ_INFO_MASKABLE`).
pub const MUSER_IRQ_MASKABLE: u32 = 1 << 1;
/// `muser_irq.flags`: level-triggered; a vector masks itself when it fires
/// (`VFIO_IRQ_INFO_AUTOMASKED`). Needs `MUSER_IRQ_MASKABLE`.
pub const MUSER_IRQ_AUTOMASKED: u32 = 1 << 2;
/// `muser_irq.flags`: the number of enabled vectors can't grow while enabled
/// (`VFIO_IRQ_INFO_NORESIZE`).
pub const MUSER_IRQ_NORESIZE: u32 = 1 << 3;

/// One interrupt index of a device.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_irq {
    /// Index, below [`MUSER_MAX_IRQ_INDEXES`]; for PCI as `VFIO_PCI_*_IRQ_INDEX`.
    pub index: u32,
    /// `MUSER_IRQ_*`.
    pub flags: u32,
    /// Vectors, from 1 to [`MUSER_MAX_IRQ_VECTORS`].
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// What is wrong with a description, in `muser_attach.fault`. The errno of the ioctl goes with it.
///
/// `muser_attach.fault_index` says where: the position in the array which the fault is about.
pub const MUSER_FAULT_NONE: u32 = 0;
/// `EPROTO`: `version` is not [`MUSER_ABI_VERSION`].
pub const MUSER_FAULT_VERSION: u32 = 1;
/// `EINVAL`: `bus` is unknown or not that of the device's mdev type.
pub const MUSER_FAULT_BUS: u32 = 2;
/// `ENOSPC`: an array or a size exceeds its limit; `fault_index` is 0 for regions, 1 for areas,
/// 2 for interrupts, 3 for slots, 4 for the vectors of all interrupts together (the device's
/// attribute `max_vectors`).
pub const MUSER_FAULT_LIMIT: u32 = 3;
/// `EINVAL`: a region's index is out of range for the bus, or not above that of the one before.
pub const MUSER_FAULT_REGION_INDEX: u32 = 4;
/// `EINVAL`: a region has unknown flags or none, or its reserved field is not zero.
pub const MUSER_FAULT_REGION_FLAGS: u32 = 5;
/// `EINVAL`: a region's size is 0, or does not fit its kind (PCI config space: 256 or 4096).
pub const MUSER_FAULT_REGION_SIZE: u32 = 6;
/// `EOVERFLOW`: a region's size exceeds [`MUSER_MAX_REGION_SIZE`].
pub const MUSER_FAULT_REGION_OVERFLOW: u32 = 7;
/// `EINVAL`: the areas of the regions do not add up to `num_areas`; `fault_index` is the region.
pub const MUSER_FAULT_AREA_COUNT: u32 = 8;
/// `EINVAL`: an area has unknown flags, none or several, or its reserved field is not zero.
pub const MUSER_FAULT_AREA_FLAGS: u32 = 9;
/// `EINVAL`: an area is empty, or not aligned to pages (a doorbell: to 4 bytes).
pub const MUSER_FAULT_AREA_ALIGN: u32 = 10;
/// `EOVERFLOW`: an area ends beyond its region, or beyond what 64 bits can say.
pub const MUSER_FAULT_AREA_OVERFLOW: u32 = 11;
/// `EEXIST`: an area overlaps the one before it in its region, or lies before it.
pub const MUSER_FAULT_AREA_OVERLAP: u32 = 12;
/// `EINVAL`: an interrupt's index is out of range for the bus, or not above that of the one before.
pub const MUSER_FAULT_IRQ_INDEX: u32 = 13;
/// `EINVAL`: an interrupt has unknown flags, or flags that exclude each other.
pub const MUSER_FAULT_IRQ_FLAGS: u32 = 14;
/// `ENOSPC`: an interrupt has no vectors or more than [`MUSER_MAX_IRQ_VECTORS`].
pub const MUSER_FAULT_IRQ_COUNT: u32 = 15;
/// `EBUSY`: another file is attached to the device.
pub const MUSER_FAULT_ATTACHED: u32 = 16;
/// `EISCONN`: this file is attached already.
pub const MUSER_FAULT_ATTACHED_SELF: u32 = 17;
/// `ESTALE`: the device was described before, and differently. A guest's device must not change
/// under it: remove the device and create it again. `fault_index` says what differs first: in its
/// upper 16 bits 0 for the regions, 1 for the areas, 2 for the interrupts; in its lower ones the
/// position in that array, which is the array's length if the device had more.
pub const MUSER_FAULT_DIFFERS: u32 = 18;
/// `EINVAL`: a PCI device lacks its config space (region `VFIO_PCI_CONFIG_REGION_INDEX`).
pub const MUSER_FAULT_NO_CONFIG: u32 = 19;
/// `ENOSPC`: the areas exceed the device's `max_memory` attribute.
pub const MUSER_FAULT_MEMORY: u32 = 20;
/// `ENOSPC`: `state_size` exceeds the device's `max_state` attribute.
pub const MUSER_FAULT_STATE: u32 = 21;
/// `EBUSY`: another file waits in standby already.
pub const MUSER_FAULT_STANDBY: u32 = 22;
/// `EDQUOT`: the areas exceed what is left to the creator of the device (`max_user_memory`).
pub const MUSER_FAULT_USER_MEMORY: u32 = 23;
/// `ESTALE`: `state_tag` is not the one that the device has.
pub const MUSER_FAULT_STATE_DIFFERS: u32 = 24;

/// `muser_attach.flags`: if another file is attached, wait until it is no longer, and take over from
/// it. The other one learns of it ([`MUSER_STATE_STANDBY`], `ESHUTDOWN` of [`MUSER_NEXT`]), finishes
/// what it has taken, and detaches; or it dies. Requests wait meanwhile and do not time out.
///
/// The description and `state_tag` are compared first, so that a successor which can't serve the
/// device does not get it. One file can wait; with `O_NONBLOCK`, the ioctl fails with
/// `EAGAIN` as long as it would have to wait, and nobody is told.
pub const MUSER_ATTACH_STANDBY: u32 = 1 << 0;

/// `muser_attach.recovered`: the device was served before, so there is state to recover.
pub const MUSER_RECOVERED_SERVED: u32 = 1 << 0;
/// `muser_attach.recovered`: a client has the device open.
pub const MUSER_RECOVERED_CLIENT: u32 = 1 << 1;
/// `muser_attach.recovered`: requests wait, some of which were taken before.
pub const MUSER_RECOVERED_REPLAYS: u32 = 1 << 2;
/// `muser_attach.recovered`: pages of the client are pinned.
pub const MUSER_RECOVERED_PINS: u32 = 1 << 3;

/// Argument of [`MUSER_ATTACH`]: makes the file the server of its device.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_attach {
    /// Bytes of this struct.
    pub size: u32,
    /// In: the version the process was made for. Out: the version of the module.
    pub version: u32,
    /// `MUSER_ATTACH_*`.
    pub flags: u32,
    /// `MUSER_BUS_*`.
    pub bus: u32,
    /// Elements of `regions`.
    pub num_regions: u32,
    /// Elements of `areas`.
    pub num_areas: u32,
    /// Elements of `irqs`.
    pub num_irqs: u32,
    /// In: slots wanted, 0 for [`MUSER_DEFAULT_SLOTS`]. Out: slots there are.
    pub slots: u32,
    /// Address of an array of [`muser_region`], with ascending indexes.
    pub regions: u64,
    /// Address of an array of [`muser_area`]: those of the first region, of the second, …
    pub areas: u64,
    /// Address of an array of [`muser_irq`], with ascending indexes.
    pub irqs: u64,
    /// Out: bytes from one slot to the next.
    pub slot_stride: u32,
    /// Out: `MUSER_FAULT_*`, written also when the ioctl fails.
    pub fault: u32,
    /// Out: which element the fault is about.
    pub fault_index: u32,
    /// Out: `MUSER_RECOVERED_*`.
    pub recovered: u32,
    /// In: bytes of state wanted, for [`MUSER_MMAP_STATE`]. Out: bytes there are: as many or, if an
    /// earlier process wanted more, as it wanted. State outlives processes and clients, and starts as
    /// zeroes; the kernel makes nothing of it.
    pub state_size: u32,
    /// Zero.
    pub reserved: u32,
    /// What the process makes of the state, in a number of its own choice: of its layout, for
    /// instance; 0 for no opinion. The device keeps the first one that is not 0, and refuses an
    /// attachment with another one ([`MUSER_FAULT_STATE_DIFFERS`]); the kernel makes nothing of it.
    pub state_tag: u64,
}

// ---------------------------------------------------------------------------------------------
// Requests
// ---------------------------------------------------------------------------------------------

/// `muser_slot.kind`: read `count` bytes at `offset` of `region`; the reply carries them in the
/// slot's data.
pub const MUSER_REQUEST_READ: u32 = 1;
/// `muser_slot.kind`: write the `count` bytes of the slot's data at `offset` of `region`.
pub const MUSER_REQUEST_WRITE: u32 = 2;
/// `muser_slot.kind`: reset the device to the state it has after power-on. A reset is taken when
/// every request before it has ended, and nothing behind it is taken until it has.
pub const MUSER_REQUEST_RESET: u32 = 3;
/// `muser_slot.kind`: the client unmaps `length` bytes of IOVA from `offset` on, some of which are
/// pinned. With the reply, or after the device's `unmap_timeout_ms`, the pages go.
pub const MUSER_REQUEST_UNMAP: u32 = 4;

/// `muser_slot.flags`: a process took this request before and went away without a reply. A request
/// that 64 processes in a row went away with fails with `EIO`.
pub const MUSER_REQUEST_REPLAY: u32 = 1 << 0;
/// `muser_slot.flags`: a reset because the last client closed the device, so nobody waits for it.
pub const MUSER_REQUEST_CLOSE: u32 = 1 << 1;

/// A request and its reply, at the head of a slot; [`MUSER_SLOT_DATA`] bytes of data follow.
///
/// Slot `i` lies at `i * slot_stride` of the mapping at [`MUSER_MMAP_SLOTS`]. The module writes a
/// slot before it hands it out, and reads `id`, `result` and the data of a read when it is replied
/// to; it trusts nothing else in it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_slot {
    /// Number of the request, never used twice in the life of a device.
    pub id: u64,
    /// `MUSER_REQUEST_*`.
    pub kind: u32,
    /// `MUSER_REQUEST_REPLAY`, `MUSER_REQUEST_CLOSE`.
    pub flags: u32,
    /// Offset in the region; of an unmap, the IOVA.
    pub offset: u64,
    /// Region's index.
    pub region: u32,
    /// Bytes to read or write, from 1 to [`MUSER_SLOT_DATA`].
    pub count: u32,
    /// Reply: 0, or a negated errno from -1 to -4095.
    pub result: i32,
    /// Zero; later versions poll it.
    pub state: u32,
    /// Of an unmap, bytes; else zero.
    pub length: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

/// `muser_next.flags`: `slot` holds a reply. Cleared in place as soon as the reply is accepted, so
/// that a call restarted after a signal does not send it twice.
pub const MUSER_NEXT_REPLY: u32 = 1 << 0;
/// `muser_next.flags`: then wait for a request and take it.
pub const MUSER_NEXT_TAKE: u32 = 1 << 1;
/// `muser_next.flags`: do not wait, as if the file had `O_NONBLOCK`.
pub const MUSER_NEXT_NONBLOCK: u32 = 1 << 2;

/// Argument of [`MUSER_NEXT`]: replies to one request and takes the next in a single call.
///
/// Any thread of the process may call it at any time.
///
/// # Errors of a reply
///
/// The request stays as it was, and nothing is taken.
///
/// | errno       | meaning                                                                   |
/// |-------------|---------------------------------------------------------------------------|
/// | `ENOSPC`    | `slot` is not below the number of slots                                   |
/// | `ENOENT`    | no request with the id in the slot is known: it was never made, or ended  |
/// | `ENOMSG`    | the request exists, but nobody has taken it                               |
/// | `EPERM`     | another file took the request, and is attached together with this one (so |
/// |             | far one is at a time: a file that is not attached gets `ENOTCONN`)        |
/// | `EBADSLT`   | the request was taken by this file, in another slot                       |
/// | `ERANGE`    | `result` is neither 0 nor a negated errno                                 |
/// | `ECANCELED` | the client was killed while it waited; the request has ended all the same |
///
/// # Errors of a take
///
/// | errno       | meaning                                                                   |
/// |-------------|---------------------------------------------------------------------------|
/// | `EAGAIN`    | no request is there, or no slot is free, and the call may not wait        |
/// | `EINTR`     | a signal came (the call restarts by itself where the handler allows it)   |
/// | `ESHUTDOWN` | a successor waits in standby: finish what was taken, then detach          |
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_next {
    /// Bytes of this struct.
    pub size: u32,
    /// `MUSER_NEXT_*`; at least one of `REPLY` and `TAKE`.
    pub flags: u32,
    /// In: the slot replied to. Out: the slot taken.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
}

// ---------------------------------------------------------------------------------------------
// Interrupts
// ---------------------------------------------------------------------------------------------

/// `muser_trigger.flags`: lower the line of level-triggered vectors, instead of raising it.
pub const MUSER_TRIGGER_LOWER: u32 = 1 << 0;

/// Argument of [`MUSER_TRIGGER`]: fires up to 64 vectors of one interrupt index.
///
/// A masked vector is remembered as pending and fires when it is unmasked. A vector of an index
/// with `MUSER_IRQ_AUTOMASKED` has a line which stays up until it is lowered: it fires, masks
/// itself, and fires again at each unmask as long as the line is up.
///
/// # Errors
///
/// `ENXIO`: no such interrupt index. `ENOSPC`: a vector beyond the index's count.
/// `EOPNOTSUPP`: `MUSER_TRIGGER_LOWER` for an index which is not level-triggered.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_trigger {
    /// Bytes of this struct.
    pub size: u32,
    /// `MUSER_TRIGGER_*`.
    pub flags: u32,
    /// Interrupt index.
    pub index: u32,
    /// Vector that bit 0 of `vectors` stands for.
    pub start: u32,
    /// Bit i: vector `start + i`.
    pub vectors: u64,
    /// Out: the vectors whose eventfd was signalled; the others are masked or have none.
    pub signalled: u64,
}

// ---------------------------------------------------------------------------------------------
// Doorbells
// ---------------------------------------------------------------------------------------------

/// Argument of [`MUSER_DOORBELL`]: says which eventfd is signalled when a client rings.
///
/// It fires at once, since a client may have rung while no process listened. An attachment that
/// ends takes its eventfds with it; the values stay.
///
/// # Errors
///
/// `ENXIO`: the area does not exist or is no doorbell. `EBADF`, `EINVAL`: `fd` is not an eventfd.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_doorbell {
    /// Bytes of this struct.
    pub size: u32,
    /// Zero: no flags yet.
    pub flags: u32,
    /// Which of all areas, in the order of the description.
    pub area: u32,
    /// An eventfd, or -1 for none.
    pub fd: i32,
}

// ---------------------------------------------------------------------------------------------
// DMA: the client's memory by IOVA
// ---------------------------------------------------------------------------------------------

/// `muser_dma.flags`: to read from the client's memory.
pub const MUSER_DMA_READ: u32 = 1 << 0;
/// `muser_dma.flags`: to write to the client's memory.
pub const MUSER_DMA_WRITE: u32 = 1 << 1;

/// Argument of [`MUSER_DMA_ACQUIRE`] and [`MUSER_DMA_RELEASE`]: pins the pages of a range of IOVA,
/// or unpins them.
///
/// Acquired pages stay pinned, whoever serves the device, until they are released, the client unmaps
/// them, or it closes the device. What is pinned already costs nothing.
///
/// # Errors
///
/// Pages before the one that fails stay acquired, and `done` says how many bytes of the range they
/// are: it is written also then.
///
/// | errno       | meaning                                                                   |
/// |-------------|---------------------------------------------------------------------------|
/// | `EINVAL`    | unknown flags, none for an acquire or any for a release, or `length` is 0 |
/// | `EOVERFLOW` | the range ends beyond 2^64                                                |
/// | `EFAULT`    | the client has not mapped it, is just unmapping it, or is not there; or   |
/// |             | it is not memory (another device's registers)                             |
/// | `EPERM`     | the client has mapped it for reading only                                 |
/// | `EDQUOT`    | it would exceed the device's `max_pinned`                                 |
/// | `ENOMEM`    | it would exceed what the client may pin (`RLIMIT_MEMLOCK`)                |
/// | `EINTR`     | a signal that kills came                                                  |
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_dma {
    /// Bytes of this struct.
    pub size: u32,
    /// `MUSER_DMA_READ`, `MUSER_DMA_WRITE`.
    pub flags: u32,
    /// First IOVA of the range.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Out: of an acquire, bytes from `iova` on that are acquired; of a release, bytes unpinned.
    pub done: u64,
    /// Out: `muser_status.dma_generation` as long as none of the range has gone away again.
    pub generation: u64,
}

/// `muser_dma_copy.flags`: copy to the client's memory, instead of from it.
pub const MUSER_DMA_COPY_WRITE: u32 = 1 << 0;

/// Part of a [`muser_dma_copy`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_dma_segment {
    /// IOVA in the client's memory.
    pub iova: u64,
    /// Address in the caller's memory.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// Argument of [`MUSER_DMA_COPY`]: copies between the client's memory and the caller's, segment by
/// segment. It acquires what is not acquired yet.
///
/// # Errors
///
/// As [`muser_dma`], and `EFAULT` also for an `address` that leads nowhere. `done` says how many
/// bytes of the segments were copied: it is written also then. `E2BIG`: more than
/// [`MUSER_MAX_SEGMENTS`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_dma_copy {
    /// Bytes of this struct.
    pub size: u32,
    /// `MUSER_DMA_COPY_WRITE`.
    pub flags: u32,
    /// Address of an array of [`muser_dma_segment`].
    pub segments: u64,
    /// Its elements.
    pub num_segments: u32,
    /// Zero.
    pub reserved: u32,
    /// Out: bytes copied.
    pub done: u64,
}

// ---------------------------------------------------------------------------------------------
// State
// ---------------------------------------------------------------------------------------------

/// `muser_status.flags`, `muser_query.flags`: a client has the device open.
pub const MUSER_STATE_CLIENT: u32 = 1 << 0;
/// `muser_query.flags`: a process is attached.
pub const MUSER_STATE_ATTACHED: u32 = 1 << 1;
/// `muser_query.flags`: the device has a description.
pub const MUSER_STATE_DESCRIBED: u32 = 1 << 2;
/// `muser_status.flags`, `muser_query.flags`: a successor waits in standby for the attached process
/// to detach.
pub const MUSER_STATE_STANDBY: u32 = 1 << 3;

/// What the process can see of its device without a system call: one page, mapped read-only at
/// [`MUSER_MMAP_STATUS`], written by the module.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_status {
    /// `MUSER_STATE_CLIENT`, `MUSER_STATE_STANDBY`.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// By interrupt index, the number of vectors that have an eventfd.
    pub irq_enabled: [u32; MUSER_MAX_IRQ_INDEXES as usize],
    /// Grows whenever acquired pages go away. A range acquired at one generation can be used in the
    /// window as long as it is the same.
    pub dma_generation: u64,
}

/// What a device has done, in [`muser_query`]. Counters start at 0 when the device is created.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_counters {
    /// Reads answered by the process.
    pub reads: u64,
    /// Writes answered by the process.
    pub writes: u64,
    /// Resets answered by the process.
    pub resets: u64,
    /// Reads served in the kernel, from device memory.
    pub memory_reads: u64,
    /// Writes served in the kernel, to device memory.
    pub memory_writes: u64,
    /// Eventfds signalled.
    pub interrupts: u64,
    /// Requests that failed since no process was there in time.
    pub timeouts: u64,
    /// Requests put back because their process went away.
    pub replays: u64,
    /// Requests whose client was killed while it waited.
    pub withdrawn: u64,
    /// Attachments so far.
    pub attachments: u64,
    /// Writes to doorbells.
    pub doorbells: u64,
    /// Unmaps of ranges with pinned pages.
    pub unmaps: u64,
    /// Those of them that the process did not answer in time, or at all.
    pub unmaps_forced: u64,
    /// Pages pinned.
    pub pins: u64,
    /// Pages unpinned.
    pub unpins: u64,
}

/// Argument of [`MUSER_QUERY`], which any file of the node may call, attached or not.
///
/// Each array is filled up to the number of elements given; the true number is returned.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_query {
    /// Bytes of this struct.
    pub size: u32,
    /// Out: `MUSER_STATE_*`.
    pub flags: u32,
    /// Out: version of the module's ABI.
    pub version: u32,
    /// Out: `MUSER_BUS_*` of the device's type.
    pub bus: u32,
    /// In: room in `regions`. Out: regions of the device.
    pub num_regions: u32,
    /// In: room in `areas`. Out: areas of the device.
    pub num_areas: u32,
    /// In: room in `irqs`. Out: interrupt indexes of the device.
    pub num_irqs: u32,
    /// Out: process id of the attached process in the caller's namespace, or 0.
    pub pid: u32,
    /// Address of an array of [`muser_region`].
    pub regions: u64,
    /// Address of an array of [`muser_area`].
    pub areas: u64,
    /// Address of an array of [`muser_irq_state`].
    pub irqs: u64,
    /// Out: requests waiting to be taken.
    pub queued: u32,
    /// Out: requests taken and not answered.
    pub taken: u32,
    /// Out: pages of device memory allocated, those of the state included.
    pub memory_pages: u64,
    /// Out: pages of the client's memory pinned.
    pub pinned_pages: u64,
    /// Out: bytes of state, see [`MUSER_MMAP_STATE`].
    pub state_size: u32,
    /// Out: process id, as `pid`, of who waits in standby, or 0.
    pub standby_pid: u32,
    /// Out.
    pub counters: muser_counters,
}

/// An interrupt index and its present state, in [`muser_query`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct muser_irq_state {
    /// As described.
    pub irq: muser_irq,
    /// Vectors with an eventfd.
    pub enabled: u32,
    /// Vectors that are masked.
    pub masked: u32,
    /// Vectors that are pending, or whose line is up.
    pub pending: u32,
    /// Zero.
    pub reserved: u32,
}

// ---------------------------------------------------------------------------------------------
// ioctl numbers, as <asm-generic/ioctl.h> encodes them, and offsets for mmap
// ---------------------------------------------------------------------------------------------

/// Type byte of the ioctls.
pub const MUSER_IOCTL_TYPE: u32 = 0xBD;

/// `_IO(MUSER_IOCTL_TYPE, nr)`: as in VFIO, the size is not in the number but in the struct itself,
/// so that it can grow.
const fn io(nr: u32) -> u32 {
    (MUSER_IOCTL_TYPE << 8) | nr
}

/// Makes the file the server of its device, and describes the device: [`muser_attach`].
///
/// `EBADF` if the file is not open for reading and writing; for other errors see `MUSER_FAULT_*`.
pub const MUSER_ATTACH: u32 = io(0);
/// Replies to a request and takes the next: [`muser_next`].
pub const MUSER_NEXT: u32 = io(1);
/// Fires interrupts: [`muser_trigger`].
pub const MUSER_TRIGGER: u32 = io(2);
/// Asks for the state of the device: [`muser_query`].
pub const MUSER_QUERY: u32 = io(3);

/// Ends the attachment of this file: what it took and did not answer goes back into the queue, and
/// its threads which wait in [`MUSER_NEXT`] get `ENOTCONN`. It takes no argument, and the file can't
/// attach again. Closing the file's last descriptor, with all mappings of it gone, does the same.
pub const MUSER_DETACH: u32 = io(4);
/// Pins a range of the client's memory: [`muser_dma`].
pub const MUSER_DMA_ACQUIRE: u32 = io(5);
/// Unpins a range of the client's memory: [`muser_dma`].
pub const MUSER_DMA_RELEASE: u32 = io(6);
/// Copies to or from the client's memory: [`muser_dma_copy`].
pub const MUSER_DMA_COPY: u32 = io(7);
/// Joins a doorbell with an eventfd: [`muser_doorbell`].
pub const MUSER_DOORBELL: u32 = io(8);

/// Offset at which an attached process maps its slots.
pub const MUSER_MMAP_SLOTS: u64 = 0;
/// Offset at which an attached process maps its device's state, `muser_attach.state_size` bytes.
pub const MUSER_MMAP_STATE: u64 = 1 << 38;
/// Offset at which [`muser_status`] is mapped, read-only.
pub const MUSER_MMAP_STATUS: u64 = 1 << 39;
/// Offset at which offset 0 of region 0 is mapped; region `i` is `i << MUSER_MMAP_REGION_SHIFT`
/// further. Only areas can be mapped; of doorbells, the pages in which they lie.
pub const MUSER_MMAP_REGIONS: u64 = 1 << 40;
/// Regions lie `1 << MUSER_MMAP_REGION_SHIFT` bytes apart, here and in the VFIO device file.
pub const MUSER_MMAP_REGION_SHIFT: u32 = 40;
/// Offset at which IOVA 0 is mapped, of IOVAs below this: the window. It shows the pages that are
/// acquired. Where none is, reads give zeroes and writes are lost, until the page is acquired
/// (again); what the process has lost that way may be what it reads there.
pub const MUSER_MMAP_WINDOW: u64 = 1 << 62;

const _: () = {
    assert!(size_of::<muser_region>() == 24);
    assert!(size_of::<muser_area>() == 24);
    assert!(size_of::<muser_irq>() == 16);
    assert!(size_of::<muser_attach>() == 88);
    assert!(offset_of!(muser_attach, regions) == 32);
    assert!(offset_of!(muser_attach, fault) == 60);
    assert!(size_of::<muser_slot>() == 64);
    assert!(offset_of!(muser_slot, offset) == 16);
    assert!(offset_of!(muser_slot, result) == 32);
    assert!(size_of::<muser_next>() == 16);
    assert!(size_of::<muser_trigger>() == 32);
    assert!(size_of::<muser_status>() == 144);
    assert!(offset_of!(muser_status, dma_generation) == 136);
    assert!(size_of::<muser_counters>() == 120);
    assert!(size_of::<muser_query>() == 208);
    assert!(offset_of!(muser_query, counters) == 88);
    assert!(size_of::<muser_irq_state>() == 32);
    assert!(size_of::<muser_doorbell>() == 16);
    assert!(size_of::<muser_dma>() == 40);
    assert!(size_of::<muser_dma_copy>() == 32);
    assert!(size_of::<muser_dma_segment>() == 24);
    assert!(MUSER_MAX_REGION_SIZE == 1 << MUSER_MMAP_REGION_SHIFT);
};
