// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA that must be refused, or that at least must harm nobody: by a process that asks for nonsense
//! or gives bad addresses, and by a client that maps what is no memory or no longer there.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, errno_name, errno_of, fails, fails_as, works};
use muser_e2e::mdev::{Mdev, Type};
use muser_e2e::node::{Description, Node, Server, MEMORY};
use muser_e2e::process::{self, Process};
use muser_e2e::rig::{pattern, DmaRig, Guest, BASE};
use muser_e2e::sys::{self, memfd, Mapping, Segment, Unanswered, PAGE};
use muser_e2e::time;
use muser_e2e::vfio::{Client, Road, DMA_BOTH};
use muser_uapi::*;

use super::topic;

topic!("dma_bad", dma: [
    flags_and_lengths_refused,
    segments_out_of_bounds_refused,
    file_that_is_not_attached_refused,
    bad_addresses_of_the_process_refused,
    read_only_address_of_the_process_refused,
    copy_from_the_window_to_itself_ends,
    copy_to_the_window_of_another_device_ends,
    copy_that_waits_for_a_fault_delays_no_unmap,
    acquire_of_client_memory_that_waits_for_a_fault_can_be_killed,
    client_maps_its_own_registers,
    client_maps_memory_without_access,
    client_unmaps_memory_behind_the_device,
    client_truncates_the_file_behind_the_device,
    client_maps_a_window_of_another_device,
    client_maps_at_an_odd_address,
    client_protects_memory_after_the_acquire,
]);

const BOTH: u32 = MUSER_DMA_READ | MUSER_DMA_WRITE;

fn flags_and_lengths_refused(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let node = rig.node();
    let none = |what: &str, number, iova, length, flags, errno| -> Result<()> {
        let pinning = node.pinning(number, iova, length, flags);
        fails(
            &format!("{what}, of {length:#x} bytes at {iova:#x}"),
            pinning.result,
            errno,
        )?;
        equal("pages pinned", node.pinned()?, 0)
    };
    for flags in [0, 4, BOTH | 4, 1 << 31, u32::MAX] {
        none(
            "an acquire's flags",
            MUSER_DMA_ACQUIRE,
            BASE,
            4096,
            flags,
            libc::EINVAL,
        )?;
    }
    for flags in [1, 2, BOTH, 4, 1 << 31] {
        none(
            "a release's flags",
            MUSER_DMA_RELEASE,
            BASE,
            4096,
            flags,
            libc::EINVAL,
        )?;
    }
    for (number, flags) in [(MUSER_DMA_ACQUIRE, BOTH), (MUSER_DMA_RELEASE, 0)] {
        none("nothing", number, BASE, 0, flags, libc::EINVAL)?;
        for (iova, length) in [
            (u64::MAX, 2),
            (BASE, u64::MAX),
            (u64::MAX - 4095, 4097),
            (2, u64::MAX),
        ] {
            none("over the end", number, iova, length, flags, libc::EOVERFLOW)?;
        }
    }
    let last = node.pinning(MUSER_DMA_ACQUIRE, u64::MAX, 1, BOTH);
    fails("the last byte there is", last.result, libc::EFAULT)?;
    let everything = node.pinning(MUSER_DMA_ACQUIRE, 0, u64::MAX, BOTH);
    fails("everything", everything.result, libc::EFAULT)?;
    equal("of it", everything.done, 0)?;
    let rest = node.pinning(MUSER_DMA_ACQUIRE, BASE, u64::MAX - BASE, BOTH);
    fails("all from there on", rest.result, libc::EFAULT)?;
    equal("of it", rest.done, 4 * 4096)?;
    rig.guest.is_untouched()
}

fn segments_out_of_bounds_refused(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let node = rig.node();
    let mut buffer = [0xEE; 64];
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let (_, result) = node.dma_copy(flags, &[Segment::buffer(BASE, &mut buffer)]);
        fails(&format!("flags {flags:#x}"), result, libc::EINVAL)?;
    }
    let (done, result) = node.dma_copy(0, &[]);
    works("no segments", result)?;
    equal("bytes of none", done, 0)?;
    let over = Segment::nowhere(BASE, 1 << 63, u64::MAX);
    fails(
        "over the end of 64 bits",
        node.dma_copy(0, &[over]).1,
        libc::EOVERFLOW,
    )?;
    let over = Segment::nowhere(u64::MAX, 0, 2);
    fails(
        "a byte over the end",
        node.dma_copy(0, &[over]).1,
        libc::EOVERFLOW,
    )?;
    let mut copy = muser_dma_copy {
        size: size_of::<muser_dma_copy>() as u32,
        num_segments: 1,
        segments: u64::MAX - 7,
        ..Default::default()
    };
    let bytes = |copy: &muser_dma_copy| zerocopy::IntoBytes::as_bytes(copy).to_vec();
    let raw = sys::ioctl_bytes(node, MUSER_DMA_COPY, &mut bytes(&copy));
    fails("segments in the kernel's half", raw, libc::EFAULT)?;
    copy.segments = 0;
    let raw = sys::ioctl_bytes(node, MUSER_DMA_COPY, &mut bytes(&copy));
    fails("segments at 0", raw, libc::EFAULT)?;
    (copy.num_segments, copy.reserved) = (0, 1);
    let raw = sys::ioctl_bytes(node, MUSER_DMA_COPY, &mut bytes(&copy));
    fails("a reserved field", raw, libc::EINVAL)?;
    equal("the buffer", buffer, [0xEE; 64])?;
    equal("pages pinned", node.pinned()?, 0)?;
    rig.guest.is_untouched()
}

fn file_that_is_not_attached_refused(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let stranger = Node::open(&rig.mdev)?;
    let refused = [libc::ENOTCONN];
    fails_as(
        "acquiring",
        stranger.dma_acquire(BASE, 4096, BOTH),
        &refused,
    )?;
    works("acquiring", rig.node().dma_acquire(BASE, 4096, BOTH))?;
    fails_as("releasing", stranger.dma_release(BASE, 4096), &refused)?;
    fails_as("reading", stranger.dma_read(BASE, &mut [0; 8]), &refused)?;
    fails_as("writing", stranger.dma_write(BASE, &[0; 8]), &refused)?;
    equal("pages pinned", rig.node().pinned()?, 1)?;
    rig.guest.is_untouched()
}

fn bad_addresses_of_the_process_refused(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let node = rig.node();
    for flags in [0, MUSER_DMA_COPY_WRITE] {
        for address in [0, 1 << 63, u64::MAX - 4095, u64::MAX - 7] {
            let segment = Segment::nowhere(BASE, address, 8);
            let (done, result) = node.dma_copy(flags, &[segment]);
            fails(&format!("address {address:#x}"), result, libc::EFAULT)?;
            equal("bytes", done, 0)?;
        }
        // 100 bytes lie before the hole. How many of them arrive is not said, but not more.
        let memory = Mapping::with_hole(PAGE)?;
        memory.fill(pattern(Guest::SEED));
        let segment = Segment::mapped(BASE + 4096 - 100, &memory, PAGE - 100, 200);
        let (done, result) = node.dma_copy(flags, &[segment]);
        fails("into a hole", result, libc::EFAULT)?;
        ensure!(done <= 100, "{done} bytes of 100 were copied");
        // Pages of a file that ends before them.
        let file = memfd(PAGE)?;
        let memory = Mapping::shared(&file, 0, 2 * PAGE)?;
        let segment = Segment::mapped(BASE, &memory, PAGE, 8);
        let (done, result) = node.dma_copy(flags, &[segment]);
        fails("behind the end of a file", result, libc::EFAULT)?;
        equal("bytes", done, 0)?;
    }
    works("a good one after that", node.dma_read(BASE, &mut [0; 8]))
}

fn read_only_address_of_the_process_refused(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let memory = Mapping::anonymous(PAGE)?;
    memory.fill(pattern(3));
    works("mprotect", memory.protect(libc::PROT_READ))?;
    let segment = Segment::mapped(BASE, &memory, 0, 64);
    let (done, result) = rig.node().dma_copy(0, &[segment]);
    fails("reading into it", result, libc::EFAULT)?;
    equal("bytes", done, 0)?;
    ensure!(memory.differs(pattern(3)).is_none(), "it was written");
    let segment = Segment::mapped(BASE, &memory, 0, 64);
    let (_, result) = rig.node().dma_copy(MUSER_DMA_COPY_WRITE, &[segment]);
    works("writing from it", result)?;
    equal(
        "the client's word",
        rig.guest.memory.read::<u64>(8),
        pattern(3)(8),
    )
}

/// The process's end of a copy is the client's memory as well: the very page, or another one, which
/// the window shows already, or not yet, or which is not acquired.
fn copy_from_the_window_to_itself_ends(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    works("acquiring", rig.node().dma_acquire(BASE, 2 * 4096, BOTH))?;
    let window = rig.node().window(BASE, 4 * PAGE)?;
    process::scope(|scope| {
        let copies = scope.spawn(|| -> Result<()> {
            for flags in [0, MUSER_DMA_COPY_WRITE] {
                for page in 0..4 {
                    for target in 0..4 {
                        let iova = BASE + target * 4096;
                        let segment = Segment::mapped(iova, &window, page * PAGE, 4096);
                        match rig.node().dma_copy(flags, &[segment]).1 {
                            Ok(()) => (),
                            Err(error) => {
                                fails("the copy", Err::<(), _>(error), libc::EFAULT)?;
                            }
                        }
                    }
                }
            }
            Ok(())
        });
        time::until("the copies ending", || copies.is_finished())?;
        copies
            .join()
            .map_err(|_| anyhow::anyhow!("the copies panicked"))?
    })?;
    works("unmapping", rig.guest.client.dma_unmap_all())?;
    equal("pages pinned", rig.node().pinned()?, 0)
}

fn copy_to_the_window_of_another_device_ends(road: Road) -> Result<()> {
    let (first, second) = (DmaRig::new(road, 1)?, DmaRig::new(road, 1)?);
    second.guest.memory.fill(pattern(2));
    for rig in [&first, &second] {
        works("acquiring", rig.node().dma_acquire(BASE, 4096, BOTH))?;
    }
    let window = second.node().window(BASE, PAGE)?;
    // Crosswise, so that an order of locks between devices would show.
    let other = first.node().window(BASE, PAGE)?;
    for _ in 0..100 {
        for (rig, memory) in [(&first, &window), (&second, &other)] {
            let segment = Segment::mapped(BASE, memory, 0, 4096);
            if let Err(error) = rig.node().dma_copy(0, &[segment]).1 {
                fails("the copy", Err::<(), _>(error), libc::EFAULT)?;
            }
            // A page dropped and shown again is a fault of the next round.
            works("releasing", rig.node().dma_release(BASE, 4096))?;
            works("acquiring", rig.node().dma_acquire(BASE, 4096, BOTH))?;
        }
    }
    Ok(())
}

fn copy_that_waits_for_a_fault_delays_no_unmap(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let slow = works("userfaultfd", Unanswered::new(PAGE))?;
    let node = rig.node();
    process::scope(|scope| {
        let guest = &rig.guest;
        let copy = scope.spawn(|| {
            let segment = Segment::mapped(BASE, slow.memory(), 0, 64);
            node.dma_copy(0, &[segment])
        });
        let touched = works("poll", slow.wait_for_touch(time::patience()))?;
        ensure!(touched, "the copy did not touch the memory");
        let unmap = scope.spawn(|| guest.client.dma_unmap_all());
        time::until("the unmap returning", || unmap.is_finished())?;
        let unmapped = unmap
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        works("unmapping", unmapped)?;
        equal("pages pinned", node.pinned()?, 0)?;
        ensure!(!copy.is_finished(), "the copy did not wait for its fault");
        works("answering the fault", slow.answer())?;
        time::until("the copy returning", || copy.is_finished())?;
        let (_, result) = copy
            .join()
            .map_err(|_| anyhow::anyhow!("the copy panicked"))?;
        if let Err(error) = result {
            fails("the copy", Err::<(), _>(error), libc::EFAULT)?;
        }
        Ok(())
    })
}

fn acquire_of_client_memory_that_waits_for_a_fault_can_be_killed(road: Road) -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    drop(Server::attach(&mdev, &Description::pci())?);
    let slow = works("userfaultfd", Unanswered::new(4 * PAGE))?;
    let client = Client::open(&mdev, road)?;
    works("mapping", client.dma_map(slow.memory(), BASE, DMA_BOTH))?;
    let mut process = Process::helper(&["pin", mdev.uuid(), &BASE.to_string(), "4"])?;
    if road == Road::Group {
        // type1 pins without leave to wait for a fault.
        process.expect_containing("Bad address")?;
    } else {
        let touched = works("poll", slow.wait_for_touch(time::patience()))?;
        ensure!(touched, "the acquire did not touch the client's memory");
        process.kill()?;
    }
    let node = Node::open(&mdev)?;
    equal("pages pinned", node.pinned()?, 0)?;
    works("answering the fault", slow.answer())?;
    drop(client);
    Ok(())
}

/// Expects an acquire of what a client has mapped at [`BASE`] to be refused, or to be of real memory.
fn refused_or_real(rig: &DmaRig, length: u64) -> Result<()> {
    let before = rig.node().pinned()?;
    match rig.node().dma_acquire(BASE + (1 << 24), length, BOTH) {
        Ok(_) => {
            let window = rig.node().window(BASE + (1 << 24), length as usize)?;
            window.write(0, 1u64);
            works(
                "reading it",
                rig.node().dma_read(BASE + (1 << 24), &mut [0; 8]),
            )?;
        }
        Err(error) => {
            let errno = errno_of(&error);
            ensure!(errno == libc::EFAULT, "refused with {}", errno_name(errno));
            equal("pages pinned", rig.node().pinned()?, before)?;
        }
    }
    Ok(())
}

/// Maps at the address that [`refused_or_real`] looks at; what can't be mapped is refused already.
fn map_odd(rig: &DmaRig, memory: &Mapping) -> Result<bool> {
    match rig.guest.client.dma_map(memory, BASE + (1 << 24), DMA_BOTH) {
        Ok(()) => Ok(true),
        Err(error) => {
            let errno = errno_of(&error);
            let expected = [libc::EINVAL, libc::EFAULT, libc::EPERM];
            ensure!(expected.contains(&errno), "mapping: {}", errno_name(errno));
            Ok(false)
        }
    }
}

/// Whatever was mapped, it can be unmapped, and nothing stays.
fn nothing_stays(rig: &DmaRig) -> Result<()> {
    works("unmapping all", rig.guest.client.dma_unmap_all())?;
    equal("pages pinned", rig.node().pinned()?, 0)?;
    let query = rig.node().query()?;
    equal(
        "pins and unpins",
        query.counters.pins,
        query.counters.unpins,
    )
}

fn client_maps_its_own_registers(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let registers = works("the registers", rig.guest.client.map(MEMORY, 0, 4 * PAGE))?;
    registers.write(0, 5u64);
    if map_odd(&rig, &registers)? {
        refused_or_real(&rig, 4 * 4096)?;
    }
    nothing_stays(&rig)
}

fn client_maps_memory_without_access(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    works("mprotect", memory.protect(libc::PROT_NONE))?;
    if map_odd(&rig, &memory)? {
        let acquired = rig.node().dma_acquire(BASE + (1 << 24), 4096, BOTH);
        fails("acquiring", acquired, libc::EFAULT)?;
        let read = rig.node().dma_read(BASE + (1 << 24), &mut [0; 8]);
        fails("reading", read, libc::EFAULT)?;
    }
    nothing_stays(&rig)
}

fn client_unmaps_memory_behind_the_device(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    memory.fill(pattern(7));
    let iova = BASE + (1 << 24);
    works("mapping", rig.guest.client.dma_map(&memory, iova, DMA_BOTH))?;
    works("acquiring", rig.node().dma_acquire(iova, 4096, BOTH))?;
    works("munmap", memory.punch(0, 2 * PAGE))?;
    // The page that was pinned stays the device's; the next one was never there.
    let mut word = [0; 8];
    works(
        "reading what is pinned",
        rig.node().dma_read(iova + 8, &mut word),
    )?;
    equal("its word", u64::from_ne_bytes(word), pattern(7)(8))?;
    let gone = rig.node().dma_acquire(iova + 4096, 4096, BOTH);
    fails("acquiring what is gone", gone, libc::EFAULT)?;
    works(
        "the rest",
        rig.node().dma_acquire(iova + 2 * 4096, 8192, BOTH),
    )?;
    nothing_stays(&rig)
}

fn client_truncates_the_file_behind_the_device(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let file = memfd(4 * PAGE)?;
    let memory = Mapping::shared(&file, 0, 4 * PAGE)?;
    memory.fill(pattern(8));
    let iova = BASE + (1 << 24);
    works("mapping", rig.guest.client.dma_map(&memory, iova, DMA_BOTH))?;
    works("acquiring", rig.node().dma_acquire(iova, 4096, BOTH))?;
    let window = rig.node().window(iova, 4 * PAGE)?;
    equal("the window", window.read::<u64>(8), pattern(8)(8))?;
    works("ftruncate", sys::truncate(&file, 0))?;
    let _: u64 = window.read(8);
    window.write(16, 1u64);
    let gone = rig.node().dma_acquire(iova + 4096, 4096, BOTH);
    fails("acquiring behind the file's end", gone, libc::EFAULT)?;
    fails(
        "reading there",
        rig.node().dma_read(iova + 4096, &mut [0; 8]),
        libc::EFAULT,
    )?;
    equal("the window there", window.read::<u64>(PAGE), 0)?;
    nothing_stays(&rig)
}

fn client_maps_a_window_of_another_device(road: Road) -> Result<()> {
    let (rig, other) = (DmaRig::new(road, 2)?, DmaRig::new(road, 2)?);
    works("acquiring", other.node().dma_acquire(BASE, 4096, BOTH))?;
    let window = other.node().window(BASE, 2 * PAGE)?;
    // One page was shown, the other was not.
    equal(
        "the other's window",
        window.read::<u64>(8),
        pattern(Guest::SEED)(8),
    )?;
    if map_odd(&rig, &window)? {
        for page in 0..2 {
            let iova = BASE + (1 << 24) + page * 4096;
            fails(
                "acquiring",
                rig.node().dma_acquire(iova, 4096, BOTH),
                libc::EFAULT,
            )?;
            fails(
                "reading",
                rig.node().dma_read(iova, &mut [0; 8]),
                libc::EFAULT,
            )?;
        }
    }
    nothing_stays(&rig)?;
    // And its own device's.
    let own = rig.node().window(0, 2 * PAGE)?;
    if map_odd(&rig, &own)? {
        let iova = BASE + (1 << 24);
        fails(
            "acquiring",
            rig.node().dma_acquire(iova, 8192, BOTH),
            libc::EFAULT,
        )?;
    }
    nothing_stays(&rig)?;
    other.guest.is_untouched()
}

/// A page of IOVA that is no page of memory: the device would be shown the wrong half of it.
fn client_maps_at_an_odd_address(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    memory.fill(pattern(9));
    let iova = BASE + (1 << 24);
    let space = rig.guest.client.space();
    match space.map(&memory, 2048..2048 + 2 * PAGE, iova, DMA_BOTH) {
        Err(error) => fails("mapping", Err::<(), _>(error), libc::EINVAL)?,
        Ok(()) => {
            let mut word = [0; 8];
            match rig.node().dma_read(iova, &mut word) {
                Ok(()) => equal("what is there", u64::from_ne_bytes(word), pattern(9)(2048))?,
                Err(error) => fails("reading", Err::<(), _>(error), libc::EFAULT)?,
            }
        }
    }
    nothing_stays(&rig)
}

/// What is pinned stays, whatever its owner makes of its own access.
fn client_protects_memory_after_the_acquire(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    works("acquiring", rig.node().dma_acquire(BASE, 8192, BOTH))?;
    let window = rig.node().window(BASE, 2 * PAGE)?;
    works("mprotect", rig.guest.memory.protect(libc::PROT_NONE))?;
    equal("the window", window.read::<u64>(8), pattern(Guest::SEED)(8))?;
    window.write(PAGE, 9u64);
    works("copying", rig.node().dma_write(BASE, &[7; 8]))?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    works("mprotect", rig.guest.memory.protect(access))?;
    let memory = &rig.guest.memory;
    let words = (memory.read::<u64>(0), memory.read::<u64>(PAGE));
    equal("the client's words", words, (0x0707_0707_0707_0707, 9))?;
    nothing_stays(&rig)
}
