// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table against a model without an idea of order or of sharing: 32 pages, of which each knows
//! to what it belongs.

#![expect(
    clippy::cast_possible_truncation,
    reason = "pages here are few, and of the tests' own making"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Mutex;

use nix::sys::memfd::{memfd_create, MFdFlags};
use proptest::prelude::*;

use super::*;
use crate::transport::dma::FileCache;
use crate::Errno;

const PAGES: u64 = 32;

/// What a client and a device do, in pages.
#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, DmaAccess, Kind),
    /// An unmap begins.
    Leave(u64, u64),
    LeaveAll,
    /// All unmaps end that have begun.
    Remove,
    /// From some bytes into a page on, so many bytes.
    Read(u64, usize),
    Write(u64, usize, u8),
    Acquire(u64, u64, DmaAccess),
    Dirty(u64, u64, bool),
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Direct,
    Mapped,
    File,
    Remote,
}

/// Memory with the client, reached by calls.
#[derive(Debug)]
struct Far(Mutex<Vec<u8>>);

impl RemoteMemory for Far {
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        to.copy_from_slice(&self.0.lock().unwrap()[at..at + to.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        self.0.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }
}

fn access() -> impl Strategy<Value = DmaAccess> {
    use DmaAccess::{Read, ReadWrite, Write};
    prop_oneof![1 => Just(Read), 1 => Just(Write), 3 => Just(ReadWrite)]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few pages, so that much collides.
    let range = || (0..24_u64, 1..8_u64);
    let kind = prop_oneof![
        Just(Kind::Direct),
        Just(Kind::Mapped),
        Just(Kind::File),
        Just(Kind::Remote)
    ];
    let edge = prop_oneof![Just(0), Just(1), Just(PAGE - 1), 0..PAGE];
    let place = (0..24_u64, edge).prop_map(|(page, edge)| page * PAGE + edge);
    let len = prop_oneof![Just(1), Just(8), 1..3 * PAGE as usize];
    let step = prop_oneof![
        6 => (range(), access(), kind).prop_map(|((at, len), access, kind)| Step::Map(at, len, access, kind)),
        2 => range().prop_map(|(at, len)| Step::Leave(at, len)),
        1 => Just(Step::LeaveAll),
        2 => Just(Step::Remove),
        4 => (place.clone(), len.clone()).prop_map(|(at, len)| Step::Read(at, len)),
        5 => (place, len, any::<u8>()).prop_map(|(at, len, value)| Step::Write(at, len, value)),
        4 => (range(), access()).prop_map(|((at, len), access)| Step::Acquire(at, len, access)),
        2 => (range(), any::<bool>()).prop_map(|((at, len), clear)| Step::Dirty(at, len, clear)),
    ];
    prop::collection::vec(step, 1..80)
}

/// A page that is mapped.
#[derive(Clone, Debug)]
struct Page {
    /// Of its mapping: the first page, and how many.
    mapping: (u64, u64),
    access: DmaAccess,
    leaving: bool,
    copied_only: bool,
    used: bool,
    dirty: bool,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Model(BTreeMap<u64, Page>);

impl Model {
    fn map(&mut self, at: u64, len: u64, access: DmaAccess, kind: Kind) -> Result<(), Number> {
        if (at..at + len).any(|page| self.0.contains_key(&page)) {
            return Err(Number::EEXIST);
        }
        let page = Page {
            mapping: (at, len),
            access,
            leaving: false,
            copied_only: matches!(kind, Kind::File | Kind::Remote),
            used: false,
            dirty: false,
            bytes: vec![0; PAGE as usize],
        };
        self.0.extend((at..at + len).map(|at| (at, page.clone())));
        Ok(())
    }

    fn leave(&mut self, at: u64, len: u64) -> Result<(), Number> {
        let cut = |page: &Page| {
            let (first, pages) = page.mapping;
            first < at || first + pages > at + len
        };
        if self.0.range(at..at + len).any(|(_, page)| cut(page)) {
            return Err(Number::EINVAL);
        }
        let leaving = self.0.range_mut(at..at + len);
        leaving.for_each(|(_, page)| page.leaving = true);
        Ok(())
    }

    /// Tells how many pages went, and whether one of them was used.
    fn remove(&mut self) -> (u64, bool) {
        let before = self.0.len();
        let used = self.0.values().any(|page| page.leaving && page.used);
        self.0.retain(|_, page| !page.leaving);
        ((before - self.0.len()) as u64, used)
    }

    /// Whether a device may use these bytes. Of a mapping that it gets as far as, it has used some.
    fn check(&mut self, at: u64, len: u64, wanted: DmaAccess) -> Result<(), Errno> {
        for number in at / PAGE..=(at + len - 1) / PAGE {
            let page = self.0.get(&number).filter(|page| !page.leaving);
            let page = page.ok_or(Errno::EFAULT)?;
            if !page.access.allows(wanted) {
                return Err(Errno::EPERM);
            }
            let mapping = page.mapping;
            for page in self.0.values_mut().filter(|page| page.mapping == mapping) {
                page.used = true;
            }
        }
        Ok(())
    }

    fn byte(&mut self, at: u64) -> Option<&mut u8> {
        let page = self.0.get_mut(&(at / PAGE))?;
        page.bytes.get_mut((at % PAGE) as usize)
    }
}

fn memory(cache: &FileCache, len: u64, access: DmaAccess, kind: Kind) -> Memory {
    if let Kind::Remote = kind {
        return Memory::Remote(Arc::new(Far(Mutex::new(vec![0; len as usize]))), 0);
    }
    let file = File::from(memfd_create("model", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    match kind {
        Kind::Direct => {
            let mapping = Mapping::new(file.as_fd(), 0, len as usize, true).unwrap();
            Memory::Direct(Arc::new(mapping), 0)
        }
        Kind::File => Memory::unmapped(cache, file.into(), 0, access).unwrap(),
        _ => Memory::from_fd(cache, file.into(), 0, len, access).unwrap(),
    }
}

fn range(at: u64, len: u64) -> IovaRange {
    IovaRange::new(at, len).unwrap().unwrap()
}

proptest! {
    #[test]
    fn table_does_as_a_model_of_pages(steps in steps()) {
        let (table, cache) = (DmaTable::default(), FileCache::default());
        let mut model = Model::default();
        let mut going = Vec::new();
        for step in steps {
            match step {
                Step::Map(at, len, access, kind) => {
                    let memory = memory(&cache, len * PAGE, access, kind);
                    let mapped = table.map(at * PAGE, len * PAGE, access, memory);
                    prop_assert_eq!(mapped, model.map(at, len, access, kind));
                }
                Step::Leave(at, len) => {
                    let leaving = table.leave(at * PAGE, len * PAGE);
                    prop_assert_eq!(leaving.as_ref().map(|_| ()).map_err(|error| *error), model.leave(at, len));
                    going.extend(leaving.unwrap_or_default());
                }
                Step::LeaveAll => {
                    going.extend(table.leave_all());
                    prop_assert_eq!(model.leave(0, PAGES), Ok(()));
                }
                Step::Remove => {
                    let generation = table.generation();
                    // Some have been told to leave twice.
                    let bytes = table.remove(&going);
                    let (pages, used) = model.remove();
                    prop_assert_eq!(bytes, pages * PAGE);
                    prop_assert!(!used || table.generation() != generation);
                    going.clear();
                }
                Step::Read(at, len) => {
                    let mut seen = vec![0xee; len];
                    let read = table.read(&mut [(at, &mut seen)]).map_err(|error| error.errno());
                    prop_assert_eq!(read, model.check(at, len as u64, DmaAccess::Read));
                    if read.is_ok() {
                        let expected = (at..at + len as u64).map(|at| model.byte(at).copied().unwrap());
                        prop_assert_eq!(seen, expected.collect::<Vec<_>>());
                    } else {
                        prop_assert!(seen.iter().all(|byte| *byte == 0xee));
                    }
                }
                Step::Write(at, len, value) => {
                    let data = vec![value; len];
                    let written = table.write(&[(at, &data)]).map_err(|error| error.errno());
                    prop_assert_eq!(written, model.check(at, len as u64, DmaAccess::Write));
                    if written.is_ok() {
                        for at in at..at + len as u64 {
                            *model.byte(at).unwrap() = value;
                            model.0.get_mut(&(at / PAGE)).unwrap().dirty = true;
                        }
                    }
                }
                Step::Acquire(at, len, wanted) => {
                    let acquired = table.acquire(range(at * PAGE, len * PAGE), wanted);
                    let allowed = model.check(at * PAGE, len * PAGE, wanted);
                    prop_assert_eq!(acquired.as_ref().map(|_| ()).map_err(Error::errno), allowed);
                    if let Ok(acquired) = acquired {
                        let copied = model.0.range(at..at + len).any(|(_, page)| page.copied_only);
                        prop_assert_eq!(acquired.pieces.is_none(), copied);
                        let mut seen = Vec::new();
                        for piece in acquired.pieces.iter().flatten() {
                            let slice = piece.backing.slice(piece.bytes.clone()).unwrap();
                            let mut bytes = vec![0; slice.len()];
                            slice.copy_to(&mut bytes);
                            seen.extend(bytes);
                        }
                        let pages = model.0.range(at..at + len).filter(|_| !copied);
                        let expected = pages.flat_map(|(_, page)| page.bytes.iter().copied());
                        prop_assert!(seen.into_iter().eq(expected));
                    }
                }
                Step::Dirty(at, len, clear) => {
                    let dirty = table.dirty_pages(at * PAGE..(at + len) * PAGE, clear);
                    let mut expected = Vec::new();
                    for (at, page) in model.0.range_mut(at..at + len).filter(|(_, page)| page.dirty) {
                        expected.push(at * PAGE);
                        page.dirty = !clear;
                    }
                    prop_assert_eq!(dirty, expected);
                }
            }
        }
    }
}

/// Comparisons of two places that something takes.
fn comparisons(work: impl FnOnce()) -> usize {
    Start::comparisons().take();
    work();
    Start::comparisons().take()
}

#[test]
fn look_up_in_a_full_table_takes_few_comparisons() {
    // A tree of 65,535 is 7 levels high, has 11 keys in a node, and each end of a range is looked
    // for on its own. One after another would be 32,768.
    const FEW: usize = 4 * 7 * 11;
    let table = DmaTable::default();
    let remote: Arc<dyn RemoteMemory> = Arc::new(Far(Mutex::new(vec![0; PAGE as usize])));
    let mapped = |number: usize| {
        // Every second page, so that there is something to find and something not to.
        let iova = 2 * PAGE * number as u64;
        table.map(
            iova,
            PAGE,
            DmaAccess::ReadWrite,
            Memory::Remote(remote.clone(), 0),
        )
    };
    (0..MAX_MAPPINGS).for_each(|number| mapped(number).unwrap());
    let range = |number: usize| range(2 * PAGE * number as u64, PAGE);
    for number in [0, 1, 100, MAX_MAPPINGS / 2, MAX_MAPPINGS - 1] {
        let iova = range(number).first();
        let acquire = comparisons(|| drop(table.acquire(range(number), DmaAccess::Read)));
        let miss = comparisons(|| {
            let beside = IovaRange::new(iova + PAGE, PAGE).unwrap().unwrap();
            assert!(table.acquire(beside, DmaAccess::Read).is_err());
        });
        let copy = comparisons(|| table.read(&mut [(iova, &mut [0; 8])]).unwrap());
        let dirty = comparisons(|| drop(table.dirty_pages(iova..iova + PAGE, true)));
        let again = comparisons(|| assert_eq!(mapped(number), Err(Number::EEXIST)));
        let replace = comparisons(|| {
            table.remove(&table.leave(iova, PAGE).unwrap());
            mapped(number).unwrap();
        });
        for (what, count) in [
            ("acquire", acquire),
            ("miss", miss),
            ("copy", copy),
            ("dirty", dirty),
            ("map", again),
            ("unmap and map", replace / 3),
        ] {
            assert!(
                count > 0 && count <= FEW,
                "{what} of {number}: {count} comparisons"
            );
        }
    }
}
