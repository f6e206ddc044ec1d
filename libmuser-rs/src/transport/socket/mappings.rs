// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the client gives to the device, and takes back.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use zerocopy::IntoBytes;

use super::commands::Refusal;
use super::flight::{Flight, Unmap};
use super::hub::{Handled, State};
use super::remote::ClientMemory;
use super::session::ReplyTo;
use crate::error::Errno;
use crate::sys::Mapping;
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
            Some(fd) => from_fd(&fd, request, access)?,
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
        self.dma.remove(&unmap.going);
        let flags = if request.all {
            payload::DmaUnmap::ALL
        } else {
            0
        };
        let fixed = payload::DmaUnmap {
            argsz: super::infos::size_of_u32::<payload::DmaUnmap>(),
            flags,
            address: request.address,
            size: request.size,
        };
        self.reply_to(to, Ok(&[fixed.as_bytes()]));
    }
}

fn from_fd(fd: &OwnedFd, request: DmaMap, access: DmaAccess) -> Result<Memory, Refusal> {
    let size = nix::sys::stat::fstat(fd)?.st_size;
    let end = request.offset.checked_add(request.size);
    let fits = end.is_some_and(|end| u64::try_from(size).is_ok_and(|size| end <= size));
    if !fits {
        let why = "the file has not so many bytes";
        return Err(Refusal::new(Errno::EINVAL, why));
    }
    let len = usize::try_from(request.size)
        .map_err(|_| Refusal::new(Errno::ENOMEM, "it is too large"))?;
    let mapping = Mapping::new(fd.as_fd(), request.offset, len, access.writes())?;
    Ok(Memory::Direct(Arc::new(mapping), 0))
}
