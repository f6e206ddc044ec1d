// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `muser.h` is made from `muser.rs`, and says the same.

#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

use muser_abi_tests::c_side::{self, Dialect};
use muser_abi_tests::definition::Definition;
use muser_abi_tests::{header, mismatches, rust_side};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn uapi(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../kmod/uapi")
        .join(file)
}

fn read(file: &str) -> String {
    let path = uapi(file);
    std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("can't read {}: {error}", path.display()))
}

fn source() -> String {
    read("src/muser.rs")
}

fn definition() -> Definition {
    Definition::parse(&source()).unwrap()
}

/// The header as `source` makes it, which the tests below take so that they don't depend on
/// whether the one in the tree was written anew before or after them.
fn fresh(source: &str) -> String {
    header::generate(source, &uapi("cbindgen.toml")).unwrap()
}

/// Measures `header` in C11 and returns how it differs from Rust.
fn differences(header: &str) -> Vec<String> {
    let c = c_side::measure(&definition(), header, Dialect::C11).unwrap();
    mismatches(&rust_side::measure(), &c)
}

/// `header` with the first `from` replaced, which must be there.
fn mutated(header: &str, from: &str, to: &str) -> String {
    assert!(header.contains(from), "{from:?} isn't in:\n{header}");
    header.replacen(from, to, 1)
}

/// The names that follow `keyword` at the start of a line.
fn names<'a>(text: &'a str, keyword: &str) -> BTreeSet<&'a str> {
    text.lines()
        .filter_map(|line| line.strip_prefix(keyword))
        .map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            &rest[..end.unwrap_or(rest.len())]
        })
        .filter(|name| name.to_lowercase().starts_with("muser_"))
        .collect()
}

#[test]
fn header_in_tree_is_the_one_generated() {
    let fresh = fresh(&source());
    let path = uapi("muser.h");
    if std::env::var_os("MUSER_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&path, &fresh).unwrap();
    }
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((number, (old, new))) = present
        .lines()
        .chain(std::iter::repeat("(nothing)"))
        .zip(fresh.lines().chain(["(nothing)"]))
        .enumerate()
        .find(|(_, (old, new))| old != new)
    {
        panic!(
            "kmod/uapi/muser.h is not what kmod/uapi/src/muser.rs makes; first in line {}:\n  \
             there is:  {old}\n  should be: {new}\n\
             `MUSER_BLESS=1 cargo test -p muser-abi-tests` writes it anew",
            number + 1
        );
    }
    assert_eq!(present, fresh);
}

#[test]
fn c11_and_rust_agree() {
    let differences = differences(&fresh(&source()));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn cxx17_and_rust_agree() {
    let c = c_side::measure(&definition(), &fresh(&source()), Dialect::Cxx17).unwrap();
    let differences = mismatches(&rust_side::measure(), &c);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// The definition is counted a second way, by the text, so that an item which `syn` code passes
/// over can't go unseen.
#[test]
fn every_item_of_the_source_is_compared_and_in_the_header() {
    let source = source();
    let definition = definition();
    let header = fresh(&source);

    let structs: BTreeSet<&str> = definition.structs.iter().map(|s| &*s.name).collect();
    let constants: BTreeSet<&str> = definition.constants.iter().map(|c| &*c.name).collect();
    assert!(!structs.is_empty() && !constants.is_empty());
    assert_eq!(structs, names(&source, "pub struct "));
    assert_eq!(constants, names(&source, "pub const "));
    assert_eq!(structs, names(&header, "struct "));
    assert_eq!(constants, names(&header, "#define "));

    let fields: usize = definition.structs.iter().map(|s| s.fields.len()).sum();
    let in_source = source
        .lines()
        .filter(|line| line.starts_with("    pub "))
        .count();
    assert_eq!(fields, in_source);
}

/// Together with equal sizes this shows that the header has no field which Rust lacks.
#[test]
fn fields_fill_their_structs() {
    let values = rust_side::measure();
    for item in definition().structs {
        let sum: u64 = item
            .fields
            .iter()
            .map(|field| values[&format!("{}.{}: size", item.name, field.name)])
            .sum();
        let size = values[&format!("struct {}: size", item.name)];
        assert_eq!(sum, size, "struct {} has padding", item.name);
    }
}

/// Each ioctl is told from the others, and is what `_IO` of the kernel's headers makes.
#[test]
fn ioctl_numbers_are_distinct_and_from_io() {
    let definition = definition();
    let c = c_side::measure(&definition, &fresh(&source()), Dialect::C11).unwrap();
    let ioctls: Vec<_> = definition
        .constants
        .iter()
        .filter_map(|constant| Some((constant.name.clone(), constant.ioctl?)))
        .collect();
    assert!(ioctls.iter().any(|(name, _)| name == "MUSER_ATTACH"));
    let mut seen = BTreeSet::new();
    for (name, number) in ioctls {
        let value = c[&format!("{name}: value")];
        assert_eq!(
            value,
            u64::from((muser_uapi::MUSER_IOCTL_TYPE << 8) | number),
            "{name}"
        );
        assert!(seen.insert(value), "{name} has the number of another ioctl");
    }
}

#[test]
fn swapped_fields_are_reported_by_name() {
    let header = fresh(&source());
    let (before, next) = header.split_at(header.find("struct muser_next {").unwrap());
    let next = mutated(next, "__u32 flags;", "__u32 swap;");
    let next = mutated(&next, "__u32 slot;", "__u32 flags;");
    let next = mutated(&next, "__u32 swap;", "__u32 slot;");
    assert_eq!(
        differences(&format!("{before}{next}")),
        [
            "muser_next.flags: offset is 4 in muser.rs and 8 in muser.h",
            "muser_next.slot: offset is 8 in muser.rs and 4 in muser.h",
        ]
    );
}

#[test]
fn added_field_is_reported_by_the_name_of_its_struct() {
    let header = mutated(
        &fresh(&source()),
        "__u64 signalled;",
        "__u64 signalled; __u64 more;",
    );
    assert_eq!(
        differences(&header),
        ["struct muser_trigger: size is 32 in muser.rs and 40 in muser.h"]
    );
}

#[test]
fn changed_width_is_reported_by_name() {
    let differences = differences(&mutated(
        &fresh(&source()),
        "__u64 vectors;",
        "__u32 vectors;",
    ));
    assert!(
        differences
            .contains(&"muser_trigger.vectors: size is 8 in muser.rs and 4 in muser.h".into()),
        "{differences:?}"
    );
}

#[test]
fn changed_sign_is_reported_by_name() {
    let differences = differences(&mutated(
        &fresh(&source()),
        "__s32 result;",
        "__u32 result;",
    ));
    assert_eq!(
        differences,
        ["muser_slot.result: signed is 1 in muser.rs and 0 in muser.h"]
    );
}

#[test]
fn changed_constant_is_reported_by_name() {
    let header = mutated(
        &fresh(&source()),
        "#define MUSER_IRQ_MASKABLE (1u << 1)",
        "#define MUSER_IRQ_MASKABLE (1u << 4)",
    );
    assert_eq!(
        differences(&header),
        ["MUSER_IRQ_MASKABLE: value is 2 in muser.rs and 16 in muser.h"]
    );
}

#[test]
fn changed_ioctl_is_reported_by_name() {
    let header = mutated(
        &fresh(&source()),
        "_IO(MUSER_IOCTL_TYPE, 3)",
        "_IO(MUSER_IOCTL_TYPE, 4)",
    );
    assert_eq!(
        differences(&header),
        ["MUSER_QUERY: value is 48387 in muser.rs and 48388 in muser.h"]
    );
}

#[test]
fn missing_field_is_reported_by_name() {
    let header = mutated(&fresh(&source()), "__u32 fault_index;", "");
    let error = c_side::measure(&definition(), &header, Dialect::C11).unwrap_err();
    assert!(format!("{error:#}").contains("fault_index"), "{error:#}");
}

#[test]
fn item_that_c_has_no_width_for_is_refused() {
    let source = source() + "#[repr(C)] pub struct muser_new { pub size: usize }";
    let error = Definition::parse(&source).unwrap_err();
    assert!(
        format!("{error:#}").contains("in muser_new: size has type usize"),
        "{error:#}"
    );
}

#[test]
fn new_item_changes_the_header() {
    let header = fresh(&(source() + "/// New.\npub const MUSER_NEW: u64 = 1 << 63;"));
    assert!(
        header.contains("#define MUSER_NEW (1ull << 63)"),
        "{header}"
    );
}
