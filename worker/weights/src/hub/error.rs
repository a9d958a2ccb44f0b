//! Why a model cannot be fetched, and what to do about it.

use crate::error::Defect;
use std::io;
use std::path::{Path, PathBuf};

/// A model that could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No name of a repository.
    #[error(
        "{repo:?} is not the name of a model on a hub; write ORG/NAME, or the path of a folder"
    )]
    BadRepo {
        /// What was given.
        repo: String,
    },
    /// No name of a revision.
    #[error("{revision:?} is not a branch, tag or commit")]
    BadRevision {
        /// What was given.
        revision: String,
    },
    /// The hub wants to know who asks.
    #[error(
        "{endpoint} does not give out {repo} to {}: it is gated, private or does not exist{}; {}",
        if *with_token { "the holder of this token" } else { "everybody" },
        hub_says(message),
        if *with_token {
            "ask for access on the model's page, or set HF_TOKEN to a token that has it"
        } else {
            "set HF_TOKEN to a token that has access, or check the name"
        }
    )]
    Denied {
        /// The hub.
        endpoint: String,
        /// The model.
        repo: String,
        /// Whether a token was sent.
        with_token: bool,
        /// The hub's own words, empty where it has none.
        message: String,
    },
    /// No such model or revision.
    #[error("{endpoint} has no model {repo} at revision {revision}{}", hub_says(message))]
    NotFound {
        /// The hub.
        endpoint: String,
        /// The model.
        repo: String,
        /// The revision.
        revision: String,
        /// The hub's own words, empty where it has none.
        message: String,
    },
    /// The hub cannot be reached, and the cache does not hold the model.
    #[error(
        "{endpoint} cannot be reached and {repo} is not in the cache {cache_dir}; connect this \
         machine, set HF_ENDPOINT to a mirror, or name a folder that holds the model"
    )]
    Offline {
        /// The hub.
        endpoint: String,
        /// The model.
        repo: String,
        /// Where it would lie.
        cache_dir: PathBuf,
        /// What went wrong.
        source: Box<ureq::Error>,
    },
    /// An answer that is neither the file nor a refusal known here.
    #[error("{url}: the hub answers {status}{}; try again later", hub_says(message))]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
        /// The hub's own words, empty where it has none.
        message: String,
    },
    /// A listing that is not what the protocol says.
    #[error("{url}: not a listing of a model's files: {reason}; is this a hub?")]
    BadListing {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A listed name that would leave the snapshot's folder.
    #[error("{repo} lists a file {name:?}, which leaves the model's folder; do not use this model")]
    UnsafeName {
        /// The model.
        repo: String,
        /// The name.
        name: String,
    },
    /// A commit was asked for by its hash and another was given.
    #[error("commit {asked} was asked for, and the hub gave {given}")]
    OtherCommit {
        /// The hash asked for.
        asked: String,
        /// The hash given.
        given: String,
    },
    /// No `config.json`.
    #[error("{repo} has no config.json; it is not a model in the transformers layout")]
    NoConfig {
        /// The model.
        repo: String,
    },
    /// No safetensors.
    #[error(
        "{repo} has no {file}; only safetensors are read (.bin and .pt files can carry code): look \
         for a conversion of this model"
    )]
    NoWeights {
        /// The model.
        repo: String,
        /// The file missing.
        file: String,
    },
    /// An index that cannot be followed.
    #[error("{repo}: model.safetensors.index.json: {defect}")]
    BadIndex {
        /// The model.
        repo: String,
        /// What is wrong with it.
        defect: Defect,
    },
    /// A transfer that broke and could not be taken up.
    #[error(
        "{file}: the transfer broke at byte {done} of {size}; what has come is kept, and the same \
         command goes on from there"
    )]
    Broken {
        /// The file.
        file: String,
        /// Bytes on the disk.
        done: u64,
        /// Bytes listed.
        size: u64,
        /// What went wrong.
        source: Box<ureq::Error>,
    },
    /// More or fewer bytes than listed.
    #[error("{file}: the hub lists {listed} bytes and sends {sent}; try again, or tell the hub")]
    Size {
        /// The file.
        file: String,
        /// Bytes listed.
        listed: u64,
        /// Bytes sent.
        sent: u64,
    },
    /// Other bytes than listed.
    #[error(
        "{file}: its SHA-256 is {sent}, but the hub lists {listed}; the file was damaged on its way \
         and has been removed: try again"
    )]
    Digest {
        /// The file.
        file: String,
        /// Digest listed.
        listed: String,
        /// Digest of what came.
        sent: String,
    },
    /// The cache cannot be used.
    #[error("{path}: the cache cannot be used; name another folder (HF_HUB_CACHE) or free space")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl HubError {
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + use<'_> {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

fn hub_says(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (the hub says: {message})") }
}
