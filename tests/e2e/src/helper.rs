// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this binary does as a helper: one side of a device in a process of its own, for tests that
//! kill it. A helper writes a line for each thing that happened.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use muser_uapi::{MUSER_DMA_READ, MUSER_DMA_WRITE};

use crate::check::{errno_name, errno_of};
use crate::mdev::Mdev;
use crate::node::{Description, Server};
use crate::rig::{pattern, Guest, BASE};
use crate::service::{ram, Service};
use crate::sys::{self, Mapping, PAGE};
use crate::vfio::{log_start, Client, Road, DMA_BOTH};

/// Runs as the helper that the arguments name.
///
/// # Errors
///
/// What failed.
pub fn run(arguments: &[String]) -> Result<()> {
    sys::die_with_parent()?;
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve", uuid] => serve(uuid),
        ["standby", uuid] => standby(uuid, 0),
        ["standby", uuid, state] => standby(uuid, state.parse()?),
        ["state", uuid, size, offset, value] => {
            state(uuid, size.parse()?, offset.parse()?, value.parse()?)
        }
        ["next", uuid] => next(uuid),
        ["hold", uuid, count] => hold(uuid, count.parse()?),
        ["pin", uuid, iova, pages] => pin(uuid, iova.parse()?, pages.parse()?),
        ["guest", road, uuid, pages, limit] => {
            let road = Road::from_name(road).with_context(|| format!("no road {road}"))?;
            guest(road, uuid, pages.parse()?, limit.parse()?)
        }
        ["sharer", "read", position] => read_of_shared(position.parse()?),
        ["sharer", "log", iova, length] => log_of_shared(iova.parse()?, length.parse()?),
        ["client", road, uuid, rest @ ..] => {
            let road = Road::from_name(road).with_context(|| format!("no road {road}"))?;
            client(road, uuid, rest)
        }
        _ => bail!("no such helper: {words:?}"),
    }
}

/// A device that somebody else removes.
fn borrowed(uuid: &str) -> std::mem::ManuallyDrop<Mdev> {
    std::mem::ManuallyDrop::new(Mdev::adopt(uuid))
}

/// Serves [`Description::pci`] until it is killed or its input ends: `ready`.
fn serve(uuid: &str) -> Result<()> {
    let description = Description::pci();
    let server = Arc::new(Server::attach(&borrowed(uuid), &description)?);
    let _service = Service::start(&server, 1, ram(&description))?;
    println!("ready");
    wait_for_input_to_end()
}

/// Attaches with so many bytes of state, writes a word of it, and says what was there before.
fn state(uuid: &str, size: u32, offset: usize, value: u32) -> Result<()> {
    let description = Description {
        state_size: size,
        ..Description::pci()
    };
    let server = Server::attach(&borrowed(uuid), &description)?;
    let pages = (size as usize).next_multiple_of(sys::PAGE);
    let state = server.node().map_state(0, pages)?;
    let before: u32 = state.read(offset);
    state.write(offset, value);
    println!("{before}");
    wait_for_input_to_end()
}

/// Waits in standby until it can attach, and asks for state: `ready`.
fn standby(uuid: &str, state_size: u32) -> Result<()> {
    let description = Description {
        flags: muser_uapi::MUSER_ATTACH_STANDBY,
        state_size,
        ..Description::pci()
    };
    let _server = Server::attach(&borrowed(uuid), &description)?;
    println!("ready");
    wait_for_input_to_end()
}

/// Waits for requests in `MUSER_NEXT` itself, and answers reads with their offset, whatever signal
/// comes that a handler restarts the call after: `ready`.
fn next(uuid: &str) -> Result<()> {
    sys::catch_signal(libc::SIGTERM, true)?;
    let server = Server::attach(&borrowed(uuid), &Description::pci())?;
    println!("ready");
    loop {
        let request = server.take_with(0)?;
        let offset = request.head.offset as u32;
        if request.head.kind == muser_uapi::MUSER_REQUEST_READ {
            server.reply_data(request.slot, &offset.to_le_bytes())?;
        } else {
            server.reply(request.slot, 0)?;
        }
    }
}

/// Takes `count` requests and answers none: `ready`, then `taken ID FLAGS` each, then waits.
fn hold(uuid: &str, count: usize) -> Result<()> {
    let server = Server::attach(&borrowed(uuid), &Description::pci())?;
    println!("ready");
    for _ in 0..count {
        let request = server.take()?;
        println!("taken {} {}", request.head.id, request.head.flags);
    }
    wait_for_input_to_end()
}

/// Opens a client, and does what is said: `open`, then what came of it.
fn client(road: Road, uuid: &str, words: &[&str]) -> Result<()> {
    let client = match Client::open(&borrowed(uuid), road) {
        Ok(client) => client,
        Err(error) => {
            println!("{}", errno_name(errno_of(&error)));
            return Ok(());
        }
    };
    println!("open");
    match words {
        [] => wait_for_input_to_end(),
        ["read", region, offset] => {
            match client.read_u32(region.parse()?, offset.parse()?) {
                Ok(value) => println!("read {value:#x}"),
                Err(error) => println!("{}", errno_name(errno_of(&error))),
            }
            Ok(())
        }
        ["reset"] => {
            match client.reset() {
                Ok(()) => println!("reset"),
                Err(error) => println!("{}", errno_name(errno_of(&error))),
            }
            Ok(())
        }
        _ => bail!("a client can't {words:?}"),
    }
}

/// Reads a word of a device that its parent has open, and that is its input: `ready`, then what came
/// of it.
fn read_of_shared(position: u64) -> Result<()> {
    let device = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut word = [0; 4];
    println!("ready");
    say("read", device.read_exact_at(&mut word, position));
    Ok(())
}

/// Starts to log the DMA of a device that its parent has open, and that is its input: `ready`, then
/// what came of it.
fn log_of_shared(iova: u64, length: u64) -> Result<()> {
    let page = PAGE as u64;
    println!("ready");
    say(
        "logging",
        log_start(std::io::stdin(), &[(iova, length)], page),
    );
    Ok(())
}

/// Acquires pages, and writes a word of its own to each by the window: `ready`; then takes requests
/// and answers none: `unmap IOVA LENGTH` or `request KIND`.
fn pin(uuid: &str, iova: u64, pages: u64) -> Result<()> {
    let server = Server::attach(&borrowed(uuid), &Description::pci())?;
    let length = pages * PAGE as u64;
    if pages > 0 {
        let both = MUSER_DMA_READ | MUSER_DMA_WRITE;
        server.node().dma_acquire(iova, length, both)?;
        let window = server.node().window(iova, length as usize)?;
        for page in 0..pages {
            window.write(page as usize * PAGE, PINNED + page);
        }
    }
    println!("ready");
    loop {
        let request = server.take_with(0)?;
        match request.unmap() {
            Some(unmap) => println!("unmap {} {}", unmap.iova, unmap.length),
            None => println!("request {}", request.head.kind),
        }
    }
}

/// What the helper `pin` writes to the first page; to the next, one more.
pub const PINNED: u64 = 0x5EED_0000;

/// A client with memory at [`BASE`]: `mapped` or an errno; then does what its input says, a line
/// each. With a limit other than 0 it is nobody's, and may lock no more than that many bytes.
fn guest(road: Road, uuid: &str, pages: usize, limit: u64) -> Result<()> {
    let client = Client::open(&borrowed(uuid), road)?;
    let memory = Mapping::anonymous(pages * PAGE)?;
    memory.fill(pattern(Guest::SEED));
    if limit != 0 {
        sys::limit_locked_memory(limit)?;
        sys::become_user(65534)?;
    }
    say("mapped", client.dma_map(&memory, BASE, DMA_BOTH));
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "unmap" => say("unmapped", client.dma_unmap(BASE, memory.len() as u64)),
            "unmap all" => say("unmapped", client.dma_unmap_all()),
            "look" => match memory.differs(pattern(Guest::SEED)) {
                None => println!("untouched"),
                Some((offset, found)) => println!("touched {offset:#x} {found:#x}"),
            },
            other => bail!("a guest can't {other:?}"),
        }
    }
    Ok(())
}

fn say<T>(what: &str, result: std::io::Result<T>) {
    match result {
        Ok(_) => println!("{what}"),
        Err(error) => println!("{}", errno_name(errno_of(&error))),
    }
}

fn wait_for_input_to_end() -> Result<()> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
