// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The admin command set (section 5).
//!
//! What a command writes to the host's memory it writes before it has ended, and it may do so twice;
//! what it changes of the controller changes together with its completion, and once ([`Change`]).

use std::fmt;

use crate::command::{Answer, Command};
use crate::controller::Core;
use crate::kept::Whole;
use crate::spec::*;
use crate::{feature, identify, log_page, transfer};

/// What a command comes to.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done(Answer),
    Change(Change),
    /// Asynchronous Event Request: it ends when there is an event.
    Held,
}

/// What is done in one step with the completion, which it gives the answer for.
pub(crate) struct Change(Box<dyn FnOnce(&mut Whole) -> Answer + Send>);

impl Change {
    fn new(work: impl FnOnce(&mut Whole) -> Answer + Send + 'static) -> Self {
        Self(Box::new(work))
    }

    /// The end of a request for events: with the next one there is.
    pub(crate) fn telling() -> Self {
        Self::new(|whole| match whole.control.take_event() {
            Some(event) => Answer::value(event.dword()),
            // Nobody else takes events, so there is one.
            None => Status::INTERNAL_ERROR.into(),
        })
    }

    pub(crate) fn make(self, whole: &mut Whole) -> Answer {
        self.0(whole)
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Change")
    }
}

/// Carries out a command; `held` is how many requests for events are there already.
pub(crate) fn execute(core: &Core, command: &Command, held: usize) -> Outcome {
    // Data of admin commands is pointed to by PRPs, over PCI Express (4.3).
    if command.is_odd() || command.psdt() != 0 {
        return Outcome::Done(Status::INVALID_FIELD.into());
    }
    let done = match command.opcode {
        admin::CREATE_CQ => return create_cq(core, command),
        admin::CREATE_SQ => return create_sq(core, command),
        admin::DELETE_CQ => return delete_cq(core, command),
        admin::DELETE_SQ => return delete_sq(core, command),
        admin::EVENT_REQUEST if held < EVENT_REQUESTS => return Outcome::Held,
        admin::EVENT_REQUEST => Err(Status::TOO_MANY_EVENT_REQUESTS),
        admin::SET_FEATURES => {
            let (config, command) = (core.config.clone(), *command);
            return Outcome::Change(Change::new(move |whole| {
                feature::set(&config, &mut whole.control, &command)
            }));
        }
        admin::GET_FEATURES => {
            let features = core.kept.control().features;
            Ok(feature::get(&core.config, &features, command))
        }
        admin::IDENTIFY => identify(core, command),
        admin::GET_LOG_PAGE => return get_log_page(core, command),
        // What is under way ends soon: nothing is aborted.
        admin::ABORT => Ok(Answer::value(1)),
        _ => Err(Status::INVALID_OPCODE),
    };
    Outcome::Done(done.unwrap_or_else(Answer::from))
}

fn identify(core: &Core, command: &Command) -> Result<Answer, Status> {
    let cns = command.cdw10.get() & 0xff;
    let data = identify::data(core, cns, command.nsid.get())?;
    transfer::to_host(core, command, &data)?;
    Ok(Answer::SUCCESS)
}

fn get_log_page(core: &Core, command: &Command) -> Outcome {
    match read_log_page(core, command) {
        Err(status) => Outcome::Done(status.into()),
        Ok((page, retain)) => Outcome::Change(Change::new(move |whole| {
            if !retain {
                whole.control.page_read(page);
            }
            Answer::SUCCESS
        })),
    }
}

/// Gives the host what it wants of a page; which that is, and whether its events are held back on.
fn read_log_page(core: &Core, command: &Command) -> Result<(u8, bool), Status> {
    let [page, flags, lower @ ..] = command.cdw10.get().to_le_bytes();
    let upper = command.cdw11.get() & 0xffff;
    let dwords = u64::from(upper) << 16 | u64::from(u16::from_le_bytes(lower));
    let offset = u64::from(command.cdw13.get()) << 32 | u64::from(command.cdw12.get());
    if !matches!(command.nsid.get(), 0 | NAMESPACE | ALL_NAMESPACES) {
        return Err(Status::INVALID_NAMESPACE);
    }
    let data = log_page::page(core, &core.kept.control(), page)?;
    let all = data.len() as u64;
    if offset % 4 != 0 || offset > all {
        return Err(Status::INVALID_FIELD);
    }
    // What is asked for beyond a page's end is undefined; here it is not written.
    let len = ((dwords + 1) * 4).min(all - offset);
    let range = offset..offset + len;
    let range = usize::try_from(range.start)
        .ok()
        .zip(usize::try_from(range.end).ok());
    let part = range.and_then(|(start, end)| data.get(start..end));
    match part.unwrap_or(&[]) {
        [] => {}
        part => transfer::to_host(core, command, part)?,
    }
    Ok((page, flags & 1 << 7 != 0))
}

/// What the commands that create queues have in common: number, entries, and where.
struct Wanted {
    number: usize,
    size: u32,
    base: u64,
}

impl Wanted {
    fn new(core: &Core, command: &Command) -> Result<Self, Status> {
        let (cdw10, base) = (command.cdw10.get(), command.dptr[0].get());
        let number = usize::try_from(cdw10 & 0xffff).unwrap_or(0);
        let size = (cdw10 >> 16) + 1;
        if number == 0 || number > usize::from(core.config.queues) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let sizes = core.kept.control().has_entry_sizes();
        if !sizes || !(2..=QUEUE_ENTRIES).contains(&size) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        // Queues must be contiguous (CAP.CQR).
        if command.cdw11.get() & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if base % PAGE as u64 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        Ok(Self { number, size, base })
    }
}

fn create_cq(core: &Core, command: &Command) -> Outcome {
    let wanted = match Wanted::new(core, command) {
        Ok(wanted) => wanted,
        Err(status) => return Outcome::Done(status.into()),
    };
    let (vector, enabled) = (command.cdw11.get() >> 16, command.cdw11.get() & 2 != 0);
    if vector > u32::from(core.config.queues) {
        return Outcome::Done(Status::INVALID_VECTOR.into());
    }
    core.clear_doorbell(wanted.number, true);
    Outcome::Change(Change::new(move |whole| {
        let cq = &mut whole.cqs[wanted.number];
        if cq.exists() {
            return Status::INVALID_QUEUE_ID.into();
        }
        cq.create(wanted.base, wanted.size, enabled.then_some(vector));
        Answer::SUCCESS
    }))
}

fn create_sq(core: &Core, command: &Command) -> Outcome {
    let wanted = match Wanted::new(core, command) {
        Ok(wanted) => wanted,
        Err(status) => return Outcome::Done(status.into()),
    };
    let cq = command.cdw11.get() >> 16;
    let place = usize::try_from(cq).unwrap_or(usize::MAX);
    if core.kept.sq(wanted.number).exists() {
        return Outcome::Done(Status::INVALID_QUEUE_ID.into());
    }
    core.clear_doorbell(wanted.number, false);
    Outcome::Change(Change::new(move |whole| {
        let completion = whole.cqs.get(place).filter(|cq| cq.exists());
        if place == 0 || completion.is_none() {
            return Status::INVALID_COMPLETION_QUEUE.into();
        }
        whole.sqs[wanted.number].create(wanted.base, wanted.size, cq);
        Answer::SUCCESS
    }))
}

/// The number of an I/O queue that is to be deleted.
fn number(core: &Core, command: &Command) -> Option<usize> {
    let number = usize::try_from(command.cdw10.get() & 0xffff).ok()?;
    (1..=usize::from(core.config.queues))
        .contains(&number)
        .then_some(number)
}

fn delete_cq(core: &Core, command: &Command) -> Outcome {
    let Some(number) = number(core, command) else {
        return Outcome::Done(Status::INVALID_QUEUE_ID.into());
    };
    Outcome::Change(Change::new(move |whole| {
        if !whole.cqs[number].exists() {
            return Status::INVALID_QUEUE_ID.into();
        }
        let mut sqs = whole.sqs.iter();
        if sqs.any(|sq| sq.exists() && usize::try_from(sq.cq) == Ok(number)) {
            return Status::INVALID_QUEUE_DELETION.into();
        }
        whole.cqs[number].delete();
        Answer::SUCCESS
    }))
}

/// Deletes a submission queue: first nothing of it is begun any more, then what is under way ends,
/// and then it is gone, together with the completion that says so.
fn delete_sq(core: &Core, command: &Command) -> Outcome {
    let Some(number) = number(core, command) else {
        return Outcome::Done(Status::INVALID_QUEUE_ID.into());
    };
    let closed = core.kept.change_sq(number, |sq| {
        sq.closing = sq.exists().into();
        sq.exists()
    });
    match closed {
        Ok(true) => {}
        Ok(false) => return Outcome::Done(Status::INVALID_QUEUE_ID.into()),
        // It is another process's to be deleted.
        Err(_) => return Outcome::Held,
    }
    core.pause(number).worker().forget();
    Outcome::Change(Change::new(move |whole| {
        whole.sqs[number].delete();
        Answer::SUCCESS
    }))
}
