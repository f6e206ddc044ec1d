// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO-USER.md` names a test for each command and capability: they exist.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use libmuser::vfio_user::wire::Command;

const DOCUMENT: &str = include_str!("../VFIO-USER.md");

/// All sources of the workspace, by the name of the file or, of a `mod.rs`, of its folder.
fn sources() -> BTreeMap<String, Vec<PathBuf>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    folders.push(path);
                }
            } else if let Some(stem) = name.strip_suffix(".rs") {
                let folder = path.parent().unwrap().file_name().unwrap();
                let stem = match stem {
                    "mod" => folder.to_string_lossy().into_owned(),
                    stem => stem.to_owned(),
                };
                found.entry(stem).or_default().push(path);
            }
        }
    }
    found
}

/// The tests that the document names, as file and function.
fn named() -> Vec<(&'static str, &'static str)> {
    let quoted = DOCUMENT.split('`').skip(1).step_by(2);
    let test = |name: &'static str| {
        let (file, function) = name.split_once("::")?;
        let is_name = |part: &str| {
            !part.is_empty()
                && part
                    .chars()
                    .all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        (is_name(file) && is_name(function)).then_some((file, function))
    };
    quoted.filter_map(test).collect()
}

#[test]
fn tests_that_are_named_exist() {
    let sources = sources();
    let named = named();
    assert!(named.len() > 60, "only {} tests were found", named.len());
    for (file, function) in named {
        let paths = sources.get(file);
        let paths = paths.unwrap_or_else(|| panic!("there is no file {file}.rs"));
        let definition = format!("fn {function}(");
        let has = |path: &PathBuf| std::fs::read_to_string(path).unwrap().contains(&definition);
        assert!(paths.iter().any(has), "{file} has no test {function}");
    }
}

/// The row of a table that begins with this.
fn row(name: &str) -> &'static str {
    let start = format!("| `{name}` |");
    let row = DOCUMENT.lines().find(|line| line.starts_with(&start));
    row.unwrap_or_else(|| panic!("{name} has no row"))
}

#[test]
fn commands_have_a_row_with_their_number_and_a_test() {
    for command in Command::ALL {
        let row = row(command.name());
        let columns: Vec<_> = row.split(" | ").collect();
        assert_eq!(columns[1], command.number().to_string(), "{command}");
        assert!(columns[3].contains("::"), "{command} has no test");
    }
}

#[test]
fn capabilities_have_a_row_with_a_test() {
    for name in [
        "max_msg_fds",
        "max_data_xfer_size",
        "max_dma_maps",
        "pgsizes",
        "migration",
        "twin_socket",
        "write_multiple",
    ] {
        assert!(row(name).contains("::"), "{name} has no test");
    }
}
