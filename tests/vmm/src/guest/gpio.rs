// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The card's lines, by the kernel's driver for it and the GPIO character device.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context as _, Result};
use gpiocdev::chip::{self, Chip};
use gpiocdev::line::{EdgeDetection, Value, Values};
use gpiocdev::request::{EdgeEventBuffer, Request};

use crate::PATIENCE;

/// Lines of the chip: outputs first, then inputs (drivers/gpio/gpio-idio-16.c).
const OUTPUTS: u32 = 16;
/// The inputs of a group all change with every third read of it.
const READS_TO_TOGGLE: u32 = 3;

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
pub(crate) fn drive(address: &str, value: u16) -> Result<()> {
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
pub(crate) fn read(address: &str, input: u32, count: u32) -> Result<()> {
    let mut request = Request::builder();
    request.on_chip(find(address)?).with_line(OUTPUTS + input);
    let request = request.as_input().request()?;
    let values = (0..count).map(|_| Ok(digit(request.lone_value()?)));
    println!("{}", values.collect::<Result<String>>()?);
    Ok(())
}

/// Reads an input until it has changed once a round, takes an interrupt for each change, and sets an
/// output each time. A read that is lost or done twice, and an interrupt that does not come or
/// comes twice, is an error.
pub(crate) fn work(address: &str, input: u32, rounds: impl Iterator<Item = u64>) -> Result<()> {
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
    for round in rounds {
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
