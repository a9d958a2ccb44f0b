//! What the word after `serve` means: nothing (the bundled model), a folder, a recipe, or a
//! repository on the hub, in that order of trial.
//!
//! It only decides; it neither reads weights nor downloads. Invariant: a word that could mean two
//! things is never guessed at: an existing path wins, then a built-in recipe's name.

use anyhow::{Result, bail, ensure};
use std::path::{Path, PathBuf};

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The demo model inside the binary.
    Bundled,
    /// A checkpoint folder.
    Folder(PathBuf),
    /// A recipe: a file, or one built in by name.
    Recipe(String),
    /// ORG/NAME on the hub.
    Hub(String),
}

/// Decides what `word` means. `is_recipe` knows the built-in names.
///
/// # Errors
/// When it is a file that is no recipe, or nothing that can be served.
pub(crate) fn resolve(word: Option<&str>, is_recipe: impl Fn(&str) -> bool) -> Result<Source> {
    let Some(word) = word else { return Ok(Source::Bundled) };
    let path = Path::new(word);
    if path.is_dir() {
        ensure!(
            path.join("config.json").is_file(),
            "{word} is a folder without a config.json; give the folder of a checkpoint"
        );
        return Ok(Source::Folder(path.to_owned()));
    }
    if path.is_file() {
        ensure!(
            path.extension().is_some_and(|e| e == "toml"),
            "{word} is a file but no recipe (.toml); give a checkpoint's folder"
        );
        return Ok(Source::Recipe(word.to_owned()));
    }
    if is_recipe(word) {
        return Ok(Source::Recipe(word.to_owned()));
    }
    if is_repository(word) {
        return Ok(Source::Hub(word.to_owned()));
    }
    bail!(
        "{word} is no folder, no recipe and no ORG/NAME; `tokenmill recipe list` names the recipes"
    )
}

/// ORG/NAME: two plain parts, nothing that walks a file system.
fn is_repository(word: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    matches!(word.split_once('/'), Some((org, name)) if plain(org) && plain(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_means_one_thing() {
        let dir = tempfile::tempdir().expect("temporary folder");
        std::fs::write(dir.path().join("config.json"), "{}").expect("write");
        let recipe = dir.path().join("mine.toml");
        std::fs::write(&recipe, "").expect("write");
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let known = |name: &str| name == "qwen3-0.6b-cpu";

        assert_eq!(resolve(None, known).ok(), Some(Source::Bundled));
        let folder = text(dir.path());
        assert_eq!(resolve(Some(&folder), known).ok(), Some(Source::Folder(dir.path().into())));
        let file = text(&recipe);
        assert_eq!(resolve(Some(&file), known).ok(), Some(Source::Recipe(file.clone())));
        let named = resolve(Some("qwen3-0.6b-cpu"), known).ok();
        assert_eq!(named, Some(Source::Recipe("qwen3-0.6b-cpu".into())));
        let hub = resolve(Some("Qwen/Qwen3-0.6B"), known).ok();
        assert_eq!(hub, Some(Source::Hub("Qwen/Qwen3-0.6B".into())));
        for nonsense in ["nothing", "a/b/c", "../x", "a/..", "/no/such/folder", ""] {
            assert!(resolve(Some(nonsense), known).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_folder_without_a_config_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let error = resolve(Some(&dir.path().to_string_lossy()), |_| false).expect_err("refused");
        assert!(error.to_string().contains("config.json"));
    }
}
