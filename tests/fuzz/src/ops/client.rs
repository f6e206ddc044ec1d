// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client does with a VFIO device, right and wrong, on every road.

use std::ffi::CString;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, IntoRawFd};

use muser_e2e::mdev::Mdev;
use muser_e2e::sys::ioctl_bytes;
use muser_e2e::vfio::{self, open_rw, IrqData, IrqSet, Road};
use muser_uapi::MUSER_MMAP_REGION_SHIFT;

use super::node::{area_of, exists, random_ioctl, range, SPACE};
use crate::content;
use crate::sys::{self, borrow, int, PAGE};
use crate::worker::{Kind, Mapped, Worker};

/// `VFIO_DEVICE_FEATURE`, `VFIO_IOMMU_MAP_DMA`, `VFIO_IOMMU_UNMAP_DMA` of `<linux/vfio.h>`.
const VFIO_DEVICE_FEATURE: u32 = 0x3B75;
const VFIO_IOMMU_MAP_DMA: u32 = 0x3B71;
const VFIO_IOMMU_UNMAP_DMA: u32 = 0x3B72;
/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1V2: i32 = 3;
/// `IOMMU_IOAS_MAP` and `IOMMU_IOAS_UNMAP` of `<linux/iommufd.h>`.
const IOMMU_IOAS_MAP: u32 = 0x3B85;
const IOMMU_IOAS_UNMAP: u32 = 0x3B86;

/// Words of a struct, 4 bytes each.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Numbers of 8 bytes behind words.
fn with(words: &[u32], numbers: &[u64]) -> Vec<u8> {
    let mut bytes = self::words(words);
    bytes.extend(numbers.iter().flat_map(|number| number.to_ne_bytes()));
    bytes
}

fn keep(worker: &mut Worker, file: std::fs::File, kind: Kind, device: usize) -> i32 {
    let fd = file.into_raw_fd();
    worker.keep(u64::from(fd.unsigned_abs()), kind, device)
}

fn mdev(worker: &Worker, device: usize) -> ManuallyDrop<Mdev> {
    // The fuzzers' owner removes it.
    ManuallyDrop::new(Mdev::adopt(&worker.uuids[device]))
}

pub(super) fn open_group(worker: &mut Worker) -> Option<io::Result<u64>> {
    let device = worker.device();
    if !exists(worker, device) || has_device(worker) && worker.chance(80) {
        return None;
    }
    let mdev = mdev(worker, device);
    Some((|| {
        // iommufd makes a container as well; type1's own lock inversion would turn lockdep off.
        let container = if worker.chance(25) || Road::Group.spoiled_for_dma().is_some() {
            open_rw("/dev/iommu").or_else(|_| open_rw("/dev/vfio/vfio"))
        } else {
            open_rw("/dev/vfio/vfio")
        }?;
        let group = open_rw(mdev.group_node()?)?;
        let mut fd = container.as_raw_fd();
        muser_e2e::sys::ioctl(&group, vfio::VFIO_GROUP_SET_CONTAINER, &mut fd)?;
        let set = vfio::VFIO_SET_IOMMU.into();
        sys::ioctl(container.as_raw_fd(), set, int(TYPE1V2))?;
        let name = CString::new(mdev.uuid()).map_err(io::Error::other)?;
        let file = muser_e2e::sys::ioctl_open(&group, vfio::VFIO_GROUP_GET_DEVICE_FD, &name)?;
        keep(worker, container, Kind::Container, device);
        keep(worker, group, Kind::Group, device);
        keep(worker, file, Kind::Device, device);
        Ok(0)
    })())
}

fn has_device(worker: &Worker) -> bool {
    worker.files.iter().any(|entry| entry.kind == Kind::Device)
}

pub(super) fn open_cdev(worker: &mut Worker) -> Option<io::Result<u64>> {
    let device = worker.device();
    if !exists(worker, device) || has_device(worker) && worker.chance(80) {
        return None;
    }
    let mdev = mdev(worker, device);
    // A kernel without cdevs has nothing to fuzz here.
    let node = mdev.cdev_node().ok()?;
    Some((|| {
        let iommu = open_rw("/dev/iommu")?;
        let cdev = open_rw(node)?;
        let mut bind = words(&[16, 0, iommu.as_raw_fd().unsigned_abs(), 0]);
        ioctl_bytes(&cdev, vfio::VFIO_DEVICE_BIND_IOMMUFD, &mut bind)?;
        let mut alloc = words(&[12, 0, 0]);
        ioctl_bytes(&iommu, vfio::IOMMU_IOAS_ALLOC, &mut alloc)?;
        let id = u32::from_ne_bytes([alloc[8], alloc[9], alloc[10], alloc[11]]);
        let mut attach = words(&[12, 0, id]);
        if worker.chance(95) {
            ioctl_bytes(&cdev, vfio::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach)?;
        }
        keep(worker, iommu, Kind::Iommu(id), device);
        keep(worker, cdev, Kind::Device, device);
        Ok(0)
    })())
}

fn client(worker: &mut Worker) -> Option<i32> {
    worker
        .any(|kind| kind == Kind::Device)
        .map(|entry| entry.fd)
}

fn ioctl(fd: i32, number: u32, bytes: &mut [u8]) -> io::Result<u64> {
    ioctl_bytes(borrow(fd), number, bytes).map(|value| u64::from(value.unsigned_abs()))
}

pub(super) fn device_info(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    let len = *worker.random.pick(&[16, 20, 24, 24, 64, 4]);
    let mut info = content::bytes(&mut worker.random, len);
    info[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    let result = ioctl(fd, vfio::VFIO_DEVICE_GET_INFO, &mut info);
    check(worker, "device info", &info);
    Some(result)
}

fn check(worker: &Worker, what: &str, bytes: &[u8]) {
    if let Some(leaked) = content::leaked(bytes) {
        worker.found(&format!("{what}: {leaked}"));
    }
}

pub(super) fn region_info(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    let len = *worker.random.pick(&[32, 32, 40, 48, 64, 128, 256, 31]);
    let mut info = content::bytes(&mut worker.random, len);
    let index = match worker.random.below(10) {
        0 => worker.number() as u32,
        _ => worker.random.below(10) as u32,
    };
    info[..12].copy_from_slice(&words(&[len as u32, 0, index]));
    let result = ioctl(fd, vfio::VFIO_DEVICE_GET_REGION_INFO, &mut info);
    check(worker, "region info", &info);
    Some(result)
}

pub(super) fn irq_info(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    let index = match worker.random.below(10) {
        0 => worker.number() as u32,
        _ => worker.random.below(6) as u32,
    };
    let mut info = words(&[16, 0, index, 0x7777_7777]);
    let result = ioctl(fd, vfio::VFIO_DEVICE_GET_IRQ_INFO, &mut info);
    check(worker, "interrupt info", &info);
    Some(result)
}

/// An eventfd of this process.
pub(super) fn event(worker: &mut Worker) -> Option<i32> {
    if worker.chance(70)
        && let Some(entry) = worker.any(|kind| kind == Kind::Event)
    {
        return Some(entry.fd);
    }
    let flags = int(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let fd = sys::call(libc::SYS_eventfd2, [0, flags, 0, 0, 0, 0]).ok()?;
    Some(worker.keep(fd, Kind::Event, 0))
}

pub(super) fn set_irqs(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    let index = worker.random.below(5) as u32;
    let vectors = [1, 8, 128, 1, 1][index as usize];
    let start = worker.random.below(vectors) as u32;
    let count = 1 + worker.random.below((vectors - u64::from(start)).min(8)) as u32;
    let start = if worker.chance(60) { 0 } else { start };
    let data = match worker.random.below(10) {
        0..6 => {
            let events = (0..count)
                .map(|_| match worker.random.below(8) {
                    0 => Some(-1),
                    1 if worker.chance(20) => Some(fd),
                    _ => event(worker),
                })
                .collect::<Option<Vec<_>>>()?;
            IrqData::EventFd(events)
        }
        6..8 => IrqData::Bool(vec![1; count as usize]),
        8 => IrqData::None(0),
        _ => IrqData::None(count),
    };
    let mut set = match worker.random.below(5) {
        0..3 => IrqSet::trigger(index, start, data),
        3 => IrqSet::mask(index, start, data),
        _ => IrqSet::unmask(index, start, data),
    };
    if worker.chance(8) {
        let value = worker.number() as u32;
        match worker.random.below(5) {
            0 => set.argsz = value.min(20),
            1 => set.flags = value,
            2 => set.index = value,
            3 => set.start = value,
            _ => set.count = value,
        }
    }
    Some(ioctl(fd, vfio::VFIO_DEVICE_SET_IRQS, &mut set.bytes()))
}

pub(super) fn reset(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    Some(sys::ioctl(fd, vfio::VFIO_DEVICE_RESET.into(), 0))
}

/// Where and how much a client accesses.
fn access(worker: &mut Worker) -> (u64, usize) {
    let region = *worker.random.pick(&[0, 0, 1, 1, 2, 2, 3, 4, 7, 5, 8, 40]);
    let size: u64 = [64 << 10, 16 << 10, 64 << 10, 4096, 4096, 4096, 0, 256]
        .get(region as usize)
        .copied()
        .unwrap_or(0);
    let offset = match worker.random.below(16) {
        0 => worker.number() % (1 << MUSER_MMAP_REGION_SHIFT),
        1 => size.saturating_sub(worker.random.below(16)),
        // At an edge of an area, or among doorbells.
        2 => 4096 - worker.random.below(16),
        3 => 0x2000 + worker.random.below(64) * 4,
        _ => worker.random.below(size.max(1)) & !3,
    };
    let len = match worker.random.below(12) {
        0 => worker.random.below(12 << 10),
        1 => worker.random.below(16),
        _ => 1 << worker.random.below(4),
    };
    ((region << MUSER_MMAP_REGION_SHIFT) + offset, len as usize)
}

pub(super) fn read_region(worker: &mut Worker) -> Option<io::Result<u64>> {
    const UNTOUCHED: u8 = 0xA5;
    let fd = client(worker)?;
    let (position, len) = access(worker);
    let mut data = vec![UNTOUCHED; len + 64];
    let address = data.as_mut_ptr().expose_provenance() as u64;
    let bad = worker.chance(3);
    let target = if bad { 0x1000 } else { address };
    let arguments = [int(fd), target, len as u64, position, 0, 0];
    let result = sys::call(libc::SYS_pread64, arguments);
    let data = std::hint::black_box(data);
    let read = result.as_ref().map_or(0, |&count| count as usize);
    if read > len {
        worker.found(&format!("read {read} of {len} bytes"));
    }
    if !bad && let Some(strange) = content::strange(&data[..read]) {
        worker.found(&format!("read at {position:#x}: {strange}"));
    }
    if data[len..].iter().any(|&byte| byte != UNTOUCHED) {
        worker.found("a read went beyond its buffer");
    }
    Some(result)
}

pub(super) fn write_region(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    let (position, len) = access(worker);
    let data = content::bytes(&mut worker.random, len);
    let address = data.as_ptr().expose_provenance() as u64;
    let source = if worker.chance(3) { 0x1000 } else { address };
    let arguments = [int(fd), source, len as u64, position, 0, 0];
    Some(sys::call(libc::SYS_pwrite64, arguments))
}

pub(super) fn map_region(worker: &mut Worker) -> Option<io::Result<u64>> {
    let fd = client(worker)?;
    let window = worker.window();
    let (offset, len) = area_of(worker);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let result = worker
        .arena
        .map(window, len, protection, libc::MAP_SHARED, fd, offset);
    worker.windows[window] = if result.is_ok() {
        Mapped::Plain
    } else {
        Mapped::Nothing
    };
    Some(result)
}

/// The container or iommufd of a client.
fn space(worker: &mut Worker) -> Option<crate::worker::Entry> {
    worker.any(|kind| matches!(kind, Kind::Container | Kind::Iommu(_)))
}

/// Memory of any kind: whatever is in the arena, muser's own mappings too.
pub(super) fn map_dma(worker: &mut Worker) -> Option<io::Result<u64>> {
    let space = space(worker)?;
    let mapped = worker
        .windows
        .iter()
        .position(|&mapped| mapped != Mapped::Nothing);
    let window = if worker.chance(90) {
        let at = worker.window();
        (at..at + worker.windows.len())
            .map(|at| at % worker.windows.len())
            .find(|&at| worker.windows[at] != Mapped::Nothing)
            .or(mapped)?
    } else {
        worker.window()
    };
    let address = worker.arena.window(window) + worker.random.below(2) * PAGE as u64;
    // Mostly much at a time, so that what a device's process asks for is there.
    let (iova, length) = if worker.chance(80) {
        let page = PAGE as u64;
        (worker.random.below(SPACE / 16) * 16 * page, 16 * page)
    } else {
        range(worker)
    };
    let write = u32::from(worker.chance(80));
    Some(match space.kind {
        Kind::Iommu(id) => {
            let flags = 1 | write << 1 | 4;
            let mut map = with(&[40, flags, id, 0], &[address, length, iova]);
            ioctl(space.fd, IOMMU_IOAS_MAP, &mut map)
        }
        _ => {
            let mut map = with(&[32, 1 | write << 1], &[address, iova, length]);
            ioctl(space.fd, VFIO_IOMMU_MAP_DMA, &mut map)
        }
    })
}

pub(super) fn unmap_dma(worker: &mut Worker) -> Option<io::Result<u64>> {
    let space = space(worker)?;
    let (iova, length) = match worker.random.below(3) {
        // Everything there is.
        0 => (
            0,
            if matches!(space.kind, Kind::Iommu(_)) {
                u64::MAX
            } else {
                SPACE << 12
            },
        ),
        _ => range(worker),
    };
    Some(match space.kind {
        Kind::Iommu(id) => ioctl(
            space.fd,
            IOMMU_IOAS_UNMAP,
            &mut with(&[24, id], &[iova, length]),
        ),
        _ => ioctl(
            space.fd,
            VFIO_IOMMU_UNMAP_DMA,
            &mut with(&[24, 0], &[iova, length]),
        ),
    })
}

/// `VFIO_DEVICE_FEATURE`: dirty logging as it should be, and anything else.
pub(super) fn feature(worker: &mut Worker) -> Option<io::Result<u64>> {
    const GET: u32 = 1 << 16;
    const SET: u32 = 1 << 17;
    const PROBE: u32 = 1 << 18;
    const START: u32 = 6;
    const STOP: u32 = 7;
    const REPORT: u32 = 8;
    let fd = client(worker)?;
    let page = PAGE as u64;
    let mut bitmap = vec![0u64; 64];
    let bits = bitmap.as_mut_ptr().expose_provenance() as u64;
    let ranges = [0, 256 * page];
    let mut feature = match worker.random.below(8) {
        0..2 => {
            let mut start = with(&[8 + 24, SET | START], &[page]);
            start.extend(with(&[1, 0], &[ranges.as_ptr().expose_provenance() as u64]));
            start
        }
        2..5 => {
            let length = (1 + worker.random.below(256)) * page;
            with(&[8 + 32, GET | REPORT], &[0, length, page, bits])
        }
        5 => with(&[8, SET | STOP], &[]),
        6 => with(&[8, PROBE | worker.random.below(12) as u32], &[]),
        _ => {
            let flags = *worker.random.pick(&[GET, SET, GET | SET, PROBE | SET]);
            let mut any = with(&[40, flags | worker.random.below(12) as u32], &[0; 4]);
            let garbage = content::bytes(&mut worker.random, 16);
            any[8..24].copy_from_slice(&garbage);
            any
        }
    };
    let result = ioctl(fd, VFIO_DEVICE_FEATURE, &mut feature);
    drop(std::hint::black_box(bitmap));
    Some(result)
}

pub(super) fn ioctl_device(worker: &mut Worker) -> Option<io::Result<u64>> {
    let entry = worker.any(|kind| {
        matches!(
            kind,
            Kind::Device | Kind::Group | Kind::Container | Kind::Iommu(_)
        )
    })?;
    // `VFIO_TYPE`, `VFIO_BASE`.
    Some(random_ioctl(worker, entry.fd, 0x3B64))
}
