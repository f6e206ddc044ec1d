// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What programs have asked the client for and was not answered.
//!
//! Ids are a program's own, and those of a program that is gone are in use at the client until it
//! answers. So each command gets another id on its way, which is free at the client.

use std::collections::BTreeMap;

/// Commands of one program at a time: more than threads it can have.
const MOST: usize = 1024;

/// Where the reply to a program's command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// The program's id for it.
    pub(super) id: u16,
    /// Which program; see [`Asks::forget`].
    program: u64,
}

/// A program has more commands under way than it may.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooMany;

/// The commands that the client has not answered, by the id which it knows.
#[derive(Debug, Default)]
pub(super) struct Asks {
    asked: BTreeMap<u16, Asked>,
    next: u16,
    program: u64,
    /// Those of the present program.
    own: usize,
}

impl Asks {
    /// The id for a command of the present program.
    pub(super) fn ask(&mut self, id: u16) -> Result<u16, TooMany> {
        let room = self.asked.len() <= usize::from(u16::MAX);
        if self.own >= MOST || !room {
            return Err(TooMany);
        }
        while self.asked.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let free = self.next;
        self.next = free.wrapping_add(1);
        let program = self.program;
        self.asked.insert(free, Asked { id, program });
        self.own += 1;
        Ok(free)
    }

    /// Takes what a reply answers: `None` if nobody has asked, `Some(None)` if who asked is gone.
    pub(super) fn answer(&mut self, id: u16) -> Option<Option<u16>> {
        let asked = self.asked.remove(&id)?;
        if asked.program != self.program {
            return Some(None);
        }
        self.own -= 1;
        Some(Some(asked.id))
    }

    /// The present program is gone.
    pub(super) fn forget(&mut self) {
        self.program += 1;
        self.own = 0;
    }

    /// Whether the present program waits for an answer.
    pub(super) fn is_waiting(&self) -> bool {
        self.own > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_ids_of_a_program_are_told_apart() {
        let mut asks = Asks::default();
        let (one, two) = (asks.ask(5).unwrap(), asks.ask(5).unwrap());

        assert_ne!(one, two);
        assert_eq!(asks.answer(two), Some(Some(5)));
        assert_eq!(asks.answer(two), None);
        assert!(asks.is_waiting());
        assert_eq!(asks.answer(one), Some(Some(5)));
        assert!(!asks.is_waiting());
    }

    #[test]
    fn reply_for_a_program_that_is_gone_is_for_nobody() {
        let mut asks = Asks::default();
        let old = asks.ask(1).unwrap();
        asks.forget();
        let new = asks.ask(1).unwrap();

        assert_ne!(old, new);
        assert_eq!(asks.answer(old), Some(None));
        assert_eq!(asks.answer(new), Some(Some(1)));
    }

    #[test]
    fn id_that_the_client_still_has_is_not_given_again() {
        let mut asks = Asks::default();
        let kept = asks.ask(0).unwrap();
        for id in 0..=u16::MAX {
            let given = asks.ask(id).unwrap();
            assert_ne!(given, kept);
            asks.answer(given).unwrap();
        }
    }

    #[test]
    fn program_that_asks_without_end_is_stopped() {
        let mut asks = Asks::default();
        for id in 0..1024 {
            asks.ask(id).unwrap();
        }

        assert_eq!(asks.ask(0), Err(TooMany));
        for _ in 0..70 {
            asks.forget();
            while asks.ask(0).is_ok() {}
        }
        assert_eq!(asks.ask(0), Err(TooMany));
    }
}
