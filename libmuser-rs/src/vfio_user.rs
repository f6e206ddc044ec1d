// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vfio-user protocol, as both of its sides use it; it knows neither server nor client.
//!
//! What comes from the other side is hostile: it is parsed here, once, into types which can't be
//! wrong, or is refused with a sentence that says what is.
//!
//! The source of all numbers is `docs/interop/vfio-user.rst` of QEMU; structures that it takes over
//! from the ioctls are those of `<linux/vfio.h>`.

pub mod capabilities;
pub(crate) mod control;
pub mod link;
pub(crate) mod stream;
pub mod wire;
