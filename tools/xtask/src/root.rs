// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The build root: a Debian of the release whose kernels are tested, with the
//! compilers that built them, QEMU, and what a guest is made of.
//!
//! Programs run in it in mount and process namespaces of their own. The project
//! and the cache have the same paths inside as outside, so that what a compiler
//! prints can be opened; the project is read-only there but for its build
//! output. Nothing of it needs to run as root: an unprivileged user gets a user
//! namespace.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context as _, Result};

use crate::archive;
use crate::cache::{lock, Cache, Key};
use crate::project::Project;
use crate::step::Step;

/// Raise it when what is made below changes in a way that no other input shows.
const RECIPE: &str = "root 1";
const SUITE: &str = "trixie";
const PACKAGES: &[&str] = &[
    // Kernels and modules. rustc, rust-src and bindgen are those that Debian's
    // kernels are built with; pahole is asked for by their configuration.
    "bc",
    "bindgen",
    "bison",
    "clang-19",
    "cpio",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "lld-19",
    "llvm-19",
    "make",
    "pahole",
    "python3",
    "rsync",
    "rust-clippy",
    "rust-src",
    "rustc",
    "rustfmt",
    "xz-utils",
    "zstd",
    // The guest.
    "busybox-static",
    "kmod",
    "mdevctl",
    // The archive.
    "ca-certificates",
];
/// Installed from SUITE-backports: older ones lack vfio-user-pci.
const BACKPORTS: &str = "qemu-system-x86";

/// Sets up the mounts and enters the root. $1 root, $2 project, $3 output,
/// $4 cache, $5 working directory; then the program and its arguments.
const ENTER: &str = r#"
root=$1 project=$2 output=$3 cache=$4 dir=$5
shift 5
bind() { mkdir -p "$root$1" && mount --rbind "$1" "$root$1"; }
bind /dev
bind /proc
bind /sys
if [ -e /etc/resolv.conf ]; then
    touch "$root/etc/resolv.conf"
    mount --bind "$(readlink -f /etc/resolv.conf)" "$root/etc/resolv.conf"
fi
bind "$project"
mount -o remount,bind,ro "$root$project" 2>/dev/null || :
bind "$output"
bind "$cache"
exec chroot "$root" /usr/bin/env -C "$dir" "$@"
"#;

/// A build root and what is mounted into it.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    dir: PathBuf,
    enter: PathBuf,
    project: PathBuf,
    output: PathBuf,
    cache: PathBuf,
    toolchain: String,
}

impl Root {
    /// The build root, made if it is not in the cache.
    pub(crate) fn prepare(project: &Project, cache: &Cache) -> Result<Self> {
        let mut key = Key::new(RECIPE).and(SUITE).and(BACKPORTS);
        for package in PACKAGES {
            key = key.and(package);
        }
        let stage = cache.stage("root", &key, |stage| {
            let mirror = archive::mirror()?;
            install_mmdebstrap(cache)?;
            let mut step = Step::start(
                &format!("Making a Debian {SUITE} build root from {mirror}"),
                "2 minutes, 600 MB to download",
                cache.log("root"),
            )?;
            bootstrap(&mut step, stage, &mirror)?;
            step.done();
            Ok(())
        })?;
        // A file, so that the logs of steps stay readable.
        let enter = stage.join("enter");
        if std::fs::read_to_string(&enter).ok().as_deref() != Some(ENTER) {
            std::fs::write(&enter, ENTER)?;
        }
        let installed = stage.join("root/var/lib/dpkg/status");
        let installed = std::fs::read_to_string(&installed)
            .with_context(|| format!("cannot read {}", installed.display()))?;
        Ok(Self {
            dir: stage.join("root"),
            enter,
            project: project.dir().to_owned(),
            output: project.output(),
            cache: cache.dir().to_owned(),
            toolchain: Key::new("toolchain").and(&installed).short(),
        })
    }

    /// Tells one set of installed packages from another.
    pub(crate) fn toolchain(&self) -> &str {
        &self.toolchain
    }

    /// A path inside the root, seen from outside.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside.trim_start_matches('/'))
    }

    /// A program of the root; it starts in the cache directory.
    pub(crate) fn command(&self, program: &str) -> Command {
        self.command_in(&self.cache, program)
    }

    /// A program of the root which starts in that directory.
    pub(crate) fn command_in(&self, dir: &Path, program: &str) -> Command {
        let mut command = namespace();
        command.args(["sh", "-e"]).arg(&self.enter);
        command.args([&self.dir, &self.project, &self.output, &self.cache]);
        command.arg(dir).arg(program);
        command.env_clear();
        command.envs([
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LC_ALL", "C.UTF-8"),
            ("DEBIAN_FRONTEND", "noninteractive"),
        ]);
        for name in ["http_proxy", "https_proxy", "no_proxy", "TERM"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
    }

    /// What a program of the root prints.
    pub(crate) fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.command(program).args(args).output();
        let output = output.with_context(|| format!("cannot run {program} in the build root"))?;
        if !output.status.success() {
            bail!(
                "{program} {} failed in the build root ({}):\n{}",
                args.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Runs what follows in namespaces of its own, ended when xtask ends.
pub(crate) fn namespace() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare"]);
    if !superuser() {
        command.args(["--user", "--map-root-user", "--map-auto"]);
    }
    command.args(["--mount", "--pid", "--fork", "--kill-child"]);
    command
}

/// Whether this process runs as root.
pub(crate) fn superuser() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

/// Whether a program is on PATH.
pub(crate) fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

fn install_mmdebstrap(cache: &Cache) -> Result<()> {
    let _lock = lock(&cache.dir().join("apt.lock"), "this machine's packages")?;
    if on_path("mmdebstrap") {
        return Ok(());
    }
    const INSTALL: &str = "apt-get update && apt-get install -y mmdebstrap";
    if !on_path("apt-get") {
        bail!("this needs mmdebstrap, and there is no apt-get to install it with");
    }
    let mut shell = if superuser() {
        Command::new("sh")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "sh"]);
        sudo
    };
    shell.env("DEBIAN_FRONTEND", "noninteractive");
    let mut step = Step::start(
        "Installing Debian's mmdebstrap on this machine, which makes the build root",
        "20 seconds",
        cache.log("mmdebstrap"),
    )?;
    step.run("apt-get", shell.args(["-c", INSTALL]))
        .with_context(|| format!("mmdebstrap is not installed; as root, run: {INSTALL}"))?;
    step.done();
    Ok(())
}

fn bootstrap(step: &mut Step, stage: &Path, mirror: &str) -> Result<()> {
    let root = stage.join("root");
    let tar = stage.join("root.tar");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "mmdebstrap", "--variant=apt"]);
    // As root it fills a directory. Otherwise it uses user ids which only a
    // namespace has, and an archive unpacked in another one is what works.
    command.arg(if superuser() {
        "--mode=root"
    } else {
        "--mode=unshare"
    });
    command.arg("--skip=check/qemu");
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    command.arg("--dpkgopt=path-exclude=/usr/share/doc/*");
    command.arg("--dpkgopt=path-exclude=/usr/share/man/*");
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.arg(format!(
        "--customize-hook=chroot \"$1\" apt-get install -y -t {SUITE}-backports {BACKPORTS}"
    ));
    command
        .arg(SUITE)
        .arg(if superuser() { &root } else { &tar });
    command.arg(format!("deb {mirror} {SUITE} main"));
    command.arg(format!("deb {mirror} {SUITE}-backports main"));
    step.run("installing packages", &mut command)?;
    if !superuser() {
        std::fs::create_dir(&root)?;
        let mut unpack = namespace();
        unpack.arg("tar").arg("-xf").arg(&tar).arg("-C").arg(&root);
        step.run("unpacking", unpack.args(["--exclude=./dev/*"]))?;
        std::fs::remove_file(&tar)?;
    }
    Ok(())
}
