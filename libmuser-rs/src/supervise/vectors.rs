// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interrupts as a client has set them up: their eventfds, and which of them it has masked.
//!
//! That a level has masked itself when it fired is not seen here. After a restart it may fire once
//! more, as any interrupt may then.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::IntoBytes;

use super::kept::TooMuch;
use crate::vfio_user::wire::payload::IrqSet;
use crate::vfio_user::wire::request::{IrqAction, IrqData, SetIrqs};
use crate::vfio_user::wire::MAX_FDS;

/// Interrupt indexes; a PCI device has 5.
const MOST_INDEXES: u32 = 16;
/// Vectors of an index: more than MSI-X has (PCI 3.0, 6.8.2.3).
const MOST_VECTORS: u32 = 4096;

/// The vectors that something was done to, by index.
#[derive(Debug, Default)]
pub(super) struct Vectors {
    indexes: BTreeMap<u32, BTreeMap<u32, Vector>>,
}

#[derive(Debug, Default)]
struct Vector {
    masked: bool,
    /// What it signals, and what masks and unmasks it, by the bits of [`BITS`].
    events: [Option<OwnedFd>; 3],
}

/// What eventfds are for, in the order in which they are set up: an event behind a mask is not fired.
const BITS: [u32; 3] = [IrqSet::MASK, IrqSet::UNMASK, IrqSet::TRIGGER];

/// A message that sets up neighbours in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IrqStep {
    index: u32,
    start: u32,
    count: u32,
    /// Which of [`BITS`], with eventfds; none: they are masked.
    event: Option<usize>,
}

impl Vectors {
    /// The client has set interrupts up.
    ///
    /// # Errors
    ///
    /// There can't be so many.
    pub(super) fn set(
        &mut self,
        set: &SetIrqs<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), TooMuch> {
        let end = set.start.checked_add(set.count);
        let end = end.filter(|end| *end <= MOST_VECTORS && set.index < MOST_INDEXES);
        let end = end.ok_or(TooMuch("interrupts"))?;
        let action = match set.action {
            IrqAction::Mask => 0,
            IrqAction::Unmask => 1,
            IrqAction::Trigger => 2,
        };
        if set.count == 0 {
            if set.action == IrqAction::Trigger {
                self.indexes.remove(&set.index);
            }
            return Ok(());
        }
        let vectors = self.indexes.entry(set.index).or_default();
        let mut descriptors = descriptors.into_iter();
        for (at, number) in (set.start..end).enumerate() {
            let chosen = match set.data {
                IrqData::EventFds => {
                    vectors.entry(number).or_default().events[action] = descriptors.next();
                    continue;
                }
                IrqData::None => true,
                IrqData::Bools(bools) => bools.get(at).is_some_and(|byte| *byte != 0),
            };
            match set.action {
                IrqAction::Mask if chosen => vectors.entry(number).or_default().masked = true,
                IrqAction::Unmask if chosen => vectors.entry(number).or_default().masked = false,
                // It was fired, which leaves nothing.
                _ => {}
            }
        }
        vectors.retain(|_, vector| vector.masked || vector.events.iter().any(Option::is_some));
        Ok(())
    }

    /// What sets all of it up, in order.
    pub(super) fn steps(&self) -> Vec<IrqStep> {
        let mut steps = Vec::new();
        for (index, vectors) in &self.indexes {
            for event in [None, Some(0), Some(1), Some(2)] {
                let has = |vector: &Vector| match event {
                    None => vector.masked,
                    Some(at) => vector.events.get(at).is_some_and(Option::is_some),
                };
                let numbers = vectors.iter().filter(|(_, vector)| has(vector));
                for (number, _) in numbers {
                    let most = steps.last_mut().filter(|step: &&mut IrqStep| {
                        let next = (step.index, step.event) == (*index, event)
                            && step.start + step.count == *number;
                        next && (step.count as usize) < MAX_FDS
                    });
                    match most {
                        Some(step) => step.count += 1,
                        None => steps.push(IrqStep {
                            index: *index,
                            start: *number,
                            count: 1,
                            event,
                        }),
                    }
                }
            }
        }
        steps
    }

    /// The message of a step: payload and descriptors.
    pub(super) fn message(&self, step: &IrqStep) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
        let kind = match step.event {
            None => IrqSet::MASK | IrqSet::DATA_NONE,
            Some(at) => BITS[at.min(2)] | IrqSet::DATA_EVENTFD,
        };
        let set = IrqSet {
            argsz: 20,
            flags: kind,
            index: step.index,
            start: step.start,
            count: step.count,
        };
        let vectors = self.indexes.get(&step.index);
        let numbers = step.start..step.start.saturating_add(step.count);
        let vectors = vectors
            .into_iter()
            .flat_map(|all| all.range(numbers.clone()));
        let events = vectors.filter_map(|(_, vector)| {
            let event = vector.events.get(step.event?)?.as_ref()?;
            Some(event.as_fd())
        });
        (set.as_bytes().to_vec(), events.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set<'a>(action: IrqAction, start: u32, count: u32, data: IrqData<'a>) -> SetIrqs<'a> {
        SetIrqs {
            index: 2,
            start,
            count,
            action,
            data,
        }
    }

    fn events(count: usize) -> Vec<OwnedFd> {
        let event = || std::fs::File::open("/dev/null").unwrap().into();
        (0..count).map(|_| event()).collect()
    }

    fn step(start: u32, count: u32, event: Option<usize>) -> IrqStep {
        IrqStep {
            index: 2,
            start,
            count,
            event,
        }
    }

    #[test]
    fn neighbours_are_set_up_together_and_masks_come_first() {
        let mut vectors = Vectors::default();
        let trigger = |start, count| set(IrqAction::Trigger, start, count, IrqData::EventFds);
        vectors.set(&trigger(0, 3), events(3)).unwrap();
        vectors.set(&trigger(8, 1), events(1)).unwrap();
        vectors
            .set(&set(IrqAction::Mask, 1, 1, IrqData::None), Vec::new())
            .unwrap();

        let steps = vectors.steps();

        assert_eq!(
            steps,
            [step(1, 1, None), step(0, 3, Some(2)), step(8, 1, Some(2))]
        );
        let (payload, descriptors) = vectors.message(&steps[1]);
        assert_eq!((payload.len(), descriptors.len()), (20, 3));
        assert!(vectors.message(&steps[0]).1.is_empty());
    }

    #[test]
    fn disabled_index_leaves_nothing() {
        let mut vectors = Vectors::default();
        vectors
            .set(&set(IrqAction::Trigger, 0, 2, IrqData::EventFds), events(2))
            .unwrap();
        vectors
            .set(&set(IrqAction::Mask, 0, 2, IrqData::None), Vec::new())
            .unwrap();

        vectors
            .set(&set(IrqAction::Trigger, 0, 0, IrqData::None), Vec::new())
            .unwrap();

        assert!(vectors.steps().is_empty());
    }

    #[test]
    fn eventfds_taken_away_are_not_set_up() {
        let mut vectors = Vectors::default();
        vectors
            .set(&set(IrqAction::Trigger, 0, 2, IrqData::EventFds), events(2))
            .unwrap();

        vectors
            .set(
                &set(IrqAction::Trigger, 0, 1, IrqData::EventFds),
                Vec::new(),
            )
            .unwrap();

        assert_eq!(vectors.steps(), [step(1, 1, Some(2))]);
    }

    #[test]
    fn chosen_vectors_are_masked_and_unmasked() {
        let mut vectors = Vectors::default();
        let bools = IrqData::Bools(&[1, 0, 1]);
        vectors
            .set(&set(IrqAction::Mask, 4, 3, bools), Vec::new())
            .unwrap();
        assert_eq!(vectors.steps(), [step(4, 1, None), step(6, 1, None)]);

        vectors
            .set(&set(IrqAction::Unmask, 0, 10, IrqData::None), Vec::new())
            .unwrap();
        assert!(vectors.steps().is_empty());
    }

    #[test]
    fn firing_leaves_nothing() {
        let mut vectors = Vectors::default();
        vectors
            .set(&set(IrqAction::Trigger, 0, 3, IrqData::None), Vec::new())
            .unwrap();

        assert!(vectors.steps().is_empty());
    }

    #[test]
    fn more_vectors_than_a_message_has_descriptors_are_several_steps() {
        let mut vectors = Vectors::default();
        for start in [0, 200] {
            let trigger = set(IrqAction::Trigger, start, 200, IrqData::EventFds);
            vectors.set(&trigger, events(200)).unwrap();
        }

        let counts: Vec<_> = vectors.steps().iter().map(|step| step.count).collect();

        assert_eq!(counts, [253, 147]);
    }
}
