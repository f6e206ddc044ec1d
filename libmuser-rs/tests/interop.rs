// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! With somebody else's code at the other end: the client of the crate `vfio_user` (rust-vmm)
//! against this library's server, and this library's client against its server.
//!
//! What is known to be wrong there (0.1.7), and kept out of the way here:
//!
//! - its client does not look at errors: one in reply to a read would leave it waiting for data, so
//!   nothing is read that fails, and whether other commands have worked is seen by their effects;
//! - its client says of a device that it can be reset when it can't, and the other way round;
//! - its server loses track of the stream at a command it does not know (WRITE_MULTI, FEATURE,
//!   GET_REGION_IO_FDS), at one to a region that is not there, and at a write that fails, and
//!   answers an unposted write that fails as well as a posted one;
//! - its server hands out a descriptor with the sparse areas of a region only, so a region that is
//!   mappable as a whole can't be mapped.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use libmuser::client::{self, ClientMemory, IrqAction, IrqData, Options, RegionWrite};
use libmuser::transport::{ListenOptions, SocketTransport};
use libmuser::{
    Access, Bar, Bus, Device, Dma, DmaAccess, Ended, Interrupts, Msix, PciBuilder, Region, Reset,
    Result, Server, SharedMemory,
};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{memfd_create, MFdFlags};
use tempfile::TempDir;
use vfio_bindings::bindings::vfio::{
    vfio_region_info, vfio_region_sparse_mmap_area, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend, ServerRegion, SparseArea};

const DEADLINE: Duration = Duration::from_secs(20);
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
const PAGE: u64 = 4096;

/// Adds one to the number at the IOVA that is written to register 0, and fires vector 0.
struct Adder {
    scratch: u64,
    dma: Dma,
    interrupts: Interrupts,
    memory: SharedMemory,
}

impl Adder {
    fn new(bus: &Bus) -> Self {
        Self {
            scratch: 0,
            dma: bus.dma(),
            interrupts: bus.interrupts(),
            memory: bus.memory(Region::Bar(2), PAGE).unwrap(),
        }
    }
}

impl Device for Adder {
    fn read(&mut self, access: Access) -> Result<u64> {
        match access.offset {
            8 => Ok(self.scratch),
            16 => Ok(self.memory.read::<u32>(4)?.into()),
            _ => access.unhandled_read(),
        }
    }

    fn write(&mut self, access: Access, value: u64) -> Result<()> {
        match access.offset {
            0 => {
                let number = self.dma.read_obj::<u64>(value)?;
                self.dma.write_obj(value, number + 1)?;
                self.interrupts.raise(0)
            }
            8 => {
                self.scratch = value;
                Ok(())
            }
            _ => access.unhandled_write(value),
        }
    }

    fn reset(&mut self, _reset: Reset) -> Result<()> {
        self.scratch = 0;
        Ok(())
    }
}

/// This library's server with an [`Adder`], on a socket.
struct Ours {
    path: PathBuf,
    _directory: TempDir,
    stop: libmuser::Stop,
    thread: JoinHandle<Result<Ended>>,
}

impl Ours {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("adder.sock");
        let stop = libmuser::Stop::new().unwrap();
        let (ready, started) = mpsc::channel();
        let (at, stopped) = (path.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let model = PciBuilder::new(0x1234, 0x5678)
                .bar(0, Bar::memory32(PAGE))
                .bar(2, Bar::memory64(4 * PAGE).mappable(PAGE..2 * PAGE))
                .bar(4, Bar::memory32(PAGE))
                .msix(Msix::new(2).table(4, 0).pba(4, 0x800))
                .build()?;
            let transport = SocketTransport::listen(&at, ListenOptions::default())?;
            let mut server = Server::new(model, transport, |bus| Ok(Adder::new(bus)))?;
            ready.send(()).unwrap();
            server.run_until(&stopped)
        });
        started.recv_timeout(DEADLINE).unwrap();
        Self {
            path,
            _directory: directory,
            stop,
            thread,
        }
    }

    fn end(self) {
        self.stop.stop();
        self.thread.join().unwrap().unwrap();
    }
}

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("interop", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

/// Waits for an eventfd, and returns what was in it.
fn fired(event: &EventFd) -> u64 {
    let mut polled = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    let deadline = PollTimeout::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut polled, deadline), Ok(1), "it has not fired");
    event.read().unwrap()
}

mod their_client {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn connect(path: &Path) -> vfio_user::Client {
        vfio_user::Client::new(path).unwrap()
    }

    fn get(client: &mut vfio_user::Client, region: u32, offset: u64) -> u32 {
        let mut data = [0; 4];
        client.region_read(region, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    #[test]
    fn regions_are_described() {
        let server = Ours::start();
        let client = connect(&server.path);

        let sizes: Vec<u64> = (0..6)
            .map(|index| client.region(index).unwrap().size)
            .collect();

        assert_eq!(sizes, [PAGE, 0, 4 * PAGE, 0, PAGE, 0]);
        assert!(client.region(CONFIG).unwrap().size >= 256);
        let areas = &client.region(2).unwrap().sparse_areas;
        let areas: Vec<_> = areas.iter().map(|area| (area.offset, area.size)).collect();
        assert_eq!(areas, [(PAGE, PAGE)]);
        drop(client);
        server.end();
    }

    #[test]
    fn registers_and_config_space_are_read_and_written() {
        let server = Ours::start();
        let mut client = connect(&server.path);

        assert_eq!(get(&mut client, CONFIG, 0), 0x5678_1234);
        client.region_write(0, 8, &7_u32.to_le_bytes()).unwrap();
        assert_eq!(get(&mut client, 0, 8), 7);
        // A BAR is sized with ones.
        client.region_write(CONFIG, 0x10, &[0xff; 4]).unwrap();
        assert_eq!(get(&mut client, CONFIG, 0x10), 0xffff_f000);
        client.reset().unwrap();
        assert_eq!(get(&mut client, 0, 8), 0);
        drop(client);
        server.end();
    }

    #[test]
    fn mapped_area_is_the_devices() {
        let server = Ours::start();
        let mut client = connect(&server.path);

        let region = client.region(2).unwrap();
        let file = region.file_offset.as_ref().unwrap();
        let at = file.start() + region.sparse_areas[0].offset + 4;
        file.file().write_all_at(&9_u32.to_le_bytes(), at).unwrap();

        assert_eq!(get(&mut client, 0, 16), 9);
        drop(client);
        server.end();
    }

    #[test]
    fn device_reaches_memory_and_interrupts() {
        let server = Ours::start();
        let mut client = connect(&server.path);
        let (file, event) = (memfd(PAGE), event());
        file.write_all_at(&41_u64.to_le_bytes(), 0x10).unwrap();
        client
            .region_write(CONFIG, 4, &6_u16.to_le_bytes())
            .unwrap();

        let info = client.get_irq_info(MSIX).unwrap();
        assert_eq!(info.count, 2);
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        let fd = event.as_fd().as_raw_fd();
        client.set_irqs(MSIX, flags, 0, 1, &[fd]).unwrap();
        // The MSI-X capability is the first one; its table is in BAR 4.
        let enable = 0x8000_u16.to_le_bytes();
        client.region_write(CONFIG, 0x42, &enable).unwrap();
        client.region_write(4, 12, &[0; 4]).unwrap();
        client.dma_map(0, 0x1_0000, PAGE, file.as_raw_fd()).unwrap();
        client
            .region_write(0, 0, &0x1_0010_u64.to_le_bytes())
            .unwrap();

        assert_eq!(fired(&event), 1);
        let mut number = [0; 8];
        file.read_exact_at(&mut number, 0x10).unwrap();
        assert_eq!(u64::from_le_bytes(number), 42);

        client.dma_unmap(0x1_0000, PAGE).unwrap();
        client.region_write(0, 8, &1_u32.to_le_bytes()).unwrap();
        assert_eq!(get(&mut client, 0, 8), 1);
        drop(client);
        server.end();
    }

    #[test]
    fn next_client_finds_the_device_as_at_first() {
        let server = Ours::start();
        for _ in 0..3 {
            let mut client = connect(&server.path);
            assert_eq!(get(&mut client, 0, 8), 0);
            client.region_write(0, 8, &7_u32.to_le_bytes()).unwrap();
            client.shutdown().unwrap();
        }
        server.end();
    }
}

/// What a backend of theirs was asked for.
#[derive(Debug)]
enum Heard {
    Write(u32, u64, Vec<u8>),
    Map(DmaMapFlags, u64, u64, u64, Option<File>),
    Unmap(u64, u64),
    Irqs(u32, u32, u32, u32, Vec<File>),
    Reset,
}

struct Backend(Sender<Heard>);

impl Backend {
    fn hear(&self, heard: Heard) -> std::io::Result<()> {
        self.0.send(heard).unwrap();
        Ok(())
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        if region == 0 && offset == 0x80 {
            return Err(std::io::Error::other("it can't be read"));
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = at.to_le_bytes()[0];
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.hear(Heard::Write(region, offset, data.to_vec()))
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> std::io::Result<()> {
        self.hear(Heard::Map(flags, offset, address, size, fd))
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> std::io::Result<()> {
        self.hear(Heard::Unmap(address, size))
    }

    fn reset(&mut self) -> std::io::Result<()> {
        self.hear(Heard::Reset)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> std::io::Result<()> {
        self.hear(Heard::Irqs(index, flags, start, count, fds))
    }
}

/// Their server, and what it has heard.
struct Theirs {
    path: PathBuf,
    _directory: TempDir,
    heard: Receiver<Heard>,
    thread: JoinHandle<()>,
}

impl Theirs {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("theirs.sock");
        let irqs = (0..5).map(|index| vfio_user::IrqInfo {
            index,
            flags: 1,
            count: if index == MSIX { 8 } else { 0 },
        });
        let region = |index: u32, size: u64, mmap: Option<OwnedFd>| ServerRegion {
            region_info: vfio_region_info {
                argsz: 32,
                flags: VFIO_REGION_INFO_FLAG_READ
                    | VFIO_REGION_INFO_FLAG_WRITE
                    | mmap.as_ref().map_or(0, |_| VFIO_REGION_INFO_FLAG_MMAP),
                index,
                size,
                ..Default::default()
            },
            sparse_areas: Vec::new(),
            mmap_fd: mmap.map(std::os::fd::IntoRawFd::into_raw_fd),
        };
        let area = |offset, size| SparseArea {
            area: vfio_region_sparse_mmap_area { offset, size },
        };
        let mut sparse = region(1, 4 * PAGE, Some(memfd(4 * PAGE).into()));
        sparse.sparse_areas = vec![area(0, PAGE), area(2 * PAGE, PAGE)];
        let whole = region(2, PAGE, Some(memfd(PAGE).into()));
        let regions = vec![region(0, 3 << 20, None), sparse, whole, region(3, 0, None)];
        let server = vfio_user::Server::new(&path, true, irqs.collect(), regions).unwrap();
        let (hear, heard) = mpsc::channel();
        let thread = std::thread::spawn(move || server.run(&mut Backend(hear)).unwrap());
        Self {
            path,
            _directory: directory,
            heard,
            thread,
        }
    }

    fn heard(&self) -> Heard {
        self.heard.recv_timeout(DEADLINE).unwrap()
    }

    fn end(self, client: client::Client) {
        drop(client);
        self.thread.join().unwrap();
    }
}

mod their_server {
    use super::*;

    fn connect(server: &Theirs) -> client::Client {
        Options::new()
            .timeout(DEADLINE)
            .connect(&server.path)
            .unwrap()
    }

    #[test]
    fn device_is_described() {
        let server = Theirs::start();
        let client = connect(&server);

        assert_eq!(client.version(), (0, 0));
        assert!(client.can_reset() && client.is_pci());
        assert!(!client.has_twin_socket() && !client.has_write_multi());
        assert_eq!(client.region(0).unwrap().size, 3 << 20);
        let areas = &client.region(1).unwrap().areas;
        let areas: Vec<_> = areas.iter().map(|area| (area.offset, area.size)).collect();
        assert_eq!(areas, [(0, PAGE), (2 * PAGE, PAGE)]);
        assert_eq!(client.region(3), None);
        assert_eq!(client.irq(MSIX).unwrap().count, 8);
        assert_eq!(client.irq(0), None);
        server.end(client);
    }

    #[test]
    fn regions_are_read_and_written() {
        let server = Theirs::start();
        let client = connect(&server);
        let mut data = vec![0; (2 << 20) + 5];

        assert_eq!(client.read(0, 3, &mut data).unwrap(), data.len());
        assert!((3_u64..)
            .zip(&data)
            .all(|(at, byte)| at.to_le_bytes()[0] == *byte));
        client.write(0, 16, &[1, 2, 3]).unwrap();
        client.write_posted(1, 5, &[4]).unwrap();
        let write = |offset, data| RegionWrite {
            region: 0,
            offset,
            data,
        };
        // It has no WRITE_MULTI, so they go one by one.
        client
            .write_multi(&[write(1, &[5]), write(2, &[6, 7])])
            .unwrap();

        for expected in [
            (0, 16, vec![1, 2, 3]),
            (1, 5, vec![4]),
            (0, 1, vec![5]),
            (0, 2, vec![6, 7]),
        ] {
            let Heard::Write(region, offset, data) = server.heard() else {
                panic!("it is something else");
            };
            assert_eq!((region, offset, data), expected);
        }
        server.end(client);
    }

    #[test]
    fn area_is_mapped() {
        let server = Theirs::start();
        let client = connect(&server);

        let memory = client.map(1, 2 * PAGE).unwrap();
        memory.write(0, 77_u32).unwrap();
        let again = client.map(1, 2 * PAGE).unwrap();

        assert_eq!(again.read::<u32>(0).unwrap(), 77);
        assert_eq!(client.map(1, 0).unwrap().read::<u32>(0).unwrap(), 0);
        server.end(client);
    }

    #[test]
    fn memory_is_mapped_and_unmapped() {
        let server = Theirs::start();
        let client = connect(&server);
        let memory = ClientMemory::new(0x3000).unwrap();
        memory.write(0x1000, &[9; 4]).unwrap();

        let access = DmaAccess::ReadWrite;
        client
            .dma_map(0x10_0000, &memory, 0x1000..0x3000, access)
            .unwrap();
        let unshared = memory.clone().unshared();
        client
            .dma_map(0x20_0000, &unshared, 0..0x1000, DmaAccess::Read)
            .unwrap();
        assert_eq!(client.dma_unmap(0, 1 << 32).unwrap(), 0x3000);

        let Heard::Map(flags, offset, address, size, Some(file)) = server.heard() else {
            panic!("it is not mapped with a descriptor");
        };
        assert_eq!(flags, DmaMapFlags::READ_WRITE);
        assert_eq!((offset, address, size), (0x1000, 0x10_0000, 0x2000));
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, offset).unwrap();
        assert_eq!(bytes, [9; 4]);
        let Heard::Map(flags, 0, 0x20_0000, 0x1000, None) = server.heard() else {
            panic!("it is not mapped without a descriptor");
        };
        assert_eq!(flags, DmaMapFlags::READ);
        for expected in [(0x10_0000, 0x2000), (0x20_0000, 0x1000)] {
            let Heard::Unmap(address, size) = server.heard() else {
                panic!("it is not unmapped");
            };
            assert_eq!((address, size), expected);
        }
        server.end(client);
    }

    #[test]
    fn interrupts_are_set_up_in_as_many_messages_as_it_takes() {
        let server = Theirs::start();
        let client = connect(&server);
        let event = event();
        let fd = event.as_fd();

        let events = [Some(fd), None, Some(fd), Some(fd)];
        client
            .set_irqs(MSIX, 2, IrqAction::Trigger, IrqData::EventFds(&events))
            .unwrap();
        client
            .set_irqs(MSIX, 0, IrqAction::Trigger, IrqData::None(0))
            .unwrap();

        let trigger = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        for (expected, count) in [
            ((MSIX, trigger, 2, 1), 1),
            ((MSIX, trigger, 3, 1), 0),
            // It takes one descriptor in a message.
            ((MSIX, trigger, 4, 1), 1),
            ((MSIX, trigger, 5, 1), 1),
            ((MSIX, 1 | VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0), 0),
        ] {
            let Heard::Irqs(index, flags, start, vectors, fds) = server.heard() else {
                panic!("it is something else");
            };
            assert_eq!((index, flags, start, vectors), expected);
            assert_eq!(fds.len(), count);
        }
        server.end(client);
    }

    #[test]
    fn reset_and_errors_are_told() {
        let server = Theirs::start();
        let client = connect(&server);

        client.reset().unwrap();
        assert!(matches!(server.heard(), Heard::Reset));
        // It sends no errno with what its backend refuses.
        let error = client.read(0, 0x80, &mut [0; 4]).unwrap_err();
        assert_eq!(error.errno().number(), 5);
        let mut data = [0; 2];
        client.read(0, 0x90, &mut data).unwrap();
        assert_eq!(data, [0x90, 0x91]);
        server.end(client);
    }
}
