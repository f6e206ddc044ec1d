// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's file system: busybox, the project's programs and its files for an
//! operator, mdevctl, udev and systemd, muser.ko and the kernel modules that it
//! and the tests need.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::{symlink, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context as _, Result};

use crate::cache;
use crate::cpio::Archive;
use crate::kernel::Tree;
use crate::module;
use crate::root::Root;
use crate::step::Step;
use crate::vmm;
use crate::workbench::Workbench;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Taken with what they depend on, where the kernel has them.
const MODULES: &[&str] = &[
    "gpio_pci_idio_16",
    "iommufd",
    "mdev",
    "mtty",
    "vfio",
    "vfio_iommu_type1",
    "vfio_pci",
];
const DIRECTORIES: &[&str] = &[
    "dev",
    "etc/mdevctl.d",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "usr/lib/systemd",
    "usr/lib/mdevctl/scripts.d/callouts",
    "usr/lib/mdevctl/scripts.d/notifiers",
];
/// Programs of Debian's, taken with the libraries that they load. The build root has
/// udev and systemd because mdevctl depends on them.
const DEBIAN: &[&str] = &[
    "/usr/bin/mdevctl",
    "/usr/bin/nsenter",
    "/usr/bin/setpriv",
    "/usr/bin/systemctl",
    "/usr/bin/systemd-analyze",
    "/usr/bin/systemd-sysusers",
    "/usr/bin/udevadm",
    "/usr/bin/unshare",
    "/usr/lib/systemd/systemd",
    "/usr/lib/systemd/systemd-executor",
    "/usr/sbin/usermod",
];
/// Debian's own files that those work by.
const DEBIAN_FILES: &[&str] = &[
    "/usr/lib/systemd/system/basic.target",
    "/usr/lib/systemd/system/multi-user.target",
    "/usr/lib/systemd/system/shutdown.target",
    "/usr/lib/systemd/system/slices.target",
    "/usr/lib/systemd/system/sysinit.target",
    "/usr/lib/udev/rules.d/50-udev-default.rules",
    "/usr/lib/udev/rules.d/60-mdevctl.rules",
    "/usr/lib/udev/rules.d/99-systemd.rules",
];
/// What an operator installs, as it is; a test installs it as its README says.
const OPERATOR: (&str, &str) = ("tools/system", "usr/share/muser");
const LINKS: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("sbin", "usr/bin"),
    ("usr/sbin", "bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("usr/bin/sh", "busybox"),
    ("usr/bin/modprobe", "busybox"),
    ("usr/lib/systemd/systemd-udevd", "../../bin/udevadm"),
];

/// Programs of the project, built to run without any library of the host's.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    files: Vec<PathBuf>,
}

impl Programs {
    /// Builds every program that belongs in a guest.
    pub(crate) fn build(bench: &Workbench) -> Result<Self> {
        let packages = bench.project.guest_packages()?;
        let target = bench.project.output().join("userspace");
        let mut files = Vec::new();
        if packages.is_empty() {
            return Ok(Self { files });
        }
        let mut step = Step::start(
            "Building the library, the samples and the tools for the guest",
            "2 minutes the first time, then seconds",
            bench.project.log("userspace"),
        )?;
        let mut cargo = bench.project.cargo();
        cargo
            .args(["build", "--release", "--target", TARGET, "--target-dir"])
            .arg(&target);
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
        for package in packages {
            cargo.args(["--package", &package.name]);
            let built = target.join(TARGET).join("release");
            files.extend(package.programs.iter().map(|program| built.join(program)));
        }
        step.run("cargo build", &mut cargo)?;
        step.done();
        Ok(Self { files })
    }

    /// Whether there is a program of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The program of that name.
    pub(crate) fn find(&self, name: &str) -> Option<&Path> {
        let mut files = self.files.iter().map(PathBuf::as_path);
        files.find(|file| file.file_name().is_some_and(|file| file == name))
    }
}

/// A guest that is ready to boot, but for the command to run in it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) tree: Tree,
    dir: PathBuf,
    image: PathBuf,
    /// Two guests of one kernel would write each other's files.
    _lock: File,
}

impl Guest {
    /// Builds the module, and lays out the file system.
    pub(crate) fn prepare(bench: &Workbench, tree: Tree, programs: &Programs) -> Result<Self> {
        let root = bench.root()?;
        let muser = module::build(bench, &tree)?;
        let output = bench.project.output_for(tree.kernel);
        let dir = output.join("guest");
        let what = format!("a guest with the {} kernel", tree.kernel);
        let lock = cache::lock(&output.join("guest.lock"), &what)?;
        cache::remove(&dir)?;
        for name in DIRECTORIES {
            fs::create_dir_all(dir.join(name))?;
        }
        for (name, target) in LINKS {
            symlink(target, dir.join(name))?;
        }
        install(
            &bench.project.file("tests/e2e/guest/init"),
            &dir.join("init"),
        )?;
        install(&root.path("/usr/bin/busybox"), &dir.join("usr/bin/busybox"))?;
        for file in &programs.files {
            let name = file.file_name().and_then(|name| name.to_str());
            if let Some(name) = name.filter(|name| !vmm::PROGRAMS.contains(name)) {
                install(file, &dir.join("usr/bin").join(name))?;
            }
        }
        debian(root, &dir)?;
        let (from, to) = OPERATOR;
        copy_tree(&bench.project.file(from), &dir.join(to))?;
        modules(root, &tree, MODULES, Some(&muser), &dir)?;
        let image = output.join("guest.cpio");
        Ok(Self {
            tree,
            dir,
            image,
            _lock: lock,
        })
    }

    /// Packs the file system with the command that the guest is to run.
    pub(crate) fn pack(&self, command: &str) -> Result<&Path> {
        let script = format!("export MUSER_KERNEL={}\n{command}\n", self.tree.kernel);
        fs::write(self.dir.join("run.sh"), script)?;
        let file = File::create(&self.image)
            .with_context(|| format!("cannot write {}", self.image.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        archive.tree(&self.dir)?;
        archive.device("dev/console", 5, 1)?;
        archive.finish()?;
        Ok(&self.image)
    }
}

/// Copies a program and makes it executable.
pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Copies a directory with all that is in it.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let entries = fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// mdevctl, udev and systemd as Debian built them, with the libraries that they load.
fn debian(root: &Root, dir: &Path) -> Result<()> {
    let inside = |path: &str| dir.join(path.trim_start_matches('/'));
    for file in DEBIAN_FILES {
        let to = inside(file);
        install(&root.path(file), &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
    }
    for program in DEBIAN {
        install(&root.path(program), &inside(program))?;
    }
    let libraries = root.output("ldd", DEBIAN)?;
    let mut libraries: Vec<&str> = libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .collect();
    libraries.sort_unstable();
    libraries.dedup();
    for library in libraries {
        // Resolved inside the root: its /lib is a link.
        let file = root.output("readlink", &["-f", library])?;
        install(&root.path(file.trim()), &inside(library))?;
    }
    Ok(())
}

/// Some of the kernel's modules with what they depend on, and muser.ko if it is wanted.
pub(crate) fn modules(
    root: &Root,
    tree: &Tree,
    wanted: &[&str],
    muser: Option<&Path>,
    dir: &Path,
) -> Result<()> {
    let to = dir.join("usr/lib/modules").join(&tree.release);
    fs::create_dir_all(&to)?;
    if let Some(muser) = muser {
        install(muser, &to.join("extra/muser.ko"))?;
    }
    let list = tree.modules.join("modules.dep");
    let list =
        fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let mut packed = Vec::new();
    for file in closure(&list, wanted) {
        let target = to.join(file);
        install(&tree.modules.join(file), &target)?;
        if file.ends_with(".xz") || file.ends_with(".zst") {
            packed.push(target);
        }
    }
    for name in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        let from = tree.modules.join(name);
        if from.exists() {
            fs::copy(from, to.join(name))?;
        }
    }
    if !packed.is_empty() {
        let unpack =
            "for file; do case $file in *.xz) xz -d $file;; *) zstd -qd --rm $file;; esac; done";
        let status = root
            .command("sh")
            .args(["-ec", unpack, "sh"])
            .args(packed)
            .status()?;
        if !status.success() {
            bail!("the modules of {} cannot be unpacked", tree.release);
        }
    }
    let base = dir.display().to_string();
    root.output("depmod", &["-b", &base, &tree.release])?;
    Ok(())
}

/// The files of some modules and of all that they depend on, from `modules.dep`.
fn closure<'a>(list: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let name = |file: &str| {
        let file = file.rsplit('/').next().unwrap_or(file);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    let lines: BTreeMap<String, (&str, &str)> = list
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (name(file), (file, needs)))
        .collect();
    let mut files = Vec::new();
    for wanted in wanted {
        // modules.dep lists what a module needs indirectly too.
        if let Some((file, needs)) = lines.get(*wanted) {
            files.push(*file);
            files.extend(needs.split_whitespace());
        }
    }
    files.sort_unstable();
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closure_has_dependencies_once_and_no_strangers() {
        let list = "kernel/vfio/vfio.ko.xz:\n\
                    kernel/vfio/vfio-pci.ko.xz: kernel/vfio/core.ko.xz kernel/vfio/vfio.ko.xz\n\
                    kernel/vfio/core.ko.xz: kernel/vfio/vfio.ko.xz\n\
                    kernel/net/other.ko.xz:\n";
        assert_eq!(
            closure(list, &["vfio", "vfio_pci", "absent"]),
            [
                "kernel/vfio/core.ko.xz",
                "kernel/vfio/vfio-pci.ko.xz",
                "kernel/vfio/vfio.ko.xz"
            ]
        );
    }
}
