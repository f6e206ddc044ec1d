// SPDX-License-Identifier: GPL-2.0
//! The queue of requests: single steps, and long random histories against a model that keeps a plain
//! list. Every short history is the matter of `life_tests`.

use crate::queue::{Entry, Holder, Id, Queue, ReplyError, Taken, Withdrawn};
use proptest::prelude::*;

const MAX_REPLAYS: u32 = 64;

fn queue(places: usize) -> Queue<u32, Vec<Option<Entry<u32>>>> {
    Queue::new((0..places).map(|_| None).collect(), MAX_REPLAYS)
}

fn holder(owner: u64, slot: u32) -> Holder {
    Holder { owner, slot }
}

#[test]
fn push_full_is_refused() {
    let mut queue = queue(2);
    assert!(queue.push(1).is_some());
    assert!(queue.push(2).is_some());

    assert_eq!(queue.push(3), None);
    assert_eq!(queue.queued(), 2);
}

#[test]
fn take_gives_oldest_first() {
    let mut queue = queue(4);
    for payload in 1..=3 {
        queue.push(payload).unwrap();
    }

    let order: Vec<u32> =
        std::iter::from_fn(|| queue.take(holder(1, 0)).map(|taken| taken.payload)).collect();

    assert_eq!(order, [1, 2, 3]);
}

#[test]
fn ids_are_never_reused() {
    let mut queue = queue(1);
    let mut last = 0;
    for _ in 0..100 {
        let id = queue.push(7).unwrap();
        assert!(id.raw() > last);
        last = id.raw();
        queue.take(holder(1, 0)).unwrap();
        assert_eq!(queue.reply(id, holder(1, 0)), Ok(7));
        assert_eq!(queue.reply(id, holder(1, 0)), Err(ReplyError::Unknown));
    }
}

#[test]
fn reply_by_wrong_holder_is_refused_and_changes_nothing() {
    let mut queue = queue(2);
    let id = queue.push(5).unwrap();
    assert_eq!(queue.reply(id, holder(1, 0)), Err(ReplyError::NotTaken));
    queue.take(holder(1, 0)).unwrap();

    assert_eq!(queue.reply(id, holder(2, 0)), Err(ReplyError::OtherOwner));
    assert_eq!(queue.reply(id, holder(1, 1)), Err(ReplyError::OtherSlot));
    assert_eq!(
        queue.reply(Id::from_raw(u64::MAX), holder(1, 0)),
        Err(ReplyError::Unknown)
    );

    assert_eq!(queue.reply(id, holder(1, 0)), Ok(5));
}

#[test]
fn withdrawn_while_taken_ends_with_late_reply() {
    let mut queue = queue(1);
    let id = queue.push(5).unwrap();
    queue.take(holder(1, 0)).unwrap();

    assert_eq!(queue.withdraw(id), Withdrawn::Abandoned);
    assert_eq!(queue.push(6), None);
    assert_eq!(queue.reply(id, holder(1, 0)), Err(ReplyError::Abandoned));

    assert_eq!(queue.withdraw(id), Withdrawn::Ended);
    assert!(queue.push(6).is_some());
}

#[test]
fn owner_gone_replays_in_original_order() {
    let mut queue = queue(4);
    for payload in 1..=4 {
        queue.push(payload).unwrap();
    }
    queue.take(holder(1, 0)).unwrap();
    queue.take(holder(2, 0)).unwrap();
    queue.take(holder(1, 1)).unwrap();

    assert_eq!(queue.owner_gone(1), 2);

    let order: Vec<(u32, bool)> = std::iter::from_fn(|| {
        queue
            .take(holder(3, 0))
            .map(|taken| (taken.payload, taken.replay))
    })
    .collect();
    assert_eq!(order, [(1, true), (3, true), (4, false)]);
}

/// A client whose patience ends in the very moment in which a process takes its request keeps waiting.
#[test]
fn giving_up_a_taken_request_leaves_it_answerable() {
    let mut queue = queue(1);
    let id = queue.push(5).unwrap();
    queue.take(holder(1, 0)).unwrap();

    assert_eq!(queue.withdraw_queued(id), None);

    assert_eq!(queue.reply(id, holder(1, 0)), Ok(5));
    assert_eq!(queue.withdraw_queued(id), None);
}

#[test]
fn request_that_ends_its_processes_is_given_up() {
    let mut queue = queue(2);
    let poison = queue.push(5).unwrap();
    for owner in 0..u64::from(MAX_REPLAYS) {
        assert_eq!(queue.take(holder(owner, 0)).unwrap().id, poison);
        assert_eq!(queue.owner_gone(owner), 1);
        assert_eq!(queue.pop_poison(owner), None);
    }
    let last = u64::from(MAX_REPLAYS);
    queue.push(6).unwrap();
    queue.take(holder(last, 0)).unwrap();

    assert_eq!(queue.owner_gone(last), 0);

    assert_eq!(queue.pop_poison(last), Some(5));
    assert_eq!(queue.pop_poison(last), None);
    assert_eq!(queue.take(holder(last + 1, 0)).unwrap().payload, 6);
    assert_eq!(queue.taken(), 1);
}

#[test]
fn untake_is_no_replay() {
    let mut queue = queue(2);
    queue.push(1).unwrap();
    queue.push(2).unwrap();
    let taken = queue.take(holder(1, 0)).unwrap();

    assert!(!queue.untake(taken.id, holder(2, 0)));
    assert!(queue.untake(taken.id, holder(1, 0)));

    let again = queue.take(holder(1, 0)).unwrap();
    assert_eq!((again.payload, again.replay), (1, false));
}

#[test]
fn barrier_waits_for_what_was_taken_before_it() {
    let mut queue = queue(4);
    let before = [queue.push(1).unwrap(), queue.push(2).unwrap()];
    queue.push_barrier(3).unwrap();
    queue.push(4).unwrap();
    queue.take(holder(1, 0)).unwrap();
    queue.take(holder(1, 1)).unwrap();

    assert_eq!(queue.take(holder(1, 2)), None);
    queue.reply(before[1], holder(1, 1)).unwrap();
    assert_eq!(queue.take(holder(1, 2)), None);
    // Nobody waits for it any more, but the process still works on it.
    assert_eq!(queue.withdraw(before[0]), Withdrawn::Abandoned);
    assert!(!queue.is_takable());
    assert_eq!(
        queue.reply(before[0], holder(1, 0)),
        Err(ReplyError::Abandoned)
    );

    assert!(queue.is_takable());
    assert_eq!(queue.take(holder(1, 2)).unwrap().payload, 3);
}

#[test]
fn nothing_passes_a_taken_barrier() {
    let mut queue = queue(4);
    let barrier = queue.push_barrier(1).unwrap();
    queue.push(2).unwrap();
    queue.push(3).unwrap();
    queue.take(holder(1, 0)).unwrap();

    assert!(!queue.is_takable());
    assert_eq!(queue.take(holder(1, 1)), None);
    assert_eq!(queue.withdraw(barrier), Withdrawn::Abandoned);
    assert_eq!(queue.take(holder(1, 1)), None);
    assert_eq!(
        queue.reply(barrier, holder(1, 0)),
        Err(ReplyError::Abandoned)
    );

    assert_eq!(queue.take(holder(1, 0)).unwrap().payload, 2);
    assert_eq!(queue.take(holder(1, 1)).unwrap().payload, 3);
}

#[test]
fn barrier_whose_client_is_gone_keeps_nothing_back() {
    let mut queue = queue(3);
    queue.push(1).unwrap();
    let barrier = queue.push_barrier(2).unwrap();
    queue.push(3).unwrap();
    queue.take(holder(1, 0)).unwrap();
    assert!(!queue.is_takable());

    assert_eq!(queue.withdraw(barrier), Withdrawn::Removed(2));

    assert_eq!(queue.take(holder(1, 1)).unwrap().payload, 3);
}

/// A request in the model.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    id: Id,
    payload: u32,
    barrier: bool,
    holder: Option<Holder>,
    abandoned: bool,
    replay: bool,
}

/// One step of a history. Requests are named by how many were made before them.
#[derive(Clone, Copy, Debug)]
enum Step {
    Push { barrier: bool },
    Take { owner: u64 },
    Untake { nth: usize },
    Reply { nth: usize, owner: u64 },
    Withdraw { nth: usize },
    GiveUp { nth: usize },
    OwnerGone { owner: u64 },
    Pop,
}

/// Runs a history on the queue and on the model, and compares every answer.
fn run(steps: &[Step], places: usize) {
    let mut queue = queue(places);
    let mut model: Vec<Model> = Vec::new();
    let mut made: Vec<Id> = Vec::new();
    let id_of = |made: &[Id], nth: usize| made.get(nth).copied().unwrap_or(Id::from_raw(99 << 16));
    for (number, step) in steps.iter().enumerate() {
        let slot = u32::try_from(number).unwrap();
        match *step {
            Step::Push { barrier } => {
                let pushed = match barrier {
                    true => queue.push_barrier(slot),
                    false => queue.push(slot),
                };
                assert_eq!(pushed.is_some(), model.len() < places, "{steps:?}");
                if let Some(id) = pushed {
                    made.push(id);
                    model.push(Model {
                        id,
                        payload: slot,
                        barrier,
                        holder: None,
                        abandoned: false,
                        replay: false,
                    });
                }
            }
            Step::Take { owner } => {
                let taken = model.iter().filter(|request| request.holder.is_some());
                let barrier = taken.clone().any(|request| request.barrier);
                let taken = taken.count();
                let oldest = model
                    .iter_mut()
                    .filter(|request| request.holder.is_none())
                    .min_by_key(|request| request.id)
                    .filter(|request| !barrier && (taken == 0 || !request.barrier));
                let expected = oldest.map(|request| {
                    request.holder = Some(holder(owner, slot));
                    Taken {
                        id: request.id,
                        replay: request.replay,
                        payload: request.payload,
                    }
                });
                assert_eq!(queue.take(holder(owner, slot)), expected, "{steps:?}");
            }
            Step::Untake { nth } => {
                let id = id_of(&made, nth);
                // By the holder in the model, if there is one: anybody else is refused.
                let at = model
                    .iter()
                    .position(|request| request.id == id && request.holder.is_some());
                let by = at
                    .and_then(|at| model[at].holder)
                    .unwrap_or(holder(1, slot));
                assert!(
                    !queue.untake(id, holder(by.owner + 1, by.slot)),
                    "{steps:?}"
                );
                assert_eq!(queue.untake(id, by), at.is_some(), "{steps:?}");
                if let Some(at) = at {
                    if model[at].abandoned {
                        model.remove(at);
                    } else {
                        model[at].holder = None;
                    }
                }
            }
            Step::Reply { nth, owner } => {
                let id = id_of(&made, nth);
                let at = model.iter().position(|request| request.id == id);
                let held = at.and_then(|at| model[at].holder);
                let from = Holder {
                    owner,
                    slot: held.map_or(slot, |held| held.slot),
                };
                let expected = match (at, held) {
                    (None, _) => Err(ReplyError::Unknown),
                    (Some(_), None) => Err(ReplyError::NotTaken),
                    (Some(_), Some(held)) if held.owner != owner => Err(ReplyError::OtherOwner),
                    (Some(at), Some(_)) => {
                        let request = model.remove(at);
                        match request.abandoned {
                            true => Err(ReplyError::Abandoned),
                            false => Ok(request.payload),
                        }
                    }
                };
                assert_eq!(queue.reply(id, from), expected, "{steps:?}");
            }
            Step::Withdraw { nth } => {
                let id = id_of(&made, nth);
                let at = model.iter().position(|request| request.id == id);
                let expected = match at {
                    None => Withdrawn::Ended,
                    Some(at) if model[at].holder.is_some() => {
                        model[at].abandoned = true;
                        Withdrawn::Abandoned
                    }
                    Some(at) => Withdrawn::Removed(model.remove(at).payload),
                };
                assert_eq!(queue.withdraw(id), expected, "{steps:?}");
            }
            Step::GiveUp { nth } => {
                let id = id_of(&made, nth);
                let at = model
                    .iter()
                    .position(|request| request.id == id && request.holder.is_none());
                let expected = at.map(|at| model.remove(at).payload);
                assert_eq!(queue.withdraw_queued(id), expected, "{steps:?}");
            }
            Step::OwnerGone { owner } => {
                let gone = |request: &Model| request.holder.is_some_and(|held| held.owner == owner);
                model.retain(|request| !(gone(request) && request.abandoned));
                let mut replays = 0;
                for request in model.iter_mut().filter(|request| gone(request)) {
                    request.holder = None;
                    request.replay = true;
                    replays += 1;
                }
                assert_eq!(queue.owner_gone(owner), replays, "{steps:?}");
            }
            Step::Pop => {
                let oldest = (0..model.len()).min_by_key(|at| model[*at].id);
                let expected = oldest.map(|at| model.remove(at).payload);
                assert_eq!(queue.pop(), expected, "{steps:?}");
            }
        }
        let queued = model.iter().filter(|request| request.holder.is_none());
        let last = queued.clone().max_by_key(|request| request.id);
        assert_eq!(
            queue.last_queued(),
            last.map(|request| &request.payload),
            "{steps:?}"
        );
        let queued = queued.count();
        assert_eq!(queue.queued() as usize, queued, "{steps:?}");
        assert_eq!(queue.taken() as usize, model.len() - queued, "{steps:?}");
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Push { barrier: false }),
        1 => Just(Step::Push { barrier: true }),
        4 => (1..4u64).prop_map(|owner| Step::Take { owner }),
        1 => (0..60usize).prop_map(|nth| Step::Untake { nth }),
        4 => (0..60usize, 1..4u64).prop_map(|(nth, owner)| Step::Reply { nth, owner }),
        2 => (0..60usize).prop_map(|nth| Step::Withdraw { nth }),
        2 => (0..60usize).prop_map(|nth| Step::GiveUp { nth }),
        1 => (1..4u64).prop_map(|owner| Step::OwnerGone { owner }),
        1 => Just(Step::Pop),
    ]
}

proptest! {
    #[test]
    fn long_history_agrees_with_model(
        steps in prop::collection::vec(step(), 1..200),
        places in 1..20usize,
    ) {
        run(&steps, places);
    }
}
