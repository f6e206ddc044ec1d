// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! muserctl creates, shows and removes muser devices.
//!
//! It is a thin face of what the module shows: sysfs for what exists ([`sysfs`]), the query ioctl
//! of `/dev/muser/UUID` for the state ([`device`]). It keeps nothing, so mdevctl and libvirt may
//! manage the same devices. Of devices without a kernel it asks their server ([`probe`]).
//!
//! [`supervise`] is another matter: a device at a socket, for which muserctl itself is what the
//! kernel is for the others.

#![deny(unsafe_code)]

mod cli;
mod device;
mod error;
mod give;
mod probe;
mod process;
mod remove;
mod supervise;
#[expect(unsafe_code, reason = "system calls")]
mod sys;
mod sysfs;
mod text;

use clap::{CommandFactory, Parser};
use cli::{Assignment, Cli, Command};
use device::{Device, Summary};
use error::{reason, Error, Result};
use libmuser::cli::manual;
use probe::Probe;
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use sysfs::{refused, Roots};

/// Version of the JSON's shape, raised when a key changes its meaning or goes.
const SCHEMA: u32 = 1;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let roots = Roots::from(cli.roots);
    let result = match cli.command {
        Command::List { output } => list(&roots, output.json),
        Command::Types { output } => types(&roots, output.json),
        Command::Create { uuid, kind, output } => {
            create(&roots, uuid, &kind.to_string(), output.json)
        }
        Command::Remove { uuid, timeout } => roots
            .device(&uuid)
            .and_then(|entry| remove::remove(&roots, &entry, timeout))
            .map(|()| String::new()),
        Command::Show { uuid, output } => show(&roots, uuid.as_deref(), output.json),
        Command::Set { uuid, assignments } => {
            set(&roots, &uuid, &assignments).map(|()| String::new())
        }
        Command::Probe {
            socket,
            read,
            output,
        } => Probe::of(&socket, &read).and_then(|probe| match output.json {
            true => json("probe", &probe),
            false => Ok(probe.text()),
        }),
        Command::Give { path } => give::give(&roots, &path).map(|()| String::new()),
        Command::Supervise(options) => return supervise::run(&options),
        Command::PrintMan { command } => page(command.as_deref()),
        Command::WriteRemove { path } => return ExitCode::from(remove::write(&path)),
    };
    match result.and_then(|text| print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muserctl: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The manual page of muserctl, or of one of its commands.
fn page(command: Option<&str>) -> Result<String> {
    let muserctl = Cli::command();
    let (command, sections, see_also): (_, &[_], &[_]) = match command {
        None => (
            muserctl,
            cli::SECTIONS,
            &["muserctl-supervise(1)", "mdevctl(8)"],
        ),
        Some(name) => {
            let found = muserctl.find_subcommand(name).cloned();
            let found = found.ok_or_else(|| Error::new(format!("there is no command {name}")))?;
            let found = found
                .bin_name(format!("muserctl {name}"))
                .display_name(format!("muserctl-{name}"));
            match name {
                "supervise" => (
                    found,
                    cli::SUPERVISE,
                    &["muserctl(1)", "counter(1)", "gpio(1)", "systemd.socket(5)"],
                ),
                _ => (found, &[], &["muserctl(1)"]),
            }
        }
    };
    let page = manual::page(command, sections, see_also);
    let page = page.map_err(|error| Error::new(reason(&error)))?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

fn types(roots: &Roots, as_json: bool) -> Result<String> {
    let types = roots.types()?;
    if as_json {
        json("types", &types)
    } else {
        Ok(text::types(&types))
    }
}

fn list(roots: &Roots, as_json: bool) -> Result<String> {
    let entries = present(roots)?;
    let devices: Vec<Summary> = entries
        .iter()
        .map(|entry| Device::look(roots, entry).summary)
        .collect();
    if as_json {
        json("devices", &devices)
    } else if devices.is_empty() {
        Ok(String::new())
    } else {
        Ok(text::list(&devices))
    }
}

fn show(roots: &Roots, uuid: Option<&str>, as_json: bool) -> Result<String> {
    let entries = match uuid {
        Some(uuid) => vec![roots.device(uuid)?],
        None => present(roots)?,
    };
    let devices: Vec<Device> = entries
        .iter()
        .map(|entry| Device::look(roots, entry).with_clients(roots, entry))
        .collect();
    if as_json {
        json("devices", &devices)
    } else {
        Ok(text::show(&devices))
    }
}

/// All devices; that there are none is said on stderr, since stdout is for devices.
fn present(roots: &Roots) -> Result<Vec<sysfs::Entry>> {
    let entries = roots.devices()?;
    if entries.is_empty() {
        // Fails where there can't be any.
        roots.types()?;
        eprintln!("muserctl: there are no devices; make one with `muserctl create`");
    }
    Ok(entries)
}

fn create(roots: &Roots, uuid: Option<String>, kind: &str, as_json: bool) -> Result<String> {
    let uuid = uuid.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let types = roots.types()?;
    let Some(kind) = types.iter().find(|candidate| candidate.name == kind) else {
        let names: Vec<&str> = types.iter().map(|kind| &*kind.name).collect();
        return Err(Error::new(format!(
            "the module muser that is loaded has no type {kind}; it has {}",
            names.join(", ")
        )));
    };
    let path = kind.path.join("create");
    sysfs::write(&path, &uuid).map_err(|error| not_created(kind, &uuid, &error))?;
    if as_json {
        let entry = roots.device(&uuid)?;
        json("devices", &[Device::look(roots, &entry).summary])
    } else {
        Ok(format!("{uuid}\n"))
    }
}

fn set(roots: &Roots, uuid: &str, assignments: &[Assignment]) -> Result<()> {
    let entry = roots.device(uuid)?;
    // All names first, so that a typing error changes nothing.
    let paths = assignments
        .iter()
        .map(|assignment| entry.attribute(&assignment.name))
        .collect::<Result<Vec<_>>>()?;
    for (path, Assignment { name, value }) in paths.iter().zip(assignments) {
        sysfs::write(path, &value.to_string())
            .map_err(|error| not_set(path, name, *value, &error))?;
    }
    Ok(())
}

/// Why `create` of a type refused a UUID.
fn not_created(kind: &sysfs::Type, uuid: &str, error: &io::Error) -> Error {
    let path = kind.path.join("create");
    match error.raw_os_error() {
        Some(libc::EEXIST) => Error::new(format!(
            "a device {uuid} exists already; `muserctl list` shows it if it is one of muser's"
        )),
        Some(libc::EUSERS) => Error::new(format!(
            "{} has no instances left: {} devices of this type exist; remove one with \
             `muserctl remove`",
            kind.name,
            kind.devices.len()
        )),
        Some(libc::EDQUOT) => {
            let limit = match kind.user_limit("max_user_devices") {
                Some((path, limit)) => format!("{limit}, says {}", path.display()),
                None => "max_user_devices beside the parent muser".to_owned(),
            };
            Error::new(format!(
                "you have as many devices as a user may ({limit}); remove one with \
                 `muserctl remove`, or let root raise the limit"
            ))
        }
        Some(libc::EBUSY) => Error::new(format!("{} is busy; try again", path.display())),
        Some(libc::ENODEV | libc::ENOENT) => Error::new("the module muser is being unloaded"),
        Some(libc::EACCES | libc::EPERM) => Error::new(error::not_member(&path)),
        _ => refused(&path, uuid, error),
    }
}

/// Why the attribute at `path` refused a value.
fn not_set(path: &Path, name: &str, value: u64, error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EBUSY) => Error::new(format!(
            "the device is busy: {name} can be set only before a process has described the device"
        )),
        Some(libc::EINVAL | libc::ERANGE) => Error::new(format!(
            "{value} is out of range for {name}: {}",
            reason(error)
        )),
        _ => refused(path, &value.to_string(), error),
    }
}

/// `{"schema": 1, KEY: VALUE}`
struct Document<'a, T: ?Sized>(&'a str, &'a T);

impl<T: Serialize + ?Sized> Serialize for Document<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("schema", &SCHEMA)?;
        map.serialize_entry(self.0, self.1)?;
        map.end()
    }
}

fn json(key: &str, value: &(impl Serialize + ?Sized)) -> Result<String> {
    serde_json::to_string_pretty(&Document(key, value))
        .map(|text| text + "\n")
        .map_err(|error| Error::new(format!("can't write JSON: {error}")))
}

/// Writes to stdout. That nobody reads on is no failure.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::new(format!(
            "can't write to stdout: {}",
            reason(&error)
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind() -> sysfs::Type {
        sysfs::Type {
            name: "muser-pci".to_owned(),
            parent: "muser".to_owned(),
            label: None,
            description: None,
            device_api: None,
            available_instances: Some(0),
            devices: vec!["a".to_owned(), "b".to_owned()],
            path: "/nonexistent".into(),
        }
    }

    #[test]
    fn refused_creation_says_why() {
        let says =
            |errno| not_created(&kind(), "u", &io::Error::from_raw_os_error(errno)).to_string();
        assert!(says(libc::EEXIST).contains("a device u exists already"));
        assert!(says(libc::EUSERS).contains("muser-pci has no instances left: 2 devices"));
        assert!(says(libc::EDQUOT).contains("as many devices as a user may (max_user_devices"));
        assert!(says(libc::EBUSY).contains("is busy"));
        assert!(says(libc::ENODEV).contains("being unloaded"));
        assert!(says(libc::EACCES).contains("permission denied: /nonexistent/create"));
        assert!(says(libc::EIO).contains("the kernel refused u"));
    }

    #[test]
    fn refused_attribute_says_why() {
        let says = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            not_set(Path::new("/nonexistent/a"), "a", 7, &error).to_string()
        };
        assert!(says(libc::EBUSY).contains("a can be set only before"));
        assert!(says(libc::ERANGE).contains("7 is out of range for a"));
        assert!(says(libc::EPERM).contains("permission denied: /nonexistent/a"));
        assert!(says(libc::ENOMEM).contains("the kernel refused 7 in /nonexistent/a"));
    }
}
