// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes the Rust side of the comparison: code which evaluates every size, offset and constant
//! that `muser.rs` defines.

use anyhow::{Context, Result};
use definition::{Definition, Field};
use std::fmt::Write as _;
use std::path::Path;

#[path = "src/definition.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "it is the library's, which needs more of it"
)]
mod definition;

const DEFINITION: &str = "../../kmod/uapi/src/muser.rs";

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed={DEFINITION}");
    println!("cargo::rerun-if-changed=src/definition.rs");
    let source =
        std::fs::read_to_string(DEFINITION).with_context(|| format!("can't read {DEFINITION}"))?;
    let out = std::env::var_os("OUT_DIR").context("cargo gives no OUT_DIR")?;
    std::fs::write(
        Path::new(&out).join("rust_side.rs"),
        rust_side(&Definition::parse(&source)?)?,
    )?;
    Ok(())
}

/// An expression of type `Vec<(&str, u64)>`; `rust_side.rs` has the functions that it calls.
fn rust_side(definition: &Definition) -> Result<String> {
    let mut code = String::from("vec![\n");
    for item in &definition.structs {
        let name = &item.name;
        writeln!(
            code,
            "(\"struct {name}: size\", wide(size_of::<{name}>())),"
        )?;
        writeln!(
            code,
            "(\"struct {name}: alignment\", wide(align_of::<{name}>())),"
        )?;
        for Field {
            name: field,
            array,
            signed,
        } in &item.fields
        {
            let place = format!("{name}.{field}");
            writeln!(
                code,
                "(\"{place}: offset\", wide(offset_of!({name}, {field}))),"
            )?;
            writeln!(
                code,
                "(\"{place}: size\", size_of_field(|s: &{name}| &s.{field})),"
            )?;
            if *array {
                writeln!(
                    code,
                    "(\"{place}: element size\", size_of_field(|s: &{name}| &s.{field}[0])),"
                )?;
            }
            if let Some(signed) = signed {
                writeln!(code, "(\"{place}: signed\", u64::from({signed})),")?;
            }
        }
    }
    for constant in &definition.constants {
        let name = &constant.name;
        writeln!(code, "(\"{name}: value\", value({name})),")?;
        writeln!(code, "(\"{name}: size\", wide(size_of_val(&{name}))),")?;
    }
    code.push(']');
    Ok(code)
}
