// SPDX-License-Identifier: GPL-2.0
//! Raw bindings, made at build time from `helpers.h` and the headers of the kernel being built for.
//!
//! Only the abstractions beside this file may use them.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_imports
)]

// The kernel crate's own types, where it has them, so that both sets of bindings fit together.
pub(crate) use kernel::bindings::*;
use kernel::ffi;
use pin_init::MaybeZeroable;

type __kernel_size_t = usize;
type __kernel_ssize_t = isize;

include!("bindings_generated.rs");
