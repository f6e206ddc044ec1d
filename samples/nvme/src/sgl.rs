// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scatter-gather lists: where a command's data is, piece by piece (section 4.4).

use crate::prp::{push, Pieces, Read};
use crate::spec::Status;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// Most descriptors of a command: enough for a page of each.
pub(crate) const DESCRIPTORS: usize = 512;
/// Segments that are followed, so that none which has no data goes round for ever.
const SEGMENTS: usize = 64;

// Types (figure 113).
const DATA: u8 = 0;
const SEGMENT: u8 = 2;
const LAST_SEGMENT: u8 = 3;

/// A descriptor as it is read.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    kind: u8,
    subtype: u8,
}

impl Descriptor {
    fn new(bytes: &[u8]) -> Self {
        let word = |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk);
        let long = word(0).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let len = bytes.get(8..).and_then(<[u8]>::first_chunk);
        let last = bytes.get(15).copied().unwrap_or(0xff);
        Self {
            address: long,
            len: len.map_or(0, |bytes| u32::from_le_bytes(*bytes)),
            kind: last >> 4,
            subtype: last & 0xf,
        }
    }
}

/// The pieces of `len` bytes to which a command's descriptor leads. More bytes may be there.
pub(crate) fn pieces(dptr: [u64; 2], len: usize, read: &mut Read<'_>) -> Result<Pieces, Status> {
    let mut walk = Walk {
        pieces: Vec::new(),
        left: len,
        seen: 0,
    };
    let bytes = dptr.map(u64::to_le_bytes);
    let first = Descriptor::new(bytes.as_flattened());
    let mut segment = match first.kind {
        SEGMENT | LAST_SEGMENT => Some(first),
        _ => {
            walk.data(first)?;
            None
        }
    };
    for _ in 0..SEGMENTS {
        let Some(this) = segment else {
            return walk.end();
        };
        segment = walk.segment(this, read)?;
    }
    match segment {
        None => walk.end(),
        Some(_) => Err(Status::INVALID_SGL_COUNT),
    }
}

struct Walk {
    pieces: Pieces,
    left: usize,
    seen: usize,
}

impl Walk {
    /// Goes through a segment; the next one, if there is one.
    fn segment(
        &mut self,
        this: Descriptor,
        read: &mut Read<'_>,
    ) -> Result<Option<Descriptor>, Status> {
        let len = usize::try_from(this.len).map_err(|_| Status::INVALID_SGL_SEGMENT)?;
        if this.subtype != 0 {
            return Err(Status::INVALID_SGL_TYPE);
        }
        if len == 0 || len % DESCRIPTOR != 0 {
            return Err(Status::INVALID_SGL_SEGMENT);
        }
        self.seen += len / DESCRIPTOR;
        if self.seen > DESCRIPTORS {
            return Err(Status::INVALID_SGL_COUNT);
        }
        let mut bytes = vec![0; len];
        read(this.address, &mut bytes).ok_or(Status::DATA_TRANSFER_ERROR)?;
        let count = len / DESCRIPTOR;
        for (number, bytes) in bytes.chunks_exact(DESCRIPTOR).enumerate() {
            let descriptor = Descriptor::new(bytes);
            let leads_on = matches!(descriptor.kind, SEGMENT | LAST_SEGMENT);
            if !leads_on {
                self.data(descriptor)?;
            } else if number + 1 == count && this.kind == SEGMENT {
                return Ok(Some(descriptor));
            } else {
                return Err(Status::INVALID_SGL_SEGMENT);
            }
        }
        Ok(None)
    }

    fn data(&mut self, descriptor: Descriptor) -> Result<(), Status> {
        if descriptor.subtype != 0 {
            return Err(Status::INVALID_SGL_TYPE);
        }
        let len = usize::try_from(descriptor.len).unwrap_or(usize::MAX);
        if descriptor.kind != DATA {
            return Err(Status::INVALID_SGL_TYPE);
        }
        let part = len.min(self.left);
        if part > 0 {
            push(&mut self.pieces, descriptor.address, part);
            self.left -= part;
        }
        Ok(())
    }

    fn end(self) -> Result<Pieces, Status> {
        match self.left {
            0 => Ok(self.pieces),
            _ => Err(Status::INVALID_SGL_LENGTH),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(address: u64, len: u32, kind: u8) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[15] = kind << 4;
        bytes
    }

    fn dptr(address: u64, len: u32, kind: u8) -> [u64; 2] {
        let bytes = descriptor(address, len, kind);
        [0, 8].map(|at| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u64::from_le_bytes(*b))
        })
    }

    /// Walks a list of segments, which lie 0x1000 bytes apart.
    fn walk(segments: &[Vec<[u8; 16]>], dptr: [u64; 2], len: usize) -> Result<Pieces, Status> {
        pieces(dptr, len, &mut |address, to| {
            let segment = segments.get(usize::try_from(address / 0x1000).ok()?)?;
            let bytes = segment.as_flattened().get(..to.len())?;
            to.copy_from_slice(bytes);
            Some(())
        })
    }

    #[test]
    fn one_block_is_one_piece() {
        let found = walk(&[], dptr(0x1234, 600, DATA), 512).unwrap();

        assert_eq!(found, [(0x1234, 512)]);
    }

    #[test]
    fn segments_are_followed() {
        let first = vec![
            descriptor(0x10, 100, DATA),
            descriptor(0x1000, 32, LAST_SEGMENT),
        ];
        let second = vec![descriptor(0x40, 12, DATA), descriptor(0x4c, 400, DATA)];

        let found = walk(&[first, second], dptr(0, 32, SEGMENT), 512).unwrap();

        // What goes on there is one piece.
        assert_eq!(found, [(0x10, 100), (0x40, 412)]);
    }

    #[test]
    fn too_little_memory_is_said() {
        let result = walk(&[], dptr(0x1234, 511, DATA), 512);

        assert_eq!(result, Err(Status::INVALID_SGL_LENGTH));
    }

    #[test]
    fn segments_in_a_ring_end() {
        let ring = vec![descriptor(0x0, 16, SEGMENT)];

        let result = walk(&[ring], dptr(0, 16, SEGMENT), 512);

        assert_eq!(result, Err(Status::INVALID_SGL_COUNT));
    }

    #[test]
    fn nonsense_is_named() {
        let segment = vec![descriptor(0, 16, SEGMENT), descriptor(0x20, 512, DATA)];
        let segments = [segment];

        let inside = walk(&segments, dptr(0, 32, SEGMENT), 512);
        assert_eq!(inside, Err(Status::INVALID_SGL_SEGMENT));
        let behind_the_last = walk(&segments, dptr(0, 16, LAST_SEGMENT), 512);
        assert_eq!(behind_the_last, Err(Status::INVALID_SGL_SEGMENT));
        let odd = walk(&segments, dptr(0, 17, SEGMENT), 512);
        assert_eq!(odd, Err(Status::INVALID_SGL_SEGMENT));
        let unknown = walk(&segments, dptr(0, 512, 7), 512);
        assert_eq!(unknown, Err(Status::INVALID_SGL_TYPE));
        let huge = walk(&segments, dptr(0, 0xffff_fff0, SEGMENT), 512);
        assert_eq!(huge, Err(Status::INVALID_SGL_COUNT));
        let nothing = walk(&segments, dptr(0x9000, 16, LAST_SEGMENT), 512);
        assert_eq!(nothing, Err(Status::DATA_TRANSFER_ERROR));
    }
}
