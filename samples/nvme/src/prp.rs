// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Physical region pages: where a command's data is, page by page (section 4.3).

use crate::spec::{Status, PAGE};

/// Pieces of the host's memory, each an address and a number of bytes.
pub(crate) type Pieces = Vec<(u64, usize)>;

/// Entries of a list that fills a page.
const ENTRIES: usize = PAGE / 8;

/// Reads the host's memory; `None` if it is not there.
pub(crate) type Read<'a> = dyn FnMut(u64, &mut [u8]) -> Option<()> + 'a;

/// Adds a piece, to the last one if it goes on there.
pub(crate) fn push(pieces: &mut Pieces, address: u64, len: usize) {
    if let Some((last, count)) = pieces.last_mut() {
        if last.checked_add(*count as u64) == Some(address) {
            *count += len;
            return;
        }
    }
    pieces.push((address, len));
}

/// The pieces of `len` bytes to which two entries point.
///
/// Lists can't go round for ever: each page of a list but the last has a page of data in all of its
/// entries but one, and there is an end to the data.
pub(crate) fn pieces(
    prp1: u64,
    prp2: u64,
    len: usize,
    read: &mut Read<'_>,
) -> Result<Pieces, Status> {
    let mut pieces = Vec::new();
    let offset = offset(prp1);
    // Bits 1 and 0 are reserved in any entry.
    if offset % 4 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let first = len.min(PAGE - offset);
    push(&mut pieces, prp1, first);
    let mut left = len - first;
    if left == 0 {
        return Ok(pieces);
    }
    if left <= PAGE {
        push(&mut pieces, whole(prp2)?, left);
        return Ok(pieces);
    }
    let mut list = prp2;
    let mut start = self::offset(list);
    if start % 8 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    while left > 0 {
        let count = left.div_ceil(PAGE).min(ENTRIES - start / 8);
        let mut bytes = [0; PAGE];
        let bytes = &mut bytes[..count * 8];
        read(list, bytes).ok_or(Status::DATA_TRANSFER_ERROR)?;
        let mut entries = bytes
            .chunks_exact(8)
            .map(|entry| entry.try_into().map_or(0, u64::from_le_bytes));
        let full = start / 8 + count == ENTRIES;
        let next = full && left > count * PAGE;
        for entry in entries.by_ref().take(count - usize::from(next)) {
            let part = left.min(PAGE);
            push(&mut pieces, whole(entry)?, part);
            left -= part;
        }
        if next {
            // The list's last entry says where it goes on.
            list = whole(entries.next().unwrap_or(0))?;
            start = 0;
        }
    }
    Ok(pieces)
}

fn offset(entry: u64) -> usize {
    let page = PAGE as u64;
    usize::try_from(entry % page).unwrap_or(0)
}

/// An entry that must point to the start of a page.
fn whole(entry: u64) -> Result<u64, Status> {
    match offset(entry) {
        0 => Ok(entry),
        _ => Err(Status::INVALID_PRP_OFFSET),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Lists, each at an address.
    struct Memory(BTreeMap<u64, Vec<u64>>);

    impl Memory {
        fn read(&self, address: u64, to: &mut [u8]) -> Option<()> {
            let (start, list) = self.0.range(..=address).next_back()?;
            let skip = usize::try_from((address - start) / 8).ok()?;
            let entries = list.get(skip..)?;
            for (place, entry) in to.chunks_exact_mut(8).zip(entries) {
                place.copy_from_slice(&entry.to_le_bytes());
            }
            (entries.len() * 8 >= to.len()).then_some(())
        }
    }

    fn walk(lists: &[(u64, Vec<u64>)], prp1: u64, prp2: u64, len: usize) -> Result<Pieces, Status> {
        let memory = Memory(lists.iter().cloned().collect());
        pieces(prp1, prp2, len, &mut |address, to| memory.read(address, to))
    }

    fn pages(from: u64, count: u64) -> Vec<u64> {
        (0..count).map(|page| from + 0x2000 * page).collect()
    }

    #[test]
    fn two_entries_are_two_pages_at_most() {
        assert_eq!(walk(&[], 0x1200, 0, 512).unwrap(), [(0x1200, 512)]);
        assert_eq!(
            walk(&[], 0x1e00, 0x9000, 4096).unwrap(),
            [(0x1e00, 512), (0x9000, 3584)]
        );
        // What goes on there is one piece.
        assert_eq!(walk(&[], 0x1e00, 0x2000, 4096).unwrap(), [(0x1e00, 4096)]);
    }

    #[test]
    fn list_is_followed_to_the_end_of_the_data() {
        let lists = [(0x8000, pages(0x10_0000, 4))];
        let found = walk(&lists, 0x1000, 0x8000, 4 * 4096 + 100).unwrap();

        assert_eq!(found.len(), 5);
        assert_eq!(found[4], (0x10_6000, 100));
    }

    #[test]
    fn list_at_the_end_of_its_page_goes_on_in_the_next() {
        let (mut first, second) = (pages(0x10_0000, 1), pages(0x20_0000, 4));
        first.push(0x9000);
        let lists = [(0x8ff0, first), (0x9000, second)];

        let found = walk(&lists, 0x1000, 0x8ff0, 5 * 4096).unwrap();

        let starts: Vec<_> = found.iter().map(|(start, _)| *start).collect();
        assert_eq!(starts, [0x1000, 0x10_0000, 0x20_0000, 0x20_2000, 0x20_4000]);
    }

    #[test]
    fn exact_end_of_a_list_is_data_and_no_link() {
        let lists = [(0x8ff0, pages(0x10_0000, 2))];

        assert_eq!(walk(&lists, 0x1000, 0x8ff0, 3 * 4096).unwrap().len(), 3);
    }

    #[test]
    fn list_that_links_to_itself_ends_with_the_data() {
        let mut list = pages(0x10_0000, 511);
        list.push(0x8000);
        let len = 1200 * 4096;

        let found = walk(&[(0x8000, list)], 0x1000, 0x8000, len).unwrap();

        assert_eq!(found.iter().map(|(_, len)| len).sum::<usize>(), len);
    }

    #[test]
    fn offsets_are_refused_where_pages_start() {
        let offset = Err(Status::INVALID_PRP_OFFSET);
        assert_eq!(walk(&[], 0x1001, 0, 512), offset);
        assert_eq!(walk(&[], 0x1000, 0x9200, 8192), offset);
        assert_eq!(walk(&[], 0x1000, 0x9004, 3 * 4096), offset);
        let lists = [(0x8000, vec![0x10_0000, 0x10_0010])];
        assert_eq!(walk(&lists, 0x1000, 0x8000, 3 * 4096), offset);
    }

    #[test]
    fn list_that_is_not_there_is_a_transfer_error() {
        let result = walk(&[], 0x1000, 0x8000, 3 * 4096);

        assert_eq!(result, Err(Status::DATA_TRANSFER_ERROR));
    }
}
