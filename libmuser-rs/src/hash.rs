// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A hash that is the same in every build of the library, so that one process can compare it with
//! what another has left.

/// FNV-1a.
pub(crate) fn hash<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.fold(BASIS, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::hash;

    #[test]
    fn known_inputs_have_their_known_hashes() {
        assert_eq!(hash([].iter()), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a".iter()), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(hash(b"foobar".iter()), 0x8594_4171_f739_67e8);
    }
}
