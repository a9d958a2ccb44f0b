//! Dependency policy: licences from a list, no banned crate, duplicates only with a reason.

mod common;

use std::collections::{BTreeMap, BTreeSet};

/// Licences that ask no more than attribution.
const LICENCES: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates we do not want in the binary, and why.
const BANNED: [(&str, &str); 4] = [
    ("openssl-sys", "links a system library: the binary needs libc, libm and libgcc only"),
    ("native-tls", "pulls openssl"),
    ("async-std", "one runtime is enough"),
    ("lazy_static", "std::sync::OnceLock does this"),
];

/// Banned crates that a dependency brings in all the same, each with its reason.
const TOLERATED: [(&str, &str); 1] = [("lazy_static", "prometheus, sharded-slab")];

#[test]
fn every_licence_is_allowed() {
    let metadata = common::metadata();
    let mut refused = Vec::new();
    for package in &metadata.packages {
        let Some(expression) = &package.license else {
            refused.push(format!("{} states no licence", package.name));
            continue;
        };
        let allowed = spdx::Expression::parse_mode(expression, spdx::ParseMode::LAX)
            .unwrap_or_else(|error| panic!("{}: {expression}: {error}", package.name))
            .evaluate(|requirement| {
                requirement.license.id().is_some_and(|id| LICENCES.contains(&id.name))
            });
        if !allowed {
            refused.push(format!("{}: {expression}", package.name));
        }
    }
    assert!(refused.is_empty(), "licences outside of the list: {refused:#?}");
}

#[test]
fn no_banned_crate() {
    let metadata = common::metadata();
    for package in &metadata.packages {
        let tolerated = TOLERATED.iter().any(|(name, _)| *name == package.name.as_str());
        if let Some((name, why)) = BANNED.iter().find(|(name, _)| *name == package.name.as_str())
            && !tolerated
        {
            panic!("{name} is banned: {why}");
        }
    }
}

/// A second version of a crate costs build time and bytes; each is listed with who brings it in
/// docs/decisions/0002-dependencies.md, and a listed one that is gone is taken off.
#[test]
fn duplicates_are_the_listed_ones() {
    let metadata = common::metadata();
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in &metadata.packages {
        versions.entry(package.name.as_str()).or_default().insert(package.version.to_string());
    }
    // Windows shims never reach a Linux build.
    let found: BTreeSet<&str> = versions
        .iter()
        .filter(|(name, all)| all.len() > 1 && !name.starts_with("windows"))
        .map(|(name, _)| *name)
        .collect();
    let page = common::read("docs/decisions/0002-dependencies.md");
    let listed: BTreeSet<&str> = page
        .split("## Duplicates")
        .nth(1)
        .expect("the page has a section Duplicates")
        .lines()
        .filter_map(|line| line.strip_prefix("- `")?.split('`').next())
        .collect();
    assert_eq!(found, listed, "left: in the lock file, right: on the page");
}
