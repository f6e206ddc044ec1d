// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line, and the help which is muserctl's manual page.

use crate::probe::{self, Place};
use crate::sysfs::Roots;
use clap::{Args, Parser, Subcommand, ValueEnum};
use libmuser::cli::manual::{self, Section};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

mod supervise;

pub(crate) use supervise::{Supervise, SECTIONS as SUPERVISE};

/// What the page says beside the options; `--help` ends with it.
pub(crate) const SECTIONS: &[Section<'_>] = &[
    (
        "DEVICES",
        "\
A muser device is a VFIO device whose hardware is a process. `create` makes the device: a VFIO
group or character device for the client (a VMM, a userspace driver), and /dev/muser/UUID for the
process that serves it. The client finds no hardware (ENXIO) until a process has attached and
described the device for the first time; from then on the device outlives the process.

Where a command takes the UUID of a device that is there, the first characters of it will do.

`supervise` needs neither the module nor root: its device is at a vfio-user socket.",
    ),
    (
        "EXAMPLES",
        "\
Make a device, and serve it with a sample:

    uuid=$(muserctl create)
    gpio --uuid $uuid

See what is there, and everything about one device:

    muserctl list
    muserctl show 83b8

Which device has requests that nobody takes?

    muserctl show --json | jq -r '.devices[] | select(.requests.queued > 0) | .uuid'

Let requests wait a minute for a process that restarts:

    muserctl set 83b8 reattach_timeout_ms=60000

Remove a device, and give its client ten seconds to let go:

    muserctl remove 83b8 --timeout 10

Serve a sample at a socket, and start it again when it dies:

    muserctl supervise --socket-path /tmp/gpio.sock -- gpio

See what a vfio-user server has to offer, and four bytes of its BAR 2:

    muserctl probe /tmp/gpio.sock --read 2:0:4",
    ),
    (
        "JSON",
        "\
{\"schema\": 1, \"types\": [...]}, the same with \"devices\", or with \"probe\". Integers are exact,
an unknown value is null, and no key is ever left out; new keys may come.
tools/muserctl/README.md lists all.",
    ),
    (
        "EXIT STATUS",
        "  0  done
  1  failed; a sentence on stderr says why
  2  the command line makes no sense

`supervise` has more: see muserctl-supervise(1).",
    ),
    (
        "ENVIRONMENT",
        "  LISTEN_FDS, LISTEN_PID   for `supervise --fd systemd` only, see sd_listen_fds(3)",
    ),
    (
        "FILES",
        "  /sys/class/mdev_bus/*/mdev_supported_types/muser-*
      what `types` reads and `create` writes to
  /sys/bus/mdev/devices/UUID
      what `list` reads, `remove` and `set` write to
  /dev/muser/UUID
      where `list` and `show` get the state from",
    ),
];

/// The end of `--help`.
fn manual() -> String {
    manual::help(SECTIONS)
}

/// The end of `supervise --help`.
fn supervise_manual() -> String {
    manual::help(SUPERVISE)
}

/// Creates, shows and removes muser devices.
#[derive(Debug, Parser)]
#[command(name = "muserctl", version, after_long_help = manual(), max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) roots: RootArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where to look instead of in the running system, for tests.
#[derive(Args, Debug)]
pub(crate) struct RootArgs {
    #[arg(long, hide = true, global = true, default_value = "/sys")]
    sysfs: PathBuf,
    #[arg(long, hide = true, global = true, default_value = "/dev")]
    dev: PathBuf,
    #[arg(long, hide = true, global = true, default_value = "/proc")]
    proc: PathBuf,
}

impl From<RootArgs> for Roots {
    fn from(args: RootArgs) -> Self {
        Self {
            sysfs: args.sysfs,
            dev: args.dev,
            proc: args.proc,
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists the devices, with what may be known of them: `?` is what only their owner sees
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Lists the types of device that can be made, and how many more
    Types {
        #[command(flatten)]
        output: Output,
    },
    /// Makes a device, and prints its UUID
    Create {
        /// The UUID; a random one if none is given
        #[arg(value_parser = whole_uuid)]
        uuid: Option<String>,
        /// What the client is to see
        #[arg(long = "type", value_name = "TYPE", default_value_t = Kind::Pci)]
        kind: Kind,
        #[command(flatten)]
        output: Output,
    },
    /// Removes a device, waiting as long as a VFIO client has it open
    ///
    /// The client is asked to let go through its REQ interrupt. The kernel can't take a removal
    /// back: ctrl-C or the timeout ends the waiting, and the device is removed as soon as the
    /// client closes it.
    Remove {
        /// The UUID, or the beginning of it
        #[arg(value_parser = uuid_prefix)]
        uuid: String,
        /// How long to wait for the client
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
    },
    /// Shows all there is to know about a device, or about every device
    Show {
        /// The UUID, or the beginning of it
        #[arg(value_parser = uuid_prefix)]
        uuid: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Sets attributes of a device
    ///
    /// reattach_timeout_ms: how many milliseconds a request waits while no process is attached,
    /// before it fails with ETIMEDOUT. max_requests: how many may be in flight, from 1 to 512.
    /// max_state: bytes of state that a process may ask for. max_memory and max_vectors: bytes of
    /// device memory and interrupt vectors that it may; they can be set only before a process has
    /// described the device. max_pinned and unmap_timeout_ms: for DMA, see the README of muser. `show`
    /// shows their present values.
    Set {
        /// The UUID, or the beginning of it
        #[arg(value_parser = uuid_prefix)]
        uuid: String,
        /// An attribute and its new value; K, M and G stand for powers of 1024
        #[arg(required = true, value_name = "NAME=VALUE", value_parser = assignment)]
        assignments: Vec<Assignment>,
    },
    /// Connects to a vfio-user server as a client, and shows its device
    ///
    /// The server may be any program that speaks the protocol, such as `gpio --socket-path SOCKET`. It
    /// is asked and read from; nothing is written to the device, but it notices a client that comes
    /// and goes.
    Probe {
        /// The server's UNIX socket
        socket: PathBuf,
        /// Reads from a region as well: its index, an offset and how many bytes; may be repeated. A
        /// read of a register may have effects of its own
        #[arg(long, value_name = "REGION:OFFSET:BYTES", value_parser = probe::place)]
        read: Vec<Place>,
        #[command(flatten)]
        output: Output,
    },
    /// Serves a device at a vfio-user socket by a program that may die, and starts it again
    ///
    /// The client, such as a VMM, stays connected and does not notice.
    #[command(
        after_long_help = supervise_manual(),
        max_term_width = 100,
        override_usage = "muserctl supervise [OPTIONS] <--socket-path PATH|--fd N> -- PROGRAM [ARGS]"
    )]
    Supervise(Supervise),
    /// Prints the manual page, or that of a command
    #[command(hide = true)]
    PrintMan {
        /// The command
        command: Option<String>,
    },
    /// Gives the files of a device to the user who created it; for the udev rule
    ///
    /// PATH is the device's directory in sysfs, or that of its VFIO group or VFIO character
    /// device. Nothing happens to a device that is not one of muser's.
    #[command(hide = true)]
    Give {
        /// The directory
        path: PathBuf,
    },
    /// Writes to the attribute `remove` at PATH, and exits with the errno
    #[command(hide = true)]
    WriteRemove {
        /// The attribute
        path: PathBuf,
    },
}

/// How a command prints data.
#[derive(Args, Debug)]
pub(crate) struct Output {
    /// Prints JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A type of device, by the name of its directory.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Kind {
    /// A PCI device
    #[value(name = "muser-pci")]
    Pci,
    /// A platform device
    #[value(name = "muser-platform")]
    Platform,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pci => "muser-pci",
            Self::Platform => "muser-platform",
        })
    }
}

/// `NAME=VALUE`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) name: String,
    pub(crate) value: u64,
}

/// A UUID in lower case, as the kernel shows it.
fn whole_uuid(text: &str) -> Result<String, String> {
    let dashes = [8, 13, 18, 23];
    let shaped = text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(at, byte)| match dashes.contains(&at) {
                true => byte == b'-',
                false => byte.is_ascii_hexdigit(),
            });
    if !shaped {
        return Err("a UUID has 32 hexadecimal digits in groups of 8-4-4-4-12, \
             such as 83b8f4f2-509f-482f-bc1e-e6bfe0fa1001"
            .to_owned());
    }
    Ok(text.to_ascii_lowercase())
}

fn uuid_prefix(text: &str) -> Result<String, String> {
    let fits = (1..=36).contains(&text.len());
    if !fits
        || !text
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
    {
        return Err(
            "a UUID, or the beginning of one, has up to 32 hexadecimal digits and dashes; \
             `muserctl list` shows them"
                .to_owned(),
        );
    }
    Ok(text.to_ascii_lowercase())
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "a timeout is a number of seconds, such as 10 or 0.5".to_owned())
}

fn assignment(text: &str) -> Result<Assignment, String> {
    let expected =
        || "an attribute is set as NAME=VALUE, such as reattach_timeout_ms=5000".to_owned();
    let (name, value) = text.split_once('=').ok_or_else(expected)?;
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if name.is_empty() || !name.bytes().all(word) {
        return Err(expected());
    }
    Ok(Assignment {
        name: name.to_owned(),
        value: number(value)?,
    })
}

/// A number, which may end in K, M or G.
fn number(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .parse::<u64>()
        .ok()
        .filter(|_| number)
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is not a number below 2^64, which may end in K, M or G"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn uuid_of_every_wrong_shape_is_refused() {
        let good = "83B8F4F2-509f-482f-bc1e-e6bfe0fa1001";
        assert_eq!(whole_uuid(good).unwrap(), good.to_lowercase());
        for bad in [
            "",
            "83b8",
            "83b8f4f2509f482fbc1ee6bfe0fa1001",
            "83b8f4f2-509f-482f-bc1e-e6bfe0fa100",
            "83b8f4f2-509f-482f-bc1e-e6bfe0fa10011",
            "83b8f4f2-509f-482f-bc1ee6bfe0fa-1001",
            "83b8f4f2-509f-482f-bc1e-e6bfe0fa100g",
            "{3b8f4f2-509f-482f-bc1e-e6bfe0fa100}",
        ] {
            assert!(whole_uuid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn prefix_that_could_leave_the_directory_is_refused() {
        assert_eq!(uuid_prefix("83B8-").unwrap(), "83b8-");
        for bad in ["", "..", "../..", "83b8/", "x"] {
            assert!(uuid_prefix(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn assignment_takes_numbers_with_a_unit() {
        let value = |text| assignment(text).map(|assignment| assignment.value);
        assert_eq!(value("reattach_timeout_ms=0"), Ok(0));
        assert_eq!(value("max_memory=64M"), Ok(64 << 20));
        assert_eq!(value("max_memory=18446744073709551615"), Ok(u64::MAX));
        for bad in [
            "",
            "a",
            "=1",
            "a=",
            "a=-1",
            "a=+1",
            "a=1T",
            "a=K",
            "../a=1",
            "a=18446744073709551615K",
        ] {
            assert!(value(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn timeout_is_a_number_of_seconds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "-1", "inf", "nan", "5s"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
