// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `probe`: connects to a vfio-user server as a client, and shows its device.
//!
//! It asks and reads; it writes to no register, for it can't know what a write does. A read may do
//! something as well, so registers are read only where that was asked for.

use std::path::Path;
use std::time::Duration;

use libmuser::client::{Client, Options};
use libmuser::pci::regs::{
    PCI_CLASS_PROG, PCI_DEVICE_ID, PCI_REVISION_ID, PCI_SUBSYSTEM_ID, PCI_SUBSYSTEM_VENDOR_ID,
    PCI_VENDOR_ID,
};
use libmuser::{AreaKind, Region};
use serde::Serialize;

use crate::device::pci_interrupt;
use crate::error::{Error, Result};
use crate::text;

/// How long the server may take for an answer; as long as QEMU waits (`x-msg-timeout`).
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that one read may ask for: a screen, not a dump.
const MAX_READ: usize = 4096;

/// A place in a region, as `--read` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    region: u32,
    offset: u64,
    count: usize,
}

/// What a server says of its device.
#[derive(Debug, Serialize)]
pub(crate) struct Probe {
    protocol: Protocol,
    /// `None` for what is not a PCI device.
    pci: Option<Identity>,
    can_reset: bool,
    regions: Vec<RegionFacts>,
    interrupts: Vec<Interrupt>,
    reads: Vec<Read>,
}

#[derive(Debug, Serialize)]
struct Protocol {
    version: String,
    max_data_xfer_size: usize,
    write_multiple: bool,
    twin_socket: bool,
}

#[derive(Debug, Serialize)]
struct Identity {
    vendor: String,
    device: String,
    subsystem_vendor: String,
    subsystem_device: String,
    class: String,
    revision: String,
}

#[derive(Debug, Serialize)]
struct RegionFacts {
    index: u32,
    name: String,
    size: u64,
    readable: bool,
    writable: bool,
    mappable: Vec<Area>,
}

#[derive(Debug, Serialize)]
struct Area {
    offset: u64,
    size: u64,
}

#[derive(Debug, Serialize)]
struct Interrupt {
    index: u32,
    name: String,
    vectors: u32,
    maskable: bool,
    automasked: bool,
}

#[derive(Debug, Serialize)]
struct Read {
    region: u32,
    offset: u64,
    #[serde(skip)]
    asked: usize,
    bytes: Vec<u8>,
}

/// `REGION:OFFSET:BYTES`, of which the last two may be hexadecimal.
pub(crate) fn place(text: &str) -> std::result::Result<Place, String> {
    let wrong = || {
        "a place to read is REGION:OFFSET:BYTES, such as 0:0x10:4 for four bytes of BAR 0; region 7 \
         is config space"
            .to_owned()
    };
    let mut parts = text.split(':');
    let mut next = || parts.next().and_then(number).ok_or_else(wrong);
    let (region, offset, count) = (next()?, next()?, next()?);
    if parts.next().is_some() {
        return Err(wrong());
    }
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if !(1..=MAX_READ).contains(&count) {
        return Err(format!("from 1 to {MAX_READ} bytes can be read at a time"));
    }
    let region = u32::try_from(region).map_err(|_| wrong())?;
    Ok(Place {
        region,
        offset,
        count,
    })
}

fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let digit = |byte: u8| char::from(byte).is_digit(radix);
    let number = !digits.is_empty() && digits.bytes().all(digit);
    number
        .then(|| u64::from_str_radix(digits, radix).ok())
        .flatten()
}

impl Probe {
    /// Asks the server whose socket that is, and reads the places.
    pub(crate) fn of(socket: &Path, places: &[Place]) -> Result<Self> {
        let client = Options::new()
            .timeout(TIMEOUT)
            .connect(socket)
            .map_err(failed)?;
        let description = client.description();
        let regions = description.regions.iter().filter(|region| region.size > 0);
        let regions = regions.map(|region| {
            let mappable = region.areas.iter();
            let mappable = mappable.filter(|area| area.kind == AreaKind::Mappable);
            RegionFacts {
                index: region.index,
                name: region_name(client.is_pci(), region.index),
                size: region.size,
                readable: region.readable,
                writable: region.writable,
                mappable: mappable
                    .map(|area| Area {
                        offset: area.offset,
                        size: area.size,
                    })
                    .collect(),
            }
        });
        let irqs = description.irqs.iter().filter(|irq| irq.count > 0);
        let interrupts = irqs.map(|irq| Interrupt {
            index: irq.index,
            name: interrupt_name(client.is_pci(), irq.index),
            vectors: irq.count,
            maskable: irq.maskable,
            automasked: irq.automasked,
        });
        let (major, minor) = client.version();
        Ok(Self {
            protocol: Protocol {
                version: format!("{major}.{minor}"),
                max_data_xfer_size: client.max_data(),
                write_multiple: client.has_write_multi(),
                twin_socket: client.has_twin_socket(),
            },
            pci: identity(&client).map_err(failed)?,
            can_reset: client.can_reset(),
            regions: regions.collect(),
            interrupts: interrupts.collect(),
            reads: places
                .iter()
                .map(|place| read(&client, place))
                .collect::<Result<_>>()?,
        })
    }

    /// All of it, as a person reads it.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |label: &str, value: String| text += &format!("{label:<14} {value}\n");
        if let Some(pci) = &self.pci {
            let Identity {
                vendor,
                device,
                class,
                revision,
                ..
            } = pci;
            line(
                "device",
                format!("PCI {vendor}:{device}, class {class}, revision {revision}"),
            );
            line(
                "subsystem",
                format!("{}:{}", pci.subsystem_vendor, pci.subsystem_device),
            );
        } else {
            line("device", "not PCI".to_owned());
        }
        line("reset", yes(self.can_reset));
        for region in &self.regions {
            let access = match (region.readable, region.writable) {
                (true, true) => "read, write",
                (true, false) => "read only",
                (false, true) => "write only",
                (false, false) => "no access",
            };
            let mut value = format!("{}, {access}", text::size(region.size));
            for area in &region.mappable {
                let end = area.offset.saturating_add(area.size);
                value += &format!(", mappable {:#x}..{end:#x}", area.offset);
            }
            line(&region.name, value);
        }
        for interrupt in &self.interrupts {
            let vectors = match interrupt.vectors {
                1 => "1 vector".to_owned(),
                vectors => format!("{vectors} vectors"),
            };
            let kind = match (interrupt.automasked, interrupt.maskable) {
                (true, _) => ", masks itself when it fires",
                (false, true) => ", maskable",
                (false, false) => "",
            };
            line(&interrupt.name, vectors + kind);
        }
        let protocol = &self.protocol;
        line(
            "vfio-user",
            format!(
                "{}, {} of data in a message, WRITE_MULTI {}, second socket {}",
                protocol.version,
                text::size(protocol.max_data_xfer_size as u64),
                yes(protocol.write_multiple),
                yes(protocol.twin_socket)
            ),
        );
        for read in &self.reads {
            text += &dump(read);
        }
        text
    }
}

fn identity(client: &Client) -> libmuser::Result<Option<Identity>> {
    if !client.is_pci() || client.region(Region::Config.index()).is_none() {
        return Ok(None);
    }
    let bytes = |offset: u16, bytes: &mut [u8]| {
        client
            .read(Region::Config.index(), offset.into(), bytes)
            .map(drop)
    };
    let word = |offset| -> libmuser::Result<String> {
        let mut word = [0; 2];
        bytes(offset, &mut word)?;
        Ok(format!("{:04x}", u16::from_le_bytes(word)))
    };
    let (mut class, mut revision) = ([0; 3], [0]);
    bytes(PCI_CLASS_PROG, &mut class)?;
    bytes(PCI_REVISION_ID, &mut revision)?;
    let [interface, subclass, base] = class;
    Ok(Some(Identity {
        vendor: word(PCI_VENDOR_ID)?,
        device: word(PCI_DEVICE_ID)?,
        subsystem_vendor: word(PCI_SUBSYSTEM_VENDOR_ID)?,
        subsystem_device: word(PCI_SUBSYSTEM_ID)?,
        class: format!("{base:02x}{subclass:02x}{interface:02x}"),
        revision: format!("{:02x}", revision[0]),
    }))
}

fn read(client: &Client, place: &Place) -> Result<Read> {
    let Place {
        region,
        offset,
        count,
    } = *place;
    let mut bytes = vec![0; count];
    let done = client.read(region, offset, &mut bytes).map_err(|error| {
        Error::new(format!(
            "can't read {count} bytes at {offset:#x} of region {region}: {error}"
        ))
    })?;
    bytes.truncate(done);
    Ok(Read {
        region,
        offset,
        asked: count,
        bytes,
    })
}

/// Sixteen bytes a line, with the offset of the first.
fn dump(read: &Read) -> String {
    let end = match read.asked - read.bytes.len() {
        0 => "",
        _ => " up to its end",
    };
    let mut text = format!("\nregion {} at {:#x}{end}:\n", read.region, read.offset);
    let mut offset = read.offset;
    for line in read.bytes.chunks(16) {
        let bytes: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        text += &format!("{offset:08x}  {}\n", bytes.join(" "));
        offset = offset.saturating_add(line.len() as u64);
    }
    text
}

fn region_name(pci: bool, index: u32) -> String {
    match Region::from_index(index).filter(|_| pci) {
        Some(region) => region.to_string(),
        None => format!("region {index}"),
    }
}

fn interrupt_name(pci: bool, index: u32) -> String {
    match pci_interrupt(index).filter(|_| pci) {
        Some(name) => name.to_owned(),
        None => format!("interrupt {index}"),
    }
}

fn yes(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err passes")]
fn failed(error: libmuser::Error) -> Error {
    Error::new(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_is_region_offset_and_bytes() {
        let expected = Place {
            region: 7,
            offset: 0x10,
            count: 4,
        };
        assert_eq!(place("7:0x10:4"), Ok(expected));
        assert_eq!(place("7:16:0x4"), Ok(expected));
    }

    #[test]
    fn wrong_place_is_refused_in_words() {
        for wrong in [
            "", "7", "7:0", "7:0:", "7:-1:4", "7:0:4:1", "7:0x:4", "7:+1:4",
        ] {
            let why = place(wrong).unwrap_err();
            assert!(why.contains("REGION:OFFSET:BYTES"), "{wrong}: {why}");
        }
        for wrong in ["7:0:0", "7:0:4097"] {
            assert!(place(wrong).unwrap_err().contains("from 1 to 4096"));
        }
    }

    #[test]
    fn dump_has_sixteen_bytes_a_line() {
        let read = Read {
            region: 7,
            offset: 0x10,
            asked: 20,
            bytes: (0..17).collect(),
        };
        let expected = "\nregion 7 at 0x10 up to its end:\n\
            00000010  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f\n\
            00000020  10\n";
        assert_eq!(dump(&read), expected);
    }
}
