// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbers that look random and are the same again from the same seed.

/// A stream of numbers: SplitMix64, by Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators" (OOPSLA 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another stream, which depends on this one's seed and on a number alone.
    pub fn branch(seed: u64, number: u64) -> Self {
        let mut parent = Self(seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        Self(parent.next())
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "a stream that never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Whether something happens that does so `percent` times of 100.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// A seed that nobody chose.
///
/// # Errors
///
/// The errno of reading `/dev/urandom`.
pub fn seed() -> std::io::Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    // Short enough to be typed again.
    Ok(u64::from_ne_bytes(bytes) >> 32)
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn same_seed_gives_the_same_stream() {
        let (mut one, mut two) = (Random::new(7), Random::new(7));
        assert!((0..100).all(|_| one.next() == two.next()));
    }

    #[test]
    fn branches_differ() {
        let (mut one, mut two) = (Random::branch(7, 0), Random::branch(7, 1));
        assert_ne!(one.next(), two.next());
    }

    #[test]
    fn numbers_stay_below_their_end() {
        let mut random = Random::new(1);
        assert!((1..1000).all(|end| random.below(end) < end));
        assert_eq!(random.below(0), 0);
    }
}
