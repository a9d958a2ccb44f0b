//! Real processes that die, and broken inputs: nothing is lost, repeated or left behind.
//!
//! Timing is bounded, not exact. A worker's death in every scheduler state is the simulator's business.

mod common;

use common::{PROGRAM, Server, signal};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A step of 5 ms and no model.
const FAKE: [&str; 4] = ["--fake-engine", "5000,0,0", "--max-model-len", "4096"];

fn body(tokens: u32, stream: bool) -> Value {
    json!({
        "model": "fake", "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 1, "seed": 5,
        "return_token_ids": true, "ignore_eos": true, "stream": stream,
    })
}

fn streamed_tokens(server: &Server, tokens: u32) -> Vec<u64> {
    server
        .stream("/v1/completions", &body(tokens, true))
        .iter()
        .filter_map(|event| event["choices"][0]["token_ids"].as_array().cloned())
        .flatten()
        .filter_map(|token| token.as_u64())
        .collect()
}

#[test]
fn a_killed_worker_ends_in_a_resumed_stream_and_a_ready_server() {
    let server = Server::start(&FAKE);
    let undisturbed = streamed_tokens(&server, 200);
    assert_eq!(undisturbed.len(), 200);
    let resumed = std::thread::scope(|scope| {
        let stream = scope.spawn(|| streamed_tokens(&server, 200));
        std::thread::sleep(Duration::from_millis(300));
        signal("KILL", server.worker_pid().expect("a worker"));
        let killed = Instant::now();
        std::thread::sleep(Duration::from_millis(50));
        server.wait_ready(Duration::from_secs(5));
        assert!(killed.elapsed() < Duration::from_secs(5));
        stream.join().expect("the stream ends")
    });
    assert_eq!(resumed, undisturbed, "no token lost, none repeated");
    assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(1.0));
}

#[test]
fn a_server_that_is_told_to_stop_finishes_what_runs() {
    let mut server = Server::start(&FAKE);
    let url = server.url.clone();
    let running = std::thread::spawn(move || {
        let client = reqwest::blocking::Client::new();
        let sent = client.post(format!("{url}/v1/completions")).json(&body(100, false)).send();
        sent.expect("answered").json::<Value>().expect("JSON")
    });
    std::thread::sleep(Duration::from_millis(200));
    signal("TERM", server.pid());
    let answer = running.join().expect("answered");
    assert_eq!(answer["choices"][0]["token_ids"].as_array().map(Vec::len), Some(100));
    assert!(server.wait().success(), "an orderly end");
}

#[test]
fn a_killed_server_leaves_no_worker() {
    let server = Server::start(&FAKE);
    let worker = server.worker_pid().expect("a worker");
    signal("KILL", server.pid());
    let gone = Instant::now() + Duration::from_secs(2);
    let process = format!("/proc/{worker}");
    while Path::new(&process).exists() {
        assert!(Instant::now() < gone, "the worker outlived its server");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn clients_that_leave_leave_nothing_behind() {
    let server = Server::start(&FAKE);
    let client = reqwest::blocking::Client::new();
    for _ in 0..10 {
        let sent =
            client.post(format!("{}/v1/completions", server.url)).json(&body(3000, true)).send();
        drop(sent.expect("accepted"));
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let used = || server.metric("tokenmill_kv_blocks{state=\"used\"}");
    while used() != Some(0.0) {
        assert!(Instant::now() < deadline, "{:?} blocks are still held", used());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(server.metric("tokenmill_requests_running"), Some(0.0));
}

#[test]
fn what_cannot_be_served_says_why() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().to_str().expect("UTF-8").to_owned();
    let refused = |args: &[&str], named: &str| {
        let begun = Instant::now();
        let output = Command::new(PROGRAM)
            .arg("serve")
            .args(args)
            .args(["--port", "0"])
            .output()
            .expect("starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?} was served");
        assert!(text.contains(named), "{args:?} does not say {named}: {text}");
        assert!(begun.elapsed() < Duration::from_secs(10));
    };
    refused(&[&path], "config.json");
    refused(&["no-such-thing"], "recipe list");
    refused(&["--max-num-seqs", "9", "--max-num-batched-tokens", "9"], "--max-num-batched-tokens");
    refused(&["--tensor-parallel-size", "2"], "--tensor-parallel-size");
    refused(&["--max-model-len", "999999"], "--max-model-len");
    refused(&["--no-such-flag"], "--no-such-flag");
    let config = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/parity/cases/llama/native_tied/config.json");
    std::fs::copy(config, folder.path().join("config.json")).expect("copied");
    refused(&[&path, "--max-model-len", "64"], "safetensors");
    std::fs::write(folder.path().join("model.safetensors"), b"\xff\xff\xff").expect("written");
    refused(&[&path, "--max-model-len", "64"], "model.safetensors");
}
