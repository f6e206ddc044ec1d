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
