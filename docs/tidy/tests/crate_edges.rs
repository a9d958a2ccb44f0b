//! Who may import whom is a table in docs/architecture.md; the manifests say the same.

mod common;

use cargo_metadata::{DependencyKind, Metadata};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Crates that decide and never act: nothing below them may reach a runtime or an I/O stack.
const PURE: [&str; 6] = ["ids", "step", "kv-cache", "scheduler", "model", "sim"];
/// What a pure crate must not reach, directly or through others.
const IMPURE: [&str; 5] = ["tokio", "tonic", "axum", "hyper", "cudarc"];

/// The rows `| crate | imports |` of the table under "Who may import whom".
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let page = common::read("docs/architecture.md");
    let table = page
        .split("## Who may import whom")
        .nth(1)
        .expect("docs/architecture.md has the section \"Who may import whom\"");
    let names = |cell: &str| -> BTreeSet<String> {
        cell.split(',')
            .map(|name| name.trim().trim_matches('`').to_owned())
            .filter(|name| !name.is_empty() && name != "nothing")
            .collect()
    };
    table
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| {
            let mut cells = line.trim_matches('|').split('|');
            let crate_name = cells.next().expect("a crate").trim().trim_matches('`').to_owned();
            (crate_name, names(cells.next().expect("its imports")))
        })
        .collect()
}

fn actual(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let members: BTreeSet<String> =
        metadata.workspace_packages().iter().map(|p| p.name.to_string()).collect();
    metadata
        .workspace_packages()
        .iter()
        .map(|package| {
            let edges = package
                .dependencies
                .iter()
                .filter(|d| d.kind == DependencyKind::Normal && members.contains(d.name.as_str()))
                .map(|d| d.name.clone())
                .collect();
            (package.name.to_string(), edges)
        })
        .collect()
}

#[test]
fn the_table_and_the_manifests_agree() {
    assert_eq!(documented(), actual(&common::metadata()));
}

/// Pure crates are built without a runtime; what others ask of a crate they share is no matter.
#[test]
fn pure_crates_reach_no_runtime() {
    for package in PURE {
        let mut tree = Command::new(env!("CARGO"));
        tree.current_dir(common::root());
        tree.args([
            "tree",
            "--locked",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--package",
            package,
        ]);
        let tree = tree.output().expect("cargo runs");
        assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
        let tree = String::from_utf8(tree.stdout).expect("UTF-8");
        let reached: BTreeSet<&str> =
            tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert!(reached.contains(package), "{package}: {tree}");
        for name in IMPURE {
            assert!(!reached.contains(name), "{package} reaches {name}");
        }
    }
}
