// SPDX-License-Identifier: GPL-2.0
//! Mediated devices: a parent which makes a device for each UUID written to its type's `create`.
//!
//! C header: `include/linux/mdev.h`.

use super::{bindings, sysfs};
use core::{
    marker::PhantomData,
    ptr::null_mut, //
};
use kernel::{
    container_of,
    error::{from_err_ptr, to_result},
    prelude::*,
    types::Opaque, //
};

/// What makes and unmakes devices. The value lives as long as its device is bound.
pub(crate) trait Driver: Sized + Send + Sync + 'static {
    /// What all devices of a type share.
    type Context: Send + Sync + 'static;

    /// Files beside each device: `vfio::sysfs::File::ENTRY` or `FACT`.
    const ATTRIBUTES: &'static [sysfs::Entry<Self>];

    /// Makes a device, in the process which wrote to `create`. Dropping the value unmakes it, and
    /// may wait for its users.
    fn probe(device: &Device, context: &Self::Context) -> Result<Pin<KBox<Self>>>;
}

/// A mediated device, while it is being made.
///
/// # Invariants
///
/// The pointer is valid.
pub(crate) struct Device(*mut bindings::mdev_device);

impl Device {
    /// The `struct device` inside.
    pub(super) fn as_device(&self) -> *mut bindings::device {
        // SAFETY: By the invariant.
        unsafe { &raw mut (*self.0).dev }
    }

    /// Its name: the UUID.
    pub(crate) fn name(&self) -> &CStr {
        // SAFETY: A device that is being bound has a name, which does not change.
        unsafe { CStr::from_char_ptr((*self.as_device()).kobj.name) }
    }
}

/// A type of device.
pub(crate) struct Type {
    /// Second half of the type's directory: the first is the class of the parent.
    pub(crate) name: &'static CStr,
    /// Content of the type's `name`.
    pub(crate) pretty_name: &'static CStr,
    /// Content of the type's `description`.
    pub(crate) description: &'static CStr,
    /// Content of `device_api`, which is what a client's driver goes by.
    pub(crate) device_api: &'static CStr,
    /// Name of the driver on the mdev bus, and of the parent device.
    pub(crate) parent: &'static CStr,
    /// How many devices there may be.
    pub(crate) max_instances: u32,
}

/// A registered driver and a parent with one type.
pub(crate) struct Registration<D: Driver>(Pin<KBox<Inner<D>>>);

struct Inner<D: Driver> {
    driver: Opaque<bindings::mdev_driver>,
    parent: Opaque<bindings::mdev_parent>,
    mdev_type: Opaque<bindings::mdev_type>,
    types: Opaque<[*mut bindings::mdev_type; 1]>,
    attributes: sysfs::Group,
    parent_attributes: sysfs::Group,
    description: &'static Type,
    context: D::Context,
    device: *mut bindings::device,
}

// SAFETY: What changes inside is changed by the C core, which has its own locks.
unsafe impl<D: Driver> Send for Registration<D> {}
// SAFETY: As above.
unsafe impl<D: Driver> Sync for Registration<D> {}

impl<D: Driver> Registration<D> {
    /// Registers the driver, makes a parent device in `class` with files for `parent_attributes`, and
    /// registers the type with it.
    pub(crate) fn new(
        module: &'static ThisModule,
        class: &super::class::Class,
        description: &'static Type,
        parent_attributes: &[sysfs::Entry<D::Context>],
        context: D::Context,
    ) -> Result<Self> {
        let inner = Pin::from(KBox::new(
            Inner {
                driver: Opaque::zeroed(),
                parent: Opaque::zeroed(),
                mdev_type: Opaque::zeroed(),
                types: Opaque::zeroed(),
                attributes: sysfs::Group::new(D::ATTRIBUTES)?,
                parent_attributes: sysfs::Group::new(parent_attributes)?,
                description,
                context,
                device: null_mut(),
            },
            GFP_KERNEL,
        )?);
        Self::fill(&inner, module);

        // SAFETY: The driver is filled in and does not move until it is unregistered.
        to_result(unsafe { bindings::mdev_register_driver(inner.driver.get()) })?;
        let driver = Undo::new(|| {
            // SAFETY: Registered above.
            unsafe { bindings::mdev_unregister_driver(inner.driver.get()) }
        });
        // No bus and no driver: the C core takes the class for the first half of the type's name.
        let data: *const D::Context = &inner.context;
        // SAFETY: `inner` does not move, and outlives the device.
        let groups = unsafe { inner.parent_attributes.list() };
        // SAFETY: The class is registered, the name is copied, and the attributes work on the data,
        // which outlive the device.
        let device = from_err_ptr(unsafe {
            bindings::device_create_with_groups(
                class.as_ptr(),
                null_mut(),
                0,
                data.cast_mut().cast(),
                groups,
                c"%s".as_char_ptr(),
                description.parent.as_char_ptr(),
            )
        })?;
        let parent = Undo::new(|| {
            // SAFETY: Made above.
            unsafe { bindings::device_unregister(device) }
        });
        // SAFETY: Everything passed lives until the parent is unregistered.
        to_result(unsafe {
            bindings::mdev_register_parent(
                inner.parent.get(),
                device,
                inner.driver.get(),
                inner.types.get().cast(),
                1,
            )
        })?;
        driver.defuse();
        parent.defuse();

        let mut inner = inner;
        // SAFETY: The field is not structurally pinned.
        unsafe { inner.as_mut().get_unchecked_mut() }.device = device;
        Ok(Self(inner))
    }

    fn fill(inner: &Pin<KBox<Inner<D>>>, module: &'static ThisModule) {
        let description = inner.description;
        // SAFETY: Nobody else knows of these structs yet, and `inner` does not move; likewise below.
        let groups = unsafe { inner.attributes.list() };
        // SAFETY: As above.
        let mdev_type = unsafe { &mut *inner.mdev_type.get() };
        mdev_type.sysfs_name = description.name.as_char_ptr();
        mdev_type.pretty_name = description.pretty_name.as_char_ptr();
        // SAFETY: As above.
        unsafe { *inner.types.get() = [inner.mdev_type.get()] };

        // SAFETY: As above.
        let driver = unsafe { &mut *inner.driver.get() };
        driver.device_api = description.device_api.as_char_ptr();
        driver.max_instances = description.max_instances;
        driver.probe = Some(VTable::<D>::probe);
        driver.remove = Some(VTable::<D>::remove);
        driver.show_description = Some(VTable::<D>::show_description);
        driver.driver.name = description.parent.as_char_ptr();
        driver.driver.owner = module.as_ptr();
        driver.driver.dev_groups = groups;
    }
}

impl<D: Driver> Drop for Registration<D> {
    fn drop(&mut self) {
        // SAFETY: Registered by `new`, in the opposite order. Unregistering the parent removes its
        // devices.
        unsafe { bindings::mdev_unregister_parent(self.0.parent.get()) };
        // SAFETY: As above.
        unsafe { bindings::device_unregister(self.0.device) };
        // SAFETY: As above.
        unsafe { bindings::mdev_unregister_driver(self.0.driver.get()) };
    }
}

/// Undoes a step of a registration that fails in a later one.
struct Undo<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Undo<F> {
    fn new(undo: F) -> Self {
        Self(Some(undo))
    }

    fn defuse(mut self) {
        self.0 = None;
    }
}

impl<F: FnOnce()> Drop for Undo<F> {
    fn drop(&mut self) {
        if let Some(undo) = self.0.take() {
            undo();
        }
    }
}

struct VTable<D>(PhantomData<D>);

impl<D: Driver> VTable<D> {
    /// # Safety
    ///
    /// Only for the C core, as `probe` of `struct mdev_driver`.
    unsafe extern "C" fn probe(mdev: *mut bindings::mdev_device) -> c_int {
        // INVARIANT: The core passes a valid device.
        let device = Device(mdev);
        let raw = device.as_device();
        // SAFETY: The device is being bound to a driver that `Registration` filled in, so that the
        // driver is the field of an `Inner<D>`.
        let inner = unsafe {
            let driver: *const bindings::mdev_driver =
                container_of!((*raw).driver, bindings::mdev_driver, driver);
            &*container_of!(Opaque::cast_from(driver), Inner<D>, driver)
        };
        match D::probe(&device, &inner.context) {
            Ok(data) => {
                // SAFETY: The value stays where it is until `remove` has it back.
                let data = KBox::into_raw(unsafe { Pin::into_inner_unchecked(data) });
                // SAFETY: The core holds the device's lock; nobody reads the field yet.
                unsafe { (*raw).driver_data = data.cast() };
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the C core, as `remove` of `struct mdev_driver`.
    unsafe extern "C" fn remove(mdev: *mut bindings::mdev_device) {
        // SAFETY: `probe` leaked the box, and the device is being unbound.
        let data = unsafe { KBox::from_raw((*mdev).dev.driver_data.cast::<D>()) };
        drop(Pin::from(data));
    }

    /// # Safety
    ///
    /// Only for the C core, as `show_description` of `struct mdev_driver`.
    unsafe extern "C" fn show_description(
        mdev_type: *mut bindings::mdev_type,
        buffer: *mut c_char,
    ) -> isize {
        // SAFETY: The type is the field of an `Inner<D>`.
        let inner = unsafe {
            &*container_of!(
                Opaque::cast_from(mdev_type.cast_const()),
                Inner<D>,
                mdev_type
            )
        };
        let text = inner.description.description.as_char_ptr();
        // SAFETY: `buffer` is a page, as `sysfs_emit` wants it.
        (unsafe { bindings::sysfs_emit(buffer, c"%s\n".as_char_ptr(), text) }) as isize
    }
}
