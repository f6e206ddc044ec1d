// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cache: what takes long to make is made once.
//!
//! Every stage has a directory of its own, named after the stage and a hash of
//! all that goes into it. A stage's last act is to write the file `complete`; a
//! directory without it is what an interrupted run left, and is made anew. (A
//! rename at the end would say the same, but kernel build trees hold their own
//! path.) A lock file a stage keeps two runs from making the same one.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{bail, Context as _, Result};
use sha2::{Digest as _, Sha256};

/// A stage with another key is removed when it has not been used for so long.
const UNUSED: Duration = Duration::from_secs(7 * 24 * 60 * 60);
const COMPLETE: &str = "complete";

/// All that goes into a stage, hashed.
#[derive(Clone, Debug)]
pub(crate) struct Key(Sha256);

impl Key {
    /// The key of a recipe: a version to raise when the code that makes the stage changes.
    pub(crate) fn new(recipe: &str) -> Self {
        Self(Sha256::new()).and(recipe)
    }

    /// Adds one more input.
    pub(crate) fn and(mut self, input: &str) -> Self {
        self.0.update(input.len().to_le_bytes());
        self.0.update(input.as_bytes());
        self
    }

    /// Twelve hexadecimal digits, enough for a directory's name.
    pub(crate) fn short(&self) -> String {
        let digest = self.0.clone().finalize();
        digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The cache directory.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Opens the cache, creating it if need be.
    pub(crate) fn open() -> Result<Self> {
        let dir = match std::env::var_os("MUSER_CACHE") {
            Some(dir) => PathBuf::from(dir),
            None => match std::env::var_os("XDG_CACHE_HOME") {
                Some(dir) => Path::new(&dir).join("muser"),
                None => match std::env::var_os("HOME") {
                    Some(home) => Path::new(&home).join(".cache/muser"),
                    None => bail!("there is no HOME to keep the cache in: set MUSER_CACHE"),
                },
            },
        };
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        Ok(Self { dir })
    }

    /// Where the cache is.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The log of the step of that name.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    /// The directory of a stage, if it is there and complete.
    pub(crate) fn find(&self, name: &str, key: &Key) -> Option<PathBuf> {
        let dir = self.stage_dir(name, key);
        dir.join(COMPLETE).exists().then_some(dir)
    }

    /// The directory of a stage, which `make` fills if it is not there yet.
    pub(crate) fn stage(
        &self,
        name: &str,
        key: &Key,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let dir = self.stage_dir(name, key);
        let lock = || lock(&self.dir.join(format!("{name}.lock")), name);
        // Nobody has to wait for a stage that is there.
        let _lock = if dir.join(COMPLETE).exists() {
            None
        } else {
            Some(lock()?)
        };
        if !dir.join(COMPLETE).exists() {
            remove(&dir)?;
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            make(&dir)?;
            self.forget_others(name, &dir, UNUSED)?;
        }
        // Written each time: its date tells when the stage was last used.
        fs::write(dir.join(COMPLETE), "")?;
        Ok(dir)
    }

    /// Removes everything but the locks.
    pub(crate) fn clear(&self) -> Result<()> {
        self.forget(Duration::ZERO)?;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.is_dir() {
                remove(&path)?;
            } else if path.extension().is_none_or(|extension| extension != "lock") {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Removes every stage that was not used for so long.
    pub(crate) fn forget(&self, unused: Duration) -> Result<usize> {
        self.forget_others("", Path::new(""), unused)
    }

    fn stage_dir(&self, name: &str, key: &Key) -> PathBuf {
        self.dir.join(format!("{name}-{}", key.short()))
    }

    fn forget_others(&self, name: &str, keep: &Path, unused: Duration) -> Result<usize> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let stage = path
                .file_name()
                .and_then(|file| file.to_str())
                .unwrap_or_default();
            let Some((stem, key)) = stage.rsplit_once('-') else {
                continue;
            };
            if key.len() != 12 || path == keep || !(name.is_empty() || stem == name) {
                continue;
            }
            let used = path
                .join(COMPLETE)
                .metadata()
                .and_then(|meta| meta.modified());
            let age = used
                .ok()
                .and_then(|used| SystemTime::now().duration_since(used).ok());
            if age.is_none_or(|age| age > unused) {
                // The stage's own maker holds the lock of its name already.
                let lock = || lock(&self.dir.join(format!("{stem}.lock")), stem);
                let _lock = name.is_empty().then(lock).transpose()?;
                remove(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Takes a lock that ends with the value, saying so where it has to wait.
pub(crate) fn lock(path: &Path, what: &str) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the cache"),
    }
    eprintln!("Another xtask works on {what}; waiting for it.");
    file.lock().context("cannot lock the cache")?;
    Ok(file)
}

/// Removes a directory tree, also one whose files belong to mapped users.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    if fs::remove_dir_all(dir).is_ok() {
        return Ok(());
    }
    let status = crate::root::namespace()
        .args(["rm", "-rf", "--"])
        .arg(dir)
        .status()?;
    if !status.success() {
        bail!("cannot remove {}", dir.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().to_owned();
        (temp, Cache { dir })
    }

    #[test]
    fn complete_stage_is_made_once() {
        let (_temp, cache) = cache();
        let key = Key::new("1").and("input");
        let mut made = 0;
        for _ in 0..2 {
            let make = |_: &Path| {
                made += 1;
                Ok(())
            };
            cache.stage("thing", &key, make).unwrap();
        }
        assert_eq!(made, 1);
    }

    #[test]
    fn interrupted_stage_is_made_anew() {
        let (_temp, cache) = cache();
        let key = Key::new("1");
        let failed = cache.stage("thing", &key, |dir| {
            fs::write(dir.join("half"), "")?;
            bail!("interrupted")
        });
        assert!(failed.is_err());
        assert_eq!(cache.find("thing", &key), None);
        let dir = cache.stage("thing", &key, |_| Ok(())).unwrap();
        assert!(!dir.join("half").exists());
    }

    #[test]
    fn other_inputs_are_another_stage() {
        let key = Key::new("1").and("a").and("b");
        assert_ne!(key.short(), Key::new("1").and("ab").short());
        assert_eq!(key.short().len(), 12);
    }

    #[test]
    fn unused_stages_are_forgotten() {
        let (_temp, cache) = cache();
        let dir = cache.stage("thing", &Key::new("1"), |_| Ok(())).unwrap();
        assert_eq!(cache.forget(Duration::from_secs(60)).unwrap(), 0);
        assert_eq!(cache.forget(Duration::ZERO).unwrap(), 1);
        assert!(!dir.exists());
    }
}
