//! The demo model inside the binary, put into a folder so that workers can map it.
//!
//! The folder is in the user's cache and named by the content, so a second start finds it and a new
//! version gets another. Weights are packed in the repository and in the binary, by a fifth. Whoever writes
//! holds a lock of the cache, so what lies half-written while nobody does is of a start that was killed, and
//! goes. Invariant: a folder under its final name is complete.

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
/// How names of folders that are being written begin.
const DRAFT: &str = "draft-bundled-";

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
    folder_at(&cache_folder().join(&name))
}

fn folder_at(target: &Path) -> Result<PathBuf> {
    let cache = target.parent().context("a folder for the bundled model")?;
    if complete(target) {
        // Nobody has to wait for this, and one start at a time is enough.
        if let Ok(folder) = File::open(cache)
            && folder.try_lock().is_ok()
        {
            remove_drafts(cache);
        }
        return Ok(target.to_owned());
    }
    let advice = || {
        let cache = cache.display();
        format!("write the bundled model into {cache}; set XDG_CACHE_HOME to a writable folder")
    };
    std::fs::create_dir_all(cache).with_context(advice)?;
    // A lock ends with its process. Some file systems have none: there, drafts of others stay.
    let folder = File::open(cache).with_context(advice)?;
    if folder.lock().is_ok() {
        if complete(target) {
            return Ok(target.to_owned());
        }
        remove_drafts(cache);
    }
    let draft = tempfile::Builder::new().prefix(DRAFT).tempdir_in(cache);
    let draft = draft.with_context(advice)?;
    for (file, bytes) in FILES {
        unpack(file, bytes, draft.path()).with_context(advice)?;
    }
    // Without a lock another start may have won the race with the same content.
    let draft = draft.keep();
    if let Err(error) = std::fs::rename(&draft, target) {
        let _ = std::fs::remove_dir_all(&draft);
        if !target.exists() {
            return Err(error).with_context(advice);
        }
    }
    ensure!(
        complete(target),
        "{} holds an incomplete copy of the bundled model; remove it and start again",
        target.display()
    );
    Ok(target.to_owned())
}

/// Removes what nobody writes any more; the lock of the cache is held. What cannot be removed stays.
fn remove_drafts(cache: &Path) {
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(DRAFT) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
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

    #[test]
    fn starts_at_once_share_one_folder_and_leave_nothing_else() {
        let cache = tempfile::tempdir().expect("temporary folder");
        let target = cache.path().join("deeper").join("bundled");
        std::thread::scope(|scope| {
            let starts: Vec<_> = (0..3).map(|_| scope.spawn(|| folder_at(&target))).collect();
            for start in starts {
                assert_eq!(start.join().expect("no panic").expect("a folder"), target);
            }
        });
        let names = std::fs::read_dir(cache.path().join("deeper")).expect("a folder");
        assert_eq!(names.count(), 1);
        std::fs::write(target.join("config.json"), "{").expect("cut short");
        let refused = folder_at(&target).expect_err("incomplete").to_string();
        assert!(refused.contains("remove it and start again"), "{refused}");
        let names = std::fs::read_dir(cache.path().join("deeper")).expect("a folder");
        assert_eq!(names.count(), 1);
    }

    #[test]
    fn what_a_killed_start_left_goes_with_the_next_one() {
        let cache = tempfile::tempdir().expect("temporary folder");
        let target = cache.path().join("bundled");
        let leave = || {
            let left = cache.path().join(format!("{DRAFT}killed"));
            std::fs::create_dir(&left).expect("a folder");
            std::fs::write(left.join("config.json"), "{").expect("a file");
        };
        let names = || {
            let entries = std::fs::read_dir(cache.path()).expect("a folder");
            let mut names: Vec<_> =
                entries.map(|entry| entry.expect("an entry").file_name()).collect();
            names.sort();
            names
        };
        for _ in ["to be written", "there already"] {
            leave();
            folder_at(&target).expect("a folder");
            assert_eq!(names(), ["bundled"]);
        }
        // One that somebody writes stays, and nobody who finds the model waits for it.
        leave();
        let writer = File::open(cache.path()).expect("the cache");
        writer.lock().expect("a lock");
        folder_at(&target).expect("a folder");
        assert_eq!(names(), ["bundled", &format!("{DRAFT}killed")]);
    }

    #[test]
    fn a_cache_that_is_there_and_cannot_be_written_is_said_with_what_helps() {
        // Nobody makes folders there, whoever runs this.
        let refused = folder_at(Path::new("/proc/self/bundled")).expect_err("no folder");
        let said = format!("{refused:#}");
        assert!(said.contains("XDG_CACHE_HOME") && said.contains("/proc/self"), "{said}");
    }
}
