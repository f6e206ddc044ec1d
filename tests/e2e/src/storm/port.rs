// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a storm needs of a client, whatever its road: the kernel's VFIO, or a vfio-user socket.

use std::io;

use crate::vfio;

/// A client that reaches the device's registers.
pub(super) trait Port: Sync {
    /// Reads all of `data`.
    ///
    /// # Errors
    ///
    /// The client's errno.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data`.
    ///
    /// # Errors
    ///
    /// The client's errno.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;
}

impl Port for vfio::Client {
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.read_vec(region, offset, data.len())?);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all(region, offset, data)
    }
}

impl Port for libmuser::client::Client {
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let count = Self::read(self, region, offset, data).map_err(errno)?;
        whole(count, data.len())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let count = Self::write(self, region, offset, data).map_err(errno)?;
        whole(count, data.len())
    }
}

fn errno(error: libmuser::Error) -> io::Error {
    error.errno().into()
}

fn whole(count: usize, expected: usize) -> io::Result<()> {
    if count == expected {
        return Ok(());
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}
