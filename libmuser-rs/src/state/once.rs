// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of what was done already, so that a replay does not do it again.
//!
//! The first access of a request has its entry at the request's place in the queue, which no other
//! request has meanwhile. Further accesses of the same request have theirs in a second half, anywhere.
//! An entry is of no more use when its request has ended: when another request has its place, or
//! when this server does not [hold](Held) it. What an earlier server held and did not end is taken
//! as replays, before anything new.

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

    /// Names what follows from the access, and is a thing of its own.
    pub(crate) fn consequence(self) -> Self {
        // Above all that a region and an offset need.
        let at = self.at | 1 << 63;
        Self { at, ..self }
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

/// Requests that were taken and have not ended, by their place: what the table does not say.
#[derive(Debug)]
pub(super) struct Held {
    requests: Vec<RequestId>,
    /// Whether there may be replays which were not taken yet, and of which the table alone knows.
    replays: bool,
}

impl Held {
    /// None of them, at the start of a server; `replays` says whether there was an earlier one.
    pub(super) fn new(replays: bool) -> Self {
        Self {
            requests: vec![RequestId::NONE; PLACES],
            replays,
        }
    }

    pub(super) fn expects_replays(&self) -> bool {
        self.replays
    }

    pub(super) fn take(&mut self, request: RequestId, replay: bool) {
        if let Some(held) = self.requests.get_mut(request.place()) {
            *held = request;
        }
        // They come before everything new.
        self.replays &= replay;
    }

    pub(super) fn end(&mut self, request: RequestId) {
        let held = self.requests.get_mut(request.place());
        // Another one may have its place by now.
        if let Some(held) = held.filter(|held| **held == request) {
            *held = RequestId::NONE;
        }
    }

    fn contains(&self, request: RequestId) -> bool {
        self.replays || self.requests.get(request.place()) == Some(&request)
    }
}

/// Looks for a key.
pub(super) fn find(table: &[u8], held: &Held, key: Key) -> Found {
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
        let alive = || {
            let latest = request == entry(table, request.place()).0;
            latest && (request == key.request || held.contains(request))
        };
        if free.is_none() && (request == RequestId::NONE || !alive()) {
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

    fn put(table: &mut [u8], held: &Held, key: Key, result: u64) {
        let Found::Free(at) = find(table, held, key) else {
            panic!("no room");
        };
        table[at..at + ENTRY].copy_from_slice(&key.entry(result));
    }

    /// Requests that were taken here.
    fn holding(requests: &[RequestId]) -> Held {
        let mut held = Held::new(false);
        for request in requests {
            held.take(*request, false);
        }
        held
    }

    /// As many accesses of a request as there is room for.
    fn fill(table: &mut [u8], held: &Held, request: RequestId) {
        for offset in 0..=FURTHER as u64 {
            put(table, held, Key::new(request, 0, offset), offset);
        }
    }

    #[test]
    fn accesses_of_a_request_are_found_each() {
        let (mut table, held) = (vec![0; SIZE], holding(&[request(1, 7)]));
        let keys = [0, 8, 16].map(|offset| Key::new(request(1, 7), 2, offset));

        for (result, key) in (100..).zip(keys) {
            put(&mut table, &held, key, result);
        }

        for (result, key) in (100..).zip(keys) {
            assert_eq!(find(&table, &held, key), Found::Done(result));
        }
        let other = Key::new(request(1, 7), 3, 0);
        assert!(matches!(find(&table, &held, other), Found::Free(_)));
    }

    #[test]
    fn next_request_at_a_place_makes_room() {
        let (long, other, next) = (request(1, 0), request(2, 1), request(3, 0));
        let (mut table, mut held) = (vec![0; SIZE], holding(&[long, other]));
        fill(&mut table, &held, long);
        put(&mut table, &held, Key::new(other, 0, 0), 0);
        let more = Key::new(other, 0, 8);
        assert_eq!(find(&table, &held, more), Found::Full);

        held.take(next, false);
        put(&mut table, &held, Key::new(next, 0, 0), 0);
        // Its reply is told of after its place had another.
        held.end(long);

        assert!(matches!(find(&table, &held, more), Found::Free(_)));
        assert!(held.contains(next));
    }

    #[test]
    fn request_that_ended_makes_room() {
        let (long, other) = (request(1, 0), request(2, 1));
        let (mut table, mut held) = (vec![0; SIZE], holding(&[long, other]));
        fill(&mut table, &held, long);
        let first = Key::new(other, 0, 0);
        put(&mut table, &held, first, 0);

        held.end(long);

        put(&mut table, &held, Key::new(other, 0, 8), 5);
        assert_eq!(find(&table, &held, first), Found::Done(0));
    }

    #[test]
    fn replays_not_taken_yet_keep_their_entries() {
        let (long, other, new) = (request(1, 0), request(2, 1), request(3, 2));
        let mut table = vec![0; SIZE];
        fill(&mut table, &holding(&[long]), long);
        let mut held = Held::new(true);
        let more = |request| Key::new(request, 0, 0x1000);

        held.take(other, true);
        put(&mut table, &held, Key::new(other, 0, 0), 0);
        assert_eq!(find(&table, &held, more(other)), Found::Full);
        for offset in 0..=FURTHER as u64 {
            let key = Key::new(long, 0, offset);
            assert_eq!(find(&table, &held, key), Found::Done(offset));
        }

        // It did not come as a replay, so it had ended.
        held.take(new, false);
        assert!(matches!(find(&table, &held, more(other)), Found::Free(_)));
    }

    #[test]
    fn place_out_of_range_has_no_room() {
        let key = Key::new(request(1, 512), 0, 0);

        let found = find(&vec![0; SIZE], &Held::new(false), key);

        assert_eq!(found, Found::Full);
    }
}
