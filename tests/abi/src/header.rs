// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes the C header out of `muser.rs`: cbindgen does the work, this file what it can't.
//!
//! Before cbindgen sees the source, its integer types become those of `<linux/types.h>`, its
//! literals get the suffix of their constant's type (`1 << 40` would overflow a C int), and links
//! of rustdoc become plain words. cbindgen can't evaluate `io(0)`, so the ioctl numbers are written
//! after the rest, with the `_IO` of `<linux/ioctl.h>`; the include guard goes around both.

use crate::definition::{self, Definition};
use anyhow::{anyhow, Context, Result};
use std::fmt::Write as _;
use std::path::Path;
use syn::visit_mut::{self, VisitMut};

/// Columns of the header.
const LINE: usize = 100;
const GUARD: &str = "_MUSER_H";
/// Marks a literal that cbindgen would turn into a decimal one; taken out of its output.
const VERBATIM: &str = "__verbatim_";

/// The text of the header for `source`, written as the file `config` says.
///
/// # Errors
///
/// If the source defines what C can't, or cbindgen fails.
pub fn generate(source: &str, config: &Path) -> Result<String> {
    let definition = Definition::parse(source)?;
    let mut file = syn::parse_file(source)?;
    let title = comment(&definition::docs(&file.attrs))?;
    CSource { suffix: "" }.visit_file_mut(&mut file);

    // cbindgen reads files only.
    let dir = tempfile::tempdir().context("no temporary directory")?;
    let prepared = dir.path().join("muser.rs");
    std::fs::write(&prepared, prettyplease::unparse(&file))?;
    let mut config = cbindgen::Config::from_file(config).map_err(|error| anyhow!(error))?;
    let notice = config.header.take().unwrap_or_default();
    config.header = Some(format!(
        "{}\n\n{title}\n#ifndef {GUARD}\n#define {GUARD}",
        notice.trim()
    ));
    config.trailer = Some(format!("{}#endif /* {GUARD} */", ioctls(&definition)?));
    // cbindgen leaves out what no function takes, and the ABI has no functions.
    config.export.include = definition.structs.iter().map(|s| s.name.clone()).collect();
    let mut text = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(&prepared)
        .generate()
        .context("cbindgen can't read the ABI's definition")?
        .write(&mut text);
    Ok(tidy(&String::from_utf8(text)?))
}

/// The ioctl numbers.
fn ioctls(definition: &Definition) -> Result<String> {
    let mut text = String::new();
    for constant in &definition.constants {
        if let Some(number) = constant.ioctl {
            text += &comment(&constant.docs)?;
            let name = &constant.name;
            writeln!(text, "#define {name} _IO(MUSER_IOCTL_TYPE, {number})\n")?;
        }
    }
    Ok(text)
}

/// A C comment out of the lines of a doc comment, formatted as cbindgen does.
fn comment(docs: &[String]) -> Result<String> {
    let mut text = String::from("/*\n");
    for line in docs {
        writeln!(text, " *{}", without_links(line))?;
    }
    text += " */\n";
    Ok(text)
}

/// Turns rustdoc's `` [`muser_next`] `` to `` `muser_next` ``.
fn without_links(line: &str) -> String {
    line.replace("[`", "`").replace("`]", "`")
}

/// What is left to do on cbindgen's output: plain comments, on one line where they fit.
fn tidy(header: &str) -> String {
    let header = header.replace(VERBATIM, "").replace("/**\n", "/*\n");
    let lines: Vec<&str> = header.lines().map(str::trim_end).collect();
    let mut text = String::new();
    let mut rest = &lines[..];
    while let [line, after @ ..] = rest {
        if let Some(comment) = one_line(rest) {
            text += &comment;
            text.push('\n');
            rest = &rest[3..];
            continue;
        }
        rest = after;
        let doubled = line.is_empty() && rest.first().is_some_and(|next| next.is_empty());
        if !doubled {
            text += line;
            text.push('\n');
        }
    }
    text
}

/// The comment that the first three lines are, on one line.
fn one_line(lines: &[&str]) -> Option<String> {
    let [open, only, close, ..] = lines else {
        return None;
    };
    let indent = open.strip_suffix("/*")?;
    let sentence = only.trim_start().strip_prefix("* ")?;
    let comment = format!("{indent}/* {sentence} */");
    (close.trim_start() == "*/" && comment.len() <= LINE).then_some(comment)
}

/// Rewrites the source so that cbindgen's output fits C.
struct CSource {
    /// The C suffix for literals of the constant visited, as a Rust type; empty outside of one.
    suffix: &'static str,
}

impl VisitMut for CSource {
    fn visit_item_const_mut(&mut self, item: &mut syn::ItemConst) {
        self.suffix = match &*item.ty {
            syn::Type::Path(path) if path.path.is_ident("u32") => "u32",
            syn::Type::Path(path) if path.path.is_ident("u64") => "u64",
            _ => "",
        };
        // Not its type: cbindgen leaves out constants of types it does not know.
        for attr in &mut item.attrs {
            self.visit_attribute_mut(attr);
        }
        self.visit_expr_mut(&mut item.expr);
        self.suffix = "";
    }

    fn visit_expr_binary_mut(&mut self, binary: &mut syn::ExprBinary) {
        self.visit_expr_mut(&mut binary.left);
        // `1u << 3u` says no more than `1u << 3`.
        if !matches!(binary.op, syn::BinOp::Shl(_) | syn::BinOp::Shr(_)) {
            self.visit_expr_mut(&mut binary.right);
        }
    }

    fn visit_expr_mut(&mut self, expr: &mut syn::Expr) {
        visit_mut::visit_expr_mut(self, expr);
        if let syn::Expr::Lit(syn::ExprLit {
            lit: syn::Lit::Int(literal),
            ..
        }) = expr
        {
            let text = literal.to_string();
            if self.suffix.is_empty() {
                return;
            }
            if text.starts_with("0x") {
                let suffix = if self.suffix == "u64" { "ull" } else { "u" };
                let name = format!("{VERBATIM}{text}{suffix}");
                let ident = syn::Ident::new(&name, literal.span());
                *expr = syn::parse_quote!(#ident);
            } else {
                *literal = syn::LitInt::new(&format!("{text}{}", self.suffix), literal.span());
            }
        }
    }

    fn visit_type_array_mut(&mut self, array: &mut syn::TypeArray) {
        self.visit_type_mut(&mut array.elem);
    }

    fn visit_type_mut(&mut self, ty: &mut syn::Type) {
        visit_mut::visit_type_mut(self, ty);
        let syn::Type::Path(path) = &*ty else { return };
        let name = match path.path.get_ident().map(ToString::to_string).as_deref() {
            Some("u8") => "__u8",
            Some("u16") => "__u16",
            Some("u32") => "__u32",
            Some("u64") => "__u64",
            Some("i8") => "__s8",
            Some("i16") => "__s16",
            Some("i32") => "__s32",
            Some("i64") => "__s64",
            _ => return,
        };
        let ident = syn::Ident::new(name, proc_macro2::Span::call_site());
        *ty = syn::parse_quote!(#ident);
    }

    fn visit_attribute_mut(&mut self, attr: &mut syn::Attribute) {
        let syn::Meta::NameValue(meta) = &mut attr.meta else {
            return;
        };
        if let syn::Expr::Lit(syn::ExprLit {
            lit: syn::Lit::Str(text),
            ..
        }) = &mut meta.value
        {
            *text = syn::LitStr::new(&without_links(&text.value()), text.span());
        }
    }
}
