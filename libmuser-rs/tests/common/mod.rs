// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that writes down what happens to it, and a server for it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use libmuser::transport::memory::{self, Client, Host, IrqAction, IrqData};
use libmuser::transport::MemoryTransport;
use libmuser::{Access, Bus, Device, Ended, Error, PciModel, Reset, Result, Server};

pub(crate) const CONFIG: u32 = 7;
pub(crate) const INTX: u32 = 0;
pub(crate) const MSI: u32 = 1;
pub(crate) const MSIX: u32 = 2;

/// Long enough for anything that is going to happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// What happened to a [`Recorder`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    Read(u64, usize),
    Write(u64, usize, u64),
    Reset(Reset),
    Replay(u64),
}

/// Writes down what happens to it, and answers as it is told to.
#[derive(Clone, Default)]
pub(crate) struct Recorder {
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
    pub(crate) answers: Arc<Mutex<VecDeque<Result<u64>>>>,
    pub(crate) bus: Arc<Mutex<Option<Bus>>>,
}

impl Recorder {
    pub(crate) fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// The next access is answered like this.
    pub(crate) fn answer(&self, answer: Result<u64>) {
        self.answers.lock().unwrap().push_back(answer);
    }

    pub(crate) fn bus(&self) -> Bus {
        self.bus.lock().unwrap().clone().unwrap()
    }

    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    fn next_answer(&self) -> Option<Result<u64>> {
        self.answers.lock().unwrap().pop_front()
    }
}

impl Device for Recorder {
    /// Reads as the offsets of the bytes, unless told otherwise.
    fn read(&mut self, access: Access) -> Result<u64> {
        self.record(Event::Read(access.offset, access.width.bytes()));
        if access.replay {
            self.record(Event::Replay(access.offset));
        }
        let pattern = || {
            let bytes = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| low_byte(access.offset + at));
            Ok(u64::from_le_bytes(bytes))
        };
        self.next_answer().unwrap_or_else(pattern)
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        self.record(Event::Write(access.offset, access.width.bytes(), value));
        self.next_answer().unwrap_or(Ok(0)).map(drop)
    }

    fn reset(&mut self, reset: Reset) -> Result<()> {
        self.record(Event::Reset(reset));
        self.next_answer().unwrap_or(Ok(0)).map(drop)
    }
}

pub(crate) fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

/// A server in a thread of its own.
pub(crate) struct Running {
    pub(crate) host: Host,
    pub(crate) recorder: Recorder,
    pub(crate) ended: Receiver<Result<Ended>>,
}

impl Running {
    pub(crate) fn start(model: PciModel) -> (Client, Self) {
        let (transport, host) = memory::pair().unwrap();
        let running = Self::attach(model, transport, host);
        (running.host.open().unwrap(), running)
    }

    pub(crate) fn attach(model: PciModel, transport: MemoryTransport, host: Host) -> Self {
        let recorder = Recorder::default();
        let device = recorder.clone();
        let server = Server::new(model, transport, |bus| {
            *device.bus.lock().unwrap() = Some(bus.clone());
            Ok(device)
        });
        let mut server = server.unwrap();
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || sender.send(server.run()));
        Self {
            host,
            recorder,
            ended,
        }
    }

    /// How the server ended.
    pub(crate) fn wait(&self) -> Result<Ended, Error> {
        match self.ended.recv_timeout(DEADLINE) {
            Ok(ended) => ended,
            Err(RecvTimeoutError::Timeout) => panic!("the server did not end"),
            Err(RecvTimeoutError::Disconnected) => panic!("the server's thread panicked"),
        }
    }
}

/// Counts how often each of `vectors` of an index fires.
pub(crate) fn count(client: &Client, index: u32, vectors: usize) -> Vec<Arc<AtomicU32>> {
    let counters: Vec<_> = (0..vectors).map(|_| Arc::new(AtomicU32::new(0))).collect();
    let calls = counters.iter().map(|counter| {
        let counter = Arc::clone(counter);
        let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        Some(call)
    });
    let data = IrqData::Calls(calls.collect());
    client.set_irqs(index, 0, IrqAction::Trigger, data).unwrap();
    counters
}

pub(crate) fn fired(counters: &[Arc<AtomicU32>]) -> Vec<u32> {
    counters
        .iter()
        .map(|counter| counter.load(Ordering::SeqCst))
        .collect()
}

pub(crate) fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}
