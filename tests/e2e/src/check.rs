// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Expectations that fail with a sentence: what was asked, what was expected, what came.

use anyhow::{bail, ensure, Result};
use std::fmt::Debug;
use std::io;

/// Name of an errno, as the manual pages have it.
pub fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::E2BIG => "E2BIG",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ENOTTY => "ENOTTY",
        libc::ENOSPC => "ENOSPC",
        libc::ERANGE => "ERANGE",
        libc::EBADSLT => "EBADSLT",
        libc::ENOMSG => "ENOMSG",
        libc::EPROTO => "EPROTO",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ENOTCONN => "ENOTCONN",
        libc::EISCONN => "EISCONN",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::ESTALE => "ESTALE",
        libc::ECANCELED => "ECANCELED",
        libc::EDQUOT => "EDQUOT",
        libc::ESHUTDOWN => "ESHUTDOWN",
        _ => return format!("errno {errno}"),
    };
    name.to_owned()
}

/// The errno of an error; 0 where it carries none.
pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// Expects `result` to be an error with this errno.
///
/// # Errors
///
/// Says `what` gave instead.
pub fn fails<T: Debug>(what: &str, result: io::Result<T>, errno: i32) -> Result<()> {
    fails_as(what, result, &[errno])
}

/// Expects `result` to be an error with one of these errnos: for calls whose answer is VFIO's
/// core's and differs between its versions or between group and cdev.
///
/// # Errors
///
/// Says `what` gave instead.
pub fn fails_as<T: Debug>(what: &str, result: io::Result<T>, errnos: &[i32]) -> Result<()> {
    let wanted = errnos
        .iter()
        .map(|&errno| errno_name(errno))
        .collect::<Vec<_>>()
        .join(" or ");
    match result {
        Ok(value) => bail!("{what}: succeeded with {value:?}, expected {wanted}"),
        Err(error) => {
            let got = errno_of(&error);
            ensure!(
                errnos.contains(&got),
                "{what}: failed with {}, expected {wanted}",
                errno_name(got)
            );
            Ok(())
        }
    }
}

/// Expects `got` to be `expected`.
///
/// # Errors
///
/// Says `what` was instead.
pub fn equal<T: PartialEq + Debug>(what: &str, got: T, expected: T) -> Result<()> {
    ensure!(
        got == expected,
        "{what}: is {got:x?}, expected {expected:x?}"
    );
    Ok(())
}

/// Expects `result` to be a success, and hands out its value.
///
/// # Errors
///
/// Says with which errno `what` failed.
pub fn works<T>(what: &str, result: io::Result<T>) -> Result<T> {
    result.map_err(|error| anyhow::anyhow!("{what}: failed with {}", errno_text(&error)))
}

/// An error with the name of its errno.
pub fn errno_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => format!("{} ({error})", errno_name(errno)),
        None => error.to_string(),
    }
}
