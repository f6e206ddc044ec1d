// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU without a guest: what its CPU would do is asked for over a socket, word by word
//! (the comment on top of `system/qtest.c` in QEMU's source).
//!
//! It is the whole machine, with its buses, its interrupt controllers and its VFIO code; what is not
//! there is a guest's boot, and the doubt whether it was the guest's driver that did something.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{bail, ensure, Context as _, Result};

use crate::lines::Lines;
use crate::wait::{self, Deadline, SOON};

/// How long is watched that something does not happen.
const QUIET: Duration = Duration::from_millis(50);

/// The CPU's side of a machine.
#[derive(Debug)]
pub(crate) struct Qtest {
    lines: Lines,
    /// What the interrupt controller that is watched has got.
    inputs: Inputs,
}

/// What the inputs of an interrupt controller have done since they are watched.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Inputs {
    /// How often any of them rose.
    pub(crate) rises: u32,
    /// Those that are high.
    pub(crate) high: BTreeSet<u32>,
}

impl Qtest {
    pub(crate) fn new(lines: Lines) -> Self {
        Self {
            lines,
            inputs: Inputs::default(),
        }
    }

    /// Watches the inputs of an interrupt controller, which then gets none of what comes.
    pub(crate) fn watch(&mut self, controller: &str) -> Result<()> {
        self.ask(&format!("irq_intercept_in {controller}"))?;
        self.inputs = Inputs::default();
        Ok(())
    }

    /// What the inputs have done until now.
    pub(crate) fn inputs(&mut self) -> Result<Inputs> {
        // Whatever is sent is answered behind the changes that came before.
        self.ask("clock_step 1")?;
        Ok(self.inputs.clone())
    }

    /// Waits until the inputs are as `wanted` says.
    pub(crate) fn wait_for(
        &mut self,
        what: &str,
        wanted: impl Fn(&Inputs) -> bool,
    ) -> Result<Inputs> {
        let seen = wait::until(what, SOON, || {
            let inputs = self.inputs()?;
            Ok(wanted(&inputs).then_some(inputs))
        });
        seen.with_context(|| format!("the inputs: {:?}", self.inputs))
    }

    /// Watches for a moment that no input changes.
    pub(crate) fn quiet(&mut self) -> Result<()> {
        let before = self.inputs()?;
        let deadline = Deadline::after(QUIET);
        while !deadline.left().is_zero() {
            let now = self.inputs()?;
            ensure!(now == before, "inputs changed from {before:?} to {now:?}");
        }
        Ok(())
    }

    /// Reads from an I/O port; `width` in bytes.
    pub(crate) fn port_read(&mut self, port: u16, width: u8) -> Result<u32> {
        let letter = letter(width)?;
        let value = self.number(&format!("in{letter} {port:#x}"))?;
        Ok(u32::try_from(value)?)
    }

    /// Writes to an I/O port; `width` in bytes.
    pub(crate) fn port_write(&mut self, port: u16, width: u8, value: u32) -> Result<()> {
        let letter = letter(width)?;
        self.ask(&format!("out{letter} {port:#x} {value:#x}"))?;
        Ok(())
    }

    /// Reads from a memory address by one access; `width` in bytes.
    pub(crate) fn read(&mut self, address: u64, width: u8) -> Result<u64> {
        let letter = letter(width)?;
        self.number(&format!("read{letter} {address:#x}"))
    }

    /// Writes to a memory address by one access; `width` in bytes.
    pub(crate) fn write(&mut self, address: u64, width: u8, value: u64) -> Result<()> {
        let letter = letter(width)?;
        self.ask(&format!("write{letter} {address:#x} {value:#x}"))?;
        Ok(())
    }

    fn number(&mut self, question: &str) -> Result<u64> {
        let answer = self.ask(question)?;
        let digits = answer.strip_prefix("0x").unwrap_or(&answer);
        u64::from_str_radix(digits, 16).with_context(|| format!("{question}: {answer}"))
    }

    /// Asks for something; returns what follows the `OK`.
    fn ask(&mut self, question: &str) -> Result<String> {
        self.lines.send(question)?;
        let deadline = Deadline::after(SOON);
        loop {
            let line = self.lines.next(deadline);
            let line = line.with_context(|| format!("asking for {question:?}"))?;
            if let Some(change) = line.strip_prefix("IRQ ") {
                self.change(change)?;
            } else if let Some(answer) = line.strip_prefix("OK") {
                return Ok(answer.trim().to_owned());
            } else {
                bail!("{question}: {line}");
            }
        }
    }

    /// Takes in that an input `raise N` or `lower N`.
    fn change(&mut self, change: &str) -> Result<()> {
        let (verb, number) = change.split_once(' ').context(change.to_owned())?;
        let number = number.parse()?;
        if verb == "raise" {
            self.inputs.rises += 1;
            self.inputs.high.insert(number);
        } else {
            self.inputs.high.remove(&number);
        }
        Ok(())
    }
}

/// What tells the width of an access in a command.
fn letter(width: u8) -> Result<char> {
    Ok(match width {
        1 => 'b',
        2 => 'w',
        4 => 'l',
        8 => 'q',
        _ => bail!("no access has {width} bytes"),
    })
}
