// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The storm over a supervised socket, which needs no guest: processes of the sample are killed under
//! their clients, and nothing is lost, doubled or stuck.

use std::process::Command;

#[test]
fn kills_behind_a_supervisor_lose_nothing() {
    let storm = env!("CARGO_BIN_EXE_storm");
    for threads in [1, 4] {
        let device = format!("{storm} counter --quiet --threads {threads}");
        let storm = Command::new(storm)
            .args(["--road", "socket", "--kills", "150", "--device", &device])
            .output()
            .unwrap();

        let said = String::from_utf8_lossy(&storm.stdout);
        println!("{said}{}", String::from_utf8_lossy(&storm.stderr));
        assert!(storm.status.success(), "{}", storm.status);
        let last = said.lines().last().unwrap();
        assert!(last.starts_with("kills 150, "), "{last}");
        assert!(last.ends_with("lost 0, doubled 0, stuck 0"), "{last}");
    }
}
