// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One descriptor for a file, however many parts of it the client maps.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use nix::fcntl::{fcntl, FcntlArg};
use nix::sys::stat::{fstat, SFlag};

/// What descriptors have in common that are as good as each other: device, inode, and how the file
/// was opened.
type Id = (u64, u64, i32);

/// The files that are in use.
#[derive(Debug, Default)]
pub(super) struct Files {
    known: BTreeMap<Id, Weak<OwnedFd>>,
    /// How many there are to be before those out of use are looked for.
    enough: usize,
}

impl Files {
    const FEW: usize = 32;

    /// A descriptor of the same file, if there is one that can do the same; then this one is closed.
    pub(super) fn share(&mut self, file: OwnedFd) -> Arc<OwnedFd> {
        let Some(id) = id(&file) else {
            return Arc::new(file);
        };
        // As long as it is open, no other file has its id.
        if let Some(known) = self.known.get(&id).and_then(Weak::upgrade) {
            return known;
        }
        if self.known.len() >= self.enough.max(Self::FEW) {
            self.known.retain(|_, file| file.strong_count() > 0);
            self.enough = 2 * self.known.len();
        }
        let file = Arc::new(file);
        self.known.insert(id, Arc::downgrade(&file));
        file
    }
}

/// Of files that are memory or on a disk; others may be more than their inode.
fn id(file: &OwnedFd) -> Option<Id> {
    let stat = fstat(file).ok()?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    let flags = fcntl(file, FcntlArg::F_GETFL).ok()?;
    (kind == SFlag::S_IFREG).then_some((stat.st_dev, stat.st_ino, flags))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{memfd_create, MFdFlags};

    fn memory() -> OwnedFd {
        memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap()
    }

    #[test]
    fn descriptors_of_a_file_are_shared_and_others_are_not() {
        let mut files = Files::default();
        let file = memory();
        let copy = file.try_clone().unwrap();

        let (one, same) = (files.share(file), files.share(copy));

        assert!(Arc::ptr_eq(&one, &same));
        assert!(!Arc::ptr_eq(&one, &files.share(memory())));
    }

    #[test]
    fn devices_are_not_shared() {
        let mut files = Files::default();
        let open = || std::fs::File::open("/dev/zero").unwrap().into();

        assert!(!Arc::ptr_eq(&files.share(open()), &files.share(open())));
    }

    #[test]
    fn files_out_of_use_are_forgotten() {
        let mut files = Files::default();
        for _ in 0..1000 {
            drop(files.share(memory()));
        }

        assert!(files.known.len() <= Files::FEW);
    }
}
