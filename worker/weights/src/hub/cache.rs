//! The cache's folders, as the hub's own tools lay them out:
//!
//! ```text
//! CACHE/.locks/models--ORG--NAME/BLOB.lock
//! CACHE/models--ORG--NAME/blobs/BLOB                     content, named by its digest
//! CACHE/models--ORG--NAME/blobs/BLOB.incomplete          content still coming
//! CACHE/models--ORG--NAME/snapshots/COMMIT/FILE          link to the blob
//! CACHE/models--ORG--NAME/refs/REVISION                  the commit it was last
//! ```
//!
//! It fetches nothing. Invariant: a blob under its own name is whole.

use super::{HubError, select};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Where the hub's own tools keep models, given a look-up of environment variables.
#[must_use]
pub fn default_cache_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| Some(set("HF_HOME")?.join("hub")))
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(set("HOME")?.join(".cache/huggingface/hub")))
}

/// The cache of one repository. Names that reach it have been checked by `select`.
pub(super) struct Cache {
    repo: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(super) fn new(cache_dir: &Path, repo: &str) -> Self {
        let folder = format!("models--{}", repo.replace('/', "--"));
        Self { locks: cache_dir.join(".locks").join(&folder), repo: cache_dir.join(folder) }
    }

    pub(super) fn blob(&self, id: &str) -> PathBuf {
        self.repo.join("blobs").join(id)
    }

    pub(super) fn incomplete(&self, id: &str) -> PathBuf {
        self.repo.join("blobs").join(format!("{id}.incomplete"))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.join("snapshots").join(commit)
    }

    /// Waits until no other process fetches this blob. Released when the file is dropped.
    pub(super) fn lock(&self, id: &str) -> Result<File, HubError> {
        for folder in [&self.locks, &self.repo.join("blobs")] {
            fs::create_dir_all(folder).map_err(HubError::io(folder))?;
        }
        let path = self.locks.join(format!("{id}.lock"));
        let file = File::create(&path).map_err(HubError::io(&path))?;
        file.lock().map_err(HubError::io(&path))?;
        Ok(file)
    }

    /// Puts a blob into a snapshot under a name.
    pub(super) fn link(&self, commit: &str, name: &str, id: &str) -> Result<(), HubError> {
        let folder = self.snapshot(commit);
        fs::create_dir_all(&folder).map_err(HubError::io(&folder))?;
        let target = Path::new("../../blobs").join(id);
        let link = folder.join(name);
        if fs::read_link(&link).is_ok_and(|current| current == target) {
            return Ok(());
        }
        // A link of another name, then a rename: the name is never without a file in between.
        let fresh = folder.join(format!(".{name}.{id}"));
        let made = match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => symlink(&target, &fresh).and_then(|()| fs::rename(&fresh, &link)),
        };
        made.map_err(HubError::io(&link))
    }

    /// The commit that a revision was when it was last fetched.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if select::is_hash(revision, 40) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.repo.join("refs").join(revision)).ok()?;
        let commit = text.trim();
        select::is_hash(commit, 40).then(|| commit.to_owned())
    }

    pub(super) fn set_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let path = self.repo.join("refs").join(revision);
        let folder = path.parent().unwrap_or(&self.repo);
        fs::create_dir_all(folder).map_err(HubError::io(folder))?;
        fs::write(&path, commit).map_err(HubError::io(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_hubs_tools_look() {
        let dir = |set: &[(&str, &str)]| {
            default_cache_dir(|name| {
                set.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into())
            })
        };
        let home = ("HOME", "/h");
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(dir(&[]), None);
        assert_eq!(dir(&[home]), at("/h/.cache/huggingface/hub"));
        assert_eq!(dir(&[home, ("XDG_CACHE_HOME", "/x")]), at("/x/huggingface/hub"));
        assert_eq!(dir(&[home, ("HF_HOME", "/f"), ("XDG_CACHE_HOME", "/x")]), at("/f/hub"));
        assert_eq!(dir(&[home, ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), at("/c"));
        assert_eq!(dir(&[home, ("HF_HUB_CACHE", "")]), at("/h/.cache/huggingface/hub"));
    }
}
