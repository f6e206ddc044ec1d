// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a fuzzer has found worth keeping, and what it has found wrong, once more.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Targets look at the whole process, so they run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a target with each file of its folders; tells how many those were.
fn replay(name: &str) -> usize {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let run = muser_fuzz_targets::target(name).expect("it is one of them");
    let mut count = 0;
    for folder in ["corpus", "regressions"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(folder)
            .join(name);
        // There may have been nothing wrong yet.
        let Ok(files) = std::fs::read_dir(&folder) else {
            continue;
        };
        for file in files {
            let path = file.expect("it can be listed").path();
            // The last line of a panic's output.
            println!("{}", path.display());
            run(&std::fs::read(&path).expect("it can be read"));
            count += 1;
        }
    }
    count
}

#[test]
fn corpus_of_config_holds() {
    assert_ne!(replay("config"), 0);
}

#[test]
fn corpus_of_server_holds() {
    assert_ne!(replay("server"), 0);
}

#[test]
fn corpus_of_client_holds() {
    assert_ne!(replay("client"), 0);
}
