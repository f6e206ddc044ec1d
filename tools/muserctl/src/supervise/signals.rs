// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals as something to be read, so that one wait is for everything.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// The signals that the supervisor knows.
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Takes them from now on. Programs that are started get them as usual
    /// ([`make_child`](crate::sys::make_child)).
    pub(super) fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGCHLD,
        ] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&mask, flags)?))
    }

    /// Those that have come.
    pub(super) fn take(&self) -> Vec<Signal> {
        let mut taken = Vec::new();
        while let Ok(Some(signal)) = self.0.read_signal() {
            let number = i32::try_from(signal.ssi_signo).ok();
            taken.extend(number.and_then(|number| Signal::try_from(number).ok()));
        }
        taken
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
