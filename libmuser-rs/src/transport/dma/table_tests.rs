// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![expect(
    clippy::cast_possible_truncation,
    reason = "pages here are few, and of the tests' own making"
)]

use super::*;
use proptest::prelude::*;

/// Memory that remembers which mapping was reached, and where.
#[derive(Debug)]
struct Tag(u8);

impl RemoteMemory for Tag {
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        // The number of the mapping in the first byte of each page, of the page in the others.
        for (at, byte) in (offset..).zip(to) {
            *byte = if at % PAGE == 0 {
                self.0
            } else {
                u8::try_from(at / PAGE % 251).unwrap_or(0)
            };
        }
        Ok(())
    }

    fn write(&self, _offset: u64, _from: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

fn tag(number: u8) -> Memory {
    Memory::Remote(Arc::new(Tag(number)), 0)
}

fn unmap(table: &DmaTable, iova: u64, len: u64) -> Result<u64, Number> {
    Ok(table.remove(&table.leave(iova, len)?))
}

#[test]
fn odd_ranges_are_refused() {
    let table = DmaTable::default();
    for (iova, len, expected) in [
        (0, 0, Number::EINVAL),
        (1, PAGE, Number::EINVAL),
        (0, PAGE + 1, Number::EINVAL),
        (0_u64.wrapping_sub(PAGE), 2 * PAGE, Number::EOVERFLOW),
    ] {
        let mapped = table.map(iova, len, DmaAccess::Read, tag(0));
        assert_eq!(mapped, Err(expected), "map {iova:#x} {len:#x}");
        assert_eq!(
            unmap(&table, iova, len),
            Err(expected),
            "unmap {iova:#x} {len:#x}"
        );
    }
}

#[test]
fn last_page_of_all_can_be_mapped() {
    let table = DmaTable::default();
    let top = 0_u64.wrapping_sub(PAGE);

    table.map(top, PAGE, DmaAccess::Read, tag(0)).unwrap();

    let again = table.map(top, PAGE, DmaAccess::Read, tag(0));
    assert_eq!(again, Err(Number::EEXIST));
    assert_eq!(unmap(&table, top, PAGE), Ok(PAGE));
}

#[test]
fn more_than_a_process_can_address_is_refused() {
    let table = DmaTable::default();
    table.map(0, MAX_BYTES, DmaAccess::Read, tag(0)).unwrap();

    let more = table.map(MAX_BYTES, PAGE, DmaAccess::Read, tag(1));

    assert_eq!(more, Err(Number::ENOSPC));
    assert_eq!(unmap(&table, 0, MAX_BYTES), Ok(MAX_BYTES));
    assert_eq!(table.map(MAX_BYTES, PAGE, DmaAccess::Read, tag(1)), Ok(()));
}

#[test]
fn too_many_mappings_are_refused() {
    let table = DmaTable::default();
    for number in 0..MAX_MAPPINGS as u64 {
        table
            .map(number * PAGE, PAGE, DmaAccess::Read, tag(0))
            .unwrap();
    }

    let more = table.map(1 << 40, PAGE, DmaAccess::Read, tag(0));

    assert_eq!(more, Err(Number::ENOSPC));
    table.clear();
    assert_eq!(table.map(1 << 40, PAGE, DmaAccess::Read, tag(0)), Ok(()));
}

#[test]
fn mapping_that_is_leaving_can_not_be_acquired() {
    let table = DmaTable::default();
    table.map(0, PAGE, DmaAccess::Read, tag(0)).unwrap();
    let range = IovaRange::new(0, 1).unwrap().unwrap();
    table.acquire(range, DmaAccess::Read).unwrap();
    let generation = table.generation();

    let going = table.leave(0, PAGE).unwrap();
    let error = table.acquire(range, DmaAccess::Read).unwrap_err();

    assert_eq!(error.errno(), crate::Errno::EFAULT);
    assert_eq!(table.generation(), generation);
    table.remove(&going);
    assert_ne!(table.generation(), generation);
}

#[test]
fn unmap_of_what_was_not_used_outdates_nothing() {
    let table = DmaTable::default();
    table.map(0, PAGE, DmaAccess::Read, tag(0)).unwrap();
    let generation = table.generation();

    unmap(&table, 0, PAGE).unwrap();

    assert_eq!(table.generation(), generation);
}

/// A client who unmaps the second page while he is asked about the first.
#[derive(Debug)]
struct Sly(Arc<DmaTable>);

impl RemoteMemory for Sly {
    fn read(&self, _offset: u64, _to: &mut [u8]) -> io::Result<()> {
        unmap(&self.0, PAGE, PAGE)?;
        Ok(())
    }

    fn write(&self, _offset: u64, _from: &[u8]) -> io::Result<()> {
        unmap(&self.0, PAGE, PAGE)?;
        Ok(())
    }
}

#[test]
fn page_unmapped_while_the_one_before_is_asked_for_is_not_touched() {
    let file = nix::sys::memfd::memfd_create("second", nix::sys::memfd::MFdFlags::empty());
    let file = std::fs::File::from(file.unwrap());
    file.set_len(PAGE).unwrap();
    let second = Mapping::new(std::os::fd::AsFd::as_fd(&file), 0, PAGE as usize, true);
    let second = Arc::new(second.unwrap());
    let table = Arc::new(DmaTable::default());
    let map_second = || {
        let memory = Memory::Direct(Arc::clone(&second), 0);
        table.map(PAGE, PAGE, DmaAccess::ReadWrite, memory).unwrap();
    };
    let first = Memory::Remote(Arc::new(Sly(Arc::clone(&table))), 0);
    table.map(0, PAGE, DmaAccess::ReadWrite, first).unwrap();
    let mut data = vec![7; 2 * PAGE as usize];

    map_second();
    let written = table.write(&[(0, &data)]).unwrap_err();
    map_second();
    let read = table.read(&mut [(0, &mut data)]).unwrap_err();

    assert_eq!(written.errno(), crate::Errno::EFAULT);
    assert_eq!(read.errno(), crate::Errno::EFAULT);
    let mut seen = [1_u8];
    second.slice().subslice(0, 1).unwrap().copy_to(&mut seen);
    assert_eq!(seen, [0]);
    table.clear();
}

/// What a client and a device do, in pages.
#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, u8),
    Unmap(u64, u64),
    UnmapAll,
    Read(u64, u64),
    Release(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few pages, so that much collides.
    let range = || (0..24_u64, 1..8_u64);
    let step = prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, len), tag)| Step::Map(at, len, tag)),
        3 => range().prop_map(|(at, len)| Step::Unmap(at, len)),
        1 => Just(Step::UnmapAll),
        6 => range().prop_map(|(at, len)| Step::Read(at, len)),
        1 => range().prop_map(|(at, len)| Step::Release(at, len)),
    ];
    prop::collection::vec(step, 1..60)
}

/// The same by the page, without an idea of order: for each page, the mapping's first page, its
/// pages, its tag.
#[derive(Debug, Default)]
struct Model {
    pages: [Option<(u64, u64, u8)>; 32],
}

impl Model {
    fn map(&mut self, at: u64, len: u64, tag: u8) -> Result<(), Number> {
        let span = at as usize..(at + len) as usize;
        if self.pages[span.clone()].iter().any(Option::is_some) {
            return Err(Number::EEXIST);
        }
        self.pages[span].fill(Some((at, len, tag)));
        Ok(())
    }

    fn unmap(&mut self, at: u64, len: u64) -> Result<u64, Number> {
        let span = at as usize..(at + len) as usize;
        for page in self.pages[span.clone()].iter().flatten() {
            if page.0 < at || page.0 + page.1 > at + len {
                return Err(Number::EINVAL);
            }
        }
        let count = self.pages[span.clone()].iter().flatten().count() as u64;
        self.pages[span].fill(None);
        Ok(count * PAGE)
    }

    fn read(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let bytes = (at..at + len).map(|page| {
            let (start, _, tag) = self.pages[page as usize]?;
            Some([tag, (page - start) as u8])
        });
        let bytes: Option<Vec<_>> = bytes.collect();
        bytes.map(|bytes| bytes.concat())
    }
}

proptest! {
    #[test]
    fn table_does_as_the_model(steps in steps()) {
        let table = DmaTable::default();
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Map(at, len, number) => {
                    let mapped = table.map(at * PAGE, len * PAGE, DmaAccess::Read, tag(number));
                    prop_assert_eq!(mapped, model.map(at, len, number));
                }
                Step::Unmap(at, len) => {
                    let unmapped = unmap(&table, at * PAGE, len * PAGE);
                    prop_assert_eq!(unmapped, model.unmap(at, len));
                }
                Step::UnmapAll => {
                    let unmapped = table.remove(&table.leave_all());
                    prop_assert_eq!(Ok(unmapped), model.unmap(0, 32));
                }
                Step::Read(at, len) => {
                    let mut data = vec![0; (len * PAGE) as usize];
                    let read = table.read(&mut [(at * PAGE, &mut data)]);
                    let seen = read.ok().map(|()| {
                        let pages = data.chunks(PAGE as usize);
                        pages.flat_map(|page| [page[0], page[1]]).collect()
                    });
                    prop_assert_eq!(&seen, &model.read(at, len));
                    let range = IovaRange::new(at * PAGE, len * PAGE).unwrap().unwrap();
                    let write = table.acquire(range, DmaAccess::Write).map(drop);
                    let expected = if model.pages[at as usize].is_none() {
                        crate::Errno::EFAULT
                    } else {
                        crate::Errno::EPERM
                    };
                    prop_assert_eq!(write.unwrap_err().errno(), expected);
                }
                Step::Release(at, len) => {
                    let range = IovaRange::new(at * PAGE, len * PAGE).unwrap().unwrap();
                    table.release(range).unwrap();
                }
            }
        }
    }
}
