//! The demo model inside the binary, put into a folder so that workers can map it.
//!
//! The folder is in the user's cache and named by the content, so a second start finds it and a new
//! version gets another. Invariant: a folder under its final name is complete.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// Name under which it is served.
pub(crate) const NAME: &str = "tokenmill-demo";

macro_rules! bundled {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../../../recipes/bundled/", $name)) as &[u8])),*]
    };
}

/// The files.
const FILES: [(&str, &[u8]); 5] = bundled![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors"
];

/// The folder with the model's files, written now if it is not there yet.
///
/// # Errors
/// When no cache folder can be written.
pub(crate) fn folder() -> Result<PathBuf> {
    let mut digest = blake3::Hasher::new();
    for (name, bytes) in FILES {
        digest.update(name.as_bytes()).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
    let name = format!("bundled-{}", &digest.finalize().to_hex()[..16]);
    let cache = cache_folder();
    let target = cache.join(&name);
    if complete(&target) {
        return Ok(target);
    }
    std::fs::create_dir_all(&cache).with_context(|| {
        format!("create {}; set XDG_CACHE_HOME to a writable folder", cache.display())
    })?;
    let draft = tempfile::Builder::new().prefix("bundled-").tempdir_in(&cache)?;
    for (file, bytes) in FILES {
        std::fs::write(draft.path().join(file), bytes)
            .with_context(|| format!("write {file} into {}", draft.path().display()))?;
    }
    // Another start may have won the race with the same content.
    let draft = draft.keep();
    if std::fs::rename(&draft, &target).is_err() {
        let _ = std::fs::remove_dir_all(&draft);
    }
    ensure!(
        complete(&target),
        "{} holds an incomplete copy of the bundled model; remove it and start again",
        target.display()
    );
    Ok(target)
}

fn complete(folder: &Path) -> bool {
    FILES.iter().all(|(name, bytes)| {
        std::fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == bytes.len() as u64)
    })
}

fn cache_folder() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("tokenmill")
}
