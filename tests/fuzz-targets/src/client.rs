// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client's stream: a server that answers anything, with descriptors of every kind.
//!
//! The client does all that a client can do, one after the other, while the server answers as the
//! input says: well, nearly well, or anyhow; and asks for memory in between. At the end of the input
//! the server hangs up, so nobody waits for anything. Each thing must end, and nothing be left.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libmuser::client::{Client, ClientMemory, IrqAction, IrqData, Options, RegionWrite};
use libmuser::{DmaAccess, Result};
use nix::sys::eventfd::EventFd;

use crate::descriptors::{self, Kinds};
use crate::Input;

mod answers;

use answers::Server;

/// Has a server answer what the input says.
///
/// # Panics
///
/// The client does, or something is left behind.
pub fn run(data: &[u8]) {
    // What is made once is made before it is counted, such as by a server and a good client.
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| crate::server::run(&[]));
    let before = descriptors::open_count();
    converse(data);
    assert_eq!(descriptors::open_count(), before, "descriptors stay open");
}

fn converse(data: &[u8]) {
    let kinds = Kinds::new();
    let mut input = Input::new(data);
    let options = Options::new()
        // An answer whose header is wrong may be none, and is waited for.
        .timeout(Duration::from_millis(20))
        .twin_socket(input.flag())
        .max_data(usize::from(input.u16()))
        .max_descriptors(usize::from(input.below(20)))
        .serving_thread(false);
    let (ours, theirs) = UnixStream::pair().expect("there is room");
    std::thread::scope(|scope| {
        let kinds = &kinds;
        scope.spawn(move || Server::new(theirs, input, kinds).serve());
        if let Ok(client) = options.open(OwnedFd::from(ours)) {
            for deed in DEEDS {
                // Whether it succeeds is for the server to say.
                let _result = deed(&client);
            }
        }
    });
}

type Deed = fn(&Client) -> Result<()>;

/// All that a client can do, some of it twice.
const DEEDS: [Deed; 18] = [
    |client| {
        let mut data = [0; 12];
        let read = client.read(0, 4, &mut data)?;
        assert!(read <= data.len());
        Ok(())
    },
    |client| client.write(0, 4, &[1, 2, 3]).map(drop),
    |client| client.write_posted(0, 0, &[1]).map(drop),
    |client| {
        let data = [1, 2, 3, 4];
        let write = |offset| RegionWrite {
            region: 0,
            offset,
            data: &data,
        };
        client.write_multi(&[write(0), write(4), write(8)])
    },
    touch_area,
    lend_memory,
    Client::serve,
    |client| {
        let event = EventFd::new().map_err(std::io::Error::from)?;
        let events = [Some(event.as_fd()), None];
        client.set_irqs(2, 0, IrqAction::Trigger, IrqData::EventFds(&events))
    },
    |client| client.set_irqs(0, 0, IrqAction::Unmask, IrqData::Bools(&[true])),
    |client| client.has_feature(6, false, true).map(drop),
    |client| {
        client
            .start_dirty_log(&[0..0x4000, 0x8000..0x10_0000])
            .map(drop)
    },
    |client| {
        for page in client.dirty_pages(0..0x10_0000)? {
            assert!(page % 4096 == 0 && page < 0x10_0000);
        }
        Ok(())
    },
    Client::stop_dirty_log,
    |client| client.io_eventfds(0).map(drop),
    |client| client.dma_unmap_dirty(0, 0x4000).map(drop),
    |client| client.dma_unmap_all().map(drop),
    Client::reset,
    touch_area,
];

/// Touches what the server says can be mapped, though it may have gone.
fn touch_area(client: &Client) -> Result<()> {
    let area = client.region(0).and_then(|region| region.areas.first());
    if let Some(area) = area {
        let memory = client.map(0, area.offset)?;
        assert_eq!(memory.len() as u64, area.size);
        let last = memory.len().saturating_sub(8);
        for at in [0, last] {
            memory.write(at, 7_u8)?;
            memory.read::<u8>(at)?;
        }
    }
    Ok(())
}

/// Gives the server memory, some of which it has to ask for.
fn lend_memory(client: &Client) -> Result<()> {
    let memory = ClientMemory::new(0x4000)?;
    client.dma_map(0, &memory, 0..0x4000, DmaAccess::ReadWrite)?;
    client.dma_map(0x8000, &memory, 0x1000..0x2000, DmaAccess::Read)
}
