// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the [`serial`] port: `serial --uuid UUID --pty /run/console`.

use std::process::ExitCode;

use clap::Parser;
use libmuser::cli;
use serial::{line, Serial};

/// Serves a 16550A PCI serial port
#[derive(Debug, Parser)]
#[command(name = "serial", version)]
struct Arguments {
    #[command(flatten)]
    serve: cli::Options,
    #[command(flatten)]
    line: line::Options,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let version = env!("CARGO_PKG_VERSION");
    let line = || arguments.line.line();
    arguments
        .serve
        .serve("serial", version, serial::model(), |bus| {
            Serial::new(bus, line()?)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    const UUID: &str = "c9abdcb5-5279-413a-9057-c81d2605ce9c";

    fn parse(arguments: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once(&"serial").chain(arguments))
    }

    #[test]
    fn options_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn line_is_of_one_kind() {
        assert!(parse(&["--uuid", UUID]).is_ok());
        assert!(parse(&["--uuid", UUID, "--pty"]).is_ok());
        assert!(parse(&["--uuid", UUID, "--pty", "/run/console"]).is_ok());
        assert!(parse(&["--uuid", UUID, "--stdio", "--pty"]).is_err());
        assert!(parse(&["--uuid", UUID, "--stdio", "--listen", "/run/line"]).is_err());
    }
}
