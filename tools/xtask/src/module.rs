// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Builds muser.ko, as a user would with `make -C KDIR M=$PWD`, but from a copy:
//! a module build puts what it makes beside its sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context as _, Result};

use crate::cache::lock;
use crate::kernel::Tree;
use crate::project::Project;
use crate::root::Root;
use crate::step::Step;
use crate::workbench::Workbench;

/// The list of what an earlier run copied, to know what was deleted since.
const COPIED: &str = ".copied";

/// Builds the module for one kernel, and says where it is.
pub(crate) fn build(bench: &Workbench, tree: &Tree) -> Result<PathBuf> {
    let dir = make(bench, tree, "module", &[])?;
    find(&dir).with_context(|| format!("the build in {} made no muser.ko", dir.display()))
}

/// Builds the module with the kernel's own clippy settings, warnings denied.
pub(crate) fn clippy(bench: &Workbench, tree: &Tree) -> Result<()> {
    make(bench, tree, "clippy", &["CLIPPY=1"]).map(drop)
}

/// Compares the module's formatting with the kernel's settings.
pub(crate) fn rustfmt(root: &Root, project: &Project, source: &Path, fix: bool) -> Result<Command> {
    let mut files = Vec::new();
    walk(&project.file("kmod"), &mut files)?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    if files.is_empty() {
        bail!("kmod/ has no Rust source");
    }
    let mut command = root.command_in(project.dir(), "rustfmt");
    if !fix {
        command.arg("--check");
    }
    command
        .arg("--config-path")
        .arg(source.join(".rustfmt.toml"))
        .args(files);
    Ok(command)
}

fn make(bench: &Workbench, tree: &Tree, what: &str, arguments: &[&str]) -> Result<PathBuf> {
    let output = bench.project.output_for(tree.kernel);
    fs::create_dir_all(&output)?;
    let kernel = tree.kernel;
    let _lock = lock(
        &output.join("module.lock"),
        &format!("the module for the {kernel} kernel"),
    )?;
    // Another kernel build directory makes every object stale, which make would
    // not notice.
    let dir = output.join(what);
    let stamp = dir.join(".kdir");
    let kdir = tree.build.display().to_string();
    if fs::read_to_string(&stamp).ok().as_deref() != Some(&kdir) {
        crate::cache::remove(&dir)?;
        fs::create_dir_all(&dir)?;
        fs::write(&stamp, &kdir)?;
    }
    copy(bench.project.dir(), &dir)?;
    let mut step = Step::start(
        &match what {
            "clippy" => format!(
                "Checking muser.ko with clippy for the {kernel} kernel, {}",
                tree.release
            ),
            _ => format!(
                "Building muser.ko for the {kernel} kernel, {}",
                tree.release
            ),
        },
        "20 seconds",
        bench.project.log(&format!("{what}-{kernel}")),
    )?;
    let mut make = tree.make(bench.root()?);
    make.arg(format!("M={}", dir.display()))
        .arg("KRUSTFLAGS=-Dwarnings")
        .args(arguments);
    step.run("compiling", &mut make)?;
    step.done();
    Ok(dir)
}

/// Copies what a module build reads, touching only files that changed.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut files = vec![from.join("Kbuild")];
    walk(&from.join("kmod"), &mut files)?;
    let mut copied = BTreeSet::new();
    for file in files {
        let name = file.strip_prefix(from)?.to_owned();
        let content = match fs::read(&file) {
            Ok(content) => content,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!(
                    "{} is not there: the module has no build file",
                    file.display()
                )
            }
            Err(error) => return Err(error.into()),
        };
        let target = to.join(&name);
        if fs::read(&target).ok().as_ref() != Some(&content) {
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&target, content)?;
        }
        copied.insert(name.display().to_string());
    }
    let list = to.join(COPIED);
    for name in fs::read_to_string(&list).unwrap_or_default().lines() {
        if !copied.contains(name) {
            fs::remove_file(to.join(name)).ok();
        }
    }
    fs::write(list, copied.into_iter().collect::<Vec<_>>().join("\n"))?;
    Ok(())
}

/// Every source file below a directory.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("{} cannot be read", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                walk(&path, files)?;
            }
            continue;
        }
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let source = [".rs", ".c", ".h", ".S"]
            .iter()
            .any(|end| name.ends_with(end));
        if (source && !name.ends_with(".mod.c"))
            || ["Kbuild", "Makefile", "Kconfig"].contains(&&*name)
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn find(dir: &Path) -> Result<PathBuf> {
    for place in ["muser.ko", "kmod/muser.ko"] {
        let path = dir.join(place);
        if path.exists() {
            return Ok(path);
        }
    }
    bail!("there is no muser.ko")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_touches_changes_only_and_forgets_deleted_files() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(from.path().join(name), text).unwrap();
        fs::create_dir(from.path().join("kmod")).unwrap();
        write("Kbuild", "obj-m += kmod/");
        write("kmod/a.rs", "a");
        write("kmod/b.rs", "b");
        write("kmod/b.o", "object");
        copy(from.path(), to.path()).unwrap();
        let a = to.path().join("kmod/a.rs");
        let before = fs::metadata(&a).unwrap().modified().unwrap();
        fs::write(to.path().join("kmod/made.rs"), "by the build").unwrap();

        fs::remove_file(from.path().join("kmod/b.rs")).unwrap();
        copy(from.path(), to.path()).unwrap();

        assert_eq!(fs::metadata(&a).unwrap().modified().unwrap(), before);
        assert!(!to.path().join("kmod/b.rs").exists());
        assert!(!to.path().join("kmod/b.o").exists());
        assert!(to.path().join("kmod/made.rs").exists());
    }
}
