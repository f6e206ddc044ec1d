// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A kill between any two stores, and memory that is somebody else's.

use super::*;
use crate::region::{Region, Width};

/// Copies the memory after each store: what the next process would find.
#[derive(Clone, Debug, Default)]
pub(super) struct Observer(Arc<Mutex<Vec<Vec<u8>>>>);

impl Observer {
    pub(super) fn see(&self, memory: &SharedMemory) {
        self.0.lock().unwrap().push(content(memory));
    }

    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

const PARTS: Parts = Parts {
    library: 100,
    author: 300,
    fingerprint: 7,
};

fn content(memory: &SharedMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    memory.read_bytes(0, &mut bytes).unwrap();
    bytes
}

fn memory_of(bytes: &[u8]) -> SharedMemory {
    let memory = SharedMemory::anonymous(bytes.len()).unwrap();
    memory.write_bytes(0, bytes).unwrap();
    memory
}

fn fresh() -> SharedMemory {
    SharedMemory::anonymous(PARTS.size()).unwrap()
}

fn open(memory: &SharedMemory) -> Result<(Arc<Store>, bool)> {
    let (store, recovered) = Store::open(memory.clone(), PARTS, &[1; 100])?;
    Ok((Arc::new(store), recovered))
}

fn recover(bytes: &[u8]) -> Arc<Store> {
    let (store, recovered) = open(&memory_of(bytes)).unwrap();
    assert!(recovered);
    store
}

fn access(number: u64, offset: u64, replay: bool) -> Access {
    Access {
        request: RequestId::new(number),
        replay,
        ..Access::new(Region::Bar(0), offset, Width::Dword)
    }
}

/// Adds to the counter in the first bytes, and writes it all over the rest as well.
fn count(state: &State, access: &Access) -> Result<u64> {
    state.once(access, |bytes| {
        let before = u64::from(bytes[0]);
        bytes.fill(bytes[0].wrapping_add(1));
        before
    })
}

fn first(store: &Arc<Store>) -> u8 {
    let state = State::new(Arc::clone(store));
    state.read(|bytes| {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "it is torn");
        bytes[0]
    })
}

#[test]
fn memory_never_used_starts_anew() {
    let memory = fresh();
    let (store, recovered) = open(&memory).unwrap();

    assert!(!recovered);
    assert_eq!(store.library(), [1; 100]);
    assert_eq!(store.author(), [0; 300]);

    let (store, recovered) = open(&memory).unwrap();
    assert!(recovered);
    assert_eq!(store.library(), [1; 100]);
}

#[test]
fn kill_at_any_store_of_the_first_start_starts_anew() {
    let observer = Observer::default();
    let memory = fresh();
    // Something is left of an earlier start, which was killed as well.
    memory.write_bytes(8, &[0xee; 400]).unwrap();
    Journal::open_observed(memory, PARTS, &[1; 100], observer.clone()).unwrap();

    let images = observer.take();
    let (last, before) = images.split_last().unwrap();
    assert!(before.len() > PARTS.size() / 16, "{}", before.len());
    for bytes in before {
        let (store, recovered) = open(&memory_of(bytes)).unwrap();
        assert!(!recovered);
        assert_eq!(store.library(), [1; 100]);
        assert_eq!(store.author(), [0; 300]);
    }
    // With the last store, which is that of the magic, everything is there.
    let store = recover(last);
    assert_eq!(store.library(), [1; 100]);
    assert_eq!(store.author(), [0; 300]);
}

#[test]
fn kill_at_any_store_leaves_each_access_done_once() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let observer = Observer::default();
    store.lock().journal.observer = Some(observer.clone());
    let state = State::new(Arc::clone(&store));
    let mut kills = 0;
    for number in 0..3 {
        // Two accesses of one request, and one of another at the same place.
        let access = access(1 + ((number / 2) << 16), number % 2 * 8, false);
        let result = count(&state, &access).unwrap();
        assert_eq!(result, number);
        for bytes in observer.take() {
            kills += 1;
            let store = recover(&bytes);
            let before = first(&store);
            assert!(u64::from(before) == number || u64::from(before) == number + 1);

            let replay = Access {
                replay: true,
                ..access
            };
            let result = count(&State::new(Arc::clone(&store)), &replay).unwrap();

            assert_eq!(result, number);
            assert_eq!(u64::from(first(&store)), number + 1);
        }
    }
    assert!(kills > 100, "{kills}");
}

#[test]
fn kill_during_recovery_is_recovered_from() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let observer = Observer::default();
    store.lock().journal.observer = Some(observer.clone());
    count(&State::new(store), &access(1, 0, false)).unwrap();
    let half_applied = observer.take();

    // Each recovery starts where another one was killed.
    for bytes in half_applied {
        let memory = memory_of(&bytes);
        let before = first(&recover(&bytes));
        open(&memory).unwrap();
        let (store, _) = open(&memory).unwrap();
        assert_eq!(first(&store), before);
    }
}

#[test]
fn library_and_author_do_not_mix() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let state = State::new(Arc::clone(&store));

    state.update(|bytes| bytes.fill(9));
    let key = Key::new(RequestId::new(5), 7, 4);
    store.save_library(&[3; 100], Some((key, 77))).unwrap();

    let store = recover(&content(&memory));
    assert_eq!(store.library(), [3; 100]);
    assert_eq!(first(&store), 9);
    assert_eq!(store.done(key), Some(77));
    assert_eq!(store.done(Key::new(RequestId::new(5), 7, 5)), None);
}

#[test]
fn second_thing_of_an_access_is_refused() {
    let (store, _) = open(&fresh()).unwrap();
    let state = State::new(Arc::clone(&store));
    count(&state, &access(1, 0, false)).unwrap();

    let error = count(&state, &access(1, 0, false)).unwrap_err();

    assert_eq!(error.errno(), Errno::EINVAL);
    assert_eq!(first(&store), 1);
}

#[test]
fn access_without_a_request_is_done_each_time() {
    let (store, _) = open(&fresh()).unwrap();
    let state = State::new(Arc::clone(&store));
    let access = Access::new(Region::Bar(0), 0, Width::Dword);

    count(&state, &access).unwrap();
    count(&state, &access).unwrap();

    assert_eq!(first(&store), 2);
}

/// The accesses of a write of 4096 bytes.
fn long_write(store: &Arc<Store>, number: u64, replay: bool) -> Result<()> {
    let state = State::new(Arc::clone(store));
    (0..512).try_for_each(|part| {
        let access = access(number, part * 8, replay);
        state
            .once(&access, |_| part)
            .map(|result| assert_eq!(result, part))
    })
}

#[test]
fn long_request_that_ended_makes_room_after_a_restart() {
    let memory = fresh();
    let (write, read, next) = (1 << 16 | 1, 2 << 16, 3 << 16);
    let ids = [write, read, next].map(RequestId::new);
    let (store, _) = open(&memory).unwrap();
    store.turned(None, Some((ids[0], false)));
    store.turned(None, Some((ids[1], false)));
    long_write(&store, write, false).unwrap();
    store.turned(Some(ids[0]), None);
    store.turned(Some(ids[1]), None);

    let (store, _) = open(&memory).unwrap();
    assert!(store.taking().is_some());
    store.turned(None, Some((RequestId::NONE, false)));
    assert!(store.taking().is_some());
    store.turned(None, Some((ids[2], false)));
    assert!(store.taking().is_none());

    long_write(&store, next, false).unwrap();
}

#[test]
fn long_request_left_behind_is_not_done_again_after_a_restart() {
    let memory = fresh();
    let (write, read) = (1 << 16 | 1, 2 << 16);
    let ids = [write, read].map(RequestId::new);
    let (store, _) = open(&memory).unwrap();
    store.turned(None, Some((ids[0], false)));
    long_write(&store, write, false).unwrap();

    // Another one is replayed first, and does more than there is room for beside the write.
    let (store, _) = open(&memory).unwrap();
    store.turned(None, Some((ids[1], true)));
    let state = State::new(Arc::clone(&store));
    state.once(&access(read, 0, true), |_| 0).unwrap();
    state.once(&access(read, 8, true), |_| 0).unwrap();
    let full = state.once(&access(read, 16, true), |_| 0).unwrap_err();
    assert_eq!(full.errno(), Errno::ENOSPC);

    store.turned(Some(ids[1]), Some((ids[0], true)));
    let state = State::new(store);
    for part in 0..512 {
        let access = access(write, part * 8, true);
        let result = state.once(&access, |_| unreachable!("it is done"));
        assert_eq!(result.unwrap(), part);
    }
}

#[test]
fn closure_that_panics_has_done_nothing() {
    let (store, _) = open(&fresh()).unwrap();
    let state = State::new(store);

    let panicked = catch_unwind(AssertUnwindSafe(|| {
        state.update(|bytes| {
            bytes[0] = 1;
            panic!("on purpose")
        })
    }));

    assert!(panicked.is_err());
    assert_eq!(state.read(|bytes| bytes[0]), 0);
}

#[test]
fn sealed_memory_does_not_change() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let before = content(&memory);
    let state = State::new(Arc::clone(&store));

    store.seal();
    state.update(|bytes| bytes.fill(1));
    store.save_library(&[9; 100], None).unwrap();

    assert_eq!(content(&memory), before);
    let error = count(&state, &access(1, 0, false)).unwrap_err();
    assert_eq!(error.errno().number(), libc::ENODEV);
}

#[test]
fn memory_of_another_is_refused_in_words() {
    let refusal = |change: &dyn Fn(&SharedMemory), parts: Parts| {
        let memory = SharedMemory::anonymous(2 * PARTS.size()).unwrap();
        open(&memory).unwrap();
        change(&memory);
        let error = Store::open(memory, parts, &[]).unwrap_err();
        assert!(error.is_refused(), "{error}");
        error.to_string()
    };
    let nothing = |_: &SharedMemory| {};
    let larger = Parts {
        author: 301,
        ..PARTS
    };
    let other = Parts {
        fingerprint: 8,
        ..PARTS
    };

    assert!(refusal(&|memory| memory.write(0, 1_u8).unwrap(), PARTS).contains("libmuser"));
    assert!(refusal(&|memory| memory.write(8, 2_u32).unwrap(), PARTS).contains("layout 2"));
    assert!(refusal(&nothing, larger).contains("wants 301"));
    assert!(refusal(&nothing, other).contains("configuration space"));
    let damage = |memory: &SharedMemory| memory.write(40, u64::MAX).unwrap();
    assert!(refusal(&damage, PARTS).contains("damaged"));
    let damage = |memory: &SharedMemory| memory.write(40, 24_u64).unwrap();
    assert!(matches!(refusal(&damage, PARTS), text if text.contains("damaged")));
}

#[test]
fn tag_tells_parts_from_others() {
    let others = [
        Parts {
            library: 101,
            ..PARTS
        },
        Parts {
            author: 301,
            ..PARTS
        },
        Parts {
            fingerprint: 8,
            ..PARTS
        },
        // The sum of the sizes is the same.
        Parts {
            library: 300,
            author: 100,
            ..PARTS
        },
    ];

    assert_eq!(PARTS.tag(), Parts { ..PARTS }.tag());
    for other in others {
        assert_ne!(PARTS.tag(), other.tag());
        assert_ne!(other.tag(), 0);
    }
}

#[test]
fn change_of_everything_fits_the_log() {
    for (library, author) in [(0, 0), (1, 1), (63, 65), (256, 4096), (5000, 100_000)] {
        let parts = Parts {
            library,
            author,
            fingerprint: 0,
        };
        let memory = SharedMemory::anonymous(parts.size()).unwrap();
        let (store, _) = Store::open(memory.clone(), parts, &[]).unwrap();
        // Every other block changes, which makes the most records.
        let striped: Vec<_> = (0..author).map(|at| u8::from(at / 64 % 2 == 0)).collect();
        let mut number = 0;
        for new in [striped, vec![0xff; author], vec![1; author]] {
            number += 1;
            let key = Key::new(RequestId::new(number << 16), 0, 0);
            store.save_author(&new, Some((key, 1))).unwrap();
            store.save_library(&vec![0xff; library], None).unwrap();
            let (again, _) = Store::open(memory.clone(), parts, &[]).unwrap();
            assert_eq!(again.author(), new);
        }
    }
}

#[test]
fn kill_at_any_store_leaves_all_parts_changed_or_none() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let observer = Observer::default();
    store.lock().journal.observer = Some(observer.clone());
    let state = State::new(Arc::clone(&store));

    let sum = state.update_parts([3..10, 10..10, 100..290], |[one, none, other]| {
        assert!(none.is_empty());
        one.fill(7);
        other.fill(7);
        one.len() + other.len()
    });

    assert_eq!(sum.unwrap(), 197);
    let images = observer.take();
    assert!(images.len() > 20, "{}", images.len());
    let mut expected = [0; 300];
    expected[3..10].fill(7);
    expected[100..290].fill(7);
    for bytes in images {
        let found = recover(&bytes).author();
        assert!(found == expected || found == [0; 300], "{found:?}");
    }
    assert_eq!(state.read(<[u8]>::to_vec), expected);
}

#[test]
fn parts_outside_or_in_disorder_are_refused() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let state = State::new(store);

    for parts in [[0..10, 9..20], [20..30, 0..10], [0..10, 299..301]] {
        let result = state.update_parts(parts.clone(), |_| panic!("{parts:?}"));
        assert_eq!(result.unwrap_err().errno(), Errno::EINVAL);
    }
}

#[test]
fn parts_that_panic_are_as_before() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let state = State::new(store);

    let work = AssertUnwindSafe(|| {
        let all = 0..300;
        state.update_parts([all], |[bytes]| {
            bytes.fill(1);
            panic!("as it should");
        })
    });

    assert!(catch_unwind(work).is_err());
    assert_eq!(state.read(<[u8]>::to_vec), [0; 300]);
}

#[test]
fn parts_after_the_end_are_not_touched() {
    let memory = fresh();
    let (store, _) = open(&memory).unwrap();
    let state = State::new(Arc::clone(&store));
    store.seal();

    let first = 0..1;
    let result = state.update_parts([first], |_| panic!("it has ended"));

    assert_eq!(result.unwrap_err().errno(), Errno::ENODEV);
}
