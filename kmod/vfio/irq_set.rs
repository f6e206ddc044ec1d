// SPDX-License-Identifier: GPL-2.0
//! The argument of `VFIO_DEVICE_SET_IRQS`, parsed once.
//!
//! C header: `include/uapi/linux/vfio.h`, `struct vfio_irq_set`.

use super::bindings;
use kernel::{
    prelude::*,
    uaccess::{UserPtr, UserSlice}, //
};

/// What to do with the vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Keep them from firing.
    Mask,
    /// Let them fire again.
    Unmask,
    /// Fire them, or say what firing signals.
    Trigger,
}

/// What comes with the action.
pub(crate) enum Data {
    /// Nothing: the action is for all vectors of the range.
    None,
    /// A byte each: the action is for those which are not zero.
    Bool(KVec<u8>),
    /// A file descriptor each: of an eventfd, or -1.
    EventFd(KVec<i32>),
}

/// Vectors of an interrupt index, and what to do with them.
pub(crate) struct IrqSet {
    /// Interrupt index.
    pub(crate) index: u32,
    /// First vector.
    pub(crate) start: u32,
    /// Number of vectors; 0 only to disable the index: `start` 0, [`Action::Trigger`], [`Data::None`].
    pub(crate) count: u32,
    /// What to do.
    pub(crate) action: Action,
    /// With what.
    pub(crate) data: Data,
}

impl IrqSet {
    /// Reads and checks the argument. `vectors` tells how many vectors an index has.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `ENOMEM`, and `EINVAL` for an `argsz` too small for what it says, an unknown index,
    /// vectors beyond the index's, flags that are unknown, missing or more than one of a kind.
    pub(crate) fn read(argument: UserPtr, vectors: impl Fn(u32) -> Result<u32>) -> Result<Self> {
        // argsz, flags, index, start, count.
        const LEN: usize = 20;
        let [argsz, flags, index, start, count] =
            UserSlice::new(argument, LEN).reader().read::<[u32; 5]>()?;
        let data_flags = flags & bindings::VFIO_IRQ_SET_DATA_TYPE_MASK;
        let action = match flags & !data_flags {
            bindings::VFIO_IRQ_SET_ACTION_MASK => Action::Mask,
            bindings::VFIO_IRQ_SET_ACTION_UNMASK => Action::Unmask,
            bindings::VFIO_IRQ_SET_ACTION_TRIGGER => Action::Trigger,
            _ => return Err(EINVAL),
        };
        let end = start.checked_add(count).ok_or(EINVAL)?;
        if (argsz as usize) < LEN || start >= vectors(index)? || end > vectors(index)? {
            return Err(EINVAL);
        }
        let (element, disables) = match data_flags {
            bindings::VFIO_IRQ_SET_DATA_NONE => (0, start == 0 && action == Action::Trigger),
            bindings::VFIO_IRQ_SET_DATA_BOOL => (size_of::<u8>(), false),
            bindings::VFIO_IRQ_SET_DATA_EVENTFD => (size_of::<i32>(), false),
            _ => return Err(EINVAL),
        };
        if count == 0 && !disables {
            return Err(EINVAL);
        }
        // The count is bounded by the index's vectors, so this does not overflow.
        let bytes = count as usize * element;
        if (argsz as usize) - LEN < bytes {
            return Err(EINVAL);
        }
        let mut reader = UserSlice::new(argument.wrapping_byte_add(LEN), bytes).reader();
        let data = match data_flags {
            bindings::VFIO_IRQ_SET_DATA_NONE => Data::None,
            bindings::VFIO_IRQ_SET_DATA_BOOL => {
                let mut bytes = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
                for _ in 0..count {
                    bytes.push(reader.read::<u8>()?, GFP_KERNEL_ACCOUNT)?;
                }
                Data::Bool(bytes)
            }
            _ => {
                let mut fds = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
                for _ in 0..count {
                    fds.push(reader.read::<i32>()?, GFP_KERNEL_ACCOUNT)?;
                }
                Data::EventFd(fds)
            }
        };
        Ok(Self {
            index,
            start,
            count,
            action,
            data,
        })
    }

    /// The vectors that the action is for, where the data are not eventfds.
    pub(crate) fn chosen(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.count)
            .filter(|i| match &self.data {
                Data::None => true,
                Data::Bool(bytes) => bytes[*i as usize] != 0,
                Data::EventFd(_) => false,
            })
            .map(|i| self.start + i)
    }
}
