// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each command over the socket, right and wrong.

use std::os::unix::fs::FileExt;

use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::{Command, Header};
use libmuser::{Bar, Errno, Error, Msix, PciBuilder, PciModel, Pin, Reset};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use zerocopy::IntoBytes;

mod common;
mod raw;

use common::{Event, Recorder, CONFIG, INTX, MSIX};
use raw::{access, memfd, Listening, RawClient};

const EINVAL: i32 = libc::EINVAL;

fn model() -> PciModel {
    PciBuilder::new(0x1234, 0x5678)
        .bar(0, Bar::memory32(0x4000).mappable(0x1000..0x2000))
        .bar(1, Bar::memory32(0x4000))
        .bar(2, Bar::memory32(0x1000).mappable(0..0x1000))
        .interrupt_pin(Pin::A)
        .msix(Msix::new(4).table(1, 0).pba(1, 0x1000))
        .build()
        .unwrap()
}

fn start() -> (RawClient, Recorder, Listening) {
    let recorder = Recorder::default();
    let device = recorder.clone();
    let server = Listening::start(model(), move |bus| {
        *device.bus.lock().unwrap() = Some(bus.clone());
        Ok(device)
    });
    (server.client(), recorder, server)
}

#[test]
fn region_read_brings_what_the_device_has() {
    let (mut client, recorder, _server) = start();

    assert_eq!(client.read(0, 0x20, 4), Ok(vec![0x20, 0x21, 0x22, 0x23]));
    assert_eq!(recorder.take_events(), [Event::Read(0x20, 4)]);
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0x34, 0x12]));
}
