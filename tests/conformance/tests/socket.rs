// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The conformance suite over a socket: this library's client and server, in one process.
//!
//! A plain socket ends with its server, so cases in which servers end under the client are skipped
//! there. Behind a supervisor all are run.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;

use libmuser::client::{self, ClientMemory, IrqAction, IrqData, Options};
use libmuser::supervise::{Links, Supervisor};
use libmuser::transport::SocketTransport;
use libmuser::{Ended, Stop};
use libtest_mimic::{Arguments, Trial};
use muser_conformance::{
    cases, run_with, Access, Backend, Case, Client, DmaMemory, Memory, RegionInfo,
};
use tempfile::TempDir;

/// The ways in which client and server can have agreed to work.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    threads: usize,
    twin: bool,
    /// Whether the server gets descriptors of the client's memory.
    shared: bool,
    /// Bytes of data in one message.
    data: usize,
    supervised: bool,
}

const USUAL: Way = Way {
    name: "",
    threads: 1,
    twin: true,
    shared: true,
    data: 1 << 20,
    supervised: false,
};

const WAYS: [Way; 12] = [
    USUAL,
    Way {
        name: "@threads",
        threads: 4,
        ..USUAL
    },
    Way {
        name: "@single_socket",
        twin: false,
        ..USUAL
    },
    Way {
        name: "@messages",
        shared: false,
        ..USUAL
    },
    Way {
        name: "@messages@threads",
        shared: false,
        threads: 4,
        ..USUAL
    },
    Way {
        name: "@messages@single_socket",
        shared: false,
        twin: false,
        threads: 4,
        ..USUAL
    },
    Way {
        name: "@messages@single_socket@small",
        shared: false,
        twin: false,
        data: 48,
        ..USUAL
    },
    Way {
        name: "@supervised",
        supervised: true,
        ..USUAL
    },
    Way {
        name: "@supervised@threads",
        supervised: true,
        threads: 4,
        ..USUAL
    },
    Way {
        name: "@supervised@single_socket",
        supervised: true,
        twin: false,
        threads: 4,
        ..USUAL
    },
    Way {
        name: "@supervised@messages",
        supervised: true,
        shared: false,
        ..USUAL
    },
    Way {
        name: "@supervised@messages@single_socket",
        supervised: true,
        shared: false,
        twin: false,
        threads: 4,
        ..USUAL
    },
];

/// What takes memory of the client that is in the device's process.
const IN_PLACE: [&str; 3] = [
    "dma::pages_written_through_slices_are_recorded",
    "dma::slices_write_what_is_asked",
    "dma::slices_for_reading_only_are_not_written",
];

/// In which a server goes because another one is there.
const HANDS_OVER: [&str; 2] = [
    "recovery::successor_takes_over",
    "recovery::hand_over_is_not_noticed",
];

/// In which a line is up while servers change.
const FIRES_AGAIN: &str = "recovery::line_that_was_up_stays_up";

fn main() -> ExitCode {
    let is_case = |name: &&str| cases().any(|case| case.name == *name);
    let mut named = IN_PLACE.iter().chain(&HANDS_OVER).chain([&FIRES_AGAIN]);
    assert!(named.all(is_case), "a case has another name");
    let trials = cases().flat_map(|case| WAYS.map(|way| trial(case, way)));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

fn trial(case: Case, way: Way) -> Trial {
    let name = format!("{}{}", case.name, way.name);
    let trial = Trial::test(name, move || {
        let backend = Socket::new(way)?;
        run_with(&case, backend, way.threads.max(case.threads))
            .map_err(|error| format!("{error:#}").into())
    });
    let reason = if case.restarts && !way.supervised {
        "skipped: a plain socket ends with its server"
    } else if !way.shared && IN_PLACE.contains(&case.name) {
        "skipped: memory that is reached by messages can't be touched in place"
    } else if way.supervised && HANDS_OVER.contains(&case.name) {
        "skipped: behind a supervisor a successor waits until the server before it has gone"
    } else if way.supervised && FIRES_AGAIN == case.name {
        "skipped: that a line has masked itself goes with its server, so it fires once more"
    } else {
        return trial;
    };
    trial.with_kind(reason).with_ignored_flag(true)
}

struct Socket {
    path: PathBuf,
    _directory: TempDir,
    way: Way,
    supervising: Option<Supervising>,
}

impl Socket {
    fn new(way: Way) -> libmuser::Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("device.sock");
        let supervising = match way.supervised {
            true => Some(Supervising::start(&path)?),
            false => None,
        };
        Ok(Self {
            path,
            _directory: directory,
            way,
            supervising,
        })
    }
}

/// A supervisor in a thread of its own, until it is dropped.
struct Supervising {
    links: Links,
    stop: Stop,
    thread: Option<JoinHandle<libmuser::Result<Ended>>>,
}

impl Supervising {
    fn start(path: &Path) -> libmuser::Result<Self> {
        let mut supervisor = Supervisor::listen(path, Default::default())?;
        let (links, stop) = (supervisor.links(), Stop::new()?);
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || supervisor.run_until(&stopped));
        Ok(Self {
            links,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Supervising {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join().expect("the supervisor does not panic");
            if !std::thread::panicking() {
                ended.expect("the supervisor does not fail");
            }
        }
    }
}

impl Backend for Socket {
    type Transport = SocketTransport;

    fn transport(&self) -> libmuser::Result<SocketTransport> {
        match &self.supervising {
            Some(supervising) => SocketTransport::from_fd(supervising.links.link()?),
            None => SocketTransport::listen(&self.path, Default::default()),
        }
    }

    fn open(&self) -> io::Result<Box<dyn Client>> {
        let options = Options::new()
            .twin_socket(self.way.twin)
            .max_data(self.way.data);
        let client = options.connect(&self.path).map_err(to_io)?;
        if !self.way.supervised {
            assert_eq!(client.has_twin_socket(), self.way.twin);
        }
        let shared = self.way.shared;
        Ok(Box::new(Open { client, shared }))
    }
}

#[derive(Debug)]
struct Open {
    client: client::Client,
    shared: bool,
}

fn to_io(error: libmuser::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno().number())
}

impl Open {
    fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> io::Result<()> {
        let set = self.client.set_irqs(index, start, action, data);
        set.map_err(to_io)
    }
}

impl Client for Open {
    fn region(&self, index: u32) -> io::Result<Option<RegionInfo>> {
        Ok(self.client.region(index).map(RegionInfo::from))
    }

    fn vectors(&self, index: u32) -> io::Result<u32> {
        Ok(self.client.irq(index).map_or(0, |irq| irq.count))
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.client.read(region, offset, data).map_err(to_io)
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<usize> {
        self.client.write(region, offset, data).map_err(to_io)
    }

    fn set_eventfds(
        &self,
        index: u32,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let data = IrqData::EventFds(events);
        self.set_irqs(index, start, IrqAction::Trigger, data)
    }

    fn disable(&self, index: u32) -> io::Result<()> {
        self.set_irqs(index, 0, IrqAction::Trigger, IrqData::None(0))
    }

    fn set_mask(&self, index: u32, vector: u32, masked: bool) -> io::Result<()> {
        let action = if masked {
            IrqAction::Mask
        } else {
            IrqAction::Unmask
        };
        self.set_irqs(index, vector, action, IrqData::None(1))
    }

    fn fire(&self, index: u32, vector: u32) -> io::Result<()> {
        self.set_irqs(index, vector, IrqAction::Trigger, IrqData::None(1))
    }

    fn reset(&self) -> io::Result<()> {
        self.client.reset().map_err(to_io)
    }

    fn map(&self, region: u32, offset: u64, _len: usize) -> io::Result<Box<dyn Memory>> {
        let memory = self.client.map(region, offset).map_err(to_io)?;
        Ok(Box::new(memory))
    }

    fn dma_map(&self, iova: u64, len: u64, access: Access) -> io::Result<Box<dyn DmaMemory>> {
        let memory = ClientMemory::new(usize::try_from(len).unwrap_or(usize::MAX))?;
        let memory = if self.shared {
            memory
        } else {
            memory.unshared()
        };
        let mapped = self.client.dma_map(iova, &memory, 0..len, access.into());
        mapped.map_err(to_io)?;
        Ok(Box::new(memory))
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<u64> {
        self.client.dma_unmap(iova, len).map_err(to_io)
    }

    fn dirty_start(&self, iova: u64, len: u64) -> io::Result<()> {
        let range = iova..iova + len;
        let started = self.client.start_dirty_log(&[range]);
        started.map(drop).map_err(to_io)
    }

    fn dirty_pages(&self, iova: u64, len: u64) -> io::Result<Vec<u64>> {
        self.client.dirty_pages(iova..iova + len).map_err(to_io)
    }
}
