// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Capabilities of any JSON, and of none.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::cell::Cell;

use proptest::prelude::*;
use serde_json::{Map, Number, Value};

mod hostile;
mod raw;

use hostile::{attack, longs, message, words, Target, CONFIG, DATA, IOVA, PAGE};
use raw::RawClient;

/// Any JSON, in which the names that mean something are common.
fn json() -> impl Strategy<Value = Value> {
    let name = prop_oneof![
        4 => prop::sample::select(vec![
            "capabilities", "max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes",
            "migration", "pgsize", "max_bitmap_size", "twin_socket", "supported", "fd_index",
            "write_multiple",
        ]).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    let number = prop_oneof![
        any::<i64>().prop_map(Number::from),
        any::<u64>().prop_map(Number::from),
        any::<f64>().prop_filter_map("JSON has no such number", Number::from_f64),
        (0..5_u64).prop_map(Number::from),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        number.prop_map(Value::Number),
        any::<String>().prop_map(Value::String),
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        let pair = (name.clone(), inner.clone());
        prop_oneof![
            prop::collection::vec(inner, 0..6).prop_map(Value::Array),
            prop::collection::vec(pair, 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        2 => json().prop_map(|json| format!("{{\"capabilities\":{json}}}\0").into_bytes()),
        1 => json().prop_map(|json| format!("{json}\0").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..200),
        // Cut off somewhere.
        1 => (json(), any::<prop::sample::Index>()).prop_map(|(json, at)| {
            let mut text = format!("{{\"capabilities\":{json}}}\0").into_bytes();
            text.truncate(at.index(text.len()));
            text
        }),
    ]
}

/// Offers a version; tells whether it was taken. Who is turned away since another client is
/// there still comes again.
fn offer(target: &Target, version: [u16; 2], text: &[u8]) -> Option<RawClient> {
    loop {
        let mut client = target.connect();
        let [major, minor] = version.map(u16::to_ne_bytes);
        client.send_bytes(&message(0, 1, &[&major, &minor, text].concat()), &[]);
        match client.try_receive().map(|reply| reply.result()) {
            Some(Ok(())) => {
                let read = client.read(CONFIG, 0, 2);
                assert_eq!(read, Ok(vec![0xf4, 0x1a]));
                return Some(client);
            }
            Some(Err(libc::EBUSY)) => {}
            Some(Err(_)) => {
                client.wait_closed();
                return None;
            }
            None => return None,
        }
    }
}

#[test]
fn any_json_is_taken_or_refused() {
    attack(|target| {
        let mut runner = proptest::test_runner::TestRunner::default();
        let taken = Cell::new(0);
        let result = runner.run(&(text(), 0..2_u16, 0..4_u16), |(text, major, minor)| {
            let client = offer(target, [major, minor], &text);
            prop_assert!(
                major == 0 || client.is_none(),
                "there is no version {}",
                major
            );
            taken.set(taken.get() + u32::from(client.is_some()));
            Ok(())
        });
        result.unwrap();
        assert_ne!(taken.get(), 0, "some of it makes sense");
    });
}

#[test]
fn json_as_deep_as_a_message_is_refused() {
    attack(|target| {
        for text in ["[".repeat(200_000), "{\"capabilities\":".repeat(60_000)] {
            assert!(offer(target, [0, 0], format!("{text}\0").as_bytes()).is_none());
        }
    });
}

#[test]
fn numbers_at_their_limits_are_taken_or_refused() {
    attack(|target| {
        for name in [
            "max_msg_fds",
            "max_data_xfer_size",
            "max_dma_maps",
            "pgsizes",
        ] {
            for number in [
                "0",
                "-1",
                "1",
                "1.5",
                "1e400",
                "18446744073709551615",
                "1e19",
                "\"7\"",
            ] {
                let text = format!("{{\"capabilities\":{{\"{name}\":{number}}}}}\0");
                drop(offer(target, [0, 0], text.as_bytes()));
            }
        }
    });
}

#[test]
fn client_that_takes_few_bytes_at_a_time_is_asked_for_no_more() {
    attack(|target| {
        let text = b"{\"capabilities\":{\"max_data_xfer_size\":2}}\0";
        let mut client = offer(target, [0, 1], text).expect("it is served");
        assert_eq!(client.dma_map(0, PAGE, 3, None), Ok(()));
        assert_eq!(client.write(CONFIG, 4, &[4, 0]), Ok(2));
        assert_eq!(client.write(0, IOVA, &longs(&[8])), Ok(8));
        let read = [longs(&[DATA]), words(&[0, 8])].concat();
        client.send_bytes(&message(77, 9, &read), &[]);

        for part in [8, 10, 12, 14] {
            let asked = client.receive();
            assert_eq!(asked.payload, longs(&[part, 2]));
            let data = [longs(&[part, 2]), vec![1, 2]].concat();
            let mut reply = message(asked.header.id, 11, &data);
            reply[8] = 1;
            client.send_bytes(&reply, &[]);
        }

        let read = client.receive();
        assert_eq!(read.payload[16..], [1, 2, 1, 2, 1, 2, 1, 2]);
    });
}
