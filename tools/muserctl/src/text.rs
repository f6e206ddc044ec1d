// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Types and devices as a person reads them.

use crate::device::{Device, Region, Summary};
use crate::error::name;
use crate::sysfs::Type;
use std::fmt::Display;
use std::path::Path;

/// What we can't or mayn't know.
const UNKNOWN: &str = "?";

/// A table of types.
pub(crate) fn types(types: &[Type]) -> String {
    let head = ["TYPE", "API", "AVAILABLE", "DEVICES", "DESCRIPTION"];
    let rows = types.iter().map(|t| {
        let description = t.description.as_ref().or(t.label.as_ref());
        [
            t.name.clone(),
            known(t.device_api.as_ref()),
            known(t.available_instances),
            t.devices.len().to_string(),
            // A description may have more lines than a table can show.
            known(description.and_then(|text| text.lines().next())),
        ]
    });
    table(head, rows)
}

/// A table of devices.
pub(crate) fn list(devices: &[Summary]) -> String {
    let head = ["UUID", "TYPE", "STATE", "SERVER", "CLIENT", "GROUP", "CDEV"];
    let rows = devices.iter().map(|device| {
        let cdev = device.cdev.as_ref().and_then(|cdev| cdev.file_name());
        [
            device.uuid.clone(),
            device.kind.clone(),
            state(device).to_owned(),
            match (&device.server, device.attached) {
                (Some(server), _) => server.to_string(),
                (None, Some(false)) => "-".to_owned(),
                (None, _) => UNKNOWN.to_owned(),
            },
            match device.client {
                Some(true) => "open".to_owned(),
                Some(false) => "-".to_owned(),
                None => UNKNOWN.to_owned(),
            },
            device
                .iommu_group
                .map_or("-".to_owned(), |group| group.to_string()),
            cdev.map_or("-".to_owned(), |cdev| cdev.to_string_lossy().into_owned()),
        ]
    });
    table(head, rows)
}

/// A paragraph for each device.
pub(crate) fn show(devices: &[Device]) -> String {
    devices.iter().map(device).collect::<Vec<_>>().join("\n")
}

fn device(device: &Device) -> String {
    let summary = &device.summary;
    let mut text = format!("{}  {}\n", summary.uuid, summary.kind);
    let mut line = |label: &str, value: String| text += &format!("  {label:<20} {value}\n");

    line("state", sentence(device));
    if let Some(creator) = &device.creator {
        line("created by", users(creator.uid, creator.gid));
    }
    line("device node", with_owner(device));
    if let Some(path) = &summary.group_path {
        line("VFIO group", path.display().to_string());
    }
    if let Some(path) = &summary.cdev {
        line("VFIO cdev", path.display().to_string());
    }
    if let Some(requests) = &device.requests {
        line(
            "requests",
            format!("queued {}, taken {}", requests.queued, requests.taken),
        );
    }
    if let Some(memory) = &device.memory {
        line("device memory", size(memory.bytes));
    }
    if let Some(state) = device.state_size {
        line("state memory", size(state.into()));
    }
    if let Some(pinned) = &device.pinned {
        line("pinned for DMA", size(pinned.bytes));
    }
    for (name, value) in &device.attributes {
        let value = match &**name {
            "max_memory" | "max_state" => size(*value),
            // The unit is in the name, or it is a number of things.
            _ => value.to_string(),
        };
        line(name, value);
    }
    if let Some(counters) = &device.counters {
        line(
            "answered",
            format!(
                "reads {}, writes {}, resets {}",
                counters.reads, counters.writes, counters.resets
            ),
        );
        line(
            "from device memory",
            format!(
                "reads {}, writes {}",
                counters.memory_reads, counters.memory_writes
            ),
        );
        line("doorbells", counters.doorbells.to_string());
        line(
            "pages of clients",
            format!("pinned {}, unpinned {}", counters.pins, counters.unpins),
        );
        line(
            "unmaps",
            format!("{}, forced {}", counters.unmaps, counters.unmaps_forced),
        );
        line("interrupts", counters.interrupts.to_string());
        line("attachments", counters.attachments.to_string());
        line(
            "trouble",
            format!(
                "timeouts {}, replays {}, withdrawn {}",
                counters.timeouts, counters.replays, counters.withdrawn
            ),
        );
    }
    if let Some(regions) = device
        .regions
        .as_ref()
        .filter(|regions| !regions.is_empty())
    {
        text += &block(&table(
            ["REGION", "SIZE", "ACCESS", "AREAS"],
            regions.iter().map(|region| {
                let access = region.flags.join(" ");
                [
                    region.name.clone(),
                    size(region.size),
                    access,
                    areas(region),
                ]
            }),
        ));
    }
    if let Some(irqs) = device.irqs.as_ref().filter(|irqs| !irqs.is_empty()) {
        text += &block(&table(
            ["IRQ", "VECTORS", "ENABLED", "MASKED", "PENDING", "FLAGS"],
            irqs.iter().map(|irq| {
                [
                    irq.name.clone(),
                    irq.vectors.to_string(),
                    irq.enabled.to_string(),
                    irq.masked.to_string(),
                    irq.pending.to_string(),
                    irq.flags.join(" "),
                ]
            }),
        ));
    }
    text
}

/// The state in a word.
fn state(device: &Summary) -> &'static str {
    if device.removing {
        return "removing";
    }
    match (device.described, device.attached) {
        (None, _) | (_, None) => UNKNOWN,
        (_, Some(true)) if device.standby == Some(true) => "handing-over",
        (_, Some(true)) => "served",
        (Some(true), Some(false)) => "described",
        (Some(false), Some(false)) => "new",
    }
}

/// The state in a sentence.
fn sentence(device: &Device) -> String {
    let summary = &device.summary;
    let mut text = match (state(summary), &summary.server, &device.state_error) {
        ("removing", _, _) => {
            return "being removed, which waits for its client to close it".to_owned()
        }
        (_, _, Some(error)) => return format!("{UNKNOWN} ({error})"),
        ("served" | "handing-over", Some(server), _) => format!("served by {server}"),
        ("served" | "handing-over", None, _) => {
            "served by a process that can't be seen from here".to_owned()
        }
        ("described", _, _) => "described, but no process is attached".to_owned(),
        ("new", _, _) => "new: no process has attached and described it".to_owned(),
        (unknown, _, _) => unknown.to_owned(),
    };
    match (&summary.successor, summary.standby) {
        (Some(successor), _) => text += &format!("; {successor}, waits to take over"),
        (None, Some(true)) => text += "; a process that can't be seen from here waits to take over",
        (None, _) => {}
    }
    if summary.client == Some(true) {
        text += "; a client has it open";
        let clients: Vec<_> = device.clients.iter().map(ToString::to_string).collect();
        if !clients.is_empty() {
            text += &format!(" ({})", clients.join("; "));
        }
    } else {
        text += "; no client";
    }
    text
}

fn with_owner(device: &Device) -> String {
    let path = device.summary.node.display();
    match &device.node_owner {
        Some(owner) => format!("{path} ({} {})", users(owner.uid, owner.gid), owner.mode),
        None => format!("{path} (not there)"),
    }
}

/// A user and a group, by name.
fn users(uid: u32, gid: u32) -> String {
    let (user, group) = (Path::new("/etc/passwd"), Path::new("/etc/group"));
    format!("{}:{}", name(user, uid), name(group, gid))
}

fn areas(region: &Region) -> String {
    let areas: Vec<String> = region
        .areas
        .iter()
        .map(|area| {
            let flags = area.flags.join(" ");
            format!("{flags} {:#x}+{:#x}", area.offset, area.size)
        })
        .collect();
    areas.join(", ")
}

/// A number of bytes, for people and exactly: `4 KiB (4096)`.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, unit)) = units.into_iter().find(|(shift, _)| bytes >> shift != 0) else {
        return format!("{bytes} B");
    };
    // One decimal, rounded down; the exact number follows.
    let tenths = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
    match tenths {
        0 => format!("{} {unit} ({bytes})", bytes >> shift),
        _ => format!("{}.{tenths} {unit} ({bytes})", bytes >> shift),
    }
}

fn known(value: Option<impl Display>) -> String {
    value.map_or(UNKNOWN.to_owned(), |value| value.to_string())
}

/// Indented, after an empty line.
fn block(text: &str) -> String {
    let lines = text.lines().map(|line| format!("  {line}\n"));
    std::iter::once("\n".to_owned()).chain(lines).collect()
}

/// Columns as wide as their widest cell, two spaces apart.
fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut all = vec![head.map(str::to_owned)];
    all.extend(rows);
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = all.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    });
    let mut text = String::new();
    for row in &all {
        let line: String = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}  "))
            .collect();
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_human_and_exact() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(4096), "4 KiB (4096)");
        assert_eq!(size(1536), "1.5 KiB (1536)");
        assert_eq!(size(1 << 40), "1024 GiB (1099511627776)");
        assert_eq!(size(u64::MAX), "17179869183.9 GiB (18446744073709551615)");
    }

    #[test]
    fn table_columns_are_aligned_and_lines_have_no_trailing_space() {
        let rows = [
            ["a".to_owned(), "b".to_owned()],
            ["ccc".to_owned(), String::new()],
        ];
        assert_eq!(table(["H", "I"], rows.into_iter()), "H    I\na    b\nccc\n");
    }
}
