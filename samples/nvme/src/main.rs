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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    const UUID: &str = "c9abdcb5-5279-413a-9057-c81d2605ce9c";

    fn parse(arguments: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once(&"nvme").chain(arguments))
    }

    #[test]
    fn options_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn file_is_needed_to_serve_and_not_to_print() {
        assert!(parse(&["--uuid", UUID]).is_err());
        assert!(parse(&["--print-capabilities"]).is_ok());
        assert!(parse(&["--uuid", UUID, "--file", "disk"]).is_ok());
    }

    #[test]
    fn values_that_can_not_be_are_refused() {
        let parse = |more: [&str; 2]| {
            let file = ["--uuid", UUID, "--file", "disk"];
            parse(&[&file[..], &more].concat())
        };
        for good in [
            ["--queues", "64"],
            ["--block-size", "4096"],
            ["--size", "10G"],
            ["--io", "sync"],
            ["--serial", "0001"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}");
        }
        for bad in [
            ["--queues", "0"],
            ["--queues", "65"],
            ["--block-size", "1024"],
            ["--size", "0"],
            ["--io", "magic"],
            ["--serial", ""],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
