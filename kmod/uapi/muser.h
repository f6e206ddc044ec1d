/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR Apache-2.0 OR BSD-3-Clause) */
/* Made from src/muser.rs by `MUSER_BLESS=1 cargo test -p muser-abi-tests`: edit that file instead. */

/*
 * The ABI of `/dev/muser/UUID`: the one definition which `muser.ko` and libmuser both compile.
 *
 * Items carry their C names, so that one `grep` finds a field on both sides and in
 * `kmod/uapi/muser.h`, the C header made from this file (`cargo xtask check` compares the two).
 *
 * # Rules
 *
 * - Integers have a fixed width and host byte order; pointers travel as `u64`; padding is
 *   explicit. Every struct starts on an 8-byte boundary and its size is a multiple of 8.
 * - A struct passed to an ioctl begins with its `size` in bytes as the caller knows it. A module
 *   that knows a longer struct takes the missing tail as zeroes; one that knows a shorter struct
 *   refuses a non-zero tail with `E2BIG`. Structs grow at the end only.
 * - Unknown flags and non-zero reserved fields are refused with `EINVAL`.
 * - Every ioctl may be interrupted by a signal and restarted; none repeats an effect.
 *
 * # Errors of every ioctl
 *
 * | errno     | meaning                                                                       |
 * |-----------|-------------------------------------------------------------------------------|
 * | `ENOTTY`  | no such ioctl                                                                 |
 * | `EFAULT`  | a pointer does not lead to memory of the caller                               |
 * | `EINVAL`  | `size` below that of version 1, an unknown flag, a reserved field not zero    |
 * | `E2BIG`   | `size` beyond what this module knows, and the excess is not zero; or over 4096 |
 * | `ENODEV`  | the device was removed; the file is of no more use                            |
 * | `ENOTCONN`| the ioctl needs an attachment, and this file is not (or no longer) attached   |
 */

#ifndef _MUSER_H
#define _MUSER_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Version of the ABI, raised only when an existing meaning changes. */
#define MUSER_ABI_VERSION 1u

/* Regions of a device: a region's index is below this. */
#define MUSER_MAX_REGIONS 32u

/* Interrupt indexes of a device: an index is below this. */
#define MUSER_MAX_IRQ_INDEXES 32u

/* Vectors of one interrupt index (PCI 3.0, 6.8.2: an MSI-X table has at most 2048 entries). */
#define MUSER_MAX_IRQ_VECTORS 2048u

/* Areas of all regions together. */
#define MUSER_MAX_AREAS 256u

/* Slots of one attachment, so the requests that its threads can hold at one time. */
#define MUSER_MAX_SLOTS 256u

/* Slots of an attachment that asks for 0. */
#define MUSER_DEFAULT_SLOTS 16u

/* Bytes of the largest region: regions lie this far apart in the VFIO device file. */
#define MUSER_MAX_REGION_SIZE (1ull << 40)

/*
 * Bytes of data one request carries; a longer access becomes several requests in ascending order.
 */
#define MUSER_SLOT_DATA 4096u

/* Segments of one `muser_dma_copy`. */
#define MUSER_MAX_SEGMENTS 1024u

/* `muser_attach.bus`: a PCI device, of an mdev type whose `device_api` is `vfio-pci`. */
#define MUSER_BUS_PCI 1u

/* `muser_attach.bus`: a platform device, of an mdev type whose `device_api` is `vfio-platform`. */
#define MUSER_BUS_PLATFORM 2u

/* `muser_region.flags`: the client may read the region. */
#define MUSER_REGION_READ (1u << 0)

/* `muser_region.flags`: the client may write the region. */
#define MUSER_REGION_WRITE (1u << 1)

/* `muser_area.flags`: pages of the kernel back the area; client and process may map it. */
#define MUSER_AREA_MMAP (1u << 0)

/*
 * `muser_area.flags`: a doorbell. A client's write is over as soon as its bytes lie in device
 * memory; the process hears of it by an eventfd (`MUSER_DOORBELL`) and looks at the memory, which
 * it alone may map. A read is answered from there as well.
 */
#define MUSER_AREA_DOORBELL (1u << 1)

/* `muser_irq.flags`: vectors may signal an eventfd (`VFIO_IRQ_INFO_EVENTFD`). */
#define MUSER_IRQ_EVENTFD (1u << 0)

/* `muser_irq.flags`: vectors can be masked and unmasked (`VFIO_IRQ_INFO_MASKABLE`). */
#define MUSER_IRQ_MASKABLE (1u << 1)

/*
 * `muser_irq.flags`: level-triggered; a vector masks itself when it fires
 * (`VFIO_IRQ_INFO_AUTOMASKED`). Needs `MUSER_IRQ_MASKABLE`.
 */
#define MUSER_IRQ_AUTOMASKED (1u << 2)

/*
 * `muser_irq.flags`: the number of enabled vectors can't grow while enabled
 * (`VFIO_IRQ_INFO_NORESIZE`).
 */
#define MUSER_IRQ_NORESIZE (1u << 3)

/*
 * What is wrong with a description, in `muser_attach.fault`. The errno of the ioctl goes with it.
 *
 * `muser_attach.fault_index` says where: the position in the array which the fault is about.
 */
#define MUSER_FAULT_NONE 0u

/* `EPROTO`: `version` is not `MUSER_ABI_VERSION`. */
#define MUSER_FAULT_VERSION 1u

/* `EINVAL`: `bus` is unknown or not that of the device's mdev type. */
#define MUSER_FAULT_BUS 2u

/*
 * `ENOSPC`: an array or a size exceeds its limit; `fault_index` is 0 for regions, 1 for areas,
 * 2 for interrupts, 3 for slots, 4 for the vectors of all interrupts together (the device's
 * attribute `max_vectors`).
 */
#define MUSER_FAULT_LIMIT 3u

/* `EINVAL`: a region's index is out of range for the bus, or not above that of the one before. */
#define MUSER_FAULT_REGION_INDEX 4u

/* `EINVAL`: a region has unknown flags or none, or its reserved field is not zero. */
#define MUSER_FAULT_REGION_FLAGS 5u

/* `EINVAL`: a region's size is 0, or does not fit its kind (PCI config space: 256 or 4096). */
#define MUSER_FAULT_REGION_SIZE 6u

/* `EOVERFLOW`: a region's size exceeds `MUSER_MAX_REGION_SIZE`. */
#define MUSER_FAULT_REGION_OVERFLOW 7u

/* `EINVAL`: the areas of the regions do not add up to `num_areas`; `fault_index` is the region. */
#define MUSER_FAULT_AREA_COUNT 8u

/* `EINVAL`: an area has unknown flags, none or several, or its reserved field is not zero. */
#define MUSER_FAULT_AREA_FLAGS 9u

/* `EINVAL`: an area is empty, or not aligned to pages (a doorbell: to 4 bytes). */
#define MUSER_FAULT_AREA_ALIGN 10u

/* `EOVERFLOW`: an area ends beyond its region, or beyond what 64 bits can say. */
#define MUSER_FAULT_AREA_OVERFLOW 11u

/* `EEXIST`: an area overlaps the one before it in its region, or lies before it. */
#define MUSER_FAULT_AREA_OVERLAP 12u

/*
 * `EINVAL`: an interrupt's index is out of range for the bus, or not above that of the one before.
 */
#define MUSER_FAULT_IRQ_INDEX 13u

/* `EINVAL`: an interrupt has unknown flags, or flags that exclude each other. */
#define MUSER_FAULT_IRQ_FLAGS 14u

/* `ENOSPC`: an interrupt has no vectors or more than `MUSER_MAX_IRQ_VECTORS`. */
#define MUSER_FAULT_IRQ_COUNT 15u

/* `EBUSY`: another file is attached to the device. */
#define MUSER_FAULT_ATTACHED 16u

/* `EISCONN`: this file is attached already. */
#define MUSER_FAULT_ATTACHED_SELF 17u

/*
 * `ESTALE`: the device was described before, and differently. A guest's device must not change
 * under it: remove the device and create it again. `fault_index` says what differs first: in its
 * upper 16 bits 0 for the regions, 1 for the areas, 2 for the interrupts; in its lower ones the
 * position in that array, which is the array's length if the device had more.
 */
#define MUSER_FAULT_DIFFERS 18u

/* `EINVAL`: a PCI device lacks its config space (region `VFIO_PCI_CONFIG_REGION_INDEX`). */
#define MUSER_FAULT_NO_CONFIG 19u

/* `ENOSPC`: the areas exceed the device's `max_memory` attribute. */
#define MUSER_FAULT_MEMORY 20u

/* `ENOSPC`: `state_size` exceeds the device's `max_state` attribute. */
#define MUSER_FAULT_STATE 21u

/* `EBUSY`: another file waits in standby already. */
#define MUSER_FAULT_STANDBY 22u

/* `EDQUOT`: the areas exceed what is left to the creator of the device (`max_user_memory`). */
#define MUSER_FAULT_USER_MEMORY 23u

/* `ESTALE`: `state_tag` is not the one that the device has. */
#define MUSER_FAULT_STATE_DIFFERS 24u

/*
 * `muser_attach.flags`: if another file is attached, wait until it is no longer, and take over from
 * it. The other one learns of it (`MUSER_STATE_STANDBY`, `ESHUTDOWN` of `MUSER_NEXT`), finishes
 * what it has taken, and detaches; or it dies. Requests wait meanwhile and do not time out.
 *
 * The description and `state_tag` are compared first, so that a successor which can't serve the
 * device does not get it. One file can wait; with `O_NONBLOCK`, the ioctl fails with
 * `EAGAIN` as long as it would have to wait, and nobody is told.
 */
#define MUSER_ATTACH_STANDBY (1u << 0)

/* `muser_attach.recovered`: the device was served before, so there is state to recover. */
#define MUSER_RECOVERED_SERVED (1u << 0)

/* `muser_attach.recovered`: a client has the device open. */
#define MUSER_RECOVERED_CLIENT (1u << 1)

/* `muser_attach.recovered`: requests wait, some of which were taken before. */
#define MUSER_RECOVERED_REPLAYS (1u << 2)

/* `muser_attach.recovered`: pages of the client are pinned. */
#define MUSER_RECOVERED_PINS (1u << 3)

/*
 * `muser_slot.kind`: read `count` bytes at `offset` of `region`; the reply carries them in the
 * slot's data.
 */
#define MUSER_REQUEST_READ 1u

/* `muser_slot.kind`: write the `count` bytes of the slot's data at `offset` of `region`. */
#define MUSER_REQUEST_WRITE 2u

/*
 * `muser_slot.kind`: reset the device to the state it has after power-on. A reset is taken when
 * every request before it has ended, and nothing behind it is taken until it has.
 */
#define MUSER_REQUEST_RESET 3u

/*
 * `muser_slot.kind`: the client unmaps `length` bytes of IOVA from `offset` on, some of which are
 * pinned. With the reply, or after the device's `unmap_timeout_ms`, the pages go.
 */
#define MUSER_REQUEST_UNMAP 4u

/*
 * `muser_slot.flags`: a process took this request before and went away without a reply. A request
 * that 64 processes in a row went away with fails with `EIO`.
 */
#define MUSER_REQUEST_REPLAY (1u << 0)

/* `muser_slot.flags`: a reset because the last client closed the device, so nobody waits for it. */
#define MUSER_REQUEST_CLOSE (1u << 1)

/*
 * `muser_next.flags`: `slot` holds a reply. Cleared in place as soon as the reply is accepted, so
 * that a call restarted after a signal does not send it twice.
 */
#define MUSER_NEXT_REPLY (1u << 0)

/* `muser_next.flags`: then wait for a request and take it. */
#define MUSER_NEXT_TAKE (1u << 1)

/* `muser_next.flags`: do not wait, as if the file had `O_NONBLOCK`. */
#define MUSER_NEXT_NONBLOCK (1u << 2)

/* `muser_trigger.flags`: lower the line of level-triggered vectors, instead of raising it. */
#define MUSER_TRIGGER_LOWER (1u << 0)

/* `muser_dma.flags`: to read from the client's memory. */
#define MUSER_DMA_READ (1u << 0)

/* `muser_dma.flags`: to write to the client's memory. */
#define MUSER_DMA_WRITE (1u << 1)

/* `muser_dma_copy.flags`: copy to the client's memory, instead of from it. */
#define MUSER_DMA_COPY_WRITE (1u << 0)

/* `muser_status.flags`, `muser_query.flags`: a client has the device open. */
#define MUSER_STATE_CLIENT (1u << 0)

/* `muser_query.flags`: a process is attached. */
#define MUSER_STATE_ATTACHED (1u << 1)

/* `muser_query.flags`: the device has a description. */
#define MUSER_STATE_DESCRIBED (1u << 2)

/*
 * `muser_status.flags`, `muser_query.flags`: a successor waits in standby for the attached process
 * to detach.
 */
#define MUSER_STATE_STANDBY (1u << 3)

/* Type byte of the ioctls. */
#define MUSER_IOCTL_TYPE 0xBDu

/* Offset at which an attached process maps its slots. */
#define MUSER_MMAP_SLOTS 0ull

/* Offset at which an attached process maps its device's state, `muser_attach.state_size` bytes. */
#define MUSER_MMAP_STATE (1ull << 38)

/* Offset at which `muser_status` is mapped, read-only. */
#define MUSER_MMAP_STATUS (1ull << 39)

/*
 * Offset at which offset 0 of region 0 is mapped; region `i` is `i << MUSER_MMAP_REGION_SHIFT`
 * further. Only areas can be mapped; of doorbells, the pages in which they lie.
 */
#define MUSER_MMAP_REGIONS (1ull << 40)

/* Regions lie `1 << MUSER_MMAP_REGION_SHIFT` bytes apart, here and in the VFIO device file. */
#define MUSER_MMAP_REGION_SHIFT 40u

/*
 * Offset at which IOVA 0 is mapped, of IOVAs below this: the window. It shows the pages that are
 * acquired. Where none is, reads give zeroes and writes are lost, until the page is acquired
 * (again); what the process has lost that way may be what it reads there.
 */
#define MUSER_MMAP_WINDOW (1ull << 62)

/* One region of a device: a BAR, config space, or a platform device's memory. */
struct muser_region {
    /*
     * Index, below `MUSER_MAX_REGIONS`; for PCI as `VFIO_PCI_*_REGION_INDEX` in `<linux/vfio.h>`.
     */
    __u32 index;
    /* `MUSER_REGION_*`; at least one of them. */
    __u32 flags;
    /* Bytes, from 1 to `MUSER_MAX_REGION_SIZE`. */
    __u64 size;
    /* How many of the areas, in the order given, belong to this region. */
    __u32 num_areas;
    /* Zero. */
    __u32 reserved;
};

/* Part of a region which does not behave like the rest. */
struct muser_area {
    /*
     * Offset in the region, not before the end of the area before it. A multiple of the page size;
     * of a doorbell, of 4.
     */
    __u64 offset;
    /* Bytes, a multiple of the same. */
    __u64 size;
    /* `MUSER_AREA_*`; exactly one of them. */
    __u32 flags;
    /* Zero. */
    __u32 reserved;
};

/* One interrupt index of a device. */
struct muser_irq {
    /* Index, below `MUSER_MAX_IRQ_INDEXES`; for PCI as `VFIO_PCI_*_IRQ_INDEX`. */
    __u32 index;
    /* `MUSER_IRQ_*`. */
    __u32 flags;
    /* Vectors, from 1 to `MUSER_MAX_IRQ_VECTORS`. */
    __u32 count;
    /* Zero. */
    __u32 reserved;
};

/* Argument of `MUSER_ATTACH`: makes the file the server of its device. */
struct muser_attach {
    /* Bytes of this struct. */
    __u32 size;
    /* In: the version the process was made for. Out: the version of the module. */
    __u32 version;
    /* `MUSER_ATTACH_*`. */
    __u32 flags;
    /* `MUSER_BUS_*`. */
    __u32 bus;
    /* Elements of `regions`. */
    __u32 num_regions;
    /* Elements of `areas`. */
    __u32 num_areas;
    /* Elements of `irqs`. */
    __u32 num_irqs;
    /* In: slots wanted, 0 for `MUSER_DEFAULT_SLOTS`. Out: slots there are. */
    __u32 slots;
    /* Address of an array of `muser_region`, with ascending indexes. */
    __u64 regions;
    /* Address of an array of `muser_area`: those of the first region, of the second, … */
    __u64 areas;
    /* Address of an array of `muser_irq`, with ascending indexes. */
    __u64 irqs;
    /* Out: bytes from one slot to the next. */
    __u32 slot_stride;
    /* Out: `MUSER_FAULT_*`, written also when the ioctl fails. */
    __u32 fault;
    /* Out: which element the fault is about. */
    __u32 fault_index;
    /* Out: `MUSER_RECOVERED_*`. */
    __u32 recovered;
    /*
     * In: bytes of state wanted, for `MUSER_MMAP_STATE`. Out: bytes there are: as many or, if an
     * earlier process wanted more, as it wanted. State outlives processes and clients, and starts as
     * zeroes; the kernel makes nothing of it.
     */
    __u32 state_size;
    /* Zero. */
    __u32 reserved;
    /*
     * What the process makes of the state, in a number of its own choice: of its layout, for
     * instance; 0 for no opinion. The device keeps the first one that is not 0, and refuses an
     * attachment with another one (`MUSER_FAULT_STATE_DIFFERS`); the kernel makes nothing of it.
     */
    __u64 state_tag;
};

/*
 * A request and its reply, at the head of a slot; `MUSER_SLOT_DATA` bytes of data follow.
 *
 * Slot `i` lies at `i * slot_stride` of the mapping at `MUSER_MMAP_SLOTS`. The module writes a
 * slot before it hands it out, and reads `id`, `result` and the data of a read when it is replied
 * to; it trusts nothing else in it.
 */
struct muser_slot {
    /* Number of the request, never used twice in the life of a device. */
    __u64 id;
    /* `MUSER_REQUEST_*`. */
    __u32 kind;
    /* `MUSER_REQUEST_REPLAY`, `MUSER_REQUEST_CLOSE`. */
    __u32 flags;
    /* Offset in the region; of an unmap, the IOVA. */
    __u64 offset;
    /* Region's index. */
    __u32 region;
    /* Bytes to read or write, from 1 to `MUSER_SLOT_DATA`. */
    __u32 count;
    /* Reply: 0, or a negated errno from -1 to -4095. */
    __s32 result;
    /* Zero; later versions poll it. */
    __u32 state;
    /* Of an unmap, bytes; else zero. */
    __u64 length;
    /* Zero. */
    __u64 reserved[2];
};

/*
 * Argument of `MUSER_NEXT`: replies to one request and takes the next in a single call.
 *
 * Any thread of the process may call it at any time.
 *
 * # Errors of a reply
 *
 * The request stays as it was, and nothing is taken.
 *
 * | errno       | meaning                                                                   |
 * |-------------|---------------------------------------------------------------------------|
 * | `ENOSPC`    | `slot` is not below the number of slots                                   |
 * | `ENOENT`    | no request with the id in the slot is known: it was never made, or ended  |
 * | `ENOMSG`    | the request exists, but nobody has taken it                               |
 * | `EPERM`     | another file took the request, and is attached together with this one (so |
 * |             | far one is at a time: a file that is not attached gets `ENOTCONN`)        |
 * | `EBADSLT`   | the request was taken by this file, in another slot                       |
 * | `ERANGE`    | `result` is neither 0 nor a negated errno                                 |
 * | `ECANCELED` | the client was killed while it waited; the request has ended all the same |
 *
 * # Errors of a take
 *
 * | errno       | meaning                                                                   |
 * |-------------|---------------------------------------------------------------------------|
 * | `EAGAIN`    | no request is there, or no slot is free, and the call may not wait        |
 * | `EINTR`     | a signal came (the call restarts by itself where the handler allows it)   |
 * | `ESHUTDOWN` | a successor waits in standby: finish what was taken, then detach          |
 */
struct muser_next {
    /* Bytes of this struct. */
    __u32 size;
    /* `MUSER_NEXT_*`; at least one of `REPLY` and `TAKE`. */
    __u32 flags;
    /* In: the slot replied to. Out: the slot taken. */
    __u32 slot;
    /* Zero. */
    __u32 reserved;
};

/*
 * Argument of `MUSER_TRIGGER`: fires up to 64 vectors of one interrupt index.
 *
 * A masked vector is remembered as pending and fires when it is unmasked. A vector of an index
 * with `MUSER_IRQ_AUTOMASKED` has a line which stays up until it is lowered: it fires, masks
 * itself, and fires again at each unmask as long as the line is up.
 *
 * # Errors
 *
 * `ENXIO`: no such interrupt index. `ENOSPC`: a vector beyond the index's count.
 * `EOPNOTSUPP`: `MUSER_TRIGGER_LOWER` for an index which is not level-triggered.
 */
struct muser_trigger {
    /* Bytes of this struct. */
    __u32 size;
    /* `MUSER_TRIGGER_*`. */
    __u32 flags;
    /* Interrupt index. */
    __u32 index;
    /* Vector that bit 0 of `vectors` stands for. */
    __u32 start;
    /* Bit i: vector `start + i`. */
    __u64 vectors;
    /* Out: the vectors whose eventfd was signalled; the others are masked or have none. */
    __u64 signalled;
};

/*
 * Argument of `MUSER_DOORBELL`: says which eventfd is signalled when a client rings.
 *
 * It fires at once, since a client may have rung while no process listened. An attachment that
 * ends takes its eventfds with it; the values stay.
 *
 * # Errors
 *
 * `ENXIO`: the area does not exist or is no doorbell. `EBADF`, `EINVAL`: `fd` is not an eventfd.
 */
struct muser_doorbell {
    /* Bytes of this struct. */
    __u32 size;
    /* Zero: no flags yet. */
    __u32 flags;
    /* Which of all areas, in the order of the description. */
    __u32 area;
    /* An eventfd, or -1 for none. */
    __s32 fd;
};

/*
 * Argument of `MUSER_DMA_ACQUIRE` and `MUSER_DMA_RELEASE`: pins the pages of a range of IOVA,
 * or unpins them.
 *
 * Acquired pages stay pinned, whoever serves the device, until they are released, the client unmaps
 * them, or it closes the device. What is pinned already costs nothing.
 *
 * # Errors
 *
 * Pages before the one that fails stay acquired, and `done` says how many bytes of the range they
 * are: it is written also then.
 *
 * | errno       | meaning                                                                   |
 * |-------------|---------------------------------------------------------------------------|
 * | `EINVAL`    | unknown flags, none for an acquire or any for a release, or `length` is 0 |
 * | `EOVERFLOW` | the range ends beyond 2^64                                                |
 * | `EFAULT`    | the client has not mapped it, is just unmapping it, or is not there; or   |
 * |             | it is not memory (another device's registers)                             |
 * | `EPERM`     | the client has mapped it for reading only                                 |
 * | `EDQUOT`    | it would exceed the device's `max_pinned`                                 |
 * | `ENOMEM`    | it would exceed what the client may pin (`RLIMIT_MEMLOCK`)                |
 * | `EINTR`     | a signal that kills came                                                  |
 */
struct muser_dma {
    /* Bytes of this struct. */
    __u32 size;
    /* `MUSER_DMA_READ`, `MUSER_DMA_WRITE`. */
    __u32 flags;
    /* First IOVA of the range. */
    __u64 iova;
    /* Bytes. */
    __u64 length;
    /* Out: of an acquire, bytes from `iova` on that are acquired; of a release, bytes unpinned. */
    __u64 done;
    /* Out: `muser_status.dma_generation` as long as none of the range has gone away again. */
    __u64 generation;
};

/* Part of a `muser_dma_copy`. */
struct muser_dma_segment {
    /* IOVA in the client's memory. */
    __u64 iova;
    /* Address in the caller's memory. */
    __u64 address;
    /* Bytes. */
    __u64 length;
};

/*
 * Argument of `MUSER_DMA_COPY`: copies between the client's memory and the caller's, segment by
 * segment. It acquires what is not acquired yet.
 *
 * # Errors
 *
 * As `muser_dma`, and `EFAULT` also for an `address` that leads nowhere. `done` says how many
 * bytes of the segments were copied: it is written also then. `E2BIG`: more than
 * `MUSER_MAX_SEGMENTS`.
 */
struct muser_dma_copy {
    /* Bytes of this struct. */
    __u32 size;
    /* `MUSER_DMA_COPY_WRITE`. */
    __u32 flags;
    /* Address of an array of `muser_dma_segment`. */
    __u64 segments;
    /* Its elements. */
    __u32 num_segments;
    /* Zero. */
    __u32 reserved;
    /* Out: bytes copied. */
    __u64 done;
};

/*
 * What the process can see of its device without a system call: one page, mapped read-only at
 * `MUSER_MMAP_STATUS`, written by the module.
 */
struct muser_status {
    /* `MUSER_STATE_CLIENT`, `MUSER_STATE_STANDBY`. */
    __u32 flags;
    /* Zero. */
    __u32 reserved;
    /* By interrupt index, the number of vectors that have an eventfd. */
    __u32 irq_enabled[MUSER_MAX_IRQ_INDEXES];
    /*
     * Grows whenever acquired pages go away. A range acquired at one generation can be used in the
     * window as long as it is the same.
     */
    __u64 dma_generation;
};

/* What a device has done, in `muser_query`. Counters start at 0 when the device is created. */
struct muser_counters {
    /* Reads answered by the process. */
    __u64 reads;
    /* Writes answered by the process. */
    __u64 writes;
    /* Resets answered by the process. */
    __u64 resets;
    /* Reads served in the kernel, from device memory. */
    __u64 memory_reads;
    /* Writes served in the kernel, to device memory. */
    __u64 memory_writes;
    /* Eventfds signalled. */
    __u64 interrupts;
    /* Requests that failed since no process was there in time. */
    __u64 timeouts;
    /* Requests put back because their process went away. */
    __u64 replays;
    /* Requests whose client was killed while it waited. */
    __u64 withdrawn;
    /* Attachments so far. */
    __u64 attachments;
    /* Writes to doorbells. */
    __u64 doorbells;
    /* Unmaps of ranges with pinned pages. */
    __u64 unmaps;
    /* Those of them that the process did not answer in time, or at all. */
    __u64 unmaps_forced;
    /* Pages pinned. */
    __u64 pins;
    /* Pages unpinned. */
    __u64 unpins;
};

/*
 * Argument of `MUSER_QUERY`, which any file of the node may call, attached or not.
 *
 * Each array is filled up to the number of elements given; the true number is returned.
 */
struct muser_query {
    /* Bytes of this struct. */
    __u32 size;
    /* Out: `MUSER_STATE_*`. */
    __u32 flags;
    /* Out: version of the module's ABI. */
    __u32 version;
    /* Out: `MUSER_BUS_*` of the device's type. */
    __u32 bus;
    /* In: room in `regions`. Out: regions of the device. */
    __u32 num_regions;
    /* In: room in `areas`. Out: areas of the device. */
    __u32 num_areas;
    /* In: room in `irqs`. Out: interrupt indexes of the device. */
    __u32 num_irqs;
    /* Out: process id of the attached process in the caller's namespace, or 0. */
    __u32 pid;
    /* Address of an array of `muser_region`. */
    __u64 regions;
    /* Address of an array of `muser_area`. */
    __u64 areas;
    /* Address of an array of `muser_irq_state`. */
    __u64 irqs;
    /* Out: requests waiting to be taken. */
    __u32 queued;
    /* Out: requests taken and not answered. */
    __u32 taken;
    /* Out: pages of device memory allocated, those of the state included. */
    __u64 memory_pages;
    /* Out: pages of the client's memory pinned. */
    __u64 pinned_pages;
    /* Out: bytes of state, see `MUSER_MMAP_STATE`. */
    __u32 state_size;
    /* Out: process id, as `pid`, of who waits in standby, or 0. */
    __u32 standby_pid;
    /* Out. */
    struct muser_counters counters;
};

/* An interrupt index and its present state, in `muser_query`. */
struct muser_irq_state {
    /* As described. */
    struct muser_irq irq;
    /* Vectors with an eventfd. */
    __u32 enabled;
    /* Vectors that are masked. */
    __u32 masked;
    /* Vectors that are pending, or whose line is up. */
    __u32 pending;
    /* Zero. */
    __u32 reserved;
};

/*
 * Makes the file the server of its device, and describes the device: `muser_attach`.
 *
 * `EBADF` if the file is not open for reading and writing; for other errors see `MUSER_FAULT_*`.
 */
#define MUSER_ATTACH _IO(MUSER_IOCTL_TYPE, 0)

/* Replies to a request and takes the next: `muser_next`. */
#define MUSER_NEXT _IO(MUSER_IOCTL_TYPE, 1)

/* Fires interrupts: `muser_trigger`. */
#define MUSER_TRIGGER _IO(MUSER_IOCTL_TYPE, 2)

/* Asks for the state of the device: `muser_query`. */
#define MUSER_QUERY _IO(MUSER_IOCTL_TYPE, 3)

/*
 * Ends the attachment of this file: what it took and did not answer goes back into the queue, and
 * its threads which wait in `MUSER_NEXT` get `ENOTCONN`. It takes no argument, and the file can't
 * attach again. Closing the file's last descriptor, with all mappings of it gone, does the same.
 */
#define MUSER_DETACH _IO(MUSER_IOCTL_TYPE, 4)

/* Pins a range of the client's memory: `muser_dma`. */
#define MUSER_DMA_ACQUIRE _IO(MUSER_IOCTL_TYPE, 5)

/* Unpins a range of the client's memory: `muser_dma`. */
#define MUSER_DMA_RELEASE _IO(MUSER_IOCTL_TYPE, 6)

/* Copies to or from the client's memory: `muser_dma_copy`. */
#define MUSER_DMA_COPY _IO(MUSER_IOCTL_TYPE, 7)

/* Joins a doorbell with an eventfd: `muser_doorbell`. */
#define MUSER_DOORBELL _IO(MUSER_IOCTL_TYPE, 8)

#endif /* _MUSER_H */
