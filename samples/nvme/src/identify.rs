// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the controller and its namespace say of themselves (section 5.15).

use crate::controller::Core;
use crate::spec::*;

// CNS values (figure 244).
const NAMESPACE_DATA: u32 = 0x00;
const CONTROLLER: u32 = 0x01;
const ACTIVE_LIST: u32 = 0x02;
const DESCRIPTORS: u32 = 0x03;

/// The 4096 bytes for a CNS and a namespace.
pub(crate) fn data(core: &Core, cns: u32, nsid: u32) -> Result<Vec<u8>, Status> {
    match cns {
        NAMESPACE_DATA => match nsid {
            // What all have in common is told by controllers that manage namespaces, only.
            NAMESPACE => Ok(namespace(core)),
            _ => Err(Status::INVALID_NAMESPACE),
        },
        CONTROLLER => Ok(controller(core)),
        ACTIVE_LIST => active_list(nsid),
        DESCRIPTORS => match nsid {
            NAMESPACE => Ok(descriptors(core)),
            _ => Err(Status::INVALID_NAMESPACE),
        },
        _ => Err(Status::INVALID_FIELD),
    }
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Text is padded with spaces, and without an end.
fn put_text(data: &mut [u8], at: usize, len: usize, text: &str) {
    let padded = text.bytes().chain(std::iter::repeat(b' '));
    for (place, byte) in data[at..at + len].iter_mut().zip(padded) {
        *place = byte;
    }
}

/// Identify Controller (figure 247).
fn controller(core: &Core) -> Vec<u8> {
    let config = &core.config;
    let mut data = vec![0; PAGE];
    put(&mut data, 0, &crate::VENDOR.to_le_bytes()); // VID
    put(&mut data, 2, &crate::VENDOR.to_le_bytes()); // SSVID
    put_text(&mut data, 4, 20, &config.serial); // SN
    put_text(&mut data, 24, 40, "muser NVMe"); // MN
    put_text(&mut data, 64, 8, env!("CARGO_PKG_VERSION")); // FR
    data[72] = 6; // RAB
    data[77] = MDTS;
    put(&mut data, 80, &0x0001_0400_u32.to_le_bytes()); // VER
    put(&mut data, 84, &1_000_000_u32.to_le_bytes()); // RTD3R, microseconds
    put(&mut data, 88, &10_000_000_u32.to_le_bytes()); // RTD3E
    data[111] = 1; // CNTRLTYPE: I/O controller
    data[258] = 3; // ACL
    data[259] = count(EVENT_REQUESTS - 1); // AERL
    data[260] = 3; // FRMW: one slot, which is read only
    data[261] = 1 << 1 | 1 << 2; // LPA: commands supported and effects, extended data
    data[262] = count(ERROR_ENTRIES - 1); // ELPE
    put(&mut data, 266, &WARNING_TEMPERATURE.to_le_bytes()); // WCTEMP
    put(&mut data, 268, &CRITICAL_TEMPERATURE.to_le_bytes()); // CCTEMP
    data[512] = 6 << 4 | 6; // SQES
    data[513] = 4 << 4 | 4; // CQES
    put(&mut data, 516, &NAMESPACE.to_le_bytes()); // NN
                                                   // ONCS: Compare, Dataset Management, Write Zeroes, Verify
    let optional: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 7;
    put(&mut data, 520, &optional.to_le_bytes());
    data[525] = 1 | 3 << 1; // VWC: there is one, and Flush may be for all namespaces
    let sgls: u32 = 1 | 1 << 18; // SGLS: of any alignment, and longer than the data
    put(&mut data, 536, &sgls.to_le_bytes());
    let name = format!("nqn.2014-08.org.nvmexpress:muser:{}", config.serial);
    put(&mut data, 768, name.as_bytes()); // SUBNQN
    put(&mut data, 2048, &2500_u16.to_le_bytes()); // power state 0: MP, in centiwatts
    data
}

/// Identify Namespace (figure 245).
fn namespace(core: &Core) -> Vec<u8> {
    let config = &core.config;
    let blocks = config.blocks.to_le_bytes();
    let mut data = vec![0; PAGE];
    put(&mut data, 0, &blocks); // NSZE
    put(&mut data, 8, &blocks); // NCAP
    put(&mut data, 16, &blocks); // NUSE
    data[25] = 0; // NLBAF: one format
    data[33] = 1 | 1 << 3; // DLFEAT: what is deallocated reads as zeroes
    let bytes = u128::from(config.blocks) << config.block_shift;
    put(&mut data, 48, &bytes.to_le_bytes()); // NVMCAP
    data[99] = u8::from(config.read_only); // NSATTR: write protected
    put(&mut data, 104, &config.nguid());
    data[130] = config.block_shift; // LBAF0: LBADS
    data
}

/// Active Namespace ID list: those above `nsid`.
fn active_list(nsid: u32) -> Result<Vec<u8>, Status> {
    // Above these there is none that an NSID could name.
    if nsid >= ALL_NAMESPACES - 1 {
        return Err(Status::INVALID_NAMESPACE);
    }
    let mut data = vec![0; PAGE];
    if nsid < NAMESPACE {
        put(&mut data, 0, &NAMESPACE.to_le_bytes());
    }
    Ok(data)
}

/// Namespace Identification Descriptors (figure 246).
fn descriptors(core: &Core) -> Vec<u8> {
    let mut data = vec![0; PAGE];
    data[0] = 2; // NIDT: NGUID
    data[1] = 16;
    put(&mut data, 4, &core.config.nguid());
    data
}

fn count(number: usize) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}
