// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Declares a PCI device, and checks that it can exist.

use std::collections::BTreeMap;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;

use crate::error::{Error, Result};
use crate::model::PciModel;
use crate::pci::bar::BarKind;
use crate::pci::caps::{self, Capability, Extended};
use crate::pci::config::Layout;
use crate::pci::msix::Place;
use crate::pci::regs::*;
use crate::pci::{Bar, Express, Msi, Msix, PowerManagement, VendorCapability, VendorExtended};
use crate::region::{Area, Region, RegionInfo};
use crate::sys;
use crate::transport::{Description, IrqInfo};

/// The interrupt pin of a function (PCI 3.0, 6.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pin {
    /// INTA#, which a device with one function uses.
    A = 1,
    /// INTB#.
    B = 2,
    /// INTC#.
    C = 3,
    /// INTD#.
    D = 4,
}

/// Declares a PCI device; [`build`](Self::build) checks it all.
///
/// # Examples
///
/// ```
/// use libmuser::{Bar, Express, Msix, PciBuilder, Pin};
///
/// # fn main() -> libmuser::Result<()> {
/// let model = PciBuilder::new(0x1234, 0x5678)
///     .class(0x01, 0x08, 0x02)
///     .interrupt_pin(Pin::A)
///     .bar(0, Bar::memory64(0x10000).mappable(0x4000..0x8000))
///     .bar(2, Bar::io(32))
///     .express(Express::endpoint())
///     .msix(Msix::new(16).table(0, 0x2000).pba(0, 0x3000))
///     .serial_number(0x0123_4567_89ab_cdef)
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PciBuilder {
    identity: Identity,
    bars: Vec<(u8, Bar)>,
    rom: Option<Vec<u8>>,
    capabilities: Vec<Capability>,
    extended: Vec<Extended>,
    state: usize,
}

#[derive(Clone, Copy, Debug)]
struct Identity {
    vendor: u16,
    device: u16,
    class: [u8; 3],
    revision: u8,
    subsystem: (u16, u16),
    pin: Option<Pin>,
}

impl PciBuilder {
    /// A device with these ids, of no class, with nothing in it.
    #[must_use]
    pub fn new(vendor: u16, device: u16) -> Self {
        let identity = Identity {
            vendor,
            device,
            class: [0xff, 0, 0],
            revision: 0,
            subsystem: (vendor, device),
            pin: None,
        };
        let (bars, capabilities, extended) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            identity,
            bars,
            rom: None,
            capabilities,
            extended,
            state: 0,
        }
    }

    /// Sets the class code: base class, subclass and programming interface (`<linux/pci_ids.h>`).
    /// It is "unassigned" (0xff, 0, 0) otherwise.
    #[must_use]
    pub fn class(mut self, base: u8, subclass: u8, interface: u8) -> Self {
        self.identity.class = [base, subclass, interface];
        self
    }

    /// Sets the revision, which is 0 otherwise.
    #[must_use]
    pub fn revision(mut self, revision: u8) -> Self {
        self.identity.revision = revision;
        self
    }

    /// Sets the subsystem's ids, which are those of the device otherwise.
    #[must_use]
    pub fn subsystem(mut self, vendor: u16, device: u16) -> Self {
        self.identity.subsystem = (vendor, device);
        self
    }

    /// Gives the device an interrupt line.
    #[must_use]
    pub fn interrupt_pin(mut self, pin: Pin) -> Self {
        self.identity.pin = Some(pin);
        self
    }

    /// Adds a BAR, from 0 to 5.
    #[must_use]
    pub fn bar(mut self, number: u8, bar: Bar) -> Self {
        self.bars.push((number, bar));
        self
    }

    /// Adds an expansion ROM with this image, padded with ones to a power of two of 2 KiB or more.
    #[must_use]
    pub fn rom(mut self, image: impl Into<Vec<u8>>) -> Self {
        self.rom = Some(image.into());
        self
    }

    /// Adds the power management capability.
    #[must_use]
    pub fn power_management(self, pm: PowerManagement) -> Self {
        self.capability(Capability::PowerManagement(pm))
    }

    /// Adds the PCI Express capability, and the extended configuration space.
    #[must_use]
    pub fn express(self, express: Express) -> Self {
        self.capability(Capability::Express(express))
    }

    /// Adds the MSI capability.
    #[must_use]
    pub fn msi(self, msi: Msi) -> Self {
        self.capability(Capability::Msi(msi))
    }

    /// Adds the MSI-X capability.
    #[must_use]
    pub fn msix(self, msix: Msix) -> Self {
        self.capability(Capability::Msix(msix))
    }

    /// Adds a vendor-specific capability; there may be several.
    #[must_use]
    pub fn vendor_capability(self, vendor: VendorCapability) -> Self {
        self.capability(Capability::Vendor(vendor))
    }

    /// Adds the device serial number, an extended capability.
    #[must_use]
    pub fn serial_number(mut self, serial: u64) -> Self {
        self.extended.push(Extended::SerialNumber(serial));
        self
    }

    /// Adds a vendor-specific extended capability; there may be several.
    #[must_use]
    pub fn vendor_extended(mut self, vendor: VendorExtended) -> Self {
        self.extended.push(Extended::Vendor(vendor));
        self
    }

    /// Gives the device this many bytes of state that survives its process: see
    /// [`Bus::state`](crate::Bus::state). The transport bounds them: `muser.ko` by the device's
    /// attribute `max_state`, which also counts a few dozen KiB of the library's own.
    #[must_use]
    pub fn state(self, bytes: usize) -> Self {
        Self {
            state: bytes,
            ..self
        }
    }

    fn capability(mut self, capability: Capability) -> Self {
        self.capabilities.push(capability);
        self
    }

    /// Checks what was declared and lays out configuration space. Capabilities lie in the order in
    /// which they were added.
    ///
    /// # Errors
    ///
    /// [`Error::is_model`]: the device can't exist. The message names what is wrong: which BAR,
    /// which capability, and why.
    pub fn build(self) -> Result<PciModel> {
        let bars = self.check_bars()?;
        self.check_capabilities()?;
        let msix = self.check_msix(&bars)?;
        let rom = self.rom_image()?;
        let layout = self.lay_out(&bars, rom.as_deref())?;
        let description = self.describe(&bars, layout.size(), rom.as_deref());
        Ok(PciModel {
            layout: Arc::new(layout),
            description,
            bars,
            msix,
            rom,
            state: self.state,
        })
    }

    fn check_bars(&self) -> Result<BTreeMap<u8, Bar>> {
        let page_size = sys::page_size();
        let mut bars = BTreeMap::new();
        let mut taken: [Option<u8>; PCI_STD_NUM_BARS as usize] = Default::default();
        for (number, bar) in &self.bars {
            for register in (0..bar.registers_taken()).map(|half| number.saturating_add(half)) {
                let Some(owner) = taken.get_mut(usize::from(register)) else {
                    let message = match register == *number {
                        true => format!("BAR {number}: there are BARs 0 to 5 only"),
                        false => format!("BAR {number}: no BAR after it for its upper half"),
                    };
                    return Err(Error::model(message));
                };
                if let Some(owner) = owner.replace(*number) {
                    let message = match (owner == *number, register == *number) {
                        (true, _) => format!("BAR {number} is declared twice"),
                        (false, true) => {
                            format!("BAR {number} is taken by the upper half of BAR {owner}")
                        }
                        (false, false) => {
                            format!("BAR {number}: its upper half is taken by BAR {owner}")
                        }
                    };
                    return Err(Error::model(message));
                }
            }
            let mut bar = bar.clone();
            bar.areas.sort_by_key(|area| area.offset);
            if let Some(fault) = bar.fault(page_size) {
                return Err(Error::model(format!("BAR {number}: {fault}")));
            }
            bars.insert(*number, bar);
        }
        Ok(bars)
    }

    fn check_capabilities(&self) -> Result<()> {
        let mut names = Vec::new();
        for capability in &self.capabilities {
            let name = capability.name();
            if let Some(fault) = capability.fault() {
                return Err(Error::model(format!("{name} capability: {fault}")));
            }
            if !matches!(capability, Capability::Vendor(_)) && names.contains(&name) {
                return Err(Error::model(format!(
                    "{name} capability: it is declared twice"
                )));
            }
            names.push(name);
        }
        let express = self
            .capabilities
            .iter()
            .any(|cap| matches!(cap, Capability::Express(_)));
        for capability in &self.extended {
            let name = capability.name();
            if let Some(fault) = capability.fault() {
                return Err(Error::model(format!("{name} capability: {fault}")));
            }
            if !express {
                let message = "only a PCI Express device has room for it: add `express`";
                return Err(Error::model(format!("{name} capability: {message}")));
            }
        }
        let is_serial = |cap: &&Extended| matches!(cap, Extended::SerialNumber(_));
        if self.extended.iter().filter(is_serial).count() > 1 {
            return Err(Error::model(
                "device serial number capability: it is declared twice",
            ));
        }
        Ok(())
    }

    fn check_msix(&self, bars: &BTreeMap<u8, Bar>) -> Result<Option<Msix>> {
        let mut declared = self.capabilities.iter();
        let msix = declared.find_map(|cap| match cap {
            Capability::Msix(msix) => Some(*msix),
            _ => None,
        });
        let Some(msix) = msix else { return Ok(None) };
        let table = ("MSI-X table", msix.table, msix.table_size());
        let pba = ("MSI-X pending bit array", msix.pba, msix.pba_size());
        for (name, place, size) in [table, pba] {
            check_place(name, place, size, bars)?;
        }
        let (table, pba) = (
            msix.table.span(msix.table_size()),
            msix.pba.span(msix.pba_size()),
        );
        if msix.table.bar == msix.pba.bar && table.start < pba.end && pba.start < table.end {
            let message = format!(
                "at {:#x} it overlaps the table at {:#x}",
                pba.start, table.start
            );
            return Err(Error::model(format!("MSI-X pending bit array: {message}")));
        }
        Ok(Some(msix))
    }

    fn rom_image(&self) -> Result<Option<Vec<u8>>> {
        const LEAST: usize = 2048; // PCI 3.0, 6.2.5.2: bits 31 to 11 are the address.
        const MOST: usize = 16 << 20;
        let Some(image) = &self.rom else {
            return Ok(None);
        };
        if image.is_empty() || image.len() > MOST {
            let message = format!(
                "its image has {} bytes, where 1 to {MOST} can be",
                image.len()
            );
            return Err(Error::model(format!("expansion ROM: {message}")));
        }
        let mut image = image.clone();
        image.resize(image.len().next_power_of_two().max(LEAST), 0xff);
        Ok(Some(image))
    }

    fn lay_out(&self, bars: &BTreeMap<u8, Bar>, rom: Option<&[u8]>) -> Result<Layout> {
        let express = self
            .capabilities
            .iter()
            .any(|cap| matches!(cap, Capability::Express(_)));
        let mut layout = Layout::new(if express {
            PCI_CFG_SPACE_EXP_SIZE
        } else {
            PCI_CFG_SPACE_SIZE
        });
        self.identity.lay_out(bars, rom.is_some(), &mut layout);
        for (number, bar) in bars {
            bar.lay_out(*number, &mut layout);
        }
        if let Some(size) = rom.and_then(|rom| u32::try_from(rom.len()).ok()) {
            let address = !(size - 1) & PCI_ROM_ADDRESS_MASK;
            layout.dword(PCI_ROM_ADDRESS, 0, address | PCI_ROM_ADDRESS_ENABLE);
        }
        caps::chain(&self.capabilities, &mut layout).map_err(|cap| {
            let message = "no room is left in the first 256 bytes of configuration space";
            Error::model(format!("{} capability: {message}", cap.name()))
        })?;
        caps::chain_extended(&self.extended, &mut layout).map_err(|cap| {
            let message = "no room is left in the 4096 bytes of configuration space";
            Error::model(format!("{} capability: {message}", cap.name()))
        })?;
        Ok(layout)
    }

    fn describe(
        &self,
        bars: &BTreeMap<u8, Bar>,
        config_size: usize,
        rom: Option<&[u8]>,
    ) -> Description {
        let mut regions = Vec::new();
        let mut io_events = Vec::new();
        for (number, bar) in bars {
            let mut region = RegionInfo::new(Region::Bar(*number).index(), bar.size);
            region.areas.clone_from(&bar.areas);
            io_events.extend(bar.io_events(region.index));
            regions.push(region);
        }
        if let Some(rom) = rom {
            let mut region = RegionInfo::new(Region::Rom.index(), rom.len() as u64);
            region.writable = false;
            regions.push(region);
        }
        regions.push(RegionInfo::new(Region::Config.index(), config_size as u64));
        Description {
            regions,
            irqs: self.describe_irqs(),
            io_events,
        }
    }

    /// The flags are those that vfio-pci gives, and masking for MSI and MSI-X in addition.
    fn describe_irqs(&self) -> Vec<IrqInfo> {
        let mut irqs = Vec::new();
        if self.identity.pin.is_some() {
            let intx = IrqInfo::new(vfio::VFIO_PCI_INTX_IRQ_INDEX, 1);
            irqs.push(IrqInfo {
                maskable: true,
                automasked: true,
                ..intx
            });
        }
        for capability in &self.capabilities {
            match capability {
                Capability::Msi(msi) => {
                    let irq = IrqInfo::new(vfio::VFIO_PCI_MSI_IRQ_INDEX, msi.vectors.into());
                    irqs.push(IrqInfo {
                        maskable: true,
                        noresize: true,
                        ..irq
                    });
                }
                Capability::Msix(msix) => {
                    let irq = IrqInfo::new(vfio::VFIO_PCI_MSIX_IRQ_INDEX, msix.vectors.into());
                    irqs.push(IrqInfo {
                        maskable: true,
                        ..irq
                    });
                }
                Capability::Express(_) => {
                    irqs.push(IrqInfo::new(vfio::VFIO_PCI_ERR_IRQ_INDEX, 1));
                }
                _ => {}
            }
        }
        irqs.push(IrqInfo::new(vfio::VFIO_PCI_REQ_IRQ_INDEX, 1));
        irqs.sort_by_key(|irq| irq.index);
        irqs
    }
}

impl Identity {
    fn lay_out(self, bars: &BTreeMap<u8, Bar>, rom: bool, layout: &mut Layout) {
        let [base, subclass, interface] = self.class;
        layout.word(PCI_VENDOR_ID, self.vendor, 0);
        layout.word(PCI_DEVICE_ID, self.device, 0);
        layout.word(
            PCI_REVISION_ID,
            u16::from_le_bytes([self.revision, interface]),
            0,
        );
        layout.word(PCI_CLASS_DEVICE, u16::from_le_bytes([subclass, base]), 0);
        layout.word(PCI_SUBSYSTEM_VENDOR_ID, self.subsystem.0, 0);
        layout.word(PCI_SUBSYSTEM_ID, self.subsystem.1, 0);
        layout.word(PCI_CACHE_LINE_SIZE, 0, 0x00ff);
        // The line's number is for software alone to keep (PCI 3.0, 6.2.4).
        let pin = self.pin.map_or(0, |pin| pin as u8);
        layout.word(PCI_INTERRUPT_LINE, u16::from_le_bytes([0, pin]), 0x00ff);

        let mut command =
            PCI_COMMAND_MASTER | PCI_COMMAND_PARITY | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE;
        for bar in bars.values() {
            command |= match bar.kind {
                BarKind::Io => PCI_COMMAND_IO,
                BarKind::Memory32 | BarKind::Memory64 => PCI_COMMAND_MEMORY,
            };
        }
        if rom {
            command |= PCI_COMMAND_MEMORY;
        }
        layout.word(PCI_COMMAND, 0, command);
        layout.word_write_one_clears(
            PCI_STATUS,
            PCI_STATUS_PARITY
                | PCI_STATUS_SIG_TARGET_ABORT
                | PCI_STATUS_REC_TARGET_ABORT
                | PCI_STATUS_REC_MASTER_ABORT
                | PCI_STATUS_SIG_SYSTEM_ERROR
                | PCI_STATUS_DETECTED_PARITY,
        );
    }
}

fn check_place(name: &str, place: Place, size: u32, bars: &BTreeMap<u8, Bar>) -> Result<()> {
    let fault = |message: String| Err(Error::model(format!("{name}: {message}")));
    let Place {
        bar: number,
        offset,
    } = place;
    let Some(bar) = bars.get(&number) else {
        return fault(format!("there is no BAR {number}"));
    };
    if bar.kind == BarKind::Io {
        return fault(format!("BAR {number} is not memory"));
    }
    if offset % 8 != 0 {
        return fault(format!("its offset {offset:#x} is not a multiple of 8"));
    }
    let span = place.span(size);
    if span.end > bar.size {
        let (end, size) = (span.end, bar.size);
        return fault(format!(
            "its end {end:#x} is beyond BAR {number}'s size {size:#x}"
        ));
    }
    let overlaps = |area: &&Area| area.offset < span.end && span.start < area.end();
    match bar.areas.iter().find(overlaps) {
        Some(area) => {
            let (start, end) = (area.offset, area.end());
            fault(format!(
                "it overlaps BAR {number}'s mappable area {start:#x}..{end:#x}"
            ))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "builder_tests.rs"]
mod tests;
