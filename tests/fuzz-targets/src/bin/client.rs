// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client's stream, for a fuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| muser_fuzz_targets::client::run(data));
