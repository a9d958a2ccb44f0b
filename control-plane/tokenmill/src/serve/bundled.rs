//! The demo model inside the binary, put into a folder so that workers can map it.
//!
//! The folder is in the user's cache and named by the content, so a second start finds it and a new
//! version gets another. Weights are packed in the repository and in the binary, by a fifth. Invariant: a
//! folder under its final name is complete.

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Name under which it is served.
pub(crate) const NAME: &str = "tokenmill-demo";

macro_rules! bundled {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../../../recipes/bundled/", $name)) as &[u8])),*]
    };
}

/// The files; what ends in [`PACKED`] is written without it, unpacked.
const FILES: [(&str, &[u8]); 5] = bundled![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.gz"
];
const PACKED: &str = ".gz";

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
        unpack(file, bytes, draft.path())
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
    FILES.iter().all(|&(file, bytes)| {
        let (name, length) = written_as(file, bytes);
        std::fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == length)
    })
}

/// Name and length of a file once it is written.
fn written_as<'a>(file: &'a str, bytes: &[u8]) -> (&'a str, u64) {
    match (file.strip_suffix(PACKED), bytes.last_chunk()) {
        // The format ends with the length of what was packed.
        (Some(name), Some(length)) => (name, u32::from_le_bytes(*length).into()),
        _ => (file, bytes.len() as u64),
    }
}

fn unpack(file: &str, mut bytes: &[u8], into: &Path) -> std::io::Result<()> {
    let (name, _) = written_as(file, bytes);
    let mut written = File::create(into.join(name))?;
    if name == file {
        std::io::copy(&mut bytes, &mut written)?;
    } else {
        std::io::copy(&mut GzDecoder::new(bytes), &mut written)?;
    }
    Ok(())
}

fn cache_folder() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("tokenmill")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_written_whole_under_its_own_name() {
        let folder = tempfile::tempdir().expect("temporary folder");
        for (file, bytes) in FILES {
            assert!(!complete(folder.path()), "without {file}");
            unpack(file, bytes, folder.path()).expect("written");
        }
        assert!(complete(folder.path()));
        let weights = std::fs::read(folder.path().join("model.safetensors")).expect("weights");
        let tensors = safetensors::SafeTensors::deserialize(&weights).expect("a whole file");
        assert_eq!(tensors.len(), 120);
        assert!(weights.len() > FILES[4].1.len());
    }
}
