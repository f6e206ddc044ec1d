// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `muserctl probe`, against a device served over a socket.

#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::JoinHandle;

use libmuser::transport::SocketTransport;
use libmuser::{Access, Bar, Device, Ended, Msix, PciBuilder, Region, Result, Server, Stop};
use serde_json::{json, Value};
use tempfile::TempDir;

/// A register says its own offset.
struct Echo;

impl Device for Echo {
    fn read(&mut self, access: Access) -> Result<u64> {
        match access.region {
            Region::Bar(0) => Ok(access.offset),
            _ => access.unhandled_read(),
        }
    }
}

/// The device, as long as this lives.
struct Served {
    dir: TempDir,
    stop: Stop,
    server: Option<JoinHandle<Result<Ended>>>,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bar = Bar::memory32(0x2000).mappable(0x1000..0x2000);
        let model = PciBuilder::new(0x1234, 0x5678).class(0x08, 0x80, 0x01);
        let model = model.subsystem(0x1af4, 0x1100).bar(0, bar);
        let model = model.bar(1, Bar::memory32(0x1000));
        let model = model.msix(Msix::new(4).table(1, 0).pba(1, 0x800)).build();
        let socket = dir.path().join("device.sock");
        let transport = SocketTransport::listen(&socket, Default::default()).unwrap();
        let mut server = Server::new(model.unwrap(), transport, |_| Ok(Echo)).unwrap();
        let stop = Stop::new().unwrap();
        let stopped = stop.clone();
        let server = std::thread::spawn(move || server.run_until(&stopped));
        Self {
            dir,
            stop,
            server: Some(server),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("device.sock")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.server.take().unwrap().join();
        if !std::thread::panicking() {
            assert_eq!(ended.unwrap().unwrap(), Ended::Stopped);
        }
    }
}

fn probe(socket: &Path, arguments: &[&str]) -> Output {
    let mut muserctl = Command::new(env!("CARGO_BIN_EXE_muserctl"));
    let muserctl = muserctl.arg("probe").arg(socket).args(arguments);
    muserctl.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn device_is_shown() {
    let served = Served::new();

    let output = probe(&served.socket(), &["--read", "0:8:12"]);

    let text = text(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for line in [
        "device         PCI 1234:5678, class 088001, revision 00\n",
        "subsystem      1af4:1100\n",
        "BAR 0          8 KiB (8192), read, write, mappable 0x1000..0x2000\n",
        "MSI-X          4 vectors",
        "\nregion 0 at 0x8:\n00000008  08 00 00 00 00 00 00 00 10 00 00 00\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }
}

#[test]
fn json_has_all_of_it() {
    let served = Served::new();

    let output = probe(&served.socket(), &["--json", "--read", "0:0x1ffe:4"]);

    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let probe = &document["probe"];
    assert_eq!(probe["pci"]["vendor"], "1234");
    let mappable = json!([{ "offset": 0x1000, "size": 0x1000 }]);
    assert_eq!(probe["regions"][0]["mappable"], mappable);
    let msix = probe["interrupts"].as_array().unwrap();
    assert!(msix
        .iter()
        .any(|irq| irq["name"] == "MSI-X" && irq["vectors"] == 4));
    let read = json!([{ "region": 0, "offset": 0x1ffe, "bytes": [0, 0] }]);
    assert_eq!(probe["reads"], read, "the region ends there");
}

#[test]
fn server_that_is_not_there_is_an_error_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");

    let output = probe(&socket, &[]);

    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.starts_with("muserctl: "), "{error}");
    assert!(error.contains(socket.to_str().unwrap()), "{error}");
}

#[test]
fn read_of_nothing_says_where() {
    let served = Served::new();

    let output = probe(&served.socket(), &["--read", "3:0:1"]);

    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("1 bytes at 0x0 of region 3"), "{error}");
}
