// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client's memory through `muser.ko`: pinned when it is wanted, seen through the window.
//!
//! What is pinned stays so, and is known here, so that the next use of it needs no system call. It is
//! known for one generation: when the client has unmapped anything that was pinned, the kernel is
//! asked again. The first copy of a page is made by the kernel, which pins it; later ones go through
//! the window.
//!
//! # Letting go
//!
//! Ranges in use have a [lease](leases), and copies through the window hold `known`. Whoever lets go
//! of memory takes both locks, `known` before that of the leases, so that nothing disappears from
//! under a write, where it would be lost.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{fence, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use muser_uapi::*;
use nix::errno::Errno as Number;
use vm_memory::VolatileSlice;

use super::{size_of_u32, Node};
use crate::error::{Errno, Error, Result};
use crate::sys;
use crate::transport::dma::{
    Acquired, Backing, DirtyLog, DmaAccess, GuestMemory, IovaRange, Piece,
};
use crate::transport::sealed;

mod known;
mod leases;
mod window;

use known::Known;
use leases::{Lease, Leases};
use window::{Chunk, Window};

/// The client's memory.
#[derive(Debug)]
pub(in crate::transport) struct ClientDma {
    node: Arc<Node>,
    window: Window,
    known: RwLock<Known>,
    leases: Arc<Leases>,
}

impl ClientDma {
    pub(super) fn new(node: Arc<Node>) -> Self {
        Self {
            window: Window::new(Arc::clone(&node.file)),
            node,
            known: RwLock::default(),
            leases: Arc::default(),
        }
    }

    /// Pins a range; tells the generation at which it was.
    fn pin(&self, range: IovaRange, access: DmaAccess) -> Result<u64> {
        let generation = match self.try_pin(range, access) {
            Err(Number::EDQUOT | Number::ENOMEM) => {
                self.let_go(IovaRange::ALL)?;
                self.try_pin(range, access)
            }
            result => result,
        };
        let generation = generation.map_err(|errno| failed(range, errno))?;
        self.known_mut().add(range, access, generation);
        Ok(generation)
    }

    fn try_pin(&self, range: IovaRange, access: DmaAccess) -> Result<u64, Number> {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let mut dma = muser_dma {
            size: size_of_u32::<muser_dma>(),
            flags: flag(access.reads(), MUSER_DMA_READ) | flag(access.writes(), MUSER_DMA_WRITE),
            iova: range.first(),
            length: range.len(),
            ..muser_dma::default()
        };
        loop {
            match sys::dma_acquire(self.node.file.as_fd(), &mut dma) {
                Ok(()) => return Ok(dma.generation),
                Err(Number::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Unpins what nobody uses of a range.
    fn let_go(&self, range: IovaRange) -> Result<()> {
        let mut known = self.known_mut();
        known.clear();
        self.leases.outside(range, |free| {
            let mut dma = muser_dma {
                size: size_of_u32::<muser_dma>(),
                iova: free.first(),
                length: free.len(),
                ..muser_dma::default()
            };
            loop {
                match sys::dma_release(self.node.file.as_fd(), &mut dma) {
                    Ok(()) => return Ok(()),
                    Err(Number::EINTR) => {}
                    Err(errno) => return Err(failed(free, errno)),
                }
            }
        })
    }

    /// Copies out through the window, if all of it is known to be there.
    fn read_shown(&self, range: IovaRange, to: &mut [u8]) -> bool {
        let known = self.known();
        let generation = self.generation();
        if !known.has(range, DmaAccess::Read, generation) {
            return false;
        }
        let copied = self.window.visit(range, |chunk, inside, bytes| {
            let slice = chunk.slice(inside)?;
            slice.copy_to(&mut to[bytes]);
            Some(())
        });
        fence(Ordering::Acquire);
        // Else some of it may have been the zeroes that stand in for memory which is gone.
        copied.is_some() && self.generation() == generation
    }

    /// Copies in through the window, if all of it is known to be there.
    fn write_shown(&self, range: IovaRange, from: &[u8]) -> bool {
        let known = self.known();
        if !known.has(range, DmaAccess::Write, self.generation()) {
            return false;
        }
        let copied = self.window.visit(range, |chunk, inside, bytes| {
            let slice = chunk.slice(inside)?;
            slice.copy_from(&from[bytes]);
            Some(())
        });
        copied.is_some()
    }

    /// Has the kernel copy what is left, as much as `call` does at a time: it tells how many bytes
    /// that were. None of the parts is empty.
    ///
    /// Where a limit of pinned memory is hit, what is not in use makes room, as long as that helps.
    fn copy<B: AsRef<[u8]>>(
        &self,
        access: DmaAccess,
        mut rest: Vec<(u64, B)>,
        mut call: impl FnMut(&mut [(u64, B)]) -> (u64, Result<(), Number>),
        skip: impl Fn(&mut B, usize),
    ) -> Result<()> {
        let generation = self.generation();
        let ranges = rest.iter().map(part).collect::<Result<Vec<_>>>()?;
        let mut made_room = false;
        while !rest.is_empty() {
            let (done, result) = call(&mut rest);
            advance(&mut rest, done, &skip);
            made_room &= done == 0;
            match result {
                Ok(()) | Err(Number::EINTR) => {}
                Err(Number::EDQUOT | Number::ENOMEM) if !made_room => {
                    made_room = true;
                    self.let_go(IovaRange::ALL)?;
                }
                Err(errno) => {
                    let at = rest.first().map(part).transpose()?;
                    return Err(failed(at.unwrap_or(IovaRange::ALL), errno));
                }
            }
        }
        // What was pinned and is gone again has changed the generation.
        let mut known = self.known_mut();
        for range in ranges {
            known.add(range, access, generation);
        }
        Ok(())
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an errno of the DMA calls means for a range.
fn failed(range: IovaRange, errno: Number) -> Error {
    let limit = |what: &str| {
        let (first, last) = (range.first(), range.last());
        let errno = Errno::new(errno as i32).unwrap_or(Errno::EIO);
        let message = format!("holding IOVA {first:#x} to {last:#x} would exceed {what}");
        Error::new(errno, message)
    };
    match errno {
        Number::EFAULT => range.not_mapped(),
        Number::EPERM => range.read_only(),
        Number::EDQUOT => limit("the device's max_pinned"),
        Number::ENOMEM => limit("what the client may pin"),
        Number::ENODEV => Error::removed(),
        errno => Error::io("the client's memory", errno),
    }
}

/// Where a part lies, which is not empty.
fn part<B: AsRef<[u8]>>((iova, bytes): &(u64, B)) -> Result<IovaRange> {
    let range = IovaRange::new(*iova, bytes.as_ref().len() as u64)?;
    range.ok_or_else(|| Error::io("copying nothing", Number::EINVAL))
}

/// Takes the first `done` bytes away.
fn advance<B: AsRef<[u8]>>(rest: &mut Vec<(u64, B)>, done: u64, skip: impl Fn(&mut B, usize)) {
    let mut done = usize::try_from(done).unwrap_or(usize::MAX);
    let mut whole = 0;
    for (iova, bytes) in rest.iter_mut() {
        let len = bytes.as_ref().len();
        if done < len {
            skip(bytes, done);
            *iova = iova.wrapping_add(done as u64);
            break;
        }
        done -= len;
        whole += 1;
    }
    rest.drain(..whole);
}

/// A piece of a range in use.
#[derive(Debug)]
struct Shown {
    chunk: Arc<Chunk>,
    _lease: Arc<Lease>,
}

impl Backing for Shown {
    fn slice(&self, bytes: Range<usize>) -> Option<VolatileSlice<'_, DirtyLog<'_>>> {
        self.chunk.slice(bytes)
    }
}

impl sealed::Sealed for ClientDma {}

impl GuestMemory for ClientDma {
    fn generation(&self) -> u64 {
        self.node.dma_generation()
    }

    fn acquire(&self, range: IovaRange, access: DmaAccess) -> Result<Acquired> {
        // First, so that what is pinned then is not let go of at once.
        let lease = Arc::new(Leases::take(&self.leases, range));
        let generation = self.pin(range, access)?;
        let mut pieces = Vec::with_capacity(1);
        let shown = self.window.visit(range, |chunk, inside, _| {
            pieces.push(Piece {
                backing: Arc::new(Shown {
                    chunk: Arc::clone(chunk),
                    _lease: Arc::clone(&lease),
                }),
                bytes: inside,
            });
            Some(())
        });
        Ok(Acquired {
            generation,
            pieces: shown.map(|()| pieces),
        })
    }

    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<()> {
        let mut parts = parts.iter_mut().filter(|(_, to)| !to.is_empty());
        let mut rest = Vec::new();
        for (iova, to) in parts.by_ref() {
            if !self.read_shown(part(&(*iova, &*to))?, to) {
                rest.push((*iova, &mut **to));
                break;
            }
        }
        rest.extend(parts.map(|(iova, to)| (*iova, &mut **to)));
        let call = |rest: &mut [(u64, &mut [u8])]| sys::dma_read(self.node.file.as_fd(), rest);
        self.copy(DmaAccess::Read, rest, call, |to, count| {
            *to = &mut std::mem::take(to)[count..];
        })
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<()> {
        let mut parts = parts.iter().filter(|(_, from)| !from.is_empty());
        let mut rest = Vec::new();
        for (iova, from) in parts.by_ref() {
            if !self.write_shown(part(&(*iova, from))?, from) {
                rest.push((*iova, *from));
                break;
            }
        }
        rest.extend(parts.copied());
        let call = |rest: &mut [(u64, &[u8])]| sys::dma_write(self.node.file.as_fd(), rest);
        self.copy(DmaAccess::Write, rest, call, |from, count| {
            *from = &from[count..];
        })
    }

    fn release(&self, range: IovaRange) -> Result<()> {
        self.let_go(range)
    }
}
