// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a client's access to the device's registers and back.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::thread::{self, JoinHandle};

use libmuser::transport::{memory, MemoryTransport};
use libmuser::{
    Bar, Ended, Errno, Error, Express, Moment, Msi, Msix, PciBuilder, Pin, PowerManagement, Reset,
    Result, Server, Stop, Width,
};
use proptest::prelude::*;

mod common;
use common::{errno, low_byte, Event, Recorder, Running, CONFIG};

fn small() -> PciBuilder {
    PciBuilder::new(0x1234, 0x5678).bar(0, Bar::memory32(0x100))
}

#[test]
fn unaligned_read_is_split_ascending_and_put_together() {
    let (client, running) = Running::start(small().build().unwrap());
    let mut data = [0; 7];

    assert_eq!(client.read(0, 3, &mut data).unwrap(), 7);

    assert_eq!(data, [3, 4, 5, 6, 7, 8, 9]);
    let reads = [Event::Read(3, 1), Event::Read(4, 4), Event::Read(8, 2)];
    assert_eq!(running.recorder.take_events(), reads);
}

#[test]
fn unaligned_write_is_split_ascending() {
    let (client, running) = Running::start(small().build().unwrap());

    assert_eq!(client.write(0, 6, &[1, 2, 3, 4, 5]).unwrap(), 5);

    let writes = [
        Event::Write(6, 2, 0x0201),
        Event::Write(8, 2, 0x0403),
        Event::Write(10, 1, 5),
    ];
    assert_eq!(running.recorder.take_events(), writes);
}

#[test]
fn every_width_arrives_as_it_is() {
    let (client, running) = Running::start(small().build().unwrap());

    for width in [1, 2, 4, 8] {
        client.write(0, 0x10, &[0xff; 8][..width]).unwrap();

        let value = u64::MAX >> (64 - 8 * width);
        assert_eq!(
            running.recorder.take_events(),
            [Event::Write(0x10, width, value)]
        );
    }
}

#[test]
fn access_wider_than_the_registers_is_split() {
    let model = PciBuilder::new(1, 2)
        .bar(1, Bar::io(8).registers(Width::Word))
        .build()
        .unwrap();
    let (client, running) = Running::start(model);

    client.write(1, 0, &[1, 0, 2, 0]).unwrap();

    assert_eq!(
        running.recorder.take_events(),
        [Event::Write(0, 2, 1), Event::Write(2, 2, 2)]
    );
}

#[test]
fn access_across_the_end_is_short() {
    let (client, _running) = Running::start(small().build().unwrap());
    let mut data = [0xee; 8];

    assert_eq!(client.read(0, 0xfc, &mut data).unwrap(), 4);

    assert_eq!(data, [0xfc, 0xfd, 0xfe, 0xff, 0xee, 0xee, 0xee, 0xee]);
    assert_eq!(client.write(CONFIG, 0xff, &[0; 4]).unwrap(), 1);
}

#[test]
fn access_to_nothing_is_einval() {
    let (client, running) = Running::start(small().rom([1]).build().unwrap());

    for (region, offset) in [
        (0, 0x100),
        (0, u64::MAX),
        (1, 0),
        (8, 0),
        (32, 0),
        (CONFIG, 256),
    ] {
        assert_eq!(errno(client.read(region, offset, &mut [0])), libc::EINVAL);
        assert_eq!(errno(client.write(region, offset, &[0])), libc::EINVAL);
    }
    assert_eq!(errno(client.write(6, 0, &[0])), libc::EINVAL);
    assert_eq!(running.recorder.take_events(), []);
}

#[test]
fn error_of_the_device_is_the_errno_of_the_client() {
    let (client, running) = Running::start(small().build().unwrap());
    let odd = Errno::new(libc::ENOTEMPTY).unwrap();

    running.recorder.answer(Err(odd.into()));
    assert_eq!(errno(client.read(0, 0, &mut [0])), libc::ENOTEMPTY);
    running
        .recorder
        .answer(Err(Error::new(Errno::EBUSY, "busy")));
    assert_eq!(errno(client.write(0, 0, &[0])), libc::EBUSY);
    running
        .recorder
        .answer(Err(std::io::Error::other("nothing known").into()));
    assert_eq!(errno(client.reset()), libc::EIO);
    assert_eq!(client.read(0, 0, &mut [0]).unwrap(), 1);
}

#[test]
fn part_after_a_failed_one_is_not_done() {
    let (client, running) = Running::start(small().build().unwrap());
    running.recorder.answer(Ok(0));
    running.recorder.answer(Err(Errno::EIO.into()));

    assert_eq!(errno(client.write(0, 1, &[0; 6])), libc::EIO);

    assert_eq!(
        running.recorder.take_events(),
        [Event::Write(1, 1, 0), Event::Write(2, 2, 0)]
    );
}

#[test]
fn failed_part_stops_at_the_edge_of_the_device() {
    let msix = Msix::new(1).table(0, 0x40).pba(0, 0x58);
    let (client, running) = Running::start(small().msix(msix).build().unwrap());
    running.recorder.answer(Err(Errno::EIO.into()));

    assert_eq!(errno(client.write(0, 0x3c, &[0xff; 8])), libc::EIO);

    let mut address = [0xee; 4];
    client.read(0, 0x40, &mut address).unwrap();
    assert_eq!(address, [0; 4]);
}

#[test]
fn long_access_that_fails_later_is_short() {
    let model = PciBuilder::new(1, 2)
        .bar(0, Bar::memory32(0x4000))
        .build()
        .unwrap();
    let (client, running) = Running::start(model);
    for _ in 0..512 {
        running.recorder.answer(Ok(0));
    }
    running.recorder.answer(Err(Errno::EIO.into()));

    assert_eq!(client.read(0, 0, &mut [0; 0x3000]).unwrap(), 0x1000);
}

#[test]
fn msix_structures_are_cut_out_of_their_bar() {
    let msix = Msix::new(1).table(0, 0x40).pba(0, 0x58);
    let (client, running) = Running::start(small().msix(msix).build().unwrap());
    let mut data = [0; 0x28];

    client.read(0, 0x3c, &mut data).unwrap();

    let own = [
        Event::Read(0x3c, 4),
        Event::Read(0x50, 8),
        Event::Read(0x60, 4),
    ];
    assert_eq!(running.recorder.take_events(), own);
    assert_eq!(data[..4], [0x3c, 0x3d, 0x3e, 0x3f]);
    assert_eq!(
        data[4..20],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(data[20], 0x50);
    assert_eq!(data[28..36], [0; 8]);
    assert_eq!(data[36], 0x60);
}

#[test]
fn rom_reads_its_image_padded_with_ones() {
    let (client, _running) = Running::start(small().rom([0x55, 0xaa]).build().unwrap());
    let mut data = [0; 4];

    client.read(6, 0, &mut data).unwrap();

    assert_eq!(data, [0x55, 0xaa, 0xff, 0xff]);
    assert_eq!(client.region(6).unwrap().size, 2048);
}

#[test]
fn config_accesses_never_reach_the_device() {
    let (client, running) = Running::start(small().build().unwrap());
    let mut id = [0; 2];

    client.read(CONFIG, 2, &mut id).unwrap();
    client.write(CONFIG, 4, &[7, 4]).unwrap();

    assert_eq!(id, [0x78, 0x56]);
    assert_eq!(running.recorder.take_events(), []);
}

#[test]
fn reset_of_the_client_resets_config_and_device() {
    let (client, running) = Running::start(small().build().unwrap());
    client.write(CONFIG, 0x10, &[0xff; 4]).unwrap();

    client.reset().unwrap();

    let mut bar = [0xee; 4];
    client.read(CONFIG, 0x10, &mut bar).unwrap();
    assert_eq!(bar, [0; 4]);
    assert_eq!(
        running.recorder.take_events(),
        [Event::Reset(Reset::Client)]
    );
}

#[test]
fn function_level_reset_reaches_the_device() {
    let (client, running) = Running::start(small().express(Express::endpoint()).build().unwrap());

    client.write(CONFIG, 0x48, &[0x00, 0x80]).unwrap();

    assert_eq!(
        running.recorder.take_events(),
        [Event::Reset(Reset::FunctionLevel)]
    );
}

/// Serves a recorder until it dies, as soon as it has answered and not replied.
fn die_replying(recorder: &Recorder, transport: MemoryTransport) -> JoinHandle<Result<Ended>> {
    let model = small().express(Express::endpoint()).build().unwrap();
    let device = recorder.clone();
    let mut server = Server::new(model, transport, |_| Ok(device)).unwrap();
    let stop = Stop::new().unwrap();
    stop.die_at(Moment::Replying);
    thread::spawn(move || server.run_until(&stop))
}

#[test]
fn function_level_reset_that_ended_is_not_done_again_by_a_replay() {
    let (transport, host) = memory::pair().unwrap();
    let recorder = Recorder::default();
    let mut serving = die_replying(&recorder, transport);
    let client = host.open().unwrap();
    let resetting = thread::spawn(move || {
        client.write(CONFIG, 0x48, &[0x00, 0x80]).unwrap();
        client
    });
    // The second one dies of the replay, and the third replies.
    for _ in 0..2 {
        assert_eq!(serving.join().unwrap().unwrap(), Ended::Abandoned);
        serving = die_replying(&recorder, host.transport());
    }
    assert_eq!(serving.join().unwrap().unwrap(), Ended::Abandoned);
    let model = small().express(Express::endpoint()).build().unwrap();
    let running = Running::attach(model, host.transport(), host);
    let client = resetting.join().unwrap();

    assert_eq!(recorder.take_events(), [Event::Reset(Reset::FunctionLevel)]);
    assert_eq!(running.recorder.take_events(), []);
    // One that fails is not over.
    running.recorder.answer(Err(Errno::EIO.into()));
    assert_eq!(errno(client.write(CONFIG, 0x48, &[0x00, 0x80])), libc::EIO);
    client.write(CONFIG, 0x48, &[0x00, 0x80]).unwrap();
    let reset = Event::Reset(Reset::FunctionLevel);
    assert_eq!(running.recorder.take_events(), [reset.clone(), reset]);
}

#[test]
fn device_asleep_does_not_answer_in_its_bar() {
    let pm = PowerManagement::new().soft_reset();
    let (client, running) = Running::start(small().power_management(pm).build().unwrap());
    let mut data = [0; 4];
    client.write(CONFIG, 0x44, &[3, 0]).unwrap();

    client.read(0, 0, &mut data).unwrap();
    client.write(0, 0, &data).unwrap();
    assert_eq!(data, [0xff; 4]);
    assert_eq!(running.recorder.take_events(), []);

    client.write(CONFIG, 0x44, &[0, 0]).unwrap();
    assert_eq!(
        running.recorder.take_events(),
        [Event::Reset(Reset::PowerUp)]
    );
    client.read(0, 0, &mut data).unwrap();
    assert_eq!(data, [0, 1, 2, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_read_returns_the_bytes_of_its_registers(offset in 0_u64..0x100, len in 1_usize..0x120) {
        let (client, _running) = Running::start(small().build().unwrap());
        let mut data = vec![0; len];

        let count = client.read(0, offset, &mut data).unwrap();

        prop_assert_eq!(count as u64, (len as u64).min(0x100 - offset));
        for (at, byte) in (offset..).zip(&data[..count]) {
            prop_assert_eq!(*byte, low_byte(at));
        }
    }

    /// Whatever a client does, the server lives on and answers.
    #[test]
    fn hostile_accesses_do_not_end_the_server(accesses in prop::collection::vec(access(), 1..60)) {
        let bar = Bar::memory32(0x4000).mappable(0x2000..0x3000);
        let model = PciBuilder::new(0x1234, 0x5678)
            .interrupt_pin(Pin::A)
            .bar(0, bar)
            .bar(2, Bar::io(16).registers(Width::Byte))
            .rom([1])
            .power_management(PowerManagement::new().soft_reset())
            .express(Express::endpoint())
            .msi(Msi::new(32).maskable())
            .msix(Msix::new(70).table(0, 0x1000).pba(0, 0x1f00))
            .build()
            .unwrap();
        let (client, running) = Running::start(model);
        let interrupts = running.recorder.bus().interrupts();
        for (region, offset, data, write, vector) in accesses {
            let result = if write {
                client.write(region, offset, &data)
            } else {
                client.read(region, offset, &mut vec![0; data.len()])
            };
            if let Err(error) = result {
                prop_assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
            }
            interrupts.raise(vector).unwrap();
            interrupts.lower(vector / 2).unwrap();
        }
        let mut id = [0; 2];
        client.read(CONFIG, 0, &mut id).unwrap();
        prop_assert_eq!(id, [0x34, 0x12]);
        client.reset().unwrap();
    }
}

fn access() -> impl Strategy<Value = (u32, u64, Vec<u8>, bool, u16)> {
    let region = prop_oneof![3 => Just(0), 4 => Just(CONFIG), 2 => 0_u32..10];
    let offset = prop_oneof![
        4 => 0_u64..0x200,
        2 => 0xff0_u64..0x2010,
        1 => 0x2ff0_u64..0x4010,
        1 => any::<u64>(),
    ];
    let data = prop::collection::vec(any::<u8>(), 0..80);
    (region, offset, data, any::<bool>(), 0_u16..70)
}
