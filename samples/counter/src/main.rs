// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the [`counter`] device: `counter --uuid UUID --threads 4`.

use std::process::ExitCode;

use counter::Counter;
use libmuser::cli;

fn main() -> ExitCode {
    let about = "Serves counters that never miss or double an increment";
    let version = env!("CARGO_PKG_VERSION");
    cli::run_shared("counter", version, about, counter::model(), Counter::new)
}
