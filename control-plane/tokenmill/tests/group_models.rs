//! Models on several worker processes that exchange what their meshes need, behind one scheduler: the same
//! answers as from one process, and nothing lost or repeated when a rank dies, hangs or lies.
//!
//! Shapes are small and divide by four. That every family is right on every mesh is tested where ranks are
//! threads; this is about processes.

mod common;

use common::{Server, checkpoint, config, signal, wait_until};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const TOKENS: usize = 24;

/// A case's shapes with some of them changed, and random weights of these.
fn model(case: &str, changed: &Value, folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(config(case)).expect("the case's configuration");
    let mut shapes: Value = serde_json::from_str(&text).expect("JSON");
    for (field, value) in changed.as_object().expect("fields") {
        shapes[field] = value.clone();
    }
    let file = folder.join("config.json");
    std::fs::write(&file, shapes.to_string()).expect("written");
    checkpoint(&file, 11, folder)
}

fn serve(model: &Path, mesh: &[&str], more: &[&str]) -> Vec<String> {
    let own = [model.to_str().expect("UTF-8"), "--device", "cpu", "--max-model-len", "512"];
    let all = own.iter().chain(&["--threads", "1", "--max-num-seqs", "8"]).chain(mesh).chain(more);
    all.map(|word| (*word).to_owned()).collect()
}

fn start(model: &Path, mesh: &[&str]) -> Server {
    let args = serve(model, mesh, &[]);
    Server::start(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn body(stream: u64, tokens: usize, temperature: f64) -> Value {
    let length = 20 + 37 * stream;
    let prompt: Vec<u64> = (0..length).map(|i| (i * i * 31 + i * 17 + stream) % 300).collect();
    json!({
        "model": "checkpoint", "prompt": prompt, "max_tokens": tokens, "seed": stream + 1,
        "temperature": temperature, "logprobs": 0, "return_token_ids": true, "ignore_eos": true,
        "stream": true,
    })
}

/// Streams an answer to its end; tokens with log-probabilities.
fn follow(url: &str, body: &Value, mut each: impl FnMut()) -> Vec<(u64, f64)> {
    let mut got = Vec::new();
    common::follow(url, body, |choice| {
        for (token, logprob) in common::tokens(choice) {
            got.push((token, logprob.expect("a number")));
            each();
        }
    });
    got
}

/// Several streams at once; `disturb` runs when `after` tokens have come in all.
fn load(
    server: &Server,
    bodies: &[Value],
    after: usize,
    disturb: impl FnOnce(),
) -> Vec<Vec<(u64, f64)>> {
    std::thread::scope(|scope| {
        let (token, tokens) = mpsc::channel();
        let stream = |body| {
            let (url, token) = (server.url.as_str(), token.clone());
            // Once enough have come nobody counts them.
            scope.spawn(move || follow(url, body, || token.send(()).unwrap_or(())))
        };
        let streams: Vec<_> = bodies.iter().map(stream).collect();
        drop(token);
        assert_eq!(tokens.iter().take(after).count(), after, "streams that go on");
        disturb();
        streams.into_iter().map(|stream| stream.join().expect("a whole stream")).collect()
    })
}

fn same(got: &[Vec<(u64, f64)>], expected: &[Vec<(u64, f64)>], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (stream, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), expected.len(), "{what}, stream {stream}");
        for (at, ((a, x), (b, y))) in got.iter().zip(expected).enumerate() {
            assert_eq!(a, b, "{what}, stream {stream}, token {at}: {x} and {y}");
            assert!((x - y).abs() <= 1e-4, "{what}, stream {stream}, token {at}: {x} and {y}");
        }
    }
}

const TP2: [&str; 2] = ["--tensor-parallel-size", "2"];
const TP4: [&str; 2] = ["--tensor-parallel-size", "4"];
const DP2: [&str; 2] = ["--data-parallel-size", "2"];
const ALL: [&str; 5] =
    ["--data-parallel-size", "2", "--tensor-parallel-size", "2", "--enable-expert-parallel"];

#[test]
fn a_group_answers_as_one_process_does() {
    let llama = json!({"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 192, "vocab_size": 384});
    let latent = json!({"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 384});
    let meshes: [(&str, &Value, &[&[&str]]); 2] = [
        ("llama/native_tied", &llama, &[&TP4, &DP2]),
        ("deepseek_v3/native_yarn", &latent, &[&TP2, &ALL]),
    ];
    for (case, changed, meshes) in meshes {
        let folder = tempfile::tempdir().expect("temporary folder");
        let model = model(case, changed, folder.path());
        let bodies: Vec<Value> = (0..4).map(|stream| body(stream, TOKENS, 0.0)).collect();
        let expected = load(&start(&model, &[]), &bodies, 0, || ());
        assert!(expected.iter().all(|tokens| tokens.len() == TOKENS));
        for mesh in meshes {
            let server = start(&model, mesh);
            same(&load(&server, &bodies, 0, || ()), &expected, &format!("{case} {mesh:?}"));
            assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(0.0));
        }
    }
}

/// Each rank of two shards of two, experts over all four.
#[test]
fn a_rank_that_dies_hangs_or_lies_ends_the_group_and_no_token_is_lost_or_repeated() {
    let latent = json!({"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 384});
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = model("deepseek_v3/native_yarn", &latent, folder.path());
    let bodies: Vec<Value> = (0..4).map(|stream| body(stream, 100, 0.7)).collect();
    let args = |more: &[&str]| serve(&model, &ALL, &[&["--step-timeout", "2"], more].concat());
    let start = |more: &[&str]| {
        let args = args(more);
        Server::start_logged(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let expected = load(&start(&[]).0, &bodies, 0, || ());
    for rank in 0..4 {
        let (server, log) = start(&[]);
        let restarts = || server.metric("tokenmill_worker_restarts_total").expect("counted");
        let mut ended = 0.0;
        for how in ["KILL", "STOP"] {
            let got = load(&server, &bodies, 120, || {
                signal(how, server.workers()[&rank]);
                let begun = Instant::now();
                let limit = if how == "KILL" { 2 } else { 6 };
                wait_until("noticed", Duration::from_secs(limit), || restarts() > ended);
                eprintln!("{how} of rank {rank} noticed after {:?}", begun.elapsed());
                server.wait_ready(Duration::from_secs(10));
            });
            ended += 1.0;
            same(&got, &expected, &format!("{how} of rank {rank}"));
            assert_eq!(restarts(), ended);
            if how == "STOP" {
                // Whoever waited for it says so, with the collective it did not come to.
                let text = log.lock().expect("no panic").clone();
                assert!(text.contains(&format!("rank {rank} did not come to")), "{text}");
            }
        }
    }
    for fault in ["0,20,token", "1,20,digest", "2,20,digest", "3,20,token"] {
        let (server, _) = start(&["--plant-fault", fault]);
        same(&load(&server, &bodies, 0, || ()), &expected, fault);
        assert_eq!(server.metric("tokenmill_worker_divergences_total"), Some(1.0), "{fault}");
        assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(1.0), "{fault}");
    }
}

#[test]
fn what_a_mesh_does_not_divide_is_refused_with_what_would_do() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = checkpoint(&config("llama/native_tied"), 3, folder.path());
    let args = serve(&model, &TP2, &["--port", "0"]);
    let output =
        common::ends(std::process::Command::new(common::program()).arg("serve").args(args));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--tensor-parallel-size 2"), "{text}");
}
