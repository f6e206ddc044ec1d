// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every size, offset and constant as a C compiler sees it, through the header.

use crate::definition::{Definition, Field};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// A C dialect in which the header must compile without a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dialect {
    /// ISO C11.
    C11,
    /// ISO C++17.
    Cxx17,
}

/// Compiles a program that includes `header`, runs it, and returns what it measured, under the
/// names of [`rust_side::measure`](crate::rust_side::measure).
///
/// # Errors
///
/// If there is no compiler, or it refuses the program: then with what the compiler said, which
/// names the struct, field or constant that the header lacks.
pub fn measure(
    definition: &Definition,
    header: &str,
    dialect: Dialect,
) -> Result<BTreeMap<String, u64>> {
    let dir = tempfile::tempdir().context("no temporary directory")?;
    std::fs::write(dir.path().join("muser.h"), header)?;
    std::fs::write(dir.path().join("measure.c"), program(definition)?)?;
    compile(dir.path(), dialect)?;
    let output = Command::new(dir.path().join("measure"))
        .output()
        .context("can't run the C program")?;
    ensure!(
        output.status.success(),
        "the C program ended with {}",
        output.status
    );
    String::from_utf8(output.stdout)?
        .lines()
        .map(|line| {
            let (what, value) = line.rsplit_once('=').context("the C program's output")?;
            Ok((what.to_owned(), value.parse()?))
        })
        .collect()
}

fn compile(dir: &Path, dialect: Dialect) -> Result<()> {
    let (language, standard) = match dialect {
        Dialect::C11 => ("c", "-std=c11"),
        Dialect::Cxx17 => ("c++", "-std=c++17"),
    };
    let output = Command::new("cc")
        .current_dir(dir)
        .args([
            standard,
            "-x",
            language,
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
        ])
        .args(["measure.c", "-o", "measure"])
        .output()
        .context("can't run `cc`: install a C compiler (Debian: build-essential)")?;
    ensure!(
        output.status.success(),
        "cc {standard} refuses muser.h, or a program that names all of muser.rs:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The C program: one line of output for every value.
fn program(definition: &Definition) -> Result<String> {
    let mut code = String::from(
        "#include \"muser.h\"\n#include \"muser.h\"\n#include <stddef.h>\n#include <stdio.h>\n#include <string.h>\n\
         #define SHOW(what, value) printf(\"%s=%llu\\n\", what, (unsigned long long)(value))\n\
         #ifdef __cplusplus\n#define _Alignof alignof\n#endif\n\
         int main(void)\n{\n",
    );
    for item in &definition.structs {
        let name = &item.name;
        writeln!(code, "{{\nstruct {name} s;\nmemset(&s, 0xff, sizeof(s));")?;
        writeln!(
            code,
            "SHOW(\"struct {name}: size\", sizeof(struct {name}));"
        )?;
        writeln!(
            code,
            "SHOW(\"struct {name}: alignment\", _Alignof(struct {name}));"
        )?;
        for Field {
            name: field,
            array,
            signed,
        } in &item.fields
        {
            let place = format!("{name}.{field}");
            let element = if *array { "[0]" } else { "" };
            writeln!(
                code,
                "SHOW(\"{place}: offset\", offsetof(struct {name}, {field}));"
            )?;
            writeln!(code, "SHOW(\"{place}: size\", sizeof(s.{field}));")?;
            if *array {
                writeln!(
                    code,
                    "SHOW(\"{place}: element size\", sizeof(s.{field}[0]));"
                )?;
            }
            if signed.is_some() {
                // All bits set: below zero if, and only if, the type is signed.
                writeln!(
                    code,
                    "SHOW(\"{place}: signed\", !(s.{field}{element} > 0));"
                )?;
            }
        }
        code.push_str("}\n");
    }
    for constant in &definition.constants {
        let name = &constant.name;
        writeln!(code, "SHOW(\"{name}: value\", {name});")?;
        writeln!(code, "SHOW(\"{name}: size\", sizeof({name}));")?;
    }
    code.push_str("return 0;\n}\n");
    Ok(code)
}
