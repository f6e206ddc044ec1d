// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO_DEVICE_SET_IRQS` in each of its forms, and in those it must refuse.

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
};

/// Bytes of `struct vfio_irq_set` before its data.
const HEADER: u32 = 20;

/// The data behind a `struct vfio_irq_set`.
#[derive(Clone, Debug)]
pub enum IrqData {
    /// None, for this many vectors.
    None(u32),
    /// A bool a vector.
    Bool(Vec<u8>),
    /// An eventfd a vector; -1 for none.
    EventFd(Vec<i32>),
}

/// A call of `VFIO_DEVICE_SET_IRQS`. Every field can be set wrong.
#[derive(Clone, Debug)]
pub struct IrqSet {
    /// Bytes of the whole, as said to the kernel.
    pub argsz: u32,
    /// `VFIO_IRQ_SET_*`.
    pub flags: u32,
    /// Interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Vectors.
    pub count: u32,
    /// Data as bytes.
    pub data: Vec<u8>,
}

impl IrqSet {
    fn new(action: u32, index: u32, start: u32, data: &IrqData) -> Self {
        let (kind, count, bytes) = match data {
            IrqData::None(count) => (VFIO_IRQ_SET_DATA_NONE, *count, Vec::new()),
            IrqData::Bool(bools) => (VFIO_IRQ_SET_DATA_BOOL, bools.len() as u32, bools.clone()),
            IrqData::EventFd(fds) => (
                VFIO_IRQ_SET_DATA_EVENTFD,
                fds.len() as u32,
                fds.iter().flat_map(|fd| fd.to_ne_bytes()).collect(),
            ),
        };
        let argsz = HEADER + bytes.len() as u32;
        Self {
            argsz,
            flags: action | kind,
            index,
            start,
            count,
            data: bytes,
        }
    }

    /// Sets or fires triggers.
    pub fn trigger(index: u32, start: u32, data: IrqData) -> Self {
        Self::new(VFIO_IRQ_SET_ACTION_TRIGGER, index, start, &data)
    }

    /// Masks.
    pub fn mask(index: u32, start: u32, data: IrqData) -> Self {
        Self::new(VFIO_IRQ_SET_ACTION_MASK, index, start, &data)
    }

    /// Unmasks, or sets the eventfd that unmasks.
    pub fn unmask(index: u32, start: u32, data: IrqData) -> Self {
        Self::new(VFIO_IRQ_SET_ACTION_UNMASK, index, start, &data)
    }

    /// Disables a whole index.
    pub fn disable(index: u32) -> Self {
        Self::trigger(index, 0, IrqData::None(0))
    }

    /// The bytes that go to the kernel.
    pub fn bytes(&self) -> Vec<u8> {
        [self.argsz, self.flags, self.index, self.start, self.count]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .chain(self.data.iter().copied())
            .collect()
    }
}
