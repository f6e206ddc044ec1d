// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done with programs of the project on this machine itself: manual pages, and storms that
//! need no guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{bail, ensure, Context as _, Result};

use crate::cli::Storm;
use crate::root;
use crate::storm_command;
use crate::workbench::Workbench;

/// Programs with a page of their own; of muserctl, each command that `--help` shows has one too.
const SAMPLES: [&str; 2] = ["counter", "gpio"];
/// Commands of muserctl.
const COMMANDS: [&str; 8] = [
    "list",
    "types",
    "create",
    "remove",
    "show",
    "set",
    "probe",
    "supervise",
];
/// What each page has, and those of programs.
const SECTIONS: [&str; 3] = ["NAME", "SYNOPSIS", "SEE ALSO"];
const PROGRAMS_SECTIONS: [&str; 4] = ["EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES"];

/// Builds programs as they run here; returns where they are.
fn build(bench: &Workbench, packages: &[&str]) -> Result<PathBuf> {
    let mut cargo = bench.project.cargo();
    cargo.args(["build", "--quiet"]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    let status = cargo.status().context("cannot run cargo build")?;
    ensure!(status.success(), "the programs can't be built");
    Ok(bench.project.target().join("debug"))
}

/// Has a storm over a supervised socket; its exit status becomes xtask's.
pub(crate) fn storm(bench: &Workbench, storm: &Storm) -> Result<ExitCode> {
    let programs = build(bench, &["muser-e2e", &storm.device])?;
    let device = programs.join(&storm.device);
    let storm = Storm {
        device: format!("{} --quiet --threads 4", device.display()),
        ..storm.clone()
    };
    let status = Command::new(programs.join("storm"))
        .args(&storm_command(&storm)[1..])
        .status()
        .context("cannot run the storm")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

/// Writes the manual pages to a directory; tells how many there are.
pub(crate) fn manual_pages(bench: &Workbench, dir: &Path) -> Result<usize> {
    let programs = build(bench, &[&SAMPLES[..], &["muserctl"]].concat())?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut pages = 0;
    let mut write = |name: &str, program: &str, words: &[&str]| -> Result<()> {
        let output = Command::new(programs.join(program))
            .args(words)
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        if !output.status.success() {
            bail!(
                "{program} {words:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let page = dir.join(format!("{name}.1"));
        fs::write(&page, output.stdout)
            .with_context(|| format!("cannot write {}", page.display()))?;
        pages += 1;
        Ok(())
    };
    for sample in SAMPLES {
        write(sample, sample, &["--print-man"])?;
    }
    write("muserctl", "muserctl", &["print-man"])?;
    for command in COMMANDS {
        write(
            &format!("muserctl-{command}"),
            "muserctl",
            &["print-man", command],
        )?;
    }
    Ok(pages)
}

/// Makes all pages, and looks whether they are what man(1) can show: by mandoc or groff, whichever is
/// here, and otherwise by their macros only.
pub(crate) fn check_pages(bench: &Workbench) -> Result<()> {
    let dir = bench.project.output().join("man");
    manual_pages(bench, &dir)?;
    let mut complaints = Vec::new();
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = fs::read_to_string(&path)?;
        let mut sections = SECTIONS.to_vec();
        if !name.starts_with("muserctl-") || name == "muserctl-supervise" {
            sections.extend(PROGRAMS_SECTIONS);
        }
        complaints.extend(lint(&text, &sections).map(|what| format!("{name}: {what}")));
        complaints.extend(shown(&path)?.map(|what| format!("{name}: {what}")));
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// The first thing that is wrong with a page, which is to have these sections.
fn lint(text: &str, sections: &[&str]) -> Option<String> {
    const MACROS: [&str; 13] = [
        "TH", "SH", "SS", "PP", "TP", "IP", "RS", "RE", "nf", "fi", "sp", "br", "ie",
    ];
    let has = |section: &&&str| {
        let section: &str = section;
        let mut titles = text.lines().filter_map(|line| line.strip_prefix(".SH "));
        titles.any(|title| title.trim_matches('"') == section)
    };
    if let Some(missing) = sections.iter().find(|section| !has(section)) {
        return Some(format!("there is no section {missing}"));
    }
    let mut depth = 0_i32;
    for line in text.lines() {
        let Some(control) = line.strip_prefix('.') else {
            continue;
        };
        let name = control.split_whitespace().next().unwrap_or_default();
        match name {
            "RS" => depth += 1,
            "RE" => depth -= 1,
            _ => {}
        }
        let known = MACROS.contains(&name) || name.starts_with("\\\"") || name == "el";
        if !known || depth < 0 {
            return Some(format!("{line:?} is no macro, or not at its place"));
        }
    }
    (depth != 0).then(|| "an indentation has no end".to_owned())
}

/// What a program that shows pages has to say of one.
fn shown(page: &Path) -> Result<Option<String>> {
    let mut command = if root::on_path("mandoc") {
        let mut mandoc = Command::new("mandoc");
        mandoc.args(["-T", "lint", "-W", "warning"]);
        mandoc
    } else if root::on_path("groff") {
        let mut groff = Command::new("groff");
        groff.args(["-man", "-T", "utf8", "-ww", "-z"]);
        groff
    } else {
        return Ok(None);
    };
    let output = command.arg(page).stdin(Stdio::null()).output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    let fine = output.status.success() && said.is_empty();
    Ok((!fine).then_some(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_without_a_section_is_noticed() {
        assert_eq!(lint(".SH NAME\ntext\n", &["NAME"]), None);
        assert!(lint(".SH NAME\n", &["NAME", "FILES"]).is_some());
    }

    #[test]
    fn macro_that_is_none_and_indentation_without_end_are_noticed() {
        for bad in [".XX\n", ".RS 4\n", ".RE\n"] {
            assert!(lint(bad, &[]).is_some(), "{bad}");
        }
        assert_eq!(lint(".RS 4\n.nf\n.fi\n.RE\n", &[]), None);
    }
}
