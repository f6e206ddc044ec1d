// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Brings the test device and a client together over a transport.

use std::fmt::Debug;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{anyhow, ensure, Context, Result};
use libmuser::transport::Transport;
use libmuser::{AttachOptions, Ended, Moment, Server, SharedServer, Stop};

use crate::device::{self, SharedTestDevice, TestDevice};
use crate::{Case, Client};

/// Both sides of one device over one transport.
pub trait Backend: Send + Sync + 'static {
    /// The server's side.
    type Transport: Transport + 'static;

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
pub trait Host: Sync {
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

    /// Has the server die at its next request, as if its process were killed; another one is started
    /// at once.
    fn die_at(&self, moment: Moment);

    /// Starts another server, to which the present one hands the device over.
    ///
    /// # Errors
    ///
    /// What the server ended with, or why the next did not start.
    fn hand_over(&self) -> Result<()>;
}

/// Runs one case against a fresh device of the backend.
///
/// # Errors
///
/// What the case found, or what the server ended with.
pub fn run<B: Backend>(case: &Case, backend: B) -> Result<()> {
    run_with(case, backend, case.threads)
}

/// Runs one case against a fresh device, served by so many threads.
///
/// # Errors
///
/// As [`run`].
pub fn run_with<B: Backend>(case: &Case, backend: B, threads: usize) -> Result<()> {
    let backend = Arc::new(backend);
    let served = Served {
        server: Mutex::new(Some(Running::start(&backend, threads, false)?)),
        backend,
        threads,
        restarted: AtomicBool::new(false),
    };
    let judged = (case.run)(&served);
    let ended = served.end();
    judged.and(ended)?;
    let restarted = served.restarted.load(Ordering::Relaxed);
    ensure!(
        restarted == case.restarts,
        "the case declares otherwise whether servers end in it"
    );
    Ok(())
}

struct Served<B> {
    server: Mutex<Option<Running>>,
    backend: Arc<B>,
    threads: usize,
    /// Whether the case had a server end.
    restarted: AtomicBool,
}

impl<B: Backend> Served<B> {
    fn end(&self) -> Result<()> {
        let running = self.server().take();
        running.map_or(Ok(()), |running| {
            running.stop.stop();
            running.join().map(drop)
        })
    }

    fn server(&self) -> MutexGuard<'_, Option<Running>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, standby: bool) -> Result<Running> {
        Running::start(&self.backend, self.threads, standby)
    }
}

impl<B: Backend> Host for Served<B> {
    fn open(&self) -> Result<Box<dyn Client>> {
        self.backend.open().context("opening a client")
    }

    fn restart(&self) -> Result<()> {
        self.restarted.store(true, Ordering::Relaxed);
        self.end()?;
        *self.server() = Some(self.start(false)?);
        Ok(())
    }

    fn die_at(&self, moment: Moment) {
        self.restarted.store(true, Ordering::Relaxed);
        if let Some(running) = &*self.server() {
            running.stop.die_at(moment);
        }
    }

    fn hand_over(&self) -> Result<()> {
        self.restarted.store(true, Ordering::Relaxed);
        let next = self.start(true)?;
        let before = self.server().replace(next);
        match before.map(Running::join).transpose()? {
            Some(Ended::HandedOver) => Ok(()),
            other => Err(anyhow!("the server ended otherwise: {other:?}")),
        }
    }
}

/// A server in its thread, which starts again whenever it dies.
#[derive(Debug)]
struct Running {
    stop: Stop,
    thread: JoinHandle<libmuser::Result<Ended>>,
}

impl Running {
    fn start<B: Backend>(backend: &Arc<B>, threads: usize, standby: bool) -> Result<Self> {
        let stop = Stop::new().context("making the server's stop")?;
        let (stopped, backend) = (stop.clone(), Arc::clone(backend));
        let (ready, started) = mpsc::channel();
        // The server is made in its thread: it need not be able to move to another.
        let thread = std::thread::spawn(move || {
            let options = AttachOptions::new().threads(threads).standby(standby);
            let mut ended = serve(&*backend, &options, &stopped, Some(ready))?;
            while ended == Ended::Abandoned {
                ended = serve(&*backend, &options.standby(false), &stopped, None)?;
            }
            Ok(ended)
        });
        let running = Self { stop, thread };
        if started.recv().is_err() {
            running.join()?;
            return Err(anyhow!("the server ended before it served"));
        }
        Ok(running)
    }

    fn join(self) -> Result<Ended> {
        let ended = self.thread.join();
        let ended = ended.map_err(|_| anyhow!("the server panicked"))??;
        Ok(ended)
    }
}

/// Serves the test device, by one thread or by several; tells when it begins.
fn serve<B: Backend>(
    backend: &B,
    options: &AttachOptions,
    stop: &Stop,
    ready: Option<Sender<()>>,
) -> libmuser::Result<Ended> {
    let (model, transport) = (device::model()?, backend.transport()?);
    let begin = || {
        // Whoever waits for it may have given up.
        let _ = ready.map(|ready| ready.send(()));
    };
    if options.threads > 1 {
        let device = |bus: &_| Ok(SharedTestDevice::new(bus));
        let mut server = SharedServer::attach(model, transport, options, device)?;
        begin();
        return server.run_until(stop);
    }
    let device = |bus: &_| Ok(TestDevice::new(bus));
    let mut server = Server::attach(model, transport, options, device)?;
    begin();
    server.run_until(stop)
}
