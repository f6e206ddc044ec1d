// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Asynchronous events (section 5.2): what happens, and is told to a host that has asked.
//!
//! An event that was told is told again only after the host has read its log page. Those of one
//! type are held back together.

use crate::kept::Control;
use crate::log_page;

/// What can happen (figures 147 to 149).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A write to the doorbell of a queue that is not there.
    InvalidDoorbellRegister,
    /// A value that no doorbell of such a queue can have.
    InvalidDoorbellValue,
    /// The temperature has gone beyond a threshold.
    Temperature,
}

impl Event {
    const ALL: [Self; 3] = [
        Self::InvalidDoorbellRegister,
        Self::InvalidDoorbellValue,
        Self::Temperature,
    ];

    fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Type, information, and log page.
    fn parts(self) -> (u32, u32, u8) {
        match self {
            Self::InvalidDoorbellRegister => (0, 0, log_page::ERROR),
            Self::InvalidDoorbellValue => (0, 1, log_page::ERROR),
            Self::Temperature => (1, 1, log_page::SMART),
        }
    }

    /// Dword 0 of the completion that tells of it.
    pub(crate) fn dword(self) -> u32 {
        let (kind, information, page) = self.parts();
        u32::from(page) << 16 | information << 8 | kind
    }
}

impl Control {
    /// Notes an event, unless the host does not want to know of it.
    pub(crate) fn note(&mut self, event: Event) {
        // Events of SMART are asked for bit by bit, as its warnings are; errors are always told.
        let wanted = event != Event::Temperature || self.features.events & 1 << 1 != 0;
        let held_back = self.told & event.bit() != 0;
        if wanted && !held_back {
            self.events |= event.bit();
        }
    }

    /// The next event to be told.
    pub(crate) fn next_event(&self) -> Option<Event> {
        let told = |kind| {
            let mut all = Event::ALL.iter();
            all.any(|event| self.told & event.bit() != 0 && event.parts().0 == kind)
        };
        let waits = |event: &&Event| self.events & event.bit() != 0 && !told(event.parts().0);
        Event::ALL.iter().find(waits).copied()
    }

    /// The next event, which is told now.
    pub(crate) fn take_event(&mut self) -> Option<Event> {
        let event = self.next_event()?;
        self.events &= !event.bit();
        self.told |= event.bit();
        Some(event)
    }

    /// The host has read a log page.
    pub(crate) fn page_read(&mut self, page: u8) {
        for event in Event::ALL {
            if event.parts().2 == page {
                self.told &= !event.bit();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn event_is_told_once_until_its_page_is_read() {
        let mut control = Control::new_zeroed();
        control.note(Event::InvalidDoorbellValue);
        control.note(Event::InvalidDoorbellRegister);

        assert_eq!(control.take_event(), Some(Event::InvalidDoorbellRegister));
        // The other one is of the same type.
        assert_eq!(control.take_event(), None);
        control.note(Event::InvalidDoorbellRegister);
        control.page_read(log_page::SMART);
        assert_eq!(control.take_event(), None);
        control.page_read(log_page::ERROR);

        assert_eq!(control.take_event(), Some(Event::InvalidDoorbellValue));
        assert_eq!(control.take_event(), None);
    }

    #[test]
    fn warning_that_nobody_wants_is_not_told() {
        let mut control = Control::new_zeroed();
        control.note(Event::Temperature);
        assert_eq!(control.take_event(), None);

        control.features.events = 2;
        control.note(Event::Temperature);

        assert_eq!(control.take_event(), Some(Event::Temperature));
        assert_eq!(Event::Temperature.dword(), 0x0002_0101);
    }
}
