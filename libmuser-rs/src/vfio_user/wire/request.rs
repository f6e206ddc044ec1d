// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the two sides ask each other, parsed: nothing in these types contradicts itself.
//!
//! Whether there is such a region or such a vector, and whether the sender may ask for it, is for
//! the receiver to say.

use zerocopy::FromBytes;

use super::payload::{self, take};
use super::{Command, Malformed};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientRequest<'a> {
    /// Proposes a version and [capabilities](crate::vfio_user::capabilities).
    Version(Version<'a>),
    /// Lets the device use memory.
    DmaMap(DmaMap),
    /// Takes memory back.
    DmaUnmap(DmaUnmap),
    /// Asks what kind of device it is.
    DeviceInfo(Query),
    /// Asks about a region.
    RegionInfo(Query),
    /// Asks which writes to a region can come by eventfd.
    RegionIoFds(Query),
    /// Asks about an interrupt index.
    IrqInfo(Query),
    /// Sets up interrupts.
    SetIrqs(SetIrqs<'a>),
    /// Reads from a region.
    RegionRead(RegionAccess),
    /// Writes to a region, as many bytes as `count` says.
    RegionWrite(RegionAccess, &'a [u8]),
    /// Resets the device.
    Reset,
    /// Writes several times.
    WriteMulti(WriteMulti<'a>),
    /// Gets, sets or probes a feature.
    Feature(Feature<'a>),
    /// Reads the state of a device that migrates.
    MigDataRead,
    /// Writes the state of a device that migrates.
    MigDataWrite,
}

/// What a server asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerRequest<'a> {
    /// Reads the client's memory.
    DmaRead(DmaAccess),
    /// Writes the client's memory, as many bytes as `count` says.
    DmaWrite(DmaAccess, &'a [u8]),
}

/// A version, and what else is proposed with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version<'a> {
    /// Another one means another protocol.
    pub major: u16,
    /// That of the protocol's additions.
    pub minor: u16,
    /// JSON, without the NUL; empty if there is none.
    pub data: &'a [u8],
}

impl<'a> Version<'a> {
    /// Parses the payload of a command or a reply.
    ///
    /// # Errors
    ///
    /// It is too short, or there is data that does not end with a NUL.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let (fixed, data) = take::<payload::Version>(payload)?;
        let data = match data.iter().position(|byte| *byte == 0) {
            Some(end) => &data[..end],
            None if data.is_empty() => data,
            None => return Err(Malformed("the version data has no NUL at its end")),
        };
        Ok(Self {
            major: fixed.major,
            minor: fixed.minor,
            data,
        })
    }
}

/// Memory for the device to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// Whether the device may read.
    pub reads: bool,
    /// Whether the device may write.
    pub writes: bool,
    /// First byte in the file.
    pub offset: u64,
    /// First IOVA.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Memory that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Bytes that the reply's payload may have.
    pub argsz: u32,
    /// First IOVA; 0 if it is all.
    pub address: u64,
    /// Bytes; 0 if it is all.
    pub size: u64,
    /// Everything goes, whatever it is.
    pub all: bool,
    /// The bitmap of dirty pages that the reply is to have.
    pub bitmap: Option<payload::Bitmap>,
}

/// A question about one of several things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Bytes that the reply's payload may have: the fixed part at least.
    pub argsz: u32,
    /// Which of them; 0 if there is one only.
    pub index: u32,
}

/// What is done with vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqAction {
    /// They are held back.
    Mask,
    /// They are let through.
    Unmask,
    /// They are fired, or it is said what happens then.
    Trigger,
}

/// With which vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// All of them.
    None,
    /// Those whose byte is not 0. As many bytes as vectors.
    Bools(&'a [u8]),
    /// Each has a descriptor in the message, or none has.
    EventFds,
}

/// What is done with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// The index.
    pub index: u32,
    /// The first vector.
    pub start: u32,
    /// Vectors.
    pub count: u32,
    /// What is done.
    pub action: IrqAction,
    /// With which of the vectors.
    pub data: IrqData<'a>,
}

/// Bytes of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// The region's index.
    pub region: u32,
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub count: u32,
}

/// Bytes of the client's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaAccess {
    /// First IOVA.
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

/// Writes, one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteMulti<'a> {
    /// Structures of 24 bytes, each of which is sound.
    entries: &'a [u8],
}

/// A write of up to 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallWrite {
    /// Where, and how many bytes: not more than 8.
    pub access: RegionAccess,
    data: [u8; 8],
}

/// What is done with a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature<'a> {
    /// Bytes that the reply's payload may have.
    pub argsz: u32,
    /// Which one.
    pub index: u16,
    /// Asks for its data.
    pub get: bool,
    /// Sets its data.
    pub set: bool,
    /// Asks only whether the others would work. Without it, one of them is true, not both.
    pub probe: bool,
    /// Data of the feature.
    pub data: &'a [u8],
}

impl<'a> ClientRequest<'a> {
    /// Parses the payload of a command; `None` if that is none of a client's.
    ///
    /// # Errors
    ///
    /// The payload can't be what the command wants.
    pub fn parse(command: Command, payload: &'a [u8]) -> Result<Option<Self>, Malformed> {
        Ok(Some(match command {
            Command::Version => Self::Version(Version::parse(payload)?),
            Command::DmaMap => Self::DmaMap(dma_map(payload)?),
            Command::DmaUnmap => Self::DmaUnmap(dma_unmap(payload)?),
            Command::DeviceGetInfo => Self::DeviceInfo(device_info(payload)?),
            Command::DeviceGetRegionInfo => Self::RegionInfo(region_info(payload)?),
            Command::DeviceGetRegionIoFds => Self::RegionIoFds(region_io_fds(payload)?),
            Command::DeviceGetIrqInfo => Self::IrqInfo(irq_info(payload)?),
            Command::DeviceSetIrqs => Self::SetIrqs(set_irqs(payload)?),
            Command::RegionRead => {
                let (access, rest) = region_access(payload)?;
                nothing(rest)?;
                Self::RegionRead(access)
            }
            Command::RegionWrite => {
                let (access, data) = region_access(payload)?;
                if u64::from(access.count) != data.len() as u64 {
                    return Err(Malformed("there are not as many bytes as it counts"));
                }
                Self::RegionWrite(access, data)
            }
            Command::DeviceReset => {
                nothing(payload)?;
                Self::Reset
            }
            Command::RegionWriteMulti => Self::WriteMulti(write_multi(payload)?),
            Command::DeviceFeature => Self::Feature(feature(payload)?),
            Command::MigDataRead => {
                take::<payload::MigrationData>(payload)?;
                Self::MigDataRead
            }
            Command::MigDataWrite => {
                take::<payload::MigrationData>(payload)?;
                Self::MigDataWrite
            }
            Command::DmaRead | Command::DmaWrite => return Ok(None),
        }))
    }
}

impl<'a> ServerRequest<'a> {
    /// Parses the payload of a command; `None` if that is none of a server's.
    ///
    /// # Errors
    ///
    /// The payload can't be what the command wants.
    pub fn parse(command: Command, payload: &'a [u8]) -> Result<Option<Self>, Malformed> {
        if command.is_clients() {
            return Ok(None);
        }
        let (fixed, data) = take::<payload::DmaAccess>(payload)?;
        let access = DmaAccess {
            address: fixed.address,
            count: fixed.count,
        };
        if access.address.checked_add(access.count).is_none() {
            return Err(Malformed("the range ends beyond 2^64"));
        }
        if command == Command::DmaRead {
            nothing(data)?;
            return Ok(Some(Self::DmaRead(access)));
        }
        if access.count != data.len() as u64 {
            return Err(Malformed("there are not as many bytes as it counts"));
        }
        Ok(Some(Self::DmaWrite(access, data)))
    }
}

impl WriteMulti<'_> {
    /// Bytes of a write in the message.
    const ENTRY: usize = size_of::<payload::WriteOne>();

    /// Those of a payload that was parsed before.
    #[must_use]
    pub(crate) fn of(payload: &[u8]) -> Option<WriteMulti<'_>> {
        let entries = payload.get(size_of::<payload::WriteMulti>()..)?;
        Some(WriteMulti { entries })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len() / Self::ENTRY
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The write of this number.
    #[must_use]
    pub fn nth(&self, number: usize) -> Option<SmallWrite> {
        let start = number.checked_mul(Self::ENTRY)?;
        let (entry, _) = payload::WriteOne::read_from_prefix(self.entries.get(start..)?).ok()?;
        Some(SmallWrite {
            access: RegionAccess {
                region: entry.region,
                offset: entry.offset,
                count: entry.count,
            },
            data: entry.data,
        })
    }
}

impl SmallWrite {
    /// What is written.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        let count = usize::try_from(self.access.count).unwrap_or(usize::MAX);
        self.data.get(..count).unwrap_or(&self.data)
    }
}

fn nothing(rest: &[u8]) -> Result<(), Malformed> {
    if rest.is_empty() {
        return Ok(());
    }
    Err(Malformed("there is more than the command has"))
}

fn room(argsz: u32, fixed: usize) -> Result<u32, Malformed> {
    if (argsz as usize) < fixed {
        return Err(Malformed("argsz has no room for the fixed part"));
    }
    Ok(argsz)
}

fn dma_map(payload: &[u8]) -> Result<DmaMap, Malformed> {
    let (fixed, rest) = take::<payload::DmaMap>(payload)?;
    nothing(rest)?;
    room(fixed.argsz, size_of::<payload::DmaMap>())?;
    if fixed.flags & !(payload::DmaMap::READ | payload::DmaMap::WRITE) != 0 {
        return Err(Malformed("there are flags that no mapping has"));
    }
    Ok(DmaMap {
        reads: fixed.flags & payload::DmaMap::READ != 0,
        writes: fixed.flags & payload::DmaMap::WRITE != 0,
        offset: fixed.offset,
        address: fixed.address,
        size: fixed.size,
    })
}

fn dma_unmap(payload: &[u8]) -> Result<DmaUnmap, Malformed> {
    let (fixed, rest) = take::<payload::DmaUnmap>(payload)?;
    room(fixed.argsz, size_of::<payload::DmaUnmap>())?;
    if fixed.flags & !(payload::DmaUnmap::DIRTY_BITMAP | payload::DmaUnmap::ALL) != 0 {
        return Err(Malformed("there are flags that no unmapping has"));
    }
    let all = fixed.flags & payload::DmaUnmap::ALL != 0;
    let wants_bitmap = fixed.flags & payload::DmaUnmap::DIRTY_BITMAP != 0;
    if all && (wants_bitmap || fixed.address != 0 || fixed.size != 0) {
        return Err(Malformed("all is unmapped, and yet a range is"));
    }
    let (bitmap, rest) = if wants_bitmap {
        let (bitmap, rest) = take::<payload::Bitmap>(rest)?;
        (Some(bitmap), rest)
    } else {
        (None, rest)
    };
    nothing(rest)?;
    Ok(DmaUnmap {
        argsz: fixed.argsz,
        address: fixed.address,
        size: fixed.size,
        all,
        bitmap,
    })
}

// Fields which a request has to leave zero are not looked at, and clients may send more bytes than
// there are fields: SPDK sends as many as it has room for in the reply.

fn device_info(payload: &[u8]) -> Result<Query, Malformed> {
    let (fixed, _) = take::<payload::DeviceInfo>(payload)?;
    let argsz = room(fixed.argsz, size_of::<payload::DeviceInfo>())?;
    Ok(Query { argsz, index: 0 })
}

fn region_info(payload: &[u8]) -> Result<Query, Malformed> {
    let (fixed, _) = take::<payload::RegionInfo>(payload)?;
    let argsz = room(fixed.argsz, size_of::<payload::RegionInfo>())?;
    let index = fixed.index;
    Ok(Query { argsz, index })
}

fn region_io_fds(payload: &[u8]) -> Result<Query, Malformed> {
    let (fixed, _) = take::<payload::RegionIoFds>(payload)?;
    let argsz = room(fixed.argsz, size_of::<payload::RegionIoFds>())?;
    if fixed.flags != 0 || fixed.count != 0 {
        return Err(Malformed("flags and count of the request are not 0"));
    }
    let index = fixed.index;
    Ok(Query { argsz, index })
}

fn irq_info(payload: &[u8]) -> Result<Query, Malformed> {
    let (fixed, _) = take::<payload::IrqInfo>(payload)?;
    let argsz = room(fixed.argsz, size_of::<payload::IrqInfo>())?;
    let index = fixed.index;
    Ok(Query { argsz, index })
}

fn set_irqs(payload: &[u8]) -> Result<SetIrqs<'_>, Malformed> {
    use payload::IrqSet;
    const DATA: u32 = IrqSet::DATA_NONE | IrqSet::DATA_BOOL | IrqSet::DATA_EVENTFD;
    const ACTION: u32 = IrqSet::MASK | IrqSet::UNMASK | IrqSet::TRIGGER;
    let (fixed, rest) = take::<IrqSet>(payload)?;
    room(fixed.argsz, size_of::<IrqSet>())?;
    if fixed.flags & !(DATA | ACTION) != 0 {
        return Err(Malformed("there are flags that no interrupt has"));
    }
    let action = match fixed.flags & ACTION {
        IrqSet::MASK => IrqAction::Mask,
        IrqSet::UNMASK => IrqAction::Unmask,
        IrqSet::TRIGGER => IrqAction::Trigger,
        _ => return Err(Malformed("it has not one action")),
    };
    let data = match fixed.flags & DATA {
        IrqSet::DATA_NONE => IrqData::None,
        IrqSet::DATA_BOOL => {
            let count = usize::try_from(fixed.count).unwrap_or(usize::MAX);
            let bools = rest.get(..count);
            IrqData::Bools(bools.ok_or(Malformed("there is not a byte for each vector"))?)
        }
        IrqSet::DATA_EVENTFD => IrqData::EventFds,
        _ => return Err(Malformed("it has not one kind of data")),
    };
    if fixed.start.checked_add(fixed.count).is_none() {
        return Err(Malformed("the vectors end beyond 2^32"));
    }
    Ok(SetIrqs {
        index: fixed.index,
        start: fixed.start,
        count: fixed.count,
        action,
        data,
    })
}

fn region_access(payload: &[u8]) -> Result<(RegionAccess, &[u8]), Malformed> {
    let (fixed, rest) = take::<payload::RegionAccess>(payload)?;
    if fixed.offset.checked_add(fixed.count.into()).is_none() {
        return Err(Malformed("the bytes end beyond 2^64"));
    }
    let access = RegionAccess {
        region: fixed.region,
        offset: fixed.offset,
        count: fixed.count,
    };
    Ok((access, rest))
}

fn write_multi(payload: &[u8]) -> Result<WriteMulti<'_>, Malformed> {
    let (fixed, entries) = take::<payload::WriteMulti>(payload)?;
    let count = usize::try_from(fixed.count).ok();
    let len = count.and_then(|count| count.checked_mul(WriteMulti::ENTRY));
    if len != Some(entries.len()) {
        return Err(Malformed("there are not as many writes as it counts"));
    }
    let writes = WriteMulti { entries };
    let sound = |write: SmallWrite| {
        let RegionAccess { offset, count, .. } = write.access;
        count as usize <= write.data.len() && offset.checked_add(count.into()).is_some()
    };
    if !(0..writes.len()).filter_map(|at| writes.nth(at)).all(sound) {
        return Err(Malformed(
            "a write has more than 8 bytes, or ends beyond 2^64",
        ));
    }
    Ok(writes)
}

fn feature(payload: &[u8]) -> Result<Feature<'_>, Malformed> {
    let (fixed, data) = take::<payload::Feature>(payload)?;
    let argsz = room(fixed.argsz, size_of::<payload::Feature>())?;
    let flag = |flag| fixed.flags & flag != 0;
    let get = flag(payload::Feature::GET);
    let set = flag(payload::Feature::SET);
    let probe = flag(payload::Feature::PROBE);
    let known = payload::Feature::INDEX
        | payload::Feature::GET
        | payload::Feature::SET
        | payload::Feature::PROBE;
    if fixed.flags & !known != 0 {
        return Err(Malformed("there are flags that no feature has"));
    }
    if !probe && get == set {
        return Err(Malformed(
            "it neither gets, sets nor probes, or all at once",
        ));
    }
    let [low, high, ..] = fixed.flags.to_le_bytes();
    Ok(Feature {
        argsz,
        index: u16::from_le_bytes([low, high]),
        get,
        set,
        probe,
        data,
    })
}

#[cfg(test)]
mod tests;
