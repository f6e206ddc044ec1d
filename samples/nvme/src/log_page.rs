// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Log pages (section 5.14).

use crate::controller::Core;
use crate::kept::Control;
use crate::spec::*;

// Log identifiers (figure 191).
pub(crate) const ERROR: u8 = 0x01;
pub(crate) const SMART: u8 = 0x02;
const FIRMWARE: u8 = 0x03;
const CHANGED_NAMESPACES: u8 = 0x04;
const EFFECTS: u8 = 0x05;

/// All of a page.
pub(crate) fn page(core: &Core, control: &Control, page: u8) -> Result<Vec<u8>, Status> {
    match page {
        ERROR => Ok(errors(control)),
        SMART => Ok(smart(core, control)),
        FIRMWARE => Ok(firmware()),
        // The namespace never changes while it is there.
        CHANGED_NAMESPACES => Ok(vec![0; PAGE]),
        EFFECTS => Ok(effects(core)),
        _ => Err(Status::INVALID_LOG_PAGE),
    }
}

/// Error Information (figure 195), the latest first.
fn errors(control: &Control) -> Vec<u8> {
    let mut data = vec![0; 64 * ERROR_ENTRIES];
    let mut entries: Vec<_> = control
        .log
        .iter()
        .filter(|entry| entry.number > 0)
        .collect();
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.number));
    for (place, entry) in data.chunks_exact_mut(64).zip(entries) {
        place[0..8].copy_from_slice(&entry.number.to_le_bytes());
        place[8..10].copy_from_slice(&entry.sq_id.to_le_bytes());
        place[10..12].copy_from_slice(&entry.cid.to_le_bytes());
        place[12..14].copy_from_slice(&(entry.status << 1).to_le_bytes());
        place[14..16].copy_from_slice(&u16::MAX.to_le_bytes()); // in no single field
        place[16..24].copy_from_slice(&entry.lba.to_le_bytes());
        place[24..28].copy_from_slice(&entry.nsid.to_le_bytes());
    }
    data
}

/// SMART / Health Information (figure 196).
fn smart(core: &Core, control: &Control) -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = control.features.critical_warning();
    if core.config.read_only {
        data[0] |= 1 << 3;
    }
    data[1..3].copy_from_slice(&TEMPERATURE.to_le_bytes());
    data[3] = 100; // available spare, per cent
    data[4] = 10; // and its threshold
    let work = core.work();
    // In thousands of 512 bytes, rounded up.
    let units = |bytes: u64| bytes.div_ceil(512_000);
    let counters = [
        (32, units(work.bytes_read)),
        (48, units(work.bytes_written)),
        (64, work.reads),
        (80, work.writes),
        (112, 1), // power cycles
        (160, control.media_errors),
        (176, control.errors),
    ];
    for (at, value) in counters {
        data[at..at + 16].copy_from_slice(&u128::from(value).to_le_bytes());
    }
    data
}

/// Firmware Slot Information (figure 198).
fn firmware() -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = 1; // active: slot 1
    let revision = env!("CARGO_PKG_VERSION").bytes();
    let padded = revision.chain(std::iter::repeat(b' '));
    for (place, byte) in data[8..16].iter_mut().zip(padded) {
        *place = byte;
    }
    data
}

/// Commands Supported and Effects (figure 200).
fn effects(core: &Core) -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    /// Logical block content may change.
    const CONTENT: u32 = 1 << 1;
    let administration = [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG_PAGE,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::EVENT_REQUEST,
    ];
    let reading = [nvm::FLUSH, nvm::READ, nvm::COMPARE, nvm::VERIFY];
    let writing = [nvm::WRITE, nvm::WRITE_ZEROES, nvm::DATASET_MANAGEMENT];
    let writing = writing.iter().filter(|_| !core.config.read_only);
    let mut data = vec![0; PAGE];
    let mut put = |at: usize, opcode: u8, effects: u32| {
        let at = at + 4 * usize::from(opcode);
        data[at..at + 4].copy_from_slice(&effects.to_le_bytes());
    };
    for opcode in administration {
        put(0, opcode, SUPPORTED);
    }
    for opcode in reading {
        put(1024, opcode, SUPPORTED);
    }
    for opcode in writing {
        put(1024, *opcode, SUPPORTED | CONTENT);
    }
    data
}
