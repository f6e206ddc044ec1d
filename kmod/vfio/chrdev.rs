// SPDX-License-Identifier: GPL-2.0
//! Character devices that come and go: a node in a class, with the ownership of its creator.
//!
//! The kernel crate's `miscdevice` has fixed names and no `poll`.
//!
//! C headers: `include/linux/cdev.h`, `include/linux/fs.h`, `include/linux/idr.h`.

use super::{
    bindings,
    class::Class,
    inode::Inode,
    mdev,
    owner::Owner,
    vm::NewVma,
    wait::WaitQueue, //
};
use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{addr_of_mut, NonNull},
};
use kernel::{
    error::to_result,
    fs::file::{flags, File},
    prelude::*,
    sync::Arc,
    types::{ForeignOwnable, Opaque},
    uaccess::UserPtr, //
};

/// `poll`: there is something to read.
pub(crate) const POLL_IN: u32 = bindings::POLLIN | bindings::POLLRDNORM;
/// `poll`: the other side is gone.
pub(crate) const POLL_GONE: u32 = bindings::POLLHUP | bindings::POLLERR;

/// What a node's open files do. Dropping the value is the file's last close.
pub(crate) trait Operations: Sized + Send + Sync + 'static {
    /// What the node stands for.
    type Target: Send + Sync + 'static;

    /// Makes the state of a newly opened file.
    fn open(target: Arc<Self::Target>) -> Result<Pin<KBox<Self>>>;

    /// Performs an ioctl.
    fn ioctl(&self, file: &File, command: u32, argument: UserPtr) -> Result<isize>;

    /// What the mappings of all files of the target belong to. It lives as long as the file.
    fn inode(&self) -> &Inode;

    /// Sets up a mapping.
    fn mmap(&self, vma: &NewVma<'_>) -> Result;

    /// Where to wait for a change of [`Operations::ready`]. It lives as long as the file.
    fn changes(&self) -> &WaitQueue;

    /// Says what the file is ready for: `POLL_*`.
    fn ready(&self) -> u32;
}

/// A range of device numbers for nodes of one kind.
#[pin_data(PinnedDrop)]
pub(crate) struct Numbers {
    first: bindings::dev_t,
    count: u32,
    class: Class,
    #[pin]
    minors: Opaque<bindings::ida>,
}

// SAFETY: The `ida` has a lock of its own, and the rest does not change.
unsafe impl Send for Numbers {}
// SAFETY: As above.
unsafe impl Sync for Numbers {}

impl Numbers {
    /// Reserves numbers for `count` nodes at a time, in `class`.
    pub(crate) fn new(class: Class, name: &'static CStr, count: u32) -> Result<Arc<Self>> {
        let mut first = 0;
        // SAFETY: `first` is valid for writes, and the name lives for ever.
        to_result(unsafe {
            bindings::alloc_chrdev_region(&raw mut first, 0, count, name.as_char_ptr())
        })?;
        Arc::pin_init(
            pin_init!(Self {
                first,
                count,
                class,
                // SAFETY: `slot` is valid for writes.
                minors <- Opaque::ffi_init(|slot| unsafe { bindings::muser_ida_init(slot) }),
            }),
            GFP_KERNEL,
        )
        .inspect_err(|_| {
            // SAFETY: Reserved above.
            unsafe { bindings::unregister_chrdev_region(first, count) }
        })
    }

    /// The class of the nodes.
    pub(crate) fn class(&self) -> &Class {
        &self.class
    }

    fn minor(&self) -> Result<u32> {
        // SAFETY: The `ida` is initialised.
        let minor = unsafe {
            bindings::ida_alloc_range(self.minors.get(), 0, self.count - 1, bindings::GFP_KERNEL)
        };
        u32::try_from(minor).map_err(|_| Error::from_errno(minor))
    }

    fn free_minor(&self, minor: u32) {
        // SAFETY: The `ida` is initialised, and gave out the minor.
        unsafe { bindings::ida_free(self.minors.get(), minor) };
    }
}

#[pinned_drop]
impl PinnedDrop for Numbers {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Reserved by `new`; every node held a reference to `self`, so all are gone.
        unsafe { bindings::unregister_chrdev_region(self.first, self.count) };
    }
}

/// What the C side knows a node by; freed when the last reference to `device` goes.
#[repr(C)]
struct Inner<O: Operations> {
    cdev: bindings::cdev,
    device: bindings::device,
    numbers: Arc<Numbers>,
    minor: u32,
    owner: Owner,
    target: Arc<O::Target>,
}

/// A node in `/dev/muser`. Dropping it removes the node; files that are open stay open.
///
/// # Invariants
///
/// The pointer is to a registered node, and holds a reference to its `device`.
pub(crate) struct Node<O: Operations>(NonNull<Inner<O>>);

// SAFETY: The C core has locks of its own; the rest does not change.
unsafe impl<O: Operations> Send for Node<O> {}
// SAFETY: As above.
unsafe impl<O: Operations> Sync for Node<O> {}

impl<O: Operations> Node<O> {
    /// Makes a node named after `parent`, which belongs to `owner`, mode 0600.
    pub(crate) fn new(
        numbers: &Arc<Numbers>,
        parent: &mdev::Device,
        owner: Owner,
        target: Arc<O::Target>,
    ) -> Result<Self> {
        let minor = numbers.minor()?;
        let inner = KBox::new(
            Inner::<O> {
                cdev: pin_init::zeroed(),
                device: pin_init::zeroed(),
                numbers: numbers.clone(),
                minor,
                owner,
                target,
            },
            GFP_KERNEL_ACCOUNT,
        )
        .inspect_err(|_| numbers.free_minor(minor))?;
        let inner = KBox::into_raw(inner);
        // SAFETY: `inner` was just leaked; from here on it belongs to its `device`.
        let (cdev, device) =
            unsafe { (addr_of_mut!((*inner).cdev), addr_of_mut!((*inner).device)) };
        // SAFETY: The device is zeroed, and not initialised twice.
        unsafe { bindings::device_initialize(device) };
        // SAFETY: The device is not registered yet, so that nobody reads it.
        unsafe {
            (*device).class = numbers.class.as_ptr();
            (*device).type_ = VTable::<O>::DEVICE_TYPE;
            (*device).parent = parent.as_device();
            (*device).devt = numbers.first + minor;
        }
        // SAFETY: The cdev is zeroed, and the operations live for ever.
        unsafe { bindings::cdev_init(cdev, VTable::<O>::FILE_OPERATIONS) };
        // SAFETY: Not registered yet.
        unsafe { (*cdev).owner = VTable::<O>::FILE_OPERATIONS.owner };
        // INVARIANT: Registered below, or dropped with only the reference to put.
        let result = (|| {
            // SAFETY: The device is initialised and the name is copied.
            to_result(unsafe {
                bindings::dev_set_name(device, c"%s".as_char_ptr(), parent.name().as_char_ptr())
            })?;
            // SAFETY: Both are initialised.
            to_result(unsafe { bindings::cdev_device_add(cdev, device) })
        })();
        if let Err(error) = result {
            // SAFETY: Gives back the reference of `device_initialize`, which frees `inner`.
            unsafe { bindings::put_device(device) };
            return Err(error);
        }
        // SAFETY: `inner` comes from a box.
        Ok(Self(unsafe { NonNull::new_unchecked(inner) }))
    }
}

impl<O: Operations> Drop for Node<O> {
    fn drop(&mut self) {
        let inner = self.0.as_ptr();
        // SAFETY: By the invariant.
        unsafe {
            bindings::cdev_device_del(addr_of_mut!((*inner).cdev), addr_of_mut!((*inner).device))
        };
        // SAFETY: By the invariant. Open files hold references of their own, through the cdev.
        unsafe { bindings::put_device(addr_of_mut!((*inner).device)) };
    }
}

extern "C" {
    /// The module itself, `THIS_MODULE` of `<linux/export.h>`, for its address.
    static __this_module: Opaque<u8>;
}

/// The owner of file operations: `__fput` looks at it after it has given back everything else of
/// the file's.
pub(super) const fn this_module() -> *mut bindings::module {
    (&raw const __this_module).cast_mut().cast()
}

struct VTable<O>(PhantomData<O>);

impl<O: Operations> VTable<O> {
    const DEVICE_TYPE: &'static bindings::device_type = &bindings::device_type {
        name: super::char_ptr(c"muser"),
        devnode: Some(Self::devnode),
        release: Some(Self::release_device),
        ..pin_init::zeroed()
    };

    const FILE_OPERATIONS: &'static bindings::file_operations = &bindings::file_operations {
        owner: this_module(),
        open: Some(Self::open),
        release: Some(Self::release),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: Some(Self::ioctl),
        mmap: Some(Self::mmap),
        poll: Some(Self::poll),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `device` must be the field of an `Inner<O>`.
    unsafe fn inner(device: *const bindings::device) -> *mut Inner<O> {
        device
            .cast::<u8>()
            .wrapping_sub(offset_of!(Inner<O>, device))
            .cast_mut()
            .cast()
    }

    /// # Safety
    ///
    /// Only for the C core, as `devnode` of `struct device_type`.
    unsafe extern "C" fn devnode(
        device: *const bindings::device,
        mode: *mut bindings::umode_t,
        uid: *mut bindings::kuid_t,
        gid: *mut bindings::kgid_t,
    ) -> *mut c_char {
        // SAFETY: Only devices of this type come here.
        let inner = unsafe { Self::inner(device) };
        if !mode.is_null() {
            // SAFETY: Not null, so valid for writes; likewise below.
            unsafe { *mode = 0o600 };
        }
        if !uid.is_null() {
            // SAFETY: As above.
            unsafe { *uid = (*inner).owner.uid };
        }
        if !gid.is_null() {
            // SAFETY: As above.
            unsafe { *gid = (*inner).owner.gid };
        }
        // SAFETY: The device has its name.
        unsafe { bindings::muser_devnode_name(device) }
    }

    /// # Safety
    ///
    /// Only for the C core, as `release` of `struct device_type`.
    unsafe extern "C" fn release_device(device: *mut bindings::device) {
        // SAFETY: Only devices of this type come here, each a leaked box; the last reference is gone.
        let inner = unsafe { KBox::from_raw(Self::inner(device)) };
        inner.numbers.free_minor(inner.minor);
    }

    /// # Safety
    ///
    /// Only for the C core, as `open` of `struct file_operations`.
    unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        const { assert!(offset_of!(Inner<O>, cdev) == 0) };
        // SAFETY: The inode is that of a cdev of this type, which is the head of its `Inner`.
        let inner: *mut Inner<O> = unsafe { bindings::muser_inode_cdev(inode) }.cast();
        // SAFETY: The VFS holds a reference to the cdev, which holds one to the device.
        let target = unsafe { (*inner).target.clone() };
        match O::open(target) {
            Ok(state) => {
                // SAFETY: The file is being opened, and the state, which goes with its release,
                // keeps the inode.
                unsafe { state.inode().adopt(file) };
                // SAFETY: The file is being opened; nobody reads the field.
                unsafe { (*file).private_data = state.into_foreign() };
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `release` of `struct file_operations`.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: `open` put the box there, and this is the file's last use.
        drop(unsafe { <Pin<KBox<O>>>::from_foreign((*file).private_data) });
        0
    }

    /// # Safety
    ///
    /// Only for the C core, as `ioctl` of `struct file_operations`.
    unsafe extern "C" fn ioctl(
        file: *mut bindings::file,
        command: c_uint,
        argument: c_ulong,
    ) -> c_long {
        // SAFETY: `open` put the box there, and the file is in use.
        let state = unsafe { <Pin<KBox<O>>>::borrow((*file).private_data) };
        // SAFETY: The caller holds a reference, and nobody has an `fdget_pos` of this type's files:
        // they have no position.
        let file = unsafe { File::from_raw_file(file) };
        match state.ioctl(file, command, UserPtr::from_addr(argument)) {
            Ok(value) => value as c_long,
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `mmap` of `struct file_operations`.
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: As in `ioctl`.
        let state = unsafe { <Pin<KBox<O>>>::borrow((*file).private_data) };
        // SAFETY: The core passes a mapping that is being set up.
        match state.mmap(unsafe { &NewVma::from_raw(vma) }) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `poll` of `struct file_operations`.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: As in `ioctl`.
        let state = unsafe { <Pin<KBox<O>>>::borrow((*file).private_data) };
        // SAFETY: As in `ioctl`.
        let file = unsafe { File::from_raw_file(file) };
        // SAFETY: The core passes its table. The state lives as long as the file, and is never
        // borrowed mutably, so the queue is the same one for all that time.
        unsafe { Pin::get_ref(state).changes().register(file, table) };
        state.ready()
    }
}

/// Whether a file was opened for reading and writing.
pub(crate) fn is_read_write(file: &File) -> bool {
    file.flags() & flags::O_ACCMODE == flags::O_RDWR
}

/// Whether a file was opened with `O_NONBLOCK`.
pub(crate) fn is_nonblocking(file: &File) -> bool {
    file.flags() & flags::O_NONBLOCK != 0
}
