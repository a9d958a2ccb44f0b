//! Real processes that die, and broken inputs: nothing is lost, repeated or left behind.
//!
//! Timing is bounded, not exact. A worker's death in every scheduler state is the simulator's business.

mod common;

use common::{Server, checkpoint, config, program, signal, signal_group, wait_until};
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

/// Streams an answer; `each` hears how many tokens have arrived. Tokens with log-probabilities.
fn follow(server: &Server, body: &Value, mut each: impl FnMut(usize)) -> Vec<(u64, f64)> {
    let mut got = Vec::new();
    common::follow(&server.url, body, |choice| {
        for (token, logprob) in common::tokens(choice) {
            got.push((token, logprob.expect("a number")));
            each(got.len());
        }
    });
    got
}

/// The fake engine needs only seed and position to go on; a model needs its whole context back.
#[test]
fn a_model_whose_worker_dies_twice_goes_on_with_the_same_tokens() {
    const TOKENS: usize = 900;
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = checkpoint(&config("qwen3/native_layer_types"), 3, folder.path());
    let server = Server::start(&[
        model.to_str().expect("UTF-8"),
        "--max-model-len",
        "1024",
        "--threads",
        "1",
    ]);
    let mut deaths = 0.0;
    let mut worst: f64 = 0.0;
    for temperature in [0.0, 0.8] {
        let prompt: Vec<u64> = (0..100).map(|i| (i * i * 31 + i * 17) % 500).collect();
        let body = json!({
            "model": "checkpoint", "prompt": prompt, "max_tokens": TOKENS, "seed": 5,
            "temperature": temperature, "logprobs": 0, "return_token_ids": true,
            "ignore_eos": true, "stream": true,
        });
        let undisturbed = follow(&server, &body, |_| ());
        assert_eq!(undisturbed.len(), TOKENS);
        let mut killed: Option<(Instant, u32)> = None;
        let resumed = follow(&server, &body, |arrived| {
            if arrived != 70 && arrived != 400 {
                return;
            }
            let worker = server.worker_pid().expect("a worker");
            signal("KILL", worker);
            deaths += 1.0;
            // Nobody can finish the request now, so it was under way when the worker died. It waits for
            // the next one as soon as the scheduler knows.
            let counts = ["tokenmill_requests_running", "tokenmill_requests_waiting"];
            wait_until("in mid-stream", Duration::from_secs(1), || {
                counts.iter().any(|count| server.metric(count) == Some(1.0))
            });
            if let Some((at, before)) = killed.replace((Instant::now(), worker)) {
                assert!(at.elapsed() < Duration::from_secs(5), "resumed after {:?}", at.elapsed());
                assert_ne!(worker, before, "another process took over");
            }
        });
        let (at, _) = killed.expect("killed");
        server.wait_ready(Duration::from_secs(5));
        assert!(at.elapsed() < Duration::from_secs(5), "resumed after {:?}", at.elapsed());
        assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(deaths));
        assert_eq!(resumed.len(), TOKENS, "temperature {temperature}");
        for (i, ((a, x), (b, y))) in undisturbed.iter().zip(&resumed).enumerate() {
            assert_eq!(a, b, "temperature {temperature}, token {i}");
            assert!((x - y).abs() <= 1e-4, "temperature {temperature}, token {i}: {x} and {y}");
            worst = worst.max((x - y).abs());
        }
    }
    eprintln!("largest difference after {deaths} deaths: {worst:.2e}");
}

/// A slow one is not waited for in line by those who come while there is none; who was there before is kept.
#[test]
fn a_group_that_starts_slowly_sends_new_requests_away_and_keeps_the_old_ones() {
    const SLOW: [&str; 6] =
        ["--fake-engine", "5000,0,0,5500", "--max-model-len", "4096", "--max-num-seqs", "1"];
    let expected = streamed_tokens(&Server::start(&FAKE), 200);
    let server = Server::begin(&SLOW);
    let told = |stream| server.told("/v1/completions", &body(3, stream));
    let away = || server.get("/readyz").is_ok_and(|(status, _)| status == 503);
    // The first start is told in per cent, not in seconds.
    let (status, after, error) = told(false);
    assert_eq!((status, after, &error["code"]), (503, Some(2), &json!("not_ready")));
    assert!(away() && error["message"].as_str().is_some_and(|text| text.contains(" %")), "{error}");
    server.wait_ready(Duration::from_secs(20));
    std::thread::scope(|scope| {
        let ask = || scope.spawn(|| streamed_tokens(&server, 200));
        let counts = |running, waiting| {
            let is = |name: &str, count| server.metric(name) == Some(count);
            wait_until("as many as asked", Duration::from_secs(5), || {
                is("tokenmill_requests_running", running)
                    && is("tokenmill_requests_waiting", waiting)
            });
        };
        let running = ask();
        counts(1.0, 0.0);
        let waiting = ask();
        counts(1.0, 1.0);
        signal("KILL", server.worker_pid().expect("a worker"));
        let gone = Instant::now();
        wait_until("not ready", Duration::from_secs(2), away);
        let left = |stream| {
            let (status, after, error) = told(stream);
            assert_eq!((status, &error["code"]), (503, &json!("not_ready")), "{error}");
            assert_eq!(error["type"], "server_error");
            after.expect("when to come again")
        };
        let (first, begun) = (left(false), gone.elapsed());
        assert!(begun < Duration::from_secs(2), "answered at once, after {begun:?}");
        assert!((4..=6).contains(&first), "{first} s");
        std::thread::sleep(Duration::from_secs(3).saturating_sub(gone.elapsed()));
        let second = left(true);
        assert!((1..=first - 2).contains(&second), "{second} s after {first} s");
        assert!(away());
        for (stream, name) in [(running, "ran"), (waiting, "waited")] {
            assert_eq!(stream.join().expect("a whole stream"), expected, "what {name}");
        }
        // Once the time has passed that was told, a new one is served.
        let took = gone.elapsed();
        assert!(took > Duration::from_secs(5), "{took:?}");
    });
    assert_eq!(server.metric("tokenmill_refused_total{refused_by=\"not_ready\"}"), Some(3.0));
    assert_eq!(told(false).0, 200);
    assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(1.0));
}

#[test]
fn a_group_that_starts_quickly_is_waited_for_in_line() {
    let server = Server::start(&["--fake-engine", "5000,0,0,1000", "--max-model-len", "4096"]);
    for stream in [false, true] {
        signal("KILL", server.worker_pid().expect("a worker"));
        let killed = Instant::now();
        wait_until("not ready", Duration::from_secs(2), || {
            server.get("/readyz").is_ok_and(|(status, _)| status == 503)
        });
        assert_eq!(server.told("/v1/completions", &body(3, stream)).0, 200);
        assert!(killed.elapsed() > Duration::from_secs(1), "by the next worker");
        assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    }
    assert_eq!(server.metric("tokenmill_refused_total{refused_by=\"not_ready\"}"), Some(0.0));
}

/// Answered in full, after the server was told to stop in the middle.
fn finishes(mut server: Server, tell: impl FnOnce(u32)) {
    let url = server.url.clone();
    let running = std::thread::spawn(move || {
        let client = reqwest::blocking::Client::new();
        let sent = client.post(format!("{url}/v1/completions")).json(&body(300, false)).send();
        sent.expect("answered").json::<Value>().expect("JSON")
    });
    wait_until("running", Duration::from_secs(10), || {
        server.metric("tokenmill_requests_running") == Some(1.0)
    });
    assert!(!running.is_finished(), "told to stop in the middle of a request");
    let worker = server.worker_pid();
    tell(server.pid());
    std::thread::sleep(Duration::from_millis(200));
    assert!(!running.is_finished(), "still in the middle");
    assert!(worker.is_some() && server.worker_pid() == worker, "the worker goes on");
    let answer = running.join().expect("answered");
    assert_eq!(answer["choices"][0]["token_ids"].as_array().map(Vec::len), Some(300));
    assert_eq!(server.wait().code(), Some(0), "an orderly end");
}

#[test]
fn a_server_that_is_told_to_stop_finishes_what_runs() {
    finishes(Server::start(&FAKE), |server| signal("TERM", server));
}

/// As terminals and service managers do it: the worker hears what the server hears.
#[test]
fn a_worker_that_is_told_to_stop_leaves_when_to_its_server() {
    for kind in ["INT", "TERM"] {
        finishes(Server::start_apart(&FAKE), |group| signal_group(kind, group));
    }
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
    let open = || {
        let url = format!("{}/v1/completions", server.url);
        client.post(url).json(&body(3000, true)).send().expect("accepted")
    };
    let streams: Vec<_> = (0..10).map(|_| open()).collect();
    let running = || server.metric("tokenmill_requests_running");
    let used = || server.metric("tokenmill_kv_blocks{state=\"used\"}");
    wait_until("ten requests hold blocks", Duration::from_secs(5), || {
        running() == Some(10.0) && used() >= Some(10.0)
    });
    drop(streams);
    // To the end they would take fifteen seconds.
    wait_until("no block is held", Duration::from_secs(5), || used() == Some(0.0));
    assert_eq!(running(), Some(0.0));
    let aborted = server.metric("tokenmill_generations_total{finished_by=\"abort\"}");
    assert_eq!(aborted, Some(10.0));
}

#[test]
fn what_cannot_be_served_says_why() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().to_str().expect("UTF-8").to_owned();
    let refused = |args: &[&str], named: &[&str]| {
        let begun = Instant::now();
        let output = Command::new(program())
            .arg("serve")
            .args(args)
            .args(["--port", "0"])
            .output()
            .expect("starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?} was served");
        for named in named {
            assert!(text.contains(named), "{args:?} does not say {named}: {text}");
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{args:?} took long");
    };
    refused(&[&path], &[&path, "config.json"]);
    refused(&["no-such-thing"], &["no-such-thing", "recipe list"]);
    refused(
        &["--max-num-seqs", "9", "--max-num-batched-tokens", "9"],
        &["--max-num-batched-tokens"],
    );
    refused(&["--device", "cpu", "--tensor-parallel-size", "3"], &["--tensor-parallel-size 3"]);
    refused(&["--max-model-len", "999999"], &["--max-model-len"]);
    refused(&["--no-such-flag"], &["--no-such-flag"]);
    let config = config("llama/native_tied");
    std::fs::copy(&config, folder.path().join("config.json")).expect("copied");
    refused(&[&path], &[&path, "safetensors"]);
    let weights = folder.path().join("model.safetensors");
    std::fs::write(&weights, b"\xff\xff\xff").expect("written");
    refused(&[&path], &["model.safetensors"]);

    // A download that stopped half-way: the header is whole, the data is not.
    let made = tempfile::tempdir().expect("temporary folder");
    let whole = checkpoint(&config, 3, made.path());
    let bytes = std::fs::read(whole.join("model.safetensors")).expect("read");
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).expect("written");
    refused(&[&path], &["model.safetensors", "cut short"]);
    std::fs::write(folder.path().join("config.json"), b"{ \"model_type\": ").expect("written");
    refused(&[&path], &["config.json"]);
}
