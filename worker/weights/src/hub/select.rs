//! Which names may be asked for. Whatever becomes part of a path or a URL passes through here.
//!
//! Invariant: a name that passed stays below the folder it is joined to.

use super::HubError;

/// Longest name of a repository that the hub gives out, each half.
const MAX_NAME: usize = 96;
/// Longest revision; git has no limit of its own.
const MAX_REVISION: usize = 256;

/// Files beside the weights that a model is served from.
const COMPANIONS: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Whether a file beside the weights belongs to the model.
pub(super) fn is_companion(name: &str) -> bool {
    COMPANIONS.contains(&name)
}

/// Holds a repository's name to `ORG/NAME`.
pub(super) fn check_repo(repo: &str) -> Result<(), HubError> {
    let good = |half: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        half.len() <= MAX_NAME
            && edge(half.chars().next())
            && edge(half.chars().next_back())
            && !half.contains("..")
            && !half.contains("--")
            && half.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    match repo.split_once('/') {
        Some((org, name)) if good(org) && good(name) => Ok(()),
        _ => Err(HubError::BadRepo { repo: repo.to_owned() }),
    }
}

/// Holds a revision to what git allows in a ref, less what could leave a folder.
pub(super) fn check_revision(revision: &str) -> Result<(), HubError> {
    let good = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && !part.contains("..")
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+@".contains(c))
    };
    if revision.len() <= MAX_REVISION && revision.split('/').all(good) {
        Ok(())
    } else {
        Err(HubError::BadRevision { revision: revision.to_owned() })
    }
}

/// Whether text is a digest of that many hexadecimal digits, in the hub's lower case.
pub(super) fn is_hash(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether a listed name stays in the repository. Names with folders do; they are just not wanted.
pub(super) fn stays_inside(name: &str) -> bool {
    !name.contains(|c: char| c == '\\' || c.is_control())
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Percent-encodes what may not stand in one segment of a URL's path (RFC 3986, section 3.3).
pub(super) fn encode(text: &str) -> String {
    use std::fmt::Write;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_two_plain_names() {
        for good in ["Qwen/Qwen3-0.6B", "a/b", "deepseek-ai/DeepSeek-V2-Lite", "_x/y_"] {
            assert!(check_repo(good).is_ok(), "{good}");
        }
        let long = format!("a/{}", "b".repeat(97));
        for bad in [
            "", "a", "/", "a/", "/b", "a/b/c", "../b", "a/..", "a/.b", "a/b--c", "a/b c", "a\\b/c",
            "a/b?x", "a/b#x", "a/b%2f", "a/-b", "\u{e9}/b", &long,
        ] {
            assert!(check_repo(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn revisions_stay_below_refs() {
        for good in ["main", "v1.0", "refs/pr/3", &"a".repeat(40)] {
            assert!(check_revision(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "a//b", "../x", "a/../b", "a..b", ".git", "a b", "a?b", "a\0", "/abs"]
        {
            assert!(check_revision(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn listed_names_stay_inside() {
        for good in ["config.json", "a/b.json", "..x", "x..y"] {
            assert!(stays_inside(good), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a\\..\\b", "a\nb"] {
            assert!(!stays_inside(bad), "{bad:?}");
        }
        assert_eq!(encode("a b/\u{e9}~-_.%"), "a%20b%2F%C3%A9~-_.%25");
    }
}
