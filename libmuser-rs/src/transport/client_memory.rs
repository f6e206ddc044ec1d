// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a client lets a device reach, for the clients of this library.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno as Number;
use nix::sys::memfd::{memfd_create, MFdFlags};
use vm_memory::{Bytes, VolatileSlice};

use super::RemoteMemory;
use crate::sys::Mapping;

/// Memory of a client, for the device to reach once it is mapped, in this process
/// ([`memory::Client::dma_map`](super::memory::Client::dma_map)) or over a socket
/// ([`client::Client::dma_map`](crate::client::Client::dma_map)). A handle: clone it, and use it from
/// any thread.
#[derive(Clone, Debug)]
pub struct ClientMemory {
    source: Source,
    writable: bool,
    /// What a server on the other side of a socket can map, and where in that it starts.
    file: Option<(Arc<OwnedFd>, u64)>,
}

/// Where the memory is.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// In this process.
    Direct(Arc<Mapping>),
    /// Elsewhere, so many bytes.
    Remote(Arc<dyn RemoteMemory>, u64),
}

impl ClientMemory {
    /// New memory of so many bytes, which are zeroes.
    ///
    /// # Errors
    ///
    /// `EINVAL`: none at all. Else, the process can't have more.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("muser-client", MFdFlags::MFD_CLOEXEC)?);
        let size = u64::try_from(len).map_err(|_| Number::EINVAL)?;
        file.set_len(size)?;
        Self::map_file(file.as_fd(), 0, len, true)
    }

    /// `len` bytes of a file from `offset` on. A file that is cut short while it is mapped takes
    /// the process with it (SIGBUS).
    ///
    /// # Errors
    ///
    /// Those of `mmap`: the offset is not a multiple of the page size, or the file is not open for
    /// this.
    pub fn map_file(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        writable: bool,
    ) -> io::Result<Self> {
        let mapping = Mapping::new(file, offset, len, writable)?;
        let file = Arc::new(file.try_clone_to_owned()?);
        Ok(Self {
            source: Source::Direct(Arc::new(mapping)),
            writable,
            file: Some((file, offset)),
        })
    }

    /// `len` bytes that can't be mapped here: the device reaches them through calls.
    pub fn remote(memory: Arc<dyn RemoteMemory>, len: u64) -> Self {
        Self {
            source: Source::Remote(memory, len),
            writable: true,
            file: None,
        }
    }

    /// The same memory, of which a server on the other side of a socket is not given the descriptor:
    /// it reaches the memory through messages, and nothing of the file around it.
    #[must_use]
    pub fn unshared(self) -> Self {
        Self { file: None, ..self }
    }

    pub(crate) fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file
            .as_ref()
            .map(|(file, offset)| (file.as_fd(), *offset))
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where the memory from `start` on is, for a table of mappings in this process.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there are no empty mappings")]
    pub fn len(&self) -> u64 {
        match &self.source {
            Source::Direct(mapping) => mapping.len() as u64,
            Source::Remote(_, len) => *len,
        }
    }

    /// The memory, where it is in this process.
    #[must_use]
    pub fn slice(&self) -> Option<VolatileSlice<'_>> {
        match &self.source {
            Source::Direct(mapping) => Some(mapping.slice()),
            Source::Remote(..) => None,
        }
    }

    /// Reads what is there now.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it ends beyond the memory. Else, what [`RemoteMemory`] says.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let at = self.check(offset, to.len())?;
        match &self.source {
            Source::Direct(mapping) => Ok(mapping
                .slice()
                .read_slice(to, at)
                .map_err(|_| Number::EINVAL)?),
            Source::Remote(remote, _) => remote.read(offset, to),
        }
    }

    /// Writes for the device to see.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and `EPERM` for a file mapped for reading only.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let at = self.check(offset, from.len())?;
        match &self.source {
            Source::Direct(_) if !self.writable => Err(Number::EPERM.into()),
            Source::Direct(mapping) => Ok(mapping
                .slice()
                .write_slice(from, at)
                .map_err(|_| Number::EINVAL)?),
            Source::Remote(remote, _) => remote.write(offset, from),
        }
    }

    fn check(&self, offset: u64, count: usize) -> io::Result<usize> {
        let end = offset.checked_add(count as u64);
        let fits = end.is_some_and(|end| end <= self.len());
        let at = usize::try_from(offset).ok().filter(|_| fits);
        Ok(at.ok_or(Number::EINVAL)?)
    }
}
