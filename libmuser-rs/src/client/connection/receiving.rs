// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What comes: replies for those who wait for them, and commands to be answered.

use std::sync::atomic::Ordering;
use std::sync::PoisonError;
use std::thread;
use std::time::Instant;

use super::{Answer, Channel, Connection, Goal};
use crate::client::failure::{self, Failure};
use crate::error::Errno;
use crate::vfio_user::stream::Message;
use crate::vfio_user::wire::{Header, Kind};

impl Connection {
    /// Takes what has come on a socket, and answers what the server asks for: until the deadline, and
    /// for as long as the server takes the answers. What is left then, is marked.
    pub(super) fn drain(
        &self,
        channel: &Channel,
        goal: Goal,
        deadline: Option<Instant>,
    ) -> Result<(), Failure> {
        let inbound = &mut *channel
            .inbound
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            // Flushed first: the socket may have room by now. What fails does so again for `flush`.
            let mut sender = channel.sender();
            let _ = sender.flush();
            let is_full = sender.is_full();
            drop(sender);
            if is_full {
                break;
            }
            let Some(message) = inbound.receiver.receive()? else {
                break;
            };
            self.take(channel, message, &mut inbound.scratch)?;
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let (over, reached) = match goal {
                // What was received costs no waiting.
                Goal::Nothing => (false, late),
                Goal::Answer(_) => (late, self.is_reached(goal, false)),
                Goal::Flushed | Goal::End => (late, false),
            };
            let over = over || self.ended.load(Ordering::Acquire);
            if over || reached && !inbound.receiver.is_ready() {
                break;
            }
        }
        let left = inbound.receiver.is_ready();
        channel.left.store(left, Ordering::Release);
        Ok(())
    }

    /// Gives a reply to the thread which waits for it, or answers a command.
    fn take(
        &self,
        channel: &Channel,
        message: Message<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let header = Header::parse(message.header()).ok_or_else(|| {
            Failure::protocol("the server has sent a message without a header".to_owned())
        })?;
        let kind = header.kind().map_err(|malformed| {
            Failure::protocol(format!(
                "the server has sent a message of which {malformed}"
            ))
        })?;
        match kind {
            Kind::Command { no_reply } => {
                let body = message.body();
                let has_descriptors = !message.descriptors.is_empty();
                self.answer(channel, header, body, has_descriptors, no_reply, scratch)
            }
            Kind::Reply(result) => self.deliver(header, result, message),
        }
    }

    fn deliver(
        &self,
        header: Header,
        result: Result<(), Errno>,
        message: Message<'_>,
    ) -> Result<(), Failure> {
        let waiting = &mut *self.lock();
        let id = header.id;
        let unknown = || Failure::protocol(failure::unexpected_reply(&header));
        let slot = waiting.slots.get_mut(&id).ok_or_else(unknown)?;
        if slot.command.number() != header.command {
            return Err(Failure::protocol(failure::wrong_command(
                &header,
                slot.command,
            )));
        }
        if slot.answer.is_some() {
            return Err(unknown());
        }
        let Some(thread) = slot.thread.clone() else {
            waiting.slots.remove(&id);
            return Ok(());
        };
        let mut body = waiting.spare.pop().unwrap_or_default();
        body.clear();
        body.extend_from_slice(message.body());
        slot.answer = Some(Answer {
            result,
            body,
            descriptors: message.descriptors,
        });
        if thread.id() != thread::current().id() {
            thread.unpark();
        }
        Ok(())
    }
}
