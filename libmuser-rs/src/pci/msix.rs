// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The MSI-X table and pending bit array, which lie in a BAR (PCI 3.0, 6.8.2).
//!
//! A client of VFIO has two ways to use them. One that drives the table as a driver of hardware
//! does must unmask an entry before it fires. One that leaves the table alone and only sets
//! eventfds (a VMM which emulates the table itself, a driver that relies on VFIO to unmask) never
//! writes an entry. So an entry's mask bit, which reads as set after a reset, holds back messages
//! only once the client has written that entry's vector control.

use std::ops::Range;

use super::config::restore_bytes;
use super::regs::*;

/// MSI-X, with its table and pending bit array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    pub(crate) vectors: u16,
    pub(crate) table: Place,
    pub(crate) pba: Place,
}

/// A place in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) bar: u8,
    pub(crate) offset: u32,
}

impl Place {
    /// Where `size` bytes from here on lie in the BAR.
    pub(crate) fn span(self, size: u32) -> Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(size)
    }
}

impl Msix {
    /// A capability for 1 to 2048 vectors, with the table at offset 0 of BAR 0 and the pending bits
    /// right behind it.
    #[must_use]
    pub const fn new(vectors: u16) -> Self {
        let table = Place { bar: 0, offset: 0 };
        let msix = Self {
            vectors,
            table,
            pba: table,
        };
        msix.pba(0, msix.table_size())
    }

    /// Moves the table: `offset` is a multiple of 8.
    #[must_use]
    pub const fn table(self, bar: u8, offset: u32) -> Self {
        Self {
            table: Place { bar, offset },
            ..self
        }
    }

    /// Moves the pending bit array: `offset` is a multiple of 8.
    #[must_use]
    pub const fn pba(self, bar: u8, offset: u32) -> Self {
        Self {
            pba: Place { bar, offset },
            ..self
        }
    }

    /// Bytes of the table.
    #[expect(clippy::cast_possible_truncation, reason = "it is 16")]
    pub(crate) const fn table_size(self) -> u32 {
        self.vectors as u32 * PCI_MSIX_ENTRY_SIZE as u32
    }

    /// Bytes of the pending bit array, which comes in units of 64 bits.
    pub(crate) const fn pba_size(self) -> u32 {
        (self.vectors as u32).div_ceil(64) * 8
    }
}

/// The table and the pending bits of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MsixTable {
    entries: Vec<u8>,
    /// Entries whose vector control the client has written.
    owned: VectorSet,
    pending: VectorSet,
}

impl MsixTable {
    pub(crate) fn new(vectors: u16) -> Self {
        let mut entries = vec![0; usize::from(vectors) * PCI_MSIX_ENTRY_SIZE];
        for control in entries
            .iter_mut()
            .skip(PCI_MSIX_ENTRY_VECTOR_CTRL)
            .step_by(16)
        {
            *control = PCI_MSIX_ENTRY_CTRL_MASKBIT;
        }
        let none = VectorSet::new(vectors);
        Self {
            entries,
            owned: none.clone(),
            pending: none,
        }
    }

    /// Appends all that changes.
    pub(crate) fn save(&self, image: &mut Vec<u8>) {
        image.extend(&self.entries);
        self.owned.save(image);
        self.pending.save(image);
    }

    /// Takes all that changes from the head of `image`.
    pub(crate) fn restore(&mut self, image: &mut &[u8]) {
        restore_bytes(&mut self.entries, image);
        self.owned.restore(image);
        self.pending.restore(image);
    }

    pub(crate) fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len() / PCI_MSIX_ENTRY_SIZE).unwrap_or(u16::MAX)
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.vectors());
    }

    pub(crate) fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (byte, entry) in data.iter_mut().zip(self.entries.iter().skip(offset)) {
            *byte = *entry;
        }
    }

    pub(crate) fn write_table(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..self.entries.len()).zip(data) {
            let field = at % PCI_MSIX_ENTRY_SIZE;
            let writable = match field {
                0 => !0b11, // A message is a dword: its address is aligned (PCI 3.0, 6.8.2.7).
                1..PCI_MSIX_ENTRY_VECTOR_CTRL => 0xff,
                PCI_MSIX_ENTRY_VECTOR_CTRL => PCI_MSIX_ENTRY_CTRL_MASKBIT,
                _ => 0,
            };
            let byte = &mut self.entries[at];
            *byte = (*byte & !writable) | (value & writable);
            if field == PCI_MSIX_ENTRY_VECTOR_CTRL {
                self.owned.insert(vector_of(at));
            }
        }
    }

    pub(crate) fn read_pba(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..usize::MAX).zip(data) {
            *byte = self.pending.byte(at);
        }
    }

    /// Whether the table holds the vector back.
    pub(crate) fn is_masked(&self, vector: u16) -> bool {
        let control = usize::from(vector) * PCI_MSIX_ENTRY_SIZE + PCI_MSIX_ENTRY_VECTOR_CTRL;
        let mask = self.entries.get(control).is_some_and(|byte| byte & 1 != 0);
        mask && self.owned.contains(vector)
    }

    pub(crate) fn pend(&mut self, vector: u16) {
        self.pending.insert(vector);
    }

    pub(crate) fn forget_pending(&mut self) {
        self.pending.clear();
    }

    /// Takes a vector that is pending and not masked any more.
    pub(crate) fn take_pending(&mut self) -> Option<u16> {
        let vector = self
            .pending
            .iter()
            .find(|vector| !self.is_masked(*vector))?;
        self.pending.remove(vector);
        Some(vector)
    }
}

fn vector_of(offset: usize) -> u16 {
    u16::try_from(offset / PCI_MSIX_ENTRY_SIZE).unwrap_or(u16::MAX)
}

/// A set of vectors, a bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VectorSet(Vec<u64>);

impl VectorSet {
    pub(crate) fn new(vectors: u16) -> Self {
        Self(vec![0; usize::from(vectors).div_ceil(64)])
    }

    /// Appends the bits.
    pub(crate) fn save(&self, image: &mut Vec<u8>) {
        image.extend(self.0.iter().flat_map(|word| word.to_ne_bytes()));
    }

    /// Takes the bits from the head of `image`.
    pub(crate) fn restore(&mut self, image: &mut &[u8]) {
        for word in &mut self.0 {
            let mut bytes = [0; 8];
            restore_bytes(&mut bytes, image);
            *word = u64::from_ne_bytes(bytes);
        }
    }

    pub(crate) fn insert(&mut self, vector: u16) {
        if let Some(word) = self.0.get_mut(usize::from(vector) / 64) {
            *word |= 1 << (vector % 64);
        }
    }

    pub(crate) fn remove(&mut self, vector: u16) {
        if let Some(word) = self.0.get_mut(usize::from(vector) / 64) {
            *word &= !(1 << (vector % 64));
        }
    }

    pub(crate) fn contains(&self, vector: u16) -> bool {
        self.0
            .get(usize::from(vector) / 64)
            .is_some_and(|word| word >> (vector % 64) & 1 != 0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(crate) fn clear(&mut self) {
        self.0.fill(0);
    }

    /// Vectors `8 * index` to `8 * index + 7` as the pending bit array has them.
    fn byte(&self, index: usize) -> u8 {
        self.0
            .get(index / 8)
            .map_or(0, |word| word.to_le_bytes()[index % 8])
    }

    fn iter(&self) -> impl Iterator<Item = u16> {
        let words = self.0.iter().enumerate();
        words.flat_map(|(index, word)| {
            let base = u16::try_from(index * 64).unwrap_or(u16::MAX);
            let bits = (0..64).filter(move |bit| word >> bit & 1 != 0);
            bits.map(move |bit| base.saturating_add(bit))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_after_reset_reads_masked_and_holds_nothing_back() {
        let table = MsixTable::new(2);
        let mut control = [0; 4];

        table.read_table(16 + PCI_MSIX_ENTRY_VECTOR_CTRL, &mut control);

        assert_eq!(control, [1, 0, 0, 0]);
        assert!(!table.is_masked(1));
    }

    #[test]
    fn mask_written_holds_back_that_entry_only() {
        let mut table = MsixTable::new(3);

        table.write_table(16 + PCI_MSIX_ENTRY_VECTOR_CTRL, &[1, 0, 0, 0]);

        assert_eq!(
            [0, 1, 2].map(|vector| table.is_masked(vector)),
            [false, true, false]
        );
    }

    #[test]
    fn pending_vector_appears_in_its_bit() {
        let mut table = MsixTable::new(80);
        table.pend(0);
        table.pend(77);

        let mut pba = [0; 16];
        table.read_pba(0, &mut pba);

        let mut expected = [0; 16];
        expected[0] = 1;
        expected[9] = 1 << 5;
        assert_eq!(pba, expected);
    }

    #[test]
    fn pending_vector_is_taken_once_unmasked() {
        let mut table = MsixTable::new(2);
        let control = PCI_MSIX_ENTRY_VECTOR_CTRL;
        table.write_table(control, &[1]);
        table.pend(0);
        assert_eq!(table.take_pending(), None);

        table.write_table(control, &[0]);

        assert_eq!(table.take_pending(), Some(0));
        assert_eq!(table.take_pending(), None);
    }

    #[test]
    fn reserved_bits_stay_zero() {
        let mut table = MsixTable::new(1);

        table.write_table(0, &[0xff; 16]);

        let mut entry = [0; 16];
        table.read_table(0, &mut entry);
        assert_eq!(entry[..4], [0xfc, 0xff, 0xff, 0xff]);
        assert_eq!(entry[12..], [1, 0, 0, 0]);
    }

    #[test]
    fn access_beyond_the_table_changes_nothing() {
        let mut table = MsixTable::new(1);
        let before = table.clone();

        table.write_table(16, &[0xff; 32]);

        assert_eq!(table, before);
    }

    #[test]
    fn pba_has_whole_qwords() {
        assert_eq!(Msix::new(1).pba_size(), 8);
        assert_eq!(Msix::new(64).pba_size(), 8);
        assert_eq!(Msix::new(65).pba_size(), 16);
    }
}
