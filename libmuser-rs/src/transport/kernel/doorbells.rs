// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Doorbells: an eventfd for each area of them, and one descriptor for those and the node.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use muser_uapi::*;
use nix::errno::Errno as Number;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::size_of_u32;
use crate::error::{Error, Result};
use crate::region::AreaKind;
use crate::sys;
use crate::transport::{Description, Operation};

/// The doorbells of a device that has any.
#[derive(Debug)]
pub(super) struct Doorbells {
    /// Readable when the node is or a doorbell was rung.
    either: Epoll,
    bells: Vec<Bell>,
    /// Turns so far.
    turns: AtomicU32,
    /// The bell to look at first: the one behind that which was taken last.
    next: AtomicUsize,
}

#[derive(Debug)]
struct Bell {
    region: u32,
    offset: u64,
    event: EventFd,
}

impl Doorbells {
    /// Joins each doorbell area with an eventfd, all of which fire at once.
    pub(super) fn join(node: BorrowedFd<'_>, description: &Description) -> Result<Option<Self>> {
        let regions = description.regions.iter();
        let areas = regions.flat_map(|region| region.areas.iter().map(move |area| (region, area)));
        let mut bells = Vec::new();
        for (number, (region, area)) in (0..).zip(areas) {
            if area.kind != AreaKind::Doorbell {
                continue;
            }
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let event = EventFd::from_value_and_flags(0, flags).map_err(failed)?;
            let size = size_of_u32::<muser_doorbell>();
            sys::doorbell(node, size, number, event.as_fd()).map_err(failed)?;
            bells.push(Bell {
                region: region.index,
                offset: area.offset,
                event,
            });
        }
        if bells.is_empty() {
            return Ok(None);
        }
        let either = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let readable = || EpollEvent::new(EpollFlags::EPOLLIN, 0);
        either.add(node, readable()).map_err(failed)?;
        for bell in &bells {
            either.add(&bell.event, readable()).map_err(failed)?;
        }
        Ok(Some(Self {
            either,
            bells,
            turns: AtomicU32::new(0),
            next: AtomicUsize::new(0),
        }))
    }

    /// Whether it is the bells' turn to go before the requests, so that a stream of those can't keep
    /// them waiting for ever.
    pub(super) fn go_first(&self) -> bool {
        const EVERY: u32 = 64;
        self.turns.fetch_add(1, Ordering::Relaxed) % EVERY == EVERY - 1
    }

    /// Takes a ring that nobody has taken yet. The bells have turns, so that none that rings all the
    /// time can keep another waiting.
    pub(super) fn take(&self) -> Option<Operation> {
        let next = self.next.load(Ordering::Relaxed) % self.bells.len();
        let (before, first) = self.bells.split_at(next);
        let mut bells = (next..).zip(first).chain((0..).zip(before));
        let (number, rung) = bells.find(|(_, bell)| bell.event.read().is_ok())?;
        self.next.store(number + 1, Ordering::Relaxed);
        Some(Operation::Doorbell {
            region: rung.region,
            offset: rung.offset,
        })
    }
}

impl AsFd for Doorbells {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.either.0.as_fd()
    }
}

fn failed(errno: Number) -> Error {
    Error::io("setting up doorbells", errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doorbells(count: u64) -> Doorbells {
        let bells = (0..count).map(|offset| Bell {
            region: 0,
            offset,
            event: EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap(),
        });
        Doorbells {
            either: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap(),
            bells: bells.collect(),
            turns: AtomicU32::new(0),
            next: AtomicUsize::new(0),
        }
    }

    fn taken(doorbells: &Doorbells) -> Option<u64> {
        doorbells.take().map(|operation| match operation {
            Operation::Doorbell { region: 0, offset } => offset,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn bell_that_rings_all_the_time_keeps_none_waiting() {
        let doorbells = doorbells(3);
        let ring = |number: usize| doorbells.bells[number].event.write(1).unwrap();
        ring(2);
        let order: Vec<_> = (0..3)
            .map(|_| {
                ring(0);
                ring(1);
                taken(&doorbells)
            })
            .collect();

        assert_eq!(order, [Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn ring_is_taken_once_wherever_the_last_one_was() {
        let doorbells = doorbells(2);
        for number in [1, 0, 0, 1, 1] {
            doorbells.bells[number].event.write(3).unwrap();
            assert_eq!(taken(&doorbells), Some(number as u64));
            assert_eq!(taken(&doorbells), None);
        }
    }
}
