// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the client gives to the device, and takes back.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use zerocopy::IntoBytes;

use super::commands::Refusal;
use super::features::{bitmap, bitmap_size};
use super::flight::{Flight, Unmap};
use super::hub::{Handled, State};
use super::infos::size_of_u32;
use super::remote::ClientMemory;
use super::session::ReplyTo;
use crate::error::Errno;
use crate::transport::dma::Memory;
use crate::transport::DmaAccess;
use crate::vfio_user::wire::payload;
use crate::vfio_user::wire::request::{DmaMap, DmaUnmap};

/// No such mapping.
pub(super) const ENOENT: Errno = match Errno::new(libc::ENOENT) {
    Some(errno) => errno,
    None => Errno::EINVAL,
};

impl State {
    pub(super) fn dma_map(
        &mut self,
        to: ReplyTo,
        request: DmaMap,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let access = match (request.reads, request.writes) {
            (true, true) => DmaAccess::ReadWrite,
            (true, false) => DmaAccess::Read,
            (false, true) => DmaAccess::Write,
            (false, false) => {
                let why = "the memory is neither for reading nor for writing";
                return Err(Refusal::new(Errno::EINVAL, why));
            }
        };
        let fd = fds.pop();
        if !fds.is_empty() {
            let why = "a mapping has one descriptor at most";
            return Err(Refusal::new(Errno::EINVAL, why));
        }
        let memory = match fd {
            Some(fd) => {
                let DmaMap { offset, size, .. } = request;
                Memory::from_fd(&self.files, fd, offset, size, access).map_err(|errno| {
                    let why = format!("{size:#x} bytes of the file from {offset:#x} on");
                    let why = format!("{why} can't be memory");
                    Refusal::new(super::session::to_errno(errno), why)
                })?
            }
            None => {
                let remote = ClientMemory::new(Weak::clone(&self.hub), to.session);
                Memory::Remote(Arc::new(remote), request.address)
            }
        };
        let mapped = self.dma.map(request.address, request.size, access, memory);
        mapped.map_err(|errno| {
            let (address, size) = (request.address, request.size);
            let why = format!("{size:#x} bytes can't be mapped at IOVA {address:#x}");
            Refusal::new(super::session::to_errno(errno), why)
        })
    }

    pub(super) fn dma_unmap(&mut self, to: ReplyTo, request: DmaUnmap) -> Result<Handled, Refusal> {
        let going = if request.all {
            self.dma.leave_all()
        } else {
            let going = self.dma.leave(request.address, request.size);
            let going = going.map_err(|errno| {
                let (address, size) = (request.address, request.size);
                let why = format!("{size:#x} bytes at IOVA {address:#x} are no mappings");
                Refusal::new(super::session::to_errno(errno), why)
            })?;
            if going.is_empty() {
                let why = format!("nothing is mapped at IOVA {:#x}", request.address);
                return Err(Refusal::new(ENOENT, why));
            }
            if let Some(wanted) = request.bitmap {
                self.check_bitmap(wanted, request.argsz, request.size)
                    .inspect_err(|_| self.dma.stay(&going))?;
            }
            going
        };
        let mut unmap = Unmap::new(request, going);
        match unmap.next() {
            Some(operation) => Ok(self.depart(to, operation, |id| Flight::unmap(id, to, unmap))),
            None => {
                self.end_unmap(to, &unmap);
                Ok(Handled::Answered)
            }
        }
    }

    /// The device has let go of it.
    pub(super) fn end_unmap(&mut self, to: ReplyTo, unmap: &Unmap) {
        let request = unmap.request;
        let mut flags = if request.all {
            payload::DmaUnmap::ALL
        } else {
            0
        };
        let dirty = request.bitmap.map(|wanted| {
            flags |= payload::DmaUnmap::DIRTY_BITMAP;
            // It was checked when the command came.
            let size = bitmap_size(request.size, wanted.pgsize).unwrap_or(0);
            let end = request.address.saturating_add(request.size);
            let bits = bitmap(&self.dma, request.address..end, wanted.pgsize, size);
            let fixed = payload::Bitmap {
                pgsize: wanted.pgsize,
                size: bits.len() as u64,
            };
            (fixed, bits)
        });
        self.dma.remove(&unmap.going);
        let around = size_of_u32::<payload::DmaUnmap>();
        let more = dirty
            .as_ref()
            .map_or(0, |(fixed, bits)| size_of_val(fixed) + bits.len());
        let fixed = payload::DmaUnmap {
            argsz: around.saturating_add(u32::try_from(more).unwrap_or(u32::MAX)),
            flags,
            address: request.address,
            size: request.size,
        };
        match &dirty {
            Some((bitmap, bits)) => {
                self.reply_to(to, Ok(&[fixed.as_bytes(), bitmap.as_bytes(), bits]));
            }
            None => self.reply_to(to, Ok(&[fixed.as_bytes()])),
        }
    }
}
