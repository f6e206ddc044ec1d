// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A kernel's source, from Debian's source package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::archive::{self, Package};
use crate::cache::{Cache, Key};
use crate::root::Root;
use crate::step::Step;
use crate::workbench::Workbench;

const RECIPE: &str = "source 1";
/// Large, and nothing here compiles it. What Kconfig and make read stays.
const STRIPPED: &[&str] = &[
    "Documentation",
    "drivers/gpu",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/scsi",
    "drivers/staging",
    "sound",
    "tools/perf",
    "tools/testing",
];

/// Whether the source is in the cache.
pub(super) fn present(cache: &Cache, package: &Package) -> bool {
    cache.find("source", &key(package)).is_some()
}

/// The unpacked source.
pub(super) fn prepare(bench: &Workbench, package: &Package) -> Result<PathBuf> {
    let root = bench.root()?;
    let stage = bench.cache.stage("source", &key(package), |stage| {
        let Package { name, version } = package;
        let mut step = Step::start(
            &format!("Unpacking {name} {version}"),
            "1 minute, 160 MB to download",
            bench.cache.log(name),
        )?;
        download(
            &mut step,
            root,
            &bench.cache,
            std::slice::from_ref(package),
            stage,
        )?;
        step.run(
            "unpacking",
            root.command_in(stage, "sh").args([
                "-ec",
                "dpkg-deb --fsys-tarfile *.deb | tar -xO --wildcards './usr/src/*.tar.xz' |
                 xz -dT0 | tar -x
                 rm *.deb
                 mv linux-source-* linux
                 chmod 755 linux",
            ]),
        )?;
        strip(&mut step, &stage.join("linux"))?;
        step.done();
        Ok(())
    })?;
    Ok(stage.join("linux"))
}

/// Downloads packages into a directory, without installing them.
pub(super) fn download(
    step: &mut Step,
    root: &Root,
    cache: &Cache,
    packages: &[Package],
    dir: &Path,
) -> Result<()> {
    let mut apt = root.command_in(dir, "apt-get");
    apt.args(archive::apt_options(cache)?).arg("download");
    apt.args(
        packages
            .iter()
            .map(|Package { name, version }| format!("{name}={version}")),
    );
    step.run("downloading", &mut apt)
}

fn key(package: &Package) -> Key {
    Key::new(RECIPE).and(&package.name).and(&package.version)
}

fn strip(step: &mut Step, source: &Path) -> Result<()> {
    let mut find = Command::new("find");
    find.args(STRIPPED.iter().map(|dir| source.join(dir)));
    for entry in fs::read_dir(source.join("arch"))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name() != "x86" {
            find.arg(entry.path());
        }
    }
    find.args([
        "-type",
        "f",
        "!",
        "-name",
        "Kconfig*",
        "!",
        "-name",
        "Makefile*",
    ]);
    step.run(
        "leaving out what is not used",
        find.args(["!", "-name", "Kbuild*", "-delete"]),
    )
}
