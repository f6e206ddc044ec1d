// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests as a peer may send them, right and wrong.

use super::*;
use proptest::prelude::*;
use zerocopy::IntoBytes;

fn parse(command: Command, payload: &[u8]) -> Result<Option<ClientRequest<'_>>, Malformed> {
    ClientRequest::parse(command, payload)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.as_bytes().to_vec()
}

#[test]
fn version_data_ends_at_its_nul() {
    let payload = [0, 0, 1, 0, b'{', b'}', 0, 7];

    let version = Version::parse(&payload).unwrap();

    assert_eq!(version.data, b"{}");
    assert_eq!(Version::parse(&payload[..4]).unwrap().data, b"");
    assert!(Version::parse(&payload[..6]).is_err());
    assert!(Version::parse(&payload[..3]).is_err());
}

#[test]
fn map_is_refused_with_unknown_flags_or_other_sizes() {
    let good = payload::DmaMap {
        argsz: 32,
        flags: 3,
        ..Default::default()
    };
    let is_good = |map: payload::DmaMap| parse(Command::DmaMap, map.as_bytes()).is_ok();

    assert!(is_good(good));
    assert!(!is_good(payload::DmaMap { flags: 4, ..good }));
    assert!(!is_good(payload::DmaMap { argsz: 31, ..good }));
    let longer = [good.as_bytes(), &[0]].concat();
    assert!(parse(Command::DmaMap, &longer).is_err());
}

#[test]
fn unmap_of_all_has_no_range() {
    let all = |address, size| payload::DmaUnmap {
        argsz: 24,
        flags: payload::DmaUnmap::ALL,
        address,
        size,
    };

    assert!(parse(Command::DmaUnmap, all(0, 0).as_bytes()).is_ok());
    assert!(parse(Command::DmaUnmap, all(0, 4096).as_bytes()).is_err());
    assert!(parse(Command::DmaUnmap, all(4096, 0).as_bytes()).is_err());
}

#[test]
fn unmap_with_a_bitmap_says_what_it_is_like() {
    let unmap = words(&[40, 1, 0, 0, 4096, 0]);
    assert!(parse(Command::DmaUnmap, &unmap).is_err());

    let unmap = [unmap, words(&[4096, 0, 8, 0])].concat();
    let Ok(Some(ClientRequest::DmaUnmap(unmap))) = parse(Command::DmaUnmap, &unmap) else {
        panic!("refused");
    };
    assert_eq!(
        unmap.bitmap,
        Some(payload::Bitmap {
            pgsize: 4096,
            size: 8
        })
    );
}

#[test]
fn question_may_be_longer_than_its_fields() {
    let mut question = words(&[4064, 0, 3, 0, 0, 0, 0, 0]);
    question.resize(4064, 0);

    assert_eq!(
        parse(Command::DeviceGetRegionInfo, &question),
        Ok(Some(ClientRequest::RegionInfo(Query {
            argsz: 4064,
            index: 3
        })))
    );
}

#[test]
fn question_without_room_for_the_answer_is_refused() {
    for (command, fixed, len) in [
        (Command::DeviceGetInfo, 16, 4),
        (Command::DeviceGetRegionInfo, 32, 8),
        (Command::DeviceGetRegionIoFds, 16, 4),
        (Command::DeviceGetIrqInfo, 16, 4),
    ] {
        let question = |argsz| {
            let mut question = vec![0; len];
            question[0] = argsz;
            words(&question)
        };
        assert!(parse(command, &question(fixed)).is_ok(), "{command}");
        assert!(parse(command, &question(fixed - 1)).is_err(), "{command}");
        assert!(parse(command, &question(fixed)[1..]).is_err(), "{command}");
    }
}

#[test]
fn interrupts_have_one_action_and_one_kind_of_data() {
    for flags in 0..128_u32 {
        let payload = [words(&[21, flags, 0, 0, 1]), vec![1]].concat();
        let (data, action) = (flags & 7, flags >> 3);
        let good = data.is_power_of_two() && action.is_power_of_two() && action < 8;
        let parsed = parse(Command::DeviceSetIrqs, &payload);
        assert_eq!(parsed.is_ok(), good, "{flags:#x}");
    }
}

#[test]
fn booleans_are_as_many_as_vectors() {
    let payload = [words(&[22, 0x22, 0, 0, 2]), vec![1, 0]].concat();

    assert!(parse(Command::DeviceSetIrqs, &payload).is_ok());
    assert!(parse(Command::DeviceSetIrqs, &payload[..21]).is_err());
}

#[test]
fn write_has_as_many_bytes_as_it_counts() {
    let payload = [words(&[0, 0, 0, 2]), vec![1, 2]].concat();

    assert!(parse(Command::RegionWrite, &payload).is_ok());
    assert!(parse(Command::RegionWrite, &payload[..17]).is_err());
    assert!(parse(Command::RegionWrite, &[payload, vec![3]].concat()).is_err());
}

#[test]
fn access_that_wraps_is_refused() {
    let payload = words(&[u32::MAX, u32::MAX, 0, 2]);

    assert!(parse(Command::RegionRead, &payload).is_err());
}

#[test]
fn several_writes_are_read_one_by_one() {
    let one = |count| [words(&[4, 0, 1, count]), vec![1, 2, 3, 4, 5, 6, 7, 8]].concat();
    let payload = [words(&[2, 0]), one(4), one(0)].concat();

    let Ok(Some(ClientRequest::WriteMulti(writes))) = parse(Command::RegionWriteMulti, &payload)
    else {
        panic!("refused");
    };

    assert_eq!(writes.len(), 2);
    assert_eq!(writes.nth(0).unwrap().data(), [1, 2, 3, 4]);
    assert!(writes.nth(1).unwrap().data().is_empty());
    assert_eq!(writes.nth(2), None);
}

#[test]
fn several_writes_that_contradict_themselves_are_refused() {
    let one = |count| [words(&[4, 0, 1, count]), vec![0; 8]].concat();
    for payload in [
        [words(&[2, 0]), one(4)].concat(),
        [words(&[1, 0]), one(9)].concat(),
        [words(&[1, 0]), one(4), vec![0]].concat(),
        [words(&[u32::MAX, u32::MAX]), one(4)].concat(),
    ] {
        assert!(parse(Command::RegionWriteMulti, &payload).is_err());
    }
}

#[test]
fn feature_is_got_set_or_probed() {
    for (flags, good) in [
        (0, false),
        (payload::Feature::GET, true),
        (payload::Feature::SET, true),
        (payload::Feature::GET | payload::Feature::SET, false),
        (payload::Feature::PROBE, true),
        (7 << 16, true),
        (9 << 16 | 1 << 19, false),
    ] {
        let parsed = parse(Command::DeviceFeature, &words(&[8, flags | 6])).is_ok();
        assert_eq!(parsed, good, "{flags:#x}");
    }
}

#[test]
fn command_of_the_other_side_is_none() {
    assert_eq!(parse(Command::DmaRead, &[0; 16]), Ok(None));
    assert_eq!(ServerRequest::parse(Command::Version, &[0; 16]), Ok(None));
}

proptest! {
    #[test]
    fn any_payload_is_parsed_or_refused(
        command in prop::sample::select(Command::ALL.to_vec()),
        payload in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let _ = ClientRequest::parse(command, &payload);
        let _ = ServerRequest::parse(command, &payload);
    }
}
