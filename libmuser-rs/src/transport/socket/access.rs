// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An access to a region, cut where mappable areas begin and end: what lies in them is served here,
//! the rest by the device.

use std::ops::Range;

use super::areas::Areas;
use crate::error::Errno;
use crate::region::{Area, AreaKind, RegionInfo};
use crate::transport::Operation;
use crate::vfio_user::wire::payload;

/// An access that is under way.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) region: u32,
    pub(super) offset: u64,
    /// Bytes: those which are in the region.
    pub(super) count: usize,
    write: bool,
    done: usize,
    /// How many bytes the device is at.
    part: usize,
    /// The data, if there are several parts.
    buffer: Vec<u8>,
}

/// What is to be done next of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The device does a part, whose data is in the buffer that was given.
    Device(Operation),
    /// It has ended: so many bytes were read or written, or none because of an error.
    Ended(Result<usize, Errno>),
}

impl Access {
    /// An access of a client's; `data` has what is written.
    ///
    /// # Errors
    ///
    /// `EINVAL`: there is no such region, it can't be read or written, or the access starts at its
    /// end.
    pub(super) fn new(
        info: Option<&RegionInfo>,
        offset: u64,
        count: usize,
        write: bool,
    ) -> Result<Self, Errno> {
        let allowed = |info: &&RegionInfo| if write { info.writable } else { info.readable };
        let info = info.filter(allowed).filter(|info| offset < info.size);
        let info = info.ok_or(Errno::EINVAL)?;
        // As of a file, what is beyond the end is not there.
        let most = usize::try_from(info.size - offset).unwrap_or(usize::MAX);
        Ok(Self {
            region: info.index,
            offset,
            count: count.min(most),
            write,
            done: 0,
            part: 0,
            buffer: Vec::new(),
        })
    }

    /// Starts it. `data` has what is written, and gets what the device is to write.
    pub(super) fn start(&mut self, info: &RegionInfo, areas: &Areas, data: &mut Vec<u8>) -> Next {
        let (memory, span) = part_at(info, self.offset);
        if memory.is_none() && span >= self.count as u64 && self.count > 0 {
            // Nearly all of them: the data stays where it is.
            data.truncate(self.count);
            self.part = self.count;
            return Next::Device(self.operation());
        }
        self.buffer = std::mem::take(data);
        self.buffer.resize(self.count, 0);
        self.go_on(info, areas, data)
    }

    /// The device has done its part; what it has read is in `data`.
    pub(super) fn done(
        &mut self,
        info: &RegionInfo,
        areas: &Areas,
        result: Result<(), Errno>,
        data: &mut Vec<u8>,
    ) -> Next {
        if let Err(errno) = result {
            return Next::Ended(if self.done == 0 {
                Err(errno)
            } else {
                self.end(data)
            });
        }
        if self.part == self.count {
            // It was the only one, so the data is where it has to be.
            data.resize(self.count, 0);
            return Next::Ended(Ok(self.count));
        }
        let part = self.done..self.done + self.part;
        if !self.write {
            data.resize(self.part, 0);
            if let Some(to) = self.buffer.get_mut(part) {
                to.copy_from_slice(data);
            }
        }
        self.done += self.part;
        self.go_on(info, areas, data)
    }

    /// Serves what can be served here, up to the next part of the device's.
    fn go_on(&mut self, info: &RegionInfo, areas: &Areas, data: &mut Vec<u8>) -> Next {
        while self.done < self.count {
            let at = self.offset + self.done as u64;
            let (area, span) = part_at(info, at);
            let len = usize::try_from(span).unwrap_or(usize::MAX);
            self.part = len.min(self.count - self.done);
            let part = self.done..self.done + self.part;
            let Some(area) = area else {
                data.clear();
                if self.write {
                    data.extend_from_slice(&self.buffer[part]);
                }
                return Next::Device(self.operation());
            };
            if let Err(errno) = self.serve(area, at, areas, part) {
                return Next::Ended(if self.done == 0 {
                    Err(errno)
                } else {
                    self.end(data)
                });
            }
            self.done += self.part;
        }
        Next::Ended(self.end(data))
    }

    fn serve(
        &mut self,
        area: &Area,
        at: u64,
        areas: &Areas,
        part: Range<usize>,
    ) -> Result<(), Errno> {
        let memory = areas.at(self.region, area.offset).ok_or(Errno::EIO)?;
        let start = usize::try_from(at - area.offset).map_err(|_| Errno::EIO)?;
        let bytes = &mut self.buffer[part];
        let result = if self.write {
            memory.write_bytes(start, bytes)
        } else {
            memory.read_bytes(start, bytes)
        };
        result.map_err(|error| error.errno())
    }

    pub(super) const fn is_write(&self) -> bool {
        self.write
    }

    /// What the reply says of so many bytes.
    pub(super) fn reply(&self, count: usize) -> payload::RegionAccess {
        payload::RegionAccess {
            offset: self.offset,
            region: self.region,
            count: u32::try_from(count).unwrap_or(u32::MAX),
        }
    }

    fn end(&mut self, data: &mut Vec<u8>) -> Result<usize, Errno> {
        *data = std::mem::take(&mut self.buffer);
        data.truncate(self.done);
        Ok(self.done)
    }

    fn operation(&self) -> Operation {
        let offset = self.offset + self.done as u64;
        if self.write {
            Operation::Write {
                region: self.region,
                offset,
            }
        } else {
            Operation::Read {
                region: self.region,
                offset,
                count: self.part,
            }
        }
    }
}

/// The mappable area in which an offset lies, and how many bytes from there on are like that.
fn part_at(info: &RegionInfo, at: u64) -> (Option<&Area>, u64) {
    let mut areas = info.areas.iter();
    let next = areas.find(|area| area.kind == AreaKind::Mappable && at < area.end());
    match next {
        Some(area) if area.offset <= at => (Some(area), area.end() - at),
        Some(area) => (None, area.offset - at),
        None => (None, u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::super::keeper::Nobody;
    use super::*;
    use crate::transport::Description;

    fn with_area() -> (RegionInfo, Areas) {
        let mut info = RegionInfo::new(0, 0x4000);
        info.areas.push(Area {
            offset: 0x1000,
            size: 0x1000,
            kind: AreaKind::Mappable,
        });
        let description = Description {
            regions: vec![info.clone()],
            irqs: Vec::new(),
            io_events: Vec::new(),
        };
        (info, Areas::new(&description, None, &Nobody).unwrap())
    }

    #[test]
    fn access_beside_areas_is_the_devices_as_a_whole() {
        let (info, areas) = with_area();
        let mut access = Access::new(Some(&info), 0x10, 4, true).unwrap();
        let mut data = vec![1, 2, 3, 4];

        let next = access.start(&info, &areas, &mut data);

        let operation = Operation::Write {
            region: 0,
            offset: 0x10,
        };
        assert_eq!(next, Next::Device(operation));
        assert_eq!(data, [1, 2, 3, 4]);
        let next = access.done(&info, &areas, Ok(()), &mut data);
        assert_eq!(next, Next::Ended(Ok(4)));
    }

    #[test]
    fn access_across_an_area_has_three_parts() {
        let (info, areas) = with_area();
        areas.at(0, 0x1000).unwrap().write(0, 0xaa_u8).unwrap();
        let mut access = Access::new(Some(&info), 0xffe, 0x1004, false).unwrap();
        let mut data = Vec::new();

        let next = access.start(&info, &areas, &mut data);
        let read = |offset, count| {
            Next::Device(Operation::Read {
                region: 0,
                offset,
                count,
            })
        };
        assert_eq!(next, read(0xffe, 2));
        data = vec![1, 2];
        let next = access.done(&info, &areas, Ok(()), &mut data);
        assert_eq!(next, read(0x2000, 2));
        data = vec![3, 4];
        let next = access.done(&info, &areas, Ok(()), &mut data);
        assert_eq!(next, Next::Ended(Ok(0x1004)));
        assert_eq!(data[..4], [1, 2, 0xaa, 0]);
        assert_eq!(data[0x1002..], [3, 4]);
    }

    #[test]
    fn failure_behind_the_first_part_is_a_short_access() {
        let (info, areas) = with_area();
        let mut access = Access::new(Some(&info), 0xffe, 0x1004, false).unwrap();
        let mut data = Vec::new();
        access.start(&info, &areas, &mut data);
        data = vec![1, 2];
        access.done(&info, &areas, Ok(()), &mut data);

        let next = access.done(&info, &areas, Err(Errno::EIO), &mut data);

        assert_eq!(next, Next::Ended(Ok(0x1002)));
        assert_eq!(data.len(), 0x1002);
    }

    #[test]
    fn failure_of_the_first_part_is_that_of_the_access() {
        let (info, areas) = with_area();
        let mut access = Access::new(Some(&info), 0xffe, 4, true).unwrap();
        let mut data = vec![0; 4];
        access.start(&info, &areas, &mut data);

        let next = access.done(&info, &areas, Err(Errno::EBUSY), &mut data);

        assert_eq!(next, Next::Ended(Err(Errno::EBUSY)));
    }

    #[test]
    fn access_over_the_end_is_cut_there() {
        let (info, areas) = with_area();
        let mut access = Access::new(Some(&info), 0x3ffe, 4, true).unwrap();
        let mut data = vec![1, 2, 3, 4];

        access.start(&info, &areas, &mut data);

        assert_eq!((access.count, data.len()), (2, 2));
        assert!(Access::new(Some(&info), 0x4000, 1, false).is_err());
        assert!(Access::new(None, 0, 1, false).is_err());
    }

    #[test]
    fn access_of_nothing_ends_at_once() {
        let (info, areas) = with_area();
        let mut access = Access::new(Some(&info), 0, 0, false).unwrap();

        let next = access.start(&info, &areas, &mut Vec::new());

        assert_eq!(next, Next::Ended(Ok(0)));
    }
}
