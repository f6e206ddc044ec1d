// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The controller's registers (section 3.1): what they read as, and what a write makes of them.
//!
//! An access of any width at any place is one to the bytes of the registers. What follows from a
//! write to CC is said by [`Transition`], and done elsewhere.

use libmuser::Width;

use crate::kept::Control;
use crate::spec::QUEUE_ENTRIES;

/// Where the doorbells begin.
pub(crate) const DOORBELLS: u64 = 0x1000;
/// Where those of so many pairs of queues end.
pub(crate) const fn doorbells_end(pairs: u64) -> u64 {
    DOORBELLS + 8 * pairs
}

// Offsets (figure 68).
const CAP: usize = 0x00;
const VS: usize = 0x08;
const CC: usize = 0x14;
const CSTS: usize = 0x1c;
const AQA: usize = 0x24;
const ASQ: usize = 0x28;
const ACQ: usize = 0x30;
/// Bytes of those there are.
const SIZE: usize = 0x40;

const VERSION: u32 = 0x0001_0400;

const CC_EN: u32 = 1;
const CC_CSS: u32 = 7 << 4;
const CC_MPS: u32 = 0xf << 7;
const CC_AMS: u32 = 7 << 11;
const CC_SHN: u32 = 3 << 14;
const CC_IOSQES: u32 = 0xf << 16;
const CC_IOCQES: u32 = 0xf << 20;
const CC_ALL: u32 = CC_EN | CC_CSS | CC_MPS | CC_AMS | CC_SHN | CC_IOSQES | CC_IOCQES;

pub(crate) const CSTS_RDY: u32 = 1;
pub(crate) const CSTS_CFS: u32 = 1 << 1;
/// Shutdown processing complete.
pub(crate) const CSTS_SHST_DONE: u32 = 2 << 2;
const CSTS_SHST: u32 = 3 << 2;

/// CAP: queues must be contiguous, 30 seconds at most, the NVM command set, pages of 4 KiB.
fn capabilities() -> u64 {
    let entries = u64::from(QUEUE_ENTRIES - 1);
    let contiguous = 1 << 16;
    let timeout = 60 << 24; // in units of 500 ms
    let nvm = 1 << 37;
    entries | contiguous | timeout | nvm
}

/// What is to be done about a write to CC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    /// Nothing.
    None,
    /// EN was set.
    Enable,
    /// EN was cleared.
    Reset,
    /// SHN was set.
    Shutdown,
}

impl Control {
    fn image(&self) -> [u8; SIZE] {
        let mut image = [0; SIZE];
        image[CAP..CAP + 8].copy_from_slice(&capabilities().to_le_bytes());
        image[VS..VS + 4].copy_from_slice(&VERSION.to_le_bytes());
        image[CC..CC + 4].copy_from_slice(&self.cc.to_le_bytes());
        image[CSTS..CSTS + 4].copy_from_slice(&self.csts.to_le_bytes());
        image[AQA..AQA + 4].copy_from_slice(&self.aqa.to_le_bytes());
        image[ASQ..ASQ + 8].copy_from_slice(&self.asq.to_le_bytes());
        image[ACQ..ACQ + 8].copy_from_slice(&self.acq.to_le_bytes());
        image
    }

    /// What is read there. Beyond the registers there are zeroes.
    pub(crate) fn read(&self, offset: u64, width: Width) -> u64 {
        let mut value = [0; 8];
        let start = usize::try_from(offset).unwrap_or(SIZE);
        let image = self.image();
        let there = image.get(start..).unwrap_or(&[]).iter();
        for (byte, there) in value[..width.bytes()].iter_mut().zip(there) {
            *byte = *there;
        }
        u64::from_le_bytes(value)
    }

    /// Takes a write over, but for what CC wants; what that is, and the new CC.
    pub(crate) fn write(&mut self, offset: u64, width: Width, value: u64) -> (Transition, u32) {
        let mut image = self.image();
        let start = usize::try_from(offset).unwrap_or(SIZE);
        let there = image.get_mut(start..).unwrap_or(&mut []).iter_mut();
        for (there, byte) in there.zip(value.to_le_bytes().iter().take(width.bytes())) {
            *there = *byte;
        }
        let dword = |at: usize| {
            image[at..]
                .first_chunk()
                .map_or(0, |b| u32::from_le_bytes(*b))
        };
        let qword = |at: usize| {
            image[at..]
                .first_chunk()
                .map_or(0, |b| u64::from_le_bytes(*b))
        };
        // Bits 31 to 28 and 15 to 12 are reserved, and so are the offsets in a page.
        self.aqa = dword(AQA) & 0x0fff_0fff;
        self.asq = qword(ASQ) & !0xfff;
        self.acq = qword(ACQ) & !0xfff;
        let cc = dword(CC) & CC_ALL;
        (self.transition(cc), cc)
    }

    fn transition(&self, cc: u32) -> Transition {
        let (was, is) = (self.cc & CC_EN != 0, cc & CC_EN != 0);
        match (was, is) {
            (false, true) => Transition::Enable,
            (true, false) => Transition::Reset,
            _ if cc & CC_SHN != 0 && self.cc & CC_SHN == 0 => Transition::Shutdown,
            _ => Transition::None,
        }
    }

    /// Whether a controller can be enabled with this CC, and what the other registers say.
    pub(crate) fn can_enable(&self, cc: u32) -> bool {
        let (sq, cq) = self.admin_sizes();
        let queues = sq >= 2 && cq >= 2 && self.asq != 0 && self.acq != 0;
        queues && cc & (CC_CSS | CC_MPS | CC_AMS) == 0
    }

    /// Whether CC has the sizes of entries that I/O queues must have.
    pub(crate) fn has_entry_sizes(&self) -> bool {
        // Powers of two: 64 and 16 bytes.
        self.cc & (CC_IOSQES | CC_IOCQES) == 6 << 16 | 4 << 20
    }

    /// Entries of the admin queues, submission and completion.
    pub(crate) fn admin_sizes(&self) -> (u32, u32) {
        ((self.aqa & 0xfff) + 1, (self.aqa >> 16 & 0xfff) + 1)
    }

    /// Whether commands are processed.
    pub(crate) fn is_live(&self) -> bool {
        self.cc & CC_EN != 0 && self.csts & (CSTS_RDY | CSTS_CFS | CSTS_SHST) == CSTS_RDY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    fn control() -> Control {
        Control::new_zeroed()
    }

    #[test]
    fn capabilities_are_read_in_any_width() {
        let control = control();

        let whole = control.read(0, Width::Qword);
        assert_eq!(whole & 0xffff, 1023);
        assert_eq!(control.read(4, Width::Dword), whole >> 32);
        assert_eq!(control.read(2, Width::Byte), whole >> 16 & 0xff);
        assert_eq!(control.read(8, Width::Dword), 0x0001_0400);
        assert_eq!(control.read(0xff8, Width::Qword), 0);
    }

    #[test]
    fn halves_of_an_address_are_written_by_themselves() {
        let mut control = control();

        control.write(0x28, Width::Dword, 0x1234_5fff);
        control.write(0x2c, Width::Dword, 0x1);
        control.write(0x30, Width::Qword, 0x2_0000_0000);

        assert_eq!(control.asq, 0x1_1234_5000);
        assert_eq!(control.acq, 0x2_0000_0000);
    }

    #[test]
    fn what_can_not_be_written_stays() {
        let mut control = control();
        for offset in [0, 8, 0x1c, 0x20, 0x38] {
            control.write(offset, Width::Dword, 0xffff_ffff);
        }

        assert_eq!(control, self::control());
    }

    #[test]
    fn transitions_are_those_of_en_and_shn() {
        let mut control = control();
        let cc = 0x0046_0000;
        assert_eq!(
            control.write(0x14, Width::Dword, cc),
            (Transition::None, 0x46_0000)
        );

        let (enable, new) = control.write(0x14, Width::Dword, cc | 1);
        assert_eq!(enable, Transition::Enable);
        control.cc = new;
        assert_eq!(
            control.write(0x14, Width::Dword, cc | 1).0,
            Transition::None
        );
        let shutdown = control.write(0x14, Width::Dword, cc | 0x4001);
        assert_eq!(shutdown.0, Transition::Shutdown);
        assert_eq!(control.write(0x14, Width::Byte, 0).0, Transition::Reset);
    }

    #[test]
    fn nonsense_can_not_be_enabled() {
        let mut control = control();
        control.write(0x24, Width::Dword, 0x001f_001f);
        control.write(0x28, Width::Qword, 0x1000);
        control.write(0x30, Width::Qword, 0x2000);

        assert!(control.can_enable(0x0046_0001));
        for bad in [0x11, 0x81, 0x801] {
            assert!(!control.can_enable(bad), "{bad:#x}");
        }
        control.write(0x24, Width::Dword, 0);
        assert!(!control.can_enable(1));
    }
}
