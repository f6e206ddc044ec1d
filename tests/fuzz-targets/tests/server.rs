// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server's stream, without a fuzzer to choose what is said.

use proptest::prelude::*;

proptest! {
    #[test]
    fn server_survives_any_client(data in prop::collection::vec(any::<u8>(), 0..400)) {
        muser_fuzz_targets::server::run(&data);
    }
}
