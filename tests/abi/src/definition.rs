// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `kmod/uapi/src/muser.rs` defines, read with `syn`.
//!
//! The lists that the tests go through come from here and from nowhere else, so an item added to
//! the ABI is compared from its first day. `build.rs` compiles this file too.

use anyhow::{bail, ensure, Context, Result};

/// The ABI's structs and constants, in the order of the source.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Structs.
    pub structs: Vec<Struct>,
    /// Constants, ioctl numbers included.
    pub constants: Vec<Constant>,
}

/// A struct of the ABI.
#[derive(Clone, Debug)]
pub struct Struct {
    /// Its name, the same in both languages.
    pub name: String,
    /// Its fields.
    pub fields: Vec<Field>,
}

/// A field of a [`Struct`].
#[derive(Clone, Debug)]
pub struct Field {
    /// Its name, the same in both languages.
    pub name: String,
    /// Whether it is an array of integers.
    pub array: bool,
    /// Whether it is a signed integer, or an array of them; `None` for a struct.
    pub signed: Option<bool>,
}

/// A constant of the ABI.
#[derive(Clone, Debug)]
pub struct Constant {
    /// Its name, the same in both languages.
    pub name: String,
    /// `N` where the source says `io(N)`.
    pub ioctl: Option<u32>,
    /// Its doc comment, a line an element.
    pub docs: Vec<String>,
}

impl Definition {
    /// Reads the definition out of Rust source.
    ///
    /// # Errors
    ///
    /// If the source isn't Rust, or holds a public item that no test would compare.
    pub fn parse(source: &str) -> Result<Self> {
        let file = syn::parse_file(source).context("the ABI's definition is not Rust")?;
        let mut definition = Self {
            structs: Vec::new(),
            constants: Vec::new(),
        };
        for item in &file.items {
            match item {
                syn::Item::Struct(item) => definition.structs.push(Struct::parse(item)?),
                // `const _` holds assertions, which are the Rust side's own.
                syn::Item::Const(item) if item.ident == "_" => {}
                syn::Item::Const(item) => definition.constants.push(Constant::parse(item)?),
                syn::Item::Use(_) => {}
                // `const fn io`, which the ioctl numbers are made with.
                syn::Item::Fn(item) if matches!(item.vis, syn::Visibility::Inherited) => {}
                _ => bail!("an item which is neither struct, constant nor private function"),
            }
        }
        Ok(definition)
    }
}

impl Struct {
    fn parse(item: &syn::ItemStruct) -> Result<Self> {
        let name = item.ident.to_string();
        let repr_c = item.attrs.iter().any(|attr| {
            attr.path().is_ident("repr")
                && attr
                    .parse_args::<syn::Ident>()
                    .is_ok_and(|repr| repr == "C")
        });
        ensure!(repr_c, "{name} is not #[repr(C)]");
        let fields = item
            .fields
            .iter()
            .map(|field| Field::parse(field).with_context(|| format!("in {name}")))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!fields.is_empty(), "{name} has no fields");
        Ok(Self { name, fields })
    }
}

impl Field {
    fn parse(field: &syn::Field) -> Result<Self> {
        let name = field.ident.as_ref().context("a field without a name")?;
        let (array, element) = match &field.ty {
            syn::Type::Array(array) => (true, &*array.elem),
            ty => (false, ty),
        };
        let syn::Type::Path(path) = element else {
            bail!("{name} is neither an integer, an array nor a struct");
        };
        let ty = path
            .path
            .get_ident()
            .with_context(|| format!("{name} has a type with a path"))?
            .to_string();
        let signed = match ty.as_str() {
            "u8" | "u16" | "u32" | "u64" => Some(false),
            "i8" | "i16" | "i32" | "i64" => Some(true),
            other if other.starts_with("muser_") => None,
            other => bail!("{name} has type {other}, whose width C does not know"),
        };
        Ok(Self {
            name: name.to_string(),
            array,
            signed,
        })
    }
}

impl Constant {
    fn parse(item: &syn::ItemConst) -> Result<Self> {
        let name = item.ident.to_string();
        ensure!(
            matches!(item.vis, syn::Visibility::Public(_)),
            "{name} is not public"
        );
        Ok(Self {
            ioctl: ioctl_number(&item.expr).with_context(|| format!("in {name}"))?,
            docs: docs(&item.attrs),
            name,
        })
    }
}

/// The lines of a doc comment, as written after `///`.
#[must_use]
pub fn docs(attrs: &[syn::Attribute]) -> Vec<String> {
    attrs
        .iter()
        .filter(|attr| attr.path().is_ident("doc"))
        .filter_map(|attr| match &attr.meta {
            syn::Meta::NameValue(meta) => match &meta.value {
                syn::Expr::Lit(syn::ExprLit {
                    lit: syn::Lit::Str(text),
                    ..
                }) => Some(text.value()),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

/// `N` if the expression is `io(N)`, `None` if it isn't a call.
fn ioctl_number(expr: &syn::Expr) -> Result<Option<u32>> {
    let syn::Expr::Call(call) = expr else {
        return Ok(None);
    };
    let is_io = matches!(&*call.func, syn::Expr::Path(path) if path.path.is_ident("io"));
    let number = match call.args.first() {
        Some(syn::Expr::Lit(syn::ExprLit {
            lit: syn::Lit::Int(number),
            ..
        })) if is_io && call.args.len() == 1 => number.base10_parse()?,
        _ => bail!("a call which isn't io(NUMBER)"),
    };
    Ok(Some(number))
}
