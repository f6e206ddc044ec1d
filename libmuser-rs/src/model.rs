// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI device as it was declared, and which part of it answers where.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;

use crate::pci::config::{ConfigSpace, Layout};
use crate::pci::function::Function;
use crate::pci::{Bar, Msix};
use crate::region::{AreaKind, Region, Width};
use crate::state::Parts;
use crate::transport::Description;

/// A PCI device as it was declared: complete, consistent and unchangeable.
#[derive(Clone, Debug)]
pub struct PciModel {
    pub(crate) layout: Arc<Layout>,
    pub(crate) description: Description,
    pub(crate) bars: BTreeMap<u8, Bar>,
    pub(crate) msix: Option<Msix>,
    pub(crate) rom: Option<Vec<u8>>,
    /// Bytes that the device itself keeps beyond the life of its process.
    pub(crate) state: usize,
}

/// What answers at some place of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Configuration space.
    Config,
    /// The image of the expansion ROM.
    Rom,
    /// The MSI-X table.
    MsixTable,
    /// The MSI-X pending bits.
    MsixPba,
    /// The doorbell area which starts there.
    Doorbell(Region, u64),
    /// The device itself, with registers of this width at most.
    Device(Region, Width),
}

impl PciModel {
    /// A configuration space of this device, in the state after power-on.
    #[must_use]
    pub fn config_space(&self) -> ConfigSpace {
        ConfigSpace::new(Arc::clone(&self.layout))
    }

    /// What clients get to see of it: regions and interrupts.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The interrupt vectors that the device itself can raise.
    pub(crate) fn vectors(&self) -> u16 {
        let raised = [
            vfio::VFIO_PCI_INTX_IRQ_INDEX,
            vfio::VFIO_PCI_MSI_IRQ_INDEX,
            vfio::VFIO_PCI_MSIX_IRQ_INDEX,
        ];
        let counts = raised
            .iter()
            .filter_map(|index| self.description.irq(*index));
        counts
            .filter_map(|irq| u16::try_from(irq.count).ok())
            .max()
            .unwrap_or(0)
    }

    pub(crate) fn is_express(&self) -> bool {
        self.layout.express.is_some()
    }

    pub(crate) fn function(&self) -> Function {
        let msix_vectors = self.msix.map(|msix| msix.vectors);
        Function::new(self.config_space(), msix_vectors, self.vectors())
    }

    /// What is kept beyond the life of the process: the author's state, and that of the function,
    /// of which `image` is one.
    pub(crate) fn parts(&self, image: &[u8]) -> Parts {
        Parts {
            library: image.len(),
            author: self.state,
            fingerprint: self.layout.fingerprint(),
        }
    }

    pub(crate) fn rom(&self) -> &[u8] {
        self.rom.as_deref().unwrap_or_default()
    }

    /// What answers at `offset` of a region, from where, and up to which offset of the region.
    ///
    /// The offset lies in the region.
    pub(crate) fn claim(&self, region: Region, offset: u64) -> Option<(Claim, Range<u64>)> {
        let size = self.description.region(region.index())?.size;
        let number = match region {
            Region::Config => return Some((Claim::Config, 0..size)),
            Region::Rom => return Some((Claim::Rom, 0..size)),
            Region::Bar(number) => number,
        };
        let mut whole = 0..size;
        let msix = self.msix.into_iter().flat_map(|msix| {
            let table = (Claim::MsixTable, msix.table, msix.table_size());
            [table, (Claim::MsixPba, msix.pba, msix.pba_size())]
        });
        let msix = msix
            .filter(|(_, place, _)| place.bar == number)
            .map(|(claim, place, size)| (claim, place.span(size)));
        let areas = self.bars.get(&number).map(|bar| &bar.areas);
        let doorbells = areas
            .into_iter()
            .flatten()
            .filter(|area| area.kind == AreaKind::Doorbell)
            .map(|area| {
                (
                    Claim::Doorbell(region, area.offset),
                    area.offset..area.end(),
                )
            });
        for (claim, span) in doorbells.chain(msix) {
            if span.contains(&offset) {
                return Some((claim, span));
            }
            if span.start > offset {
                whole.end = whole.end.min(span.start);
            } else {
                whole.start = whole.start.max(span.end);
            }
        }
        let width = self.bars.get(&number)?.width;
        Some((Claim::Device(region, width), whole))
    }
}
