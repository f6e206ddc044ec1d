// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Capabilities: what each one puts in configuration space, and the chains they form.

use super::config::Layout;
use super::msi::Msi;
use super::msix::{Msix, Place};
use super::regs::*;

/// Power management with the states D0 and D3hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerManagement {
    no_soft_reset: bool,
}

impl PowerManagement {
    /// A function which keeps its state in D3hot (`No_Soft_Reset` is set).
    #[must_use]
    pub const fn new() -> Self {
        Self {
            no_soft_reset: true,
        }
    }

    /// The function loses its state: on the way back to D0 the device gets
    /// [`Reset::PowerUp`](crate::Reset::PowerUp).
    #[must_use]
    pub const fn soft_reset(self) -> Self {
        Self {
            no_soft_reset: false,
        }
    }
}

impl Default for PowerManagement {
    fn default() -> Self {
        Self::new()
    }
}

/// PCI Express: an endpoint with one lane of 2.5 GT/s, and 4096 bytes of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Express {
    flr: bool,
}

impl Express {
    /// An endpoint which can be reset by itself (function level reset).
    #[must_use]
    pub const fn endpoint() -> Self {
        Self { flr: true }
    }

    /// The function does not offer function level reset.
    #[must_use]
    pub const fn without_flr(self) -> Self {
        Self { flr: false }
    }
}

/// A vendor-specific capability: bytes of which the library knows no meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VendorCapability {
    data: Vec<u8>,
    writable: Vec<u8>,
}

impl VendorCapability {
    /// A capability with these bytes behind its 3-byte header; a client can't change them.
    pub fn new(data: impl Into<Vec<u8>>) -> Self {
        Self {
            data: data.into(),
            writable: Vec::new(),
        }
    }

    /// Lets a client write the bits that are set in `mask`, byte by byte.
    #[must_use]
    pub fn writable(self, mask: impl Into<Vec<u8>>) -> Self {
        Self {
            writable: mask.into(),
            ..self
        }
    }
}

/// A vendor-specific extended capability (VSEC); it needs [`Express`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VendorExtended {
    id: u16,
    revision: u8,
    data: Vec<u8>,
}

impl VendorExtended {
    /// A capability with the vendor's own id, a revision from 0 to 15, and these bytes behind its
    /// 8-byte header; a client can't change them.
    pub fn new(id: u16, revision: u8, data: impl Into<Vec<u8>>) -> Self {
        Self {
            id,
            revision,
            data: data.into(),
        }
    }
}

/// A capability of the first 256 bytes.
#[derive(Clone, Debug)]
pub(crate) enum Capability {
    PowerManagement(PowerManagement),
    Express(Express),
    Msi(Msi),
    Msix(Msix),
    Vendor(VendorCapability),
}

impl Capability {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::PowerManagement(_) => "power management",
            Self::Express(_) => "PCI Express",
            Self::Msi(_) => "MSI",
            Self::Msix(_) => "MSI-X",
            Self::Vendor(_) => "vendor-specific",
        }
    }

    fn id(&self) -> u8 {
        match self {
            Self::PowerManagement(_) => PCI_CAP_ID_PM,
            Self::Express(_) => PCI_CAP_ID_EXP,
            Self::Msi(_) => PCI_CAP_ID_MSI,
            Self::Msix(_) => PCI_CAP_ID_MSIX,
            Self::Vendor(_) => PCI_CAP_ID_VNDR,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::PowerManagement(_) => PCI_PM_SIZEOF.into(),
            Self::Express(_) => PCI_CAP_EXP_SIZEOF_V2.into(),
            Self::Msi(msi) => msi.size().into(),
            Self::Msix(_) => PCI_CAP_MSIX_SIZEOF.into(),
            Self::Vendor(vendor) => vendor.data.len().saturating_add(3),
        }
    }

    /// What is wrong with this capability by itself, if anything is.
    pub(crate) fn fault(&self) -> Option<String> {
        match self {
            Self::Msi(msi) if !msi.vectors.is_power_of_two() || msi.vectors > 32 => Some(format!(
                "{} vectors, where 1, 2, 4, 8, 16 or 32 can be",
                msi.vectors
            )),
            Self::Msix(msix) if !(1..=PCI_MSIX_FLAGS_QSIZE + 1).contains(&msix.vectors) => {
                Some(format!("{} vectors, where 1 to 2048 can be", msix.vectors))
            }
            Self::Vendor(vendor) if vendor.writable.len() > vendor.data.len() => {
                let (mask, data) = (vendor.writable.len(), vendor.data.len());
                Some(format!(
                    "a write mask of {mask} bytes for {data} bytes of data"
                ))
            }
            _ => None,
        }
    }

    fn lay_out(&self, at: u16, layout: &mut Layout) {
        match self {
            Self::PowerManagement(pm) => pm.lay_out(at, layout),
            Self::Express(express) => express.lay_out(at, layout),
            Self::Msi(msi) => msi.lay_out(at, layout),
            Self::Msix(msix) => msix.lay_out(at, layout),
            Self::Vendor(vendor) => vendor.lay_out(at, layout),
        }
    }
}

/// Chains the capabilities from 0x40 on, in the order given.
///
/// # Errors
///
/// The capability which does not fit into the 256 bytes any more.
pub(crate) fn chain<'a>(
    capabilities: &'a [Capability],
    layout: &mut Layout,
) -> Result<(), &'a Capability> {
    let mut link = PCI_CAPABILITY_LIST;
    let mut free = usize::from(PCI_STD_HEADER_SIZEOF);
    for capability in capabilities {
        let end = free + capability.size();
        let (Ok(at), true) = (u8::try_from(free), end <= usize::from(PCI_CFG_SPACE_SIZE)) else {
            return Err(capability);
        };
        layout.defaults[usize::from(link)] = at;
        layout.defaults[usize::from(at)] = capability.id();
        capability.lay_out(at.into(), layout);
        link = u16::from(at) + PCI_CAP_LIST_NEXT;
        free = end.next_multiple_of(4);
    }
    if !capabilities.is_empty() {
        layout.defaults[usize::from(PCI_STATUS)] |= PCI_STATUS_CAP_LIST.to_le_bytes()[0];
    }
    Ok(())
}

/// A capability of the extended space.
#[derive(Clone, Debug)]
pub(crate) enum Extended {
    SerialNumber(u64),
    Vendor(VendorExtended),
}

impl Extended {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::SerialNumber(_) => "device serial number",
            Self::Vendor(_) => "vendor-specific extended",
        }
    }

    pub(crate) fn fault(&self) -> Option<String> {
        match self {
            Self::Vendor(vendor) if vendor.revision > 15 => Some(format!(
                "revision {}, where 0 to 15 can be",
                vendor.revision
            )),
            _ => None,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::SerialNumber(_) => PCI_EXT_CAP_DSN_SIZEOF.into(),
            Self::Vendor(vendor) => vendor.data.len().saturating_add(8),
        }
    }
}

/// Chains the extended capabilities from 0x100 on, in the order given.
///
/// # Errors
///
/// The capability which does not fit into the 4096 bytes any more.
pub(crate) fn chain_extended<'a>(
    capabilities: &'a [Extended],
    layout: &mut Layout,
) -> Result<(), &'a Extended> {
    let mut free = usize::from(PCI_CFG_SPACE_SIZE);
    for (index, capability) in capabilities.iter().enumerate() {
        let end = free + capability.size();
        let at = match u16::try_from(free) {
            Ok(at) if end <= usize::from(PCI_CFG_SPACE_EXP_SIZE) => at,
            _ => return Err(capability),
        };
        free = end.next_multiple_of(4);
        let is_last = index + 1 == capabilities.len();
        let next = if is_last {
            0
        } else {
            u32::try_from(free).unwrap_or(0)
        };
        capability.lay_out(at, next, layout);
    }
    Ok(())
}

impl Extended {
    fn lay_out(&self, at: u16, next: u32, layout: &mut Layout) {
        // PCIe 4.0, 7.6.3: id in bits 0 to 15, version 1 in 16 to 19, next in 20 to 31.
        let header = |id: u16| u32::from(id) | 1 << 16 | next << 20;
        match self {
            Self::SerialNumber(serial) => {
                layout.dword(at, header(PCI_EXT_CAP_ID_DSN), 0);
                let start = usize::from(at) + 4;
                layout.defaults[start..start + 8].copy_from_slice(&serial.to_le_bytes());
            }
            Self::Vendor(vendor) => {
                layout.dword(at, header(PCI_EXT_CAP_ID_VNDR), 0);
                let size = u32::try_from(self.size()).unwrap_or(0);
                let id = u32::from(vendor.id) | u32::from(vendor.revision) << 16 | size << 20;
                layout.dword(at + PCI_VNDR_HEADER, id, 0);
                let start = usize::from(at) + 8;
                layout.defaults[start..start + vendor.data.len()].copy_from_slice(&vendor.data);
            }
        }
    }
}

impl PowerManagement {
    fn lay_out(self, at: u16, layout: &mut Layout) {
        const VERSION: u16 = 3; // PCI PM 1.2, 3.2.3
        layout.pm = Some(at);
        layout.word(at + PCI_PM_PMC, VERSION, 0);
        let control = if self.no_soft_reset {
            PCI_PM_CTRL_NO_SOFT_RESET
        } else {
            0
        };
        layout.word(at + PCI_PM_CTRL, control, PCI_PM_CTRL_STATE_MASK);
    }
}

impl Express {
    /// PCIe 4.0, 7.5.3, with the values after reset that it gives for an endpoint.
    fn lay_out(self, at: u16, layout: &mut Layout) {
        const VERSION: u16 = 2;
        layout.express = Some(at);
        layout.word(at + PCI_EXP_FLAGS, VERSION | PCI_EXP_TYPE_ENDPOINT << 4, 0);
        let flr = if self.flr { PCI_EXP_DEVCAP_FLR } else { 0 };
        layout.dword(at + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER | flr, 0);
        layout.word(
            at + PCI_EXP_DEVCTL,
            PCI_EXP_DEVCTL_RELAX_EN | PCI_EXP_DEVCTL_NOSNOOP_EN | PCI_EXP_DEVCTL_READRQ_512B,
            PCI_EXP_DEVCTL_CERE
                | PCI_EXP_DEVCTL_NFERE
                | PCI_EXP_DEVCTL_FERE
                | PCI_EXP_DEVCTL_URRE
                | PCI_EXP_DEVCTL_RELAX_EN
                | PCI_EXP_DEVCTL_PAYLOAD
                | PCI_EXP_DEVCTL_NOSNOOP_EN
                | PCI_EXP_DEVCTL_READRQ,
        );
        layout.word_write_one_clears(
            at + PCI_EXP_DEVSTA,
            PCI_EXP_DEVSTA_CED | PCI_EXP_DEVSTA_NFED | PCI_EXP_DEVSTA_FED | PCI_EXP_DEVSTA_URD,
        );
        let lane = PCI_EXP_LNKSTA_NLW_X1;
        layout.dword(
            at + PCI_EXP_LNKCAP,
            PCI_EXP_LNKCAP_SLS_2_5GB | u32::from(lane),
            0,
        );
        layout.word(
            at + PCI_EXP_LNKCTL,
            0,
            PCI_EXP_LNKCTL_ASPMC | PCI_EXP_LNKCTL_RCB | PCI_EXP_LNKCTL_CCC | PCI_EXP_LNKCTL_ES,
        );
        layout.word(at + PCI_EXP_LNKSTA, PCI_EXP_LNKSTA_CLS_2_5GB | lane, 0);
        layout.dword(at + PCI_EXP_DEVCAP2, PCI_EXP_DEVCAP2_COMP_TMOUT_DIS, 0);
        layout.word(at + PCI_EXP_DEVCTL2, 0, PCI_EXP_DEVCTL2_COMP_TMOUT_DIS);
        layout.dword(at + PCI_EXP_LNKCAP2, PCI_EXP_LNKCAP2_SLS_2_5GB, 0);
        layout.word(
            at + PCI_EXP_LNKCTL2,
            PCI_EXP_LNKCTL2_TLS_2_5GT,
            PCI_EXP_LNKCTL2_TLS,
        );
    }
}

impl Msi {
    fn lay_out(self, at: u16, layout: &mut Layout) {
        layout.msi = Some(at);
        let count = u16::from(self.vectors.trailing_zeros().to_le_bytes()[0]);
        let masking = if self.maskable {
            PCI_MSI_FLAGS_MASKBIT
        } else {
            0
        };
        layout.word(
            at + PCI_MSI_FLAGS,
            count << PCI_MSI_FLAGS_QMASK.trailing_zeros() | PCI_MSI_FLAGS_64BIT | masking,
            PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE,
        );
        layout.dword(at + PCI_MSI_ADDRESS_LO, 0, !0b11);
        layout.dword(at + PCI_MSI_ADDRESS_HI, 0, !0);
        layout.word(at + PCI_MSI_DATA_64, 0, !0);
        if self.maskable {
            let vectors = u32::MAX >> (32 - u32::from(self.vectors));
            layout.dword(at + PCI_MSI_MASK_64, 0, vectors);
        }
    }
}

impl Msix {
    fn lay_out(self, at: u16, layout: &mut Layout) {
        layout.msix = Some(at);
        let writable = PCI_MSIX_FLAGS_MASKALL | PCI_MSIX_FLAGS_ENABLE;
        layout.word(at + PCI_MSIX_FLAGS, self.vectors - 1, writable);
        let place = |Place { bar, offset }| offset | u32::from(bar);
        layout.dword(at + PCI_MSIX_TABLE, place(self.table), 0);
        layout.dword(at + PCI_MSIX_PBA, place(self.pba), 0);
    }
}

impl VendorCapability {
    fn lay_out(&self, at: u16, layout: &mut Layout) {
        let start = usize::from(at) + 3;
        // The length byte counts the header too; the builder saw that it fits.
        let length = u8::try_from(self.data.len() + 3).unwrap_or(u8::MAX);
        layout.defaults[usize::from(at + PCI_CAP_FLAGS)] = length;
        layout.defaults[start..start + self.data.len()].copy_from_slice(&self.data);
        layout.writable[start..start + self.writable.len()].copy_from_slice(&self.writable);
    }
}
