// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cards without a driver in the kernel but the guest's own vfio-pci: what drivers in userspace do.

use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::sync::Arc;

use anyhow::{ensure, Context as _, Result};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR2_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX,
};
use vfio_ioctls::{VfioContainer, VfioDevice};
use vmm_sys_util::eventfd::EventFd;

use crate::sys::Shared;
use crate::PATIENCE;

/// The command register of configuration space, and what is switched on in it: I/O and memory space,
/// bus master.
const COMMAND: u64 = 4;
const ALL_ON: u16 = 0b111;

/// A card, opened by VFIO.
struct Card {
    device: VfioDevice,
    container: Arc<VfioContainer>,
    /// Its first interrupt, and what comes of it.
    interrupt: EventFd,
    counts: Receiver<u64>,
}

impl Card {
    fn open(address: &str) -> Result<Self> {
        let container = Arc::new(VfioContainer::new(None)?);
        let path = format!("/sys/bus/pci/devices/{address}");
        let device = VfioDevice::new(Path::new(&path), Arc::clone(&container) as _, false)?;
        let command = ALL_ON.to_le_bytes();
        device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &command, COMMAND);
        let interrupt = EventFd::new(0)?;
        let counts = listen(&interrupt)?;
        Ok(Self {
            device,
            container,
            interrupt,
            counts,
        })
    }

    /// Waits for its interrupt, which must have come once.
    fn interrupted(&self) -> Result<()> {
        let came = self.counts.recv_timeout(PATIENCE)?;
        ensure!(came == 1, "it came {came} times");
        Ok(())
    }
}

/// Hands on what an eventfd counts, each time that it does.
fn listen(event: &EventFd) -> Result<Receiver<u64>> {
    let (sender, counts) = mpsc::channel();
    let event = event.try_clone()?;
    std::thread::spawn(move || {
        while let Ok(count) = event.read() {
            if sender.send(count).is_err() {
                break;
            }
        }
    });
    Ok(counts)
}

/// How a card interrupts.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    Line,
    Message,
}

/// Registers of the gpio card, and how often its inputs are read until they change.
const INPUTS: u64 = 1;
const IRQ_CONTROL: u64 = 2;
const READS_TO_TOGGLE: u32 = 3;

/// Takes interrupts from the gpio card.
pub(crate) fn interrupts(address: &str, way: Way, count: u32) -> Result<()> {
    let card = Card::open(address)?;
    let device = &card.device;
    match way {
        Way::Line => device.enable_irq(VFIO_PCI_INTX_IRQ_INDEX, vec![&card.interrupt])?,
        Way::Message => device.enable_msi(vec![&card.interrupt])?,
    }
    let get = |register| {
        let mut byte = [0];
        device.region_read(VFIO_PCI_BAR2_REGION_INDEX, &mut byte, register);
        byte[0]
    };
    get(IRQ_CONTROL);
    for number in 1..=count {
        for _ in 0..READS_TO_TOGGLE {
            get(INPUTS);
        }
        let taken = card.interrupted();
        taken.with_context(|| format!("interrupt {number}"))?;
        // A write to the inputs ends the interrupt.
        device.region_write(VFIO_PCI_BAR2_REGION_INDEX, &[0], INPUTS);
        if matches!(way, Way::Line) {
            device.unmask_irq(VFIO_PCI_INTX_IRQ_INDEX)?;
        }
        println!("interrupt {number}");
    }
    Ok(())
}

/// Registers of the counter's first lane (samples/counter).
const VALUE: u64 = 0x08;
const ADDRESS: u64 = 0x18;
const GO: u64 = 0x20;
/// Memory that is mapped for it at a time.
const SIZE: usize = 0x4000;

/// Has the counter work on memory that is mapped for it anew each time, elsewhere, and takes its
/// MSI-X interrupt. What was unmapped it must not reach. Prints how many interrupts came for nothing.
pub(crate) fn dma(address: &str, rounds: impl Iterator<Item = u64>) -> Result<()> {
    let card = Card::open(address)?;
    let device = &card.device;
    device.enable_msix(vec![&card.interrupt])?;
    let value = || {
        let mut bytes = [0; 8];
        device.region_read(VFIO_PCI_BAR0_REGION_INDEX, &mut bytes, VALUE);
        u64::from_le_bytes(bytes)
    };
    let go = |block: u64| {
        device.region_write(VFIO_PCI_BAR0_REGION_INDEX, &block.to_le_bytes(), ADDRESS);
        device.region_write(VFIO_PCI_BAR0_REGION_INDEX, &1_u32.to_le_bytes(), GO);
    };
    let mut sum = 0;
    let mut spurious = 0;
    for round in rounds {
        let iova = 0x100_0000 * (1 + round % 7);
        let memory = Shared::map(&card.container, iova, SIZE)?;
        // Across the edge of a page: those lie anywhere in the guest's memory.
        let block = iova + 0xff0;
        memory.set(block, round)?;
        memory.set(block + 8, !round)?;
        go(block);
        loop {
            let came = card.counts.recv_timeout(PATIENCE);
            spurious += came.with_context(|| format!("round {round}, interrupt"))?;
            if memory.get(block + 24)? == !round {
                spurious -= 1;
                break;
            }
        }
        sum += round;
        ensure!(memory.get(block + 16)? == sum, "round {round}: a wrong sum");
        drop(memory);
        go(block);
        ensure!(
            value() == sum,
            "round {round}: memory was reached that is unmapped"
        );
        println!("round {round}");
    }
    println!("{spurious} interrupts came for nothing");
    Ok(())
}
