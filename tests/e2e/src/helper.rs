// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this binary does as a helper: one side of a device in a process of its own, for tests that
//! kill it. A helper writes a line for each thing that happened.

use std::io::Read;
use std::sync::Arc;

use anyhow::{bail, Context, Result};

use crate::check::{errno_name, errno_of};
use crate::mdev::Mdev;
use crate::node::{Description, Server};
use crate::service::{ram, Service};
use crate::sys;
use crate::vfio::{Client, Road};

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
        ["hold", uuid, count] => hold(uuid, count.parse()?),
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

fn wait_for_input_to_end() -> Result<()> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
