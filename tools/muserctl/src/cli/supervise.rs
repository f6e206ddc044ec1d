// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `muserctl supervise`, and its manual page.

use clap::{ArgAction, Args};
use libmuser::cli::manual::Section;
use libmuser::cli::{parse_mode, Handed};
use log::LevelFilter;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// What the page says beside the options.
pub(crate) const SECTIONS: &[Section<'_>] = &[
    (
        "HOW IT WORKS",
        "\
The supervisor has the socket, the client's connection and all descriptors. It starts PROGRAM with
`--fd N` behind its arguments, and gives it the client's messages. When the program dies it is
started again and goes on where its predecessor was: memory that is mapped, interrupts and what
was negotiated are set up in it again, the device's memory and state are those of before, and
requests without an answer are given to it once more, marked as replays. The client does not
notice, but for the time that it takes.

A program that describes another device than the first one, or keeps its state in another way, is
refused. One that ends by itself before it has ever served, with status 0, 2 or 3 or five times,
is given up; one that ends at once again and again later on is started at longer and longer
intervals, up to 5 seconds.

With no program there, a request waits for --reattach-timeout and then fails with ETIMEDOUT. QEMU
gives a device up that does not answer for 5 seconds (its option x-msg-timeout), so let it be
less. A request that 64 programs have died with fails with EIO.",
    ),
    (
        "SIGNALS",
        "  SIGHUP           tells the program to end, and starts it again: how to upgrade it
  SIGTERM, SIGINT  tells the program to end, and ends; once more, the program is killed

The program is told by SIGTERM, and has 10 seconds. It is killed when the supervisor dies.",
    ),
    (
        "EXIT STATUS",
        "  0  told to end, or the client of a connected socket (--fd) has gone
  1  supervising failed; a sentence on standard error says why
  2  the command line makes no sense
  3  the socket could not be made or taken
  4  the program could not be started, or has never come so far as to serve",
    ),
    (
        "ENVIRONMENT",
        "  LISTEN_FDS, LISTEN_PID   what `--fd systemd` checks, see sd_listen_fds(3)",
    ),
    ("FILES", "  PATH   the socket; it is removed at the end"),
    (
        "EXAMPLES",
        "\
A device that survives its program, and a VMM that uses it:

  muserctl supervise --socket-path /tmp/counter.sock -- counter --threads 2
  qemu-system-x86_64 -machine q35,memory-backend=ram -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on \\
    -device '{\"driver\":\"vfio-user-pci\",
              \"socket\":{\"type\":\"unix\",\"path\":\"/tmp/counter.sock\"}}'

Put a new version of the program in its place, and let it take over while the VM runs:

  install new/counter /usr/bin/counter
  kill -HUP $(pgrep -x -f 'muserctl supervise .*counter.*')",
    ),
];

/// Options of `supervise`.
#[derive(Args, Debug)]
pub(crate) struct Supervise {
    /// Serve clients at a UNIX socket that is made here
    ///
    /// A socket that nobody listens at any more is replaced; anything else with that name is left
    /// alone.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "fd",
        conflicts_with = "fd"
    )]
    pub(crate) socket_path: Option<PathBuf>,
    /// Permissions of the socket, in octal [default: 0600]
    #[arg(long, value_name = "MODE", requires = "socket_path", conflicts_with = "fd", value_parser = parse_mode)]
    pub(crate) socket_mode: Option<u32>,
    /// Group of the socket, by name or number [default: one's own]
    #[arg(
        long,
        value_name = "GROUP",
        requires = "socket_path",
        conflicts_with = "fd"
    )]
    pub(crate) socket_group: Option<String>,
    /// Serve clients at a socket that muserctl was started with: the number of its descriptor, or
    /// `systemd`
    #[arg(long, value_name = "N|systemd")]
    pub(crate) fd: Option<Handed>,
    /// How long a request waits while no program is there [default: 4]
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds)]
    pub(crate) reattach_timeout: Option<Duration>,
    /// Say more: -v what happens to programs, -vv every message that makes no sense
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Say errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The program and its arguments; it must take `--fd N`, as programs built on libmuser do
    #[arg(
        last = true,
        required = true,
        num_args = 1..,
        value_name = "PROGRAM [ARGS]"
    )]
    pub(crate) command: Vec<OsString>,
}

impl Supervise {
    pub(crate) fn level(&self) -> LevelFilter {
        match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::Error,
            (false, 0) => LevelFilter::Info,
            (false, 1) => LevelFilter::Debug,
            (false, _) => LevelFilter::Trace,
        }
    }

    pub(crate) fn program(&self) -> Vec<OsString> {
        self.command.clone()
    }
}
