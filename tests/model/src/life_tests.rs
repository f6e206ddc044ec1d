// SPDX-License-Identifier: GPL-2.0
//! The whole life of requests: every state that a few clients and processes can bring a queue into.
//!
//! A world is the queue, and beside it what is known of each request without asking the queue. A
//! search goes from the empty world by every event that can happen in it to every world within
//! reach, until there is none that it has not seen. What is bounded is what happens: how many
//! requests are made, how many processes attach one after the other. Within these bounds the search
//! is complete, in whatever order things happen and however often a process takes what it could not
//! be told of.
//!
//! After each event, and in each world, it checks that
//!
//! - each request ends exactly once, by one of the ways there are, and its payload comes back then;
//! - requests are taken in the order in which they were made, and always when they can be;
//! - a barrier is taken alone, after all before it and before all behind it;
//! - a request is a replay when an earlier process took it with it, and not otherwise;
//! - ids ascend, and tell apart by their low bits what is in flight;
//! - a reply by anybody but the holder is refused and changes nothing;
//! - nothing is left when everything has ended.

use crate::queue::{Entry, Holder, Id, Queue, ReplyError, Withdrawn};
use std::collections::HashSet;
use std::io::Write;

/// Requests in flight at a time: fewer than are made, so that the queue is full at times.
const PLACES: usize = 3;
/// Slots of a process.
const SLOTS: u32 = 2;
/// How often a request may take its process with it.
const MAX_REPLAYS: u32 = 1;

/// What happens within one search.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    requests: u8,
    processes: u8,
}

/// Where a request is, by what happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Queued,
    Taken(Holder),
    Abandoned(Holder),
}

/// A request that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Request {
    id: Id,
    payload: u8,
    barrier: bool,
    stage: Stage,
    replays: u32,
}

/// All there is at one time.
#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    queue: Queue<u8, Vec<Option<Entry<u8>>>>,
    /// Oldest first.
    requests: Vec<Request>,
    made: u8,
    /// The last process, and whether it is still there.
    process: u64,
    attached: bool,
    removed: bool,
}

/// What can happen. Requests are named by their place in [`World::requests`].
#[derive(Clone, Copy, Debug)]
enum Event {
    Ask {
        barrier: bool,
    },
    Attach,
    Take,
    Untake {
        request: usize,
    },
    Reply {
        request: usize,
    },
    ClientKilled {
        request: usize,
    },
    GiveUp {
        request: usize,
    },
    ProcessGone,
    PopPoison,
    /// It ends whatever its state: a client's unmap, whose process is gone.
    PopWhere {
        request: usize,
    },
    Remove,
    Pop,
}

impl World {
    fn new() -> Self {
        Self {
            queue: Queue::new((0..PLACES).map(|_| None).collect(), MAX_REPLAYS),
            requests: Vec::new(),
            made: 0,
            process: 0,
            attached: false,
            removed: false,
        }
    }

    fn held(&self) -> impl Iterator<Item = (&Request, Holder)> {
        self.requests
            .iter()
            .filter_map(|request| match request.stage {
                Stage::Queued => None,
                Stage::Taken(holder) | Stage::Abandoned(holder) => Some((request, holder)),
            })
    }

    /// The slot that the process's next request goes into.
    fn free_slot(&self) -> Option<u32> {
        (0..SLOTS).find(|slot| {
            let holder = self.holder(*slot);
            !self.held().any(|(_, held)| held == holder)
        })
    }

    fn holder(&self, slot: u32) -> Holder {
        Holder {
            owner: self.process,
            slot,
        }
    }

    /// The request that may be taken next, by the rules: the oldest, unless there is a barrier in
    /// between.
    fn next(&self) -> Option<usize> {
        let queued = |request: &Request| request.stage == Stage::Queued;
        let oldest = self.requests.iter().position(queued)?;
        let barrier_is_taken = self.held().any(|(request, _)| request.barrier);
        let older_is_taken = self.requests[..oldest]
            .iter()
            .any(|request| !queued(request));
        let kept = barrier_is_taken || (self.requests[oldest].barrier && older_is_taken);
        (!kept).then_some(oldest)
    }

    /// Everything that can happen here.
    fn events(&self, bounds: Bounds) -> Vec<Event> {
        let mut events = Vec::new();
        if !self.removed {
            if self.made < bounds.requests {
                events.push(Event::Ask { barrier: false });
                events.push(Event::Ask { barrier: true });
            }
            if !self.attached && self.process < u64::from(bounds.processes) {
                events.push(Event::Attach);
            }
            if self.attached && self.free_slot().is_some() {
                events.push(Event::Take);
            }
            events.push(Event::Remove);
        } else {
            events.push(Event::Pop);
        }
        if self.attached {
            events.push(Event::ProcessGone);
        }
        for (request, what) in self.requests.iter().enumerate() {
            match what.stage {
                Stage::Queued => events.push(Event::GiveUp { request }),
                Stage::Taken(holder) | Stage::Abandoned(holder) => {
                    // A process that is gone says nothing any more, but its thread may be on the way.
                    events.push(Event::Untake { request });
                    if holder == self.holder(holder.slot) && self.attached {
                        events.push(Event::Reply { request });
                    } else {
                        events.push(Event::PopPoison);
                    }
                }
            }
            if !matches!(what.stage, Stage::Abandoned(_)) {
                events.push(Event::ClientKilled { request });
            }
            events.push(Event::PopWhere { request });
        }
        events
    }

    /// Has something happen, to the queue and to what is known, and compares the answers.
    fn happen(&mut self, event: Event) {
        match event {
            Event::Ask { barrier } => {
                let payload = self.made;
                let id = match barrier {
                    true => self.queue.push_barrier(payload),
                    false => self.queue.push(payload),
                };
                assert_eq!(id.is_some(), self.requests.len() < PLACES, "room");
                let Some(id) = id else { return };
                self.made += 1;
                assert_eq!(
                    id.raw() >> 16,
                    u64::from(self.made),
                    "ids count all requests"
                );
                self.requests.push(Request {
                    id,
                    payload,
                    barrier,
                    stage: Stage::Queued,
                    replays: 0,
                });
            }
            Event::Attach => {
                self.process += 1;
                self.attached = true;
            }
            Event::Take => {
                let Some(slot) = self.free_slot() else { return };
                let holder = self.holder(slot);
                let next = self.next();
                let taken = self.queue.take(holder);
                assert_eq!(taken.is_some(), next.is_some(), "whether there is one");
                if let (Some(taken), Some(next)) = (taken, next) {
                    let request = &mut self.requests[next];
                    assert_eq!(taken.id, request.id, "the oldest is taken");
                    assert_eq!(taken.payload, request.payload);
                    assert_eq!(taken.replay, request.replays > 0, "mark of a replay");
                    request.stage = Stage::Taken(holder);
                }
            }
            Event::Untake { request } => {
                let Request { id, stage, .. } = self.requests[request];
                match stage {
                    Stage::Queued => {}
                    Stage::Taken(holder) => {
                        assert!(self.queue.untake(id, holder));
                        self.requests[request].stage = Stage::Queued;
                    }
                    Stage::Abandoned(holder) => {
                        assert!(self.queue.untake(id, holder));
                        self.requests.remove(request);
                    }
                }
            }
            Event::Reply { request } => {
                let Request {
                    id, stage, payload, ..
                } = self.requests.remove(request);
                match stage {
                    Stage::Queued => {}
                    Stage::Taken(holder) => {
                        assert_eq!(self.queue.reply(id, holder), Ok(payload));
                    }
                    Stage::Abandoned(holder) => {
                        assert_eq!(self.queue.reply(id, holder), Err(ReplyError::Abandoned));
                    }
                }
            }
            Event::ClientKilled { request } => {
                let Request {
                    id, stage, payload, ..
                } = self.requests[request];
                match stage {
                    Stage::Queued => {
                        self.requests.remove(request);
                        assert_eq!(self.queue.withdraw(id), Withdrawn::Removed(payload));
                    }
                    Stage::Taken(holder) | Stage::Abandoned(holder) => {
                        self.requests[request].stage = Stage::Abandoned(holder);
                        assert_eq!(self.queue.withdraw(id), Withdrawn::Abandoned);
                    }
                }
            }
            Event::GiveUp { request } => {
                let Request { id, payload, .. } = self.requests.remove(request);
                assert_eq!(self.queue.withdraw_queued(id), Some(payload));
            }
            Event::ProcessGone => {
                self.attached = false;
                let owner = self.process;
                self.requests.retain(
                    |request| !matches!(request.stage, Stage::Abandoned(by) if by.owner == owner),
                );
                let mut replays = 0;
                for request in &mut self.requests {
                    let taken = matches!(request.stage, Stage::Taken(by) if by.owner == owner);
                    if taken && request.replays < MAX_REPLAYS {
                        request.stage = Stage::Queued;
                        request.replays += 1;
                        replays += 1;
                    }
                }
                assert_eq!(self.queue.owner_gone(owner), replays, "replays");
            }
            Event::PopPoison => {
                // Its owner may have been followed by others meanwhile.
                for owner in 1..=self.process {
                    if owner == self.process && self.attached {
                        continue;
                    }
                    let popped = self.queue.pop_poison(owner);
                    let of_owner = |request: &Request| matches!(request.stage, Stage::Taken(by) if by.owner == owner);
                    let Some(payload) = popped else {
                        assert!(!self.requests.iter().any(of_owner), "poison stays");
                        continue;
                    };
                    let at = self
                        .requests
                        .iter()
                        .position(|request| of_owner(request) && request.payload == payload);
                    let request = self.requests.remove(at.expect("poison that was not taken"));
                    assert_eq!(request.replays, MAX_REPLAYS, "given up too early");
                    return;
                }
            }
            Event::PopWhere { request } => {
                let Request { payload, .. } = self.requests.remove(request);
                let popped = self.queue.pop_where(|candidate| *candidate == payload);
                assert_eq!(popped, Some(payload));
                assert_eq!(self.queue.pop_where(|_| false), None);
            }
            Event::Remove => self.removed = true,
            Event::Pop => {
                let expected = (!self.requests.is_empty()).then(|| self.requests.remove(0).payload);
                assert_eq!(self.queue.pop(), expected);
            }
        }
    }

    /// What holds in every world.
    fn check(&self) {
        let queued = |request: &&Request| request.stage == Stage::Queued;
        let count = self.requests.iter().filter(queued).count();
        assert_eq!(self.queue.queued() as usize, count, "queued");
        assert_eq!(
            self.queue.taken() as usize,
            self.requests.len() - count,
            "taken"
        );
        assert_eq!(self.queue.is_takable(), self.next().is_some(), "takable");
        if self.held().count() == 0 {
            assert_eq!(self.queue.is_takable(), count > 0, "stuck behind nothing");
        }
        assert_eq!(
            self.queue.has_replays(),
            self.requests
                .iter()
                .filter(queued)
                .any(|request| request.replays > 0)
        );
        let last = self.requests.iter().rfind(queued);
        assert_eq!(
            self.queue.last_queued(),
            last.map(|request| &request.payload)
        );
        // A barrier is in hands alone: what is before it ended, what is behind it waits.
        for (barrier, _) in self.held().filter(|(request, _)| request.barrier) {
            assert_eq!(self.held().count(), 1, "company of a barrier");
            assert_eq!(
                self.requests[0].id, barrier.id,
                "something is before a barrier"
            );
        }
        let mut low: Vec<_> = self
            .requests
            .iter()
            .map(|request| request.id.raw() & 0xFFFF)
            .collect();
        low.sort_unstable();
        low.dedup();
        assert_eq!(low.len(), self.requests.len(), "low bits of ids");
        assert!(low.iter().all(|place| *place < PLACES as u64));
        self.check_strangers();
        self.check_end();
    }

    /// Whoever has no right to a request gets nothing and changes nothing.
    fn check_strangers(&self) {
        let mut queue = self.queue.clone();
        for sequence in 1..=u64::from(self.made) + 1 {
            for place in 0..=PLACES as u64 {
                let id = Id::from_raw(sequence << 16 | place);
                let known = self.requests.iter().find(|request| request.id == id);
                for owner in 1..=self.process + 1 {
                    for slot in 0..=SLOTS {
                        let by = Holder { owner, slot };
                        let refusal = match known.map(|request| request.stage) {
                            None => ReplyError::Unknown,
                            Some(Stage::Queued) => ReplyError::NotTaken,
                            Some(Stage::Taken(held) | Stage::Abandoned(held)) if held == by => {
                                continue
                            }
                            Some(Stage::Taken(held) | Stage::Abandoned(held)) => {
                                match held.owner == owner {
                                    true => ReplyError::OtherSlot,
                                    false => ReplyError::OtherOwner,
                                }
                            }
                        };
                        assert_eq!(queue.reply(id, by), Err(refusal));
                        assert!(!queue.untake(id, by), "untaken by a stranger");
                    }
                }
                if known.is_none() {
                    assert_eq!(queue.withdraw(id), Withdrawn::Ended);
                    assert_eq!(queue.withdraw_queued(id), None);
                } else if known.is_some_and(|request| request.stage != Stage::Queued) {
                    assert_eq!(queue.withdraw_queued(id), None, "given up while taken");
                }
            }
        }
        assert!(queue == self.queue, "a refusal changed the queue");
    }

    /// Whatever is there ends by a pop, in order, and then there is nothing.
    fn check_end(&self) {
        let mut queue = self.queue.clone();
        for request in &self.requests {
            assert_eq!(queue.pop(), Some(request.payload));
        }
        assert_eq!(queue.pop(), None);
        assert_eq!((queue.queued(), queue.taken()), (0, 0), "something is left");
        assert!(!queue.is_takable());
    }
}

/// How a world was reached: from which other, and by what.
type Origin = Option<(usize, Event)>;

/// Visits every world; returns how many there are, and how many events lead from one to another.
fn explore(bounds: Bounds) -> (usize, usize) {
    let mut worlds = vec![World::new()];
    let mut origins: Vec<Origin> = vec![None];
    let mut seen = HashSet::from([World::new()]);
    let mut events = 0;
    let mut at = 0;
    while at < worlds.len() {
        for event in worlds[at].events(bounds) {
            events += 1;
            let mut world = worlds[at].clone();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                world.happen(event);
                let new = seen.insert(world.clone());
                if new {
                    world.check();
                }
                new
            }));
            match outcome {
                Ok(true) => {
                    worlds.push(world);
                    origins.push(Some((at, event)));
                }
                Ok(false) => {}
                Err(cause) => {
                    let mut history = vec![event];
                    let mut from = at;
                    while let Some((before, event)) = origins[from] {
                        history.push(event);
                        from = before;
                    }
                    history.reverse();
                    println!("this led there: {history:?}");
                    std::panic::resume_unwind(cause);
                }
            }
        }
        at += 1;
    }
    (worlds.len(), events)
}

#[test]
fn every_life_of_requests_keeps_the_rules() {
    let started = std::time::Instant::now();
    for bounds in [
        Bounds {
            requests: 5,
            processes: 2,
        },
        Bounds {
            requests: 4,
            processes: 3,
        },
    ] {
        let (states, events) = explore(bounds);
        // Past the test harness, which swallows what a successful test prints.
        let _ = writeln!(
            std::io::stdout(),
            "explored {states} states by {events} events: {bounds:?}, {PLACES} places, {SLOTS} \
             slots, {MAX_REPLAYS} replays; {:.1?}",
            started.elapsed()
        );
        assert!(states > 1000, "the search went nowhere");
    }
}
