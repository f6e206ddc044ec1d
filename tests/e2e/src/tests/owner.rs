// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who may open `/dev/muser/UUID`: whoever wrote the UUID to `create`, and nobody else.

use std::fs;
use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};

use anyhow::{ensure, Result};
use muser_e2e::check::{equal, fails, works};
use muser_e2e::mdev::{random_uuid, Mdev, Type};
use muser_e2e::node::{Description, Server};
use muser_e2e::{module, sys};

use super::topic;

topic!("owner", once: [
    node_of_root_is_root_only,
    node_belongs_to_creator,
    creator_serves_without_root,
    stranger_refused,
    create_by_stranger_refused,
], roads: []);

const USER: u32 = 1234;
const GROUP: u32 = 5678;

/// Runs `act` in a thread that is another user to the file system.
fn as_user<T: Send>(uid: u32, gid: u32, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            sys::set_fs_ids(uid, gid);
            act()
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the user's thread panicked"))?
    })
}

/// Gives `create` to the user for as long as the value lives.
struct CreateGiven;

impl CreateGiven {
    fn new() -> Result<Self> {
        module::load()?;
        let create = Type::Pci.directory().join("create");
        chown(&create, Some(USER), Some(GROUP))?;
        Ok(Self)
    }
}

impl Drop for CreateGiven {
    fn drop(&mut self) {
        // Whoever comes next runs as root and may write all the same.
        let _ = chown(Type::Pci.directory().join("create"), Some(0), Some(0));
    }
}

fn create_as_user() -> Result<Mdev> {
    let _given = CreateGiven::new()?;
    let uuid = random_uuid()?;
    as_user(USER, GROUP, || {
        works("create as a user", Type::Pci.create_raw(&uuid))
    })?;
    Ok(Mdev::adopt(&uuid))
}

fn node_of_root_is_root_only() -> Result<()> {
    let mdev = Mdev::create(Type::Pci)?;
    let meta = fs::metadata(mdev.node())?;
    equal("owner", (meta.uid(), meta.gid()), (0, 0))?;
    equal("mode", meta.permissions().mode() & 0o7777, 0o600)
}

fn node_belongs_to_creator() -> Result<()> {
    let mdev = create_as_user()?;
    let meta = fs::metadata(mdev.node())?;
    equal("owner", (meta.uid(), meta.gid()), (USER, GROUP))?;
    equal("mode", meta.permissions().mode() & 0o7777, 0o600)
}

fn creator_serves_without_root() -> Result<()> {
    let mdev = create_as_user()?;
    let server = as_user(USER, GROUP, || Server::attach(&mdev, &Description::pci()))?;
    ensure!(server.slots() > 0, "attached without slots");
    Ok(())
}

fn stranger_refused() -> Result<()> {
    let mdev = create_as_user()?;
    let node = mdev.node();
    let stranger = |uid, gid| {
        as_user(uid, gid, || {
            fails(
                "opening another's node",
                muser_e2e::vfio::open_rw(&node),
                libc::EACCES,
            )
        })
    };
    stranger(USER + 1, GROUP + 1)?;
    stranger(USER + 1, GROUP)
}

fn create_by_stranger_refused() -> Result<()> {
    module::load()?;
    let uuid = random_uuid()?;
    as_user(USER, GROUP, || {
        fails(
            "create by a user",
            Type::Pci.create_raw(&uuid),
            libc::EACCES,
        )
    })
}
