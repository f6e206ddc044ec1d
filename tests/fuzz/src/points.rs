// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The points of muser.ko that KCOV can tell of, by function: read from the module's file.
//!
//! The compiler puts a call of `__sanitizer_cov_trace_pc` at each, and KCOV records where the call
//! returns to: behind the four bytes that the call's relocation is for.

use std::collections::BTreeMap;

use anyhow::{bail, Context, Result};

/// Section in which the module's code is.
pub(crate) const TEXT: &str = ".text";
const TRACE: &str = "__sanitizer_cov_trace_pc";

const SHT_SYMTAB: u32 = 2;
const SHT_RELA: u32 = 4;
const STT_FUNC: u8 = 2;

/// The points of a module.
#[derive(Debug, Default)]
pub(crate) struct Points {
    /// Bytes of [`TEXT`].
    pub(crate) text: u64,
    /// By offset in [`TEXT`]: the function in which the point is.
    pub(crate) functions: BTreeMap<u64, String>,
}

impl Points {
    /// Reads them from an ELF64 relocatable file of this machine's byte order.
    ///
    /// # Errors
    ///
    /// When it is no such file.
    pub(crate) fn read(module: &[u8]) -> Result<Self> {
        let elf = Elf::new(module)?;
        let (text, header) = elf
            .sections()
            .find(|(_, section)| section.name == TEXT)
            .context("the module has no code")?;
        let symbols = elf.symbols()?;
        let starts: BTreeMap<u64, &str> = symbols
            .iter()
            .filter(|symbol| symbol.section == text && symbol.kind == STT_FUNC)
            .map(|symbol| (symbol.value, symbol.name))
            .collect();
        let mut functions = BTreeMap::new();
        for (_, section) in elf.sections() {
            if section.kind != SHT_RELA || section.info as usize != text {
                continue;
            }
            for entry in elf.entries(&section) {
                let symbol = word(entry, 12)? as usize;
                if symbols
                    .get(symbol)
                    .is_some_and(|symbol| symbol.name == TRACE)
                {
                    let offset = long(entry, 0)?;
                    let function = starts.range(..=offset).next_back();
                    let name = function.map_or("?", |(_, name)| name);
                    functions.insert(offset + 4, plain(name));
                }
            }
        }
        Ok(Self {
            text: header.size,
            functions,
        })
    }

    /// Functions of which no point is covered, and how many points they have.
    pub(crate) fn never_entered(&self, covered: impl Fn(u64) -> bool) -> Vec<(&str, usize)> {
        let mut functions: BTreeMap<&str, (usize, bool)> = BTreeMap::new();
        for (&offset, name) in &self.functions {
            let entry = functions.entry(name).or_default();
            entry.0 += 1;
            entry.1 |= covered(offset);
        }
        functions
            .into_iter()
            .filter(|(_, (_, entered))| !entered)
            .map(|(name, (points, _))| (name, points))
            .collect()
    }
}

/// A symbol as a person writes it, without its hash.
fn plain(symbol: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(symbol))
}

/// A section's header.
#[derive(Clone, Copy, Debug)]
struct Section<'a> {
    name: &'a str,
    name_at: u32,
    kind: u32,
    link: u32,
    info: u32,
    offset: u64,
    size: u64,
    entry: u64,
}

#[derive(Clone, Copy, Debug)]
struct Symbol<'a> {
    name: &'a str,
    kind: u8,
    section: usize,
    value: u64,
}

#[derive(Debug)]
struct Elf<'a> {
    bytes: &'a [u8],
    sections: Vec<Section<'a>>,
}

impl<'a> Elf<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self> {
        // ELFCLASS64, ELFDATA2LSB.
        if bytes.get(..6) != Some(b"\x7fELF\x02\x01") {
            bail!("this is no ELF file of 64 bits");
        }
        let table = usize::try_from(long(bytes, 0x28)?)?;
        let (size, count, names) = (
            half(bytes, 0x3A)?.into(),
            half(bytes, 0x3C)?.into(),
            usize::from(half(bytes, 0x3E)?),
        );
        let headers = bytes.get(table..).context("the section table is cut off")?;
        let mut sections = headers
            .chunks_exact(size)
            .take(count)
            .map(|header| {
                Ok(Section {
                    name: "",
                    name_at: word(header, 0)?,
                    kind: word(header, 4)?,
                    offset: long(header, 24)?,
                    size: long(header, 32)?,
                    link: word(header, 40)?,
                    info: word(header, 44)?,
                    entry: long(header, 56)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let strings = *sections.get(names).context("the sections have no names")?;
        for section in &mut sections {
            section.name = string(content(bytes, &strings), section.name_at);
        }
        Ok(Self { bytes, sections })
    }

    fn sections(&self) -> impl Iterator<Item = (usize, Section<'a>)> + '_ {
        self.sections.iter().copied().enumerate()
    }

    fn entries(&self, section: &Section<'a>) -> std::slice::ChunksExact<'a, u8> {
        let size = usize::try_from(section.entry).unwrap_or(0).max(1);
        content(self.bytes, section).chunks_exact(size)
    }

    fn symbols(&self) -> Result<Vec<Symbol<'a>>> {
        let (_, table) = self
            .sections()
            .find(|(_, section)| section.kind == SHT_SYMTAB)
            .context("the module has no symbols")?;
        let strings = self
            .sections
            .get(table.link as usize)
            .context("the symbols have no names")?;
        let names = content(self.bytes, strings);
        self.entries(&table)
            .map(|entry| {
                Ok(Symbol {
                    name: string(names, word(entry, 0)?),
                    kind: entry.get(4).context("short symbol")? & 0xF,
                    section: half(entry, 6)?.into(),
                    value: long(entry, 8)?,
                })
            })
            .collect()
    }
}

fn content<'a>(bytes: &'a [u8], section: &Section<'_>) -> &'a [u8] {
    let start = usize::try_from(section.offset).unwrap_or(usize::MAX);
    let len = usize::try_from(section.size).unwrap_or(usize::MAX);
    bytes
        .get(start..start.saturating_add(len))
        .unwrap_or_default()
}

fn string(table: &[u8], at: u32) -> &str {
    let rest = table.get(at as usize..).unwrap_or_default();
    let end = rest.iter().position(|&byte| byte == 0).unwrap_or(0);
    std::str::from_utf8(&rest[..end]).unwrap_or("?")
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let part = bytes.get(at..).and_then(|rest| rest.first_chunk());
    part.copied().context("the file is cut off")
}

fn half(bytes: &[u8], at: usize) -> Result<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> Result<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_without_a_covered_point_was_never_entered() {
        let functions = [(5, "a"), (9, "a"), (20, "b"), (30, "b")]
            .map(|(at, name)| (at, name.to_owned()))
            .into();
        let points = Points {
            text: 64,
            functions,
        };
        assert_eq!(points.never_entered(|at| at == 9), [("b", 2)]);
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert!(Points::read(b"#!/bin/sh").is_err());
        assert!(Points::read(b"\x7fELF\x02\x01").is_err());
    }
}
