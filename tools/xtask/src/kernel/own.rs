// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Kernels built here, for what Debian's own turns off: `small` from
//! `tests/kernel/small.config`, `debug` with `debug.config` on top.

use std::fs;

use anyhow::{bail, Context as _, Result};

use super::{make, source, Tree};
use crate::cache::Key;
use crate::cli::Kernel;
use crate::step::Step;
use crate::workbench::Workbench;

const RECIPE: &str = "own 1";

/// Objects, which only linking the kernel itself needs. What is in scripts and
/// tools is run by module builds, and may be looked at by make.
const PRUNE: &str = "
find . \\( -path ./scripts -o -path ./tools \\) -prune -o -type f \\
    \\( -name '*.o' -o -name '*.a' -o -name '*.ko' -o -name '*.mod.c' -o -name '.*.cmd' \\) \\
    ! -path './.*' -print0 | xargs -0r rm -f
rm -f vmlinux vmlinux.* .tmp_vmlinux* .vmlinux* arch/x86/boot/compressed/vmlinux*
";

pub(super) fn prepare(bench: &Workbench, kernel: Kernel) -> Result<Tree> {
    let root = bench.root()?;
    let fragments: &[&str] = match kernel {
        Kernel::Debug => &["tests/kernel/small.config", "tests/kernel/debug.config"],
        Kernel::Small | Kernel::Stock => &["tests/kernel/small.config"],
    };
    // RUST together with KASAN needs clang.
    let (compiler, usually) = match kernel {
        Kernel::Debug => (vec!["LLVM=-19".to_owned()], "12 minutes on two idle cores"),
        Kernel::Small | Kernel::Stock => (Vec::new(), "6 minutes on two idle cores"),
    };
    let mut wanted = String::new();
    for fragment in fragments {
        let path = bench.project.file(fragment);
        wanted += &fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    let kernels = bench.kernels(|kernels| source::present(&bench.cache, &kernels.own_source))?;
    let version = &kernels.own_source.version;
    let key = Key::new(RECIPE)
        .and(&bench.cache.dir().display().to_string())
        .and(&settings(&wanted).collect::<Vec<_>>().join("\n"))
        .and(version)
        .and(root.toolchain());
    let source = source::prepare(bench, &kernels.own_source)?;
    let stage = bench.cache.stage(kernel.name(), &key, |stage| {
        let mut step = Step::start(
            &format!("Building the {kernel} kernel from Linux {version}"),
            usually,
            bench.cache.log(kernel.name()),
        )?;
        let build = stage.join("build");
        fs::create_dir(&build)?;
        let output = format!("O={}", build.display());
        let mut run = |what: &str, targets: &[&str]| {
            step.run(
                what,
                make(root, &source, &compiler).arg(&output).args(targets),
            )
        };
        run("configuring", &["tinyconfig"])?;
        let config = build.join(".config");
        let tiny = fs::read_to_string(&config)?;
        fs::write(&config, format!("{tiny}\n{wanted}"))?;
        run("configuring", &["olddefconfig"])?;
        check(&wanted, &fs::read_to_string(&config)?, kernel)?;
        run("compiling", &["bzImage", "modules"])?;
        let modules = format!("INSTALL_MOD_PATH={}", stage.display());
        run("installing modules", &[&modules, "modules_install"])?;
        fs::copy(build.join("arch/x86/boot/bzImage"), stage.join("bzImage"))?;
        step.run(
            "tidying",
            root.command_in(&build, "sh").args(["-ec", PRUNE]),
        )?;
        step.done();
        Ok(())
    })?;
    let build = stage.join("build");
    let release = fs::read_to_string(build.join("include/config/kernel.release"))?;
    let release = release.trim().to_owned();
    Ok(Tree {
        kernel,
        build,
        source,
        image: stage.join("bzImage"),
        modules: stage.join("lib/modules").join(&release),
        compiler,
        release,
    })
}

/// The lines of a fragment that set something.
fn settings(fragment: &str) -> impl Iterator<Item = &str> {
    fragment.lines().filter(|line| {
        line.starts_with("CONFIG_")
            || (line.starts_with("# CONFIG_") && line.ends_with(" is not set"))
    })
}

/// Kconfig drops what it cannot satisfy without a word, and a test would then
/// pass because what it looks for is not there.
fn check(wanted: &str, config: &str, kernel: Kernel) -> Result<()> {
    let taken = |line: &str| match line.strip_prefix("# ") {
        Some(unset) => {
            let name = unset.trim_end_matches(" is not set");
            !config
                .lines()
                .any(|line| line.starts_with(&format!("{name}=")))
        }
        None => config.lines().any(|other| other == line),
    };
    let lost: Vec<&str> = settings(wanted).filter(|line| !taken(line)).collect();
    if !lost.is_empty() {
        bail!(
            "the configuration of the {kernel} kernel did not take these lines of its fragments, \
             because they depend on something that is off or are selected by something that is \
             on:\n    {}",
            lost.join("\n    ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_did_not_take_are_named() {
        let wanted = "CONFIG_A=y\n# a comment\n# CONFIG_B is not set\nCONFIG_C=m\n";
        assert!(check(wanted, "CONFIG_A=y\nCONFIG_C=m\n", Kernel::Small).is_ok());
        let error = check(wanted, "CONFIG_B=y\nCONFIG_C=y\n", Kernel::Small).unwrap_err();
        let text = error.to_string();
        assert!(
            text.ends_with("CONFIG_A=y\n    # CONFIG_B is not set\n    CONFIG_C=m"),
            "{text}"
        );
    }

    #[test]
    fn comments_of_a_fragment_set_nothing() {
        let fragment = "# about\n\nCONFIG_A=y\n# CONFIG_B is not set\n";
        assert_eq!(settings(fragment).count(), 2);
    }
}
