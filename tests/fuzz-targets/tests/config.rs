// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration space against the model, without a fuzzer to choose the inputs.

use proptest::prelude::*;

proptest! {
    #[test]
    fn any_device_and_accesses_do_as_the_model(data in prop::collection::vec(any::<u8>(), 0..600)) {
        muser_fuzz_targets::config::run(&data);
    }
}
