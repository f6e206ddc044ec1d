// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left when everything was tried: these tests come last.

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, works};
use muser_e2e::mdev::Mdev;
use muser_e2e::module;

use super::topic;

topic!("clean", once: [
    no_device_and_no_node_is_left,
    nobody_holds_the_module,
    module_can_be_unloaded,
    kernel_is_not_tainted_by_faults,
], roads: []);

fn no_device_and_no_node_is_left() -> Result<()> {
    equal("devices", Mdev::list(), Vec::<String>::new())?;
    let nodes: Vec<_> = std::fs::read_dir("/dev/muser")
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    equal("nodes in /dev/muser", nodes, Vec::new())?;
    for directory in ["/dev/vfio", "/dev/vfio/devices"] {
        let Ok(entries) = std::fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let fixed = ["vfio", "devices"].iter().any(|fixed| name == *fixed);
            ensure!(fixed, "{} is left", entry.path().display());
        }
    }
    Ok(())
}

fn nobody_holds_the_module() -> Result<()> {
    module::load()?;
    equal("references", module::references()?, 0)
}

fn module_can_be_unloaded() -> Result<()> {
    module::load()?;
    works("rmmod", module::unload())?;
    ensure!(!module::is_loaded(), "sysfs still has the module");
    module::load()
}

/// Of the taint bits (Documentation/admin-guide/tainted-kernels.rst), an out-of-tree module (12)
/// that is not signed (13), and a kernel that runs tests (18), are as they should be.
fn kernel_is_not_tainted_by_faults() -> Result<()> {
    let expected = 1 << 12 | 1 << 13 | 1 << 18;
    let taint = module::taint()?;
    equal("taint bits beside the expected", taint & !expected, 0)
}
