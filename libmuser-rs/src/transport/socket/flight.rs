// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device is at: a command of the client's, which may be several requests one after the
//! other.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::access::{Access, Next};
use super::hub::{Served, State};
use super::session::ReplyTo;
use crate::error::Errno;
use crate::transport::dma::Mapped;
use crate::transport::{Operation, RequestId};
use crate::vfio_user::wire::payload;
use crate::vfio_user::wire::request::{DmaUnmap, WriteMulti};

/// A command under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) id: RequestId,
    /// Whoever waits for it.
    to: Option<ReplyTo>,
    work: Work,
    /// Whether nothing may start before it has ended.
    pub(super) excludes: bool,
    /// Whether it is the reset after a client.
    pub(super) closes: bool,
    pub(super) replay: bool,
    /// The next part, if the device does not do it yet, with its data.
    next: Option<(Operation, Vec<u8>)>,
}

/// What it is that the device does.
#[derive(Debug)]
enum Work {
    Access(Access),
    Multi(Multi),
    Unmap(Unmap),
    Reset,
    Close,
    /// A write that came by eventfd.
    Signal,
}

/// Several writes.
#[derive(Debug)]
pub(super) struct Multi {
    /// The payload of the command.
    payload: Vec<u8>,
    /// Which of them is next.
    at: usize,
    /// How many are done.
    done: u64,
    access: Option<Access>,
}

/// Memory that goes.
#[derive(Debug)]
pub(super) struct Unmap {
    pub(super) request: DmaUnmap,
    pub(super) going: Vec<Arc<Mapped>>,
    /// Which of them the device has to let go next.
    at: usize,
}

impl Flight {
    fn new(id: RequestId, to: Option<ReplyTo>, work: Work, excludes: bool) -> Self {
        Self {
            id,
            to,
            work,
            excludes,
            closes: false,
            replay: to.is_some_and(|to| to.is_replay()),
            next: None,
        }
    }

    pub(super) fn access(id: RequestId, to: ReplyTo, access: Access) -> Self {
        Self::new(id, Some(to), Work::Access(access), to.is_posted())
    }

    pub(super) fn multi(id: RequestId, to: ReplyTo, multi: Multi) -> Self {
        Self::new(id, Some(to), Work::Multi(multi), true)
    }

    pub(super) fn unmap(id: RequestId, to: ReplyTo, unmap: Unmap) -> Self {
        Self::new(id, Some(to), Work::Unmap(unmap), true)
    }

    pub(super) fn reset(id: RequestId, to: ReplyTo) -> Self {
        Self::new(id, Some(to), Work::Reset, true)
    }

    pub(super) fn close(id: RequestId) -> Self {
        Self {
            closes: true,
            ..Self::new(id, None, Work::Close, true)
        }
    }

    pub(super) fn signal(id: RequestId) -> Self {
        Self::new(id, None, Work::Signal, false)
    }

    /// Whether its number is one of this server's, rather than a supervisor's.
    pub(super) fn has_own_number(&self) -> bool {
        self.to.is_none_or(|to| to.number() == 0)
    }

    /// The next part, whose data goes to `data`.
    pub(super) fn operation(&mut self, data: &mut Vec<u8>) -> Option<Operation> {
        let (operation, bytes) = self.next.take()?;
        *data = bytes;
        Some(operation)
    }
}

impl Multi {
    pub(super) const fn new(payload: Vec<u8>) -> Self {
        Self {
            payload,
            at: 0,
            done: 0,
            access: None,
        }
    }

    /// Goes on with the next write that the device has to do. `result` is that of those before it.
    pub(super) fn go_on(&mut self, served: &Served, data: &mut Vec<u8>) -> Next {
        loop {
            let write = WriteMulti::of(&self.payload).and_then(|writes| writes.nth(self.at));
            let Some(write) = write else {
                return self.end(Ok(()));
            };
            self.at += 1;
            let info = served.description.region(write.access.region);
            data.clear();
            data.extend_from_slice(write.data());
            let access = Access::new(info, write.access.offset, data.len(), true);
            let (mut access, info) = match (access, info) {
                (Ok(access), Some(info)) => (access, info),
                (Err(errno), _) => return self.end(Err(errno)),
                (_, None) => return self.end(Err(Errno::EINVAL)),
            };
            match access.start(info, &served.areas, data) {
                Next::Device(operation) => {
                    self.access = Some(access);
                    return Next::Device(operation);
                }
                Next::Ended(Ok(_)) => self.done += 1,
                Next::Ended(Err(errno)) => return self.end(Err(errno)),
            }
        }
    }

    fn advance(&mut self, served: &Served, result: Result<(), Errno>, data: &mut Vec<u8>) -> Next {
        let Some(mut access) = self.access.take() else {
            return self.end(Err(Errno::EIO));
        };
        let Some(info) = served.description.region(access.region) else {
            return self.end(Err(Errno::EIO));
        };
        match access.done(info, &served.areas, result, data) {
            Next::Device(operation) => {
                self.access = Some(access);
                Next::Device(operation)
            }
            Next::Ended(Ok(_)) => {
                self.done += 1;
                self.go_on(served, data)
            }
            Next::Ended(Err(errno)) => self.end(Err(errno)),
        }
    }

    /// It fails if none of its writes was done; else the client hears how many were.
    fn end(&self, result: Result<(), Errno>) -> Next {
        let done = usize::try_from(self.done).unwrap_or(usize::MAX);
        Next::Ended(match result {
            Err(errno) if done == 0 => Err(errno),
            _ => Ok(done),
        })
    }
}

impl Unmap {
    pub(super) const fn new(request: DmaUnmap, going: Vec<Arc<Mapped>>) -> Self {
        Self {
            request,
            going,
            at: 0,
        }
    }

    /// The next mapping which the device has used, and so has to let go.
    pub(super) fn next(&mut self) -> Option<Operation> {
        let rest = self.going.get(self.at..)?;
        let used = rest.iter().position(|mapped| mapped.is_used())?;
        let range = rest[used].range();
        self.at += used + 1;
        Some(Operation::Unmap {
            iova: range.first(),
            length: range.len(),
        })
    }
}

impl State {
    /// The device has done a part of a flight; what it has read is in `data`. Tells whether the
    /// flight has ended. Else its next part is ready.
    pub(super) fn advance(
        &mut self,
        flight: &mut Flight,
        result: Result<(), Errno>,
        data: &mut Vec<u8>,
    ) -> bool {
        let Some(served) = &self.served else {
            return true;
        };
        let next = match &mut flight.work {
            Work::Access(access) => match served.description.region(access.region) {
                Some(info) => access.done(info, &served.areas, result, data),
                None => Next::Ended(Err(Errno::EIO)),
            },
            Work::Multi(multi) => multi.advance(served, result, data),
            Work::Unmap(unmap) => {
                // The device can't refuse.
                data.clear();
                unmap.next().map_or(Next::Ended(Ok(0)), Next::Device)
            }
            Work::Reset | Work::Close | Work::Signal => Next::Ended(result.map(|()| 0)),
        };
        match next {
            Next::Device(operation) => {
                flight.next = Some((operation, std::mem::take(data)));
                false
            }
            Next::Ended(result) => {
                self.land(flight, result, data);
                true
            }
        }
    }

    /// Replies to whoever waits.
    fn land(&mut self, flight: &mut Flight, result: Result<usize, Errno>, data: &[u8]) {
        let Some(to) = flight.to else {
            return;
        };
        match (&mut flight.work, result) {
            (Work::Unmap(unmap), _) => self.end_unmap(to, unmap),
            (_, Err(errno)) => self.reply_to(to, Err(errno)),
            (Work::Access(access), Ok(count)) => {
                let fixed = access.reply(count);
                let data = if access.is_write() { &[] } else { data };
                self.reply_to(to, Ok(&[fixed.as_bytes(), data]));
            }
            (Work::Multi(_), Ok(count)) => {
                let fixed = payload::WriteMulti {
                    count: count as u64,
                };
                self.reply_to(to, Ok(&[fixed.as_bytes()]));
            }
            (Work::Reset | Work::Close | Work::Signal, Ok(_)) => self.reply_to(to, Ok(&[])),
        }
    }
}
