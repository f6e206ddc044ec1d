// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the [`nvme`] controller: `nvme --uuid UUID --file disk.img --size 10G`.

use std::process::ExitCode;

use clap::Parser;
use libmuser::cli;
use nvme::Nvme;

/// Serves an NVMe controller over a file or a block device
#[derive(Debug, Parser)]
#[command(name = "nvme", version)]
struct Arguments {
    #[command(flatten)]
    serve: cli::SharedOptions,
    #[command(flatten)]
    controller: nvme::Options,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let settings = arguments.controller.settings();
    let (serve, version) = (&arguments.serve, env!("CARGO_PKG_VERSION"));
    serve.serve("nvme", version, nvme::model(&settings), |bus| {
        Nvme::new(bus, &settings, arguments.controller.backing()?)
    })
}
