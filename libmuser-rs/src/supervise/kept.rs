// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a client has set up, so that it can be set up in the next program: what was negotiated,
//! mappings for DMA, interrupts, the recording of dirty pages.
//!
//! It changes when the program's reply to a command comes by, and not before: a command without a
//! reply is given to the next program as well.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::files::Files;
use super::vectors::{IrqStep, Vectors};
use crate::vfio_user::wire::payload;
use crate::vfio_user::wire::request::{ClientRequest, DmaMap};
use crate::vfio_user::wire::{Command, DEFAULT_DMA_MAPS};

/// What a client has set up.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The payloads of the client's VERSION and of its reply.
    version: Option<(Vec<u8>, Vec<u8>)>,
    maps: BTreeMap<u64, Map>,
    vectors: Vectors,
    files: Files,
    /// The payload that has started the recording of dirty pages.
    logging: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Map {
    map: DmaMap,
    file: Option<Arc<OwnedFd>>,
}

/// A message that sets up a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Version,
    Map(u64),
    Irq(IrqStep),
    Logging,
}

/// More is set up than a client may have.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooMuch(pub(super) &'static str);

impl Kept {
    /// Whether a version is agreed upon.
    pub(super) fn is_negotiated(&self) -> bool {
        self.version.is_some()
    }

    /// A version is agreed upon.
    pub(super) fn negotiated(&mut self, request: Vec<u8>, reply: Vec<u8>) {
        self.version = Some((request, reply));
    }

    /// Whether a program has answered VERSION as the first one.
    pub(super) fn agrees(&self, reply: &[u8]) -> bool {
        let version = self.version.as_ref();
        version.is_some_and(|(_, expected)| expected == reply)
    }

    /// A command of the client's was done.
    ///
    /// # Errors
    ///
    /// A program has agreed to more than there can be.
    pub(super) fn done(
        &mut self,
        command: Command,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), TooMuch> {
        let Ok(Some(request)) = ClientRequest::parse(command, payload) else {
            // A program may do what this does not understand, but there is nothing to keep of it.
            return Ok(());
        };
        match request {
            ClientRequest::DmaMap(map) => {
                if self.maps.len() as u64 >= DEFAULT_DMA_MAPS {
                    return Err(TooMuch("mappings for DMA"));
                }
                let file = descriptors.into_iter().next();
                let file = file.map(|file| self.files.share(file));
                self.maps.insert(map.address, Map { map, file });
            }
            ClientRequest::DmaUnmap(unmap) if unmap.all => self.maps.clear(),
            ClientRequest::DmaUnmap(unmap) => {
                let end = unmap.address.saturating_add(unmap.size);
                let gone = |map: &DmaMap| map.address.saturating_add(map.size) <= end;
                let range = self.maps.range(unmap.address..end);
                let gone = range.filter(|(_, kept)| gone(&kept.map));
                let gone: Vec<u64> = gone.map(|(address, _)| *address).collect();
                for address in gone {
                    self.maps.remove(&address);
                }
            }
            ClientRequest::SetIrqs(set) => self.vectors.set(&set, descriptors)?,
            ClientRequest::Feature(feature) if feature.set && !feature.probe => {
                match feature.index.into() {
                    payload::Feature::DMA_LOGGING_START => self.logging = Some(payload.to_vec()),
                    payload::Feature::DMA_LOGGING_STOP => self.logging = None,
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The payload with which the recording of dirty pages was started, if it is on.
    pub(super) fn logging(&self) -> Option<&[u8]> {
        self.logging.as_deref()
    }

    /// What sets all of it up, in order.
    pub(super) fn steps(&self) -> Vec<Step> {
        if self.version.is_none() {
            return Vec::new();
        }
        let maps = self.maps.keys().copied().map(Step::Map);
        let irqs = self.vectors.steps().into_iter().map(Step::Irq);
        let logging = self.logging.iter().map(|_| Step::Logging);
        let version = std::iter::once(Step::Version);
        version.chain(maps).chain(irqs).chain(logging).collect()
    }

    /// The message of a step: its command, payload and descriptors.
    pub(super) fn message(&self, step: &Step) -> (Command, Vec<u8>, Vec<BorrowedFd<'_>>) {
        match step {
            Step::Version => {
                let request = self.version.as_ref().map(|(request, _)| request.clone());
                (Command::Version, request.unwrap_or_default(), Vec::new())
            }
            Step::Map(address) => {
                let Some(Map { map, file }) = self.maps.get(address) else {
                    return (Command::DmaMap, Vec::new(), Vec::new());
                };
                let flags = [
                    (map.reads, payload::DmaMap::READ),
                    (map.writes, payload::DmaMap::WRITE),
                ];
                let flags = flags.iter().filter(|(set, _)| *set);
                let message = payload::DmaMap {
                    argsz: ARGSZ,
                    flags: flags.map(|(_, flag)| flag).sum(),
                    offset: map.offset,
                    address: map.address,
                    size: map.size,
                };
                let file = file.iter().map(|file| file.as_fd());
                (Command::DmaMap, message.as_bytes().to_vec(), file.collect())
            }
            Step::Irq(step) => {
                let (payload, descriptors) = self.vectors.message(step);
                (Command::DeviceSetIrqs, payload, descriptors)
            }
            Step::Logging => {
                let payload = self.logging.clone().unwrap_or_default();
                (Command::DeviceFeature, payload, Vec::new())
            }
        }
    }
}

const ARGSZ: u32 = 32;
const _: () = assert!(size_of::<payload::DmaMap>() == ARGSZ as usize);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio_user::wire::payload::{DmaUnmap, IrqSet};
    use std::fs::File;

    fn map(address: u64, size: u64) -> Vec<u8> {
        let (argsz, flags, offset) = (ARGSZ, 3, 0x1000);
        let map = payload::DmaMap {
            argsz,
            flags,
            offset,
            address,
            size,
        };
        map.as_bytes().to_vec()
    }

    fn unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
        let argsz = 24;
        let unmap = DmaUnmap {
            argsz,
            flags,
            address,
            size,
        };
        unmap.as_bytes().to_vec()
    }

    fn file() -> Vec<OwnedFd> {
        vec![File::open("/dev/zero").unwrap().into()]
    }

    fn negotiated() -> Kept {
        let mut kept = Kept::default();
        kept.negotiated(vec![1], vec![2]);
        kept
    }

    #[test]
    fn mapping_is_set_up_as_the_client_did_until_it_unmaps_it() {
        let mut kept = negotiated();
        kept.done(Command::DmaMap, &map(0x1000, 0x1000), file())
            .unwrap();
        kept.done(Command::DmaMap, &map(0x8000, 0x1000), Vec::new())
            .unwrap();

        let steps = kept.steps();
        assert_eq!(steps, [Step::Version, Step::Map(0x1000), Step::Map(0x8000)]);
        let (command, payload, descriptors) = kept.message(&steps[1]);
        assert_eq!((command, descriptors.len()), (Command::DmaMap, 1));
        assert_eq!(payload, map(0x1000, 0x1000));
        assert!(kept.message(&steps[2]).2.is_empty());

        kept.done(Command::DmaUnmap, &unmap(0, 0x1000, 0x1000), Vec::new())
            .unwrap();
        assert_eq!(kept.steps(), [Step::Version, Step::Map(0x8000)]);
        kept.done(Command::DmaUnmap, &unmap(DmaUnmap::ALL, 0, 0), Vec::new())
            .unwrap();
        assert_eq!(kept.steps(), [Step::Version]);
    }

    #[test]
    fn range_that_only_touches_a_mapping_leaves_it() {
        let mut kept = negotiated();
        kept.done(Command::DmaMap, &map(0x2000, 0x2000), file())
            .unwrap();

        kept.done(Command::DmaUnmap, &unmap(0, 0x1000, 0x2000), Vec::new())
            .unwrap();

        assert_eq!(kept.steps().len(), 2);
    }

    #[test]
    fn nothing_is_set_up_before_a_version() {
        let mut kept = Kept::default();
        kept.done(Command::DmaMap, &map(0x1000, 0x1000), file())
            .unwrap();

        assert!(kept.steps().is_empty());
        assert!(!kept.agrees(&[]));
    }

    #[test]
    fn recording_of_dirty_pages_is_on_between_its_commands() {
        let mut kept = negotiated();
        let feature = |flags: u32| [8_u32, flags].as_bytes().to_vec();
        let start = feature(payload::Feature::SET | payload::Feature::DMA_LOGGING_START);
        let stop = feature(payload::Feature::SET | payload::Feature::DMA_LOGGING_STOP);

        kept.done(Command::DeviceFeature, &start, Vec::new())
            .unwrap();
        assert_eq!(kept.logging(), Some(&*start));
        assert_eq!(kept.steps(), [Step::Version, Step::Logging]);
        kept.done(Command::DeviceFeature, &stop, Vec::new())
            .unwrap();
        assert_eq!(kept.logging(), None);
    }

    #[test]
    fn nonsense_that_a_program_agrees_to_is_not_kept() {
        let mut kept = negotiated();
        for command in Command::ALL {
            kept.done(command, &[0xff; 64], file()).unwrap();
        }
        let set = IrqSet {
            argsz: 20,
            flags: IrqSet::TRIGGER | IrqSet::DATA_EVENTFD,
            index: 2,
            start: u32::MAX - 1,
            count: 1,
        };
        let too_much = kept.done(Command::DeviceSetIrqs, set.as_bytes(), file());

        assert!(too_much.is_err());
        assert_eq!(kept.steps(), [Step::Version]);
    }
}
