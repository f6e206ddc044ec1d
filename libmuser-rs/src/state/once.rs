// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of what was done already, so that a replay does not do it again.
//!
//! The first access of a request has its entry at the request's place in the queue, which no other
//! request has meanwhile. Further accesses of the same request have theirs in a second half, anywhere.
//! An entry is of no more use when its request has ended: when another request has its place, or
//! when its reply was accepted.

use crate::transport::RequestId;

/// Bytes of an entry: request, place of the access, result.
pub(super) const ENTRY: usize = 24;
const PLACES: usize = RequestId::PLACES;
/// Entries for accesses that are not the first of their request.
const FURTHER: usize = 512;
/// Bytes of the table.
pub(super) const SIZE: usize = (PLACES + FURTHER) * ENTRY;

/// Names what is to be done once: an access of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    request: RequestId,
    at: u64,
}

impl Key {
    /// `region` is an index of `<linux/vfio.h>`, and `offset` below 2^40, as in the ABI.
    pub(crate) fn new(request: RequestId, region: u32, offset: u64) -> Self {
        let at = u64::from(region) << 40 | offset;
        Self { request, at }
    }

    /// The entry that says it is done.
    pub(super) fn entry(self, result: u64) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        let words = [self.request.number(), self.at, result];
        for (bytes, word) in entry.chunks_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        entry
    }
}

/// Where a key is in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Done, with this result.
    Done(u64),
    /// Not there; this offset in the table is for it.
    Free(usize),
    /// Not there, and there is no room: too many accesses of too long requests.
    Full,
}

/// Requests that have ended, by their place: what the table does not say.
#[derive(Debug)]
pub(super) struct Endings(Vec<RequestId>);

impl Default for Endings {
    fn default() -> Self {
        Self(vec![RequestId::NONE; PLACES])
    }
}

impl Endings {
    pub(super) fn add(&mut self, request: RequestId) {
        if let Some(last) = self.0.get_mut(request.place()) {
            *last = request;
        }
    }

    fn contains(&self, request: RequestId) -> bool {
        self.0.get(request.place()) == Some(&request)
    }
}

/// Looks for a key.
pub(super) fn find(table: &[u8], endings: &Endings, key: Key) -> Found {
    let place = key.request.place();
    if place >= PLACES {
        return Found::Full;
    }
    let (first, at, result) = entry(table, place);
    if first != key.request {
        return Found::Free(place * ENTRY);
    }
    if at == key.at {
        return Found::Done(result);
    }
    let mut free = None;
    for number in PLACES..PLACES + FURTHER {
        let (request, at, result) = entry(table, number);
        if request == key.request && at == key.at {
            return Found::Done(result);
        }
        let ended = || request != entry(table, request.place()).0 || endings.contains(request);
        if free.is_none() && (request == RequestId::NONE || ended()) {
            free = Some(number * ENTRY);
        }
    }
    free.map_or(Found::Full, Found::Free)
}

fn entry(table: &[u8], number: usize) -> (RequestId, u64, u64) {
    let word = |index: usize| {
        let at = number * ENTRY + index * 8;
        let bytes = table.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    };
    (RequestId::new(word(0)), word(1), word(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(sequence: u64, place: u64) -> RequestId {
        RequestId::new(sequence << 16 | place)
    }

    fn put(table: &mut [u8], endings: &Endings, key: Key, result: u64) {
        let Found::Free(at) = find(table, endings, key) else {
            panic!("no room");
        };
        table[at..at + ENTRY].copy_from_slice(&key.entry(result));
    }

    #[test]
    fn accesses_of_a_request_are_found_each() {
        let (mut table, endings) = (vec![0; SIZE], Endings::default());
        let keys = [0, 8, 16].map(|offset| Key::new(request(1, 7), 2, offset));

        for (result, key) in (100..).zip(keys) {
            put(&mut table, &endings, key, result);
        }

        for (result, key) in (100..).zip(keys) {
            assert_eq!(find(&table, &endings, key), Found::Done(result));
        }
        let other = Key::new(request(1, 7), 3, 0);
        assert!(matches!(find(&table, &endings, other), Found::Free(_)));
    }

    #[test]
    fn next_request_at_a_place_makes_room() {
        let (mut table, endings) = (vec![0; SIZE], Endings::default());
        for offset in 0..=FURTHER as u64 {
            put(&mut table, &endings, Key::new(request(1, 0), 0, offset), 0);
        }
        let more = |sequence, place, offset| Key::new(request(sequence, place), 0, offset);
        put(&mut table, &endings, more(2, 1, 0), 0);
        assert_eq!(find(&table, &endings, more(2, 1, 8)), Found::Full);

        put(&mut table, &endings, more(3, 0, 0), 0);

        assert!(matches!(
            find(&table, &endings, more(2, 1, 8)),
            Found::Free(_)
        ));
    }

    #[test]
    fn request_that_ended_makes_room() {
        let (mut table, mut endings) = (vec![0; SIZE], Endings::default());
        for offset in 0..=FURTHER as u64 {
            put(&mut table, &endings, Key::new(request(1, 0), 0, offset), 0);
        }
        let first = Key::new(request(2, 1), 0, 0);
        put(&mut table, &endings, first, 0);

        endings.add(request(1, 0));

        put(&mut table, &endings, Key::new(request(2, 1), 0, 8), 5);
        assert_eq!(find(&table, &endings, first), Found::Done(0));
    }

    #[test]
    fn place_out_of_range_has_no_room() {
        let key = Key::new(request(1, 512), 0, 0);

        let found = find(&vec![0; SIZE], &Endings::default(), key);

        assert_eq!(found, Found::Full);
    }
}
