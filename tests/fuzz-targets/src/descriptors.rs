// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of every kind that a peer may hand over.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{memfd_create, MFdFlags};

use crate::Input;

/// Bytes of a file of memory.
pub(crate) const SIZE: u64 = 0x4000;

/// One of each, which the hostile side keeps open.
#[derive(Debug)]
pub(crate) struct Kinds {
    all: Vec<OwnedFd>,
    /// Those among them that become shorter.
    shrinking: Vec<File>,
}

impl Kinds {
    pub(crate) fn new() -> Self {
        let plain = memory(SealFlag::empty());
        let shrinking = vec![plain.try_clone().expect("there is room")];
        let (reader, writer) = nix::unistd::pipe().expect("there is room");
        let (socket, _) = UnixStream::pair().expect("there is room");
        let all: Vec<OwnedFd> = vec![
            plain.into(),
            EventFd::new().expect("there is room").into(),
            memory_for_reading().into(),
            memory(SealFlag::F_SEAL_SHRINK).into(),
            memory(SealFlag::F_SEAL_WRITE).into(),
            reader,
            writer,
            socket.into(),
            open("/", 0).into(),
            open("/dev/null", 0).into(),
            open("/dev/zero", 0).into(),
            open("/proc/self/status", 0).into(),
            open("/", libc::O_PATH).into(),
        ];
        Self { all, shrinking }
    }

    /// Some of them, as a rule one or none.
    pub(crate) fn take(&self, input: &mut Input<'_>) -> Vec<RawFd> {
        let count = match input.below(8) {
            0..=3 => 0,
            4..=6 => 1,
            _ => usize::from(input.below(40)),
        };
        let one = |()| self.all[usize::from(input.u8()) % self.all.len()].as_raw_fd();
        std::iter::repeat_n((), count).map(one).collect()
    }

    /// Memory that can be mapped.
    pub(crate) fn memory(&self) -> RawFd {
        self.all[0].as_raw_fd()
    }

    /// An eventfd.
    pub(crate) fn event(&self) -> RawFd {
        self.all[1].as_raw_fd()
    }

    /// Makes files shorter that may be mapped.
    pub(crate) fn cut(&self) {
        for file in &self.shrinking {
            file.set_len(0x1000).expect("it is a file of memory");
        }
    }
}

fn memory(seals: SealFlag) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("hostile", flags).expect("there is room"));
    file.set_len(SIZE).expect("there is room");
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("it can be sealed");
    file
}

fn memory_for_reading() -> File {
    let file = memory(SealFlag::empty());
    open(&format!("/proc/self/fd/{}", file.as_raw_fd()), 0)
}

fn open(path: &str, flags: i32) -> File {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(flags).open(path);
    file.expect("every machine has it")
}

/// How many descriptors this process has.
pub(crate) fn open_count() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
