// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that have a link and do not serve yet: they say what their device is, and are seated when
//! nobody else serves, or are refused.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::device::Kept;
use super::link::{Program, Stream};
use super::{Supervisor, MOST_CANDIDATES};
use crate::vfio_user::control::{self, Attach, Attached, Packet, Received};

/// A program that has a link.
#[derive(Debug)]
pub(super) struct Candidate {
    control: OwnedFd,
    /// What it has said of itself.
    attach: Option<Attach>,
    done: bool,
}

impl Candidate {
    fn refuse(&mut self, errno: i32, sentence: String) {
        log::warn!("a program is refused: {sentence}");
        // One that does not receive hears of it by the end of its socket.
        let _ = control::send(self.as_fd(), &Packet::Refused(errno, sentence), &[]);
        self.done = true;
    }

    /// Whether it has gone, or was sent away.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }
}

impl AsFd for Candidate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

impl Supervisor {
    /// Takes in those whose links were made.
    pub(super) fn meet_candidates(&mut self) {
        for control in self.links.take() {
            if self.candidates.len() >= MOST_CANDIDATES {
                log::warn!("a link is closed: {MOST_CANDIDATES} others were not used yet");
                continue;
            }
            self.candidates.push(Candidate {
                control,
                attach: None,
                done: false,
            });
        }
    }

    /// A candidate says something.
    pub(super) fn hear(&mut self, at: usize) {
        let served = self.is_served();
        let Some(candidate) = self.candidates.get_mut(at) else {
            return;
        };
        match control::receive(candidate.as_fd()) {
            Received::Nothing => {}
            Received::Closed => candidate.done = true,
            Received::Malformed(malformed) => {
                candidate.refuse(libc::EPROTO, format!("what it says of itself: {malformed}"));
            }
            Received::Packet(Packet::Attach(attach), _) if candidate.attach.is_none() => {
                if served && !attach.standby {
                    candidate.refuse(libc::EBUSY, "another process serves it already".into());
                } else {
                    candidate.attach = Some(attach);
                }
            }
            Received::Packet(..) => {
                candidate.refuse(libc::EPROTO, "it says what nobody has asked for".into());
            }
        }
    }

    /// The first candidate that has said what its device is serves, if nobody does.
    pub(super) fn seat_candidate(&mut self) {
        while self.program.is_none() {
            let mut candidates = self.candidates.iter();
            let Some(at) = candidates.position(|candidate| candidate.attach.is_some()) else {
                return;
            };
            let mut candidate = self.candidates.remove(at);
            let Some(attach) = candidate.attach.take() else {
                return;
            };
            let device = self.device.take().filter(Kept::is_complete);
            let device = match device {
                Some(device) => match device.refusal(&attach) {
                    Some((errno, sentence)) => {
                        candidate.refuse(errno, sentence);
                        self.device = Some(device);
                        continue;
                    }
                    None => device,
                },
                None => Kept::new(attach),
            };
            self.seat(candidate.control, device);
        }
    }

    /// A program serves from now on.
    fn seat(&mut self, control: OwnedFd, device: Kept) {
        let attached = Attached {
            recovered: device.is_complete(),
            closing: self.closing,
            session: self.client.is_some(),
        };
        let program = Program::new(control);
        let told = program.tell(&Packet::Attached(attached), &device.descriptors());
        self.device = Some(device);
        if let Err(error) = told {
            log::error!("a program is given up: {error}");
            return;
        }
        log::debug!("a program has attached");
        self.counters.attachments += 1;
        self.program = Some(program);
        if self.closing {
            if let Some(program) = &mut self.program {
                program.close();
            }
        }
        self.open_stream();
        // Before everything is set up, requests wait on.
        let stream = self.program.as_ref().map(|program| program.stream.as_ref());
        if stream.is_some_and(|stream| stream.is_none_or(Stream::is_set_up)) {
            self.unserved_since = None;
        }
    }
}
