// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes an initramfs: a cpio archive in the "newc" format of the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst.
//!
//! It isn't compressed: QEMU copies it into the guest at once, while an
//! emulated CPU takes seconds to unpack a compressed one.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, inode: 0 }
    }

    /// Adds everything below a directory, as root's.
    pub(crate) fn tree(&mut self, dir: &Path) -> io::Result<()> {
        self.below(dir, dir)
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name.as_bytes(), CHARACTER | 0o600, (major, minor), &[])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.entry(b"TRAILER!!!", 0, (0, 0), &[])?;
        self.to.flush()
    }

    fn below(&mut self, top: &Path, dir: &Path) -> io::Result<()> {
        let mut paths = fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        for path in paths {
            let name = path
                .strip_prefix(top)
                .unwrap_or(&path)
                .as_os_str()
                .as_bytes();
            let meta = fs::symlink_metadata(&path)?;
            let mode = meta.permissions().mode() & 0o7777;
            if meta.is_dir() {
                self.entry(name, DIRECTORY | mode, (0, 0), &[])?;
                self.below(top, &path)?;
            } else if meta.is_symlink() {
                let target = fs::read_link(&path)?;
                self.entry(name, SYMLINK | 0o777, (0, 0), target.as_os_str().as_bytes())?;
            } else {
                self.entry(name, REGULAR | mode, (0, 0), &fs::read(&path)?)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &[u8], mode: u32, dev: (u32, u32), data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = |len: usize| u32::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge.into());
        let size = |len| -> io::Result<u32> { size(len) };
        // inode, mode, uid, gid, links, mtime, size, device, special device,
        // size of the name with its NUL, checksum (not used)
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            size(data.len())?,
            0,
            0,
            dev.0,
            dev.1,
            size(name.len() + 1)?,
            0,
        ];
        let mut head = b"070701".to_vec();
        for field in fields {
            head.extend(format!("{field:08x}").into_bytes());
        }
        head.extend(name);
        head.push(0);
        self.padded(&head)?;
        self.padded(data)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.to
            .write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_aligned_entries_and_a_trailer() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::write(dir.path().join("bin/sh"), "abc").unwrap();
        std::os::unix::fs::symlink("sh", dir.path().join("bin/ash")).unwrap();
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.tree(dir.path()).unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        archive.finish().unwrap();

        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(
            bytes.windows(6).filter(|bytes| bytes == b"070701").count(),
            5
        );
        let text = String::from_utf8(bytes).unwrap();
        let names = [
            "bin\0",
            "bin/ash\0",
            "bin/sh\0",
            "dev/console\0",
            "TRAILER!!!\0",
        ];
        let places: Vec<_> = names.iter().map(|name| text.find(name).unwrap()).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert!(
            text.contains("bin/sh\0\0\0\0abc\0"),
            "data follows its padded name"
        );
    }
}
