// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `--print-capabilities` prints: what a management program must know before it starts the
//! program, as JSON.

use serde_json::{json, Value};

use super::options::COMPAT_VERSIONS;
use crate::model::PciModel;
use crate::pci::regs::*;
use crate::region::{AreaKind, Region};
use crate::vfio_user::wire::{MAJOR, MINOR};

/// The device, and by what and how it can be served.
///
/// Numbers which people write in hexadecimal are strings.
pub(super) fn capabilities(name: &str, version: &str, model: &PciModel) -> Value {
    let config = model.config_space();
    let hex = |offset| format!("{:#06x}", config.word(offset));
    let mut class = [0; 3];
    config.read(PCI_CLASS_PROG.into(), &mut class);
    let [interface, subclass, base] = class;
    let regions = model.description().regions.iter().map(|region| {
        let name = Region::from_index(region.index).map(|region| region.to_string());
        let areas = |kind| {
            let areas = region.areas.iter().filter(move |area| area.kind == kind);
            let area = |area: &crate::Area| json!({ "offset": area.offset, "size": area.size });
            areas.map(area).collect::<Vec<_>>()
        };
        json!({
            "index": region.index,
            "name": name,
            "size": region.size,
            "readable": region.readable,
            "writable": region.writable,
            "mappable": areas(AreaKind::Mappable),
            "doorbells": areas(AreaKind::Doorbell),
        })
    });
    let irqs =
        model.description().irqs.iter().map(
            |irq| json!({ "index": irq.index, "vectors": irq.count, "maskable": irq.maskable }),
        );
    json!({
        "name": name,
        "version": version,
        "compat_versions": COMPAT_VERSIONS,
        "transports": [
            { "name": "kernel", "option": "--uuid", "abi": muser_uapi::MUSER_ABI_VERSION },
            {
                "name": "socket",
                "option": "--socket-path",
                "protocol": "vfio-user",
                "major": MAJOR,
                "minor": MINOR,
            },
        ],
        "device": {
            "bus": "pci",
            "vendor": hex(PCI_VENDOR_ID),
            "device": hex(PCI_DEVICE_ID),
            "subsystem_vendor": hex(PCI_SUBSYSTEM_VENDOR_ID),
            "subsystem_device": hex(PCI_SUBSYSTEM_ID),
            "class": format!("0x{base:02x}{subclass:02x}{interface:02x}"),
            "regions": regions.collect::<Vec<_>>(),
            "interrupts": irqs.collect::<Vec<_>>(),
            "state": model.state,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, Msi, PciBuilder};

    #[test]
    fn device_and_what_serves_it_are_shown() {
        let builder = PciBuilder::new(0x494f, 0x0dc8)
            .class(0x11, 0x80, 0)
            .msi(Msi::new(2));
        let bar = Bar::io(8).doorbells(4..8);
        let model = builder.bar(2, bar).state(3).build().unwrap();

        let value = capabilities("gpio", "1", &model);

        assert_eq!(value["device"]["vendor"], "0x494f");
        assert_eq!(value["device"]["class"], "0x118000");
        assert_eq!(value["device"]["regions"][0]["name"], "BAR 2");
        let doorbell = &value["device"]["regions"][0]["doorbells"][0];
        assert_eq!(doorbell["offset"], 4);
        assert_eq!(value["device"]["interrupts"][0]["vectors"], 2);
        assert_eq!(value["device"]["state"], 3);
        assert_eq!(value["compat_versions"], json!([1]));
        let transports = value["transports"].as_array().unwrap();
        let names: Vec<_> = transports.iter().map(|one| &one["name"]).collect();
        assert_eq!(names, ["kernel", "socket"]);
    }
}
