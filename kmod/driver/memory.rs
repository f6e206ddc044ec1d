// SPDX-License-Identifier: GPL-2.0
//! Device memory: the pages behind mappable areas and the state, which outlive every process that
//! serves them.

use crate::{
    driver::{
        description::{pages, Arrays},
        users::Allowance, //
    },
    uapi::*,
    vfio::{
        inode::Inode,
        page::{Charge, SharedPage, PAGE_SIZE},
        vm::Pager, //
    },
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        new_mutex,
        Arc,
        Mutex, //
    },
    uaccess::UserPtr,
    xarray::{AllocKind, XArray}, //
};

/// Pages from one region to the next in the tree, as in the VFIO device file.
const REGION_SHIFT: u32 = MUSER_MMAP_REGION_SHIFT - PAGE_SIZE.trailing_zeros();

/// First page of the state in the tree: behind all regions.
const STATE: usize = (MUSER_MAX_REGIONS as usize) << REGION_SHIFT;

/// Pages of a device, by region and page number, allocated when they are first touched; and those of
/// its state, which no client sees.
#[pin_data]
pub(crate) struct Memory {
    #[pin]
    pages: XArray<SharedPage>,
    // `XArray::store` may drop its lock to allocate: this keeps two threads from storing one page.
    #[pin]
    allocating: Mutex<()>,
    allocated: Atomic<u64>,
    charge: Charge,
    /// What its user has given up for it. It goes with the last mapping of the memory.
    pub(crate) allowance: Arc<Allowance>,
}

impl Memory {
    /// Makes an empty memory, paid for by the current process's memory cgroup.
    pub(crate) fn new(allowance: Arc<Allowance>) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                pages <- XArray::new(AllocKind::Alloc),
                allocating <- new_mutex!((), "muser_memory"),
                allocated: Atomic::new(0),
                charge: Charge::current(),
                allowance,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Pages allocated so far.
    pub(crate) fn allocated(&self) -> u64 {
        self.allocated.load(Relaxed)
    }

    /// The page at an index of the tree. The caller has checked that an area backs it.
    fn page(&self, index: usize) -> Result<SharedPage> {
        if let Some(page) = self.lookup(index) {
            return Ok(page);
        }
        let _allocating = self.allocating.lock();
        if let Some(page) = self.lookup(index) {
            return Ok(page);
        }
        let page = SharedPage::new(&self.charge)?;
        self.pages
            .lock()
            .store(index, page.clone(), GFP_KERNEL_ACCOUNT)?;
        self.allocated.fetch_add(1, Relaxed);
        Ok(page)
    }

    fn lookup(&self, index: usize) -> Option<SharedPage> {
        let pages = self.pages.lock();
        let page = pages.get(index)?;
        Some(SharedPage::clone(&page))
    }

    /// Copies from a region to a client's memory.
    pub(crate) fn read(&self, region: u32, offset: u64, to: UserPtr, len: usize) -> Result {
        self.for_each_page(region, offset, len, |page, start, done, part| {
            page.copy_to_user(start, to.wrapping_byte_add(done), part)
        })
    }

    /// Copies from a client's memory to a region.
    pub(crate) fn write(&self, region: u32, offset: u64, from: UserPtr, len: usize) -> Result {
        self.for_each_page(region, offset, len, |page, start, done, part| {
            page.copy_from_user(start, from.wrapping_byte_add(done), part)
        })
    }

    /// Gives up all pages that areas of `arrays` have: what one client left there is not for the next,
    /// which gets new ones. To make zeroes of them would not do, for the client may still hold them
    /// for some input or output. `node` is what the process's mappings belong to.
    ///
    /// No client has the device open.
    pub(crate) fn renew(&self, arrays: &Arrays<'_>, node: &Inode) {
        for region in arrays.each_region() {
            let start = u64::from(region.described.index) << MUSER_MMAP_REGION_SHIFT;
            for area in region.areas {
                let pages = pages(area);
                let first = (start + pages.start) as usize / PAGE_SIZE;
                let end = (start + pages.end) as usize / PAGE_SIZE;
                for index in first..end {
                    let Some(page) = self.pages.lock().remove(index) else {
                        continue;
                    };
                    self.allocated.fetch_sub(1, Relaxed);
                    // Who has found the page by then shows it now, or never.
                    drop(page.lock());
                }
                node.zap(
                    MUSER_MMAP_REGIONS + start + pages.start,
                    pages.end - pages.start,
                );
            }
        }
    }

    /// Whether a page is the one at an index of the tree.
    fn has(&self, index: usize, page: &SharedPage) -> bool {
        self.lookup(index).is_some_and(|present| present.is(page))
    }

    /// Calls `copy` with each page of a range: the page, where to start in it, the bytes already
    /// done, and the bytes to do.
    fn for_each_page(
        &self,
        region: u32,
        offset: u64,
        len: usize,
        mut copy: impl FnMut(&SharedPage, usize, usize, usize) -> Result,
    ) -> Result {
        let mut done = 0;
        while done < len {
            let at = (u64::from(region) << MUSER_MMAP_REGION_SHIFT) + offset + done as u64;
            let start = at as usize % PAGE_SIZE;
            let part = (len - done).min(PAGE_SIZE - start);
            copy(&self.page(at as usize / PAGE_SIZE)?, start, done, part)?;
            done += part;
        }
        Ok(())
    }
}

/// Fills a client's mapping: the device file has the regions where the tree has them.
pub(crate) struct ClientPager;

impl Pager for ClientPager {
    type Data = Memory;

    fn page(memory: &Memory, offset: usize) -> Result<SharedPage> {
        memory.page(offset)
    }

    fn is_current(memory: &Memory, offset: usize, page: &SharedPage) -> bool {
        memory.has(offset, page)
    }
}

/// Fills a process's mapping: the node has the regions behind [`MUSER_MMAP_REGIONS`].
pub(crate) struct ProcessPager;

impl ProcessPager {
    fn index(offset: usize) -> Option<usize> {
        offset.checked_sub(MUSER_MMAP_REGIONS as usize / PAGE_SIZE)
    }
}

impl Pager for ProcessPager {
    type Data = Memory;

    fn page(memory: &Memory, offset: usize) -> Result<SharedPage> {
        memory.page(Self::index(offset).ok_or(EINVAL)?)
    }

    fn is_current(memory: &Memory, offset: usize, page: &SharedPage) -> bool {
        Self::index(offset).is_some_and(|index| memory.has(index, page))
    }
}

/// Fills a process's mapping of the state, which the node has behind [`MUSER_MMAP_STATE`].
pub(crate) struct StatePager;

impl StatePager {
    fn index(offset: usize) -> Option<usize> {
        let offset = offset.checked_sub(MUSER_MMAP_STATE as usize / PAGE_SIZE)?;
        Some(STATE + offset)
    }
}

impl Pager for StatePager {
    type Data = Memory;

    fn page(memory: &Memory, offset: usize) -> Result<SharedPage> {
        memory.page(Self::index(offset).ok_or(EINVAL)?)
    }

    fn is_current(memory: &Memory, offset: usize, page: &SharedPage) -> bool {
        Self::index(offset).is_some_and(|index| memory.has(index, page))
    }
}

/// Where a page of a file's offset lies: the region, and the offset in it in bytes.
pub(crate) fn locate(page: usize) -> (u32, u64) {
    let region = (page >> REGION_SHIFT) as u32;
    let within = page & ((1 << REGION_SHIFT) - 1);
    (region, (within * PAGE_SIZE) as u64)
}
