// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device as muserctl shows it: the serialised form is the JSON that README.md documents.

use crate::error::{denied, reason};
use crate::process::{self, Process};
use crate::sys::{self, Query};
use crate::sysfs::{Entry, Roots};
use muser_uapi::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What `list` shows of a device. `None` is what we can't or mayn't know.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) uuid: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) parent: String,
    pub(crate) device_api: Option<String>,
    pub(crate) node: PathBuf,
    pub(crate) iommu_group: Option<u64>,
    pub(crate) group_path: Option<PathBuf>,
    pub(crate) cdev: Option<PathBuf>,
    pub(crate) removing: bool,
    pub(crate) described: Option<bool>,
    pub(crate) attached: Option<bool>,
    pub(crate) client: Option<bool>,
    pub(crate) server: Option<Process>,
    pub(crate) standby: Option<bool>,
    pub(crate) successor: Option<Process>,
}

/// What `show` shows of a device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Device {
    #[serde(flatten)]
    pub(crate) summary: Summary,
    /// Why the state is not known.
    pub(crate) state_error: Option<String>,
    pub(crate) creator: Option<Creator>,
    pub(crate) node_owner: Option<Owner>,
    pub(crate) abi_version: Option<u32>,
    pub(crate) bus: Option<String>,
    pub(crate) regions: Option<Vec<Region>>,
    pub(crate) irqs: Option<Vec<Irq>>,
    pub(crate) requests: Option<Requests>,
    pub(crate) memory: Option<Memory>,
    /// Bytes.
    pub(crate) state_size: Option<u32>,
    pub(crate) pinned: Option<Memory>,
    pub(crate) counters: Option<Counters>,
    /// Processes that have the VFIO device open, as far as they can be seen.
    pub(crate) clients: Vec<Process>,
    pub(crate) attributes: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Creator {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Octal.
    pub(crate) mode: String,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Region {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) flags: Vec<String>,
    pub(crate) areas: Vec<Area>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Area {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) flags: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Irq {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) flags: Vec<String>,
    pub(crate) vectors: u32,
    pub(crate) enabled: u32,
    pub(crate) masked: u32,
    pub(crate) pending: u32,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Requests {
    pub(crate) queued: u32,
    pub(crate) taken: u32,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) pages: u64,
    pub(crate) page_size: u64,
    pub(crate) bytes: u64,
}

/// `muser_counters`; see there.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Counters {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) resets: u64,
    pub(crate) memory_reads: u64,
    pub(crate) memory_writes: u64,
    pub(crate) interrupts: u64,
    pub(crate) timeouts: u64,
    pub(crate) replays: u64,
    pub(crate) withdrawn: u64,
    pub(crate) attachments: u64,
    pub(crate) doorbells: u64,
    pub(crate) unmaps: u64,
    pub(crate) unmaps_forced: u64,
    pub(crate) pins: u64,
    pub(crate) unpins: u64,
}

impl Device {
    /// Looks at a device, as far as we may.
    pub(crate) fn look(roots: &Roots, entry: &Entry) -> Self {
        let node = roots.dev.join("muser").join(&entry.uuid);
        match query(&node) {
            Ok(query) => Self::new(roots, entry, Ok(&query)),
            Err(error) => Self::new(roots, entry, Err(state_error(&node, &error))),
        }
    }

    /// A device of which the module said `state`.
    pub(crate) fn new(roots: &Roots, entry: &Entry, state: Result<&Query, String>) -> Self {
        let node = roots.dev.join("muser").join(&entry.uuid);
        let node_owner = std::fs::metadata(&node).ok().map(|node| Owner {
            uid: node.uid(),
            gid: node.gid(),
            mode: format!("{:04o}", node.mode() & 0o7777),
        });
        let iommu_group = entry.iommu_group();
        let vfio = roots.dev.join("vfio");
        let mut device = Self {
            summary: Summary {
                uuid: entry.uuid.clone(),
                kind: entry.kind.clone(),
                parent: entry.parent.clone(),
                device_api: entry.device_api(),
                node,
                iommu_group,
                group_path: iommu_group.map(|group| vfio.join(group.to_string())),
                cdev: entry.cdev().map(|name| vfio.join("devices").join(name)),
                removing: entry.removing,
                described: None,
                attached: None,
                client: None,
                server: None,
                standby: None,
                successor: None,
            },
            state_error: None,
            creator: entry.creator().map(|(uid, gid)| Creator { uid, gid }),
            node_owner,
            abi_version: None,
            bus: None,
            regions: None,
            irqs: None,
            requests: None,
            memory: None,
            state_size: None,
            pinned: None,
            counters: None,
            clients: Vec::new(),
            attributes: entry.attributes(),
        };
        match state {
            Ok(query) => device.apply(roots, query),
            Err(error) => device.state_error = Some(error),
        }
        device
    }

    /// Looks for the processes that have the device open, which takes a walk through `/proc`.
    pub(crate) fn with_clients(mut self, roots: &Roots, entry: &Entry) -> Self {
        if self.summary.client != Some(false) {
            self.clients = process::holders(roots, &self.client_nodes(), &entry.path);
        }
        self
    }

    /// The nodes a client of the device may have open.
    pub(crate) fn client_nodes(&self) -> Vec<PathBuf> {
        let nodes = [&self.summary.group_path, &self.summary.cdev];
        nodes.into_iter().flatten().cloned().collect()
    }

    fn apply(&mut self, roots: &Roots, query: &Query) {
        let head = &query.head;
        let has = |flag: u32| Some(head.flags & flag != 0);
        self.summary.described = has(MUSER_STATE_DESCRIBED);
        self.summary.attached = has(MUSER_STATE_ATTACHED);
        self.summary.client = has(MUSER_STATE_CLIENT);
        // A process outside of our pid namespace has no id here.
        let process = |pid: u32| (pid != 0).then(|| Process::new(roots, pid));
        self.summary.server = process(head.pid);
        self.summary.standby = has(MUSER_STATE_STANDBY);
        self.summary.successor = process(head.standby_pid);
        self.abi_version = Some(head.version);
        self.bus = match head.bus {
            MUSER_BUS_PCI => Some("pci".to_owned()),
            MUSER_BUS_PLATFORM => Some("platform".to_owned()),
            _ => None,
        };
        self.regions = Some(regions(query));
        self.irqs = Some(
            query
                .irqs
                .iter()
                .map(|irq| Irq::new(head.bus, irq))
                .collect(),
        );
        self.requests = Some(Requests {
            queued: head.queued,
            taken: head.taken,
        });
        self.memory = Some(Memory::of(head.memory_pages));
        self.state_size = Some(head.state_size);
        self.pinned = Some(Memory::of(head.pinned_pages));
        self.counters = Some(Counters::from(&head.counters));
    }
}

impl Memory {
    fn of(pages: u64) -> Self {
        let page_size = sys::page_size();
        Self {
            pages,
            page_size,
            bytes: pages.saturating_mul(page_size),
        }
    }
}

impl Irq {
    fn new(bus: u32, state: &muser_irq_state) -> Self {
        let index = state.irq.index;
        let name = match pci_interrupt(index).filter(|_| bus == MUSER_BUS_PCI) {
            Some(name) => name.to_owned(),
            None => format!("irq{index}"),
        };
        let known = [
            (MUSER_IRQ_EVENTFD, "eventfd"),
            (MUSER_IRQ_MASKABLE, "maskable"),
            (MUSER_IRQ_AUTOMASKED, "automasked"),
            (MUSER_IRQ_NORESIZE, "noresize"),
        ];
        Self {
            index,
            name,
            flags: flags(state.irq.flags, &known),
            vectors: state.irq.count,
            enabled: state.enabled,
            masked: state.masked,
            pending: state.pending,
        }
    }
}

impl From<&muser_counters> for Counters {
    fn from(counters: &muser_counters) -> Self {
        // Every field by name, so that a counter added to the ABI is added here.
        let muser_counters {
            reads,
            writes,
            resets,
            memory_reads,
            memory_writes,
            interrupts,
            timeouts,
            replays,
            withdrawn,
            attachments,
            doorbells,
            unmaps,
            unmaps_forced,
            pins,
            unpins,
        } = *counters;
        Self {
            reads,
            writes,
            resets,
            memory_reads,
            memory_writes,
            interrupts,
            timeouts,
            replays,
            withdrawn,
            attachments,
            doorbells,
            unmaps,
            unmaps_forced,
            pins,
            unpins,
        }
    }
}

/// The state of the device behind `node`, which any opener may ask for.
pub(crate) fn query(node: &Path) -> io::Result<Query> {
    let node: File = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(node)?;
    sys::query(&node)
}

fn state_error(node: &Path, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => denied(node),
        Some(libc::ENOENT) => format!("there is no {}", node.display()),
        Some(libc::ENODEV) => "the device is being removed".to_owned(),
        Some(libc::ENOTTY) => format!("{} is not a device of muser", node.display()),
        Some(libc::E2BIG) => "the module muser is older than this muserctl".to_owned(),
        _ => format!("can't ask {}: {}", node.display(), reason(error)),
    }
}

fn regions(query: &Query) -> Vec<Region> {
    let known = [(MUSER_REGION_READ, "read"), (MUSER_REGION_WRITE, "write")];
    let kinds = [(MUSER_AREA_MMAP, "mmap"), (MUSER_AREA_DOORBELL, "doorbell")];
    let mut areas = query.areas.iter();
    query
        .regions
        .iter()
        .map(|region| Region {
            index: region.index,
            name: region_name(query.head.bus, region.index),
            size: region.size,
            flags: flags(region.flags, &known),
            areas: areas
                .by_ref()
                .take(usize::try_from(region.num_areas).unwrap_or(usize::MAX))
                .map(|area| Area {
                    offset: area.offset,
                    size: area.size,
                    flags: flags(area.flags, &kinds),
                })
                .collect(),
        })
        .collect()
}

/// The name of an interrupt index, as `VFIO_PCI_*_IRQ_INDEX` in `<linux/vfio.h>` numbers them.
pub(crate) fn pci_interrupt(index: u32) -> Option<&'static str> {
    const NAMES: [&str; 5] = ["INTx", "MSI", "MSI-X", "ERR", "REQ"];
    NAMES.get(index as usize).copied()
}

/// The name of a region, as `VFIO_PCI_*_REGION_INDEX` in `<linux/vfio.h>` numbers them.
fn region_name(bus: u32, index: u32) -> String {
    match (bus, index) {
        (MUSER_BUS_PCI, 0..=5) => format!("BAR{index}"),
        (MUSER_BUS_PCI, 6) => "ROM".to_owned(),
        (MUSER_BUS_PCI, 7) => "config".to_owned(),
        (MUSER_BUS_PCI, 8) => "VGA".to_owned(),
        _ => format!("region{index}"),
    }
}

/// The names of the bits set; those a newer module may know by their value.
fn flags(bits: u32, known: &[(u32, &str)]) -> Vec<String> {
    let mut names: Vec<String> = known
        .iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect();
    let rest = known.iter().fold(bits, |rest, (bit, _)| rest & !bit);
    if rest != 0 {
        names.push(format!("{rest:#x}"));
    }
    names
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A PCI device in use, as README.md shows it.
    pub(crate) fn sample() -> Device {
        let roots = Roots {
            sysfs: "/nonexistent".into(),
            dev: "/dev".into(),
            proc: "/nonexistent".into(),
        };
        let entry = Entry::imaginary("83b8f4f2-509f-482f-bc1e-e6bfe0fa1001");
        let mut device = Device::new(&roots, &entry, Ok(&sample_query()));
        let summary = &mut device.summary;
        summary.device_api = Some("vfio-pci".to_owned());
        summary.iommu_group = Some(12);
        summary.group_path = Some("/dev/vfio/12".into());
        summary.cdev = Some("/dev/vfio/devices/vfio0".into());
        summary.server = Some(process(1234, "gpio"));
        summary.successor = Some(process(1250, "gpio"));
        device.creator = Some(Creator { uid: 0, gid: 0 });
        device.node_owner = Some(Owner {
            uid: 0,
            gid: 0,
            mode: "0600".to_owned(),
        });
        let memory = |pages| Memory {
            pages,
            page_size: 4096,
            bytes: pages * 4096,
        };
        device.memory = Some(memory(3));
        device.pinned = Some(memory(16));
        device.clients = vec![process(1300, "qemu-system-x86")];
        let attributes = [
            ("max_memory", 268_435_456),
            ("max_requests", 512),
            ("max_state", 1_048_576),
            ("max_vectors", 4096),
            ("reattach_timeout_ms", 5000),
        ];
        device.attributes = attributes
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        device
    }

    fn process(pid: u32, name: &str) -> Process {
        Process {
            pid,
            name: Some(name.to_owned()),
        }
    }

    fn sample_query() -> Query {
        let region = |index, flags, size, num_areas| muser_region {
            index,
            flags,
            size,
            num_areas,
            reserved: 0,
        };
        let area = |offset, size, flags| muser_area {
            offset,
            size,
            flags,
            reserved: 0,
        };
        let read_write = MUSER_REGION_READ | MUSER_REGION_WRITE;
        let irq = |index, flags, count, enabled| muser_irq_state {
            irq: muser_irq {
                index,
                flags,
                count,
                reserved: 0,
            },
            enabled,
            ..muser_irq_state::default()
        };
        let level = MUSER_IRQ_EVENTFD | MUSER_IRQ_MASKABLE | MUSER_IRQ_AUTOMASKED;
        Query {
            head: muser_query {
                flags: MUSER_STATE_CLIENT
                    | MUSER_STATE_ATTACHED
                    | MUSER_STATE_DESCRIBED
                    | MUSER_STATE_STANDBY,
                version: MUSER_ABI_VERSION,
                bus: MUSER_BUS_PCI,
                pid: 1234,
                standby_pid: 1250,
                taken: 1,
                memory_pages: 3,
                pinned_pages: 16,
                state_size: 4096,
                counters: muser_counters {
                    reads: 1042,
                    writes: 77,
                    resets: 1,
                    interrupts: 12,
                    attachments: 1,
                    doorbells: 7,
                    pins: 16,
                    ..muser_counters::default()
                },
                ..muser_query::default()
            },
            regions: vec![
                region(2, read_write, 8, 0),
                region(4, read_write, 65536, 2),
                region(7, read_write, 4096, 0),
            ],
            areas: vec![
                area(0x1000, 0x2000, MUSER_AREA_MMAP),
                area(0x4000, 0x40, MUSER_AREA_DOORBELL),
            ],
            irqs: vec![irq(0, level, 1, 1), irq(2, MUSER_IRQ_EVENTFD, 4, 0)],
        }
    }

    #[test]
    fn json_is_what_the_readme_shows() {
        let json = crate::json("devices", &[sample()]).unwrap();
        let readme = include_str!("../README.md");
        assert!(readme.contains(&json), "README.md lacks:\n{json}");
    }

    #[test]
    fn text_is_what_the_readme_shows() {
        let text = crate::text::show(&[sample()]);
        let readme = include_str!("../README.md");
        assert!(readme.contains(&text), "README.md lacks:\n{text}");
    }

    #[test]
    fn areas_beyond_those_given_are_not_invented() {
        let mut query = sample_query();
        query.regions[0].num_areas = u32::MAX;
        let regions = regions(&query);
        assert_eq!(regions[0].areas.len(), 2);
        assert_eq!(regions[1].areas.len(), 0);
    }

    #[test]
    fn unknown_flags_are_shown_by_value() {
        let known = [(1, "read"), (2, "write")];
        assert_eq!(flags(3, &known), ["read", "write"]);
        assert_eq!(flags(0x13, &known), ["read", "write", "0x10"]);
        assert!(flags(0, &known).is_empty());
    }

    #[test]
    fn names_are_those_of_vfio() {
        assert_eq!(region_name(MUSER_BUS_PCI, 5), "BAR5");
        assert_eq!(region_name(MUSER_BUS_PCI, 7), "config");
        assert_eq!(region_name(MUSER_BUS_PCI, 9), "region9");
        assert_eq!(region_name(MUSER_BUS_PLATFORM, 0), "region0");
        let name = |bus, index| {
            let mut state = muser_irq_state::default();
            state.irq.index = index;
            Irq::new(bus, &state).name
        };
        assert_eq!(name(MUSER_BUS_PCI, 2), "MSI-X");
        assert_eq!(name(MUSER_BUS_PLATFORM, 2), "irq2");
    }
}
