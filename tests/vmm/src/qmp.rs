// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's control socket: docs/interop/qmp-spec.rst in its source.

use anyhow::{bail, Context as _, Result};
use serde_json::{json, Value};

use crate::lines::Lines;
use crate::wait::{Deadline, SOON};

/// The control socket of a QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    lines: Lines,
    /// What happened while a reply was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Waits for the greeting, and ends the negotiation that it begins.
    pub(crate) fn greet(mut lines: Lines) -> Result<Self> {
        let greeting = lines.next(Deadline::after(SOON))?;
        if !greeting.contains("\"QMP\"") {
            bail!("this is no greeting: {greeting}");
        }
        let mut qmp = Self {
            lines,
            events: Vec::new(),
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Has QEMU do something.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.send(&request.to_string())?;
        let deadline = Deadline::after(SOON);
        loop {
            let mut reply = self
                .receive(deadline)
                .with_context(|| request.to_string())?;
            if reply.get("event").is_some() {
                self.events.push(reply);
            } else if let Some(error) = reply.get("error") {
                bail!("{request}: {}", error["desc"].as_str().unwrap_or_default());
            } else {
                return Ok(reply["return"].take());
            }
        }
    }

    /// Waits for an event that `wanted` says is the one, and forgets those that came before it.
    pub(crate) fn event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        let wanted = |event: &Value| event["event"] == name && wanted(&event["data"]);
        if let Some(place) = self.events.iter().position(&wanted) {
            self.events.drain(..=place);
            return Ok(());
        }
        let deadline = Deadline::after(SOON);
        loop {
            let event = self.receive(deadline);
            let event = event.with_context(|| format!("no {name} among {:?}", self.events))?;
            if wanted(&event) {
                self.events.clear();
                return Ok(());
            }
            self.events.push(event);
        }
    }

    /// Forgets the events that have come so far.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn receive(&mut self, deadline: Deadline) -> Result<Value> {
        let line = self.lines.next(deadline)?;
        serde_json::from_str(&line).with_context(|| format!("this is no JSON: {line}"))
    }
}
