// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options themselves, and what of them does not fit together.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::ArgAction;
use log::LevelFilter;

use super::handed::Handed;
use super::road::Road;
use crate::error::Result;
use crate::transport::kernel::Uuid;
use crate::transport::{AttachOptions, Wait};

/// Versions of the device that a program of this library can be. What a client sees of a device
/// made with the same builder calls changes between two of them only.
pub const COMPAT_VERSIONS: &[u32] = &[1];

/// Threads that can serve: a slot each, and one to take with.
const MOST_THREADS: u32 = muser_uapi::MUSER_MAX_SLOTS - 1;

/// The options that device programs share.
#[derive(Clone, Debug, clap::Args)]
#[non_exhaustive]
pub struct Options {
    /// Serve the device with this UUID, as it was written to `create`, by way of muser.ko
    #[arg(long, value_name = "UUID", conflicts_with_all = ["socket_path", "fd"])]
    pub uuid: Option<Uuid>,

    /// Serve vfio-user clients, one after another, at a UNIX socket that is made here
    ///
    /// A socket that nobody listens at any more is replaced; anything else with that name is left
    /// alone, and the program ends. The socket goes with the program.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Permissions of the socket, as chmod(1) takes them in octal [default: 0600]
    ///
    /// Who may write to it may be a client.
    #[arg(long, value_name = "MODE", requires = "socket_path", conflicts_with_all = ["uuid", "fd"], value_parser = parse_mode)]
    pub socket_mode: Option<u32>,

    /// Group of the socket, by name or number [default: the program's]
    #[arg(long, value_name = "GROUP", requires = "socket_path", conflicts_with_all = ["uuid", "fd"])]
    pub socket_group: Option<String>,

    /// Serve vfio-user clients at a socket which the program was started with
    ///
    /// N is the number of the descriptor. A listening UNIX socket: clients one after another. A
    /// connected one: this client, and the program ends when it has gone. `systemd`: the socket
    /// that a socket unit hands over, which is checked to be one and for this process.
    #[arg(long, value_name = "N|systemd")]
    pub fd: Option<Handed>,

    /// If another process serves the device, wait for it to hand the device over, which it is asked
    /// to do at once; clients notice nothing. Otherwise that is an error
    #[arg(long, requires = "uuid", conflicts_with_all = ["socket_path", "fd"])]
    pub take_over: bool,

    /// Look for requests all the time instead of sleeping until one comes
    ///
    /// A client then waits for no wakeup of this program, which keeps one processor busy.
    #[arg(long)]
    pub busy_poll: bool,

    /// Be the device as this version of it; --print-capabilities tells which ones there are
    #[arg(long, value_name = "N", value_parser = compat_version)]
    pub compat_version: Option<u32>,

    /// Print what the device is and what this program can do, as JSON, and exit
    ///
    /// Nothing is served, whatever other options say.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Say more: -v what the library does, -vv every request
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Say errors only
    #[arg(short, long)]
    pub quiet: bool,
}

/// The options of a program whose device several threads can serve.
#[derive(Clone, Debug, clap::Args)]
#[non_exhaustive]
pub struct SharedOptions {
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would print it as the program's description"
    )]
    pub options: Options,

    /// Serve with this many threads
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST_THREADS))
    )]
    pub threads: u16,
}

impl Options {
    /// What clients come by.
    ///
    /// # Errors
    ///
    /// Nothing says so.
    pub(super) fn road(&self) -> Result<Road<'_>, clap::Error> {
        if let Some(uuid) = &self.uuid {
            return Ok(Road::Kernel(uuid));
        }
        if let Some(path) = &self.socket_path {
            return Ok(Road::Path {
                path,
                mode: self.socket_mode,
                group: self.socket_group.as_deref(),
            });
        }
        if let Some(handed) = self.fd {
            return Ok(Road::Handed(handed));
        }
        Err(clap::Error::raw(
            ErrorKind::MissingRequiredArgument,
            "nothing says how clients are to come to the device: give --uuid UUID for a device of \
             muser.ko, --socket-path PATH for a vfio-user socket, or --fd N for a socket handed \
             over; --help shows how\n",
        ))
    }

    /// How the server is to attach and to wait.
    pub(super) fn attach_options(&self) -> AttachOptions {
        let wait = if self.busy_poll {
            Wait::Poll
        } else {
            Wait::Block
        };
        AttachOptions::new().standby(self.take_over).wait(wait)
    }

    pub(super) fn level(&self) -> LevelFilter {
        match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::Error,
            (false, 0) => LevelFilter::Info,
            (false, 1) => LevelFilter::Debug,
            (false, _) => LevelFilter::Trace,
        }
    }
}

/// Parses the permissions of a socket, which are octal.
///
/// # Errors
///
/// They are not, or beyond 777; the error says so.
pub fn parse_mode(text: &str) -> Result<u32, String> {
    let octal = !text.is_empty() && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    let mode = u32::from_str_radix(text, 8).ok().filter(|_| octal);
    mode.filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "permissions are octal digits up to 777, such as 0660".to_owned())
}

fn compat_version(text: &str) -> Result<u32, String> {
    let known = |version: &u32| COMPAT_VERSIONS.contains(version);
    text.parse().ok().filter(known).ok_or_else(|| {
        let versions: Vec<_> = COMPAT_VERSIONS.iter().map(u32::to_string).collect();
        format!(
            "this program can be version {} of the device",
            versions.join(" or ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, Command, FromArgMatches};

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let command = Options::augment_args(Command::new("test"));
        let arguments = std::iter::once(&"test").chain(arguments);
        let options = Options::from_arg_matches(&command.try_get_matches_from(arguments)?)?;
        if !options.print_capabilities {
            options.road()?;
        }
        Ok(options)
    }

    fn refusal(arguments: &[&str]) -> String {
        parse(arguments).unwrap_err().to_string()
    }

    const UUID: &str = "c9abdcb5-5279-413a-9057-c81d2605ce9c";

    #[test]
    fn uuid_is_parsed() {
        let options = parse(&["--uuid", UUID, "-vv"]).unwrap();

        assert_eq!(
            options.uuid.as_ref().map(Uuid::to_string).as_deref(),
            Some(UUID)
        );
        assert_eq!(options.level(), LevelFilter::Trace);
    }

    #[test]
    fn bad_uuid_is_refused_in_words() {
        assert!(refusal(&["--uuid", "7"]).contains("not a UUID"));
    }

    #[test]
    fn nothing_to_do_is_refused_with_what_there_is() {
        let said = refusal(&[]);

        for option in ["--uuid", "--socket-path", "--fd"] {
            assert!(said.contains(option), "{said}");
        }
        assert!(parse(&["--print-capabilities"]).is_ok());
    }

    #[test]
    fn two_roads_at_once_are_refused() {
        for both in [
            ["--uuid", UUID, "--socket-path", "/a"],
            ["--uuid", UUID, "--fd", "3"],
            ["--socket-path", "/a", "--fd", "3"],
        ] {
            let said = refusal(&both);
            assert!(said.contains("cannot be used with"), "{said}");
        }
    }

    #[test]
    fn take_over_needs_a_device_of_the_kernels() {
        assert!(parse(&["--print-capabilities", "--take-over"]).is_err());
        assert!(parse(&["--socket-path", "/a", "--take-over"]).is_err());
        assert!(parse(&["--uuid", UUID, "--take-over"]).unwrap().take_over);
        assert!(!parse(&["--uuid", UUID]).unwrap().take_over);
    }

    #[test]
    fn permissions_are_those_of_a_socket_made_here() {
        let options = ["--socket-path", "/a", "--socket-mode", "0660"];
        assert_eq!(parse(&options).unwrap().socket_mode, Some(0o660));
        for bad in ["", "8", "1777", "rw", "-1", "+7", "99999999999"] {
            let mode = format!("--socket-mode={bad}");
            let said = refusal(&["--socket-path", "/a", &mode]);
            assert!(said.contains("octal"), "{said}");
        }
        for option in [["--socket-mode", "0660"], ["--socket-group", "kvm"]] {
            for road in [["--fd", "3"], ["--uuid", UUID]] {
                let said = refusal(&[road, option].concat());
                assert!(said.contains("cannot be used with"), "{said}");
            }
            assert!(refusal(&option).contains("--socket-path"));
        }
    }

    #[test]
    fn compat_version_that_is_not_known_is_refused() {
        let version = |number: &str| {
            let option = format!("--compat-version={number}");
            parse(&["--fd", "3", &option])
        };

        assert_eq!(version("1").unwrap().compat_version, Some(1));
        for unknown in ["0", "2", "-1", "", "one"] {
            let said = version(unknown).unwrap_err().to_string();
            assert!(said.contains("can be version 1"), "{said}");
        }
    }

    #[test]
    fn threads_out_of_range_are_refused() {
        let parse = |threads: &str| {
            let command = SharedOptions::augment_args(Command::new("test"));
            let arguments = ["test", "--uuid", UUID, "--threads", threads];
            let matches = command.try_get_matches_from(arguments)?;
            SharedOptions::from_arg_matches(&matches).map(|options| options.threads)
        };

        assert_eq!(parse("4").unwrap(), 4);
        assert!(parse("0").is_err());
        assert!(parse("256").is_err());
    }

    #[test]
    fn loud_and_quiet_exclude_each_other() {
        assert!(parse(&["--uuid", UUID, "-v", "-q"]).is_err());
    }

    #[test]
    fn busy_poll_reaches_the_server() {
        let wait = |arguments: &[&str]| parse(arguments).unwrap().attach_options().wait;

        assert_eq!(wait(&["--fd", "3"]), Wait::Block);
        assert_eq!(wait(&["--fd", "3", "--busy-poll"]), Wait::Poll);
    }
}
