// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line that device programs share.
//!
//! A program without options of its own calls [`run`]. One that has some puts [`Options`] into its
//! own [`clap`] parser, with `#[command(flatten)]`, and calls [`Options::serve`]. For a
//! [`SharedDevice`] there are [`run_shared`] and [`SharedOptions`].
//!
//! By which transport clients come is for whoever starts the program: `--uuid` (a device of
//! `muser.ko`), `--socket-path` (a vfio-user socket), or `--fd` (a socket handed over).
//!
//! # Exit codes
//!
//! | code | meaning                                                                   |
//! |------|---------------------------------------------------------------------------|
//! | 0    | the device was removed or handed over to another process, the client of a  |
//! |      | connected socket has gone, the program was told to end (SIGTERM, SIGINT),  |
//! |      | or what was asked for was printed                                         |
//! | 1    | serving failed                                                            |
//! | 2    | the command line makes no sense                                           |
//! | 3    | the device or the socket could not be opened or attached to, or can't exist |

use std::io::Write;
use std::process::ExitCode;

use clap::{Arg, ArgAction, Args, Command, FromArgMatches};

use crate::device::{Bus, Device, SharedDevice};
use crate::error::Result;
use crate::model::PciModel;
use crate::server::{Ended, Server, SharedServer, Stop};
use crate::transport::{AttachOptions, Transport};

mod capabilities;
mod handed;
pub mod manual;
mod options;
mod road;
mod stderr_log;

use capabilities::capabilities;
pub use handed::Handed;
pub use options::{parse_mode, Options, SharedOptions, COMPAT_VERSIONS};
pub use road::access as socket_access;
pub use stderr_log::log_to_stderr;

/// Serving failed.
const EXIT_FAILED: u8 = 1;
/// The command line makes no sense.
const EXIT_USAGE: u8 = 2;
/// The device could not be opened or attached to, or can't exist.
const EXIT_UNAVAILABLE: u8 = 3;

/// What `--help` ends with, and what stands in the manual page.
const SECTIONS: &[manual::Section<'_>] = &[
    (
        "BY WAY OF THE KERNEL",
        "\
Any VFIO client, and no change to it. Needs muser.ko. Make a device, serve it, and give it to a
VMM:

  uuid=$(muserctl create)
  PROGRAM --uuid $uuid
  qemu-system-x86_64 ... -device vfio-pci,sysfsdev=/sys/bus/mdev/devices/$uuid

A program that was killed can be started again: it goes on where it was, and clients wait for it
meanwhile. To replace a running one, start its successor with --take-over.",
    ),
    (
        "BY WAY OF A SOCKET",
        "\
Clients that speak vfio-user, such as QEMU from 10.1 on. Needs neither a module nor root. The
guest's memory must be shared:

  PROGRAM --socket-path /tmp/device.sock
  qemu-system-x86_64 -machine q35,memory-backend=ram -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on \\
    -device '{\"driver\":\"vfio-user-pci\",
              \"socket\":{\"type\":\"unix\",\"path\":\"/tmp/device.sock\"}}'

One client at a time; the next may connect when it has gone, and finds the device as after
power-on. For a client that does not notice when the program dies or is replaced, start the
program by muserctl-supervise(1).",
    ),
    (
        "SIGNALS",
        "\
SIGTERM and SIGINT end the program after the requests that it is at; the same signal once more
ends it at once.",
    ),
    (
        "EXIT STATUS",
        "  0  the device was removed or handed over, the client of a connected socket has gone, the program
     was told to end, or what was asked for was printed
  1  serving failed; the last line on standard error says why
  2  the command line makes no sense
  3  the device or the socket could not be opened or attached to, or can't exist",
    ),
    (
        "EXAMPLES",
        "\
For clients of a group, without a wakeup for each access:

  PROGRAM --socket-path /run/device.sock --socket-mode 0660 --socket-group kvm --busy-poll

At a socket that systemd makes, as the unit of the program has it:

  ExecStart=/usr/bin/PROGRAM --fd systemd

What can this program be, before it is started?

  PROGRAM --print-capabilities | jq '.transports, .compat_versions'",
    ),
    (
        "ENVIRONMENT",
        "  LISTEN_FDS, LISTEN_PID   what `--fd systemd` checks, see sd_listen_fds(3)",
    ),
    (
        "FILES",
        "  /dev/muser/UUID   what --uuid serves; `muserctl create` makes it",
    ),
];

/// Pages which the manual page leads to.
const SEE_ALSO: &[&str] = &["muserctl(1)", "muserctl-supervise(1)", "systemd.socket(5)"];

/// Serves a device as the command line of the process says, to the end.
///
/// `name`, `version` and `about` are for `--help` and `--version`; give it
/// `env!("CARGO_PKG_NAME")` and so on.
pub fn run<D: Device>(
    name: &'static str,
    version: &'static str,
    about: &'static str,
    model: Result<PciModel>,
    device: impl FnOnce(&Bus) -> Result<D>,
) -> ExitCode {
    match parse::<Options>(name, version, about) {
        Ok(Parsed::Manual(page)) => print(name, &page),
        Ok(Parsed::Options(options)) => options.serve(name, version, model, device),
        Err(error) => error.exit(),
    }
}

/// Serves a device with as many threads as the command line of the process says, to the end.
///
/// As [`run`], with `--threads` in addition.
pub fn run_shared<S: SharedDevice>(
    name: &'static str,
    version: &'static str,
    about: &'static str,
    model: Result<PciModel>,
    device: impl FnOnce(&Bus) -> Result<S>,
) -> ExitCode {
    match parse::<SharedOptions>(name, version, about) {
        Ok(Parsed::Manual(page)) => print(name, &page),
        Ok(Parsed::Options(options)) => options.serve(name, version, model, device),
        Err(error) => error.exit(),
    }
}

fn parse<O: Args + FromArgMatches>(
    name: &'static str,
    version: &'static str,
    about: &'static str,
) -> Result<Parsed<O>, clap::Error> {
    let command = command::<O>(name, version).about(about);
    let matches = command.clone().get_matches();
    if matches.get_flag(PRINT_MAN) {
        return Ok(Parsed::Manual(manual_page(command)?));
    }
    O::from_arg_matches(&matches).map(Parsed::Options)
}

/// What the command line of a process says.
enum Parsed<O> {
    Options(O),
    /// The manual page, to be printed.
    Manual(Vec<u8>),
}

/// The option that prints the manual page.
const PRINT_MAN: &str = "print-man";

fn manual_page(command: Command) -> std::io::Result<Vec<u8>> {
    let name = command.get_name().to_owned();
    let sections = SECTIONS.iter();
    let sections: Vec<_> = sections
        .map(|(title, text)| (*title, text.replace("PROGRAM", &name)))
        .collect();
    let sections: Vec<manual::Section<'_>> = sections
        .iter()
        .map(|(title, text)| (*title, text.as_str()))
        .collect();
    manual::page(command, &sections, SEE_ALSO)
}

/// The command line of a program whose options are `O`.
fn command<O: Args>(name: &'static str, version: &'static str) -> Command {
    let help = manual::help(SECTIONS).replace("PROGRAM", name);
    let print_man = Arg::new(PRINT_MAN)
        .long(PRINT_MAN)
        .help("Print the manual page, and exit")
        .action(ArgAction::SetTrue)
        .hide(true);
    O::augment_args(Command::new(name).version(version))
        .arg(print_man)
        .after_long_help(help)
        .after_help("--help says how clients come to the device, and what the exit codes mean.")
        .max_term_width(100)
}

impl SharedOptions {
    /// Serves a device as these options say, to the end.
    pub fn serve<S: SharedDevice>(
        &self,
        name: &str,
        version: &str,
        model: Result<PciModel>,
        device: impl FnOnce(&Bus) -> Result<S>,
    ) -> ExitCode {
        let threads = self.threads.into();
        let program = (name, version);
        self.options
            .serve_by(program, model, |model, transport, options| {
                let options = options.threads(threads);
                let mut server = SharedServer::attach(model, transport, &options, device)?;
                Ok(move |stop: &Stop| server.run_until(stop))
            })
    }
}

impl Options {
    /// Serves a device as these options say, to the end: that of the device, or SIGTERM or SIGINT.
    pub fn serve<D: Device>(
        &self,
        name: &str,
        version: &str,
        model: Result<PciModel>,
        device: impl FnOnce(&Bus) -> Result<D>,
    ) -> ExitCode {
        let program = (name, version);
        self.serve_by(program, model, |model, transport, options| {
            let mut server = Server::attach(model, transport, &options, device)?;
            Ok(move |stop: &Stop| server.run_until(stop))
        })
    }

    /// Serves a device by a server of any kind, which `attach` makes.
    fn serve_by<R: FnOnce(&Stop) -> Result<Ended>>(
        &self,
        (name, version): (&str, &str),
        model: Result<PciModel>,
        attach: impl FnOnce(PciModel, Box<dyn Transport>, AttachOptions) -> Result<R>,
    ) -> ExitCode {
        log_to_stderr(self.level());
        let unavailable = |error| {
            log::error!("{name}: {error}");
            ExitCode::from(EXIT_UNAVAILABLE)
        };
        let model = match model {
            Ok(model) => model,
            Err(error) => return unavailable(error),
        };
        if self.print_capabilities {
            let capabilities = capabilities(name, version, &model);
            return print(name, format!("{capabilities:#}\n").as_bytes());
        }
        let road = match self.road() {
            Ok(road) => road,
            Err(error) => {
                // With standard error closed there is nobody left to tell.
                let _ = error.print();
                return EXIT_USAGE.into();
            }
        };
        let attached = road.open().and_then(|transport| {
            let server = attach(model, transport, self.attach_options())?;
            // Before, while it may wait for another server, a signal just ends the process.
            let stop = Stop::new()?;
            stop.use_on_termination()?;
            Ok((server, stop))
        });
        let (server, stop) = match attached {
            Ok(attached) => attached,
            Err(error) => return unavailable(error),
        };
        log::info!("{name} serves {road}");
        match server(&stop) {
            Ok(ended) => {
                log::info!("{name}: {}", road.farewell(ended));
                ExitCode::SUCCESS
            }
            Err(error) => {
                log::error!("{name}: {error}");
                EXIT_FAILED.into()
            }
        }
    }
}

/// Writes to standard output. That nobody reads on is no failure.
fn print(name: &str, bytes: &[u8]) -> ExitCode {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            log::error!("{name}: writing to standard output: {error}");
            EXIT_FAILED.into()
        }
        _ => ExitCode::SUCCESS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_are_consistent() {
        command::<Options>("thing", "1").debug_assert();
        command::<SharedOptions>("thing", "1").debug_assert();
    }

    #[test]
    fn help_teaches_both_roads_in_the_name_of_the_program() {
        let help = command::<Options>("thing", "1")
            .render_long_help()
            .to_string();

        assert!(help.contains("thing --uuid $"), "{help}");
        assert!(help.contains("thing --socket-path /"), "{help}");
        assert!(help.contains("vfio-user-pci") && !help.contains("PROGRAM"));
        assert!(!help.contains("print-man"));
    }

    #[test]
    fn manual_page_has_options_exit_codes_and_other_pages() {
        let page = manual_page(command::<SharedOptions>("thing", "1")).unwrap();
        let page = String::from_utf8(page).unwrap();

        for part in [
            "EXIT STATUS",
            "SEE ALSO",
            "\\-\\-threads",
            "thing \\-\\-uuid",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
    }
}
