// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that answer an attachment's requests, and a record of what they were asked.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use muser_uapi::*;

use crate::node::{Description, Request, Server};
use crate::sys::{self, EventFd};
use crate::time;

/// How a request is answered.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A read, with these bytes.
    Data(Vec<u8>),
    /// A write or reset, done.
    Done,
    /// An errno.
    Error(i32),
    /// Not, or later by somebody else.
    Hold,
}

/// Locks, also behind a thread that panicked: its panic is reported elsewhere.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The requests that were taken, in the order in which they were.
#[derive(Debug, Default)]
pub struct Record {
    requests: Mutex<Vec<Request>>,
    arrived: Condvar,
}

impl Record {
    fn push(&self, request: Request) {
        lock(&self.requests).push(request);
        self.arrived.notify_all();
    }

    /// Takes out what was recorded so far.
    pub fn drain(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.requests))
    }

    /// Waits for `count` requests in all, and copies them.
    ///
    /// # Errors
    ///
    /// When they don't come in time.
    pub fn wait(&self, count: usize) -> anyhow::Result<Vec<Request>> {
        let deadline = Instant::now() + time::patience();
        let mut requests = lock(&self.requests);
        while requests.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            anyhow::ensure!(
                !left.is_zero(),
                "{} of {count} requests came",
                requests.len()
            );
            requests = self
                .arrived
                .wait_timeout(requests, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(requests.clone())
    }
}

/// Running threads of a device process; they end when this is dropped.
#[derive(Debug)]
pub struct Service {
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    record: Arc<Record>,
}

impl Service {
    /// Answers by `handler` in `threads` threads.
    ///
    /// # Errors
    ///
    /// The errno of eventfd(2).
    pub fn start(
        server: &Arc<Server>,
        threads: usize,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new()?);
        let record = Arc::new(Record::default());
        let handler = Arc::new(handler);
        let threads = (0..threads)
            .map(|_| {
                let (server, stop) = (Arc::clone(server), Arc::clone(&stop));
                let (record, handler) = (Arc::clone(&record), Arc::clone(&handler));
                std::thread::spawn(move || serve(&server, &stop, &record, &*handler))
            })
            .collect();
        Ok(Self {
            stop,
            threads,
            record,
        })
    }

    /// What was asked.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Ends the threads.
    ///
    /// # Errors
    ///
    /// What a thread failed with.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.stop.signal()?;
        for thread in self.threads.drain(..) {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a serving thread panicked"))??;
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.stop.signal().is_ok() {
            for thread in self.threads.drain(..) {
                match thread.join() {
                    Ok(Ok(())) => (),
                    Ok(Err(error)) => eprintln!("a serving thread ended: {error}"),
                    Err(_) => eprintln!("a serving thread panicked"),
                }
            }
        }
    }
}

fn serve(
    server: &Server,
    stop: &EventFd,
    record: &Record,
    handler: &dyn Fn(&Request) -> Reply,
) -> io::Result<()> {
    let files = [
        (stop.as_fd(), libc::POLLIN),
        (server.node().as_fd(), libc::POLLIN),
    ];
    loop {
        let events = sys::poll_many(&files, time::patience())?;
        if events[0] != 0 || events[1] & libc::POLLHUP != 0 {
            return Ok(());
        }
        let request = match server.try_take() {
            Ok(request) => request,
            // Another thread was faster.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            Err(error) => return Err(error),
        };
        record.push(request.clone());
        let replied = match handler(&request) {
            Reply::Data(data) => server.reply_data(request.slot, &data),
            Reply::Done => server.reply(request.slot, 0),
            Reply::Error(errno) => server.reply(request.slot, -errno),
            Reply::Hold => Ok(()),
        };
        match replied {
            // The client was killed meanwhile, or the device removed: the next round finds out.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ECANCELED | libc::ENODEV)) => {}
            other => other?,
        }
    }
}

/// A handler whose regions are plain memory, of the description's sizes; resets clear it. It lets go
/// of what the client unmaps.
pub fn ram(description: &Description) -> impl Fn(&Request) -> Reply + Send + Sync + use<> {
    let regions: HashMap<u32, Vec<u8>> = description
        .regions
        .iter()
        .map(|region| {
            // Regions of terabytes are for the limits' tests, which don't touch their ends.
            let size = usize::try_from(region.size).unwrap_or(0).min(1 << 20);
            (region.index, vec![0; size])
        })
        .collect();
    let regions = Mutex::new(regions);
    move |request| {
        let head = &request.head;
        let mut regions = lock(&regions);
        if head.kind == MUSER_REQUEST_RESET {
            regions.values_mut().for_each(|bytes| bytes.fill(0));
            return Reply::Done;
        }
        if head.kind == MUSER_REQUEST_UNMAP {
            return Reply::Done;
        }
        let start = usize::try_from(head.offset).unwrap_or(usize::MAX);
        let range = start..start.saturating_add(head.count as usize);
        let Some(bytes) = regions
            .get_mut(&head.region)
            .and_then(|bytes| bytes.get_mut(range))
        else {
            return Reply::Error(libc::EIO);
        };
        match head.kind {
            MUSER_REQUEST_READ => Reply::Data(bytes.to_vec()),
            MUSER_REQUEST_WRITE => {
                bytes.copy_from_slice(&request.data);
                Reply::Done
            }
            _ => Reply::Error(libc::EOPNOTSUPP),
        }
    }
}
