// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a supervisor and the server behind it tell each other beside the client's messages: packets
//! on a socket of kind `SOCK_SEQPACKET`.
//!
//! | packet     | from       | descriptors                           | says                            |
//! |------------|------------|----------------------------------------|---------------------------------|
//! | `Attach`   | server     |                                        | what its device is              |
//! | `Attached` | supervisor | state and areas, if it was served before | it serves now                 |
//! | `Refused`  | supervisor |                                        | it does not, and why            |
//! | `Memory`   | server     | state and areas                        | these are the first server's    |
//! | `Session`  | supervisor | a stream                               | a client is there               |
//! | `Closed`   | server     | areas                                  | the client is wound up          |
//!
//! The stream carries vfio-user messages, each behind a [`Prefix`](super::link::Prefix). Its end is
//! that of the client. Every command on it is answered, also those whose sender wants no reply.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno as Number;
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use zerocopy::{FromBytes, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::Malformed;
use crate::region::{Area, AreaKind, RegionInfo};
use crate::sys::ancillary;
use crate::transport::{Description, IrqInfo};

/// Both sides come from the same library as a rule; if not, this says so.
const VERSION: u32 = 1;
/// Bytes of the largest packet.
const MOST_BYTES: usize = 64 << 10;
/// Regions, and interrupt indexes; a PCI device has 9 and 5.
const MOST_INDEXES: u32 = 16;
/// Areas of all regions together (`MUSER_MAX_AREAS`).
const MOST_AREAS: u32 = muser_uapi::MUSER_MAX_AREAS;

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attach {
    /// The device.
    pub(crate) description: Description,
    /// As [`AttachOptions::state_size`](crate::AttachOptions).
    pub(crate) state_size: u64,
    /// As [`AttachOptions::state_tag`](crate::AttachOptions).
    pub(crate) state_tag: u64,
    /// It waits while another server is there.
    pub(crate) standby: bool,
}

/// How a server finds its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    /// The device was served before: its memory comes with the packet.
    pub(crate) recovered: bool,
    /// The server before was winding up a client: that is to be done first.
    pub(crate) closing: bool,
    /// A client is there: a [`Packet::Session`] follows at once.
    pub(crate) session: bool,
}

/// One packet, but for its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    /// See [`Attach`].
    Attach(Attach),
    /// See [`Attached`].
    Attached(Attached),
    /// The server is not wanted, for this errno and sentence.
    Refused(i32, String),
    /// The memory that the device's first server has made: its state, then its areas.
    Memory,
    /// A client is there. So many messages come first that set up what it had set up before.
    Session {
        /// How many.
        setup: u32,
    },
    /// The client is wound up; the areas are new.
    Closed,
}

#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    kind: u32,
    value: u32,
    numbers: [u64; 2],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Counts {
    regions: u32,
    areas: u32,
    irqs: u32,
    flags: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireRegion {
    index: u32,
    flags: u32,
    size: u64,
    areas: u32,
    padding: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireArea {
    offset: u64,
    size: u64,
    kind: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireIrq {
    index: u32,
    count: u32,
    flags: u32,
}

const ATTACH: u32 = 1;
const ATTACHED: u32 = 2;
const REFUSED: u32 = 3;
const MEMORY: u32 = 4;
const SESSION: u32 = 5;
const CLOSED: u32 = 6;

/// The bits of flags in their order.
fn to_bits<const N: usize>(flags: [bool; N]) -> u32 {
    let bits = flags.iter().enumerate();
    bits.fold(0, |bits, (at, flag)| bits | u32::from(*flag) << at)
}

fn bit(bits: u32, at: u32) -> bool {
    bits >> at & 1 == 1
}

impl Packet {
    fn to_bytes(&self) -> Vec<u8> {
        let head = |kind, value, numbers| Head {
            kind,
            value,
            numbers,
        };
        match self {
            Self::Attach(attach) => {
                let numbers = [attach.state_size, attach.state_tag];
                let mut bytes = head(ATTACH, VERSION, numbers).as_bytes().to_vec();
                put_description(&mut bytes, &attach.description, to_bits([attach.standby]));
                bytes
            }
            Self::Attached(attached) => {
                let flags = [attached.recovered, attached.closing, attached.session];
                head(ATTACHED, to_bits(flags), [0; 2]).as_bytes().to_vec()
            }
            Self::Refused(errno, sentence) => {
                let head = head(REFUSED, errno.unsigned_abs(), [0; 2]);
                [head.as_bytes(), sentence.as_bytes()].concat()
            }
            Self::Memory => head(MEMORY, 0, [0; 2]).as_bytes().to_vec(),
            Self::Session { setup } => head(SESSION, *setup, [0; 2]).as_bytes().to_vec(),
            Self::Closed => head(CLOSED, 0, [0; 2]).as_bytes().to_vec(),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let (head, rest) = take::<Head>(bytes)?;
        Ok(match head.kind {
            ATTACH if head.value != VERSION => {
                return Err(Malformed("it is of another version of libmuser"))
            }
            ATTACH => {
                let (description, flags) = parse_description(rest)?;
                Self::Attach(Attach {
                    description,
                    state_size: head.numbers[0],
                    state_tag: head.numbers[1],
                    standby: bit(flags, 0),
                })
            }
            ATTACHED => Self::Attached(Attached {
                recovered: bit(head.value, 0),
                closing: bit(head.value, 1),
                session: bit(head.value, 2),
            }),
            REFUSED => {
                let errno = i32::try_from(head.value).unwrap_or(libc::EIO);
                Self::Refused(errno, String::from_utf8_lossy(rest).into_owned())
            }
            MEMORY => Self::Memory,
            SESSION => Self::Session { setup: head.value },
            CLOSED => Self::Closed,
            _ => return Err(Malformed("it is of no kind that is known here")),
        })
    }
}

fn take<T: FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), Malformed> {
    T::read_from_prefix(bytes).map_err(|_| Malformed("it is too short"))
}

fn put_description(bytes: &mut Vec<u8>, description: &Description, flags: u32) {
    let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    let areas = || description.regions.iter().flat_map(|region| &region.areas);
    let counts = Counts {
        regions: count(description.regions.len()),
        areas: count(areas().count()),
        irqs: count(description.irqs.len()),
        flags,
    };
    bytes.extend(counts.as_bytes());
    for region in &description.regions {
        let region = WireRegion {
            index: region.index,
            flags: to_bits([region.readable, region.writable]),
            size: region.size,
            areas: count(region.areas.len()),
            padding: 0,
        };
        bytes.extend(region.as_bytes());
    }
    for area in areas() {
        let kind = match area.kind {
            AreaKind::Mappable => 0,
            AreaKind::Doorbell => 1,
        };
        let (offset, size) = (area.offset, area.size);
        bytes.extend(WireArea { offset, size, kind }.as_bytes());
    }
    for irq in &description.irqs {
        let irq = WireIrq {
            index: irq.index,
            count: irq.count,
            flags: to_bits([irq.maskable, irq.automasked, irq.noresize]),
        };
        bytes.extend(irq.as_bytes());
    }
}

fn parse_description(bytes: &[u8]) -> Result<(Description, u32), Malformed> {
    let (counts, mut rest) = take::<Counts>(bytes)?;
    let most = [
        (counts.regions, MOST_INDEXES),
        (counts.areas, MOST_AREAS),
        (counts.irqs, MOST_INDEXES),
    ];
    if most.iter().any(|(count, most)| count > most) {
        return Err(Malformed("it describes more than a device has"));
    }
    let mut regions = Vec::new();
    let mut places = Vec::new();
    for _ in 0..counts.regions {
        let (region, behind) = take::<WireRegion>(rest)?;
        rest = behind;
        places.push(region.areas);
        regions.push(RegionInfo {
            index: region.index,
            size: region.size,
            readable: bit(region.flags, 0),
            writable: bit(region.flags, 1),
            areas: Vec::new(),
        });
    }
    let all: u64 = places.iter().map(|areas| u64::from(*areas)).sum();
    if all != u64::from(counts.areas) {
        return Err(Malformed("its areas are not those of its regions"));
    }
    for (region, areas) in regions.iter_mut().zip(places) {
        for _ in 0..areas {
            let (area, behind) = take::<WireArea>(rest)?;
            rest = behind;
            region.areas.push(Area {
                offset: area.offset,
                size: area.size,
                kind: match area.kind {
                    0 => AreaKind::Mappable,
                    1 => AreaKind::Doorbell,
                    _ => return Err(Malformed("an area is of no kind that is known here")),
                },
            });
        }
    }
    let mut irqs = Vec::new();
    for _ in 0..counts.irqs {
        let (irq, behind) = take::<WireIrq>(rest)?;
        rest = behind;
        irqs.push(IrqInfo {
            maskable: bit(irq.flags, 0),
            automasked: bit(irq.flags, 1),
            noresize: bit(irq.flags, 2),
            ..IrqInfo::new(irq.index, irq.count)
        });
    }
    let description = Description {
        regions,
        irqs,
        // A supervisor offers none.
        io_events: Vec::new(),
    };
    Ok((description, counts.flags))
}

/// Sends a packet, without waiting.
///
/// # Errors
///
/// Those of `sendmsg`: `EAGAIN` when the other side does not receive.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    packet: &Packet,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Number> {
    let bytes = packet.to_bytes();
    let parts = [std::io::IoSlice::new(&bytes)];
    let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights: &[_] = if numbers.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &parts, rights, flags, None) {
            Err(Number::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

/// What came on a control socket.
#[derive(Debug)]
pub(crate) enum Received {
    /// Nothing yet.
    Nothing,
    /// A packet with its descriptors.
    Packet(Packet, Vec<OwnedFd>),
    /// The other side has gone.
    Closed,
    /// Nonsense.
    Malformed(Malformed),
}

/// Receives a packet, without waiting.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> Received {
    let mut bytes = vec![0; MOST_BYTES];
    let mut descriptors = Vec::new();
    let received = loop {
        match ancillary::receive(socket, &mut bytes, &mut descriptors) {
            Err(Number::EINTR) => {}
            Err(Number::EAGAIN) => return Received::Nothing,
            Err(_) => return Received::Closed,
            Ok(received) => break received,
        }
    };
    if received.bytes == 0 {
        return Received::Closed;
    }
    if received.truncated {
        return Received::Malformed(Malformed("there was no room for its descriptors"));
    }
    match Packet::parse(&bytes[..received.bytes]) {
        Ok(packet) => Received::Packet(packet, descriptors),
        Err(malformed) => Received::Malformed(malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, Msix, PciBuilder};
    use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    fn attach() -> Packet {
        let bar = Bar::memory32(0x4000).mappable(0x1000..0x2000);
        let builder = PciBuilder::new(1, 2).bar(0, bar.doorbells(0..4));
        let builder = builder.bar(1, Bar::memory32(0x1000));
        let model = builder.msix(Msix::new(4).table(1, 0).pba(1, 0x800));
        Packet::Attach(Attach {
            description: model.build().unwrap().description().clone(),
            state_size: 7,
            state_tag: 8,
            standby: true,
        })
    }

    fn all() -> Vec<Packet> {
        let attached = Attached {
            recovered: true,
            closing: false,
            session: true,
        };
        vec![
            attach(),
            Packet::Attached(attached),
            Packet::Refused(libc::ESTALE, "it differs".into()),
            Packet::Memory,
            Packet::Session { setup: 3 },
            Packet::Closed,
        ]
    }

    #[test]
    fn packet_is_what_it_was() {
        for packet in all() {
            assert_eq!(Packet::parse(&packet.to_bytes()), Ok(packet));
        }
    }

    #[test]
    fn description_cut_anywhere_is_refused() {
        let bytes = attach().to_bytes();
        for len in 0..bytes.len() {
            assert!(Packet::parse(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn packets_come_with_their_descriptors_until_the_end() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let (one, other) = pair.unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = [file.as_fd(), file.as_fd()];
        send(one.as_fd(), &Packet::Memory, &fds).unwrap();
        drop(one);

        let Received::Packet(Packet::Memory, descriptors) = receive(other.as_fd()) else {
            panic!("no packet");
        };
        assert_eq!(descriptors.len(), 2);
        drop(descriptors);
        assert!(matches!(receive(other.as_fd()), Received::Closed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Packet::parse(&bytes);
        }

        #[test]
        fn no_change_of_a_description_panics(at in 0_usize..400, value: u8) {
            let mut bytes = attach().to_bytes();
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            let _ = Packet::parse(&bytes);
        }
    }
}
