// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What may come out of the kernel: the fuzzers write bytes of an alphabet only, of which memory that
//! the kernel did not initialise is not made.

use muser_e2e::random::Random;

/// Poison of freed pages, of freed objects and of objects not initialised
/// (`<linux/poison.h>`: `PAGE_POISON`, `POISON_FREE`, `POISON_INUSE`).
const POISON: [u8; 3] = [0xAA, 0x6B, 0x5A];

/// Whether a fuzzer may have written the byte: both its halves are the same, and it is neither
/// poison nor all ones, of which much of the kernel's memory is made.
pub(crate) fn is_ours(byte: u8) -> bool {
    byte >> 4 == byte & 0xF && byte != 0xAA && byte != 0xFF
}

/// Bytes that are ours.
pub(crate) fn bytes(random: &mut Random, len: usize) -> Vec<u8> {
    let mut bits = 0;
    (0..len)
        .map(|i| {
            if i % 16 == 0 {
                bits = random.next();
            }
            let half = (bits >> (i % 16 * 4) & 0xF) as u8;
            if half == 0xA || half == 0xF {
                0
            } else {
                half << 4 | half
            }
        })
        .collect()
}

/// What is wrong with bytes that only fuzzers can have written.
pub(crate) fn strange(bytes: &[u8]) -> Option<String> {
    let at = bytes.iter().position(|&byte| !is_ours(byte))?;
    Some(format!(
        "byte {at} of {} was never written: {:02x?}",
        bytes.len(),
        &bytes[at..bytes.len().min(at + 32)]
    ))
}

/// What is wrong with bytes among which may be what the kernel defines: eight bytes of poison, or
/// an address of the kernel.
pub(crate) fn leaked(bytes: &[u8]) -> Option<String> {
    for (i, word) in bytes.chunks_exact(8).enumerate() {
        let poisoned = POISON
            .iter()
            .any(|poison| word.iter().all(|byte| byte == poison));
        let number = word
            .iter()
            .rev()
            .fold(0, |number, &byte| number << 8 | u64::from(byte));
        // The highest numbers are negated errnos.
        let pointer = (0xFFFF_8000_0000_0000..0xFFFF_FFFF_FFFF_0000).contains(&number);
        if poisoned || pointer {
            return Some(format!("bytes {} on are the kernel's: {word:02x?}", 8 * i));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_ours() {
        let mut random = Random::new(1);
        assert_eq!(strange(&bytes(&mut random, 4096)), None);
        assert_eq!(strange(&[0; 64]), None);
    }

    #[test]
    fn poison_and_pointers_are_not_ours() {
        assert!(strange(&[0, 0x11, 0x6B]).is_some());
        assert!(strange(&[0xAA]).is_some());
        assert!(leaked(&[0x5A; 8]).is_some());
        let pointer = 0xFFFF_8880_1234_5678u64.to_le_bytes();
        assert!(leaked(&pointer).is_some());
    }

    #[test]
    fn numbers_and_errnos_are_no_leak() {
        for number in [0, 1, 4096, u64::MAX, u64::MAX - 21, 0x7F00_1234_5678] {
            assert_eq!(leaked(&u64::to_le_bytes(number)), None, "{number:#x}");
        }
    }
}
