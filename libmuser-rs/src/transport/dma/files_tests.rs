// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files of every kind that a client may hand over, right and wrong.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};

use super::*;
use crate::transport::dma::table::DmaTable;
use crate::transport::dma::{GuestMemory as _, IovaRange};
use DmaAccess::{Read, ReadWrite, Write};

const PAGE: u64 = 4096;

fn memfd(pages: u64) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("client", flags).unwrap());
    file.set_len(pages * PAGE).unwrap();
    file
}

fn copy(file: &File) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

fn refusal(file: impl Into<OwnedFd>, access: DmaAccess) -> Number {
    Memory::from_fd(&FileCache::default(), file.into(), 0, PAGE, access).unwrap_err()
}

fn open(path: &str, write: bool, flags: i32) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(flags);
    options.open(path).unwrap()
}

/// A table with one page of the file, at IOVA 0.
fn table(file: &File, offset: u64, access: DmaAccess) -> DmaTable {
    let table = DmaTable::default();
    let memory = Memory::from_fd(&FileCache::default(), copy(file), offset, PAGE, access);
    table.map(0, PAGE, access, memory.unwrap()).unwrap();
    table
}

fn is_mapped(memory: &Memory) -> bool {
    matches!(memory, Memory::Mapped(..))
}

#[test]
fn memfd_is_mapped_and_shared() {
    let file = memfd(3);
    let table = table(&file, PAGE, ReadWrite);
    file.write_all_at(b"client", PAGE + 8).unwrap();

    let mut seen = [0; 6];
    table.read(&mut [(8, &mut seen)]).unwrap();
    table.write(&[(0x100, b"device")]).unwrap();

    assert_eq!(&seen, b"client");
    file.read_exact_at(&mut seen, PAGE + 0x100).unwrap();
    assert_eq!(&seen, b"device");
    let range = IovaRange::new(0, PAGE).unwrap().unwrap();
    let acquired = table.acquire(range, ReadWrite).unwrap();
    assert_eq!(acquired.pieces.unwrap().len(), 1);
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    assert_eq!(refusal(reader, Read), Number::ENODEV);
    assert_eq!(refusal(writer, Write), Number::ENODEV);
    assert_eq!(refusal(socket, ReadWrite), Number::ENODEV);
    assert_eq!(refusal(event, ReadWrite), Number::ENODEV);
    assert_eq!(refusal(File::open("/").unwrap(), Read), Number::ENODEV);
    for device in ["/dev/zero", "/dev/null"] {
        assert_eq!(refusal(open(device, true, 0), ReadWrite), Number::ENODEV);
    }
}

#[test]
fn path_without_access_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();

    assert_eq!(
        refusal(open(path, false, libc::O_PATH), Read),
        Number::EBADF
    );
}

#[test]
fn file_open_for_less_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(PAGE).unwrap();
    let reading = File::open(file.path()).unwrap();
    let writing = OpenOptions::new().write(true).open(file.path()).unwrap();

    assert_eq!(refusal(copy(&reading), ReadWrite), Number::EACCES);
    assert_eq!(refusal(copy(&reading), Write), Number::EACCES);
    // Without reading there are no mappings.
    assert_eq!(refusal(copy(&writing), Write), Number::EACCES);
    let memory = Memory::from_fd(&FileCache::default(), copy(&reading), 0, PAGE, Read);
    assert!(is_mapped(&memory.unwrap()));
}

#[test]
fn file_sealed_against_writes_is_refused_for_them() {
    for seal in [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_FUTURE_WRITE] {
        let file = memfd(1);
        fcntl(&file, FcntlArg::F_ADD_SEALS(seal)).unwrap();

        assert_eq!(refusal(file, ReadWrite), Number::EPERM, "{seal:?}");
    }
}

#[test]
fn bytes_that_the_file_does_not_have_are_refused() {
    let file = memfd(2);
    let cache = FileCache::default();
    for (offset, len) in [
        (0, 0),
        (0, 3 * PAGE),
        (PAGE, 2 * PAGE),
        (2 * PAGE, PAGE),
        (PAGE + 1, PAGE),
        (u64::MAX - PAGE + 1, PAGE),
        (u64::MAX, u64::MAX),
        (1 << 63, PAGE),
    ] {
        let memory = Memory::from_fd(&cache, copy(&file), offset, len, Read);
        assert_eq!(memory.unwrap_err(), Number::EINVAL, "{offset:#x} {len:#x}");
    }
}

#[test]
fn odd_offset_is_as_good_as_another() {
    let file = memfd(2);
    file.write_all_at(b"odd", 101).unwrap();
    let table = table(&file, 100, Read);

    let mut seen = [0; 3];
    table.read(&mut [(1, &mut seen)]).unwrap();

    assert_eq!(&seen, b"odd");
}

#[test]
fn parts_of_one_file_share_descriptor_and_mapping() {
    let file = memfd(16);
    let cache = FileCache::default();
    let parts = (0..16)
        .map(|page| Memory::from_fd(&cache, copy(&file), page * PAGE, PAGE, ReadWrite).unwrap());
    let parts: Vec<_> = parts.collect();

    let starts = parts.iter().map(|part| match part {
        Memory::Mapped(mapping, _) => Arc::as_ptr(mapping),
        other => panic!("{other:?}"),
    });
    let starts: std::collections::BTreeSet<_> = starts.collect();
    assert_eq!(starts.len(), 1);
    assert_eq!(cache.files.lock().unwrap().by_id.len(), 1);
}

#[test]
fn reader_gets_no_part_of_a_writers_mapping() {
    let file = memfd(1);
    let cache = FileCache::default();
    let parts = [Read, ReadWrite]
        .map(|access| Memory::from_fd(&cache, copy(&file), 0, PAGE, access).unwrap());

    let [Memory::Mapped(reading, _), Memory::Mapped(writing, _)] = &parts else {
        panic!("{parts:?}");
    };
    assert!(!Arc::ptr_eq(reading, writing));
}

#[test]
fn part_that_came_with_growth_is_mapped() {
    let file = memfd(1);
    let cache = FileCache::default();
    let first = Memory::from_fd(&cache, copy(&file), 0, PAGE, ReadWrite).unwrap();
    file.set_len(2 * PAGE).unwrap();

    let second = Memory::from_fd(&cache, copy(&file), PAGE, PAGE, ReadWrite).unwrap();

    assert!(is_mapped(&first) && is_mapped(&second));
}

#[test]
fn file_too_large_to_be_mapped_whole_is_mapped_in_part() {
    let file = memfd(1);
    file.set_len(1 << 60).unwrap();
    file.write_all_at(b"far", 1 << 59).unwrap();
    let table = table(&file, 1 << 59, ReadWrite);

    let mut seen = [0; 3];
    table.read(&mut [(0, &mut seen)]).unwrap();

    assert_eq!(&seen, b"far");
}

#[test]
fn more_than_a_process_can_map_is_refused() {
    let file = memfd(1);
    file.set_len(1 << 60).unwrap();

    let memory = Memory::from_fd(&FileCache::default(), file.into(), 0, 1 << 47, ReadWrite);

    assert_eq!(memory.unwrap_err(), Number::ENOSPC);
}

#[test]
fn file_cut_short_reads_as_zeroes_until_it_is_mapped_again() {
    let file = memfd(2);
    let cache = FileCache::default();
    let table = DmaTable::default();
    let map = |iova| {
        let memory = Memory::from_fd(&cache, copy(&file), PAGE, PAGE, ReadWrite).unwrap();
        table.map(iova, PAGE, ReadWrite, memory).unwrap();
    };
    let read = |iova| {
        let mut seen = [0xee];
        table.read(&mut [(iova, &mut seen)]).unwrap();
        seen[0]
    };
    map(0);
    file.set_len(PAGE).unwrap();
    assert_eq!(read(0), 0);
    table.write(&[(0, &[0x33])]).unwrap();

    file.set_len(2 * PAGE).unwrap();
    file.write_all_at(&[0x44], PAGE).unwrap();
    map(PAGE);

    assert_eq!(read(PAGE), 0x44);
    let going = table.leave(0, PAGE).unwrap();
    table.remove(&going);
    assert_eq!(read(PAGE), 0x44);
}

#[test]
fn file_that_can_only_be_read_is_read() {
    // A file of a page in sysfs, which has no mappings.
    let path = "/sys/devices/system/cpu/possible";
    let file = File::open(path).unwrap();
    let expected = std::fs::read(path).unwrap();
    let memory = Memory::from_fd(&FileCache::default(), copy(&file), 0, PAGE, Read).unwrap();
    assert!(matches!(memory, Memory::File(..)), "{memory:?}");
    let table = DmaTable::default();
    table.map(0, PAGE, Read, memory).unwrap();

    let mut seen = vec![0; expected.len()];
    table.read(&mut [(0, &mut seen)]).unwrap();

    assert_eq!(seen, expected);
    let range = IovaRange::new(0, 1).unwrap().unwrap();
    assert!(table.acquire(range, Read).unwrap().pieces.is_none());
}

/// Memory of a file that is read and written, as of one that can't be mapped.
fn unmapped(file: &File) -> DmaTable {
    let table = DmaTable::default();
    let memory = Memory::unmapped(&FileCache::default(), copy(file), PAGE, ReadWrite).unwrap();
    table.map(0, PAGE, ReadWrite, memory).unwrap();
    table
}

#[test]
fn file_that_is_not_mapped_is_read_and_written() {
    let file = memfd(2);
    let table = unmapped(&file);

    table.write(&[(PAGE - 4, b"last")]).unwrap();

    let mut seen = [0; 4];
    table.read(&mut [(PAGE - 4, &mut seen)]).unwrap();
    assert_eq!(&seen, b"last");
    file.read_exact_at(&mut seen, 2 * PAGE - 4).unwrap();
    assert_eq!(&seen, b"last");
    assert_eq!(table.dirty_pages(0..PAGE, false), [0]);
}

#[test]
fn file_that_is_not_mapped_never_grows() {
    let file = memfd(2);
    let table = unmapped(&file);
    file.set_len(PAGE + 2).unwrap();

    let written = table.write(&[(0, b"more")]);
    let read = table.read(&mut [(0, &mut [0; 4])]);

    assert_eq!(written.unwrap_err().errno(), crate::Errno::EFAULT);
    assert_eq!(read.unwrap_err().errno(), crate::Errno::EFAULT);
    assert_eq!(file.metadata().unwrap().len(), PAGE + 2);
}

#[test]
#[ignore = "it needs two free huge pages of 2 MiB (/proc/sys/vm/nr_hugepages)"]
fn huge_pages_are_mapped_from_where_they_start() {
    const HUGE: u64 = 2 << 20;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create("huge", flags).unwrap());
    file.set_len(2 * HUGE).unwrap();
    // An offset inside of a huge page: the client's pages are small ones.
    let offset = HUGE + 3 * PAGE;
    let memory = Memory::from_fd(&FileCache::default(), copy(&file), offset, PAGE, ReadWrite);
    let table = DmaTable::default();
    table.map(0, PAGE, ReadWrite, memory.unwrap()).unwrap();

    table.write(&[(8, b"huge")]).unwrap();
    let mut seen = [0; 4];
    file.read_exact_at(&mut seen, offset + 8).unwrap();
    assert_eq!(&seen, b"huge");
    file.set_len(HUGE).unwrap();
    table.read(&mut [(8, &mut seen)]).unwrap();
    assert_eq!(seen, [0; 4]);
}

#[test]
fn files_out_of_use_are_forgotten() {
    let cache = FileCache::default();
    for _ in 0..200 {
        let file = memfd(1);
        drop(Memory::from_fd(&cache, file.into(), 0, PAGE, ReadWrite).unwrap());
    }

    assert!(cache.files.lock().unwrap().by_id.len() <= 2 * Files::FEW);
}

#[test]
fn sixty_five_thousand_parts_of_a_file_take_one_mapping() {
    let file = memfd(256);
    let cache = FileCache::default();
    let table = DmaTable::default();
    for number in 0..65_535 {
        let offset = number % 256 * PAGE;
        let memory = Memory::from_fd(&cache, copy(&file), offset, PAGE, ReadWrite).unwrap();
        table.map(number * PAGE, PAGE, ReadWrite, memory).unwrap();
    }

    (&file).write_all(&[0x5a]).unwrap();
    let mut seen = [0];
    table.read(&mut [(65_280 * PAGE, &mut seen)]).unwrap();

    assert_eq!(seen, [0x5a]);
    let more = Memory::from_fd(&cache, copy(&file), 0, PAGE, ReadWrite).unwrap();
    let full = table.map(1 << 40, PAGE, ReadWrite, more);
    assert_eq!(full, Err(Number::ENOSPC));
}
