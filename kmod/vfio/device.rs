// SPDX-License-Identifier: GPL-2.0
//! A VFIO device without an IOMMU of its own: what a client opens, reads, writes, maps and asks.
//!
//! The ioctls' argument checks are here; an [`Operations`] sees typed values only.
//!
//! C header: `include/linux/vfio.h`, `include/uapi/linux/vfio.h`.

use super::{
    bindings,
    irq_set::IrqSet,
    mdev,
    page::PAGE_SIZE,
    pins::{Pages, Pins, Report},
    vm::NewVma, //
};
use core::{
    marker::PhantomData,
    mem::size_of,
    ptr::{null_mut, NonNull},
};
use kernel::{
    error::{from_err_ptr, to_result},
    ffi::c_void,
    ioctl::_IO,
    prelude::*,
    sync::{Arc, ArcBorrow},
    types::ForeignOwnable,
    uaccess::{UserPtr, UserSlice}, //
};

// <linux/vfio.h>: the ioctls are `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const fn vfio_ioctl(n: u32) -> u32 {
    _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + n)
}
const GET_INFO: u32 = vfio_ioctl(7);
const GET_IRQ_INFO: u32 = vfio_ioctl(9);
const SET_IRQS: u32 = vfio_ioctl(10);
const RESET: u32 = vfio_ioctl(11);

/// `VFIO_DEVICE_FLAGS_PCI`: see [`Info`].
pub(crate) const FLAGS_PCI: u32 = bindings::VFIO_DEVICE_FLAGS_PCI;
/// `VFIO_DEVICE_FLAGS_PLATFORM`.
pub(crate) const FLAGS_PLATFORM: u32 = bindings::VFIO_DEVICE_FLAGS_PLATFORM;
/// `VFIO_DEVICE_FLAGS_RESET`.
pub(crate) const FLAGS_RESET: u32 = bindings::VFIO_DEVICE_FLAGS_RESET;

/// `VFIO_REGION_INFO_FLAG_*`: see [`RegionInfo`].
pub(crate) const REGION_READ: u32 = bindings::VFIO_REGION_INFO_FLAG_READ;
/// See [`REGION_READ`].
pub(crate) const REGION_WRITE: u32 = bindings::VFIO_REGION_INFO_FLAG_WRITE;
/// See [`REGION_READ`].
pub(crate) const REGION_MMAP: u32 = bindings::VFIO_REGION_INFO_FLAG_MMAP;

/// `VFIO_PCI_REQ_IRQ_INDEX`: a PCI device asks its client to let go of it.
pub(crate) const PCI_REQ_IRQ: u32 = bindings::VFIO_PCI_REQ_IRQ_INDEX;

/// Answer to `VFIO_DEVICE_GET_INFO`.
pub(crate) struct Info {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub(crate) flags: u32,
    /// Number of regions.
    pub(crate) regions: u32,
    /// Number of interrupt indexes.
    pub(crate) irqs: u32,
}

/// Answer to `VFIO_DEVICE_GET_REGION_INFO`.
pub(crate) struct RegionInfo<'a> {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub(crate) flags: u32,
    /// Bytes.
    pub(crate) size: u64,
    /// Offset in the device file.
    pub(crate) offset: u64,
    /// The parts that can be mapped, where that is not all of the region.
    pub(crate) sparse: &'a mut dyn Iterator<Item = (u64, u64)>,
}

/// Answer to `VFIO_DEVICE_GET_IRQ_INFO`.
#[derive(Clone, Copy)]
pub(crate) struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub(crate) flags: u32,
    /// Number of vectors.
    pub(crate) count: u32,
}

/// What a device does for its client. Calls come from any thread of the client, at the same time.
pub(crate) trait Operations: Send + Sync + 'static {
    /// Name of the driver, for logs of the VFIO core.
    const NAME: &'static CStr;

    /// A client opens the device, which no other has open.
    fn open(&self) -> Result;
    /// The client is gone.
    fn close(&self);
    /// Answers `VFIO_DEVICE_GET_INFO`.
    fn info(&self) -> Result<Info>;
    /// Answers `VFIO_DEVICE_GET_REGION_INFO`, through `answer`.
    fn region_info(&self, index: u32, answer: &mut dyn FnMut(RegionInfo<'_>) -> Result) -> Result;
    /// Answers `VFIO_DEVICE_GET_IRQ_INFO`.
    fn irq_info(&self, index: u32) -> Result<IrqInfo>;
    /// Performs `VFIO_DEVICE_SET_IRQS`.
    fn set_irqs(&self, set: &IrqSet) -> Result;
    /// Performs `VFIO_DEVICE_RESET`.
    fn reset(&self) -> Result;
    /// Reads up to `len` bytes at a position of the device file.
    fn read(&self, position: u64, to: UserPtr, len: usize) -> Result<usize>;
    /// Writes up to `len` bytes at a position of the device file.
    fn write(&self, position: u64, from: UserPtr, len: usize) -> Result<usize>;
    /// Sets up a mapping.
    fn mmap(&self, vma: &NewVma<'_>) -> Result;
    /// Asks the client to close the device, for the `count`th time.
    fn request(&self, count: u32);
    /// What is pinned of the client's memory. When the client is gone, so is all of it.
    fn pins(&self) -> &Arc<Pins>;
    /// The client unmaps a range of IOVAs, some of which are pinned. They will be unpinned.
    fn dma_unmap(&self, iova: u64, len: u64);
}

/// What the VFIO core allocates.
#[repr(C)]
struct Inner<T> {
    vdev: bindings::vfio_device,
    /// From `Arc::into_foreign`, or null.
    operations: *mut c_void,
    _type: PhantomData<Arc<T>>,
}

/// A device registered with the VFIO core. Dropping it waits until no client has it open.
///
/// # Invariants
///
/// The pointer is to the head of an `Inner<T>`, registered.
pub(crate) struct Registration<T: Operations> {
    vdev: NonNull<bindings::vfio_device>,
    _type: PhantomData<Arc<T>>,
}

// SAFETY: The VFIO core has locks of its own.
unsafe impl<T: Operations> Send for Registration<T> {}
// SAFETY: As above.
unsafe impl<T: Operations> Sync for Registration<T> {}

impl<T: Operations> Registration<T> {
    /// Makes a VFIO device of a mediated device.
    pub(crate) fn new(parent: &mdev::Device, operations: Arc<T>) -> Result<Self> {
        const { assert!(core::mem::offset_of!(Inner<T>, vdev) == 0) };
        // SAFETY: The size is that of a struct with a `vfio_device` at its head, and the operations
        // live for ever.
        let vdev = from_err_ptr(unsafe {
            bindings::_vfio_alloc_device(
                size_of::<Inner<T>>(),
                parent.as_device(),
                VTable::<T>::OPS,
            )
        })?;
        // SAFETY: The allocation is an `Inner<T>` which nobody else knows of.
        unsafe { (*vdev.cast::<Inner<T>>()).operations = operations.into_foreign() };
        // A report goes into a bitmap of IOMMUFD's.
        if cfg!(CONFIG_IOMMUFD_DRIVER) {
            // SAFETY: As above, and the operations live for ever.
            unsafe { (*vdev).log_ops = VTable::<T>::LOG_OPS };
        }
        // SAFETY: Just allocated.
        if let Err(error) = to_result(unsafe { bindings::vfio_register_emulated_iommu_dev(vdev) }) {
            // SAFETY: The only reference; `release` drops the operations.
            unsafe { bindings::muser_vfio_put_device(vdev) };
            return Err(error);
        }
        // INVARIANT: Registered.
        Ok(Self {
            vdev: NonNull::new(vdev).ok_or(ENOMEM)?,
            _type: PhantomData,
        })
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the invariant.
        unsafe { bindings::vfio_unregister_group_dev(self.vdev.as_ptr()) };
        // SAFETY: The reference of the allocation.
        unsafe { bindings::muser_vfio_put_device(self.vdev.as_ptr()) };
    }
}

fn get_info<T: Operations>(operations: &T, argument: UserPtr) -> Result {
    // struct vfio_device_info: argsz, flags, num_regions, num_irqs.
    const LEN: usize = 16;
    let argsz = UserSlice::new(argument, LEN).reader().read::<u32>()?;
    if (argsz as usize) < LEN {
        return Err(EINVAL);
    }
    let info = operations.info()?;
    UserSlice::new(argument, LEN)
        .writer()
        .write(&[argsz, info.flags, info.regions, info.irqs])
}

fn get_irq_info<T: Operations>(operations: &T, argument: UserPtr) -> Result {
    // struct vfio_irq_info: argsz, flags, index, count.
    const LEN: usize = 16;
    let [argsz, _, index, _] = UserSlice::new(argument, LEN).reader().read::<[u32; 4]>()?;
    if (argsz as usize) < LEN {
        return Err(EINVAL);
    }
    let info = operations.irq_info(index)?;
    UserSlice::new(argument, LEN)
        .writer()
        .write(&[argsz, info.flags, index, info.count])
}

fn ioctl<T: Operations>(operations: &T, command: u32, argument: UserPtr) -> Result {
    match command {
        GET_INFO => get_info(operations, argument),
        GET_IRQ_INFO => get_irq_info(operations, argument),
        SET_IRQS => {
            let set = IrqSet::read(argument, |index| Ok(operations.irq_info(index)?.count))?;
            operations.set_irqs(&set)
        }
        RESET => operations.reset(),
        _ => Err(ENOTTY),
    }
}

/// Adds the capability which lists the parts of a region that can be mapped.
fn add_sparse(
    caps: *mut bindings::vfio_info_cap,
    areas: &mut dyn Iterator<Item = (u64, u64)>,
) -> Result {
    const AREA: usize = size_of::<bindings::vfio_region_sparse_mmap_area>();
    // struct vfio_region_info_cap_sparse_mmap: header {id, version: u16, next: u32}, nr_areas,
    // reserved: u32, and then offset and size of each area: u64. A vector of u64 aligns it.
    const HEAD: usize = size_of::<bindings::vfio_region_info_cap_sparse_mmap>();
    let mut words = KVec::<u64>::new();
    for _ in 0..HEAD / size_of::<u64>() {
        words.push(0, GFP_KERNEL)?;
    }
    for (offset, size) in areas {
        words.push(offset, GFP_KERNEL)?;
        words.push(size, GFP_KERNEL)?;
    }
    let len = words.len() * size_of::<u64>();
    let head: *mut bindings::vfio_region_info_cap_sparse_mmap = words.as_mut_ptr().cast();
    // SAFETY: The vector is at least as long as the head, and aligned.
    unsafe {
        (*head).header.id = bindings::VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16;
        (*head).header.version = 1;
        (*head).nr_areas = ((len - HEAD) / AREA) as u32;
    }
    // SAFETY: `caps` is what the core passed, and the capability is copied.
    to_result(unsafe { bindings::vfio_info_add_capability(caps, &raw mut (*head).header, len) })
}

struct VTable<T>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    const OPS: &'static bindings::vfio_device_ops = &bindings::vfio_device_ops {
        name: super::char_ptr(T::NAME).cast_mut(),
        release: Some(Self::release),
        #[cfg(CONFIG_IOMMUFD)]
        bind_iommufd: Some(bindings::vfio_iommufd_emulated_bind),
        #[cfg(CONFIG_IOMMUFD)]
        unbind_iommufd: Some(bindings::vfio_iommufd_emulated_unbind),
        #[cfg(CONFIG_IOMMUFD)]
        attach_ioas: Some(bindings::vfio_iommufd_emulated_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        detach_ioas: Some(bindings::vfio_iommufd_emulated_detach_ioas),
        open_device: Some(Self::open),
        close_device: Some(Self::close),
        read: Some(Self::read),
        write: Some(Self::write),
        ioctl: Some(Self::ioctl),
        get_region_info_caps: Some(Self::region_info),
        mmap: Some(Self::mmap),
        request: Some(Self::request),
        dma_unmap: Some(Self::dma_unmap),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `vdev` must be the head of an `Inner<T>` whose operations are set, which lives for `'a`.
    unsafe fn operations<'a>(vdev: *mut bindings::vfio_device) -> ArcBorrow<'a, T> {
        // SAFETY: By the safety requirements.
        let operations = unsafe { (*vdev.cast::<Inner<T>>()).operations };
        // SAFETY: `Registration::new` put an `Arc` there.
        unsafe { <Arc<T>>::borrow(operations) }
    }

    /// # Safety
    ///
    /// Only for the C core, as `release` of `struct vfio_device_ops`.
    unsafe extern "C" fn release(vdev: *mut bindings::vfio_device) {
        // SAFETY: The last reference is gone, so nobody uses the operations.
        let operations =
            unsafe { core::mem::replace(&mut (*vdev.cast::<Inner<T>>()).operations, null_mut()) };
        // SAFETY: Null, or from `into_foreign`.
        drop(unsafe { <Arc<T>>::try_from_foreign(operations) });
    }

    /// # Safety
    ///
    /// Only for the C core, as `open` of `struct vfio_device_ops`.
    unsafe extern "C" fn open(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The core only passes registered devices of this type; likewise below.
        let operations = unsafe { Self::operations(vdev) };
        match (operations.open(), NonNull::new(vdev)) {
            (Ok(()), Some(vdev)) => {
                // SAFETY: The core calls `close` while the device is still open.
                unsafe { operations.pins().opened(vdev) };
                0
            }
            (Err(error), _) => error.to_errno(),
            (Ok(()), None) => EINVAL.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `close` of `struct vfio_device_ops`.
    unsafe extern "C" fn close(vdev: *mut bindings::vfio_device) {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        operations.pins().closed();
        operations.close();
    }

    /// # Safety
    ///
    /// Only for the C core, as `read` of `struct vfio_device_ops`.
    unsafe extern "C" fn read(
        vdev: *mut bindings::vfio_device,
        buffer: *mut c_char,
        count: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        transfer(position, |at| {
            operations.read(at, UserPtr::from_ptr(buffer.cast()), count)
        })
    }

    /// # Safety
    ///
    /// Only for the C core, as `write` of `struct vfio_device_ops`.
    unsafe extern "C" fn write(
        vdev: *mut bindings::vfio_device,
        buffer: *const c_char,
        count: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        transfer(position, |at| {
            operations.write(at, UserPtr::from_ptr(buffer.cast_mut().cast()), count)
        })
    }

    /// # Safety
    ///
    /// Only for the C core, as `ioctl` of `struct vfio_device_ops`.
    unsafe extern "C" fn ioctl(
        vdev: *mut bindings::vfio_device,
        command: c_uint,
        argument: c_ulong,
    ) -> c_long {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        match ioctl(&*operations, command, UserPtr::from_addr(argument)) {
            Ok(()) => 0,
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `region_info` of `struct vfio_device_ops`.
    unsafe extern "C" fn region_info(
        vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        caps: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        // SAFETY: The core passes a struct of its own.
        let info = unsafe { &mut *info };
        let result = operations.region_info(info.index, &mut |answer| {
            info.flags = answer.flags;
            info.size = answer.size;
            info.offset = answer.offset;
            let mut sparse = answer.sparse.peekable();
            if sparse.peek().is_some() {
                add_sparse(caps, &mut sparse)?;
            }
            Ok(())
        });
        match result {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `mmap` of `struct vfio_device_ops`.
    unsafe extern "C" fn mmap(
        vdev: *mut bindings::vfio_device,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        // SAFETY: The core passes a mapping that is being set up.
        match operations.mmap(unsafe { &NewVma::from_raw(vma) }) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `request` of `struct vfio_device_ops`.
    unsafe extern "C" fn request(vdev: *mut bindings::vfio_device, count: c_uint) {
        // SAFETY: As in `open`.
        unsafe { Self::operations(vdev) }.request(count);
    }

    /// # Safety
    ///
    /// Only for the C core, as `dma_unmap` of `struct vfio_device_ops`.
    unsafe extern "C" fn dma_unmap(vdev: *mut bindings::vfio_device, iova: u64, len: u64) {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        // Rather too much than too little: what stays pinned can't be unmapped.
        let pages = Pages::of(iova, len).unwrap_or(Pages::ALL);
        let announce = || operations.dma_unmap(iova, len);
        operations.pins().drop_unmapped(pages, announce);
    }
}

/// Logging of DMA: `struct vfio_log_ops`.
impl<T: Operations> VTable<T> {
    const LOG_OPS: &'static bindings::vfio_log_ops = &bindings::vfio_log_ops {
        log_start: Some(Self::log_start),
        log_stop: Some(Self::log_stop),
        log_read_and_clear: Some(Self::log_read_and_clear),
    };

    /// # Safety
    ///
    /// Only for the C core, as `log_start` of `struct vfio_log_ops`.
    unsafe extern "C" fn log_start(
        vdev: *mut bindings::vfio_device,
        _ranges: *mut bindings::rb_root_cached,
        _nnodes: u32,
        page_size: *mut u64,
    ) -> c_int {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        // The client has said what it would like, and is told what it gets.
        // SAFETY: The core passes a valid pointer.
        unsafe { *page_size = PAGE_SIZE as u64 };
        errno(operations.pins().start_log())
    }

    /// # Safety
    ///
    /// Only for the C core, as `log_stop` of `struct vfio_log_ops`.
    unsafe extern "C" fn log_stop(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: As in `open`.
        errno(unsafe { Self::operations(vdev) }.pins().stop_log())
    }

    /// # Safety
    ///
    /// Only for the C core, as `log_read_and_clear` of `struct vfio_log_ops`.
    unsafe extern "C" fn log_read_and_clear(
        vdev: *mut bindings::vfio_device,
        iova: c_ulong,
        length: c_ulong,
        dirty: *mut bindings::iova_bitmap,
    ) -> c_int {
        // SAFETY: As in `open`.
        let operations = unsafe { Self::operations(vdev) };
        // SAFETY: The bitmap is the core's, for this call.
        let report = unsafe { Report::new(dirty) };
        // The bitmap begins at the IOVA: what lies before it in its page could not be reported.
        if iova % PAGE_SIZE != 0 {
            return EINVAL.to_errno();
        }
        let reported = Pages::of(iova as u64, length as u64)
            .and_then(|pages| operations.pins().report_log(pages, &report));
        errno(reported)
    }
}

fn errno(result: Result) -> c_int {
    result.map_or_else(|error| error.to_errno(), |()| 0)
}

/// Performs a read or write at `*position`, and moves it behind what was done.
fn transfer(position: *mut bindings::loff_t, perform: impl FnOnce(u64) -> Result<usize>) -> isize {
    // SAFETY: The core passes a valid position.
    let at = unsafe { *position };
    let Ok(at) = u64::try_from(at) else {
        return EINVAL.to_errno() as isize;
    };
    match perform(at) {
        Ok(done) => {
            // SAFETY: As above. A file's read and write transfer at most `MAX_RW_COUNT` bytes.
            unsafe { *position += done as bindings::loff_t };
            done as isize
        }
        Err(error) => error.to_errno() as isize,
    }
}
