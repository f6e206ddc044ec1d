// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What every task works with: the project, the cache, and the build root and
//! the list of kernels, which are made when a task first asks for them.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Result;

use crate::archive::{self, Kernels};
use crate::cache::Cache;
use crate::project::Project;
use crate::root::Root;

/// The project, the cache, and what is in it.
#[derive(Debug)]
pub(crate) struct Workbench {
    pub(crate) project: Project,
    pub(crate) cache: Cache,
    /// Whether the archive is still to be asked again, as the user wants.
    refresh: bool,
    root: OnceLock<Root>,
    kernels: Mutex<Option<Kernels>>,
}

impl Workbench {
    pub(crate) fn new(refresh: bool) -> Result<Self> {
        Ok(Self {
            project: Project::find()?,
            cache: Cache::open()?,
            refresh,
            root: OnceLock::new(),
            kernels: Mutex::new(None),
        })
    }

    /// The build root.
    pub(crate) fn root(&self) -> Result<&Root> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let root = Root::prepare(&self.project, &self.cache)?;
        Ok(self.root.get_or_init(|| root))
    }

    /// The kernels to use.
    ///
    /// Those of an earlier run are kept as long as `enough` says that what they
    /// need is in the cache; otherwise the archive is asked, once.
    pub(crate) fn kernels(&self, enough: impl Fn(&Kernels) -> bool) -> Result<Kernels> {
        if let Some(kernels) = &*self.asked() {
            return Ok(kernels.clone());
        }
        let known = archive::read(&self.cache).filter(|kernels| !self.refresh && enough(kernels));
        let Some(known) = known else {
            let found = archive::ask(self.root()?, &self.cache)?;
            self.asked().replace(found.clone());
            return Ok(found);
        };
        Ok(known)
    }

    /// What the archive said, if it was asked.
    fn asked(&self) -> MutexGuard<'_, Option<Kernels>> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
