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
    attributes_say_whose_it_is,
    stranger_refused,
    create_by_stranger_refused,
], roads: []);

/// A user that no file of the guest belongs to.
pub(super) const USER: u32 = 1234;
/// A group likewise.
pub(super) const GROUP: u32 = 5678;

/// Runs `act` in a thread that is another user to the file system.
pub(super) fn as_user<T: Send>(
    uid: u32,
    gid: u32,
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
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

/// Gives `create` to a user for as long as the value lives.
struct CreateGiven(Type);

impl CreateGiven {
    fn new(uid: u32, kind: Type) -> Result<Self> {
        module::load()?;
        chown(kind.directory().join("create"), Some(uid), Some(GROUP))?;
        Ok(Self(kind))
    }
}

impl Drop for CreateGiven {
    fn drop(&mut self) {
        // Whoever comes next runs as root and may write all the same.
        let _ = chown(self.0.directory().join("create"), Some(0), Some(0));
    }
}

fn create_as_user() -> Result<Mdev> {
    works("create as a user", create_as(USER, Type::Pci)?)
}

/// Creates a device as a user, whom `create` is given to for that. The inner result is that of the
/// write.
pub(super) fn create_as(uid: u32, kind: Type) -> Result<std::io::Result<Mdev>> {
    let _given = CreateGiven::new(uid, kind)?;
    let uuid = random_uuid()?;
    let created = as_user(uid, GROUP, || Ok(kind.create_raw(&uuid)))?;
    Ok(created.map(|()| Mdev::adopt(&uuid)))
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

fn attributes_say_whose_it_is() -> Result<()> {
    let ids = |mdev: &Mdev| -> Result<(String, String)> {
        Ok((mdev.attribute("uid")?, mdev.attribute("gid")?))
    };
    let users = create_as_user()?;
    let expected = (USER.to_string(), GROUP.to_string());
    equal("the user's", ids(&users)?, expected.clone())?;
    let roots = Mdev::create(Type::Platform)?;
    equal("root's", ids(&roots)?, ("0".to_owned(), "0".to_owned()))?;
    for name in ["uid", "gid"] {
        fails(name, users.set_attribute(name, "0"), libc::EACCES)?;
    }
    equal("after that", ids(&users)?, expected)
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
