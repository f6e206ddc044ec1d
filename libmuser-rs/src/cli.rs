// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line that device programs share.
//!
//! A program without options of its own calls [`run`]. One that has some puts [`Options`] into its
//! own [`clap`] parser, with `#[command(flatten)]`, and calls [`Options::serve`]. For a
//! [`SharedDevice`] there are [`run_shared`] and [`SharedOptions`].
//!
//! # Exit codes
//!
//! | code | meaning                                                              |
//! |------|----------------------------------------------------------------------|
//! | 0    | the device was removed or handed over to another process, the program |
//! |      | was told to end (SIGTERM, SIGINT), or what was asked for was printed  |
//! | 1    | serving failed                                                       |
//! | 2    | the command line makes no sense                                      |
//! | 3    | the device could not be opened or attached to, or can't exist        |

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Command, FromArgMatches};
use log::{LevelFilter, Log, Metadata, Record};
use serde_json::{json, Value};

use crate::device::{Bus, Device, SharedDevice};
use crate::error::{Error, Result};
use crate::model::PciModel;
use crate::pci::regs::*;
use crate::region::{AreaKind, Region};
use crate::server::{Ended, Server, SharedServer, Stop};
use crate::transport::kernel::Uuid;
use crate::transport::{AttachOptions, KernelTransport, ListenOptions, SocketTransport, Transport};

/// Serving failed.
const EXIT_FAILED: u8 = 1;
/// The device could not be opened or attached to, or can't exist.
const EXIT_UNAVAILABLE: u8 = 3;

/// What `--help` ends with.
const AFTER_HELP: &str = "\
To make a device of the kernel's, write a new UUID to `create`, then serve it:
  echo UUID > /sys/class/mdev_bus/muser/mdev_supported_types/muser-pci/create

A program that was killed can be started again: it goes on where it was, and clients wait for it
meanwhile. To replace a running one, start its successor with --take-over. SIGTERM and SIGINT end
the program after the requests that it is at.

Exit codes: 0 the device was removed or handed over, or the program was told to end, 1 serving
failed, 2 wrong options, 3 the device could not be opened or attached to";

/// The options that device programs share.
#[derive(Clone, Debug, clap::Args)]
#[non_exhaustive]
pub struct Options {
    /// Serve the device with this UUID, as it was written to `create`, by way of muser.ko
    #[arg(
        long,
        value_name = "UUID",
        required_unless_present_any = ["print_capabilities", "socket_path", "fd"]
    )]
    pub uuid: Option<Uuid>,

    /// Serve vfio-user clients which connect to this socket, which is made
    #[arg(long, value_name = "PATH", conflicts_with_all = ["uuid", "fd"])]
    pub socket_path: Option<PathBuf>,

    /// Serve vfio-user clients over this descriptor: a socket that listens, or is connected
    #[arg(long, value_name = "N", conflicts_with = "uuid")]
    pub fd: Option<i32>,

    /// If another process serves the device, wait for it to hand the device over, which it is asked
    /// to do at once; clients notice nothing. Otherwise that is an error
    #[arg(long, requires = "uuid")]
    pub take_over: bool,

    /// Print what the device is and what this program can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// Say more: -v what the library does, -vv every request
    #[arg(short, long, action = clap::ArgAction::Count, conflicts_with = "quiet")]
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
        value_parser = clap::value_parser!(u16).range(1..=i64::from(muser_uapi::MUSER_MAX_SLOTS) - 1)
    )]
    pub threads: u16,
}

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
        Ok(options) => options.serve(name, version, model, device),
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
        Ok(options) => options.serve(name, version, model, device),
        Err(error) => error.exit(),
    }
}

fn parse<O: Args + FromArgMatches>(
    name: &'static str,
    version: &'static str,
    about: &'static str,
) -> Result<O, clap::Error> {
    let command = O::augment_args(Command::new(name).version(version));
    let matches = command.about(about).after_help(AFTER_HELP).get_matches();
    O::from_arg_matches(&matches)
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
        StderrLog::install(self.level());
        let attached = model.and_then(|model| {
            if self.print_capabilities {
                let capabilities = capabilities(name, version, &model);
                writeln!(std::io::stdout(), "{capabilities:#}")?;
                return Ok(None);
            }
            let options = AttachOptions::new().standby(self.take_over);
            let (transport, what): (Box<dyn Transport>, _) =
                match (&self.uuid, &self.socket_path, self.fd) {
                    (Some(uuid), ..) => (Box::new(KernelTransport::open(uuid)?), uuid.to_string()),
                    (_, Some(path), _) => (
                        Box::new(SocketTransport::listen(path, ListenOptions::new())?),
                        path.display().to_string(),
                    ),
                    (.., Some(number)) => {
                        let fd = crate::sys::inherit(number)
                            .map_err(|errno| Error::io(format!("descriptor {number}"), errno))?;
                        let transport = SocketTransport::from_fd(fd)?;
                        (Box::new(transport), format!("descriptor {number}"))
                    }
                    _ => return Ok(None),
                };
            let server = attach(model, transport, options)?;
            // Before, while it may wait for another server, a signal just ends the process.
            let stop = Stop::new()?;
            stop.use_on_termination()?;
            log::info!("{name} serves {what}");
            Ok(Some((server, stop)))
        });
        let (server, stop) = match attached {
            Ok(Some(attached)) => attached,
            Ok(None) => return ExitCode::SUCCESS,
            Err(error) => {
                log::error!("{name}: {error}");
                return EXIT_UNAVAILABLE.into();
            }
        };
        match server(&stop) {
            Ok(ended) => {
                log::info!("{name}: {}", farewell(ended));
                ExitCode::SUCCESS
            }
            Err(error) => {
                log::error!("{name}: {error}");
                EXIT_FAILED.into()
            }
        }
    }

    fn level(&self) -> LevelFilter {
        match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::Error,
            (false, 0) => LevelFilter::Info,
            (false, 1) => LevelFilter::Debug,
            (false, _) => LevelFilter::Trace,
        }
    }
}

fn farewell(ended: Ended) -> &'static str {
    match ended {
        Ended::Removed => "the device was removed",
        Ended::Stopped => "stopped; requests wait for the next server",
        Ended::HandedOver => "another process has taken the device over",
        Ended::Abandoned => "the device was abandoned",
    }
}

/// What `--print-capabilities` prints.
///
/// Numbers which people write in hexadecimal are strings.
fn capabilities(name: &str, version: &str, model: &PciModel) -> Value {
    let config = model.config_space();
    let hex = |offset| format!("{:#06x}", config.word(offset));
    let mut class = [0; 3];
    config.read(PCI_CLASS_PROG.into(), &mut class);
    let [interface, subclass, base] = class;
    let regions = model.description().regions.iter().map(|region| {
        let name = Region::from_index(region.index).map(|region| region.to_string());
        let areas = |kind| {
            let areas = region.areas.iter().filter(move |area| area.kind == kind);
            let area = |area: &crate::Area| json!({ "offset": area.offset, "size": area.size });
            areas.map(area).collect::<Vec<_>>()
        };
        json!({
            "index": region.index,
            "name": name,
            "size": region.size,
            "readable": region.readable,
            "writable": region.writable,
            "mappable": areas(AreaKind::Mappable),
            "doorbells": areas(AreaKind::Doorbell),
        })
    });
    let irqs =
        model.description().irqs.iter().map(
            |irq| json!({ "index": irq.index, "vectors": irq.count, "maskable": irq.maskable }),
        );
    json!({
        "name": name,
        "version": version,
        "transports": [{ "name": "kernel", "abi": muser_uapi::MUSER_ABI_VERSION }],
        "device": {
            "bus": "pci",
            "vendor": hex(PCI_VENDOR_ID),
            "device": hex(PCI_DEVICE_ID),
            "subsystem_vendor": hex(PCI_SUBSYSTEM_VENDOR_ID),
            "subsystem_device": hex(PCI_SUBSYSTEM_ID),
            "class": format!("0x{base:02x}{subclass:02x}{interface:02x}"),
            "regions": regions.collect::<Vec<_>>(),
            "interrupts": irqs.collect::<Vec<_>>(),
            "state": model.state,
        },
    })
}

/// A log on standard error: a line each, which starts with the level.
struct StderrLog;

impl StderrLog {
    /// Becomes the log of the process, unless the program has one already.
    fn install(level: LevelFilter) {
        if log::set_logger(&Self).is_ok() {
            log::set_max_level(level);
        }
    }
}

impl Log for StderrLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            // With standard error closed there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "{level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, Msi, PciBuilder};

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let command = Options::augment_args(Command::new("test"));
        let arguments = std::iter::once(&"test").chain(arguments);
        Options::from_arg_matches(&command.try_get_matches_from(arguments)?)
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
        let error = parse(&["--uuid", "7"]).unwrap_err();

        assert!(error.to_string().contains("not a UUID"), "{error}");
    }

    #[test]
    fn nothing_to_do_is_refused() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--print-capabilities"]).is_ok());
    }

    #[test]
    fn take_over_needs_a_device() {
        assert!(parse(&["--print-capabilities", "--take-over"]).is_err());
        assert!(parse(&["--uuid", UUID, "--take-over"]).unwrap().take_over);
        assert!(!parse(&["--uuid", UUID]).unwrap().take_over);
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
    fn capabilities_show_the_device() {
        let builder = PciBuilder::new(0x494f, 0x0dc8)
            .class(0x11, 0x80, 0)
            .msi(Msi::new(2));
        let bar = Bar::io(8).doorbells(4..8);
        let model = builder.bar(2, bar).state(3).build().unwrap();

        let value = capabilities("gpio", "1", &model);

        assert_eq!(value["device"]["vendor"], "0x494f");
        assert_eq!(value["device"]["class"], "0x118000");
        assert_eq!(value["device"]["regions"][0]["name"], "BAR 2");
        let doorbell = &value["device"]["regions"][0]["doorbells"][0];
        assert_eq!(doorbell["offset"], 4);
        assert_eq!(value["device"]["interrupts"][0]["vectors"], 2);
        assert_eq!(value["device"]["state"], 3);
    }
}
