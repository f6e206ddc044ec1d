// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each command over the socket, right and wrong.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use libmuser::vfio_user::wire::payload;
use libmuser::vfio_user::wire::{Command, Header};
use libmuser::{Bar, Errno, Error, Msix, PciBuilder, PciModel, Pin, Reset};
use zerocopy::{FromBytes, IntoBytes};

mod common;
mod raw;

use common::{Event, Recorder, CONFIG, INTX, MSIX};
use raw::{access, Listening, RawClient};

const EINVAL: i32 = libc::EINVAL;
const ENOTSUP: i32 = libc::EOPNOTSUPP;

fn model() -> PciModel {
    PciBuilder::new(0x1234, 0x5678)
        .bar(
            0,
            Bar::memory32(0x4000)
                .mappable(0x1000..0x2000)
                .mappable(0x3000..0x4000),
        )
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

fn region_info(client: &mut RawClient, index: u32, argsz: u32) -> raw::Message {
    let query = payload::RegionInfo {
        argsz,
        index,
        ..Default::default()
    };
    client.call(Command::DeviceGetRegionInfo, &[query.as_bytes()])
}

#[test]
fn device_info_says_pci_with_all_regions_and_interrupts() {
    let (mut client, _recorder, _server) = start();
    let query = payload::DeviceInfo {
        argsz: 16,
        ..Default::default()
    };

    let reply = client.call(Command::DeviceGetInfo, &[query.as_bytes()]);

    assert_eq!(reply.result(), Ok(()));
    let info: payload::DeviceInfo = reply.fixed();
    assert_eq!((info.argsz, info.flags), (16, 3));
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
}

#[test]
fn question_without_room_for_the_answer_is_einval() {
    let (mut client, _recorder, _server) = start();
    for (command, fixed, len) in [
        (Command::DeviceGetInfo, 16_u32, 16),
        (Command::DeviceGetRegionInfo, 32, 32),
        (Command::DeviceGetRegionIoFds, 16, 16),
        (Command::DeviceGetIrqInfo, 16, 16),
        (Command::DeviceFeature, 8, 8),
        (Command::DmaUnmap, 24, 24),
    ] {
        let mut query = vec![0; len];
        query[..4].copy_from_slice(&(fixed - 1).to_ne_bytes());
        let reply = client.call(command, &[&query]);
        assert_eq!(reply.result(), Err(EINVAL), "{command}");
        assert!(reply.payload.is_empty());
        let reply = client.call(command, &[&query[..len - 1]]);
        assert_eq!(reply.result(), Err(EINVAL), "{command}, short");
    }
}

#[test]
fn region_without_areas_has_no_capabilities() {
    let (mut client, _recorder, _server) = start();

    let reply = region_info(&mut client, 1, 32);

    let info: payload::RegionInfo = reply.fixed();
    assert_eq!((info.argsz, info.flags, info.size), (32, 3, 0x4000));
    assert_eq!(reply.payload.len(), 32);
    assert!(reply.fds.is_empty());
}

#[test]
fn region_that_is_not_there_is_empty_and_one_beyond_is_einval() {
    let (mut client, _recorder, _server) = start();

    let info: payload::RegionInfo = region_info(&mut client, 3, 32).fixed();
    assert_eq!((info.flags, info.size, info.index), (0, 0, 3));
    for index in [9, u32::MAX] {
        assert_eq!(region_info(&mut client, index, 32).result(), Err(EINVAL));
    }
}

#[test]
fn region_with_areas_has_a_capability_if_there_is_room() {
    let (mut client, _recorder, _server) = start();

    let reply = region_info(&mut client, 0, 32);
    let info: payload::RegionInfo = reply.fixed();
    assert_eq!((info.argsz, info.flags, info.cap_offset), (80, 15, 32));
    assert_eq!((reply.payload.len(), reply.fds.len()), (32, 1));

    let reply = region_info(&mut client, 0, info.argsz);
    assert_eq!(reply.fixed::<payload::RegionInfo>(), info);
    assert_eq!(reply.fds.len(), 1);
    let capability = reply.rest::<payload::RegionInfo>();
    let words = <[u32]>::ref_from_bytes(capability).unwrap();
    // Identity and version, the next one, how many areas, nothing, and their places and sizes.
    assert_eq!(words[..4], [1 << 16 | 1, 0, 2, 0]);
    assert_eq!(words[4..], [0x1000, 0, 0x1000, 0, 0x3000, 0, 0x1000, 0]);
}

#[test]
fn region_that_is_mappable_as_a_whole_says_no_more() {
    let (mut client, _recorder, _server) = start();

    let reply = region_info(&mut client, 2, 4096);

    let info: payload::RegionInfo = reply.fixed();
    assert_eq!((info.argsz, info.flags, info.cap_offset), (32, 7, 0));
    assert_eq!((reply.payload.len(), reply.fds.len()), (32, 1));
}

#[test]
fn file_of_a_region_is_what_accesses_and_the_device_see() {
    let (mut client, recorder, _server) = start();
    let mut fds = region_info(&mut client, 0, 32).fds;
    let file = File::from(fds.remove(0));

    file.write_all_at(&[1, 2, 3], 0x3010).unwrap();

    assert_eq!(client.read(0, 0x3010, 3), Ok(vec![1, 2, 3]));
    let memory = recorder.bus().memory(libmuser::Region::Bar(0), 0x3000);
    assert_eq!(memory.unwrap().read::<u8>(0x12).unwrap(), 3);
    client.write(0, 0x1004, &[9]).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x1004).unwrap();
    assert_eq!(byte, [9]);
    assert!(recorder.take_events().is_empty());
    // It stays as large as it is.
    assert!(file.set_len(0x1000).is_err() && file.set_len(0x8000).is_err());
}

#[test]
fn client_that_takes_no_descriptors_gets_none() {
    let (_client, _recorder, server) = {
        let (client, recorder, server) = start();
        drop(client);
        ((), recorder, server)
    };
    let mut client = server.connect();
    client.negotiate_with(r#"{"capabilities":{"max_msg_fds":0}}"#);

    let reply = region_info(&mut client, 0, 80);

    // It is read and written, and not mapped.
    assert_eq!(reply.fixed::<payload::RegionInfo>().flags, 3);
    assert!(reply.fds.is_empty());
}

#[test]
fn irq_info_says_what_vectors_are_like() {
    let (mut client, _recorder, _server) = start();
    let mut info = |index| {
        let query = payload::IrqInfo {
            argsz: 16,
            index,
            ..Default::default()
        };
        let reply = client.call(Command::DeviceGetIrqInfo, &[query.as_bytes()]);
        reply
            .result()
            .map(|()| reply.fixed::<payload::IrqInfo>())
            .map(|info| (info.flags, info.count))
    };

    assert_eq!(info(INTX), Ok((7, 1)));
    let (flags, count) = info(MSIX).unwrap();
    assert_eq!((flags, count), (3, 4));
    assert_eq!(info(1), Ok((0, 0)));
    assert_eq!(info(5), Err(EINVAL));
}

#[test]
fn region_read_brings_what_the_device_has() {
    let (mut client, recorder, _server) = start();

    assert_eq!(client.read(0, 0x20, 4), Ok(vec![0x20, 0x21, 0x22, 0x23]));
    assert_eq!(recorder.take_events(), [Event::Read(0x20, 4)]);
    assert_eq!(client.read(CONFIG, 0, 2), Ok(vec![0x34, 0x12]));
}

#[test]
fn region_write_reaches_the_device() {
    let (mut client, recorder, _server) = start();

    assert_eq!(client.write(1, 0x2000, &[1, 2, 3, 4]), Ok(4));

    assert_eq!(
        recorder.take_events(),
        [Event::Write(0x2000, 4, 0x0403_0201)]
    );
}

#[test]
fn access_across_areas_is_one_access_for_the_client() {
    let (mut client, recorder, _server) = start();
    let data: Vec<u8> = (0..0x1010_u32).map(|at| at.to_ne_bytes()[0]).collect();

    assert_eq!(client.write(0, 0xff8, &data), Ok(0x1010));

    assert_eq!(client.read(0, 0x1000, 0x1000).unwrap(), data[8..0x1008]);
    let Some(Event::Write(0x2000, 8, tail)) = recorder.take_events().pop() else {
        panic!("the part behind the area is not there");
    };
    assert_eq!(tail.to_le_bytes(), data[0x1008..]);
    let read = client.read(0, 0xff8, 0x1010).unwrap();
    assert_eq!(read[8..0x1008], data[8..0x1008]);
    assert_eq!(read[0x1008..], [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn access_over_the_end_is_short_and_one_behind_it_einval() {
    let (mut client, _recorder, _server) = start();

    assert_eq!(client.read(1, 0x3ffe, 4).map(|data| data.len()), Ok(2));
    assert_eq!(client.write(1, 0x3ffe, &[0; 4]), Ok(2));
    for (region, offset) in [(1, 0x4000), (1, u64::MAX - 8), (3, 0), (9, 0), (77, 0)] {
        assert_eq!(client.read(region, offset, 4), Err(EINVAL));
        assert_eq!(client.write(region, offset, &[0; 4]), Err(EINVAL));
    }
    assert_eq!(client.read(1, 0, 0), Ok(vec![]));
}

#[test]
fn access_that_contradicts_itself_is_einval() {
    let (mut client, _recorder, _server) = start();
    let access = access(1, 0, 4);

    for payload in [
        &access.as_bytes()[..15],
        &[access.as_bytes(), &[0]].concat(),
    ] {
        let reply = client.call(Command::RegionRead, &[payload]);
        assert_eq!(reply.result(), Err(EINVAL));
    }
    for data in [&[0; 3][..], &[0; 5]] {
        let reply = client.call(Command::RegionWrite, &[access.as_bytes(), data]);
        assert_eq!(reply.result(), Err(EINVAL));
    }
    assert_eq!(client.read(1, 0, (1 << 20) + 1), Err(EINVAL));
}

#[test]
fn error_of_the_device_is_the_clients_errno_without_payload() {
    let (mut client, recorder, _server) = start();
    recorder.answer(Err(Error::from(Errno::EBUSY)));
    recorder.answer(Err(Error::new(Errno::ENOSPC, "full")));

    assert_eq!(client.read(0, 0, 4), Err(libc::EBUSY));
    assert_eq!(client.write(0, 0, &[0; 4]), Err(libc::ENOSPC));

    recorder.answer(Err(Error::from(Errno::EBUSY)));
    let reply = client.call(Command::RegionRead, &[access(0, 0, 4).as_bytes()]);
    assert!(reply.payload.is_empty());
}

#[test]
fn posted_write_has_no_reply_and_comes_before_what_is_behind_it() {
    let (mut client, recorder, _server) = start();

    client.post(1, 0x2000, &[7; 4]);
    recorder.answer(Err(Error::from(Errno::EIO)));
    client.post(77, 0, &[7; 4]);
    let reply = client.call(Command::RegionRead, &[access(1, 0x2008, 4).as_bytes()]);

    assert_eq!(reply.header.command, Command::RegionRead.number());
    let events = recorder.take_events();
    assert_eq!(events[0], Event::Write(0x2000, 4, 0x0707_0707));
    assert_eq!(events[1], Event::Read(0x2008, 4));
}

fn write_multi(writes: &[(u32, u64, &[u8])]) -> Vec<u8> {
    let mut payload = (writes.len() as u64).as_bytes().to_vec();
    for (region, offset, data) in writes {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let one = payload::WriteOne {
            offset: *offset,
            region: *region,
            count: u32::try_from(data.len()).unwrap(),
            data: bytes,
        };
        payload.extend_from_slice(one.as_bytes());
    }
    payload
}

#[test]
fn write_multi_writes_in_order() {
    let (mut client, recorder, _server) = start();
    let payload = write_multi(&[
        (1, 0x2000, &[1]),
        (0, 0x1000, &[5, 6]),
        (1, 0x2008, &[2; 8]),
    ]);

    let reply = client.call(Command::RegionWriteMulti, &[&payload]);

    assert_eq!(reply.result(), Ok(()));
    assert_eq!(reply.payload, 3_u64.as_bytes());
    let last = u64::from_le_bytes([2; 8]);
    assert_eq!(
        recorder.take_events(),
        [Event::Write(0x2000, 1, 1), Event::Write(0x2008, 8, last)]
    );
    assert_eq!(client.read(0, 0x1000, 2), Ok(vec![5, 6]));
}

#[test]
fn write_multi_tells_how_many_were_done() {
    let (mut client, recorder, _server) = start();
    let payload = write_multi(&[(1, 0x2000, &[1]), (77, 0, &[1]), (1, 0x2001, &[1])]);
    let reply = client.call(Command::RegionWriteMulti, &[&payload]);
    assert_eq!(reply.payload, 1_u64.as_bytes());

    let payload = write_multi(&[(77, 0, &[1])]);
    let reply = client.call(Command::RegionWriteMulti, &[&payload]);
    assert_eq!(reply.result(), Err(EINVAL));

    recorder.answer(Err(Error::from(Errno::EIO)));
    let payload = write_multi(&[(1, 0x2000, &[1]), (1, 0x2001, &[1])]);
    let reply = client.call(Command::RegionWriteMulti, &[&payload]);
    assert_eq!(reply.result(), Err(libc::EIO));
}

#[test]
fn write_multi_that_contradicts_itself_is_einval() {
    let (mut client, recorder, _server) = start();
    let good = write_multi(&[(1, 0x2000, &[1])]);
    let mut many = good.clone();
    many[..8].copy_from_slice(&u64::MAX.to_ne_bytes());
    let mut long = good.clone();
    long[8 + 12] = 9;

    for payload in [&many, &long, &good[..31].to_vec()] {
        let reply = client.call(Command::RegionWriteMulti, &[payload]);
        assert_eq!(reply.result(), Err(EINVAL));
    }
    assert!(recorder.take_events().is_empty());
}

#[test]
fn write_multi_without_reply_comes_before_what_is_behind_it() {
    let (mut client, recorder, _server) = start();
    let payload = write_multi(&[(1, 0x2000, &[1]), (1, 0x2001, &[2])]);
    let header = client.header(Command::RegionWriteMulti).unanswered();

    client.send_message(header, &[&payload], &[]);
    client.read(1, 0x2002, 1).unwrap();

    assert_eq!(
        recorder.take_events(),
        [
            Event::Write(0x2000, 1, 1),
            Event::Write(0x2001, 1, 2),
            Event::Read(0x2002, 1)
        ]
    );
}

#[test]
fn reset_is_the_devices_and_has_no_payload() {
    let (mut client, recorder, _server) = start();

    assert_eq!(client.reset(), Ok(()));
    assert_eq!(recorder.take_events(), [Event::Reset(Reset::Client)]);
    let reply = client.call(Command::DeviceReset, &[&[0; 4]]);
    assert_eq!(reply.result(), Err(EINVAL));
    recorder.answer(Err(Error::from(Errno::EIO)));
    assert_eq!(client.reset(), Err(libc::EIO));
}

#[test]
fn migration_is_not_supported() {
    let (mut client, _recorder, _server) = start();
    for command in [Command::MigDataRead, Command::MigDataWrite] {
        let reply = client.call(command, &[&[0; 8]]);
        assert_eq!(reply.result(), Err(ENOTSUP), "{command}");
        let reply = client.call(command, &[&[0; 7]]);
        assert_eq!(reply.result(), Err(EINVAL), "{command}");
    }
}

#[test]
fn commands_that_are_none_and_those_of_servers_are_refused() {
    let (mut client, _recorder, _server) = start();
    for number in [0, 14, 19, 0xffff] {
        let header = Header {
            command: number,
            ..client.header(Command::Version)
        };
        client.send_message(header, &[&[1, 2, 3]], &[]);
        let reply = client.receive();
        assert_eq!(reply.header.id, header.id);
        assert_eq!(reply.result(), Err(ENOTSUP), "{number}");
    }
    for command in [Command::DmaRead, Command::DmaWrite] {
        let reply = client.call(command, &[&[0; 16]]);
        assert_eq!(reply.result(), Err(EINVAL), "{command}");
    }
    assert!(client.read(0, 0, 1).is_ok());
}

#[test]
fn descriptors_where_none_belong_are_einval() {
    let (mut client, _recorder, _server) = start();
    let file = raw::memfd(4096);

    let access = access(0, 0, 4);
    let reply = client.call_with(
        Command::RegionRead,
        &[access.as_bytes()],
        &[file.as_fd(), file.as_fd()],
    );

    assert_eq!(reply.result(), Err(EINVAL));
    assert!(client.read(0, 0, 1).is_ok());
}

#[test]
fn message_that_is_neither_command_nor_reply_is_einval() {
    let (mut client, _recorder, _server) = start();
    let header = Header {
        flags: 7,
        ..client.header(Command::RegionRead)
    };

    client.send_message(header, &[access(0, 0, 4).as_bytes()], &[]);

    assert_eq!(client.receive().result(), Err(EINVAL));
    assert!(client.read(0, 0, 1).is_ok());
}

#[test]
fn reply_that_nobody_waits_for_is_dropped() {
    let (mut client, _recorder, _server) = start();
    let header = client.header(Command::DmaRead).reply(Ok(()));

    client.send_message(header, &[&[0; 32]], &[]);

    assert!(client.read(0, 0, 1).is_ok());
}
