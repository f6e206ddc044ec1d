// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What runs in a guest: `vmm-guest VERB ADDRESS …` does something with the card at a PCI address,
//! as any program that uses GPIO lines or VFIO would. The kernel knows nothing of muser.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, ensure, Context as _, Result};
use gpiocdev::chip::{self, Chip};
use gpiocdev::line::{EdgeDetection, Value, Values};
use gpiocdev::request::{EdgeEventBuffer, Request};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR2_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
};
use vfio_ioctls::{VfioContainer, VfioDevice};
use vmm_sys_util::eventfd::EventFd;

/// Lines of the chip: outputs first, then inputs (drivers/gpio/gpio-idio-16.c).
const OUTPUTS: u32 = 16;
/// The inputs of a group all change with every third read of it.
const READS_TO_TOGGLE: u32 = 3;
/// How long an interrupt may take: an emulated CPU and a server that starts anew are slow.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error:#}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match *words {
        ["drive", address, value] => drive(address, value.parse()?),
        ["read", address, input, count] => read(address, input.parse()?, count.parse()?),
        ["work", address, input, rounds] => work(address, input.parse()?, rounds.parse()?),
        ["msi", address, count] => vfio(address, Vector::Msi, count.parse()?),
        ["intx", address, count] => vfio(address, Vector::Intx, count.parse()?),
        _ => bail!("drive, read, work, msi or intx, and the address of a card"),
    }
}

/// The chip that the driver made of the card at a PCI address.
fn find(address: &str) -> Result<PathBuf> {
    for path in chip::chips()? {
        if Chip::from_path(&path)?.info()?.label == address {
            return Ok(path);
        }
    }
    bail!("no chip is called {address}");
}

/// Sets all outputs, to the bits of a value.
fn drive(address: &str, value: u16) -> Result<()> {
    let mut values = Values::default();
    for line in 0..OUTPUTS {
        let high = value >> line & 1 == 1;
        values.set(line, if high { Value::Active } else { Value::Inactive });
    }
    let mut request = Request::builder();
    request.on_chip(find(address)?).with_output_lines(&values);
    request.request()?;
    Ok(())
}

/// Reads an input so many times, and prints what was seen as ones and zeroes.
fn read(address: &str, input: u32, count: u32) -> Result<()> {
    let mut request = Request::builder();
    request.on_chip(find(address)?).with_line(OUTPUTS + input);
    let request = request.as_input().request()?;
    let values = (0..count).map(|_| Ok(digit(request.lone_value()?)));
    println!("{}", values.collect::<Result<String>>()?);
    Ok(())
}

/// Reads an input until it has changed so many times, takes an interrupt for each change, and sets
/// an output each time. A read that is lost or done twice, and an interrupt that does not come or
/// comes twice, is an error.
fn work(address: &str, input: u32, rounds: u32) -> Result<()> {
    let path = find(address)?;
    let mut expected = fall_into_step(&path, input)?;
    // All inputs: the card has one interrupt for them, and regmap-irq hands it to each line, whether
    // or not anybody asked for its edges. For those where nobody did it takes interrupt 0 of the
    // machine, and the kernel oopses.
    let lines: Vec<u32> = (OUTPUTS..2 * OUTPUTS).collect();
    let mut inputs = Request::builder();
    inputs.on_chip(&path).with_lines(&lines).as_input();
    let inputs = inputs.with_edge_detection(EdgeDetection::RisingEdge);
    let inputs = inputs.request()?;
    let mut output = Request::builder();
    output.on_chip(&path).with_line(0);
    let output = output.as_output(Value::Inactive).request()?;
    // Request::read_edge_event() of gpiocdev 0.8.0 loses what is read together with the first.
    let mut edges = inputs.new_edge_event_buffer(lines.len());
    for round in 1..=rounds {
        for read in 1..=READS_TO_TOGGLE {
            let value = inputs.value(OUTPUTS + input)?;
            ensure!(
                value == expected,
                "round {round}, read {read}: {}, expected {}",
                digit(value),
                digit(expected)
            );
        }
        take_edges(&inputs, &mut edges, &lines).with_context(|| format!("round {round}"))?;
        output.set_lone_value(expected)?;
        println!("round {round}");
        expected = expected.not();
    }
    Ok(())
}

/// Reads an input until its next three reads are of one value, which it returns.
fn fall_into_step(path: &Path, input: u32) -> Result<Value> {
    let mut request = Request::builder();
    request.on_chip(path).with_line(OUTPUTS + input).as_input();
    let request = request.request()?;
    let first = request.lone_value()?;
    for _ in 0..READS_TO_TOGGLE {
        if request.lone_value()? != first {
            // That was one of three.
            for _ in 1..READS_TO_TOGGLE {
                request.lone_value()?;
            }
            return Ok(first);
        }
    }
    bail!("input {input} does not change");
}

/// Takes one edge of each line.
fn take_edges(request: &Request, edges: &mut EdgeEventBuffer<'_>, lines: &[u32]) -> Result<()> {
    let mut missing: BTreeSet<u32> = lines.iter().copied().collect();
    while !missing.is_empty() {
        let came = edges.has_event()? || request.wait_edge_event(PATIENCE)?;
        ensure!(came, "no edge came in {PATIENCE:?} of lines {missing:?}");
        let line = edges.read_event()?.offset;
        ensure!(missing.remove(&line), "line {line}: one change, two edges");
    }
    Ok(())
}

fn digit(value: Value) -> char {
    match value {
        Value::Active => '1',
        Value::Inactive => '0',
    }
}

/// Registers of the card.
const INPUTS: u64 = 1;
const IRQ_CONTROL: u64 = 2;
/// The command register of configuration space, and its bits I/O space and bus master.
const COMMAND: u64 = 4;
const IO_AND_BUS_MASTER: u16 = 0b101;

/// How a device interrupts.
#[derive(Clone, Copy)]
enum Vector {
    Intx,
    Msi,
}

/// Takes interrupts from the card as a driver in userspace, by the guest's own vfio-pci.
fn vfio(address: &str, vector: Vector, count: u32) -> Result<()> {
    let container = Arc::new(VfioContainer::new(None)?);
    let path = format!("/sys/bus/pci/devices/{address}");
    let device = VfioDevice::new(Path::new(&path), container, false)?;
    let interrupt = EventFd::new(0)?;
    let counts = listen(&interrupt)?;
    let command = IO_AND_BUS_MASTER.to_le_bytes();
    device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &command, COMMAND);
    match vector {
        Vector::Intx => device.enable_irq(VFIO_PCI_INTX_IRQ_INDEX, vec![&interrupt])?,
        Vector::Msi => device.enable_msi(vec![&interrupt])?,
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
        let came = counts.recv_timeout(PATIENCE);
        let came = came.with_context(|| format!("interrupt {number}"))?;
        ensure!(came == 1, "interrupt {number} came {came} times");
        // A write to the inputs ends the interrupt.
        device.region_write(VFIO_PCI_BAR2_REGION_INDEX, &[0], INPUTS);
        if matches!(vector, Vector::Intx) {
            device.unmask_irq(VFIO_PCI_INTX_IRQ_INDEX)?;
        }
        println!("interrupt {number}");
    }
    Ok(())
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
