// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies to and from the client's memory, over each road and with each kind of memory.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::node::Server;
use muser_e2e::process;
use muser_e2e::rig::{pattern, Bare, DmaRig, Guest, BASE};
use muser_e2e::sys::{huge_pages_lacking, Mapping, Memory, Segment, HUGE_PAGE, PAGE};
use muser_e2e::vfio::{Client, Road, DMA_BOTH, DMA_READ};
use muser_uapi::*;

use super::topic;
use crate::runner::Test;

topic!("dma", dma: [
    client_maps_and_unmaps,
    copies_anonymous_memory,
    copies_shared_memory,
    copies_memfd,
    copies_private_file_mapping,
    several_segments_are_copied_in_order,
    segment_crosses_from_mapping_to_mapping,
    copy_stops_where_the_mapping_ends,
    copies_as_many_segments_as_allowed,
    read_only_mapping_is_read_and_not_written,
    copies_at_both_ends_of_64_bits,
    threads_copy_at_once,
    copy_pins_once,
    copy_with_no_client_fails,
]);

/// The tests that need huge pages.
pub(super) fn huge() -> Vec<Test> {
    let tests = super::dma_roads("dma::copies_huge_pages", copies_huge_pages);
    tests.map(|test| test.needs(huge_pages_lacking)).collect()
}

/// What the client's side of these tests is made of, with nothing of muser's in between.
fn client_maps_and_unmaps(road: Road) -> Result<()> {
    let Bare {
        server: _server,
        mdev,
    } = Bare::new()?;
    let client = Client::open(&mdev, road)?;
    let kinds = Memory::ALL.into_iter().filter(|&kind| kind != Memory::Huge);
    for (kind, iova) in kinds.zip((1u64..).map(|i| i << 24)) {
        let memory = works(&format!("making {kind}"), kind.map(4 * PAGE))?;
        let what = format!("mapping {kind}");
        works(&what, client.dma_map(&memory, iova, DMA_BOTH))?;
        let length = memory.len() as u64;
        let unmapped = works("unmapping", client.dma_unmap(iova, length))?;
        equal("bytes unmapped", unmapped, length)?;
        works(&what, client.dma_map(&memory, iova, DMA_BOTH))?;
        let unmapped = works("unmapping all", client.dma_unmap_all())?;
        equal("bytes unmapped of all", unmapped, length)?;
    }
    Ok(())
}

fn copies_anonymous_memory(road: Road) -> Result<()> {
    copies(road, Memory::Anonymous, 8)
}

fn copies_shared_memory(road: Road) -> Result<()> {
    copies(road, Memory::Shared, 8)
}

fn copies_memfd(road: Road) -> Result<()> {
    copies(road, Memory::Memfd, 8)
}

fn copies_private_file_mapping(road: Road) -> Result<()> {
    copies(road, Memory::File, 8)
}

fn copies_huge_pages(road: Road) -> Result<()> {
    copies(road, Memory::Huge, HUGE_PAGE / PAGE + 3)
}

/// Copies everything out, then an odd part in, and looks for it with the client's eyes.
fn copies(road: Road, kind: Memory, pages: usize) -> Result<()> {
    let rig = DmaRig::with(road, kind, pages)?;
    let memory = &rig.guest.memory;
    let mut all = vec![0; memory.len()];
    works("reading", rig.node().dma_read(BASE, &mut all))?;
    let word = pattern(Guest::SEED);
    for (offset, bytes) in (0..).step_by(8).zip(all.chunks_exact(8)) {
        ensure!(
            bytes == word(offset).to_ne_bytes(),
            "at {offset:#x} the process read {bytes:x?}"
        );
    }
    let (start, new) = (PAGE - 3, [0xD7; 2 * PAGE + 11]);
    works("writing", rig.node().dma_write(BASE + start as u64, &new))?;
    let end = start + new.len();
    let seen = memory.read_bytes(start, new.len());
    ensure!(seen == new, "the client does not see what was written");
    for at in (0..start).chain(end..memory.len()) {
        let expected = word(at / 8 * 8).to_ne_bytes()[at % 8];
        let found: u8 = memory.read(at);
        ensure!(
            found == expected,
            "the byte at {at:#x}, beside the copy, became {found:#x}"
        );
    }
    // What the client stores, the next copy has.
    memory.write(memory.len() - 8, 0x0102_0304_0506_0708_u64);
    let mut last = [0; 8];
    works(
        "reading the end",
        rig.node().dma_read(BASE + rig.guest.len() - 8, &mut last),
    )?;
    equal(
        "the client's last store",
        u64::from_ne_bytes(last),
        0x0102_0304_0506_0708,
    )
}

fn several_segments_are_copied_in_order(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 16)?;
    let other = Mapping::anonymous(4 * PAGE)?;
    other.fill(pattern(2));
    let far = BASE + (1 << 30);
    works("mapping", rig.guest.client.dma_map(&other, far, DMA_BOTH))?;
    let sources = [
        (BASE + 1, 1),
        (far + 4095, 2),
        (BASE + 4095, 4097),
        (far, 4 * PAGE),
        (BASE + 8, 4095),
        (BASE + 5 * 4096, 8193),
    ];
    let mut buffers: Vec<Vec<u8>> = sources.iter().map(|&(_, len)| vec![0; len]).collect();
    let segments: Vec<Segment<'_>> = sources
        .iter()
        .zip(&mut buffers)
        .map(|(&(iova, _), buffer)| Segment::buffer(iova, buffer))
        .collect();
    let (done, result) = rig.node().dma_copy(0, &segments);
    works("reading", result)?;
    let total: usize = sources.iter().map(|&(_, len)| len).sum();
    equal("bytes", done, total as u64)?;
    for (&(iova, len), buffer) in sources.iter().zip(&buffers) {
        let expected = if iova >= far {
            other.read_bytes((iova - far) as usize, len)
        } else {
            rig.guest.memory.read_bytes((iova - BASE) as usize, len)
        };
        ensure!(*buffer == expected, "{len} bytes at {iova:#x} differ");
    }
    // Of segments that overlap, the later is written later.
    let mut values = [[1u8; 8], [2; 8], [3; 8]];
    let [first, second, third] = &mut values;
    let writes = [
        Segment::buffer(BASE, first),
        Segment::buffer(BASE + 4, second),
        Segment::buffer(BASE + 6, third),
    ];
    works(
        "writing",
        rig.node().dma_copy(MUSER_DMA_COPY_WRITE, &writes).1,
    )?;
    equal(
        "what overlapping segments leave",
        rig.guest.memory.read_bytes(0, 14),
        vec![1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3],
    )
}

fn segment_crosses_from_mapping_to_mapping(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 3)?;
    let next = Memory::Memfd.map(3 * PAGE)?;
    next.fill(pattern(3));
    let border = BASE + rig.guest.len();
    works("mapping", rig.guest.client.dma_map(&next, border, DMA_BOTH))?;
    let mut buffer = vec![0; 2 * PAGE];
    works(
        "reading across",
        rig.node().dma_read(border - PAGE as u64, &mut buffer),
    )?;
    let mut expected = rig.guest.memory.read_bytes(2 * PAGE, PAGE);
    expected.extend(next.read_bytes(0, PAGE));
    ensure!(buffer == expected, "read across the border differs");
    works("writing across", rig.node().dma_write(border - 5, &[9; 10]))?;
    equal(
        "before",
        rig.guest.memory.read_bytes(3 * PAGE - 5, 5),
        vec![9; 5],
    )?;
    equal("behind", next.read_bytes(0, 6), vec![9, 9, 9, 9, 9, 0])
}

fn copy_stops_where_the_mapping_ends(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let mut whole = vec![0; 100];
    let mut beyond = vec![0xEE; 2 * PAGE];
    let segments = [
        Segment::buffer(BASE, &mut whole),
        Segment::buffer(BASE + 4096 + 96, &mut beyond),
        Segment::nowhere(BASE, 0, 8),
    ];
    let (done, result) = rig.node().dma_copy(0, &segments);
    fails("reading beyond the end", result, libc::EFAULT)?;
    equal("bytes read", done, 100 + 4000)?;
    let memory = &rig.guest.memory;
    equal("what was read", &whole[..], &memory.read_bytes(0, 100)[..])?;
    ensure!(
        beyond[..4000] == memory.read_bytes(4096 + 96, 4000)[..],
        "what was read of the second segment differs"
    );
    ensure!(
        beyond[4000..].iter().all(|&byte| byte == 0xEE),
        "bytes were written beyond what was read"
    );
    let before = rig.node().dma_read(BASE - 8, &mut [0; 16]);
    fails("reading from before the start", before, libc::EFAULT)?;
    let (done, result) = rig.node().dma_copy(
        MUSER_DMA_COPY_WRITE,
        &[Segment::buffer(BASE + 2 * 4096 - 4, &mut [7; 8])],
    );
    fails("writing beyond the end", result, libc::EFAULT)?;
    equal("bytes written", done, 4)?;
    equal(
        "the last bytes",
        memory.read_bytes(2 * PAGE - 4, 4),
        vec![7; 4],
    )
}

fn copies_as_many_segments_as_allowed(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 4)?;
    let count = MUSER_MAX_SEGMENTS as usize;
    let mut buffers: Vec<[u8; 8]> = vec![[0; 8]; count + 1];
    let segments: Vec<Segment<'_>> = buffers
        .iter_mut()
        .enumerate()
        .map(|(i, buffer)| Segment::buffer(BASE + 16 * i as u64 % 8192, buffer))
        .collect();
    let (_, result) = rig.node().dma_copy(0, &segments);
    fails("one segment too many", result, libc::E2BIG)?;
    let (done, result) = rig.node().dma_copy(0, &segments[..count]);
    works("as many as there may be", result)?;
    equal("bytes", done, count as u64 * 8)?;
    drop(segments);
    let word = pattern(Guest::SEED);
    for (i, buffer) in buffers[..count].iter().enumerate() {
        let expected = word(16 * i % 8192);
        equal("a segment", u64::from_ne_bytes(*buffer), expected)?;
    }
    equal("the segment that was too many", buffers[count], [0; 8])
}

fn read_only_mapping_is_read_and_not_written(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 2)?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    memory.fill(pattern(4));
    let iova = BASE + (1 << 24);
    works("mapping", rig.guest.client.dma_map(&memory, iova, DMA_READ))?;
    let mut buffer = [0; 16];
    works("reading", rig.node().dma_read(iova + 8, &mut buffer))?;
    equal("what was read", buffer.to_vec(), memory.read_bytes(8, 16))?;
    let write = || {
        rig.node().dma_copy(
            MUSER_DMA_COPY_WRITE,
            &[
                Segment::buffer(BASE, &mut [1; 16]),
                Segment::buffer(iova, &mut [1; 16]),
            ],
        )
    };
    let (done, result) = write();
    fails("writing", result, libc::EPERM)?;
    equal("bytes written before it", done, 16)?;
    // Also when it is pinned already, for reading.
    let (read, write_flag) = (MUSER_DMA_READ, MUSER_DMA_WRITE);
    works("acquiring", rig.node().dma_acquire(iova, 8192, read))?;
    fails("writing what is pinned", write().1, libc::EPERM)?;
    let acquire = rig.node().dma_acquire(iova, 8192, read | write_flag);
    fails("acquiring for writes", acquire, libc::EPERM)?;
    let acquire = rig.node().dma_acquire(iova, 8192, write_flag);
    fails("acquiring for writes alone", acquire, libc::EPERM)?;
    ensure!(memory.differs(pattern(4)).is_none(), "the memory changed");
    Ok(())
}

fn copies_at_both_ends_of_64_bits(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 1)?;
    let ends = [0, u64::MAX - 2 * 4096 + 1];
    let memory = [Mapping::anonymous(2 * PAGE)?, Mapping::anonymous(2 * PAGE)?];
    for (iova, memory) in ends.into_iter().zip(&memory) {
        memory.fill(pattern(iova));
        works("mapping", rig.guest.client.dma_map(memory, iova, DMA_BOTH))?;
        let mut all = vec![0; 2 * PAGE];
        works("reading", rig.node().dma_read(iova, &mut all))?;
        ensure!(all == memory.read_bytes(0, 2 * PAGE), "{iova:#x} differs");
        let last = iova + (2 * 4096 - 8);
        works("writing", rig.node().dma_write(last, &[5; 8]))?;
        equal(
            "the last bytes",
            memory.read_bytes(2 * PAGE - 8, 8),
            vec![5; 8],
        )?;
        let both = MUSER_DMA_READ | MUSER_DMA_WRITE;
        works("acquiring", rig.node().dma_acquire(iova, 8192, both))?;
    }
    let over = rig.node().dma_read(u64::MAX - 7, &mut [0; 9]);
    fails("reading over the end of 64 bits", over, libc::EOVERFLOW)?;
    for (iova, _) in ends.into_iter().zip(&memory) {
        let unmapped = rig.guest.client.dma_unmap(iova, 8192);
        equal("bytes unmapped", works("unmapping", unmapped)?, 8192)?;
        let gone = rig.node().dma_read(iova, &mut [0; 8]);
        fails("reading what was unmapped", gone, libc::EFAULT)?;
    }
    Ok(())
}

fn threads_copy_at_once(road: Road) -> Result<()> {
    const THREADS: usize = 8;
    const ROUNDS: u64 = 200;
    let rig = DmaRig::new(road, 2 * THREADS)?;
    let node = rig.node();
    process::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || -> Result<()> {
                    // Two pages of its own, from an odd offset on; the first word is everybody's.
                    let iova = BASE + (thread * 2 * PAGE) as u64 + 16;
                    for round in 0..ROUNDS {
                        let value = (round << 8 | thread as u64).to_ne_bytes();
                        let data = value.repeat(1000);
                        works("writing", node.dma_write(iova, &data))?;
                        let mut back = vec![0; data.len()];
                        works("reading", node.dma_read(iova, &mut back))?;
                        ensure!(back == data, "thread {thread} read another's bytes");
                        works("the shared word", node.dma_write(BASE, &value))?;
                        if round % 50 == thread as u64 {
                            works("releasing", node.dma_release(iova, 4096))?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    let counters = rig.node().query()?;
    equal(
        "pins without unpins",
        counters.counters.pins - counters.counters.unpins,
        counters.pinned_pages,
    )?;
    ensure!(
        counters.pinned_pages <= 2 * THREADS as u64,
        "{} pages are pinned",
        counters.pinned_pages
    );
    Ok(())
}

fn copy_pins_once(road: Road) -> Result<()> {
    let rig = DmaRig::new(road, 8)?;
    for round in 0..10 {
        works(
            "reading",
            rig.node().dma_read(BASE + 100, &mut [0; 2 * PAGE]),
        )?;
        let query = rig.node().query()?;
        let pins = (query.counters.pins, query.pinned_pages);
        equal(
            &format!("pins, and pages pinned, after copy {round}"),
            pins,
            (3, 3),
        )?;
    }
    Ok(())
}

fn copy_with_no_client_fails(road: Road) -> Result<()> {
    let Bare { server, mdev } = Bare::new()?;
    let both = MUSER_DMA_READ | MUSER_DMA_WRITE;
    let expect_nobody = |server: &Server| -> Result<()> {
        let node = server.node();
        fails("reading", node.dma_read(BASE, &mut [0; 8]), libc::EFAULT)?;
        fails("writing", node.dma_write(BASE, &[0; 8]), libc::EFAULT)?;
        fails(
            "acquiring",
            node.dma_acquire(BASE, 4096, both),
            libc::EFAULT,
        )?;
        equal(
            "bytes released",
            works("releasing", node.dma_release(BASE, 4096))?,
            0,
        )
    };
    expect_nobody(&server)?;
    let guest = Guest::open(&mdev, road, 2)?;
    works("reading", server.node().dma_read(BASE, &mut [0; 8]))?;
    drop(guest);
    expect_nobody(&server)?;
    equal("pages pinned", server.node().pinned()?, 0)?;
    // The next client's address space is another one.
    let reset = server.take()?;
    works("reply", server.reply(reset.slot, 0))?;
    let _client = Client::open(&mdev, road)?;
    expect_nobody(&server)
}
