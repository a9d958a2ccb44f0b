//! Fetching a model from a hub that speaks the Hugging Face protocol.
//!
//! **One commit.** The revision is resolved to a commit once, by the call that lists the files; every
//! file is then asked for by that commit. A branch that moves meanwhile, or a cache that holds parts
//! of another commit, cannot mix into what is returned.
//!
//! **Data only.** Configuration, tokenizer, chat template and safetensors are fetched. Nothing that
//! could carry code (`.py`, `.bin`, `.pt`) is ever asked for.
//!
//! **One cache.** Files lie where the hub's own tools put theirs (`models--ORG--NAME/{blobs,
//! snapshots,refs}`), under the same locks, so that a model fetched by either is there for both.
//!
//! The protocol is two calls, a listing and a ranged GET, made here with `ureq`. The `hf-hub` crate
//! would bring a second HTTP stack, QUIC and a chunk store along, some 200 crates, for them.
//!
//! Calls block: run them where blocking is allowed. Invariant: a returned snapshot holds every file
//! that the commit lists for it, each of the size, and where the hub states one of the SHA-256, that
//! the commit gives.

mod cache;
mod client;
mod download;
mod error;
mod select;

pub use cache::default_cache_dir;
pub use error::HubError;

use crate::checkpoint::{Checkpoint, INDEX_FILE};
use crate::header::Index;
use crate::parallel;
use crate::progress::{Progress, Stage, Tally};
use cache::Cache;
use client::{Client, Listing, RemoteFile};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// The hub asked unless another is named (`HF_ENDPOINT`).
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// The revision asked for unless another is named.
pub const DEFAULT_REVISION: &str = "main";
/// Files fetched at the same time. One stream rarely fills a data-centre link.
const CONNECTIONS: usize = 4;

/// An access token, kept out of logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Takes the token, without the line end that files of tokens have.
    #[must_use]
    pub fn new(token: &str) -> Self {
        Self(token.trim().to_owned())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// What to fetch, from where, and where to keep it.
#[derive(Clone, Debug)]
pub struct Request {
    /// `ORG/NAME`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// The hub, without a slash at its end.
    pub endpoint: String,
    /// The folder that holds `models--*`; see [`default_cache_dir`].
    pub cache_dir: PathBuf,
    /// For models that are gated or private (`HF_TOKEN`).
    pub token: Option<Token>,
    /// Wait before a broken transfer is taken up again; doubled for each break without a byte won.
    pub retry_pause: Duration,
}

impl Request {
    /// The newest version of a model on the default hub.
    #[must_use]
    pub fn new(repo: &str, cache_dir: PathBuf) -> Self {
        Self {
            repo: repo.to_owned(),
            revision: DEFAULT_REVISION.to_owned(),
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            cache_dir,
            token: None,
            retry_pause: Duration::from_secs(1),
        }
    }
}

/// Where a snapshot's word comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The hub listed this commit just now.
    Hub,
    /// The commit was asked for by its hash, and the cache holds it.
    Pinned,
    /// The hub could not be reached; the revision is what it was when last fetched. Say so.
    CacheOnly,
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Folder with config, tokenizer and weights, all of one commit.
    pub dir: PathBuf,
    /// The commit, 40 hexadecimal digits.
    pub commit: String,
    /// Where the commit was learned.
    pub origin: Origin,
}

/// Makes sure that a model is on this machine, fetching what is missing of it.
///
/// # Errors
/// See [`HubError`]. Files that are complete stay in the cache, and a broken one is taken up where it
/// broke by the next call.
pub fn fetch(request: &Request, progress: &dyn Progress) -> Result<Snapshot, HubError> {
    select::check_repo(&request.repo)?;
    select::check_revision(&request.revision)?;
    let cache = Cache::new(&request.cache_dir, &request.repo);
    let pinned = select::is_hash(&request.revision, 40);
    if pinned && let Some(dir) = complete(&cache, &request.revision) {
        return Ok(Snapshot { dir, commit: request.revision.clone(), origin: Origin::Pinned });
    }
    let client = Client::new(request);
    let listing = match client.list() {
        Ok(listing) => listing,
        Err(error @ HubError::Offline { .. }) => {
            let known = cache.commit_of(&request.revision);
            return match known.and_then(|commit| Some((complete(&cache, &commit)?, commit))) {
                Some((dir, commit)) => Ok(Snapshot { dir, commit, origin: Origin::CacheOnly }),
                None => Err(error),
            };
        }
        Err(error) => return Err(error),
    };
    if pinned && listing.commit != request.revision {
        return Err(HubError::OtherCommit {
            asked: request.revision.clone(),
            given: listing.commit,
        });
    }
    let files = wanted_files(request, &cache, &client, &listing)?;
    let tally = Tally::new(progress, Stage::Download, files.iter().map(|file| file.size).sum());
    parallel::for_each(CONNECTIONS, files.iter().copied(), |file| {
        download::into_snapshot(&client, &cache, &listing.commit, file, &|n| tally.add(n))
    })?;
    if !pinned {
        // Written last: a ref leads to a whole snapshot.
        cache.set_ref(&request.revision, &listing.commit)?;
    }
    let dir = cache.snapshot(&listing.commit);
    Ok(Snapshot { dir, commit: listing.commit, origin: Origin::Hub })
}

/// The files of a listing that make a model, small ones first.
fn wanted_files<'a>(
    request: &Request,
    cache: &Cache,
    client: &Client<'_>,
    listing: &'a Listing,
) -> Result<Vec<&'a RemoteFile>, HubError> {
    let by_name = |name: &str| listing.files.iter().find(|file| file.name == name);
    if by_name("config.json").is_none() {
        return Err(HubError::NoConfig { repo: request.repo.clone() });
    }
    let mut files: Vec<&RemoteFile> =
        listing.files.iter().filter(|file| select::is_companion(&file.name)).collect();
    let index = match by_name(INDEX_FILE) {
        Some(file) => {
            // Its content says which of the other files are wanted, so it comes ahead of them.
            download::into_snapshot(client, cache, &listing.commit, file, &|_| {})?;
            files.push(file);
            let path = cache.snapshot(&listing.commit).join(INDEX_FILE);
            let text = fs::read(&path).map_err(HubError::io(&path))?;
            let index = Index::parse(&text)
                .map_err(|defect| HubError::BadIndex { repo: request.repo.clone(), defect })?;
            Some(index)
        }
        None => None,
    };
    let shards = index.as_ref().map_or_else(
        || vec![crate::checkpoint::SINGLE_FILE],
        |index| index.files().into_iter().collect(),
    );
    for name in shards {
        files.push(by_name(name).ok_or_else(|| HubError::NoWeights {
            repo: request.repo.clone(),
            file: name.to_owned(),
        })?);
    }
    Ok(files)
}

/// The folder of a commit in the cache, if all that is needed to serve it is there.
fn complete(cache: &Cache, commit: &str) -> Option<PathBuf> {
    let dir = cache.snapshot(commit);
    (dir.join("config.json").is_file() && Checkpoint::open(&dir).is_ok()).then_some(dir)
}
