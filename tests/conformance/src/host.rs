// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Brings the test device and a client together over a transport.

use std::fmt::Debug;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{anyhow, Context, Result};
use libmuser::transport::Transport;
use libmuser::{Server, Stop};

use crate::device::{self, TestDevice};
use crate::{Case, Client};

/// Both sides of one device over one transport.
pub trait Backend {
    /// The server's side.
    type Transport: Transport + Send + 'static;

    /// A new server's side: the first, or that of a restart.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn transport(&self) -> libmuser::Result<Self::Transport>;

    /// Opens a client.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn open(&self) -> io::Result<Box<dyn Client>>;
}

/// A device that is being served, as a case sees it.
pub trait Host {
    /// Opens a client.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    fn open(&self) -> Result<Box<dyn Client>>;

    /// Ends the server and starts another.
    ///
    /// # Errors
    ///
    /// What the server ended with, or why the next did not start.
    fn restart(&self) -> Result<()>;
}

/// Runs one case against a fresh device of the backend.
///
/// # Errors
///
/// What the case found, or what the server ended with.
pub fn run<B: Backend>(case: &Case, backend: B) -> Result<()> {
    let served = Served {
        server: Mutex::new(Some(Running::start(&backend)?)),
        backend,
    };
    let judged = (case.run)(&served);
    let ended = served.end();
    judged.and(ended)
}

struct Served<B> {
    server: Mutex<Option<Running>>,
    backend: B,
}

impl<B: Backend> Served<B> {
    fn end(&self) -> Result<()> {
        let running = self
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        running.map_or(Ok(()), Running::end)
    }
}

impl<B: Backend> Host for Served<B> {
    fn open(&self) -> Result<Box<dyn Client>> {
        self.backend.open().context("opening a client")
    }

    fn restart(&self) -> Result<()> {
        self.end()?;
        let running = Running::start(&self.backend)?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
        Ok(())
    }
}

/// A server in its thread.
#[derive(Debug)]
struct Running {
    stop: Stop,
    thread: JoinHandle<libmuser::Result<()>>,
}

impl Running {
    fn start<B: Backend>(backend: &B) -> Result<Self> {
        let transport = backend.transport().context("opening the server's side")?;
        let stop = Stop::new().context("making the server's stop")?;
        let stopped = stop.clone();
        let (ready, started) = std::sync::mpsc::channel();
        // The server is made in its thread: it need not be able to move to another.
        let thread = std::thread::spawn(move || {
            let model = device::model()?;
            let mut server = Server::new(model, transport, |bus| Ok(TestDevice::new(bus)))?;
            // Whoever waits for it may have given up.
            let _ = ready.send(());
            server.run_until(&stopped).map(drop)
        });
        let running = Self { stop, thread };
        if started.recv().is_err() {
            running.end()?;
            return Err(anyhow!("the server ended before it served"));
        }
        Ok(running)
    }

    fn end(self) -> Result<()> {
        self.stop.stop();
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the server panicked"))??;
        Ok(())
    }
}
