// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the [`gpio`] card: `gpio --uuid UUID`.

use std::process::ExitCode;

use gpio::Gpio;
use libmuser::cli;

fn main() -> ExitCode {
    let about = "Serves an ACCES PCI-IDIO-16 digital I/O card";
    let version = env!("CARGO_PKG_VERSION");
    cli::run("gpio", version, about, gpio::model(), |bus| {
        Ok(Gpio::new(bus))
    })
}
