//! The two calls of the hub's protocol: the listing of a revision, and a file from some byte on.
//!
//! It writes no file. Invariant: the token goes to the hub's own host only; transfers that the hub
//! sends elsewhere carry their own authorisation in the address.

use super::{HubError, Request, select};
use serde::Deserialize;
use std::io::Read;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest silence of the other side.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest listing that is read, in bytes: a hundred thousand files.
const MAX_LISTING: u64 = 64 << 20;
/// Longest message of the hub that is passed on, in characters.
const MAX_MESSAGE: usize = 300;

/// A hub, as one request sees it.
pub(super) struct Client<'a> {
    agent: Agent,
    request: &'a Request,
}

/// A revision, resolved.
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

/// A file of a commit.
#[derive(Debug)]
pub(super) struct RemoteFile {
    pub name: String,
    pub size: u64,
    /// Name of its content: the SHA-256 of large files, git's digest of small ones.
    pub blob: String,
    /// SHA-256 of the content, where the hub states it.
    pub sha256: Option<String>,
}

#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl<'a> Client<'a> {
    pub(super) fn new(request: &'a Request) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(request.endpoint.starts_with("https://"))
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .user_agent(concat!("tokenmill/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.new_agent(), request }
    }

    /// Resolves the revision and lists its files with sizes and digests.
    pub(super) fn list(&self) -> Result<Listing, HubError> {
        let Request { endpoint, repo, revision, .. } = self.request;
        let revision = select::encode(revision);
        let url = format!("{endpoint}/api/models/{repo}/revision/{revision}?blobs=true");
        let offline = |source| HubError::Offline {
            endpoint: endpoint.clone(),
            repo: repo.clone(),
            cache_dir: self.request.cache_dir.clone(),
            source: Box::new(source),
        };
        let response = self.get(&url, 0).map_err(offline)?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(&url, response));
        }
        let bad = |reason: String| HubError::BadListing { url: url.clone(), reason };
        let mut text = Vec::new();
        let body = response.into_body().into_reader();
        body.take(MAX_LISTING).read_to_end(&mut text).map_err(|e| offline(ureq::Error::Io(e)))?;
        let info: ModelInfo = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if !select::is_hash(&info.sha, 40) {
            return Err(bad(format!("its commit is {:?}", info.sha)));
        }
        let mut files = Vec::new();
        for sibling in info.siblings {
            if !select::stays_inside(&sibling.rfilename) {
                return Err(HubError::UnsafeName { repo: repo.clone(), name: sibling.rfilename });
            }
            let name = sibling.rfilename.clone();
            let file = sibling.resolve();
            files.push(file.ok_or_else(|| bad(format!("{name:?} has no size or no digest")))?);
        }
        Ok(Listing { commit: info.sha, files })
    }

    /// Asks for a file of a commit from byte `from` on. The answer is a success, or an answer to the
    /// range; everything else is a refusal.
    pub(super) fn file(
        &self,
        commit: &str,
        name: &str,
        from: u64,
    ) -> Result<Result<Response<Body>, ureq::Error>, HubError> {
        let Request { endpoint, repo, .. } = self.request;
        let url = format!("{endpoint}/{repo}/resolve/{commit}/{}", select::encode(name));
        match self.get(&url, from) {
            Ok(response) => match response.status() {
                StatusCode::OK
                | StatusCode::PARTIAL_CONTENT
                | StatusCode::RANGE_NOT_SATISFIABLE => Ok(Ok(response)),
                // Overload and a hub that restarts pass; the caller tries again.
                status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                    Ok(Err(ureq::Error::StatusCode(status.as_u16())))
                }
                _ => Err(self.refusal(&url, response)),
            },
            Err(error) => Ok(Err(error)),
        }
    }

    pub(super) fn retry_pause(&self) -> Duration {
        self.request.retry_pause
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, ureq::Error> {
        let mut call = self.agent.get(url);
        if let Some(token) = &self.request.token {
            call = call.header("authorization", format!("Bearer {}", token.0));
        }
        if from > 0 {
            call = call.header("range", format!("bytes={from}-"));
        }
        call.call()
    }

    fn refusal(&self, url: &str, response: Response<Body>) -> HubError {
        let Request { endpoint, repo, revision, token, .. } = self.request;
        let message = response.headers().get("x-error-message");
        let message = message.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let message = message.chars().take(MAX_MESSAGE).collect();
        let (endpoint, repo) = (endpoint.clone(), repo.clone());
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                HubError::Denied { endpoint, repo, with_token: token.is_some(), message }
            }
            StatusCode::NOT_FOUND => {
                HubError::NotFound { endpoint, repo, revision: revision.clone(), message }
            }
            status => HubError::Status { url: url.to_owned(), status: status.as_u16(), message },
        }
    }
}

impl Sibling {
    /// None where size or digest are not stated, or the digest is none.
    fn resolve(self) -> Option<RemoteFile> {
        let (size, blob, sha256) = match self.lfs {
            Some(lfs) => {
                let digest = select::is_hash(&lfs.sha256, 64).then_some(lfs.sha256)?;
                (lfs.size, digest.clone(), Some(digest))
            }
            None => (self.size?, self.blob_id.filter(|id| select::is_hash(id, 40))?, None),
        };
        Some(RemoteFile { name: self.rfilename, size, blob, sha256 })
    }
}
