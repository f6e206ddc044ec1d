// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Input and output into memory of a host that changes it meanwhile: the only `unsafe` of the sample.

#![expect(
    unsafe_code,
    reason = "system calls with pointers have no safe wrapper here"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{opcode, types, IoUring, Probe};
use libmuser::vm_memory::bitmap::BitmapSlice;
use libmuser::vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};
use libmuser::{DmaSlices, Result};

/// Memory for input or output: the host's own, or a copy.
///
/// # Invariants
///
/// Each of `pieces` lies in memory that stays mapped as long as `memory` lives, and nothing but
/// system calls and volatile copies reach it.
#[derive(Debug)]
pub struct Segments {
    pieces: Vec<libc::iovec>,
    len: usize,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Host { slices: DmaSlices, written: bool },
    Copy(Vec<u8>),
}

// SAFETY: The pointers lead to memory that belongs to no thread.
unsafe impl Send for Segments {}

impl Segments {
    /// The host's memory, which is to be read, or `written` to.
    pub(crate) fn host(slices: DmaSlices, written: bool) -> Result<Self> {
        let mut collector = Collector(Vec::new());
        for slice in slices.iter() {
            if written {
                slice.read_exact_from(&mut collector)?;
            } else {
                slice.write_all_to(&mut collector)?;
            }
        }
        // INVARIANT: the pieces are those of the slices, which keep them mapped.
        Ok(Self {
            pieces: collector.0,
            len: slices.len(),
            memory: Memory::Host { slices, written },
        })
    }

    /// So many bytes of this process.
    pub(crate) fn copy(mut bytes: Vec<u8>) -> Self {
        let piece = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        // INVARIANT: the vector neither grows nor shrinks any more.
        Self {
            pieces: vec![piece],
            len: bytes.len(),
            memory: Memory::Copy(bytes),
        }
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "no command has empty ones")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The bytes, if they are a copy.
    pub(crate) fn copied(&self) -> Option<&[u8]> {
        match &self.memory {
            Memory::Copy(bytes) => Some(bytes),
            Memory::Host { .. } => None,
        }
    }

    /// Copies into what is behind the first `skip` bytes, as far as there is any.
    pub fn fill(&self, skip: usize, from: &[u8]) {
        let mut rest = from;
        for slice in self.slices(skip) {
            let (part, after) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(part);
            rest = after;
        }
    }

    /// Copies out of what is behind the first `skip` bytes, as far as there is any.
    pub fn drain(&self, skip: usize, to: &mut [u8]) {
        let mut rest = to;
        for slice in self.slices(skip) {
            let (part, after) = rest.split_at_mut(rest.len().min(slice.len()));
            slice.copy_to(part);
            rest = after;
        }
    }

    fn slices(&self, skip: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.behind(skip).into_iter().map(|piece| {
            // SAFETY: By the invariant, the piece is memory that stays mapped as long as `self`, and
            // so as long as the slice.
            unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
        })
    }

    /// Records what was written to the host's memory. After it, so that nobody has looked between.
    pub(crate) fn mark_written(&self) -> Result<()> {
        if let Memory::Host {
            slices,
            written: true,
        } = &self.memory
        {
            for slice in slices.iter() {
                slice.read_exact_from(&mut Marker)?;
            }
        }
        Ok(())
    }

    /// The pieces behind the first `skip` bytes, as many as a system call takes.
    fn behind(&self, mut skip: usize) -> Vec<libc::iovec> {
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let gone = skip.min(piece.iov_len);
            skip -= gone;
            if gone < piece.iov_len {
                pieces.push(libc::iovec {
                    iov_base: piece.iov_base.wrapping_byte_add(gone),
                    iov_len: piece.iov_len - gone,
                });
            }
        }
        pieces.truncate(IOV_MAX);
        pieces
    }
}

/// `UIO_MAXIOV` of `<linux/uio.h>`.
const IOV_MAX: usize = 1024;

/// Takes down where memory is, as if it were read and written.
struct Collector(Vec<libc::iovec>);

impl Collector {
    fn take(&mut self, base: *mut libc::c_void, len: usize) -> usize {
        self.0.push(libc::iovec {
            iov_base: base,
            iov_len: len,
        });
        len
    }
}

impl ReadVolatile for Collector {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<'_, B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        Ok(self.take(to.ptr_guard_mut().as_ptr().cast(), to.len()))
    }
}

impl WriteVolatile for Collector {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        from: &VolatileSlice<'_, B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        Ok(self.take(from.ptr_guard().as_ptr().cast_mut().cast(), from.len()))
    }
}

/// Records memory as written.
struct Marker;

impl ReadVolatile for Marker {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<'_, B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        to.bitmap().mark_dirty(0, to.len());
        Ok(to.len())
    }
}

/// Reads from a file into what is behind the first `skip` bytes; how many, which may be too few.
pub(crate) fn read(file: BorrowedFd<'_>, at: u64, to: &Segments, skip: usize) -> io::Result<usize> {
    let (at, pieces) = (offset(at)?, to.behind(skip));
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(0);
    // SAFETY: By the invariant of the segments, the pieces are memory that may be written to.
    result(unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count, at) })
}

/// Writes what is behind the first `skip` bytes to a file, as [`read`]; `durable`: to the medium.
pub(crate) fn write(
    file: BorrowedFd<'_>,
    at: u64,
    from: &Segments,
    skip: usize,
    durable: bool,
) -> io::Result<usize> {
    let (at, pieces) = (offset(at)?, from.behind(skip));
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(0);
    let (fd, flags) = (file.as_raw_fd(), write_flags(durable));
    // SAFETY: By the invariant of the segments, the pieces are memory that may be read.
    result(unsafe { libc::pwritev2(fd, pieces.as_ptr(), count, at, flags) })
}

fn write_flags(durable: bool) -> libc::c_int {
    if durable {
        libc::RWF_DSYNC
    } else {
        0
    }
}

fn offset(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn result(count: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// What is to be done by a [`Ring`].
#[derive(Debug)]
pub(crate) enum Entry {
    Read(Segments),
    Write(Segments, bool),
    Flush,
}

/// Something that a [`Ring`] has done.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) number: usize,
    /// Bytes, or a negated errno.
    pub(crate) result: i32,
    /// What was read into or written from.
    pub(crate) segments: Option<Segments>,
}

/// Input and output by io_uring.
///
/// # Invariants
///
/// Of each entry that the kernel has, the segments are in `held`, at its number.
pub(crate) struct Ring {
    ring: IoUring,
    held: Vec<Option<Option<Segments>>>,
    polling: bool,
}

/// Says that a completion is that of the wake-up.
const WAKE: u64 = u64::MAX;

impl Ring {
    /// A ring for so many entries at a time.
    ///
    /// # Errors
    ///
    /// The kernel has none, or none that does what is needed, or does not give one to this process.
    pub(crate) fn new(entries: usize) -> io::Result<Self> {
        let count = u32::try_from(entries + 1).unwrap_or(u32::MAX);
        let ring = IoUring::new(count.next_power_of_two())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::PollAdd::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            held: (0..entries).map(|_| None).collect(),
            polling: false,
        })
    }

    /// Starts something under a number below that of the entries, which nothing else has.
    pub(crate) fn start(
        &mut self,
        number: usize,
        file: BorrowedFd<'_>,
        at: u64,
        entry: Entry,
    ) -> io::Result<()> {
        let Some(place @ None) = self.held.get_mut(number) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let fd = types::Fd(file.as_raw_fd());
        let count =
            |segments: &Segments| u32::try_from(segments.pieces.len().min(IOV_MAX)).unwrap_or(0);
        let (prepared, segments) = match entry {
            Entry::Read(to) => {
                let read = opcode::Readv::new(fd, to.pieces.as_ptr(), count(&to));
                (read.offset(at).build(), Some(to))
            }
            Entry::Write(from, durable) => {
                let write = opcode::Writev::new(fd, from.pieces.as_ptr(), count(&from));
                let write = write.offset(at).rw_flags(write_flags(durable));
                (write.build(), Some(from))
            }
            Entry::Flush => {
                let flush = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
                (flush.build(), None)
            }
        };
        // INVARIANT: held before the kernel has it; moving it leaves the pieces where they are.
        *place = Some(segments);
        let prepared = prepared.user_data(number as u64);
        // SAFETY: By the invariant, the pieces and the memory that they are of stay until the
        // completion, and until the end of the ring.
        let pushed = unsafe { self.ring.submission().push(&prepared) };
        pushed.map_err(|_| {
            self.held[number] = None;
            io::Error::from_raw_os_error(libc::EAGAIN)
        })
    }

    /// Waits until something is done, or `wake` is readable; `done` is told of each.
    pub(crate) fn wait(
        &mut self,
        wake: BorrowedFd<'_>,
        done: &mut dyn FnMut(Done),
    ) -> io::Result<()> {
        if !self.polling {
            let fd = types::Fd(wake.as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLIN.unsigned_abs().into()).build();
            // SAFETY: A poll has no memory.
            let pushed = unsafe { self.ring.submission().push(&poll.user_data(WAKE)) };
            // Without room, something is about to be done.
            self.polling = pushed.is_ok();
        }
        match self.ring.submit_and_wait(1) {
            Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
            _ => {}
        }
        self.reap(done);
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Done)) {
        for completion in self.ring.completion() {
            let Ok(number) = usize::try_from(completion.user_data()) else {
                continue;
            };
            match self.held.get_mut(number).and_then(Option::take) {
                Some(segments) => done(Done {
                    number,
                    result: completion.result(),
                    segments,
                }),
                None => self.polling = false,
            }
        }
    }
}

/// The kernel may use the memory of what it has until it is done.
impl Drop for Ring {
    fn drop(&mut self) {
        while self.held.iter().any(Option::is_some) {
            if let Err(error) = self.ring.submit_and_wait(1) {
                if error.raw_os_error() != Some(libc::EINTR) {
                    // Which memory is still in use, nobody can say.
                    log::error!("io_uring: {error}");
                    std::process::abort();
                }
            }
            self.reap(&mut drop);
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
