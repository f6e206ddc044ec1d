// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Says in words what `muser.ko` found wrong with a description.

use muser_uapi::*;
use nix::errno::Errno as Number;

use crate::region::RegionInfo;
use crate::transport::difference::{name_area, region_name, Difference};
use crate::transport::{Description, STATE_DIFFERS};

/// A sentence for the fault of a `MUSER_ATTACH` that failed with `errno`.
pub(super) fn sentence(attach: &muser_attach, description: &Description, errno: Number) -> String {
    let index = attach.fault_index as usize;
    let region = || name_region(description.regions.get(index));
    let irq = || match description.irqs.get(index) {
        Some(irq) => format!("interrupt index {}", irq.index),
        None => "an interrupt index".into(),
    };
    let area = || name_area(description, index).unwrap_or_else(|| format!("area {index}"));
    match attach.fault {
        MUSER_FAULT_VERSION => format!(
            "the module speaks version {} of the ABI, this program version {MUSER_ABI_VERSION}",
            attach.version
        ),
        MUSER_FAULT_BUS => "the device is not of the type muser-pci".into(),
        MUSER_FAULT_LIMIT => {
            let what = [
                "regions",
                "areas",
                "interrupt indexes",
                "slots",
                "interrupt vectors (the device's attribute max_vectors)",
            ];
            format!(
                "there are too many {}",
                what.get(index).unwrap_or(&"of something")
            )
        }
        MUSER_FAULT_REGION_INDEX => {
            format!("{}: its index is out of range, or out of order", region())
        }
        MUSER_FAULT_REGION_FLAGS => format!("{}: its flags make no sense", region()),
        MUSER_FAULT_REGION_SIZE => format!("{}: its size does not fit its kind", region()),
        MUSER_FAULT_REGION_OVERFLOW => format!("{}: it is too large", region()),
        MUSER_FAULT_AREA_COUNT => format!("{}: its number of areas is wrong", region()),
        MUSER_FAULT_AREA_FLAGS => format!("{}: its flags make no sense", area()),
        MUSER_FAULT_AREA_ALIGN => format!("{}: it is not made of whole pages", area()),
        MUSER_FAULT_AREA_OVERFLOW => format!("{}: it ends beyond its region", area()),
        MUSER_FAULT_AREA_OVERLAP => format!("{} overlaps the area before it", area()),
        MUSER_FAULT_IRQ_INDEX => format!("{}: it is out of range, or out of order", irq()),
        MUSER_FAULT_IRQ_FLAGS => format!("{}: its flags exclude each other", irq()),
        MUSER_FAULT_IRQ_COUNT => format!("{}: it has no vectors, or too many", irq()),
        MUSER_FAULT_ATTACHED => "another process serves it already".into(),
        MUSER_FAULT_ATTACHED_SELF => "this process serves it already".into(),
        MUSER_FAULT_DIFFERS => match difference(attach.fault_index) {
            Some(difference) => difference.sentence(description),
            None => "it was described differently before".into(),
        },
        MUSER_FAULT_NO_CONFIG => "it has no configuration space".into(),
        MUSER_FAULT_MEMORY => "its mappable areas exceed the device's attribute max_memory".into(),
        MUSER_FAULT_STATE => "its state exceeds the device's attribute max_state".into(),
        MUSER_FAULT_STANDBY => "another process waits in standby already".into(),
        MUSER_FAULT_USER_MEMORY => {
            "its areas exceed what is left to its creator (max_user_memory)".into()
        }
        MUSER_FAULT_STATE_DIFFERS => STATE_DIFFERS.into(),
        MUSER_FAULT_NONE => errno.desc().to_string(),
        fault => format!("fault {fault} at {index}, of which this program knows no meaning"),
    }
}

fn name_region(region: Option<&RegionInfo>) -> String {
    region.map_or_else(|| "a region".into(), |region| region_name(region.index))
}

/// What `fault_index` of `MUSER_FAULT_DIFFERS` says.
fn difference(index: u32) -> Option<Difference> {
    let position = (index & 0xffff) as usize;
    match index >> 16 {
        0 => Some(Difference::Region(position)),
        1 => Some(Difference::Area(position)),
        2 => Some(Difference::Irq(position)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, PciBuilder, Pin};

    fn description() -> Description {
        let builder = PciBuilder::new(1, 2).bar(0, Bar::memory32(1 << 20).mappable(0..0x1000));
        let bar = Bar::memory32(1 << 20)
            .mappable(0..0x1000)
            .mappable(0x2000..0x3000);
        let builder = builder.interrupt_pin(Pin::A);
        builder.bar(2, bar).build().unwrap().description().clone()
    }

    fn sentence_of(fault: u32, fault_index: u32) -> String {
        let attach = muser_attach {
            fault,
            fault_index,
            ..muser_attach::default()
        };
        sentence(&attach, &description(), Number::EINVAL)
    }

    #[test]
    fn area_is_named_by_its_region() {
        let text = sentence_of(MUSER_FAULT_AREA_OVERLAP, 2);

        assert_eq!(text, "BAR 2: area 1 at 0x2000 overlaps the area before it");
    }

    #[test]
    fn region_is_named_as_pci_has_it() {
        assert!(sentence_of(MUSER_FAULT_REGION_SIZE, 2).starts_with("config space: "));
    }

    #[test]
    fn what_differs_is_named() {
        let sentence_at =
            |kind: u32, position| sentence_of(MUSER_FAULT_DIFFERS, kind << 16 | position);

        assert!(sentence_at(0, 1).starts_with("BAR 2 was described with another size"));
        assert!(sentence_at(1, 2).starts_with("BAR 2: area 1 at 0x2000 was described"));
        assert!(sentence_at(2, 0).starts_with("interrupt index 0 was described"));
        assert!(sentence_at(0, 9).contains("with more regions before"));
        assert!(sentence_at(3, 0).contains("differently"));
    }

    #[test]
    fn every_fault_has_a_sentence_of_its_own() {
        let mut sentences: Vec<_> = (MUSER_FAULT_VERSION..=MUSER_FAULT_STATE_DIFFERS)
            .map(|fault| sentence_of(fault, 0))
            .collect();
        sentences.sort();
        sentences.dedup();

        assert_eq!(sentences.len(), MUSER_FAULT_STATE_DIFFERS as usize);
        assert!(sentences
            .iter()
            .all(|sentence| !sentence.contains("no meaning")));
    }

    #[test]
    fn index_out_of_bounds_does_not_panic() {
        for fault in 0..100 {
            sentence_of(fault, u32::MAX);
        }
    }
}
