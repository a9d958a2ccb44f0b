//! A hub on the loopback interface: the listing and the ranged GET of the protocol, with faults.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

pub(crate) const REPO: &str = "acme/tiny-model";

/// One file of a commit.
#[derive(Clone)]
pub(crate) struct Blob {
    pub content: Vec<u8>,
    /// Whether it is listed with a SHA-256.
    pub large: bool,
    /// Size listed instead of the true one.
    pub listed_size: Option<u64>,
    /// Digest listed instead of the true one.
    pub listed_sha256: Option<String>,
}

impl Blob {
    pub(crate) fn small(content: &str) -> Self {
        Self { content: content.into(), large: false, listed_size: None, listed_sha256: None }
    }

    pub(crate) fn large(content: Vec<u8>) -> Self {
        Self { content, large: true, listed_size: None, listed_sha256: None }
    }

    pub(crate) fn sha256(&self) -> String {
        Sha256::digest(&self.content).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// One request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    pub host: String,
}

#[derive(Default)]
pub(crate) struct State {
    /// Files by commit and name.
    pub commits: BTreeMap<String, BTreeMap<String, Blob>>,
    /// Commit by branch.
    pub branches: BTreeMap<String, String>,
    /// Token without which nothing is given out.
    pub gate: Option<String>,
    /// Cuts this file's answers after so many bytes each, so many times.
    pub cut: Option<(String, usize, u32)>,
    /// Answers requests whose path holds this with a status, so many times.
    pub failing: Option<(&'static str, u16, u32)>,
    /// Ignores ranges, as simple servers do.
    pub no_ranges: bool,
    /// Sends the files' bytes from another host.
    pub elsewhere: Option<String>,
    /// Moves `main` to this commit as soon as it was listed once.
    pub moves_to: Option<String>,
    pub seen: Vec<Seen>,
}

/// The server; it ends with the test's process.
pub(crate) struct Hub {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Hub {
    pub(crate) fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                // A client that goes away in the middle is what some tests are about.
                thread::spawn(move || stream.and_then(|stream| answer(&stream, &shared)));
            }
        });
        Self { address, state }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn answer(mut stream: &TcpStream, shared: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let header = |name: &str| headers.get(name).cloned();
    let mut state = shared.lock().unwrap();
    let token = header("authorization");
    state.seen.push(Seen {
        path: path.clone(),
        range: header("range"),
        token: token.clone(),
        host: header("host").unwrap_or_default(),
    });
    if let Some((part, status, times)) = &mut state.failing
        && *times > 0
        && path.contains(*part)
    {
        *times -= 1;
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        return stream.write_all(head.as_bytes());
    }
    let mut error = |status: u16, message: &str| {
        let head = format!(
            "HTTP/1.1 {status} X\r\nx-error-message: {message}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes())
    };
    let allowed = state.gate.as_ref().is_none_or(|gate| token == Some(format!("Bearer {gate}")));
    if !path.starts_with("/cdn/") && !allowed {
        return error(401, "Access to this model is restricted");
    }
    if let Some(rest) = path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        let revision = rest.split('?').next().unwrap_or_default().replace("%2F", "/");
        let commit = state.branches.get(&revision).cloned().unwrap_or(revision);
        let Some(files) = state.commits.get(&commit) else {
            return error(404, "Invalid rev id");
        };
        let body = listing(&commit, files);
        if let Some(next) = state.moves_to.take() {
            state.branches.insert("main".into(), next);
        }
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        return stream.write_all((head + &body).as_bytes());
    }
    let rest = path.strip_prefix("/cdn").unwrap_or(&path);
    let place = rest.strip_prefix(&format!("/{REPO}/resolve/")).and_then(|r| r.split_once('/'));
    let Some(blob) = place.and_then(|(commit, name)| state.commits.get(commit)?.get(name)) else {
        return error(404, "Repository not found");
    };
    if let Some(host) = &state.elsewhere
        && !path.starts_with("/cdn/")
    {
        let head = format!(
            "HTTP/1.1 302 X\r\nlocation: {host}/cdn{path}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        return stream.write_all(head.as_bytes());
    }
    let whole = blob.content.clone();
    let from = header("range").filter(|_| !state.no_ranges);
    let from =
        from.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let head = match from {
        Some(from) if from >= whole.len() => return error(416, "range"),
        Some(from) => format!(
            "HTTP/1.1 206 X\r\ncontent-range: bytes {from}-{}/{}\r\ncontent-length: {}\r\n",
            whole.len() - 1,
            whole.len(),
            whole.len() - from
        ),
        None => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", whole.len()),
    };
    let mut body = &whole[from.unwrap_or(0)..];
    if let Some((name, bytes, times)) = &mut state.cut
        && path.ends_with(name.as_str())
        && *times > 0
    {
        *times -= 1;
        body = &body[..body.len().min(*bytes)];
    }
    drop(state);
    stream.write_all(format!("{head}connection: close\r\n\r\n").as_bytes())?;
    stream.write_all(body)
}

fn listing(commit: &str, files: &BTreeMap<String, Blob>) -> String {
    let siblings: Vec<serde_json::Value> = files
        .iter()
        .map(|(name, blob)| {
            let size = blob.listed_size.unwrap_or(blob.content.len() as u64);
            let sha256 = blob.listed_sha256.clone().unwrap_or_else(|| blob.sha256());
            // Stands in for git's digest, which is as unique.
            let id = &sha256[..40];
            if blob.large {
                serde_json::json!({"rfilename": name, "size": size, "blobId": id,
                    "lfs": {"sha256": sha256, "size": size, "pointerSize": 134}})
            } else {
                serde_json::json!({"rfilename": name, "size": size, "blobId": id})
            }
        })
        .collect();
    serde_json::json!({"id": REPO, "sha": commit, "siblings": siblings, "gated": false}).to_string()
}
