// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages that are shaped as the specification has them, with any numbers in them.

use crate::Input;

/// A message of the input's making: the fields that its command has, and now and then one byte more
/// or less, or a size that is not its own.
pub(super) fn take(input: &mut Input<'_>) -> Vec<u8> {
    let command = 1 + u16::from(input.below(20));
    let payload = payload(command, input);
    let header = input.u8();
    let (flags, error) = match header {
        // A reply, with an error or without.
        0..=7 => (1_u32, 0_u32),
        8..=11 => (0x21, u32::from(header)),
        // Of no type.
        12 => (input.u32(), input.u32()),
        13..=60 => (0x10, 0),
        _ => (0, 0),
    };
    let len = payload.len() + 16;
    let size = match input.u8() {
        0 => input.u32(),
        1 => u32::try_from(len + 1).unwrap_or(0),
        2 => u32::try_from(len - 1).unwrap_or(0),
        _ => u32::try_from(len).unwrap_or(0),
    };
    let mut message = Vec::with_capacity(len);
    message.extend(u16::from(input.u8()).to_ne_bytes());
    message.extend(command.to_ne_bytes());
    message.extend(size.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(error.to_ne_bytes());
    message.extend(payload);
    message
}

/// The fields of a command, or of its reply.
fn payload(command: u16, input: &mut Input<'_>) -> Vec<u8> {
    let mut fields = Fields::default();
    match command {
        // VERSION
        1 => {
            fields.word16(input);
            fields.word16(input);
            fields.text(input);
        }
        // DMA_MAP
        2 => {
            fields.size(input, 32);
            fields.flags(input);
            fields.long(input);
            fields.long(input);
            fields.long(input);
        }
        // DMA_UNMAP, with a bitmap now and then
        3 => {
            fields.size(input, 24);
            fields.flags(input);
            fields.long(input);
            fields.long(input);
            if input.flag() {
                fields.long(input);
                fields.long(input);
            }
        }
        // GET_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO
        4 | 6 | 7 => {
            fields.size(input, 16);
            fields.flags(input);
            fields.word(input);
            fields.word(input);
        }
        // GET_REGION_INFO
        5 => {
            fields.size(input, 32);
            fields.flags(input);
            fields.word(input);
            fields.word(input);
            fields.long(input);
            fields.long(input);
        }
        // SET_IRQS
        8 => {
            fields.size(input, 20);
            fields.flags(input);
            fields.word(input);
            fields.word(input);
            fields.word(input);
            fields.rest(input);
        }
        // REGION_READ, REGION_WRITE
        9 | 10 => {
            fields.long(input);
            fields.word(input);
            fields.word(input);
            fields.rest(input);
        }
        // DMA_READ, DMA_WRITE, which only the server sends
        11 | 12 => {
            fields.long(input);
            fields.long(input);
            fields.rest(input);
        }
        // REGION_WRITE_MULTI
        15 => {
            let count = input.below(5);
            fields.put(&u64::from(count).to_ne_bytes());
            for _ in 0..count {
                fields.long(input);
                fields.word(input);
                fields.word(input);
                fields.put(&input.array::<8>());
            }
            if input.below(8) == 0 {
                fields.rest(input);
            }
        }
        // DEVICE_FEATURE
        16 => {
            fields.size(input, 8);
            let feature = u32::from(input.below(12)) | u32::from(input.below(8)) << 16;
            fields.put(&feature.to_ne_bytes());
            fields.long(input);
            let ranges = input.below(4);
            fields.put(&u32::from(ranges).to_ne_bytes());
            fields.put(&[0; 4]);
            for _ in 0..ranges {
                fields.long(input);
                fields.long(input);
            }
        }
        // MIG_DATA_READ, MIG_DATA_WRITE
        17 | 18 => {
            fields.size(input, 8);
            fields.word(input);
        }
        _ => fields.rest(input),
    }
    fields.0
}

/// What is in a payload, field by field.
#[derive(Debug, Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn put(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// As a rule the size that the structure has.
    fn size(&mut self, input: &mut Input<'_>, size: u32) {
        let size = match input.below(16) {
            0 => input.u32(),
            1 => size - 1,
            2 => 4096,
            3 => size + 24,
            _ => size,
        };
        self.put(&size.to_ne_bytes());
    }

    /// Few of the bits that there are.
    fn flags(&mut self, input: &mut Input<'_>) {
        let flags = match input.below(16) {
            0 => input.u32(),
            _ => u32::from(input.u8() & 0x3f),
        };
        self.put(&flags.to_ne_bytes());
    }

    fn word16(&mut self, input: &mut Input<'_>) {
        let word = match input.below(8) {
            0 => input.u16(),
            1 => 1,
            _ => 0,
        };
        self.put(&word.to_ne_bytes());
    }

    fn word(&mut self, input: &mut Input<'_>) {
        let word = match input.below(16) {
            0 => input.u32(),
            1 => u32::MAX,
            2 => 4096,
            _ => u32::from(input.u8() & 0xf),
        };
        self.put(&word.to_ne_bytes());
    }

    /// Mostly where a page, a register or the end of something is.
    fn long(&mut self, input: &mut Input<'_>) {
        let long = match input.below(16) {
            0 => input.u64(),
            1 => 0_u64.wrapping_sub(u64::from(input.u8())),
            2 => 0_u64.wrapping_sub(u64::from(input.u8()) << 12),
            3 => 1 << (input.u8() % 64),
            4..=8 => u64::from(input.u8() & 0x1f),
            _ => u64::from(input.u8() & 0x1f) << 12,
        };
        self.put(&long.to_ne_bytes());
    }

    fn rest(&mut self, input: &mut Input<'_>) {
        let len = usize::from(input.below(72));
        let rest = input.bytes(len);
        self.put(rest);
    }

    /// Something like the JSON of capabilities.
    fn text(&mut self, input: &mut Input<'_>) {
        const WORDS: [&str; 16] = [
            "{\"capabilities\":{",
            "}}",
            "\"max_msg_fds\":",
            "\"max_data_xfer_size\":",
            "\"max_dma_maps\":",
            "\"pgsizes\":",
            "\"migration\":{\"pgsize\":4096}",
            "\"twin_socket\":{\"supported\":true}",
            "\"write_multiple\":true",
            ",",
            "0",
            "1048576",
            "-1",
            "18446744073709551616",
            "null",
            "[[[[[[[[",
        ];
        for _ in 0..input.below(16) {
            let word = WORDS[usize::from(input.below(16))];
            self.put(word.as_bytes());
        }
        if input.below(8) == 0 {
            self.rest(input);
        }
        if input.below(8) != 0 {
            self.put(&[0]);
        }
    }
}
