// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Offsets and bits of PCI configuration space, with the names of `<linux/pci_regs.h>`.
//!
//! Offsets within a capability are relative to its first byte.

#![expect(missing_docs, reason = "named and explained in <linux/pci_regs.h>")]

pub const PCI_CFG_SPACE_SIZE: u16 = 256;
pub const PCI_CFG_SPACE_EXP_SIZE: u16 = 4096;
pub const PCI_STD_HEADER_SIZEOF: u16 = 64;
pub const PCI_STD_NUM_BARS: u8 = 6;

pub const PCI_VENDOR_ID: u16 = 0x00;
pub const PCI_DEVICE_ID: u16 = 0x02;
pub const PCI_COMMAND: u16 = 0x04;
pub const PCI_COMMAND_IO: u16 = 0x1;
pub const PCI_COMMAND_MEMORY: u16 = 0x2;
pub const PCI_COMMAND_MASTER: u16 = 0x4;
pub const PCI_COMMAND_PARITY: u16 = 0x40;
pub const PCI_COMMAND_SERR: u16 = 0x100;
pub const PCI_COMMAND_INTX_DISABLE: u16 = 0x400;
pub const PCI_STATUS: u16 = 0x06;
pub const PCI_STATUS_INTERRUPT: u16 = 0x08;
pub const PCI_STATUS_CAP_LIST: u16 = 0x10;
pub const PCI_STATUS_PARITY: u16 = 0x100;
pub const PCI_STATUS_SIG_TARGET_ABORT: u16 = 0x800;
pub const PCI_STATUS_REC_TARGET_ABORT: u16 = 0x1000;
pub const PCI_STATUS_REC_MASTER_ABORT: u16 = 0x2000;
pub const PCI_STATUS_SIG_SYSTEM_ERROR: u16 = 0x4000;
pub const PCI_STATUS_DETECTED_PARITY: u16 = 0x8000;
pub const PCI_REVISION_ID: u16 = 0x08;
pub const PCI_CLASS_PROG: u16 = 0x09;
pub const PCI_CLASS_DEVICE: u16 = 0x0a;
pub const PCI_CACHE_LINE_SIZE: u16 = 0x0c;
pub const PCI_BASE_ADDRESS_0: u16 = 0x10;
pub const PCI_BASE_ADDRESS_SPACE_IO: u32 = 0x01;
pub const PCI_BASE_ADDRESS_MEM_TYPE_64: u32 = 0x04;
pub const PCI_BASE_ADDRESS_MEM_PREFETCH: u32 = 0x08;
pub const PCI_BASE_ADDRESS_MEM_MASK: u64 = !0x0f;
pub const PCI_BASE_ADDRESS_IO_MASK: u64 = !0x03;
pub const PCI_SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
pub const PCI_SUBSYSTEM_ID: u16 = 0x2e;
pub const PCI_ROM_ADDRESS: u16 = 0x30;
pub const PCI_ROM_ADDRESS_ENABLE: u32 = 0x01;
pub const PCI_ROM_ADDRESS_MASK: u32 = !0x7ff;
pub const PCI_CAPABILITY_LIST: u16 = 0x34;
pub const PCI_INTERRUPT_LINE: u16 = 0x3c;
pub const PCI_INTERRUPT_PIN: u16 = 0x3d;

pub const PCI_CAP_LIST_ID: u16 = 0;
pub const PCI_CAP_LIST_NEXT: u16 = 1;
pub const PCI_CAP_FLAGS: u16 = 2;
pub const PCI_CAP_ID_PM: u8 = 0x01;
pub const PCI_CAP_ID_MSI: u8 = 0x05;
pub const PCI_CAP_ID_VNDR: u8 = 0x09;
pub const PCI_CAP_ID_EXP: u8 = 0x10;
pub const PCI_CAP_ID_MSIX: u8 = 0x11;

pub const PCI_PM_PMC: u16 = 2;
pub const PCI_PM_CTRL: u16 = 4;
pub const PCI_PM_CTRL_STATE_MASK: u16 = 0x0003;
pub const PCI_PM_CTRL_NO_SOFT_RESET: u16 = 0x0008;
pub const PCI_PM_SIZEOF: u16 = 8;

pub const PCI_MSI_FLAGS: u16 = 2;
pub const PCI_MSI_FLAGS_ENABLE: u16 = 0x0001;
pub const PCI_MSI_FLAGS_QMASK: u16 = 0x000e;
pub const PCI_MSI_FLAGS_QSIZE: u16 = 0x0070;
pub const PCI_MSI_FLAGS_64BIT: u16 = 0x0080;
pub const PCI_MSI_FLAGS_MASKBIT: u16 = 0x0100;
pub const PCI_MSI_ADDRESS_LO: u16 = 4;
pub const PCI_MSI_ADDRESS_HI: u16 = 8;
pub const PCI_MSI_DATA_64: u16 = 12;
pub const PCI_MSI_MASK_64: u16 = 16;
pub const PCI_MSI_PENDING_64: u16 = 20;

pub const PCI_MSIX_FLAGS: u16 = 2;
pub const PCI_MSIX_FLAGS_QSIZE: u16 = 0x07ff;
pub const PCI_MSIX_FLAGS_MASKALL: u16 = 0x4000;
pub const PCI_MSIX_FLAGS_ENABLE: u16 = 0x8000;
pub const PCI_MSIX_TABLE: u16 = 4;
pub const PCI_MSIX_PBA: u16 = 8;
pub const PCI_CAP_MSIX_SIZEOF: u16 = 12;
pub const PCI_MSIX_ENTRY_SIZE: usize = 16;
pub const PCI_MSIX_ENTRY_VECTOR_CTRL: usize = 12;
pub const PCI_MSIX_ENTRY_CTRL_MASKBIT: u8 = 0x01;

pub const PCI_EXP_FLAGS: u16 = 0x02;
pub const PCI_EXP_TYPE_ENDPOINT: u16 = 0x0;
pub const PCI_EXP_DEVCAP: u16 = 0x04;
pub const PCI_EXP_DEVCAP_RBER: u32 = 0x0000_8000;
pub const PCI_EXP_DEVCAP_FLR: u32 = 0x1000_0000;
pub const PCI_EXP_DEVCTL: u16 = 0x08;
pub const PCI_EXP_DEVCTL_CERE: u16 = 0x0001;
pub const PCI_EXP_DEVCTL_NFERE: u16 = 0x0002;
pub const PCI_EXP_DEVCTL_FERE: u16 = 0x0004;
pub const PCI_EXP_DEVCTL_URRE: u16 = 0x0008;
pub const PCI_EXP_DEVCTL_RELAX_EN: u16 = 0x0010;
pub const PCI_EXP_DEVCTL_PAYLOAD: u16 = 0x00e0;
pub const PCI_EXP_DEVCTL_NOSNOOP_EN: u16 = 0x0800;
pub const PCI_EXP_DEVCTL_READRQ: u16 = 0x7000;
pub const PCI_EXP_DEVCTL_READRQ_512B: u16 = 0x2000;
pub const PCI_EXP_DEVCTL_BCR_FLR: u16 = 0x8000;
pub const PCI_EXP_DEVSTA: u16 = 0x0a;
pub const PCI_EXP_DEVSTA_CED: u16 = 0x0001;
pub const PCI_EXP_DEVSTA_NFED: u16 = 0x0002;
pub const PCI_EXP_DEVSTA_FED: u16 = 0x0004;
pub const PCI_EXP_DEVSTA_URD: u16 = 0x0008;
pub const PCI_EXP_LNKCAP: u16 = 0x0c;
pub const PCI_EXP_LNKCAP_SLS_2_5GB: u32 = 0x0000_0001;
/// `PCI_EXP_LNKSTA_NLW_X1`, and one lane in the `PCI_EXP_LNKCAP_MLW` field, which has the same place.
pub const PCI_EXP_LNKSTA_NLW_X1: u16 = 0x0010;
pub const PCI_EXP_LNKCTL: u16 = 0x10;
pub const PCI_EXP_LNKCTL_ASPMC: u16 = 0x0003;
pub const PCI_EXP_LNKCTL_RCB: u16 = 0x0008;
pub const PCI_EXP_LNKCTL_CCC: u16 = 0x0040;
pub const PCI_EXP_LNKCTL_ES: u16 = 0x0080;
pub const PCI_EXP_LNKSTA: u16 = 0x12;
pub const PCI_EXP_LNKSTA_CLS_2_5GB: u16 = 0x0001;
pub const PCI_EXP_DEVCAP2: u16 = 0x24;
pub const PCI_EXP_DEVCAP2_COMP_TMOUT_DIS: u32 = 0x0000_0010;
pub const PCI_EXP_DEVCTL2: u16 = 0x28;
pub const PCI_EXP_DEVCTL2_COMP_TMOUT_DIS: u16 = 0x0010;
pub const PCI_EXP_LNKCAP2: u16 = 0x2c;
pub const PCI_EXP_LNKCAP2_SLS_2_5GB: u32 = 0x0000_0002;
pub const PCI_EXP_LNKCTL2: u16 = 0x30;
pub const PCI_EXP_LNKCTL2_TLS: u16 = 0x000f;
pub const PCI_EXP_LNKCTL2_TLS_2_5GT: u16 = 0x0001;
/// `PCI_CAP_EXP_ENDPOINT_SIZEOF_V2` rounded up to the end of Slot Status 2, which lspci reads.
pub const PCI_CAP_EXP_SIZEOF_V2: u16 = 0x3c;

pub const PCI_EXT_CAP_ID_VNDR: u16 = 0x0b;
pub const PCI_EXT_CAP_ID_DSN: u16 = 0x03;
pub const PCI_EXT_CAP_DSN_SIZEOF: u16 = 12;
pub const PCI_VNDR_HEADER: u16 = 4;
