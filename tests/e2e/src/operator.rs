// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A system as an operator sets it up: users, udev with muser's rules, and systemd.
//!
//! A guest has none of this running, and most tests want it so. Both udevd and systemd are started
//! by the test that needs them and end with it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{chown, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};

use crate::mdev::Type;
use crate::process::{self, Process, HELPER};
use crate::{module, time};

/// Where the guest has what an operator installs.
const SHIPPED: &str = "/usr/share/muser";
/// The group whose members create devices.
const GROUP: &str = "muser";

/// The commands of the README's section of that name, a script a block.
///
/// # Errors
///
/// When there is no such section, or it has no commands.
pub fn commands(section: &str) -> Result<Vec<String>> {
    let page = fs::read_to_string(Path::new(SHIPPED).join("README.md"))?;
    let begin = format!("\n## {section}\n");
    let text = page
        .split_once(&begin)
        .map(|(_, text)| text.split("\n## ").next().unwrap_or(text));
    let text = text.with_context(|| format!("the README has no section {section}"))?;
    let blocks: Vec<String> = text
        .split("\n```sh\n")
        .skip(1)
        .filter_map(|block| block.split("\n```").next().map(str::to_owned))
        .collect();
    ensure!(
        !blocks.is_empty(),
        "the section {section} has nothing to run"
    );
    Ok(blocks)
}

/// Runs shell commands as root, in the folder of what is installed; each must succeed.
///
/// # Errors
///
/// With what they wrote.
pub fn shell(script: &str) -> Result<String> {
    process::succeed("sh", &["-ec", &format!("cd {SHIPPED}\n{script}")])
}

/// A user of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Name in `/etc/passwd`.
    pub name: &'static str,
    /// User id, and id of the user's own group.
    pub id: u32,
}

/// A member of group muser.
pub const ALICE: User = User {
    name: "alice",
    id: 1001,
};
/// Another member.
pub const BOB: User = User {
    name: "bob",
    id: 1002,
};
/// A member with an id of the range that is given to users for their containers.
pub const CAROL: User = User {
    name: "carol",
    id: 100_001,
};
/// No member.
pub const MALLORY: User = User {
    name: "mallory",
    id: 1003,
};

impl User {
    /// A program that runs as the user after a login: with the user's groups, without a capability
    /// and any way to one, and with little memory to lock.
    pub fn command(self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", self.name, "--regid", self.name, "--init-groups"])
            .args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"])
            .args(["sh", "-c", "ulimit -l 64; exec \"$@\"", "sh", program])
            .env("HOME", "/tmp");
        command
    }

    /// Runs shell commands as the user, each of which must succeed.
    ///
    /// # Errors
    ///
    /// With what they wrote.
    pub fn shell(self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        ensure!(output.code == 0, "{} ran {script:?}: {output:?}", self.name);
        Ok(output.stdout)
    }

    /// Runs shell commands as the user.
    ///
    /// # Errors
    ///
    /// When the shell could not be started.
    pub fn run(self, script: &str) -> Result<process::Output> {
        process::output(self.command("sh").args(["-ec", script]))
    }

    /// A program that runs as root of a user namespace, which is the user outside of it.
    pub fn contained(self, program: &str) -> Command {
        let mut command = self.command("/usr/bin/unshare");
        command.args(["--user", "--map-root-user", program]);
        command
    }

    /// Starts this binary as a helper that is the user.
    ///
    /// # Errors
    ///
    /// As [`Process::start`].
    pub fn helper(self, arguments: &[&str]) -> Result<Process> {
        let program = std::env::current_exe()?;
        let program = program.to_str().context("the program's name")?;
        Process::start(self.command(program).arg(HELPER).args(arguments))
    }
}

/// A running udevd with muser's rules installed, and users. Ends when dropped, and leaves no right
/// to anybody.
#[derive(Debug)]
pub struct Udev {
    _daemon: Process,
}

impl Udev {
    /// Loads the module, starts udevd, installs what is shipped and adds the users.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn start() -> Result<Self> {
        module::load()?;
        for user in [ALICE, BOB, CAROL, MALLORY] {
            add(user)?;
        }
        let daemon = Process::start(&mut Command::new("/usr/lib/systemd/systemd-udevd"))?;
        time::until("udevd listening", || {
            process::succeed("udevadm", &["control", "--ping"]).is_ok()
        })?;
        let udev = Self { _daemon: daemon };
        // The last block is about alice.
        shell(&commands("Install")?.join("\n"))?;
        for member in [BOB, CAROL] {
            process::succeed("usermod", &["--append", "--groups", GROUP, member.name])?;
        }
        Ok(udev)
    }

    /// Waits until every event so far has been dealt with.
    ///
    /// # Errors
    ///
    /// When it is not in time.
    pub fn settle(&self) -> Result<()> {
        let timeout = format!("--timeout={}", time::patience().as_secs());
        process::succeed("udevadm", &["settle", &timeout]).map(drop)
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        // Whoever comes next runs as root and may do all the same.
        for kind in Type::ALL {
            let create = kind.directory().join("create");
            let _ = chown(&create, Some(0), Some(0));
            let _ = fs::set_permissions(&create, fs::Permissions::from_mode(0o200));
        }
        let _ = chown("/dev/iommu", Some(0), Some(0));
    }
}

fn add(user: User) -> Result<()> {
    let known = fs::read_to_string("/etc/passwd")?;
    if known
        .lines()
        .any(|line| line.starts_with(&format!("{}:", user.name)))
    {
        return Ok(());
    }
    let User { name, id } = user;
    append(
        "/etc/passwd",
        &format!("{name}:x:{id}:{id}::/tmp:/bin/sh\n"),
    )?;
    append("/etc/group", &format!("{name}:x:{id}:\n"))
}

/// The process of that name which is a child of another.
fn child_named(name: &str, parent: i32) -> Option<String> {
    let wanted = [format!("Name:\t{name}"), format!("PPid:\t{parent}")];
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().into_string().ok());
    pids.find(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        wanted
            .iter()
            .all(|wanted| status.lines().any(|line| line == wanted))
    })
}

fn append(path: &str, line: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new().append(true).open(path)?;
    Ok(file.write_all(line.as_bytes())?)
}

/// A running systemd, in namespaces of its own, as in a container. Ends when dropped.
#[derive(Debug)]
pub struct Systemd {
    _unshare: Process,
    pid: String,
}

impl Systemd {
    /// Starts it with no service.
    ///
    /// # Errors
    ///
    /// Says which step failed.
    pub fn start() -> Result<Self> {
        const GROUP: &str = "/sys/fs/cgroup/systemd";
        fs::create_dir_all(GROUP)?;
        fs::create_dir_all("/var/tmp")?;
        fs::write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")?;
        // The root of systemd's cgroups; init and the tests stay outside.
        let enter = format!("echo $$ >{GROUP}/cgroup.procs; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-ec", &enter, "sh", "/usr/bin/unshare"]);
        command.args(["--cgroup", "--mount", "--pid", "--fork", "--mount-proc"]);
        command.args([
            "--kill-child",
            "env",
            "-i",
            "container=muser",
            "PATH=/usr/bin",
        ]);
        command.args(["/usr/lib/systemd/systemd", "--system", "--show-status=no"]);
        command.args(["--unit=basic.target", "--log-target=null"]);
        let unshare = Process::start(&mut command)?;
        let mut pid = None;
        time::until("systemd starting", || {
            pid = child_named("systemd", unshare.id());
            pid.is_some()
        })?;
        let pid = pid.context("systemd's process")?;
        let systemd = Self {
            _unshare: unshare,
            pid,
        };
        time::until("systemd listening", || {
            systemd.shell("systemctl is-active basic.target").is_ok()
        })?;
        Ok(systemd)
    }

    /// Runs shell commands as root where systemctl reaches this systemd.
    ///
    /// # Errors
    ///
    /// With what they wrote.
    pub fn shell(&self, script: &str) -> Result<String> {
        let script = format!("cd {SHIPPED}\n{script}");
        let enter = ["--target", &self.pid, "--all", "sh", "-ec", &script];
        process::succeed("/usr/bin/nsenter", &enter)
    }

    /// Where a file of this systemd's is for everybody else.
    pub fn path(&self, path: &str) -> String {
        format!("/proc/{}/root{path}", self.pid)
    }

    /// A property of a unit.
    ///
    /// # Errors
    ///
    /// What systemctl said.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let text = self.shell(&format!(
            "systemctl show --value --property={name} '{unit}'"
        ))?;
        Ok(text.trim().to_owned())
    }
}
