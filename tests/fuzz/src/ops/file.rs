// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What processes do with any descriptor and any mapping.

use std::io;

use crate::content;
use crate::sys::{self, int, PAGE, WINDOW};
use crate::worker::{Kind, Mapped, Worker};

/// Bytes that a look at a mapping takes.
const LOOK: usize = 64;

pub(super) fn map_memory(worker: &mut Worker) -> Option<io::Result<u64>> {
    let window = worker.window();
    let len = PAGE << (3 + worker.random.below(5));
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let protection = *worker.random.pick(&[
        read_write,
        read_write,
        read_write,
        libc::PROT_READ,
        libc::PROT_NONE,
    ]);
    let share = *worker.random.pick(&[libc::MAP_PRIVATE, libc::MAP_SHARED]);
    let result = if worker.chance(60) {
        let flags = share | libc::MAP_ANONYMOUS;
        worker.arena.map(window, len, protection, flags, -1, 0)
    } else {
        let file = worker.any(|kind| kind == Kind::Memory).map(|file| file.fd);
        let fd = match file {
            Some(fd) => fd,
            None => memory_file(worker)?,
        };
        worker.arena.map(window, len, protection, share, fd, 0)
    };
    if result.is_ok() {
        worker.windows[window] = Mapped::Plain;
    }
    Some(result)
}

/// A file of tmpfs that is as large as a window.
fn memory_file(worker: &mut Worker) -> Option<i32> {
    let name = c"fuzz".as_ptr().expose_provenance() as u64;
    let fd = sys::call(libc::SYS_memfd_create, [name, 0, 0, 0, 0, 0]).ok()?;
    let len = WINDOW as u64;
    sys::call(libc::SYS_ftruncate, [fd, len, 0, 0, 0, 0]).ok()?;
    Some(worker.keep(fd, Kind::Memory, 0))
}

/// Any file at any offset, with any protection.
pub(super) fn map_garbage(worker: &mut Worker) -> Option<io::Result<u64>> {
    let entry = worker.any(|_| true)?;
    let window = worker.window();
    let len = PAGE << worker.random.below(9);
    let offset = worker.number() & !0xFFF;
    let protection = (worker.random.next() & 7) as i32;
    let flags = *worker.random.pick(&[libc::MAP_PRIVATE, libc::MAP_SHARED]);
    let result = worker
        .arena
        .map(window, len, protection, flags, entry.fd, offset);
    // Whatever it shows may be what the kernel defines.
    worker.windows[window] = if result.is_ok() {
        Mapped::Window
    } else {
        Mapped::Nothing
    };
    Some(result)
}

pub(super) fn read_memory(worker: &mut Worker) -> Option<io::Result<u64>> {
    let window = worker.window();
    let mapped = worker.windows[window];
    if mapped == Mapped::Nothing && worker.chance(95) {
        return None;
    }
    let offset = worker.random.below(40) as usize * PAGE / 2;
    let Some(bytes) = worker.arena.read(window, offset, LOOK) else {
        return Some(Err(io::Error::from_raw_os_error(libc::EFAULT)));
    };
    let strange = match mapped {
        Mapped::Plain => content::strange(&bytes),
        // Behind the slots' heads, wherever they are.
        Mapped::Slots | Mapped::Window | Mapped::Nothing => content::leaked(&bytes),
        // `muser_status` is shorter than this, and the page has nothing else.
        Mapped::Status if offset >= 256 => bytes
            .iter()
            .any(|&byte| byte != 0)
            .then(|| "behind the status there is something".to_owned()),
        Mapped::Status => content::leaked(&bytes),
    };
    if let Some(strange) = strange {
        worker.found(&format!("{mapped:?} at {offset:#x}: {strange}"));
    }
    Some(Ok(LOOK as u64))
}

pub(super) fn write_memory(worker: &mut Worker) -> Option<io::Result<u64>> {
    let window = worker.window();
    if worker.windows[window] == Mapped::Nothing && worker.chance(95) {
        return None;
    }
    let offset = worker.random.below(40) as usize * PAGE / 2;
    // A slot's head is scribbled over as well.
    let bytes = content::bytes(&mut worker.random, LOOK);
    if worker.arena.write(window, offset, &bytes) {
        Some(Ok(LOOK as u64))
    } else {
        // The bytes are in a page of the arena's own now, which took the place of the kernel's.
        worker.windows[window] = worker.windows[window].beside(Mapped::Plain);
        Some(Err(io::Error::from_raw_os_error(libc::EFAULT)))
    }
}

pub(super) fn remap(worker: &mut Worker) -> Option<io::Result<u64>> {
    let from = worker.window();
    if worker.windows[from] == Mapped::Nothing {
        return None;
    }
    let to = if worker.chance(50) {
        from
    } else {
        worker.window()
    };
    let (old, new) = (
        PAGE << worker.random.below(8),
        PAGE << worker.random.below(8),
    );
    let result = worker.arena.remap(from, old, new, to);
    if result.is_ok() && from != to {
        // Behind what was moved there is still what the target had.
        worker.windows[to] = worker.windows[to].beside(worker.windows[from]);
        worker.windows[from] = Mapped::Nothing;
    } else if from != to {
        worker.windows[to] = Mapped::Nothing;
    }
    Some(result)
}

pub(super) fn unmap(worker: &mut Worker) -> Option<io::Result<u64>> {
    let window = worker.window();
    if worker.windows[window] == Mapped::Nothing {
        return None;
    }
    if worker.chance(50) {
        worker.windows[window] = Mapped::Nothing;
        return Some(worker.arena.unmap(window, 0, WINDOW));
    }
    let (offset, len) = part(worker);
    Some(worker.arena.unmap(window, offset, len))
}

fn part(worker: &mut Worker) -> (usize, usize) {
    let offset = worker.random.below(16) as usize * PAGE;
    (offset, (1 + worker.random.below(8) as usize) * PAGE)
}

pub(super) fn protect(worker: &mut Worker) -> Option<io::Result<u64>> {
    let window = worker.window();
    if worker.windows[window] == Mapped::Nothing {
        return None;
    }
    let (offset, len) = part(worker);
    let protection = *worker.random.pick(&[
        libc::PROT_READ | libc::PROT_WRITE,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::PROT_READ,
        libc::PROT_NONE,
        libc::PROT_READ | libc::PROT_EXEC,
    ]);
    Some(worker.arena.protect(window, offset, len, protection))
}

pub(super) fn advise(worker: &mut Worker) -> Option<io::Result<u64>> {
    let window = worker.window();
    if worker.windows[window] == Mapped::Nothing {
        return None;
    }
    let (offset, len) = part(worker);
    let advice = *worker.random.pick(&[
        libc::MADV_DONTNEED,
        libc::MADV_WILLNEED,
        libc::MADV_DONTFORK,
        libc::MADV_DOFORK,
        libc::MADV_REMOVE,
        libc::MADV_POPULATE_WRITE,
        libc::MADV_PAGEOUT,
    ]);
    Some(worker.arena.advise(window, offset, len, advice))
}

/// read(2) and write(2), which only eventfds and devices know.
pub(super) fn read_file(worker: &mut Worker) -> Option<io::Result<u64>> {
    // An eventfd at 0 would wait.
    let entry = worker.any(|kind| matches!(kind, Kind::Node | Kind::Device | Kind::Group))?;
    let mut buffer = content::bytes(&mut worker.random, LOOK);
    let address = buffer.as_mut_ptr().expose_provenance() as u64;
    let number = *worker.random.pick(&[libc::SYS_read, libc::SYS_write]);
    Some(sys::call(
        number,
        [int(entry.fd), address, LOOK as u64, 0, 0, 0],
    ))
}

pub(super) fn duplicate(worker: &mut Worker) -> Option<io::Result<u64>> {
    let entry = worker.any(|_| true)?;
    let result = sys::call(libc::SYS_dup, [int(entry.fd), 0, 0, 0, 0, 0]);
    if let Ok(fd) = result {
        worker.keep(fd, entry.kind, entry.device);
    }
    Some(result)
}

pub(super) fn close(worker: &mut Worker) -> Option<io::Result<u64>> {
    if worker.files.is_empty() {
        return None;
    }
    let at = worker.random.below(worker.files.len() as u64) as usize;
    let entry = worker.files.swap_remove(at);
    Some(sys::close(entry.fd))
}

pub(super) fn fork(worker: &mut Worker) -> Option<io::Result<u64>> {
    Some(worker.fork())
}
