// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine in this process: the memory transport, a server that is started again when it dies, and
//! backings that fail.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libmuser::transport::memory::{Client, ClientMemory, Host, IrqAction, IrqData};
use libmuser::transport::RemoteMemory;
use libmuser::{DmaAccess, Ended, SharedServer, Stop};
use nvme::backing::{Backing, FileBacking, Segments};
use nvme::{Nvme, Settings};

use crate::driver::{Driver, Machine, DEADLINE};

/// Where the memory is that the controller reaches.
pub(crate) const BASE: u64 = 0x1_0000_0000;
pub(crate) const MEMORY: u64 = 32 << 20;

/// What a rig is made of.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) backing: Arc<dyn Backing>,
    pub(crate) remote: bool,
}

impl Parts {
    /// A controller over a new file of so many bytes.
    pub(crate) fn new(path: &Path, bytes: u64) -> Self {
        File::create(path).unwrap().set_len(bytes).unwrap();
        let backing = FileBacking::open(path, false, None).unwrap();
        Self {
            settings: Settings::default(),
            backing: Arc::new(backing),
            remote: false,
        }
    }
}

/// A controller in this process, and a client of it.
pub(crate) struct Rig {
    pub(crate) client: Client,
    pub(crate) stop: Stop,
    memory: ClientMemory,
    host: Host,
    fired: Vec<Mutex<Receiver<()>>>,
    serving: Option<JoinHandle<()>>,
    pub(crate) starts: Arc<AtomicU64>,
}

impl Rig {
    pub(crate) fn new(parts: Parts) -> Self {
        let (stop, host) = (Stop::new().unwrap(), Host::new().unwrap());
        let (again, stopped) = (host.clone(), stop.clone());
        let starts = Arc::new(AtomicU64::new(0));
        let (sender, served) = mpsc::channel();
        let vectors = parts.settings.queues + 1;
        let (started, settings, backing) = (Arc::clone(&starts), parts.settings, parts.backing);
        let serving = thread::spawn(move || loop {
            let model = nvme::model(&settings).unwrap();
            let server = SharedServer::new(model, again.transport(), 2, |bus| {
                Nvme::new(bus, &settings, Arc::clone(&backing))
            });
            let mut server = server.unwrap();
            started.fetch_add(1, Ordering::SeqCst);
            // Nobody listens after the first time.
            let _ = sender.send(());
            if server.run_until(&stopped).unwrap() != Ended::Abandoned {
                break;
            }
        });
        served.recv_timeout(DEADLINE).unwrap();
        let client = host.open().unwrap();
        let memory = ClientMemory::new(usize::try_from(MEMORY).unwrap()).unwrap();
        let mapped = match parts.remote {
            true => ClientMemory::remote(Arc::new(Far(memory.clone())), MEMORY),
            false => memory.clone(),
        };
        let access = DmaAccess::ReadWrite;
        client.dma_map(BASE, &mapped, 0..MEMORY, access).unwrap();
        // Memory space, and bus mastering.
        client.write(7, 4, &[6, 0]).unwrap();
        let fired = listen(&client, vectors);
        Self {
            client,
            stop,
            memory,
            host,
            fired,
            serving: Some(serving),
            starts,
        }
    }

    /// A driver of a controller that is enabled.
    pub(crate) fn driver(parts: Parts) -> Driver<Self> {
        Driver::start(Self::new(parts))
    }
}

/// Counts the interrupts of all vectors, and enables MSI-X.
fn listen(client: &Client, vectors: u16) -> Vec<Mutex<Receiver<()>>> {
    let (senders, fired): (Vec<_>, Vec<_>) = (0..vectors).map(|_| mpsc::channel()).unzip();
    let calls = senders.into_iter().map(|sender| {
        let sender = Mutex::new(sender);
        let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            // The test may be over.
            let _ = sender.lock().unwrap().send(());
        });
        Some(call)
    });
    let calls = IrqData::Calls(calls.collect());
    client.set_irqs(2, 0, IrqAction::Trigger, calls).unwrap();
    fired.into_iter().map(Mutex::new).collect()
}

impl Machine for Rig {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.client.read(0, offset, data).map(drop)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.client.write(0, offset, data).map(drop)
    }

    fn memory(&self) -> Range<u64> {
        BASE..BASE + MEMORY
    }

    fn load(&self, address: u64, to: &mut [u8]) {
        self.memory.read(address - BASE, to).unwrap();
    }

    fn store(&self, address: u64, from: &[u8]) {
        self.memory.write(address - BASE, from).unwrap();
    }

    fn wait(&self, vector: u16, time: Duration) -> bool {
        let fired = self.fired[usize::from(vector)].lock().unwrap();
        fired.recv_timeout(time).is_ok()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.serving.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
        self.host.remove();
    }
}

/// Memory that the controller can't map.
#[derive(Debug)]
struct Far(ClientMemory);

impl RemoteMemory for Far {
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.write(offset, from)
    }
}

/// What goes wrong with the next accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// They fail with this errno.
    Errno(i32),
    /// They stop after so many bytes of each call.
    Short(usize),
    /// There is nothing there.
    Nothing,
}

/// A file that fails when it is told to.
#[derive(Debug)]
pub(crate) struct Faulty {
    file: File,
    size: u64,
    pub(crate) fault: Mutex<Option<Fault>>,
}

impl Faulty {
    pub(crate) fn new(path: &Path, bytes: u64) -> Arc<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .unwrap();
        file.set_len(bytes).unwrap();
        Arc::new(Self {
            file,
            size: bytes,
            fault: Mutex::default(),
        })
    }

    pub(crate) fn set(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).unwrap()];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// How many bytes may be moved.
    fn allowed(&self, wanted: usize) -> io::Result<usize> {
        match *self.fault.lock().unwrap() {
            None => Ok(wanted),
            Some(Fault::Short(most)) => Ok(wanted.min(most)),
            Some(Fault::Nothing) => Ok(0),
            Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
        }
    }
}

impl Backing for Faulty {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, at: u64, to: &Segments, skip: usize) -> io::Result<usize> {
        let count = self.allowed(to.len() - skip)?;
        let mut bytes = vec![0; count];
        self.file.read_exact_at(&mut bytes, at)?;
        to.fill(skip, &bytes);
        Ok(count)
    }

    fn write(&self, at: u64, from: &Segments, skip: usize, _durable: bool) -> io::Result<usize> {
        let count = self.allowed(from.len() - skip)?;
        let mut bytes = vec![0; count];
        from.drain(skip, &mut bytes);
        self.file.write_all_at(&bytes, at)?;
        Ok(count)
    }

    fn flush(&self) -> io::Result<()> {
        self.allowed(1).map(drop)
    }

    fn zero(&self, range: Range<u64>, _deallocate: bool) -> io::Result<()> {
        self.allowed(1)?;
        let zeroes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        self.file.write_all_at(&zeroes, range.start)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
