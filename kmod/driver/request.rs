// SPDX-License-Identifier: GPL-2.0
//! A request: what a client waits for, and a process answers.

use crate::{
    uapi::*,
    vfio::{
        page::PAGE_SIZE,
        wait::Completion, //
    },
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Release},
        new_mutex,
        Arc,
        Mutex, //
    },
    uaccess::{UserPtr, UserSlice}, //
};

/// What a client wants of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// To read bytes of a region.
    Read(Place),
    /// To write bytes of a region.
    Write(Place),
    /// To reset the device; nobody waits if `close` says that the last client is gone.
    Reset { close: bool },
    /// To unmap a range of IOVA, some pages of which are pinned.
    Unmap { iova: u64, len: u64 },
}

/// Part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Index of the region.
    pub(crate) region: u32,
    /// Offset in it.
    pub(crate) offset: u64,
    /// Bytes, at most [`MUSER_SLOT_DATA`].
    pub(crate) count: u32,
}

/// A request in flight, shared by its client's thread and the thread that answers it.
#[pin_data]
pub(crate) struct Request {
    kind: Kind,
    // Locked by one side at a time: the client before and after, the process in between.
    #[pin]
    data: Mutex<KVec<u8>>,
    result: Atomic<i32>,
    #[pin]
    done: Completion,
}

const _: () = assert!(MUSER_SLOT_DATA as usize <= PAGE_SIZE);

impl Request {
    /// Makes a read of a region.
    pub(crate) fn read(place: Place) -> Result<Arc<Self>> {
        let data = KVec::from_elem(0, place.count as usize, GFP_KERNEL_ACCOUNT)?;
        Self::new(Kind::Read(place), data)
    }

    /// Makes a write to a region, of bytes in the client's memory.
    pub(crate) fn write(place: Place, from: UserPtr) -> Result<Arc<Self>> {
        let mut data = KVec::with_capacity(place.count as usize, GFP_KERNEL_ACCOUNT)?;
        UserSlice::new(from, place.count as usize).read_all(&mut data, GFP_KERNEL_ACCOUNT)?;
        Self::new(Kind::Write(place), data)
    }

    /// Makes a reset.
    pub(crate) fn reset(close: bool) -> Result<Arc<Self>> {
        Self::new(Kind::Reset { close }, KVec::new())
    }

    /// Makes an unmap.
    pub(crate) fn unmap(iova: u64, len: u64) -> Result<Arc<Self>> {
        Self::new(Kind::Unmap { iova, len }, KVec::new())
    }

    fn new(kind: Kind, data: KVec<u8>) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                kind,
                data <- new_mutex!(data, "muser_request"),
                result: Atomic::new(0),
                done <- Completion::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// What it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it is an unmap.
    pub(crate) fn is_unmap(self: &Arc<Self>) -> bool {
        matches!(self.kind, Kind::Unmap { .. })
    }

    /// The head of the slot that carries it.
    pub(crate) fn slot(&self, id: u64, replay: bool) -> muser_slot {
        let replay = if replay { MUSER_REQUEST_REPLAY } else { 0 };
        let head = |kind, place: Place| muser_slot {
            id,
            kind,
            flags: replay,
            offset: place.offset,
            region: place.region,
            count: place.count,
            ..muser_slot::default()
        };
        match self.kind {
            Kind::Read(place) => head(MUSER_REQUEST_READ, place),
            Kind::Write(place) => head(MUSER_REQUEST_WRITE, place),
            Kind::Reset { close } => muser_slot {
                id,
                kind: MUSER_REQUEST_RESET,
                flags: replay | if close { MUSER_REQUEST_CLOSE } else { 0 },
                ..muser_slot::default()
            },
            Kind::Unmap { iova, len } => muser_slot {
                id,
                kind: MUSER_REQUEST_UNMAP,
                flags: replay,
                offset: iova,
                length: len,
                ..muser_slot::default()
            },
        }
    }

    /// Gives access to the bytes of a write.
    pub(crate) fn with_written(&self, use_bytes: impl FnOnce(&[u8]) -> Result) -> Result {
        match self.kind {
            Kind::Write(_) => use_bytes(&self.data.lock()),
            Kind::Read(_) | Kind::Reset { .. } | Kind::Unmap { .. } => Ok(()),
        }
    }

    /// Lets the bytes of a read be filled in.
    pub(crate) fn with_read(&self, fill: impl FnOnce(&mut [u8]) -> Result) -> Result {
        match self.kind {
            Kind::Read(_) => fill(&mut self.data.lock()),
            Kind::Write(_) | Kind::Reset { .. } | Kind::Unmap { .. } => Ok(()),
        }
    }

    /// Copies the bytes of an answered read into the client's memory.
    pub(crate) fn copy_to_user(&self, to: UserPtr) -> Result {
        let data = self.data.lock();
        UserSlice::new(to, data.len()).writer().write_slice(&data)
    }

    /// Ends the request: 0, or a negated errno.
    pub(crate) fn finish(&self, result: i32) {
        self.result.store(result, Release);
        self.done.complete();
    }

    /// What [`Request::finish`] was called with.
    pub(crate) fn result(&self) -> Result {
        kernel::error::to_result(self.result.load(Acquire))
    }

    /// Happens when the request ends.
    pub(crate) fn done(&self) -> &Completion {
        &self.done
    }
}
