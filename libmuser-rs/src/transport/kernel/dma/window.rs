// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The window onto the client's memory, mapped where it is looked through.
//!
//! A guest says which IOVAs those are, and address space is not for it to use up. So chunks are
//! mapped as they are needed, large ones where they are to be had; there is a bound on what all of
//! them take, a smaller one in a process whose address space is limited; and chunks that nobody uses
//! make room for others. What can't be mapped can still be copied by the kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, RwLock};

use muser_uapi::MUSER_MMAP_WINDOW;
use vm_memory::VolatileSlice;

use crate::sys::{self, Mapping};
use crate::transport::dma::{DirtyLog, IovaRange};

/// Bytes of a chunk, in the order in which they are tried. Page tables are made for what is touched
/// only.
const SIZES: [u64; 4] = [1 << 36, 1 << 32, 1 << 28, 1 << 21];
/// Chunks at one time.
const MOST: usize = 128;
/// The part of a limited address space that may be taken.
const SHARE: u64 = 8;

/// A part of the window.
#[derive(Debug)]
pub(super) struct Chunk {
    /// The IOVA with which it starts.
    start: u64,
    mapping: Mapping,
}

impl Chunk {
    pub(super) fn slice(&self, bytes: Range<usize>) -> Option<VolatileSlice<'_, DirtyLog<'_>>> {
        // The kernel records what is written.
        self.mapping.slice_with(bytes, DirtyLog::ELSEWHERE)
    }

    fn end(&self) -> u64 {
        self.start + self.mapping.len() as u64
    }
}

/// The window of an attachment.
#[derive(Debug)]
pub(super) struct Window {
    node: Arc<File>,
    chunks: RwLock<Chunks>,
}

#[derive(Debug)]
struct Chunks {
    by_start: BTreeMap<u64, Arc<Chunk>>,
    /// Bytes that may still be mapped.
    budget: u64,
}

impl Window {
    pub(super) fn new(node: Arc<File>) -> Self {
        let most = SIZES[0] * MOST as u64;
        let budget = sys::address_space_limit().map_or(most, |limit| most.min(limit / SHARE));
        let chunks = Chunks {
            by_start: BTreeMap::new(),
            budget,
        };
        Self {
            node,
            chunks: RwLock::new(chunks),
        }
    }

    /// Goes through a range, chunk by chunk: which bytes of the chunk, and which of the range. `None`
    /// if some of it can't be mapped, or `visit` says so.
    pub(super) fn visit(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(&Arc<Chunk>, Range<usize>, Range<usize>) -> Option<()>,
    ) -> Option<()> {
        if range.last() >= MUSER_MMAP_WINDOW {
            return None;
        }
        let mut at = range.first();
        while at <= range.last() {
            let chunk = self.chunk(at)?;
            let end = chunk.end().min(range.last() + 1);
            let bytes = |from: u64| {
                Some(usize::try_from(at - from).ok()?..usize::try_from(end - from).ok()?)
            };
            visit(&chunk, bytes(chunk.start)?, bytes(range.first())?)?;
            at = end;
        }
        Some(())
    }

    /// The chunk in which an IOVA is.
    fn chunk(&self, iova: u64) -> Option<Arc<Chunk>> {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = chunks.find(iova) {
            return Some(chunk);
        }
        drop(chunks);
        let chunks = self.chunks.write();
        let mut chunks = chunks.unwrap_or_else(PoisonError::into_inner);
        // Somebody may have been faster.
        if let Some(chunk) = chunks.find(iova) {
            return Some(chunk);
        }
        let map = |place: &Range<u64>| {
            let len = usize::try_from(place.end - place.start).ok()?;
            let offset = MUSER_MMAP_WINDOW + place.start;
            Mapping::new(self.node.as_fd(), offset, len, true).ok()
        };
        if chunks.by_start.len() >= MOST {
            chunks.make_room();
        }
        chunks.add(iova, map).or_else(|| {
            chunks.make_room();
            chunks.add(iova, map)
        })
    }
}

impl Chunks {
    fn find(&self, iova: u64) -> Option<Arc<Chunk>> {
        let (_, chunk) = self.by_start.range(..=iova).next_back()?;
        (iova < chunk.end()).then(|| Arc::clone(chunk))
    }

    /// Maps the largest chunk around an IOVA that can be had.
    fn add(
        &mut self,
        iova: u64,
        map: impl Fn(&Range<u64>) -> Option<Mapping>,
    ) -> Option<Arc<Chunk>> {
        if self.by_start.len() >= MOST {
            return None;
        }
        let (place, mapping) = SIZES.iter().find_map(|size| {
            let place = self.place(iova, *size);
            if place.end - place.start > self.budget {
                return None;
            }
            let mapping = map(&place)?;
            Some((place, mapping))
        })?;
        self.budget -= place.end - place.start;
        let chunk = Arc::new(Chunk {
            start: place.start,
            mapping,
        });
        self.by_start.insert(place.start, Arc::clone(&chunk));
        Some(chunk)
    }

    /// The aligned place of that size in which an IOVA is, without what other chunks have of it.
    fn place(&self, iova: u64, size: u64) -> Range<u64> {
        let start = iova & !(size - 1);
        let before = self.by_start.range(..=iova).next_back();
        let after = self.by_start.range(iova..).next();
        let start = before.map_or(start, |(_, chunk)| start.max(chunk.end()));
        let end = (iova & !(size - 1)) + size;
        let end = after.map_or(end, |(next, _)| end.min(*next));
        start..end
    }

    /// Unmaps the chunks that nobody uses.
    fn make_room(&mut self) {
        let mut freed = 0;
        // Nobody can get hold of another while the lock is held for writing.
        self.by_start.retain(|_, chunk| {
            let used = Arc::strong_count(chunk) > 1;
            if !used {
                freed += chunk.mapping.len() as u64;
            }
            used
        });
        self.budget += freed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{memfd_create, MFdFlags};

    /// Maps a page, whatever is asked for: a chunk's place is what matters here.
    fn page() -> Mapping {
        let file = File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(1 << 21).unwrap();
        Mapping::new(file.as_fd(), 0, 1 << 21, true).unwrap()
    }

    fn chunks(budget: u64) -> Chunks {
        Chunks {
            by_start: BTreeMap::new(),
            budget,
        }
    }

    #[test]
    fn smaller_chunks_are_tried_when_large_ones_fail() {
        let mut chunks = chunks(u64::MAX);
        let small = |place: &Range<u64>| (place.end - place.start == 1 << 21).then(page);

        let chunk = chunks.add(0x12_3456_7890, small).unwrap();

        assert_eq!(chunk.start, 0x12_3440_0000);
        assert!(chunks.find(0x12_345f_ffff).is_some());
        assert!(chunks.find(0x12_3460_0000).is_none());
        assert!(chunks.find(0x12_33ff_ffff).is_none());
    }

    #[test]
    fn chunk_fills_the_gap_between_others() {
        let mut chunks = chunks(u64::MAX);
        let small = |place: &Range<u64>| (place.end - place.start == 1 << 21).then(page);
        chunks.add(0, small).unwrap();
        chunks.add(0x100_0000, small).unwrap();

        assert_eq!(chunks.place(0x40_0000, 1 << 36), 0x20_0000..0x100_0000);
        assert_eq!(chunks.place(0x120_0000, 1 << 28), 0x120_0000..0x1000_0000);
        assert_eq!(chunks.place(0x40_0000, 1 << 21), 0x40_0000..0x60_0000);
    }

    #[test]
    fn budget_is_kept_and_unused_chunks_make_room() {
        let mut chunks = chunks(1 << 22);
        let small = |place: &Range<u64>| (place.end - place.start == 1 << 21).then(page);
        let used = chunks.add(0, small).unwrap();
        chunks.add(1 << 40, small).unwrap();

        assert!(chunks.add(1 << 41, small).is_none());
        chunks.make_room();

        assert!(chunks.find(0).is_some());
        assert!(chunks.find(1 << 40).is_none());
        assert!(chunks.add(1 << 41, small).is_some());
        drop(used);
    }

    #[test]
    fn chunks_are_not_without_number() {
        let mut chunks = chunks(u64::MAX);
        let small = |place: &Range<u64>| (place.end - place.start == 1 << 21).then(page);
        for number in 0..MOST as u64 {
            chunks.add(number << 40, small).unwrap();
        }

        assert!(chunks.add(1 << 60, small).is_none());
    }

    #[test]
    fn iova_beyond_the_window_is_not_looked_at() {
        let window = Window::new(Arc::new(File::open("/dev/null").unwrap()));
        let visit = |first, last| {
            let range = IovaRange::between(first, last);
            window.visit(range, |_, _, _| Some(()))
        };

        assert_eq!(visit(MUSER_MMAP_WINDOW, MUSER_MMAP_WINDOW), None);
        assert_eq!(visit(MUSER_MMAP_WINDOW - 1, MUSER_MMAP_WINDOW), None);
        assert_eq!(visit(u64::MAX, u64::MAX), None);
        // And a file that is no node has no window.
        assert_eq!(visit(0, 0), None);
    }
}
