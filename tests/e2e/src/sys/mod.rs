// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system calls that the standard library lacks, as safe functions: the only `unsafe` of the
//! tests.

mod dma;
mod event;
mod mapping;
mod memory;
mod process;
mod userfault;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use iommufd_bindings::{iommu_ioas_map, iommu_ioas_unmap};
use muser_uapi::{muser_attach, muser_dma, muser_doorbell, muser_next, muser_query, muser_trigger};
use vfio_bindings::bindings::vfio as vfio_abi;
use zerocopy::IntoBytes;

pub use dma::*;
pub use event::*;
pub use mapping::*;
pub use memory::*;
pub use process::*;
pub use userfault::*;

/// A structure that an ioctl takes and returns.
///
/// # Safety
///
/// Every bit pattern is a value of the type, and an ioctl given one writes within its size.
pub unsafe trait IoctlArgument {}

// SAFETY: plain integers, written as a whole.
unsafe impl IoctlArgument for muser_attach {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_next {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_trigger {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_query {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_dma {}
// SAFETY: as above.
unsafe impl IoctlArgument for muser_doorbell {}
// SAFETY: plain integers; `argsz` bounds what the kernel writes.
unsafe impl IoctlArgument for vfio_abi::vfio_device_info {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_region_info {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_irq_info {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_group_status {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_device_bind_iommufd {}
// SAFETY: as above.
unsafe impl IoctlArgument for vfio_abi::vfio_device_attach_iommufd_pt {}
// SAFETY: plain integers. What the addresses in it lead to is written only through a device, and a
// client maps nothing but `Mapping`s, whose memory is accessed through raw pointers alone.
unsafe impl IoctlArgument for vfio_abi::vfio_iommu_type1_dma_map {}
// SAFETY: as above.
unsafe impl IoctlArgument for iommu_ioas_map {}
// SAFETY: plain integers, written as a whole.
unsafe impl IoctlArgument for iommu_ioas_unmap {}
// SAFETY: a descriptor passed by pointer, as VFIO_GROUP_SET_CONTAINER takes it.
unsafe impl IoctlArgument for i32 {}

fn result(value: libc::c_int) -> io::Result<libc::c_int> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// Calls an ioctl with a structure of its type.
///
/// # Errors
///
/// The errno of the ioctl. The structure holds what the kernel wrote all the same.
pub fn ioctl<T: IoctlArgument>(
    file: impl AsFd,
    number: u32,
    argument: &mut T,
) -> io::Result<libc::c_int> {
    // SAFETY: `T` promises that the ioctl stays within the structure.
    result(unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            number.into(),
            std::ptr::from_mut(argument),
        )
    })
}

/// Calls an ioctl whose argument is a number, or which has none.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_value(file: impl AsFd, number: u32, value: i32) -> io::Result<libc::c_int> {
    // SAFETY: a number is not followed; an ioctl that takes it for an address finds it in the
    // first or the last pages, where nothing is mapped.
    result(unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            number.into(),
            libc::c_long::from(value),
        )
    })
}

/// Calls an ioctl with a string.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_string(
    file: impl AsFd,
    number: u32,
    string: &std::ffi::CStr,
) -> io::Result<libc::c_int> {
    // SAFETY: the ioctl reads a string that ends.
    result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.into(), string.as_ptr()) })
}

/// Calls an ioctl with any bytes, right or wrong, and copies back what the kernel wrote.
///
/// # Errors
///
/// The errno of the ioctl.
///
/// # Panics
///
/// When the kernel wrote behind the bytes: then nothing later can be believed.
pub fn ioctl_bytes(file: impl AsFd, number: u32, bytes: &mut [u8]) -> io::Result<libc::c_int> {
    const CANARY: u8 = 0xA5;
    const SLACK: usize = 64 << 10;
    let mut buffer = vec![u64::from_ne_bytes([CANARY; 8]); (bytes.len() + SLACK).div_ceil(8)];
    let room = buffer.as_mut_slice().as_mut_bytes();
    room[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the slack is larger than any structure of the ioctls that are tried.
    let value = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.into(), room.as_mut_ptr()) };
    let value = result(value);
    bytes.copy_from_slice(&room[..bytes.len()]);
    assert!(
        room[bytes.len()..].iter().all(|&byte| byte == CANARY),
        "ioctl {number:#x} wrote behind its argument of {} bytes",
        bytes.len()
    );
    value
}

/// Calls an ioctl with the address of a byte in `memory`, from which on the argument may run into
/// memory that is not there.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_at(
    file: impl AsFd,
    number: u32,
    memory: &Mapping,
    offset: usize,
) -> io::Result<libc::c_int> {
    let address = memory.address() + offset as u64;
    // SAFETY: the address is in a mapping which is only accessed through raw pointers, or behind
    // it where `Mapping::with_hole` made sure that nothing is.
    result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.into(), address) })
}

/// Calls an ioctl with a string that returns a new descriptor, as VFIO_GROUP_GET_DEVICE_FD does.
///
/// # Errors
///
/// The errno of the ioctl.
pub fn ioctl_open(file: impl AsFd, number: u32, name: &std::ffi::CStr) -> io::Result<File> {
    let fd = ioctl_string(file, number, name)?;
    // SAFETY: the kernel has just made it for this call.
    Ok(unsafe { File::from_raw_fd(fd) })
}
