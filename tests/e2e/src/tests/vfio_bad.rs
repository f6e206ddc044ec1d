// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malformed ioctls of the VFIO device file.

use anyhow::Result;
use muser_e2e::check::{equal, fails, fails_as};
use muser_e2e::rig::Rig;
use muser_e2e::sys::{self, Mapping, PAGE};
use muser_e2e::vfio::{
    Road, VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_SET_IRQS, VFIO_UNKNOWN,
};

use super::topic;

topic!("vfio", once: [], roads: [
    argsz_too_small_refused,
    bad_index_refused,
    bad_pointer_refused,
    struct_straddling_unmapped_memory_refused,
    unknown_ioctl_refused,
    argsz_larger_than_known_accepted,
]);

const INFOS: [(&str, u32, u32); 3] = [
    // The first argsz that VFIO accepts: up to num_irqs, offset and count.
    ("GET_INFO", VFIO_DEVICE_GET_INFO, 16),
    ("GET_REGION_INFO", VFIO_DEVICE_GET_REGION_INFO, 32),
    ("GET_IRQ_INFO", VFIO_DEVICE_GET_IRQ_INFO, 16),
];

fn argument(argsz: u32, index: u32) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    bytes[0..4].copy_from_slice(&argsz.to_ne_bytes());
    bytes[8..12].copy_from_slice(&index.to_ne_bytes());
    bytes
}

fn argsz_too_small_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for (name, number, least) in INFOS {
        for argsz in [0, 1, 4, least - 1] {
            let result = sys::ioctl_bytes(&rig.client, number, &mut argument(argsz, 0));
            fails(&format!("{name} with argsz {argsz}"), result, libc::EINVAL)?;
        }
        // What lies behind argsz stays as it was.
        let mut bytes = argument(least, 0);
        bytes[least as usize..].fill(0xEE);
        sys::ioctl_bytes(&rig.client, number, &mut bytes)?;
        let behind = bytes[least as usize..].iter().all(|&byte| byte == 0xEE);
        equal(&format!("{name} kept to its argsz"), behind, true)?;
    }
    Ok(())
}

fn bad_index_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for index in [9, 32, 1 << 24, u32::MAX] {
        let number = VFIO_DEVICE_GET_REGION_INFO;
        let result = sys::ioctl_bytes(&rig.client, number, &mut argument(32, index));
        fails(&format!("region {index}"), result, libc::EINVAL)?;
    }
    for index in [5, 32, u32::MAX] {
        let number = VFIO_DEVICE_GET_IRQ_INFO;
        let result = sys::ioctl_bytes(&rig.client, number, &mut argument(16, index));
        fails(&format!("interrupt {index}"), result, libc::EINVAL)?;
    }
    Ok(())
}

const ALL: [u32; 4] = [
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_SET_IRQS,
];

fn bad_pointer_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for number in ALL {
        for address in [0, 3, -4096] {
            let result = sys::ioctl_value(&rig.client, number, address);
            fails(
                &format!("ioctl {number:#x} at {address}"),
                result,
                libc::EFAULT,
            )?;
        }
    }
    Ok(())
}

fn struct_straddling_unmapped_memory_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let memory = Mapping::with_hole(PAGE)?;
    for number in ALL {
        for accessible in [4, 8, 12] {
            let at = PAGE - accessible;
            memory.write_bytes(at, &256u32.to_ne_bytes());
            let result = sys::ioctl_at(&rig.client, number, &memory, at);
            fails(
                &format!("ioctl {number:#x}, {accessible} bytes"),
                result,
                libc::EFAULT,
            )?;
        }
    }
    // The data of SET_IRQS behind a header that is there.
    let set =
        muser_e2e::vfio::IrqSet::trigger(2, 0, muser_e2e::vfio::IrqData::EventFd(vec![-1; 8]));
    let header = &set.bytes()[..20];
    memory.write_bytes(PAGE - 20, header);
    let result = sys::ioctl_at(&rig.client, VFIO_DEVICE_SET_IRQS, &memory, PAGE - 20);
    fails("SET_IRQS without its data", result, libc::EFAULT)
}

fn unknown_ioctl_refused(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    let unknown = [libc::ENOTTY];
    // VFIO_DEVICE_GET_PCI_HOT_RESET_INFO and VFIO_DEVICE_IOEVENTFD are vfio-pci's alone.
    for number in [
        VFIO_UNKNOWN,
        (u32::from(b';') << 8) | 112,
        (u32::from(b';') << 8) | 116,
        0x5401,
    ] {
        let result = sys::ioctl_bytes(&rig.client, number, &mut argument(64, 0));
        fails_as(&format!("ioctl {number:#x}"), result, &unknown)?;
    }
    Ok(())
}

fn argsz_larger_than_known_accepted(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for (name, number, _) in INFOS {
        let result = sys::ioctl_bytes(&rig.client, number, &mut argument(250, 0));
        muser_e2e::check::works(name, result)?;
    }
    Ok(())
}
