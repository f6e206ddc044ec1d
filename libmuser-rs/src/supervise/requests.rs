// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client has asked for and was not answered: each with a number that is never used again,
//! and a place that no other has meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::error::Errno;
use crate::transport::RequestId;
use crate::vfio_user::wire::Header;

/// Places of requests; the others are for what the server does of its own accord.
#[expect(clippy::cast_possible_truncation, reason = "they are 512")]
pub(super) const PLACES: u16 = RequestId::PLACES as u16 / 2;
/// How many programs may die with a request before it is refused: it may be what ends them
/// (`MUSER_MAX_REPLAYS` of the module).
pub(super) const MOST_DEATHS: u32 = 64;
/// Bytes that a descriptor counts for: a process has far fewer of them than bytes.
const FD_COST: usize = 64 << 10;

/// Who hears of an end.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReplyTo {
    /// The client, for its command with this header.
    Client(Header),
    /// The command of several writes of which this is one.
    Several(u64),
    /// Nobody: no reply was wanted.
    Nobody,
}

/// What a client has asked for.
#[derive(Debug)]
pub(super) struct Request {
    /// The command's header as the program gets it, whose id is the place.
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) reply_to: ReplyTo,
    pub(super) since: Instant,
    /// Programs that had it and are gone.
    pub(super) deaths: u32,
    /// Whether the present program has it.
    pub(super) given: bool,
}

impl Request {
    fn cost(&self) -> usize {
        size_of::<Self>() + self.payload.len() + self.descriptors.len() * FD_COST
    }

    /// The name of the several writes of which it is one.
    fn several(&self) -> Option<u64> {
        match self.reply_to {
            ReplyTo::Several(name) => Some(name),
            _ => None,
        }
    }

    /// Whether a program has had it.
    pub(super) fn is_replay(&self) -> bool {
        self.deaths > 0
    }
}

/// A command of several writes, which programs get one by one: so each has a number of its own.
#[derive(Debug)]
struct Several {
    header: Header,
    left: u64,
    done: u64,
}

/// The requests of a session, in their order.
#[derive(Debug)]
pub(super) struct Requests {
    /// By number, so in the order in which they came.
    numbered: BTreeMap<u64, Request>,
    /// Those for which there was no place yet.
    parked: VecDeque<Request>,
    places: Vec<u16>,
    several: BTreeMap<u64, Several>,
    /// Names for commands of several writes.
    names: u64,
    cost: usize,
}

impl Requests {
    pub(super) fn new() -> Self {
        Self {
            numbered: BTreeMap::new(),
            parked: VecDeque::new(),
            places: (0..PLACES).rev().collect(),
            several: BTreeMap::new(),
            names: 0,
            cost: 0,
        }
    }

    /// Adds one behind all others; `sequence` counts the requests of a device's life.
    pub(super) fn add(&mut self, request: Request, sequence: &mut u64) {
        self.cost += request.cost();
        self.parked.push_back(request);
        self.place(sequence);
    }

    /// Adds a command of several writes, which are added one by one then.
    pub(super) fn add_several(&mut self, header: Header, count: u64) -> u64 {
        self.names += 1;
        let several = Several {
            header,
            left: count,
            done: 0,
        };
        self.several.insert(self.names, several);
        self.names
    }

    /// One of several writes has ended. If none is left, or it has failed, so that the others are not
    /// begun: their command, and how many were done; the error, if that was none.
    pub(super) fn end_one(
        &mut self,
        name: u64,
        result: Result<(), Errno>,
        sequence: &mut u64,
    ) -> Option<(Header, Result<u64, Errno>)> {
        let several = self.several.get_mut(&name)?;
        several.left = several.left.saturating_sub(1);
        if result.is_ok() {
            several.done += 1;
            if several.left > 0 {
                return None;
            }
        }
        let several = self.several.remove(&name)?;
        let cost = &mut self.cost;
        self.parked.retain(|request| {
            let stays = request.several() != Some(name);
            *cost -= if stays { 0 } else { request.cost() };
            stays
        });
        self.take_where(sequence, |request| request.several() == Some(name));
        let result = match result {
            Err(errno) if several.done == 0 => Err(errno),
            _ => Ok(several.done),
        };
        Some((several.header, result))
    }

    /// Gives places to those which wait for one.
    fn place(&mut self, sequence: &mut u64) {
        while !self.parked.is_empty() {
            let Some(place) = self.places.pop() else {
                return;
            };
            if let Some(mut request) = self.parked.pop_front() {
                *sequence += 1;
                request.header.id = place;
                self.numbered
                    .insert(*sequence << 16 | u64::from(place), request);
            }
        }
    }

    /// The first that the present program does not have. There is none while it has one of several
    /// writes: the one behind that is not begun if it fails.
    pub(super) fn next(&mut self) -> Option<(u64, &mut Request)> {
        let mut numbered = self.numbered.iter_mut();
        let next = numbered.find(|(_, request)| !request.given || request.several().is_some());
        let (number, request) = next.filter(|(_, request)| !request.given)?;
        Some((*number, request))
    }

    /// The command of one that the present program has.
    pub(super) fn command(&self, number: u64) -> Option<u16> {
        let request = self.numbered.get(&number)?;
        request.given.then_some(request.header.command)
    }

    /// Takes one out that the present program has and has answered.
    pub(super) fn answered(&mut self, number: u64, sequence: &mut u64) -> Option<Request> {
        self.numbered.get(&number).filter(|request| request.given)?;
        self.remove(number, sequence)
    }

    fn remove(&mut self, number: u64, sequence: &mut u64) -> Option<Request> {
        let request = self.numbered.remove(&number)?;
        self.cost -= request.cost();
        self.places.push(request.header.id);
        self.place(sequence);
        Some(request)
    }

    /// The program is gone: what it had is for the next one. What too many had is taken out.
    pub(super) fn put_back(&mut self, sequence: &mut u64) -> Vec<Request> {
        for request in self.numbered.values_mut().filter(|request| request.given) {
            request.given = false;
            request.deaths += 1;
        }
        let deadly = |request: &&Request| request.deaths >= MOST_DEATHS;
        self.take_where(sequence, |request| deadly(&request))
    }

    /// Takes those out that came before a moment.
    pub(super) fn expired(&mut self, before: Instant, sequence: &mut u64) -> Vec<Request> {
        let mut expired = self.take_where(sequence, |request| request.since < before);
        let parked = self.parked.iter();
        let count = parked.take_while(|request| request.since < before).count();
        for request in self.parked.drain(..count) {
            self.cost -= request.cost();
            expired.push(request);
        }
        expired
    }

    fn take_where(
        &mut self,
        sequence: &mut u64,
        wanted: impl Fn(&Request) -> bool,
    ) -> Vec<Request> {
        let numbers = self.numbered.iter();
        let numbers = numbers.filter(|(_, request)| wanted(request));
        let numbers: Vec<u64> = numbers.map(|(number, _)| *number).collect();
        let taken = numbers.into_iter();
        taken
            .filter_map(|number| self.remove(number, sequence))
            .collect()
    }

    /// When the one that waits for longest came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let numbered = self.numbered.values().next();
        numbered
            .or(self.parked.front())
            .map(|request| request.since)
    }

    /// Bytes that they take, roughly.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// How many a program had that is gone.
    pub(super) fn given_before(&self) -> usize {
        let numbered = self.numbered.values();
        numbered.filter(|request| request.is_replay()).count()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.numbered.len() + self.parked.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio_user::wire::Command;
    use std::time::Duration;

    fn request(since: Instant) -> Request {
        Request {
            header: Header::command(7, Command::RegionRead),
            payload: vec![0; 16],
            descriptors: Vec::new(),
            reply_to: ReplyTo::Nobody,
            since,
            deaths: 0,
            given: false,
        }
    }

    fn give_all(requests: &mut Requests) -> Vec<u64> {
        let mut given = Vec::new();
        while let Some((number, request)) = requests.next() {
            request.given = true;
            given.push(number);
        }
        given
    }

    #[test]
    fn places_of_requests_in_flight_differ_and_numbers_grow() {
        let (mut requests, mut sequence) = (Requests::new(), 0);
        for _ in 0..400 {
            requests.add(request(Instant::now()), &mut sequence);
        }

        let given = give_all(&mut requests);

        assert_eq!(given.len(), usize::from(PLACES));
        assert!(given.is_sorted());
        let mut places: Vec<_> = given.iter().map(|number| number & 0xffff).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), usize::from(PLACES));
        for number in given {
            assert!(requests.answered(number, &mut sequence).is_some());
        }
        assert_eq!(give_all(&mut requests).len(), 400 - usize::from(PLACES));
    }

    #[test]
    fn request_not_given_can_not_be_answered() {
        let (mut requests, mut sequence) = (Requests::new(), 0);
        requests.add(request(Instant::now()), &mut sequence);
        let number = requests.next().unwrap().0;

        assert!(requests.answered(number, &mut sequence).is_none());
        give_all(&mut requests);
        assert!(requests.answered(number ^ 1, &mut sequence).is_none());
        assert!(requests.answered(number, &mut sequence).is_some());
        assert!(requests.answered(number, &mut sequence).is_none());
        assert_eq!(requests.cost(), 0);
    }

    #[test]
    fn request_outlives_63_programs_and_keeps_its_number() {
        let (mut requests, mut sequence) = (Requests::new(), 0);
        requests.add(request(Instant::now()), &mut sequence);
        let first = give_all(&mut requests);

        for _ in 1..MOST_DEATHS {
            assert!(requests.put_back(&mut sequence).is_empty());
            assert!(requests.next().unwrap().1.is_replay());
            assert_eq!(give_all(&mut requests), first);
        }
        assert_eq!(requests.put_back(&mut sequence).len(), 1);
        assert_eq!(requests.len(), 0);
    }

    #[test]
    fn what_waited_too_long_is_taken_out() {
        let (mut requests, mut sequence) = (Requests::new(), 0);
        let now = Instant::now();
        requests.add(request(now), &mut sequence);
        requests.add(request(now + Duration::from_secs(2)), &mut sequence);

        let expired = requests.expired(now + Duration::from_secs(1), &mut sequence);

        assert_eq!((expired.len(), requests.len()), (1, 1));
        assert_eq!(requests.oldest(), Some(now + Duration::from_secs(2)));
    }

    fn several(requests: &mut Requests, count: u64, sequence: &mut u64) -> u64 {
        let name = requests.add_several(Header::default(), count);
        for _ in 0..count {
            let part = Request {
                reply_to: ReplyTo::Several(name),
                ..request(Instant::now())
            };
            requests.add(part, sequence);
        }
        name
    }

    #[test]
    fn several_writes_are_given_one_after_the_other() {
        let (mut requests, mut sequence) = (Requests::new(), 0);
        let name = several(&mut requests, 2, &mut sequence);
        requests.add(request(Instant::now()), &mut sequence);

        let first = give_all(&mut requests);
        assert_eq!(first.len(), 1);
        assert!(requests.answered(first[0], &mut sequence).is_some());
        assert!(requests.end_one(name, Ok(()), &mut sequence).is_none());
        let second = give_all(&mut requests);
        assert_eq!(second.len(), 1);
        assert!(requests.answered(second[0], &mut sequence).is_some());
        let (_, result) = requests.end_one(name, Ok(()), &mut sequence).unwrap();
        assert_eq!(result, Ok(2));
        assert_eq!(give_all(&mut requests).len(), 1);
    }

    #[test]
    fn several_writes_end_with_the_first_that_fails() {
        for (done, expected) in [(1, Ok(1)), (0, Err(Errno::EINVAL))] {
            let (mut requests, mut sequence) = (Requests::new(), 0);
            let name = several(&mut requests, 400, &mut sequence);
            requests.add(request(Instant::now()), &mut sequence);

            for at in 0..=done {
                let given = give_all(&mut requests);
                assert!(requests.answered(given[0], &mut sequence).is_some());
                let result = if at < done {
                    Ok(())
                } else {
                    Err(Errno::EINVAL)
                };
                let ended = requests.end_one(name, result, &mut sequence);
                assert_eq!(
                    ended.map(|(_, result)| result),
                    (at == done).then_some(expected)
                );
            }

            assert_eq!(requests.len(), 1);
            assert_eq!(give_all(&mut requests).len(), 1);
            assert!(requests.end_one(name, Ok(()), &mut sequence).is_none());
        }
    }
}
