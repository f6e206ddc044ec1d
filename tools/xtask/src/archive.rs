// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The Debian archive: which mirror, and which kernels it has now.
//!
//! Versions come and go there, so nothing is pinned. What was found is written
//! down, and used for as long as what was made of it is in the cache: a machine
//! that is prepared needs no network, whatever the archive does.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{bail, Context as _, Result};
use serde_json::{json, Value};

use crate::cache::{lock, Cache};
use crate::root::Root;

/// The kernels that muser supports: the first series, and the first one after.
pub(crate) const SUPPORTED: ((u32, u32), (u32, u32)) = ((7, 2), (7, 4));

/// One package of one version.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// The kernels to build for and to boot.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Kernels {
    /// The release of Debian's binary kernel, as `uname -r` says it.
    pub(crate) release: String,
    /// The packages that it is made of: image, modules, headers.
    pub(crate) stock: Vec<Package>,
    /// The source package of that binary kernel.
    pub(crate) stock_source: Package,
    /// The source package of the kernels built here.
    pub(crate) own_source: Package,
}

/// The mirror to use: the one that this machine's apt uses.
pub(crate) fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("MUSER_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    const ADVICE: &str = "set MUSER_DEBIAN_MIRROR to the address of a Debian mirror";
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(LABEL) $(REPO_URI)",
            "Created-By: Packages",
        ])
        .output()
        .with_context(|| format!("apt-get cannot be asked for its mirror: {ADVICE}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().find_map(|line| line.strip_prefix("Debian ")) {
        Some(mirror) => Ok(mirror.trim().to_owned()),
        None => bail!("this machine's apt uses no Debian mirror: {ADVICE}"),
    }
}

/// The kernels that are there now; or those found last time, if the archive
/// does not answer.
pub(crate) fn ask(root: &Root, cache: &Cache) -> Result<Kernels> {
    let _lock = lock(
        &cache.dir().join("archive.lock"),
        "the archive's list of kernels",
    )?;
    eprintln!("Asking the Debian archive which kernels there are.");
    let found = update(root, cache).and_then(|packages| choose(&packages));
    let found = match (found, read(cache)) {
        (Ok(found), _) => found,
        (Err(error), Some(found)) => {
            eprintln!(
                "The archive did not answer, so the kernels in the cache are used: {error:#}"
            );
            return Ok(found);
        }
        (Err(error), None) => return Err(error),
    };
    eprintln!(
        "Debian's own kernel: {}. Kernels built here: {}.",
        found.release, found.own_source.version
    );
    write(cache, &found)?;
    Ok(found)
}

/// The arguments by which the root's apt keeps its state in the cache.
pub(crate) fn apt_options(cache: &Cache) -> Result<Vec<String>> {
    let dir = cache.dir().join("apt");
    fs::create_dir_all(dir.join("lists/partial"))?;
    fs::create_dir_all(dir.join("archives/partial"))?;
    let dir = dir.display();
    Ok([
        format!("Dir::State::Lists={dir}/lists"),
        format!("Dir::Cache={dir}"),
        "Dir::Cache::pkgcache=".to_owned(),
        "Dir::Cache::srcpkgcache=".to_owned(),
        "Acquire::GzipIndexes=true".to_owned(),
        "APT::Sandbox::User=root".to_owned(),
        "Acquire::Retries=3".to_owned(),
        "Acquire::Languages=none".to_owned(),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect())
}

/// Refreshes the lists and reads the kernel packages from them.
fn update(root: &Root, cache: &Cache) -> Result<Vec<Package>> {
    let options = apt_options(cache)?;
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    root.output(
        "apt-get",
        &[&options[..], &["--error-on=any", "-qq", "update"]].concat(),
    )?;
    let format = [
        "indextargets",
        "--format",
        "$(FILENAME)",
        "Created-By: Packages",
    ];
    let files = root.output("apt-get", &[&options[..], &format].concat())?;
    let mut packages = Vec::new();
    for file in files.lines() {
        let text = root.output("/usr/lib/apt/apt-helper", &["cat-file", file])?;
        packages.extend(parse(&text));
    }
    Ok(packages)
}

fn parse(index: &str) -> Vec<Package> {
    let mut packages = Vec::new();
    let mut name = "";
    for line in index.lines() {
        if let Some(value) = line.strip_prefix("Package: ") {
            name = value;
        } else if let Some(version) = line.strip_prefix("Version: ")
            && name.starts_with("linux-")
        {
            packages.push(Package {
                name: name.to_owned(),
                version: version.to_owned(),
            });
        }
    }
    packages
}

/// Picks the newest complete binary kernel, and the newest source.
fn choose(packages: &[Package]) -> Result<Kernels> {
    let has = |name: &str, version: &str| {
        packages
            .iter()
            .find(|package| package.name == name && package.version == version)
            .cloned()
    };
    let mut stock = Vec::new();
    for image in packages {
        let Some(release) = image.name.strip_prefix("linux-image-") else {
            continue;
        };
        let Some((number, abi)) = release.split_once('+') else {
            continue;
        };
        let (Some(number), Some(flavour)) = (numbers(number), abi.split_once('-')) else {
            continue;
        };
        if flavour.1 != "amd64" || !supported(number) {
            continue;
        }
        let version = image.version.as_str();
        let headers = has(&format!("linux-headers-{release}"), version);
        let source = has(&format!("linux-source-{}.{}", number.0, number.1), version);
        if let (Some(headers), Some(source)) = (headers, source) {
            let mut parts = vec![image.clone(), headers];
            // Newer packages split the image; the image itself then only depends on these.
            parts.extend(has(&format!("linux-binary-{release}"), version));
            parts.extend(has(&format!("linux-modules-{release}"), version));
            parts.extend(has(&format!("linux-base-{release}"), version));
            stock.push((number, release, parts, source));
        }
    }
    let own = packages.iter().filter_map(|package| {
        let series = numbers(package.name.strip_prefix("linux-source-")?)?;
        let number = numbers(package.version.split(['-', '~', '+']).next()?)?;
        supported(series).then_some((number, package))
    });
    let own = own.max_by_key(|(number, _)| *number);
    let stock = stock.into_iter().max_by_key(|(number, ..)| *number);
    let (Some((_, release, stock, stock_source)), Some((_, own_source))) = (stock, own) else {
        bail!("{}", refusal(packages));
    };
    Ok(Kernels {
        release: release.to_owned(),
        stock,
        stock_source,
        own_source: own_source.clone(),
    })
}

/// `7.2.12` as numbers; also `7.2`.
fn numbers(text: &str) -> Option<(u32, u32, u32)> {
    let mut parts = text.split('.').map(str::parse);
    let major = parts.next()?.ok()?;
    let minor = parts.next()?.ok()?;
    let patch = parts.next().unwrap_or(Ok(0)).ok()?;
    Some((major, minor, patch))
}

fn supported((major, minor, _): (u32, u32, u32)) -> bool {
    (SUPPORTED.0..SUPPORTED.1).contains(&(major, minor))
}

fn refusal(packages: &[Package]) -> String {
    let mut found: Vec<&str> = packages
        .iter()
        .filter(|package| package.name.starts_with("linux-source-"))
        .chain(packages.iter().filter(|package| {
            package.name.starts_with("linux-image-") && package.name.ends_with("-amd64")
        }))
        .map(|package| package.name.as_str())
        .collect();
    found.dedup();
    let ((major, minor), (next_major, next_minor)) = SUPPORTED;
    format!(
        "muser supports Linux {major}.{minor} up to, not including, {next_major}.{next_minor}, and \
         needs a linux-image, linux-headers and linux-source of one version; the archive has: {}",
        if found.is_empty() { "no kernel".to_owned() } else { found.join(", ") }
    )
}

fn file(cache: &Cache) -> PathBuf {
    cache.dir().join("kernels.json")
}

fn write(cache: &Cache, kernels: &Kernels) -> Result<()> {
    let package = |package: &Package| json!([package.name, package.version]);
    let value = json!({
        "release": kernels.release,
        "stock": kernels.stock.iter().map(package).collect::<Vec<_>>(),
        "stock_source": package(&kernels.stock_source),
        "own_source": package(&kernels.own_source),
    });
    let temporary = file(cache).with_extension("new");
    fs::write(&temporary, format!("{value:#}\n"))?;
    fs::rename(temporary, file(cache))?;
    Ok(())
}

/// The kernels found last time, if that was noted.
pub(crate) fn read(cache: &Cache) -> Option<Kernels> {
    let value: Value = serde_json::from_slice(&fs::read(file(cache)).ok()?).ok()?;
    let package = |value: &Value| {
        Some(Package {
            name: value[0].as_str()?.to_owned(),
            version: value[1].as_str()?.to_owned(),
        })
    };
    let own_source = package(&value["own_source"])?;
    // An older xtask may have written it, with another range.
    let series = numbers(own_source.name.strip_prefix("linux-source-")?)?;
    let kernels = Kernels {
        release: value["release"].as_str()?.to_owned(),
        stock: value["stock"]
            .as_array()?
            .iter()
            .map(package)
            .collect::<Option<_>>()?,
        stock_source: package(&value["stock_source"])?,
        own_source,
    };
    supported(series).then_some(kernels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(names: &[(&str, &str)]) -> Vec<Package> {
        let text: String = names
            .iter()
            .map(|(name, version)| format!("Package: {name}\nVersion: {version}\nDepends: x\n\n"))
            .collect();
        parse(&text)
    }

    #[test]
    fn newest_complete_kernel_is_chosen() {
        let kernels = choose(&archive(&[
            ("linux-image-7.2.9+deb13-amd64", "7.2.9-1"),
            ("linux-headers-7.2.9+deb13-amd64", "7.2.9-1"),
            ("linux-image-7.2.12+deb13-amd64", "7.2.12-1"),
            ("linux-binary-7.2.12+deb13-amd64", "7.2.12-1"),
            ("linux-headers-7.2.12+deb13-amd64", "7.2.12-1"),
            ("linux-source-7.2", "7.2.9-1"),
            ("linux-source-7.2", "7.2.12-1"),
            ("linux-image-7.3.4+deb13-amd64-dbg", "7.3.4-1"),
            ("linux-headers-7.3.4+deb13-amd64", "7.3.4-1"),
            ("linux-source-7.3", "7.3.4-1"),
        ]));
        let kernels = kernels.unwrap();
        assert_eq!(kernels.release, "7.2.12+deb13-amd64");
        assert_eq!(kernels.stock.len(), 3);
        assert_eq!(kernels.stock_source.version, "7.2.12-1");
        assert_eq!(kernels.own_source.name, "linux-source-7.3");
    }

    #[test]
    fn source_of_another_version_is_not_enough() {
        let refused = choose(&archive(&[
            ("linux-image-7.2.12+deb13-amd64", "7.2.12-1"),
            ("linux-headers-7.2.12+deb13-amd64", "7.2.12-1"),
            ("linux-source-7.2", "7.2.11-1"),
        ]));
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("supports Linux 7.2 up to"), "{text}");
        assert!(text.contains("linux-image-7.2.12+deb13-amd64"), "{text}");
    }

    #[test]
    fn unsupported_series_is_refused() {
        let refused = choose(&archive(&[
            ("linux-image-7.4.1+deb13-amd64", "7.4.1-1"),
            ("linux-headers-7.4.1+deb13-amd64", "7.4.1-1"),
            ("linux-source-7.4", "7.4.1-1"),
        ]));
        assert!(refused.is_err());
    }

    #[test]
    fn cloud_and_debug_kernels_are_passed_over() {
        assert_eq!(numbers("7.2.12"), Some((7, 2, 12)));
        assert_eq!(numbers("7.2"), Some((7, 2, 0)));
        assert_eq!(numbers("amd64"), None);
        let refused = choose(&archive(&[
            ("linux-image-7.2.12+deb13-cloud-amd64", "7.2.12-1"),
            ("linux-headers-7.2.12+deb13-cloud-amd64", "7.2.12-1"),
            ("linux-source-7.2", "7.2.12-1"),
        ]));
        assert!(refused.is_err());
    }
}
