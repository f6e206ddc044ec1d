// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, OnceLock};

use nix::sys::memfd::{memfd_create, MFdFlags};
use vm_memory::VolatileMemory;

use super::super::{BusMaster, Mastering};
use super::*;
use crate::sys::Mapping;
use crate::transport::dma::{DmaTable, Memory, RemoteMemory};

const PAGE: usize = 4096;

/// A client's table, a device's handle to it, and what lets it them.
struct Rig {
    table: Arc<DmaTable>,
    bus_master: Arc<BusMaster>,
    dma: Dma,
}

impl Rig {
    fn new() -> Self {
        let table = Arc::new(DmaTable::default());
        let bus_master = Arc::new(BusMaster::new(Mastering::Enabled));
        let dma = Dma::new(table.clone(), bus_master.clone());
        Self {
            table,
            bus_master,
            dma,
        }
    }

    fn map(&self, iova: u64, pages: usize, access: DmaAccess) -> Arc<Mapping> {
        let memory = memory(pages);
        let direct = Memory::Direct(memory.clone(), 0);
        let len = (pages * PAGE) as u64;
        self.table.map(iova, len, access, direct).unwrap();
        memory
    }

    fn unmap(&self, iova: u64, pages: usize) {
        let going = self.table.leave(iova, (pages * PAGE) as u64).unwrap();
        self.table.remove(&going);
    }
}

fn memory(pages: usize) -> Arc<Mapping> {
    let file = std::fs::File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len((pages * PAGE) as u64).unwrap();
    Arc::new(Mapping::new(file.as_fd(), 0, pages * PAGE, true).unwrap())
}

fn number<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    result.unwrap_err().errno().number()
}

/// Memory with the client, which remembers how often it was called.
#[derive(Debug, Default)]
struct Far {
    bytes: Mutex<Vec<u8>>,
    table: OnceLock<Arc<DmaTable>>,
}

impl RemoteMemory for Far {
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        to.copy_from_slice(&self.bytes.lock().unwrap()[start..start + to.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[start..start + from.len()].copy_from_slice(from);
        if let Some(table) = self.table.get() {
            // A client may do anything while it is called.
            table.clear();
        }
        Ok(())
    }
}

#[test]
fn write_is_seen_by_the_client_and_recorded() {
    let rig = Rig::new();
    let memory = rig.map(0x10_0000, 4, DmaAccess::ReadWrite);
    let range = rig.dma.map(0x10_0ffe, 4, DmaAccess::Write).unwrap();

    range.write(0, &[1, 2, 3, 4]).unwrap();

    assert_eq!(
        memory.slice().read_obj::<[u8; 4]>(0xffe).unwrap(),
        [1, 2, 3, 4]
    );
    assert_eq!(
        rig.table.dirty_pages(0..u64::MAX, true),
        [0x10_0000, 0x10_1000]
    );
    assert!(rig.table.dirty_pages(0..u64::MAX, true).is_empty());
}

#[test]
fn reads_leave_no_mark() {
    let rig = Rig::new();
    rig.map(0, 2, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 64, DmaAccess::ReadWrite).unwrap();

    range.read_obj::<u64>(8).unwrap();
    range.load::<u32>(0).unwrap();
    rig.dma.read(0x1000, &mut [0; 16]).unwrap();
    range
        .slices()
        .unwrap()
        .iter()
        .next()
        .unwrap()
        .volatile()
        .unwrap()
        .read_obj::<u8>(3)
        .unwrap();

    assert!(rig.table.dirty_pages(0..u64::MAX, false).is_empty());
}

#[test]
fn each_way_to_write_leaves_a_mark() {
    let ways: [fn(&Dma, &DmaRange); 8] = [
        |_, range| range.write(0, &[1]).unwrap(),
        |_, range| range.write_obj(0, 1_u64).unwrap(),
        |_, range| range.store(0, 1_u32).unwrap(),
        |dma, _| dma.write(0x1000, &[1]).unwrap(),
        |dma, _| dma.write_obj(0x1000, 1_u16).unwrap(),
        |dma, _| {
            dma.write_vectored(&[(0x1000, &[1]), (0x1004, &[])])
                .unwrap()
        },
        |dma, _| {
            let gathered = dma
                .gather(&[(0x1000, 4), (0x1004, 4)], DmaAccess::Write)
                .unwrap();
            gathered.write(3, &[1, 2]).unwrap();
        },
        |_, range| {
            let slices = range.slices().unwrap();
            let slice = slices.iter().next().unwrap().volatile().unwrap();
            slice.get_slice(4, 4).unwrap().copy_from(&[7_u16]);
        },
    ];
    for (number, way) in ways.into_iter().enumerate() {
        let rig = Rig::new();
        rig.map(0, 4, DmaAccess::ReadWrite);
        let range = rig.dma.map(0x1000, 64, DmaAccess::ReadWrite).unwrap();

        way(&rig.dma, &range);

        assert_eq!(
            rig.table.dirty_pages(0..u64::MAX, false),
            [0x1000],
            "way {number}"
        );
    }
}

#[test]
fn range_over_adjacent_mappings_is_one() {
    let rig = Rig::new();
    let first = rig.map(0, 1, DmaAccess::ReadWrite);
    let second = rig.map(0x1000, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0xff0, 32, DmaAccess::ReadWrite).unwrap();

    range.write_obj(12, 0x1122_3344_5566_7788_u64).unwrap();

    assert_eq!(first.slice().read_obj::<u32>(0xffc).unwrap(), 0x5566_7788);
    assert_eq!(second.slice().read_obj::<u32>(0).unwrap(), 0x1122_3344);
    assert_eq!(range.read_obj::<u64>(12).unwrap(), 0x1122_3344_5566_7788);
    let lens: Vec<_> = range
        .slices()
        .unwrap()
        .iter()
        .map(|slice| slice.len())
        .collect();
    assert_eq!(lens, [16, 16]);
}

#[test]
fn subrange_is_a_part_of_the_range() {
    let rig = Rig::new();
    rig.map(0x1000, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0x1000, 0x100, DmaAccess::ReadWrite).unwrap();

    let part = range.subrange(0x10..0x20).unwrap();
    part.write(0, &[9; 16]).unwrap();

    assert_eq!((part.iova(), part.len()), (0x1010, 16));
    assert_eq!(range.read_obj::<[u8; 3]>(0xf).unwrap(), [0, 9, 9]);
    assert_eq!(number(part.write(1, &[0; 16])), libc::EINVAL);
    assert_eq!(number(part.subrange(0..17)), libc::EINVAL);
    let (from, to) = (5, 4);
    assert_eq!(number(part.subrange(from..to)), libc::EINVAL);
    assert_eq!(part.subrange(16..16).unwrap().len(), 0);
}

#[test]
fn offset_beyond_the_range_is_refused() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();

    for offset in [9, 16, 17, usize::MAX, usize::MAX - 7] {
        assert_eq!(
            number(range.read_obj::<u64>(offset)),
            libc::EINVAL,
            "{offset}"
        );
        assert_eq!(
            number(range.write_obj(offset, 0_u64)),
            libc::EINVAL,
            "{offset}"
        );
        assert_eq!(number(range.load::<u64>(offset)), libc::EINVAL, "{offset}");
        assert_eq!(number(range.store(offset, 0_u64)), libc::EINVAL, "{offset}");
    }
}

#[test]
fn unaligned_atomic_access_is_refused() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(2, 64, DmaAccess::ReadWrite).unwrap();

    assert_eq!(number(range.load::<u32>(0)), libc::EINVAL);
    assert_eq!(number(range.store(4, 1_u32)), libc::EINVAL);
    assert!(range.load::<u32>(2).is_ok());
    assert!(range.load::<u16>(0).is_ok());
}

#[test]
fn hostile_addresses_are_errors() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let top = u64::MAX - 0xfff;
    rig.map(top, 1, DmaAccess::ReadWrite);
    for (iova, len, expected) in [
        (0x1000, 1, libc::EFAULT),
        (0xfff, 2, libc::EFAULT),
        (0, usize::MAX, libc::EFAULT),
        (1, usize::MAX, libc::EFAULT),
        (2, usize::MAX, libc::EOVERFLOW),
        (u64::MAX, 2, libc::EOVERFLOW),
        (top, 0x1001, libc::EOVERFLOW),
        (top - 1, 2, libc::EFAULT),
    ] {
        let mapped = rig.dma.map(iova, len, DmaAccess::ReadWrite);
        assert_eq!(number(mapped), expected, "{iova:#x} {len:#x}");
    }
    let range = rig.dma.map(top, 0x1000, DmaAccess::ReadWrite).unwrap();
    range.write(0xfff, &[5]).unwrap();
    assert_eq!(rig.dma.read_obj::<u8>(u64::MAX).unwrap(), 5);
    assert_eq!(number(rig.dma.read(u64::MAX, &mut [0; 2])), libc::EOVERFLOW);
    assert_eq!(number(rig.dma.write(u64::MAX, &[0; 2])), libc::EOVERFLOW);
    assert_eq!(number(rig.dma.release(u64::MAX, 2)), libc::EOVERFLOW);
    assert_eq!(rig.table.dirty_pages(top..u64::MAX, false), [top]);
}

#[test]
fn nothing_can_be_had_anywhere() {
    let rig = Rig::new();

    let range = rig.dma.map(u64::MAX, 0, DmaAccess::ReadWrite).unwrap();

    assert!(range.is_empty());
    range.read(0, &mut []).unwrap();
    range.write(0, &[]).unwrap();
    assert_eq!(range.slices().unwrap().iter().count(), 0);
    assert_eq!(number(range.read(0, &mut [0])), libc::EINVAL);
    rig.dma.read(0x1234, &mut []).unwrap();
    rig.dma.write(u64::MAX, &[]).unwrap();
    rig.dma.release(u64::MAX, 0).unwrap();
    assert!(rig.dma.gather(&[], DmaAccess::Read).unwrap().is_empty());
}

#[test]
fn memory_for_reading_only_is_not_written() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::Read);
    let range = rig.dma.map(0, 8, DmaAccess::Read).unwrap();

    assert_eq!(number(rig.dma.map(0, 8, DmaAccess::Write)), libc::EPERM);
    assert_eq!(number(rig.dma.map(0, 8, DmaAccess::ReadWrite)), libc::EPERM);
    assert_eq!(number(rig.dma.write(0, &[1])), libc::EPERM);
    assert_eq!(number(range.write(0, &[1])), libc::EPERM);
    assert_eq!(number(range.store(0, 1_u32)), libc::EPERM);
    let slices = range.slices().unwrap();
    let slice = slices.iter().next().unwrap();
    assert_eq!(number(slice.volatile().map(|_| ())), libc::EPERM);
    assert_eq!(number(slice.write(0, &[1])), libc::EPERM);
    slice.read(0, &mut [0; 8]).unwrap();
    assert_eq!(rig.dma.read_obj::<u64>(0).unwrap(), 0);
}

#[test]
fn range_for_writing_only_is_not_read() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::Write);
    let range = rig.dma.map(0, 8, DmaAccess::Write).unwrap();

    assert_eq!(number(range.read(0, &mut [0])), libc::EPERM);
    assert_eq!(number(range.load::<u32>(0)), libc::EPERM);
    assert_eq!(number(rig.dma.read(0, &mut [0])), libc::EPERM);
    range.store(0, 7_u32).unwrap();
}

#[test]
fn device_that_is_no_bus_master_is_refused() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 8, DmaAccess::ReadWrite).unwrap();
    let gathered = rig.dma.gather(&[(0, 8)], DmaAccess::Read).unwrap();

    rig.bus_master.set(Mastering::Disabled);

    let error = range.read(0, &mut [0]).unwrap_err();
    assert!(error.to_string().contains("Bus Master Enable"), "{error}");
    for result in [
        Err(error),
        range.write(0, &[0]),
        range.load::<u8>(0).map(drop),
        range.store(0, 0_u8),
        range.slices().map(drop),
        gathered.read(0, &mut [0]),
        gathered.slices().map(drop),
        rig.dma.read(0, &mut [0]),
        rig.dma.write(0, &[0]),
        rig.dma.map(0, 8, DmaAccess::Read).map(drop),
        rig.dma.gather(&[(0, 8)], DmaAccess::Read).map(drop),
    ] {
        assert_eq!(number(result), libc::EPERM);
    }
    rig.bus_master.set(Mastering::Enabled);
    range.read(0, &mut [0]).unwrap();
}

#[test]
fn unmapped_range_fails_until_something_is_there_again() {
    let rig = Rig::new();
    let old = rig.map(0x1000, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0x1000, 16, DmaAccess::ReadWrite).unwrap();
    range.write(0, &[1]).unwrap();

    rig.unmap(0x1000, 1);
    let gone = range.write(0, &[2]);
    let new = rig.map(0x1000, 1, DmaAccess::ReadWrite);
    range.write(0, &[3]).unwrap();

    assert_eq!(number(gone), libc::EFAULT);
    assert_eq!(old.slice().read_obj::<u8>(0).unwrap(), 1);
    assert_eq!(new.slice().read_obj::<u8>(0).unwrap(), 3);
    assert_eq!(range.load::<u8>(0).unwrap(), 3);
}

#[test]
fn range_mapped_again_for_reading_only_is_not_written() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();
    rig.unmap(0, 1);
    rig.map(0, 1, DmaAccess::Read);

    assert_eq!(number(range.write(0, &[1])), libc::EPERM);
}

#[test]
fn slices_reach_nothing_else_when_memory_goes() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();
    let slices = range.slices().unwrap();

    rig.unmap(0, 1);
    let new = rig.map(0, 1, DmaAccess::ReadWrite);
    slices
        .iter()
        .for_each(|slice| slice.write(0, &[0xff; 16]).unwrap());

    assert_eq!(new.slice().read_obj::<u128>(0).unwrap(), 0);
}

#[test]
fn unmap_elsewhere_leaves_a_range_usable() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    rig.map(0x10_0000, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();
    rig.dma.write(0x10_0000, &[1]).unwrap();

    rig.unmap(0x10_0000, 1);

    range.write(0, &[1]).unwrap();
    assert_eq!(range.read_obj::<u8>(0).unwrap(), 1);
}

#[test]
fn release_keeps_what_is_in_use() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();
    let is_used = || {
        let mapped = rig.table.leave(0, 0x1000).unwrap();
        mapped[0].is_used()
    };

    rig.dma.release(0, 0x1000).unwrap();

    assert!(is_used());
    drop(range);
    rig.dma.release(0, 0x1000).unwrap();
    assert!(!is_used());
}

#[test]
fn gathered_pieces_are_one_after_the_other() {
    let rig = Rig::new();
    rig.map(0, 4, DmaAccess::ReadWrite);
    let parts = [(0x100, 3), (0x9999, 0), (0x2ffe, 4), (0x10, 1)];
    let gathered = rig.dma.gather(&parts, DmaAccess::ReadWrite).unwrap();

    gathered.write(1, &[1, 2, 3, 4, 5, 6, 7]).unwrap();

    assert_eq!(gathered.len(), 8);
    assert_eq!(rig.dma.read_obj::<[u8; 4]>(0x100).unwrap(), [0, 1, 2, 0]);
    assert_eq!(
        rig.dma.read_obj::<[u8; 5]>(0x2ffe).unwrap(),
        [3, 4, 5, 6, 0]
    );
    assert_eq!(rig.dma.read_obj::<u8>(0x10).unwrap(), 7);
    assert_eq!(
        gathered.read_obj::<[u8; 8]>(0).unwrap(),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    assert_eq!(gathered.slices().unwrap().len(), 8);
    assert_eq!(number(gathered.read(1, &mut [0; 8])), libc::EINVAL);
    assert_eq!(number(gathered.write(usize::MAX, &[0; 2])), libc::EINVAL);
}

#[test]
fn pieces_that_add_up_to_too_much_are_refused() {
    let rig = Rig::new();
    rig.map(0, 1, DmaAccess::ReadWrite);
    let parts = [(0, 1), (0, usize::MAX)];

    let gathered = rig.dma.gather(&parts, DmaAccess::Read);

    assert_eq!(number(gathered), libc::EOVERFLOW);
}

#[test]
fn memory_with_the_client_is_copied() {
    let rig = Rig::new();
    let far = Arc::new(Far::default());
    far.bytes.lock().unwrap().resize(2 * PAGE, 0);
    let remote = Memory::Remote(far.clone(), PAGE as u64);
    rig.table
        .map(0x1000, PAGE as u64, DmaAccess::ReadWrite, remote)
        .unwrap();
    rig.map(0x2000, 1, DmaAccess::ReadWrite);
    let range = rig.dma.map(0x1ff8, 16, DmaAccess::ReadWrite).unwrap();

    range.write(0, &[7; 16]).unwrap();
    range.store(0, 0x0102_0304_u32).unwrap();

    assert!(!range.is_direct());
    assert_eq!(range.load::<u32>(0).unwrap(), 0x0102_0304);
    assert_eq!(
        far.bytes.lock().unwrap()[2 * PAGE - 8..],
        [4, 3, 2, 1, 7, 7, 7, 7]
    );
    assert_eq!(range.read_obj::<[u8; 12]>(4).unwrap(), [7; 12]);
    assert_eq!(number(range.slices()), libc::EOPNOTSUPP);
    assert_eq!(rig.table.dirty_pages(0..u64::MAX, false), [0x1000, 0x2000]);
}

#[test]
fn client_may_unmap_while_it_is_called() {
    let rig = Rig::new();
    let far = Arc::new(Far::default());
    far.bytes.lock().unwrap().resize(PAGE, 0);
    far.table.set(rig.table.clone()).unwrap();
    let remote = Memory::Remote(far.clone(), 0);
    rig.table
        .map(0, PAGE as u64, DmaAccess::ReadWrite, remote)
        .unwrap();

    rig.dma.write(0, &[1]).unwrap();

    assert_eq!(number(rig.dma.write(0, &[1])), libc::EFAULT);
}
