// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO_DEVICE_SET_IRQS` and what an interrupt does, as `muser.ko` has them: for the transports
//! which handle it in this process.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno as Number;

use super::{Description, IrqInfo, Trigger};
use crate::error::{Errno, Error, Result};

/// What `VFIO_DEVICE_SET_IRQS` does with vectors (`VFIO_IRQ_SET_ACTION_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqAction {
    /// Hold them back.
    Mask,
    /// Let them through again.
    Unmask,
    /// Say what happens when they fire, or fire them.
    Trigger,
}

/// Which vectors `VFIO_DEVICE_SET_IRQS` means, from the start given on (`VFIO_IRQ_SET_DATA_*`).
#[non_exhaustive]
pub enum IrqData<'a> {
    /// This many. None at all, with [`IrqAction::Trigger`] and start 0, disables the index.
    None(usize),
    /// Those which are true.
    Bools(&'a [bool]),
    /// As many as there are elements; each gets this eventfd, or none any more.
    EventFds(&'a [Option<BorrowedFd<'a>>]),
    /// As many as there are elements; each gets this function, or none any more. It is called in
    /// the thread that raises the interrupt: it must not wait, nor use the device.
    Calls(Vec<Option<Arc<dyn Fn() + Send + Sync>>>),
}

impl IrqData<'_> {
    fn count(&self) -> usize {
        match self {
            Self::None(count) => *count,
            Self::Bools(chosen) => chosen.len(),
            Self::EventFds(fds) => fds.len(),
            Self::Calls(calls) => calls.len(),
        }
    }
}

impl fmt::Debug for IrqData<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None(count) => f.debug_tuple("None").field(count).finish(),
            Self::Bools(chosen) => f.debug_tuple("Bools").field(chosen).finish(),
            Self::EventFds(fds) => f.debug_tuple("EventFds").field(fds).finish(),
            Self::Calls(calls) => f.debug_tuple("Calls").field(&calls.len()).finish(),
        }
    }
}

/// The interrupts of a device, as its clients have set them up.
#[derive(Debug, Default)]
pub(crate) struct Irqs {
    indexes: Mutex<Vec<Index>>,
}

#[derive(Debug)]
struct Index {
    info: IrqInfo,
    vectors: Vec<Vector>,
}

#[derive(Debug, Default)]
struct Vector {
    handler: Option<Handler>,
    masked: bool,
    /// Of an edge: fired while masked. Of a level: the line is up.
    pending: bool,
}

/// What happens when a vector fires.
#[derive(Clone)]
enum Handler {
    EventFd(Arc<OwnedFd>),
    Call(Arc<dyn Fn() + Send + Sync>),
}

impl Irqs {
    pub(crate) fn describe(&self, description: &Description) {
        let index = |info: &IrqInfo| Index {
            info: *info,
            vectors: (0..info.count).map(|_| Vector::default()).collect(),
        };
        *self.lock() = description.irqs.iter().map(index).collect();
    }

    pub(crate) fn disable_all(&self) {
        for index in self.lock().iter_mut() {
            index.disable();
            // What was raised for this client is not for the next.
            for vector in &mut index.vectors {
                vector.pending = false;
            }
        }
    }

    pub(crate) fn set(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> io::Result<()> {
        let mut indexes = self.lock();
        let index = find(&mut indexes, index).ok_or(Number::EINVAL)?;
        let count = data.count();
        if count == 0 {
            let disable = matches!((action, &data), (IrqAction::Trigger, IrqData::None(0)));
            if !disable || start != 0 {
                return Err(Number::EINVAL.into());
            }
            index.disable();
            return Ok(());
        }
        if action != IrqAction::Trigger && !index.info.maskable {
            return Err(Number::EINVAL.into());
        }
        let start = start as usize;
        let end = start.checked_add(count).ok_or(Number::EINVAL)?;
        let automasked = index.info.automasked;
        let vectors = index.vectors.get_mut(start..end).ok_or(Number::EINVAL)?;
        let handlers = match (action, data) {
            (IrqAction::Trigger, IrqData::EventFds(fds)) => {
                let handler = |fd: &BorrowedFd<'_>| {
                    fd.try_clone_to_owned()
                        .map(|fd| Handler::EventFd(Arc::new(fd)))
                };
                let handlers = fds.iter().map(|fd| fd.as_ref().map(handler).transpose());
                handlers.collect::<io::Result<Vec<_>>>()?
            }
            (IrqAction::Trigger, IrqData::Calls(calls)) => calls
                .into_iter()
                .map(|call| call.map(Handler::Call))
                .collect(),
            (action, IrqData::None(_)) => {
                vectors
                    .iter_mut()
                    .for_each(|vector| vector.act(action, automasked));
                return Ok(());
            }
            (action, IrqData::Bools(chosen)) => {
                let vectors = vectors.iter_mut().zip(chosen);
                for (vector, _) in vectors.filter(|(_, chosen)| **chosen) {
                    vector.act(action, automasked);
                }
                return Ok(());
            }
            // Masking by eventfd needs somebody who polls it, which in this process nobody does.
            (IrqAction::Mask | IrqAction::Unmask, _) => return Err(Number::EOPNOTSUPP.into()),
        };
        for (vector, handler) in vectors.iter_mut().zip(handlers) {
            vector.handler = handler;
            vector.pending &= automasked || vector.handler.is_some();
            vector.settle(automasked);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Index>> {
        self.indexes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_vector<R>(
        &self,
        index: u32,
        vector: u32,
        work: impl FnOnce(&mut Vector, &IrqInfo) -> Result<R>,
    ) -> Result<R> {
        let mut indexes = self.lock();
        let missing = |errno, what| Error::new(errno, format!("no such interrupt {what}"));
        let index = find(&mut indexes, index).ok_or_else(|| missing(Errno::ENXIO, "index"))?;
        let vector = index
            .vectors
            .get_mut(vector as usize)
            .ok_or_else(|| missing(Errno::ENOSPC, "vector"))?;
        work(vector, &index.info)
    }
}

fn find(indexes: &mut [Index], index: u32) -> Option<&mut Index> {
    indexes
        .iter_mut()
        .find(|candidate| candidate.info.index == index)
}

impl Index {
    /// Takes all handlers away; a line stays where the device has it.
    fn disable(&mut self) {
        for vector in &mut self.vectors {
            vector.handler = None;
            vector.masked = false;
            vector.pending &= self.info.automasked;
        }
    }
}

impl Vector {
    /// What a client does to a vector.
    fn act(&mut self, action: IrqAction, automasked: bool) {
        match action {
            IrqAction::Trigger => self.signal(),
            IrqAction::Mask => self.masked = true,
            IrqAction::Unmask => {
                self.masked = false;
                self.settle(automasked);
            }
        }
    }

    /// Fires what is pending, unless it is masked.
    fn settle(&mut self, automasked: bool) {
        if self.pending && !self.masked && self.handler.is_some() {
            self.signal();
            // A level stays up, and masks itself until the client has looked.
            self.masked = automasked;
            self.pending = automasked;
        }
    }

    fn signal(&self) {
        match &self.handler {
            Some(Handler::EventFd(fd)) => crate::sys::event::signal(fd.as_fd()),
            Some(Handler::Call(call)) => call(),
            None => {}
        }
    }
}

impl Trigger for Irqs {
    fn raise(&self, index: u32, vector: u32) -> Result<()> {
        self.with_vector(index, vector, |vector, info| {
            if vector.handler.is_some() || info.automasked {
                vector.pending = true;
                vector.settle(info.automasked);
            }
            Ok(())
        })
    }

    fn lower(&self, index: u32, vector: u32) -> Result<()> {
        self.with_vector(index, vector, |vector, info| {
            if !info.automasked {
                return Err(Error::new(
                    Errno::EOPNOTSUPP,
                    "the interrupt is not a level",
                ));
            }
            vector.pending = false;
            Ok(())
        })
    }

    fn eventfds(&self, index: u32) -> u32 {
        let mut indexes = self.lock();
        let vectors = find(&mut indexes, index).map(|index| &index.vectors);
        let enabled = vectors
            .into_iter()
            .flatten()
            .filter(|vector| vector.handler.is_some());
        u32::try_from(enabled.count()).unwrap_or(u32::MAX)
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EventFd(fd) => f.debug_tuple("EventFd").field(fd).finish(),
            Self::Call(_) => f.write_str("Call"),
        }
    }
}
