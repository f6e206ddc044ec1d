// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors as sentences, which name what was wrong and what to do about it.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Why a command failed. What is wrong with a command line itself, clap says.
#[derive(Debug)]
pub(crate) struct Error {
    message: String,
}

/// The result of a command, or of a part of one.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure: exit status 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
        }
    }

    /// A failure to `act` (`read`, `write to`, …) on the file at `path`.
    pub(crate) fn file(act: &str, path: &Path, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => Self::new(denied(path)),
            _ => Self::new(format!("can't {act} {}: {}", path.display(), reason(error))),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// An error without the `(os error N)` that the standard library adds.
pub(crate) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((reason, _)) => reason.to_lowercase(),
        None => text,
    }
}

/// The sentence for a file that we may not use: whose it is, and what to do.
pub(crate) fn denied(path: &Path) -> String {
    let owner = match std::fs::metadata(path) {
        Ok(file) => format!(
            "it belongs to {}:{} and has mode {:04o}",
            name(Path::new("/etc/passwd"), file.uid()),
            name(Path::new("/etc/group"), file.gid()),
            file.mode() & 0o7777
        ),
        Err(_) => "not even its owner can be seen".to_owned(),
    };
    format!(
        "permission denied: {}: {owner}; run this as its owner or as root, or let root chown it",
        path.display()
    )
}

/// The sentence for somebody who may not write to a type's `create`: who may, and how to become one.
pub(crate) fn not_member(create: &Path) -> String {
    match std::fs::metadata(create) {
        Ok(file) if file.gid() != 0 && file.mode() & 0o020 != 0 => {
            let group = name(Path::new("/etc/group"), file.gid());
            format!(
                "permission denied: members of group {group} create devices; root adds one with \
                 `usermod -aG {group} USER`, which takes effect at the next login"
            )
        }
        _ => format!(
            "{}; to let a group create devices, install muser's udev rules (tools/system)",
            denied(create)
        ),
    }
}

/// The name of an id in `/etc/passwd` or `/etc/group`, else the number.
///
/// Not getpwuid: a static binary can't load what that needs.
pub(crate) fn name(table: &Path, id: u32) -> String {
    let id = id.to_string();
    std::fs::read_to_string(table)
        .ok()
        .and_then(|text| {
            text.lines()
                .map(|line| line.split(':').collect::<Vec<_>>())
                .find(|entry| entry.get(2) == Some(&&*id))
                .map(|entry| entry[0].to_owned())
        })
        .unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_has_no_error_number() {
        let error = io::Error::from_raw_os_error(libc::ENODEV);
        assert_eq!(reason(&error), "no such device");
    }

    #[test]
    fn denied_names_the_file_its_owner_and_its_mode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = denied(file.path());
        assert!(text.contains(&file.path().display().to_string()), "{text}");
        assert!(text.contains("has mode 0600"), "{text}");
    }

    #[test]
    fn not_member_names_the_rules_where_no_group_may_create() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = not_member(file.path());
        assert!(text.starts_with("permission denied: "), "{text}");
        assert!(text.contains("udev rules"), "{text}");
    }

    #[test]
    fn unknown_id_is_its_number() {
        assert_eq!(name(Path::new("/etc/passwd"), 0), "root");
        assert_eq!(name(Path::new("/etc/passwd"), 4_000_000_000), "4000000000");
        assert_eq!(name(Path::new("/nonexistent"), 7), "7");
    }
}
