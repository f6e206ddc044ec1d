// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A supervisor that can have no more descriptors. It is alone in its process, whose limit it meets.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use libmuser::supervise::Supervisor;
use nix::sys::resource::{getrlimit, setrlimit, Resource};

#[test]
fn client_at_the_limit_of_descriptors_is_turned_away_in_one_turn() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut supervisor = Supervisor::listen(&path, Default::default()).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let files: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();

    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || {
        supervisor.turn(Some(Duration::ZERO), &[]).unwrap();
        done.send(supervisor).unwrap();
    });

    let supervisor = is_done.recv_timeout(Duration::from_secs(20));
    assert!(!supervisor.expect("the turn ends").has_client());
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(files);
}
