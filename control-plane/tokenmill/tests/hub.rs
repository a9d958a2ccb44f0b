//! `tokenmill serve ORG/NAME` against a hub on the loopback interface: fetched once, served from the
//! cache afterwards, and every failure told on the way out.
//!
//! The protocol's details are the fetching crate's to test. Invariant: a server is never ready with
//! a model that was not fetched whole.

mod common;
#[allow(dead_code, clippy::unwrap_used, reason = "made for the fetching crate's tests")]
#[path = "../../../worker/weights/tests/hub/server.rs"]
mod server;

use common::{Server, checkpoint, config, program};
use serde_json::json;
use server::{Blob, Hub, REPO, State};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const COMMIT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const WEIGHTS: &str = "model.safetensors";

/// A hub that holds one random checkpoint.
fn hub() -> Hub {
    let folder = tempfile::tempdir().expect("temporary folder");
    let made = checkpoint(&config("llama/native_tied"), 7, folder.path());
    let mut state = State::default();
    let files = std::fs::read_dir(made).expect("a folder").map(|entry| {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("UTF-8");
        let content = std::fs::read(entry.path()).expect("readable");
        let large = Path::new(&name).extension().is_some_and(|e| e == "safetensors");
        let blob = Blob { content, large, listed_size: None, listed_sha256: None };
        (name, blob)
    });
    state.commits.insert(COMMIT.into(), files.collect());
    assert!(state.commits[COMMIT].contains_key(WEIGHTS), "the checkpoint is one file");
    state.branches.insert("main".into(), COMMIT.into());
    Hub::start(state)
}

/// The variables that lead a command to `endpoint` and to a cache of its own.
fn environment<'a>(endpoint: &'a str, cache: &'a TempDir) -> [(&'static str, &'a str); 3] {
    let cache = cache.path().to_str().expect("UTF-8");
    // An empty one stands for none, so that the machine's own does not get in.
    [("HF_ENDPOINT", endpoint), ("HF_HOME", cache), ("HF_TOKEN", "")]
}

/// What `serve REPO` says when it must end by itself, with an error.
fn refused(environment: &[(&str, &str)], repo: &str) -> String {
    let mut command = Command::new(program());
    command.args(["serve", repo, "--port", "0"]).envs(environment.iter().copied());
    let output = common::ends(&mut command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!out.contains("http://127"), "no address is given: {out}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

fn completes(server: &Server) -> serde_json::Value {
    let body = json!({"model": REPO, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0,
        "return_token_ids": true, "ignore_eos": true});
    let answer = server.ok("/v1/completions", &body);
    assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
    answer["choices"][0]["token_ids"].clone()
}

#[test]
fn a_repository_is_fetched_served_and_then_served_without_the_hub() {
    let (hub, cache) = (hub(), tempfile::tempdir().expect("temporary folder"));
    let endpoint = hub.endpoint();
    let server = Server::start_in(&environment(&endpoint, &cache), &[REPO]);
    let first = completes(&server);
    let (_, models) = server.get("/v1/models").expect("an answer");
    assert!(models.contains(REPO), "{models}");
    drop(server);
    let fetched = |hub: &Hub| hub.state().seen.iter().filter(|s| s.path.ends_with(WEIGHTS)).count();
    assert_eq!(fetched(&hub), 1);
    assert!(hub.state().seen.iter().all(|seen| seen.token.is_none()), "an empty token was sent");

    let server = Server::start_in(&environment(&endpoint, &cache), &[REPO]);
    assert_eq!(completes(&server), first);
    assert_eq!(fetched(&hub), 1, "the second start takes the weights from the cache");
    drop(server);

    // Nothing listens on port 1.
    let server = Server::start_in(&environment("http://127.0.0.1:1", &cache), &[REPO]);
    assert_eq!(completes(&server), first);
}

#[test]
fn what_cannot_be_fetched_ends_the_command_with_the_reason() {
    let (hub, cache) = (hub(), tempfile::tempdir().expect("temporary folder"));
    let endpoint = hub.endpoint();
    let environment = environment(&endpoint, &cache);

    let said = refused(&environment, "acme/absent");
    assert!(said.contains("acme/absent") && said.contains(&endpoint), "{said}");

    hub.state().gate = Some("secret".into());
    let said = refused(&environment, REPO);
    assert!(said.contains(REPO) && said.contains("HF_TOKEN"), "{said}");
    hub.state().gate = None;

    // Cut every time without a byte, so that no retry advances.
    hub.state().cut = Some((WEIGHTS.into(), 0, u32::MAX));
    let said = refused(&environment, REPO);
    assert!(said.contains(WEIGHTS), "{said}");

    // What is broken once is taken up where it ended.
    hub.state().cut = Some((WEIGHTS.into(), 1000, 1));
    let server = Server::start_in(&environment, &[REPO]);
    completes(&server);
    let resumed = hub.state().seen.iter().any(|s| s.range.as_deref() == Some("bytes=1000-"));
    assert!(resumed, "the rest alone was asked for");
}
