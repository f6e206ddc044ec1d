// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a device's areas: a file for each region that has mappable ones, which clients get, and
//! one for each that has doorbells, which they don't.
//!
//! A client maps an area at its offset in the region, so all areas of a region are in one file. It
//! is as large as the region, has pages only where somebody has touched it, and can't be made larger
//! or smaller.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno as Number;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};

use super::keeper::Keeper;
use crate::error::{Error, Result};
use crate::memory::SharedMemory;
use crate::region::{AreaKind, RegionInfo};
use crate::sys::{page_size, Mapping};
use crate::transport::{AreaMemory, Description};

/// All areas of a device.
#[derive(Debug)]
pub(crate) struct Areas {
    files: Vec<RegionFile>,
    memory: Vec<AreaMemory>,
}

/// The memory of a region's areas of one kind.
#[derive(Debug)]
struct RegionFile {
    region: u32,
    kind: AreaKind,
    file: OwnedFd,
}

impl Areas {
    /// Memory for all areas: what is in `kept` (by ascending region), which an earlier server left,
    /// or else zeroes.
    ///
    /// # Errors
    ///
    /// `ESTALE`: what is kept is not of this description. Else, there is no memory.
    pub(crate) fn new(
        description: &Description,
        kept: Option<Vec<OwnedFd>>,
        keeper: &dyn Keeper,
    ) -> Result<Self> {
        let has = |region: &RegionInfo, kind| region.areas.iter().any(|area| area.kind == kind);
        let kinds = [AreaKind::Mappable, AreaKind::Doorbell];
        let regions = description.regions.iter();
        let wanted = regions.flat_map(|region| {
            let kinds = kinds.into_iter().filter(move |kind| has(region, *kind));
            kinds.map(move |kind| (region, kind))
        });
        let wanted: Vec<_> = wanted.collect();
        let files = match kept {
            Some(kept) if kept.len() == wanted.len() => kept,
            Some(_) => return Err(Error::refused(libc::ESTALE, "other areas were kept for it")),
            None => wanted
                .iter()
                .map(|(region, _)| keeper.make_file(region.index, region.size))
                .collect::<Result<_>>()?,
        };
        let files = wanted.iter().zip(files);
        let files = files.map(|((region, kind), file)| RegionFile {
            region: region.index,
            kind: *kind,
            file,
        });
        let mut areas = Self {
            files: files.collect(),
            memory: Vec::new(),
        };
        for region in &description.regions {
            for area in &region.areas {
                let len = usize::try_from(area.size).map_err(|_| failed(Number::ENOMEM))?;
                let memory = match areas.backing(region.index, area.kind) {
                    Some(file) if area.kind == AreaKind::Mappable => {
                        let mapping = Mapping::new(file, area.offset, len, true);
                        SharedMemory::new(mapping.map_err(failed)?)
                    }
                    // A doorbell may start anywhere in a page.
                    Some(file) => {
                        let start = area.offset / page_size() * page_size();
                        let before = usize::try_from(area.offset - start).unwrap_or(0);
                        let mapping = Mapping::new(file, start, before.saturating_add(len), true);
                        SharedMemory::part(mapping.map_err(failed)?, before, len)
                    }
                    None => SharedMemory::anonymous(len)?,
                };
                let memory = AreaMemory::new(region.index, area, memory);
                areas.memory.push(memory);
            }
        }
        Ok(areas)
    }

    /// The memory of each area.
    pub(crate) fn memory(&self) -> &[AreaMemory] {
        &self.memory
    }

    /// The memory of the area which starts at `offset` of a region.
    pub(crate) fn at(&self, region: u32, offset: u64) -> Option<&SharedMemory> {
        let mut memory = self.memory.iter();
        let area = memory.find(|area| area.region == region && area.offset == offset);
        area.map(|area| &area.memory)
    }

    /// The file that clients map of a region.
    pub(crate) fn file(&self, region: u32) -> Option<BorrowedFd<'_>> {
        self.backing(region, AreaKind::Mappable)
    }

    fn backing(&self, region: u32, kind: AreaKind) -> Option<BorrowedFd<'_>> {
        let mut files = self.files.iter();
        let file = files.find(|file| (file.region, file.kind) == (region, kind));
        file.map(|file| file.file.as_fd())
    }

    /// All files, in an order that depends on the description only.
    pub(crate) fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files.iter().map(|file| file.file.as_fd())
    }

    /// Makes zeroes of everything, in new files: a client that has gone may keep what it has mapped,
    /// and must not see what comes after it.
    ///
    /// # Errors
    ///
    /// There is no memory. What could not be made new is zeroes all the same.
    pub(crate) fn renew(&mut self, description: &Description, keeper: &dyn Keeper) -> Result<()> {
        let mut result = Ok(());
        let mappable = |file: &&mut RegionFile| file.kind == AreaKind::Mappable;
        for file in self.files.iter_mut().filter(mappable) {
            let size = description.region(file.region).map_or(0, |info| info.size);
            match keeper.make_file(file.region, size) {
                Ok(new) => file.file = new,
                Err(error) => result = Err(error),
            }
        }
        for area in &self.memory {
            let file = self.file(area.region);
            let file = file.filter(|_| area.kind == AreaKind::Mappable);
            if let Some(Err(error)) = file.map(|file| area.memory.replace(file, area.offset)) {
                result = Err(error);
            }
            if result.is_err() || file.is_none() {
                area.memory.clear();
            }
        }
        result
    }
}

/// A file of zeroes whose size stays.
pub(crate) fn make_file(size: u64) -> Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("muser", flags).map_err(failed)?);
    file.set_len(size)
        .map_err(|error| Error::io("making memory of an area", error))?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
    Ok(file.into())
}

fn failed(errno: Number) -> Error {
    Error::io("making memory of an area", errno)
}
