// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that carries bytes between chip and line, and keeps the receiver's time.
//!
//! It waits for what can go on and for nothing else: for input while the receiver has room, for
//! output while bytes wait. So a port that nobody uses costs nothing.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libmuser::Result;
use nix::errno::Errno as Number;
use nix::poll::{ppoll, PollFd, PollFlags};
use nix::sys::time::TimeSpec;

use crate::line::Line;
use crate::uart::{Demand, FIFO};
use crate::Port;

/// A thread; dropping it is its end.
#[derive(Debug)]
pub(crate) struct Mover {
    port: Arc<Port>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mover {
    pub(crate) fn start(port: Arc<Port>, line: Line) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let mut work = Work {
            port: Arc::clone(&port),
            line,
            over: Arc::clone(&over),
            timer: None,
        };
        let thread = thread::Builder::new().name("line".into()).spawn(move || {
            if let Err(error) = work.run() {
                log::debug!("the line is not served any more: {error}");
            }
        })?;
        Ok(Self {
            port,
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        self.port.wake();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the thread of the line panicked");
        }
    }
}

struct Work {
    port: Arc<Port>,
    line: Line,
    over: Arc<AtomicBool>,
    /// When the receiver's time is over, and what it had to say when it began.
    timer: Option<(u8, Instant)>,
}

impl Work {
    /// Works until the mover is dropped, or the server has ended.
    fn run(&mut self) -> Result<()> {
        while !self.over.load(Ordering::SeqCst) {
            let carrier = self.line.is_joined();
            self.port.change(|uart| uart.set_carrier(carrier))?;
            self.port.settle()?;
            let Some(demand) = self.port.look(|uart| uart.demand()) else {
                return Ok(());
            };
            self.keep_time(&demand)?;
            // What nobody takes is gone at once.
            if demand.waiting == 0 || !self.line.discards() {
                self.wait(&demand)?;
            }
            self.line.attend();
            if demand.waiting > 0 {
                self.send()?;
            }
            if demand.room > 0 {
                self.receive()?;
            }
        }
        Ok(())
    }

    /// Sends what the line takes. It is gone when the line has it.
    fn send(&mut self) -> Result<()> {
        let line = &mut self.line;
        self.port.change(|uart| {
            let sent = line.write(uart.going());
            uart.gone(sent);
        })
    }

    fn receive(&mut self) -> Result<()> {
        let line = &mut self.line;
        self.port.change(|uart| {
            let mut bytes = [0; FIFO];
            let room = uart.demand().room.min(FIFO);
            let came = line.read(&mut bytes[..room]);
            uart.come(&bytes[..came]);
        })
    }

    fn keep_time(&mut self, demand: &Demand) -> Result<()> {
        let Some(timing) = demand.timing else {
            self.timer = None;
            return Ok(());
        };
        match self.timer {
            Some((mine, end)) if mine == timing => {
                if Instant::now() >= end {
                    self.timer = None;
                    self.port.change(|uart| uart.time_out(timing))?;
                    self.port.settle()?;
                }
            }
            _ => {
                let time = self.port.look(|uart| uart.time_of_four()).unwrap_or(0);
                self.timer = Some((timing, Instant::now() + Duration::from_nanos(time)));
            }
        }
        Ok(())
    }

    /// Waits until the line can do what is wanted, the time is over, or somebody wakes this thread.
    fn wait(&self, demand: &Demand) -> Result<()> {
        let left = self.timer.map(|(_, end)| {
            let left = end.saturating_duration_since(Instant::now());
            TimeSpec::from_duration(left)
        });
        let mut fds = self.line.wanted(demand.room > 0, demand.waiting > 0);
        fds.push(PollFd::new(self.port.wake.as_fd(), PollFlags::POLLIN));
        match ppoll(&mut fds, left, None) {
            Ok(_) | Err(Number::EINTR) => {}
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        }
        // Whoever wakes this thread from now on finds it awake at the next wait.
        let _ = self.port.wake.read();
        Ok(())
    }
}
