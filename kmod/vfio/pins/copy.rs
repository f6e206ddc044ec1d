// SPDX-License-Identifier: GPL-2.0
//! Copies between the client's memory and that of the process which asks.
//!
//! The process's memory may not be there, and bringing it in may take for ever. So a copy is tried
//! with page faults disabled, while the client's page can't go away; what is missing is brought in
//! between two tries, when no lock is held and a client that unmaps does not have to wait.
//!
//! C header: `include/linux/uaccess.h`.

use super::{Pages, Pin, Pins, Rights, PAGE_SIZE};
use crate::vfio::bindings;
use kernel::{
    prelude::*,
    uaccess::UserPtr, //
};

impl Pins {
    /// Copies between a page of the client's memory and the current process: up to `len` bytes, as
    /// many as lie in one page. Acquires the page, and up to `ahead` pages behind it, if need be.
    /// Returns how many bytes were copied.
    ///
    /// # Errors
    ///
    /// As [`Pins::acquire`], and `EFAULT` for a bad address of the process.
    pub(crate) fn copy(
        &self,
        iova: u64,
        user: UserPtr,
        len: usize,
        rights: Rights,
        ahead: Pages,
        limit: u64,
    ) -> Result<usize> {
        let page = iova as usize / PAGE_SIZE;
        let start = iova as usize % PAGE_SIZE;
        let len = len.min(PAGE_SIZE - start);
        loop {
            match self.copy_shown(page, start, user, len, rights)? {
                Copied::All => return Ok(len),
                // Some progress, or none since the process's page is not there.
                Copied::Some(0) => fault_in(user, len, rights)?,
                Copied::Some(done) => return Ok(done),
                Copied::NotPinned => {
                    let (done, result) = self.acquire(ahead, rights, limit);
                    if done == 0 {
                        result?;
                    }
                }
            }
        }
    }

    /// Copies without waiting for anything but locks which nobody holds for long.
    fn copy_shown(
        &self,
        page: usize,
        start: usize,
        user: UserPtr,
        len: usize,
        rights: Rights,
    ) -> Result<Copied> {
        let _shown = self.shown.read();
        let Some(number) = self.tree.load(page) else {
            return Ok(Copied::NotPinned);
        };
        let pin = Pin::from_number(number);
        if rights == Rights::Write && !pin.writable {
            return Err(EPERM);
        }
        // SAFETY: The page is pinned as long as `shown` is held, it is memory (`pin` saw to that),
        // and the bytes lie in it; user addresses are checked by the function.
        let missed = unsafe {
            bindings::muser_copy_frame(
                pin.frame,
                start,
                user.as_mut_ptr(),
                len,
                rights == Rights::Write,
            )
        };
        if rights == Rights::Write && missed < len {
            self.log.record(&self.tree, page);
        }
        Ok(match missed {
            0 => Copied::All,
            missed => Copied::Some(len - missed),
        })
    }
}

/// How far a copy came.
enum Copied {
    All,
    /// So many bytes: the process's page is not there.
    Some(usize),
    NotPinned,
}

/// Brings the first of `len` bytes of the process in, to be read or written by the kernel.
///
/// # Errors
///
/// `EFAULT`: it has no such memory. `EINTR`: the task is being killed.
fn fault_in(user: UserPtr, len: usize, rights: Rights) -> Result {
    // SAFETY: Looks at the current task.
    if unsafe { bindings::muser_fatal_signal_pending() } {
        return Err(EINTR);
    }
    let address = user.as_mut_ptr().cast();
    let missed = match rights {
        // To write to the client's memory, the process's is read, and the other way round.
        // SAFETY: The function checks the address.
        Rights::Write => unsafe { bindings::fault_in_readable(address, len) },
        // SAFETY: As above; it writes what it has read.
        Rights::Read => unsafe { bindings::fault_in_writeable(address, len) },
    };
    if missed < len {
        Ok(())
    } else {
        Err(EFAULT)
    }
}
