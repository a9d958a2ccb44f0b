//! What the checks share: where the repository is and what cargo says of it.

use cargo_metadata::{Metadata, MetadataCommand};
use std::fs;
use std::path::{Path, PathBuf};

/// What is shipped.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("docs/tidy lies two deep")
}

/// The resolved graph, as locked, of the one target that is shipped.
#[allow(dead_code, reason = "each test file uses its part of this module")]
pub(crate) fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .other_options(vec!["--locked".into(), "--filter-platform".into(), TARGET.into()])
        .exec()
        .expect("cargo metadata")
}

/// A file of the repository.
#[allow(dead_code, reason = "each test file uses its part of this module")]
pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Rust source of the repository, by path from the root, build output excepted.
#[allow(dead_code, reason = "each test file uses its part of this module")]
pub(crate) fn rust_sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).expect("readable folder") {
            let path = entry.expect("readable entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "node_modules" {
                    walk(&path, root, found);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(root).expect("below the root");
                let text = fs::read_to_string(&path).expect("UTF-8 source");
                found.push((relative.to_string_lossy().into_owned(), text));
            }
        }
    }
    let root = root();
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    found.sort();
    assert!(found.len() > 20, "the walk found only {} files", found.len());
    found
}
