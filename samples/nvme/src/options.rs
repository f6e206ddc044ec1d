// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be said about a controller on a command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use libmuser::{Errno, Error, Result};

use crate::backing::{Backing, FileBacking};
use crate::engine::Method;

/// Bytes of a serial number (figure 247).
const SERIAL: usize = 20;

/// Options of a program that serves a controller.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "controller")]
pub struct Options {
    /// Keep the blocks in this file or block device
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "print_capabilities"
    )]
    pub file: Option<PathBuf>,

    /// Refuse to write
    #[arg(long)]
    pub read_only: bool,

    /// Have so many bytes, with K, M, G or T for powers of 1024; a shorter file grows. All there are
    /// otherwise
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub size: Option<u64>,

    /// Have this serial number; otherwise it follows from the file's path
    #[arg(long, value_parser = serial)]
    pub serial: Option<String>,

    /// Have so many pairs of queues for input and output
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Have blocks of so many bytes
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = block_size)]
    pub block_size: u32,

    /// Do input and output in this way
    #[arg(long, value_enum, default_value_t)]
    pub io: Method,
}

impl Options {
    /// What these options say of the controller itself.
    pub fn settings(&self) -> Settings {
        let from_path = || self.file.as_deref().map_or_else(String::new, path_serial);
        Settings {
            serial: self.serial.clone().unwrap_or_else(from_path),
            queues: self.queues,
            block_size: self.block_size,
            method: self.io,
        }
    }

    /// Opens the backing.
    ///
    /// # Errors
    ///
    /// Those of [`FileBacking::open`].
    pub fn backing(&self) -> Result<Arc<dyn Backing>> {
        let Some(path) = &self.file else {
            return Err(Error::new(Errno::EINVAL, "no file is named"));
        };
        let backing = FileBacking::open(path, self.read_only, self.size).map_err(|error| {
            let number = error.raw_os_error().and_then(Errno::new);
            let message = format!("{}: {error}", path.display());
            Error::new(number.unwrap_or(Errno::EINVAL), message)
        })?;
        Ok(Arc::new(backing))
    }
}

/// What a controller is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Serial number: up to 20 characters of ASCII.
    pub serial: String,
    /// Pairs of queues for input and output, from 1 to 64.
    pub queues: u16,
    /// Bytes of a block: 512 or 4096.
    pub block_size: u32,
    /// How to do input and output.
    pub method: Method,
}

impl Settings {
    /// The size of a block, as a power of two.
    pub(crate) fn block_shift(&self) -> u8 {
        match self.block_size {
            4096 => 12,
            _ => 9,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            serial: "muser".into(),
            queues: 4,
            block_size: 512,
            method: Method::Auto,
        }
    }
}

/// A number that is the same for the same path: two controllers of one guest must differ.
fn path_serial(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let hash = path
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016x}")
}

fn serial(text: &str) -> std::result::Result<String, String> {
    let printable = text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if printable && !text.is_empty() && text.len() <= SERIAL {
        return Ok(text.to_owned());
    }
    Err(format!(
        "a serial number has 1 to {SERIAL} characters of ASCII"
    ))
}

fn block_size(text: &str) -> std::result::Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("a block has 512 or 4096 bytes".into()),
    }
}

fn size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err("a unit is K, M, G or T".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "it is no number".to_owned())?;
    number
        .checked_mul(unit)
        .filter(|bytes| (1..=i64::MAX.unsigned_abs()).contains(bytes))
        .ok_or_else(|| "no file has so many bytes".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("3M"), Ok(3 << 20));
        for bad in ["", "M", "1X", "-1", "0", "99999999999T", "1.5G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn serials_are_short_and_plain() {
        assert!(serial("muser-0001").is_ok());
        for bad in ["", "a\nb", "änderung", "123456789012345678901"] {
            assert!(serial(bad).is_err(), "{bad}");
        }
    }
}
