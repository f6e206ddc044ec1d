// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA over the memory transport, from the client to the device and back.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod common;

use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{errno, CONFIG, DEADLINE};
use libmuser::transport::memory::{self, Client, ClientMemory, Host};
use libmuser::{
    Access, Bar, Device, Dma, DmaAccess, DmaRange, Ended, Errno, PciBuilder, PowerManagement,
    Result, Server,
};

const PAGE: u64 = 4096;

/// Copies bytes on a write: from the IOVA written to 16 bytes further.
struct Copier {
    dma: Dma,
    unmapped: Sender<Range<u64>>,
    /// Whether an unmap is answered only when this says so.
    hold: Option<Receiver<()>>,
}

impl Device for Copier {
    fn write(&mut self, _access: Access, iova: u64) -> Result<()> {
        let bytes = self.dma.read_obj::<[u8; 16]>(iova)?;
        self.dma.write(iova.wrapping_add(16), &bytes)
    }

    fn dma_unmapped(&mut self, iova: Range<u64>) {
        let _ = self.unmapped.send(iova);
        if let Some(hold) = &self.hold {
            let _ = hold.recv_timeout(DEADLINE);
        }
    }
}

struct Rig {
    host: Host,
    client: Client,
    unmapped: Receiver<Range<u64>>,
    dma: Dma,
    ended: Receiver<Result<Ended>>,
}

impl Rig {
    fn start(hold: Option<Receiver<()>>) -> Self {
        let (transport, host) = memory::pair().unwrap();
        let (sender, unmapped) = mpsc::channel();
        let model = PciBuilder::new(1, 2)
            .bar(0, Bar::memory32(0x1000))
            .power_management(PowerManagement::new())
            .build();
        let (tell, handle) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let mut server = Server::new(model.unwrap(), transport, |bus| {
                tell.send(bus.dma()).unwrap();
                Ok(Copier {
                    dma: bus.dma(),
                    unmapped: sender,
                    hold,
                })
            })
            .unwrap();
            let _ = end.send(server.run());
        });
        let dma = handle.recv_timeout(DEADLINE).unwrap();
        let client = loop {
            // The device is described before it is made.
            if let Ok(client) = host.open() {
                break client;
            }
        };
        let rig = Self {
            host,
            client,
            unmapped,
            dma,
            ended,
        };
        rig.set_command(4);
        rig
    }

    fn set_command(&self, command: u16) {
        self.client
            .write(CONFIG, 4, &command.to_le_bytes())
            .unwrap();
    }

    fn copy(&self, iova: u64) -> std::io::Result<usize> {
        self.client.write(0, 0, &iova.to_le_bytes())
    }

    fn map(&self, iova: u64, pages: u64) -> ClientMemory {
        let memory = ClientMemory::new(usize::try_from(pages * PAGE).unwrap()).unwrap();
        self.client
            .dma_map(iova, &memory, 0..pages * PAGE, DmaAccess::ReadWrite)
            .unwrap();
        memory
    }
}

#[test]
fn device_copies_the_clients_memory() {
    let rig = Rig::start(None);
    let memory = rig.map(0x8000, 2);
    memory.write(0x10, &[0x5a; 16]).unwrap();

    rig.copy(0x8010).unwrap();

    let mut bytes = [0; 17];
    memory.read(0x20, &mut bytes).unwrap();
    assert_eq!(bytes[..16], [0x5a; 16]);
    assert_eq!(bytes[16], 0);
    assert_eq!(rig.client.dirty_pages(0..u64::MAX, true), [0x8000]);
}

#[test]
fn address_not_mapped_is_the_clients_fault() {
    let rig = Rig::start(None);
    rig.map(0x8000, 1);

    assert_eq!(errno(rig.copy(0x7ff8)), libc::EFAULT);
    assert_eq!(errno(rig.copy(0x8ff0)), libc::EFAULT);
    assert_eq!(errno(rig.copy(u64::MAX)), libc::EOVERFLOW);
    rig.copy(0x8000).unwrap();
}

#[test]
fn device_without_bus_mastering_is_refused() {
    let rig = Rig::start(None);
    rig.map(0, 1);
    let range = rig.dma.map(0, 16, DmaAccess::Read).unwrap();

    rig.set_command(0);

    assert_eq!(errno(rig.copy(0)), libc::EPERM);
    assert_eq!(range.read(0, &mut [0]).unwrap_err().errno(), Errno::EPERM);
    rig.set_command(4);
    rig.copy(0).unwrap();
    range.read(0, &mut [0]).unwrap();
}

#[test]
fn device_without_power_is_refused() {
    let rig = Rig::start(None);
    rig.map(0, 1);
    let range = rig.dma.map(0, 16, DmaAccess::Read).unwrap();
    let mut pm = [0];
    rig.client.read(CONFIG, 0x34, &mut pm).unwrap();

    rig.client
        .write(CONFIG, u64::from(pm[0]) + 4, &[3])
        .unwrap();

    let error = range.read(0, &mut [0]).unwrap_err();
    assert_eq!(error.errno(), Errno::EPERM);
    assert!(error.to_string().contains("D3hot"), "{error}");
}

#[test]
fn reset_ends_bus_mastering() {
    let rig = Rig::start(None);
    rig.map(0, 1);

    rig.client.reset().unwrap();

    assert_eq!(errno(rig.copy(0)), libc::EPERM);
}

#[test]
fn overlapping_maps_are_refused() {
    let rig = Rig::start(None);
    let memory = rig.map(0x8000, 2);
    let map = |iova, bytes| rig.client.dma_map(iova, &memory, bytes, DmaAccess::Read);

    assert_eq!(errno(map(0x7000, 0..2 * PAGE)), libc::EEXIST);
    assert_eq!(errno(map(0x9000, 0..PAGE)), libc::EEXIST);
    map(0xa000, 0..PAGE).unwrap();
    assert_eq!(errno(map(0xb000, PAGE..4 * PAGE)), libc::EINVAL);
    let (from, to) = (PAGE, 0);
    assert_eq!(errno(map(0xb000, from..to)), libc::EINVAL);
}

#[test]
fn half_a_mapping_is_not_unmapped() {
    let rig = Rig::start(None);
    rig.map(0x8000, 2);
    rig.map(0xa000, 1);

    assert_eq!(errno(rig.client.dma_unmap(0x8000, PAGE)), libc::EINVAL);
    assert_eq!(errno(rig.client.dma_unmap(0x9000, 2 * PAGE)), libc::EINVAL);
    rig.copy(0x8000).unwrap();
    assert_eq!(rig.client.dma_unmap(0, 1 << 40).unwrap(), 3 * PAGE);
    assert_eq!(rig.client.dma_unmap(0, 1 << 40).unwrap(), 0);
}

#[test]
fn unmap_of_memory_in_use_tells_the_device() {
    let rig = Rig::start(None);
    rig.map(0x8000, 2);
    rig.map(0x2_0000, 1);
    rig.copy(0x8000).unwrap();

    assert_eq!(rig.client.dma_unmap_all(), 3 * PAGE);

    assert_eq!(rig.unmapped.try_recv().unwrap(), 0x8000..0xa000);
    assert!(rig.unmapped.try_recv().is_err());
    assert_eq!(errno(rig.copy(0x8000)), libc::EFAULT);
}

#[test]
fn unmap_of_the_last_page_of_all_tells_the_device() {
    let rig = Rig::start(None);
    let top = 0_u64.wrapping_sub(PAGE);
    rig.map(top, 1);
    rig.copy(top).unwrap();

    rig.client.dma_unmap(top, PAGE).unwrap();

    assert_eq!(rig.unmapped.try_recv().unwrap(), top..u64::MAX);
}

#[test]
fn unmap_waits_for_the_device() {
    let (release, hold) = mpsc::channel();
    let rig = Rig::start(Some(hold));
    rig.host.set_unmap_timeout(DEADLINE);
    rig.map(0, 1);
    rig.copy(0).unwrap();
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        let unmapping = scope.spawn(|| rig.client.dma_unmap(0, PAGE));
        rig.unmapped.recv_timeout(DEADLINE).unwrap();

        // What it has can be used until it says that it is done; it gets no more of it.
        range.write(0, &[1]).unwrap();
        let more = rig.dma.map(0, 16, DmaAccess::Read).unwrap_err();
        let waited = !unmapping.is_finished();
        release.send(()).unwrap();

        assert_eq!(more.errno(), Errno::EFAULT);
        assert!(waited);
        assert_eq!(unmapping.join().unwrap().unwrap(), PAGE);
    });
    assert_eq!(range.write(0, &[1]).unwrap_err().errno(), Errno::EFAULT);
}

#[test]
fn device_that_is_too_slow_loses_the_memory() {
    let (release, hold) = mpsc::channel();
    let rig = Rig::start(Some(hold));
    rig.host.set_unmap_timeout(Duration::from_millis(50));
    let memory = rig.map(0, 1);
    rig.copy(0).unwrap();
    let range = rig.dma.map(0, 16, DmaAccess::ReadWrite).unwrap();

    let start = Instant::now();
    rig.client.dma_unmap(0, PAGE).unwrap();

    assert!(start.elapsed() >= Duration::from_millis(50));
    assert_eq!(range.write(0, &[1]).unwrap_err().errno(), Errno::EFAULT);
    // Its late reply harms nothing.
    release.send(()).unwrap();
    rig.client
        .dma_map(0, &memory, 0..PAGE, DmaAccess::ReadWrite)
        .unwrap();
    rig.copy(0).unwrap();
}

#[test]
fn unmap_without_a_server_does_not_wait() {
    let (transport, host) = memory::pair().unwrap();
    host.set_unmap_timeout(DEADLINE);
    let model = PciBuilder::new(1, 2).build().unwrap();
    let (tell, handle) = mpsc::channel();
    let server = Server::new(model, transport, |bus| {
        tell.send(bus.dma()).unwrap();
        Ok(common::Recorder::default())
    });
    let dma = handle.recv().unwrap();
    let client = host.open().unwrap();
    let mut server = server.unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| while !server.process().unwrap() {});
        client.write(CONFIG, 4, &[4, 0]).unwrap();
    });
    let memory = ClientMemory::new(4096).unwrap();
    client
        .dma_map(0, &memory, 0..PAGE, DmaAccess::Read)
        .unwrap();
    dma.read(0, &mut [0]).unwrap();
    drop(server);

    let start = Instant::now();
    client.dma_unmap(0, PAGE).unwrap();

    assert!(start.elapsed() < DEADLINE / 2);
}

#[test]
fn last_close_takes_all_mappings() {
    let Rig {
        host, client, dma, ..
    } = {
        let rig = Rig::start(None);
        rig.map(0, 1);
        rig
    };
    let range = dma.map(0, 16, DmaAccess::ReadWrite).unwrap();

    drop(host.open().unwrap());
    range.write(0, &[1]).unwrap();
    drop(client);
    let client = host.open().unwrap();
    client.write(CONFIG, 4, &[4, 0]).unwrap();

    assert_eq!(range.write(0, &[1]).unwrap_err().errno(), Errno::EFAULT);
    assert_eq!(client.dma_unmap_all(), 0);
}

#[test]
fn memory_that_can_be_read_only_is_mapped_for_nothing_else() {
    let rig = Rig::start(None);
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let memory = ClientMemory::map_file(std::os::fd::AsFd::as_fd(&file), 0, 4096, false).unwrap();
    let map = |access| rig.client.dma_map(0, &memory, 0..PAGE, access);

    assert_eq!(errno(map(DmaAccess::ReadWrite)), libc::EPERM);
    map(DmaAccess::Read).unwrap();
    assert_eq!(rig.dma.read_obj::<[u8; 4]>(0).unwrap(), *b"\x7fELF");
    assert_eq!(rig.dma.write(0, &[0]).unwrap_err().errno(), Errno::EPERM);
    assert_eq!(errno(memory.write(0, &[0])), libc::EPERM);
}

/// Writers in many threads while the client maps and unmaps: each write lands where the client has
/// mapped something at that time, or fails.
#[test]
fn threads_use_a_range_while_the_client_unmaps_it() {
    let rig = Rig::start(None);
    let guard = rig.map(0, 1);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let range: DmaRange = rig.dma.map(0, 8, DmaAccess::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        for number in 1..=3_u64 {
            let (range, stop) = (range.clone(), Arc::clone(&stop));
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for result in [range.store(0, number), range.load::<u64>(0).map(drop)] {
                        if let Err(error) = result {
                            assert_eq!(error.errno(), Errno::EFAULT);
                        }
                    }
                }
            });
        }
        let mut memory = guard;
        for _ in 0..200 {
            rig.client.dma_unmap(0, PAGE).unwrap();
            memory = ClientMemory::new(4096).unwrap();
            rig.client
                .dma_map(0, &memory, 0..PAGE, DmaAccess::ReadWrite)
                .unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        drop(memory);
    });
    rig.host.remove();
    assert_eq!(
        rig.ended.recv_timeout(DEADLINE).unwrap().unwrap(),
        Ended::Removed
    );
}

#[test]
fn server_that_ended_reaches_no_memory() {
    let rig = Rig::start(None);
    rig.map(0, 1);
    let range = rig.dma.map(0, 8, DmaAccess::ReadWrite).unwrap();

    rig.host.remove();
    assert_eq!(
        rig.ended.recv_timeout(DEADLINE).unwrap().unwrap(),
        Ended::Removed
    );

    // The server is dropped after it has ended.
    let deadline = Instant::now() + DEADLINE;
    while range.write(0, &[1]).is_ok() {
        assert!(Instant::now() < deadline, "memory can be reached for ever");
        std::thread::yield_now();
    }
    let error = rig.dma.read(0, &mut [0]).unwrap_err();
    assert_eq!(error.errno().number(), libc::ENOTCONN);
}
