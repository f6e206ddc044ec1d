// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client's stream, without a fuzzer to choose what is answered.

use proptest::prelude::*;

proptest! {
    #[test]
    fn client_survives_any_server(data in prop::collection::vec(any::<u8>(), 0..400)) {
        muser_fuzz_targets::client::run(&data);
    }
}
