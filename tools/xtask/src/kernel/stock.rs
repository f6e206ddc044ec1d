// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Debian's own kernel, unmodified.
//!
//! Its headers package has no Rust metadata, so the matching source is prepared
//! with the very configuration that Debian built it with.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context as _, Result};

use super::{make, source, Tree};
use crate::cache::Key;
use crate::cli::Kernel;
use crate::step::Step;
use crate::workbench::Workbench;

const RECIPE: &str = "stock 1";
/// $1 is the release. An installed kernel has its modules below /lib, and a
/// list of what depends on what.
const UNPACK: &str = r#"
for deb in *.deb; do dpkg-deb -x "$deb" image; done
rm *.deb
[ -e image/lib ] || ln -s usr/lib image/lib
depmod -b image "$1"
"#;

pub(super) fn prepare(bench: &Workbench) -> Result<Tree> {
    let root = bench.root()?;
    let key = |kernels: &crate::archive::Kernels| {
        let mut key = Key::new(RECIPE).and(&bench.cache.dir().display().to_string());
        for package in kernels.stock.iter().chain([&kernels.stock_source]) {
            key = key.and(&package.name).and(&package.version);
        }
        key.and(root.toolchain())
    };
    let kernels = bench.kernels(|kernels| {
        bench.cache.find("stock", &key(kernels)).is_some()
            && source::present(&bench.cache, &kernels.stock_source)
    })?;
    let source = source::prepare(bench, &kernels.stock_source)?;
    let release = kernels.release.clone();
    let stage = bench.cache.stage("stock", &key(&kernels), |stage| {
        let mut step = Step::start(
            &format!("Preparing Debian's kernel {release}"),
            "2 minutes, 180 MB to download",
            bench.cache.log("stock"),
        )?;
        source::download(&mut step, root, &bench.cache, &kernels.stock, stage)?;
        step.run(
            "unpacking",
            root.command_in(stage, "sh")
                .args(["-ec", UNPACK, "sh", &release]),
        )?;
        let headers = stage.join(format!("image/usr/src/linux-headers-{release}"));
        let config = fs::read_to_string(headers.join(".config"))
            .with_context(|| format!("linux-headers-{release} has no .config"))?;
        same_rustc(&config, &root.output("rustc", &["--version"])?)?;
        let compiler = compiler(&config, &release)?;

        let build = stage.join("build");
        fs::create_dir(&build)?;
        fs::write(build.join(".config"), &config)?;
        for (what, target) in [
            ("configuring", "olddefconfig"),
            ("preparing the build directory", "modules_prepare"),
        ] {
            let mut make = make(root, &source, &compiler);
            make.arg(format!("O={}", build.display())).arg(target);
            step.run(what, &mut make)?;
        }
        fs::copy(headers.join("Module.symvers"), build.join("Module.symvers"))?;
        fs::write(stage.join("compiler"), compiler.join("\n"))?;
        step.done();
        Ok(())
    })?;
    let compiler = fs::read_to_string(stage.join("compiler"))?;
    let image = stage.join("image");
    Ok(Tree {
        kernel: Kernel::Stock,
        build: stage.join("build"),
        source,
        image: first(
            &image,
            &[
                &format!("boot/vmlinuz-{release}"),
                &format!("usr/lib/modules/{release}/vmlinuz"),
            ],
        )?,
        modules: first(&image, &[&format!("lib/modules/{release}")])?,
        compiler: compiler.lines().map(str::to_owned).collect(),
        release,
    })
}

/// The compiler that Debian used, as arguments for make.
///
/// # Errors
/// The configuration doesn't tell.
fn compiler(config: &str, release: &str) -> Result<Vec<String>> {
    let text = setting(config, "CONFIG_CC_VERSION_TEXT").unwrap_or_default();
    let Some(cc) = text.split_whitespace().next() else {
        bail!("the configuration of {release} doesn't say which compiler built it");
    };
    let mut compiler = vec![format!("KERNELRELEASE={release}"), format!("CC={cc}")];
    if let Some((prefix, _)) = cc.split_once("gcc") {
        compiler.push(format!("CROSS_COMPILE={prefix}"));
    }
    Ok(compiler)
}

/// Rust symbols carry the compiler's version, so another one's modules do not link.
fn same_rustc(config: &str, rustc: &str) -> Result<()> {
    let wanted = setting(config, "CONFIG_RUSTC_VERSION_TEXT").unwrap_or_default();
    let version = |text: &str| text.split_whitespace().nth(1).map(str::to_owned);
    if version(wanted) != version(rustc) {
        bail!(
            "Debian built its kernel with {wanted}, and the build root has {}: \
             cargo xtask clean --all, then try again",
            rustc.trim()
        );
    }
    Ok(())
}

fn setting<'a>(config: &'a str, name: &str) -> Option<&'a str> {
    config.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix('=')?;
        Some(value.trim_matches('"'))
    })
}

fn first(dir: &Path, paths: &[&str]) -> Result<PathBuf> {
    match paths
        .iter()
        .map(|path| dir.join(path))
        .find(|path| path.exists())
    {
        Some(path) => Ok(path),
        None => bail!("Debian's kernel packages lack {}", paths.join(" and ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "\
CONFIG_CC_VERSION_TEXT=\"x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0\"
CONFIG_RUSTC_VERSION_TEXT=\"rustc 1.85.1 (4eb161250 2025-03-15) (built from a source tarball)\"
";

    #[test]
    fn compiler_is_the_one_in_the_configuration() {
        assert_eq!(
            compiler(CONFIG, "7.2.12").unwrap(),
            [
                "KERNELRELEASE=7.2.12",
                "CC=x86_64-linux-gnu-gcc-14",
                "CROSS_COMPILE=x86_64-linux-gnu-"
            ]
        );
        assert!(compiler("", "7.2.12").is_err());
    }

    #[test]
    fn other_rustc_is_refused() {
        assert!(same_rustc(CONFIG, "rustc 1.85.1 (elsewhere)\n").is_ok());
        assert!(same_rustc(CONFIG, "rustc 1.86.0\n").is_err());
    }
}
